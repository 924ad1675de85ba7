"""The settings that every training of a classifier has; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from advgame.run.accelerators import has_bf16
from advgame.run.options import Count, Names, Norm, Positive, Share, parse_number
from advgame.run.selection import Select

_DATA = tyro.conf.arg(aliases=["--data"], metavar="NAME|FOLDER|FILE.npz|MODULE:FUNCTION")
Dataset = Annotated[str, _DATA]
"""What names a data set; `advgame.data.names` reads it."""
OptionalDataset = Annotated[str | None, _DATA]
"""The same where something else may say it."""


LARGE = "preact_resnet18"
"""The network of colour images where there is a GPU."""


@dataclass(frozen=True)
class RunConfig:
    """Data, defender, training and evaluation of a run; games add their own fields."""

    dataset: Dataset = "digits"
    """digits (embedded), mnist, cifar10, … from --data-dir, or your own: see docs/data.md"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    image_size: Count | None = None
    """resize images and crop them to so many pixels square; None leaves them"""
    train_n: int | None = None
    """use only this many training images"""
    model: str = "small_cnn"
    """small_cnn, minimax_cnn, lean_resnet, resnet18, preact_resnet18, wrn-DEPTH-WIDEN, e.g.
    wrn-34-10, or your own: package.module:factory(1, width=8), which returns an nn.Module for
    images in [0, 1]"""
    init: str | None = None
    """weights to start from: a file, or a run folder or zoo:NAME, of which the best; they bring
    their own normalisation, or none"""
    init_sha256: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""
    """of the content of --init, which a run that goes on must find again"""
    norm: Norm = "Linf"
    """of the ball that the classifier learns and is judged in; Linf or L2, in any case"""
    eps: str = "0.15"
    """ε₀, the radius that the classifier is judged at, e.g. 0.15 or 8/255; in L2 a length, e.g.
    128/255"""
    epochs: Count = 40
    """passes over the training images"""
    budget: Positive | None = None
    """instead of --epochs: counted forwards of the defender per training image, e.g. 920 (40 epochs
    of PGD-AT with 10 steps); all schedules follow the share that is spent"""
    prices: tuple[Positive, Positive] = (1.0, 2.0)
    """of --budget: what an input-backward and a backward with weights cost, in forwards"""
    batch_size: Count = 64
    """images per step and process"""
    lr: Positive = 0.1
    """peak learning rate of the defender"""
    weight_decay: Share = 5e-4
    """weight decay of the defender"""
    true_probability: float = 1.0
    """label smoothing: the probability left on the true class; 1 is none"""
    schedule: Literal["onecycle", "multistep", "constant"] = "onecycle"
    """learning-rate schedule, per step"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: shares of the training at which the rate drops tenfold"""
    eps_ramp: Share = 0.0
    """share of the training over which ε grows from 0"""
    ema: float | None = None
    """decay, once it has risen to it, of a moving average of the weights, which is then validated
    and reported"""
    grad_clip: Positive | None = None
    """largest gradient norm of the defender"""
    validate_every: Count = 1
    """epochs between validations"""
    save_every: Count = 1
    """epochs between checkpoints"""
    select: Select = "auto"
    """what the best weights score best in on the validation split: clean, robust (PGD-10), own (the
    game's own attacker, where it has one), or auto, which is what the game is for"""
    attacks: Names = ("fgsm", "pgd20", "autoattack")
    """attacks of the final report: names that evaluate lists with --list, or your own,
    package.module:factory(1, size=0.5), which is called with the ball before the rest"""
    eval_n: Count | None = None
    """test images in the report; None takes all"""
    seed: int = 0
    """seed of the run"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    devices: Count = 1
    """processes on each machine, one device each"""
    nodes: Count = 1
    """machines; on several, start it by torchrun or srun (docs/cluster.md)"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto is bf16-mixed on CUDA and, for colour images, on CPUs where it is faster"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the current time when empty"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""

    @property
    def processes(self) -> int:
        """Processes that train together: nodes times devices of each."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class PerturbedConfig(RunConfig):
    """Of a game that adversarial weight perturbation can go round."""

    awp: Positive | None = None
    """γ: descend at weights perturbed by this share of each layer's norm; None does not"""
    awp_start: Share = 0.3
    """share of the training before --awp begins"""


def recipes(
    *,
    mnist: Mapping[str, Any] | None = None,
    colour: Mapping[str, Any] | None = None,
    svhn: Mapping[str, Any] | None = None,
    small: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Data set -> what it changes in the settings of a training.

    Args:
        mnist: what a game changes further.
        colour: the same of CIFAR-10, CIFAR-100 and SVHN.
        svhn: the same of SVHN alone.
        small: the same of one's own colour images below 16 pixels, after ``colour``.
    """
    grey = {"eps": "0.3", "eps_ramp": 0.4, "epochs": 10, "batch_size": 128, "eval_n": 1000}
    usual = {"eps": "8/255", "epochs": 30, "batch_size": 128, "ema": 0.999, "eval_n": 1000}
    found = {"model": LARGE, **usual, **(colour or {})}
    usual_grey = {**grey, **(mnist or {})}
    return {
        "digits": {},
        "mnist": usual_grey,
        "cifar10": found,
        "cifar100": found,
        "svhn": {**found, "lr": 0.05, **(svhn or {})},
        "tinyimagenet": found,
        "fashionmnist": {**usual_grey, "eps": "0.1"},
        # one's own: ink on paper withstands 0.3, photographs do not
        "grey": {**usual_grey, "eps": "8/255"},
        "small": {**found, "model": "small_cnn", **(small or {})},
    }


def paper_recipes(
    *, mnist: Mapping[str, Any], cifar10: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The same of a game whose paper has settings of its own for MNIST and CIFAR-10.

    Other grey images have those of MNIST and other colour images those of CIFAR-10, both with the ε
    of `recipes`: the paper says nothing of theirs.

    Args:
        mnist: the paper's on MNIST.
        cifar10: the paper's on CIFAR-10.
    """
    found: dict[str, dict[str, Any]] = {"digits": {}, "mnist": {**mnist}, "cifar10": {**cifar10}}
    for name, usual in recipes().items():
        if name not in found:
            nearest = mnist if name in ("fashionmnist", "grey") else cifar10
            found[name] = {**nearest, "eps": usual["eps"]}
    return found


def on_a_cpu() -> dict[str, Any]:
    """What a training of colour images changes on a machine without a GPU, to end within hours.

    PreActResNet-18 asks for eleven times the multiplications of lean_resnet. bf16 halves the time
    where the CPU has it.
    """
    precision = "bf16-mixed" if has_bf16() else "32-true"
    return {"model": "lean_resnet", "precision": precision, "epochs": 12, "validate_every": 4}


# Data set -> ε₀ of --norm L2. Digits: less than half of 1.18, by which the two nearest images of
# different classes differ. MNIST: of the 1.5 to 2 that are usual, the larger. CIFAR and SVHN: as in
# Rice et al. 2020, Wu et al. 2020 (AWP) and RobustBench.
L2_EPS: Mapping[str, str] = {
    "digits": "0.5",
    "mnist": "2.0",
    **dict.fromkeys(("cifar10", "cifar100", "svhn"), "128/255"),
}


def odd_radius(whose: str, norm: str, eps: float) -> str:
    """A warning where an L2 radius is far below what is usual, "" elsewhere.

    An L∞ radius typed as a length holds next to nothing: every classifier is robust in it.

    Args:
        whose: the data set's recipe, see `advgame.data.names.recipe`.
        norm: of the ball.
        eps: its radius.
    """
    usual = L2_EPS.get(whose)
    if norm != "L2" or usual is None or eps >= parse_number(usual) / 3:
        return ""
    return (
        f"ε = {eps:.3g} is small beside {usual}, which is usual in L2 on {whose}: a length "
        "is meant, not the change of a pixel"
    )


def idle_settings(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Why -> options of every training that then change nothing."""
    found: dict[str, tuple[str, ...]] = {}
    if config.budget is None:
        found["a training without --budget"] = ("prices",)
    else:
        found["--budget"] = ("epochs",)
    if config.schedule != "multistep":
        found[f"--schedule {config.schedule}"] = ("milestones",)
    if isinstance(config, PerturbedConfig) and config.awp is None:
        found["a training without --awp"] = ("awp_start",)
    return found

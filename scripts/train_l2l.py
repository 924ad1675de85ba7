"""L2L: a classifier learns from a network that learns to attack it.

    python scripts/train_l2l.py                                   # digits, Grad, minutes on 2 cores
    python scripts/train_l2l.py --attacker two-step --form shared
    python scripts/train_l2l.py --attacker pgd                    # a control: plain, fgsm or pgd
    python scripts/train_l2l.py --dataset cifar10 --data-dir DIR  # uses a GPU if there is one
    python scripts/train_l2l.py --resume runs/NAME                # go on, to the same bits
    python scripts/evaluate.py runs/A --attackers runs/B          # B's attacker on A's classifier

The game is `advgame.games.l2l`, the attacker `agents.l2l`. A run leaves one folder: settings,
TensorBoard events, metrics.csv, checkpoints, report.json and report.md (AutoAttack on test images),
curves.png, examples.png, and attacker.safetensors, the attacker as it was in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from advgame import attacks
from advgame.choices import COLOUR, BatchNormMode, Form, Preset
from advgame.run.defender_job import DefenderJob, ball
from advgame.run.folder import RunFolder
from advgame.run.job import about
from advgame.run.options import Count, Positive, Share
from advgame.run.selection import Criterion
from advgame.run.settings import RunConfig, recipes
from agents.settings import Scaling, Width

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from advgame.attacks import Attack
    from advgame.data import ImageSet, Splits
    from advgame.games.training import DefenderTraining, Rules
    from advgame.threat import Threat

Kind = Literal["naive", "grad", "two-step", "k-step", "plain", "fgsm", "pgd"]
CONTROLS: dict[str, Callable[[Threat], Attack] | None] = {
    "plain": None,
    "fgsm": lambda threat: attacks.fgsm(threat),
    # the paper's 10 steps of 0.007 at ε 0.031, from a random start
    "pgd": lambda threat: attacks.pgd(threat, 10, threat.eps * 7 / 31),
}

# Plain training is for clean images. Naive's classifier is robust to nothing but its own attacker.
PURPOSES: dict[Kind, Criterion] = {"plain": "clean", "naive": "own"}

# options of a network that learns, which the controls have not
LEARNERS_OWN = (
    "width", "scaling", "form", "attacker_steps", "attacker_lr", "attacker_lr_factor",
    "attacker_weight_decay", "gradient_mode", "attacker_mode", "learning_mode",
)  # fmt: skip


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by L2L and report its robustness.

    The defaults shown are those of the --dataset and --preset on the same command line.
    """

    weight_decay: Share = 2e-4
    """weight decay of the defender"""
    preset: Preset = "default"
    """default: ours; repo: the published code's settings"""
    attacker: Kind = "grad"
    """naive, grad, two-step or k-step (of --steps) learn; plain, fgsm and pgd are controls"""
    steps: Count = 3
    """of k-step: cells of the attacker"""
    width: Width = "small"
    """of the attacker: wide, wide-repo, slim, two-block or small"""
    scaling: Scaling = "image"
    """the gradient it sees is divided by the largest entry of the image, or of the batch (paper)"""
    form: Form = "alternating"
    """alternating, as published, or shared: one forward for both players, a third cheaper"""
    attacker_steps: Count = 1
    """of the attacker per step of the defender"""
    attacker_lr: Positive = 1e-3
    """Adam's, constant"""
    attacker_lr_factor: Positive = 1.0
    """on the attacker's learning rate: two time scales (Heusel et al. 2017)"""
    attacker_weight_decay: Share = 2e-4
    """Adam's"""
    gradient_mode: Literal["eval", "train", "repo"] = "eval"
    """batch norm of the classifier in that gradient; repo is train and moves its statistics"""
    attacker_mode: BatchNormMode = "eval"
    """batch norm of the attacker in the classifier's step (shared: always train)"""
    learning_mode: BatchNormMode = "eval"
    """batch norm of the classifier in the attacker's step (shared: always train)"""


# what a data set changes in Config
RECIPES = recipes(colour={"width": "slim", "eps": "0.031"}, small={"width": "small"})
REPO: dict[str, Any] = {"preset": "repo", "scaling": "paper", "gradient_mode": "repo"}
_REPO_COLOUR: dict[str, Any] = {
    "model": "wrn-34-10",
    "width": "wide-repo",
    "epochs": 76,  # the code's; its third drop, at 90, is never reached
    "schedule": "multistep",
    "milestones": (29 / 76, 59 / 76),  # before epochs 30 and 60, counted from 1
    "ema": None,
}


class Job(DefenderJob[Config, "DefenderTraining"]):
    """The job that trains a classifier by L2L, or by one of its controls."""

    config = Config
    helped = True
    peeked = {**DefenderJob.peeked, "preset": "default"}  # noqa: RUF012
    recipes = RECIPES
    repo = REPO
    repo_recipes = dict.fromkeys(COLOUR, _REPO_COLOUR)
    linf_only = "L2L's network ends in ε·tanh, which fills an L∞ ball; train.py plays PGD-AT in L2"

    @override
    def on_a_cpu(self) -> Mapping[str, Any]:
        """The slim attacker would ask for seven times what `lean_resnet` does, at each pass."""
        return {**super().on_a_cpu(), "width": "small"}

    @override
    def title(self, config: Config) -> str:
        return f"L2L, {config.attacker},"

    @override
    def purpose(self, config: Config) -> Criterion:
        return PURPOSES.get(config.attacker, "robust")

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        own: tuple[str, ...] = LEARNERS_OWN if config.attacker in CONTROLS else ()
        if config.attacker == "naive":  # it is told no gradient
            own = ("scaling", "gradient_mode")
        steps = () if config.attacker == "k-step" else ("steps",)
        ramp = ("eps_ramp",) if config.attacker == "plain" else ()
        modes = ("attacker_mode", "learning_mode") if config.form == "shared" else ()
        return {f"--attacker {config.attacker}": (*own, *steps, *ramp), "--form shared": modes}

    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        """The game with its attacker, or the control."""
        import torch

        from advgame.games.adversarial_training import AdversarialTraining
        from advgame.games.l2l import L2L, Modes
        from advgame.seeding import seeded_init
        from agents.attacker_network import AttackerPlayer
        from agents.l2l import GRADIENTS, L2LNetwork
        from agents.reinforce import averaging

        if config.attacker in CONTROLS:
            return AdversarialTraining(ball(config), CONTROLS[config.attacker])
        gradients = GRADIENTS.get(config.attacker, config.steps)
        with seeded_init(config.seed, "attacker"):
            network = L2LNetwork(data.shape, gradients, config.width, config.scaling)
        network = network.to(fabric.device)
        if fabric.device.type == "cuda":
            network = network.to(memory_format=torch.channels_last)
        player = AttackerPlayer(
            network,
            lr=config.attacker_lr * config.attacker_lr_factor,
            weight_decay=config.attacker_weight_decay,
            synchronise=averaging(fabric),
        )
        modes = Modes(
            gradient="eval" if config.gradient_mode == "eval" else "train",
            attacker=config.attacker_mode,
            learning=config.learning_mode,
            keep_buffers=config.gradient_mode != "repo",
        )
        return L2L(ball(config), player, config.form, config.attacker_steps, modes)

    def own_attacker(self, game: DefenderTraining, threat: Threat) -> Attack | None:
        """What the network does to the validation split."""
        from agents.attacker_network import network_of

        network = network_of(game.rules)
        return None if network is None else network.attack(threat)

    def judging(
        self, config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Threat
    ) -> Mapping[str, Any]:
        """Saves the attacker to a file; the report gets nothing further."""
        from agents.attacker_file import NAME
        from agents.attacker_network import network_of

        if network := network_of(game.rules):
            network.save(run.path / NAME, about(config))
        return {}


job = Job()

if __name__ == "__main__":
    job.main()

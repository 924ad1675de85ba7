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

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import tyro
from lightning_fabric import Fabric

from advgame.attacks import Attack, BatchNormMode, fgsm, pgd
from advgame.classifiers import Normalise, make_classifier
from advgame.data import DATASETS, STATISTICS, Splits
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.judge import judge
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.l2l import L2L, Form, Modes
from advgame.games.training import PANELS, DefenderTraining, Rules
from advgame.losses import check_smoothing
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder, command, commit
from advgame.run.job import Script
from advgame.run.options import parse_eps, peek, typed_options
from advgame.run.selection import Criterion
from advgame.run.settings import RunConfig, check_run
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker_file import NAME
from agents.attacker_networks import Width
from agents.l2l import GRADIENTS, L2LAttack, L2LAttacker, L2LNetwork, L2LPlayer, Scaling
from agents.reinforce import averaging

Preset = Literal["default", "repo"]
Kind = Literal["naive", "grad", "two-step", "k-step", "plain", "fgsm", "pgd"]
CONTROLS = {
    "plain": None,
    "fgsm": fgsm,
    # the paper's 10 steps of 0.007 at ε 0.031, from a random start
    "pgd": lambda threat: pgd(threat, 10, threat.eps * 7 / 31),
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

    weight_decay: float = 2e-4
    """weight decay of the defender"""
    preset: Preset = "default"
    """default: ours; repo: the published code's settings"""
    attacker: Kind = "grad"
    """naive, grad, two-step or k-step (of --steps) learn; plain, fgsm and pgd are controls"""
    steps: int = 3
    """of k-step: cells of the attacker"""
    width: Width = "small"
    """of the attacker: wide, wide-repo, slim, two-block or small"""
    scaling: Scaling = "image"
    """the gradient it sees is divided by the largest entry of the image, or of the batch (paper)"""
    form: Form = "alternating"
    """alternating, as published, or shared: one forward for both players, a third cheaper"""
    attacker_steps: int = 1
    """of the attacker per step of the defender"""
    attacker_lr: float = 1e-3
    """Adam's, constant"""
    attacker_lr_factor: float = 1.0
    """on the attacker's learning rate: two time scales (Heusel et al. 2017)"""
    attacker_weight_decay: float = 2e-4
    """Adam's"""
    gradient_mode: Literal["eval", "train", "repo"] = "eval"
    """batch norm of the classifier in that gradient; repo is train and moves its statistics"""
    attacker_mode: BatchNormMode = "eval"
    """batch norm of the attacker in the classifier's step (shared: always train)"""
    learning_mode: BatchNormMode = "eval"
    """batch norm of the classifier in the attacker's step (shared: always train)"""
    eps_ramp: float = 0.0
    """share of the training over which ε grows from 0"""


_COLOUR: dict[str, Any] = {
    "model": "preact_resnet18",
    "width": "slim",
    "eps": "0.031",
    "epochs": 30,
    "batch_size": 128,
    "ema": 0.999,
    "eval_n": 1000,
}
# what a data set changes in Config
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {"eps": "0.3", "eps_ramp": 0.4, "epochs": 10, "batch_size": 128, "eval_n": 1000},
    "cifar10": _COLOUR,
    "cifar100": _COLOUR,
    "svhn": {**_COLOUR, "lr": 0.05},
}
REPO: dict[str, Any] = {"preset": "repo", "scaling": "paper", "gradient_mode": "repo"}
_REPO_COLOUR: dict[str, Any] = {
    "model": "wrn-34-10",
    "width": "wide-repo",
    "epochs": 76,  # the code's; its third drop, at 90, is never reached
    "schedule": "multistep",
    "milestones": (30 / 76, 60 / 76),
    "ema": None,
}


def defaults(dataset: str = "digits", preset: str = "default") -> Config:
    """The settings of a data set under a preset."""
    changes = RECIPES.get(dataset, {})
    if preset == "repo":
        changes = changes | REPO | (_REPO_COLOUR if dataset in STATISTICS else {})
    known = dataset if dataset in DATASETS else "digits"  # tyro refuses the name that was typed
    return Config(**{"dataset": known, **changes})


def check(config: Config) -> Config:
    """Refuse what cannot work, before any work."""
    check_run(config, defaults(config.dataset, config.preset), idle(config))
    for name in ("attacker_lr", "attacker_lr_factor", "steps", "attacker_steps"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name} must be above 0, not {getattr(config, name)}")
    if not 0 <= config.attacker_weight_decay < 1:
        raise InputError(
            f"attacker_weight_decay must lie in [0, 1), not {config.attacker_weight_decay}"
        )
    if not 0 <= config.eps_ramp < 1:
        raise InputError(f"eps_ramp must lie in [0, 1), not {config.eps_ramp}")
    return config


def idle(config: Config) -> dict[str, tuple[str, ...]]:
    """Why -> options that then change nothing."""
    own = LEARNERS_OWN if config.attacker in CONTROLS else ()
    steps = () if config.attacker == "k-step" else ("steps",)
    ramp = ("eps_ramp",) if config.attacker == "plain" else ()
    modes = ("attacker_mode", "learning_mode") if config.form == "shared" else ()
    return {f"--attacker {config.attacker}": (*own, *steps, *ramp), "--form shared": modes}


def rules(config: Config, shape: tuple[int, int, int], fabric: Fabric) -> Rules:
    """The game with its attacker, or the control."""
    threat = Linf(parse_eps(config.eps))
    if config.attacker in CONTROLS:
        return AdversarialTraining(threat, CONTROLS[config.attacker])
    gradients = GRADIENTS.get(config.attacker, config.steps)
    with seeded_init(config.seed, "attacker"):
        network = L2LNetwork(shape, gradients, config.width, config.scaling).to(fabric.device)
    if fabric.device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    player = L2LPlayer(
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
    return L2L(threat, player, config.form, config.attacker_steps, modes)


def build(config: Config, data: Splits, fabric: Fabric) -> DefenderTraining:
    """Defender and attacker, on their data."""
    shape, classes = data.train.shape, data.train.classes
    check_smoothing(config.true_probability, classes)
    colour = config.dataset in STATISTICS
    normalise = colour and config.preset != "repo"
    with seeded_init(config.seed, "defender"):
        module = make_classifier(
            config.model,
            shape,
            classes,
            Normalise(*STATISTICS[config.dataset]) if normalise else None,
        )
    if fabric.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    if config.compile:
        module.compile()
    defender = Defender(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        true_probability=config.true_probability,
        grad_clip=config.grad_clip,
        fabric=fabric,
    )
    batch = config.batch_size * fabric.world_size
    return DefenderTraining(
        rules(config, shape, fabric),
        defender,
        data.train,
        config.batch_size,
        config.seed,
        crop=colour,
        flip=colour and config.dataset != "svhn",
        ramp_steps=round(config.eps_ramp * config.epochs * (len(data.train) // batch)),
    )


def own_attacker(game: DefenderTraining, threat: Linf) -> Attack | None:
    """What the network does to the validation split."""
    if not isinstance(game.rules, L2L):
        return None
    assert isinstance(game.rules.attacker, L2LPlayer)
    return L2LAttack(game.rules.attacker.module, threat)


def main(config: Config, typed: Collection[str] = ()) -> RunFolder:
    """Train and report: see `advgame.run.job.Script.run`."""
    script = Script(
        check, build, finish, own_attacker, purpose=lambda c: PURPOSES.get(c.attacker, "robust")
    )
    return script.run(config, typed)


def finish(
    config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Linf
) -> dict[str, Any]:
    """The attacker as a file, then the classifier's report."""
    if isinstance(game.rules, L2L):
        assert isinstance(game.rules.attacker, L2LPlayer)
        about = {"command": command(), "commit": commit(), "config": asdict(config)}
        L2LAttacker(game.rules.attacker.module, about).save(run.path / NAME)
    return judge(
        run,
        game.defender.module,
        data.test if config.eval_n is None else data.test.first(config.eval_n),
        threat,
        dataset=config.dataset,
        attacks=config.attacks,
        seed=config.seed,
        title=f"L2L on {config.dataset}, {config.attacker}, seed {config.seed}",
        panels=PANELS,
    )


def parse(words: Sequence[str]) -> Config:
    """The settings of a command line; `check` refuses those that cannot work."""
    default = defaults(**peek(words, dataset="digits", preset="default"))
    return tyro.cli(Config, default=default, args=words)


def _from_command_line() -> RunFolder:
    return main(parse(sys.argv[1:]), typed_options(Config))


if __name__ == "__main__":
    run_script(_from_command_line)

"""The field's baselines: a classifier learns by any of the games that `--list` names.

    python scripts/train.py --list                                # the games, a line each
    python scripts/train.py                                       # PGD-AT on digits
    python scripts/train.py --game fgsm-at --eps 0.25
    python scripts/train.py --dataset cifar10 --data-dir DIR      # uses a GPU if there is one
    python scripts/train.py --resume runs/NAME                    # go on, to the same bits

A run leaves one folder: settings, TensorBoard events, metrics.csv, checkpoints, report.json and
report.md (AutoAttack on test images), curves.png and examples.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import tyro
from lightning_fabric import Fabric
from torch import nn

from advgame.attacks import GradientAttack, fgsm, pgd
from advgame.checks import parse_eps
from advgame.classifiers import Normalise, make_classifier
from advgame.cli import peek, run_script, typed_options
from advgame.data import DATASETS, STATISTICS, Splits
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.judge import judge
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.training import PANELS, DefenderTraining, Rules
from advgame.losses import check_smoothing
from advgame.runs import RunFolder
from advgame.script import Script
from advgame.seeding import seeded_init
from advgame.settings import RunConfig, check_run
from advgame.threat import Linf, Threat


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by a game and report its robustness.

    The defaults shown are those of the --dataset and --game on the same command line; a game
    has the options that are not None there, and refuses the others.
    """

    game: str = "pgd-at"
    """see --list"""
    attack_steps: int | None = None
    """gradient steps of the attack that the classifier learns from"""
    step_size: float | None = None
    """of that attack, in units of ε"""
    eps_ramp: float = 0.0
    """share of the training over which ε grows from 0"""


@dataclass(frozen=True)
class Arena:
    """Where a game is played.

    Args:
        threat: the ball.
        shape: (C, H, W) of the images.
        classes: K.
        fabric: device and processes.
    """

    threat: Linf
    shape: tuple[int, int, int]
    classes: int
    fabric: Fabric


@dataclass(frozen=True)
class Game:
    """A game that can be asked for.

    Args:
        about: one line.
        make: its rules.
        settings: what it changes in Config; the game's own options are all here.
    """

    about: str
    make: Callable[[Config, Arena], Rules]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _pgd_at(config: Config, arena: Arena) -> Rules:
    return AdversarialTraining(arena.threat, _pgd(config))


def _pgd(config: Config) -> Callable[[Threat], GradientAttack]:
    steps, size = cast(int, config.attack_steps), cast(float, config.step_size)
    return lambda threat: pgd(threat, steps, threat.eps * size)


GAMES: dict[str, Game] = {
    "standard": Game("clean images", lambda c, a: AdversarialTraining(a.threat)),
    "fgsm-at": Game(
        "FGSM from the clean image (Goodfellow et al. 2015)",
        lambda c, a: AdversarialTraining(a.threat, fgsm),
    ),
    "pgd-at": Game(
        "PGD from a random start (Madry et al. 2018)",
        _pgd_at,
        {"attack_steps": 10, "step_size": 0.25},
    ),
}
OPTIONS = ("attack_steps", "step_size")  # of some games only

_COLOUR: dict[str, Any] = {
    "model": "preact_resnet18",
    "eps": "8/255",
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


def defaults(dataset: str = "digits", game: str = "pgd-at") -> Config:
    """The settings of a game on a data set."""
    known = dataset if dataset in DATASETS else "digits"  # tyro refuses the name that was typed
    own = GAMES[game].settings if game in GAMES else {}
    return Config(**{"dataset": known, "game": game, **RECIPES[known], **own})


def check(config: Config) -> Config:
    """Refuse what cannot work, before any work."""
    check_run(config)
    if config.game not in GAMES:
        raise InputError(f"unknown game {config.game!r}: choose from {', '.join(GAMES)}")
    for name in OPTIONS:
        given, has = getattr(config, name) is not None, name in GAMES[config.game].settings
        word = name.replace("_", "-")
        if given and not has:
            raise InputError(f"{config.game} has no {name}: leave --{word} away")
        if has and not given:
            raise InputError(f"{config.game} needs a number for --{word}")
    if not 0 <= config.eps_ramp < 1:
        raise InputError(f"eps_ramp must lie in [0, 1), not {config.eps_ramp}")
    return config


def build(config: Config, data: Splits, fabric: Fabric) -> DefenderTraining:
    """Defender and game, on their data."""
    shape, classes = data.train.shape, data.train.classes
    check_smoothing(config.true_probability, classes)
    colour = config.dataset in STATISTICS
    with seeded_init(config.seed, "defender"):
        normalise = Normalise(*STATISTICS[config.dataset]) if colour else None
        module = make_classifier(config.model, shape, classes, normalise)
    arena = Arena(Linf(parse_eps(config.eps)), shape, classes, fabric)
    return DefenderTraining(
        GAMES[config.game].make(config, arena),
        defender(config, module, fabric),
        data.train,
        config.batch_size,
        config.seed,
        crop=colour,
        flip=colour and config.dataset != "svhn",
        ramp_steps=_ramp_steps(config, len(data.train) // (config.batch_size * fabric.world_size)),
    )


def _ramp_steps(config: Config, steps_per_epoch: int) -> int:
    return round(config.eps_ramp * config.epochs * steps_per_epoch)


def defender(config: Config, module: nn.Module, fabric: Fabric) -> Defender:
    """The classifier with its optimiser."""
    if fabric.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    if config.compile:
        module.compile()
    return Defender(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        true_probability=config.true_probability,
        grad_clip=config.grad_clip,
        fabric=fabric,
    )


def main(config: Config, typed: Collection[str] = ()) -> RunFolder:
    """Train and report: see `advgame.script.Script.run`."""
    return Script(check, build, finish).run(config, typed)


def finish(
    config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Linf
) -> dict[str, Any]:
    """The classifier's report."""
    return judge(
        run,
        game.defender.module,
        data.test if config.eval_n is None else data.test.first(config.eval_n),
        threat,
        dataset=config.dataset,
        attacks=config.attacks,
        seed=config.seed,
        title=f"{config.game} on {config.dataset}, seed {config.seed}",
        panels=PANELS,
    )


def _list() -> None:
    for name, game in GAMES.items():
        own = [f"--{key.replace('_', '-')} {value}" for key, value in game.settings.items()]
        print(f"{name:16}{game.about}{'; ' + ' '.join(own) if own else ''}")


def _from_command_line() -> RunFolder | None:
    if "--list" in sys.argv[1:]:
        _list()
        return None
    default = defaults(**peek(dataset="digits", game="pgd-at"))
    return main(tyro.cli(Config, default=default), typed_options(Config))


if __name__ == "__main__":
    run_script(_from_command_line)

"""The field's baselines: a classifier learns by any of the games that `--list` names.

    python scripts/train.py --list                                # the games, a line each
    python scripts/train.py                                       # PGD-AT on digits
    python scripts/train.py --game trades --beta 3
    python scripts/train.py --game mart --awp 0.005               # AWP goes round any game
    python scripts/train.py --dataset cifar10 --data-dir DIR      # uses a GPU if there is one
    python scripts/train.py --resume runs/NAME                    # go on, to the same bits

A run leaves one folder: settings, TensorBoard events, metrics.csv, checkpoints, report.json and
report.md (AutoAttack on test images), curves.png and examples.png.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import tyro
from lightning_fabric import Fabric
from published import PUBLISHED
from torch import Tensor

from advgame.attacks import (
    BatchNormMode,
    GradientAttack,
    Transport,
    fast,
    feature_scatter,
    fgsm,
    kl_pgd,
    n_fgsm,
    near_pgd,
    pgd,
)
from advgame.data import DATASETS, STATISTICS, Splits
from advgame.errors import InputError, unknown
from advgame.evaluation.judge import judge
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import make_defender
from advgame.games.free import Free
from advgame.games.pairing import LogitPairing, Mart, Trades
from advgame.games.training import PANELS, DefenderTraining, Rules
from advgame.losses import check_smoothing
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.run.job import Script
from advgame.run.options import parse_eps, peek, typed_options
from advgame.run.selection import Criterion
from advgame.run.settings import RunConfig, check_run, make_module
from advgame.threat import Linf, Threat

Preset = Literal["default", "repo"]
T = TypeVar("T")


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by a game and report its robustness.

    The defaults shown are those of the --dataset and --game on the same command line; a game
    has the options that are not None there, and refuses the others.
    """

    game: str = "pgd-at"
    """see --list"""
    preset: Preset = "default"
    """default: ours; repo: the published code's settings, for CIFAR"""
    attack_steps: int | None = None
    """gradient steps of the attack that the classifier learns from"""
    step_size: float | None = None
    """of that attack, in units of ε"""
    attack_mode: BatchNormMode | None = None
    """batch norm and dropout of the classifier in that attack"""
    beta: float | None = None
    """weight of the term that pairs clean images with adversarial examples (β, ALP's λ)"""
    noise: float | None = None
    """radius of N-FGSM's noise, in units of ε"""
    transport: Transport | None = None
    """Feature Scatter's plan: fixed while the gradient is formed, or as published (repo), where the
    gradient goes through the two Sinkhorn steps that made it"""
    replays: int | None = None
    """of every batch (Free's m)"""
    awp: float | None = None
    """γ: descend at weights perturbed by this share of each layer's norm; None does not"""
    awp_start: float = 0.3
    """share of the training before --awp begins"""
    normalise: bool = True
    """colour images: the classifier's first layer takes the data set's mean and deviation away"""
    eps_ramp: float = 0.0
    """share of the training over which ε grows from 0"""


@dataclass(frozen=True)
class Game:
    """A game that can be asked for.

    Args:
        about: one line.
        make: its rules, from settings, ball, data and devices.
        settings: what it changes in Config; its own options are all here.
        purpose: what it is for, and its weights are selected by.
    """

    about: str
    make: Callable[[Config, Linf, Splits, Fabric], Rules]
    settings: Mapping[str, Any] = field(default_factory=dict)
    purpose: Criterion = "robust"


def require(value: T | None) -> T:
    """An option that `check` found to be there."""
    assert value is not None
    return value


def _against(
    config: Config, threat: Threat, attack: Callable[[Threat], GradientAttack]
) -> AdversarialTraining:
    mode: BatchNormMode = require(config.attack_mode)
    return AdversarialTraining(threat, lambda ball: replace(attack(ball), mode=mode))


def _sizes(config: Config, ball: Threat) -> tuple[int, float | Tensor]:
    return require(config.attack_steps), ball.eps * require(config.step_size)


_PGD: dict[str, Any] = {"attack_steps": 10, "step_size": 0.25}
_EVAL: dict[str, Any] = {"attack_mode": "eval"}

GAMES: dict[str, Game] = {
    "standard": Game("clean images", lambda c, t, *_: AdversarialTraining(t), purpose="clean"),
    "fgsm-at": Game(
        "one step of ε from the clean image (Goodfellow et al. 2015)",
        lambda c, t, *_: _against(c, t, fgsm),
        _EVAL,
    ),
    "fast": Game(
        "one step of 1.25 ε from a uniform start (Wong et al. 2020)",
        lambda c, t, *_: _against(c, t, lambda b: fast(b, b.eps * require(c.step_size))),
        {"step_size": 1.25, **_EVAL},
    ),
    "n-fgsm": Game(
        "one step of ε from noise of 2 ε, not pulled back (de Jorge et al. 2022)",
        lambda c, t, *_: _against(c, t, lambda b: n_fgsm(b, require(c.noise))),
        {"noise": 2.0, **_EVAL},
    ),
    "free": Game(
        "a batch replayed, one backward pass for both players (Shafahi et al. 2019)",
        lambda c, t, *_: Free(t, require(c.replays)),
        {"replays": 8},
    ),
    "pgd-at": Game(
        "PGD from a uniform start (Madry et al. 2018; repo: Rice et al. 2020)",
        lambda c, t, *_: _against(c, t, lambda b: pgd(b, *_sizes(c, b))),
        {**_PGD, **_EVAL},
    ),
    "alp": Game(
        "clean images and PGD's, their logits drawn together (Kannan et al. 2018)",
        lambda c, t, *_: LogitPairing(t, require(c.beta), lambda b: pgd(b, *_sizes(c, b))),
        {"beta": 0.5, **_PGD},
    ),
    "feature-scatter": Game(
        "one step that moves the batch's outputs away, no labels (Zhang & Wang 2019)",
        lambda c, t, *_: AdversarialTraining(
            t, lambda b: feature_scatter(b, transport=require(c.transport))
        ),
        {"true_probability": 0.5, "transport": "fixed"},
    ),
    "trades": Game(
        "clean images, and the divergence to the outputs of KL-PGD (Zhang et al. 2019)",
        lambda c, t, *_: Trades(t, require(c.beta), lambda b: kl_pgd(b, *_sizes(c, b))),
        {"beta": 6.0, **_PGD},
    ),
    "mart": Game(
        "boosted CE, and TRADES' divergence where the classifier is unsure (Wang et al. 2020)",
        lambda c, t, *_: Mart(t, require(c.beta), lambda b: near_pgd(b, *_sizes(c, b))),
        {"beta": 5.0, **_PGD},
    ),
}
# games that people ask this script for, and whose they are
SCRIPTS = {
    "las-at": "train_las_at.py", "las-trades": "train_las_at.py --objective trades",
    "las-awp": "train_las_at.py --awp 0.005", "l2l": "train_l2l.py", "adt": "train_adt.py",
    "minimax": "train_minimax.py", "gail": "train_gail.py",
}  # fmt: skip
# of some games
OPTIONS = ("attack_steps", "step_size", "attack_mode", "beta", "noise", "transport", "replays")

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


def defaults(dataset: str = "digits", game: str = "pgd-at", preset: str = "default") -> Config:
    """The settings of a game on a data set under a preset."""
    known = dataset if dataset in DATASETS else "digits"  # tyro refuses the name that was typed
    changes: dict[str, Any] = {"game": game, **RECIPES[known]}
    if game in GAMES:
        changes |= GAMES[game].settings
        if "replays" in changes:  # each epoch is worth so many
            changes["epochs"] = max(1, changes.get("epochs", Config.epochs) // changes["replays"])
        if preset == "repo":
            changes |= {"preset": preset, **PUBLISHED.get(game, {})}
    return Config(**{"dataset": known, **changes})


def check(config: Config) -> Config:
    """Refuse what cannot work, before any work."""
    if config.game not in GAMES:
        if config.game in SCRIPTS:
            raise InputError(
                f"{config.game} is not a game of this script: use {SCRIPTS[config.game]}"
            )
        raise unknown("game", config.game, GAMES)
    check_run(config, defaults(config.dataset, config.game, config.preset), idle(config))
    published = config.game in PUBLISHED and config.dataset in ("cifar10", "cifar100")
    if config.preset == "repo" and not published:
        raise InputError(
            f"no published settings of {config.game} on {config.dataset} here: leave --preset away"
        )
    for name in (*OPTIONS, "awp"):
        value, word = getattr(config, name), f"--{name.replace('_', '-')}"
        if name != "awp" and (value is None) == (name in GAMES[config.game].settings):
            lacks = f"{config.game} has no {name}: leave {word} away"
            raise InputError(f"{config.game} needs {word}" if value is None else lacks)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0, not {value}")
    for name in ("eps_ramp", "awp_start"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} must lie in [0, 1), not {getattr(config, name)}")
    return config


def idle(config: Config) -> dict[str, tuple[str, ...]]:
    """Why -> options that then change nothing."""
    found: dict[str, tuple[str, ...]] = {}
    if config.game == "standard":
        found["--game standard"] = ("eps_ramp",)
    if config.awp is None:
        found["a training without --awp"] = ("awp_start",)
    if config.dataset not in STATISTICS:
        found[f"--dataset {config.dataset}"] = ("normalise",)
    return found


def build(config: Config, data: Splits, fabric: Fabric) -> DefenderTraining:
    """Defender and game, on their data."""
    check_smoothing(config.true_probability, data.train.classes)
    module = make_module(config, data.train, fabric, normalise=config.normalise)
    steps = config.epochs * (len(data.train) // (config.batch_size * fabric.world_size))
    defender = make_defender(
        module,
        config.awp,
        round(config.awp_start * steps) * (config.replays or 1),
        lr=config.lr,
        weight_decay=config.weight_decay,
        true_probability=config.true_probability,
        grad_clip=config.grad_clip,
        fabric=fabric,
    )
    threat, colour = Linf(parse_eps(config.eps)), config.dataset in STATISTICS
    return DefenderTraining(
        GAMES[config.game].make(config, threat, data, fabric),
        defender,
        data.train,
        config.batch_size,
        config.seed,
        crop=colour,
        flip=colour and config.dataset != "svhn",
        ramp_steps=round(config.eps_ramp * steps),
    )


def main(config: Config, typed: Collection[str] = ()) -> RunFolder:
    """Train and report: see `advgame.run.job.Script.run`."""
    return Script(check, build, finish, purpose=lambda c: GAMES[c.game].purpose).run(config, typed)


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
        words = [f"--{key.replace('_', '-')} {value}" for key, value in game.settings.items()]
        print(f"{name:16} {game.about}\n{'':16} {' '.join(words)}".rstrip())


def parse(words: Sequence[str]) -> Config:
    """The settings of a command line; `check` refuses those that cannot work."""
    default = defaults(**peek(words, dataset="digits", game="pgd-at", preset="default"))
    return tyro.cli(Config, default=default, args=words)


def _from_command_line() -> RunFolder | None:
    if "--list" in sys.argv[1:]:
        _list()
        return None
    return main(parse(sys.argv[1:]), typed_options(Config))


if __name__ == "__main__":
    run_script(_from_command_line)

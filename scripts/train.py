"""The field's baselines: a classifier learns by any of the games that `--list` names.

    python scripts/train.py --list                                # the games, a line each
    python scripts/train.py                                       # PGD-AT on digits
    python scripts/train.py --game trades --beta 3
    python scripts/train.py --game mart --awp 0.005               # AWP goes round any game
    python scripts/train.py --game "my_code:MyRules(size=0.5)"    # rules of your own
    python scripts/train.py --dataset cifar10 --data-dir DIR      # uses a GPU if there is one
    python scripts/train.py --resume runs/NAME                    # go on, to the same bits

A run leaves one folder: settings, TensorBoard events, metrics.csv, checkpoints, report.json and
report.md (AutoAttack on test images), curves.png and examples.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from published import PUBLISHED
from typing_extensions import override

from advgame import attacks, games
from advgame.choices import BatchNormMode, Preset, Transport
from advgame.classifiers.names import is_built_in
from advgame.data.names import colour
from advgame.errors import InputError, unknown
from advgame.own_code import own_code
from advgame.run.defender_job import DefenderJob, ball
from advgame.run.folder import RunFolder
from advgame.run.options import Count, Positive
from advgame.run.program import retold
from advgame.run.selection import Criterion
from advgame.run.settings import PerturbedConfig, recipes

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor

    from advgame.attacks import GradientAttack
    from advgame.data import ImageSet, Splits
    from advgame.games.training import Rules
    from advgame.threat import Threat

T = TypeVar("T")


@dataclass(frozen=True)
class Config(PerturbedConfig):
    """Train a classifier by a game and report its robustness.

    The defaults shown are those of the --dataset and --game on the same command line; a game
    has the options that are not None there, and refuses the others.
    """

    game: str = "pgd-at"
    """see --list; or package.module:factory(1, size=0.5) of your own code, which is called with the
    ball before the rest and returns an advgame.games.Rules"""
    preset: Preset = "default"
    """default: ours; repo: the published code's settings, for CIFAR"""
    attack_steps: Count | None = None
    """gradient steps of the attack that the classifier learns from"""
    step_size: Positive | None = None
    """of that attack, in units of ε"""
    attack_mode: BatchNormMode | None = None
    """batch norm and dropout of the classifier in that attack"""
    beta: Positive | None = None
    """weight of the term that pairs clean images with adversarial examples (β, ALP's λ)"""
    noise: Positive | None = None
    """radius of N-FGSM's noise, in units of ε"""
    transport: Transport | None = None
    """Feature Scatter's plan: fixed while the gradient is formed, or as published (repo), where the
    gradient goes through the two Sinkhorn steps that made it"""
    replays: Count | None = None
    """of every batch (Free's m)"""
    normalise: bool = True
    """colour images: the classifier's first layer takes the data set's mean and deviation away"""


@dataclass(frozen=True)
class Game:
    """A game that can be asked for.

    Args:
        about: one line.
        make: its rules, from settings and ball.
        settings: what it changes in Config; its own options are all here.
        purpose: what it is for, and its weights are selected by.
    """

    about: str
    make: Callable[[Config, Threat], Rules]
    settings: Mapping[str, Any] = field(default_factory=dict)
    purpose: Criterion = "robust"


def require(value: T | None) -> T:
    """An option that `check` found to be there."""
    assert value is not None
    return value


def _against(config: Config, threat: Threat, attack: Callable[[Threat], GradientAttack]) -> Rules:
    mode: BatchNormMode = require(config.attack_mode)
    return games.AdversarialTraining(threat, lambda ball: replace(attack(ball), mode=mode))


def _sizes(config: Config, ball: Threat) -> tuple[int, float | Tensor]:
    return require(config.attack_steps), ball.eps * require(config.step_size)


_PGD: dict[str, Any] = {"attack_steps": 10, "step_size": 0.25}
_EVAL: dict[str, Any] = {"attack_mode": "eval"}

GAMES: dict[str, Game] = {
    "standard": Game("clean images", lambda c, t: games.AdversarialTraining(t), purpose="clean"),
    "fgsm-at": Game(
        "one step of ε from the clean image (Goodfellow et al. 2015)",
        lambda c, t: _against(c, t, lambda b: attacks.fgsm(b)),
        _EVAL,
    ),
    "fast": Game(
        "one step of 1.25 ε from a uniform start (Wong et al. 2020)",
        lambda c, t: _against(c, t, lambda b: attacks.fast(b, b.eps * require(c.step_size))),
        {"step_size": 1.25, **_EVAL},
    ),
    "n-fgsm": Game(
        "one step of ε from noise of 2 ε, not pulled back (de Jorge et al. 2022)",
        lambda c, t: _against(c, t, lambda b: attacks.n_fgsm(b, require(c.noise))),
        {"noise": 2.0, **_EVAL},
    ),
    "free": Game(
        "a batch replayed, one backward pass for both players (Shafahi et al. 2019)",
        lambda c, t: games.Free(t, require(c.replays)),
        {"replays": 8},
    ),
    "pgd-at": Game(
        "PGD from a uniform start (Madry et al. 2018; repo: Rice et al. 2020)",
        lambda c, t: _against(c, t, lambda b: attacks.pgd(b, *_sizes(c, b))),
        {**_PGD, **_EVAL},
    ),
    "alp": Game(
        "clean images and PGD's, their logits drawn together (Kannan et al. 2018)",
        lambda c, t: games.LogitPairing(
            t, require(c.beta), lambda b: attacks.pgd(b, *_sizes(c, b))
        ),
        {"beta": 0.5, **_PGD},
    ),
    "feature-scatter": Game(
        "one step that moves the batch's outputs away, no labels (Zhang & Wang 2019)",
        lambda c, t: games.AdversarialTraining(
            t, lambda b: attacks.feature_scatter(b, transport=require(c.transport))
        ),
        {"true_probability": 0.5, "transport": "fixed"},
    ),
    "trades": Game(
        "clean images, and the divergence to the outputs of KL-PGD (Zhang et al. 2019)",
        lambda c, t: games.Trades(t, require(c.beta), lambda b: attacks.kl_pgd(b, *_sizes(c, b))),
        {"beta": 6.0, **_PGD},
    ),
    "mart": Game(
        "boosted CE, and TRADES' divergence where the classifier is unsure (Wang et al. 2020)",
        lambda c, t: games.Mart(t, require(c.beta), lambda b: attacks.near_pgd(b, *_sizes(c, b))),
        {"beta": 5.0, **_PGD},
    ),
}
# games that people ask this script for, and whose they are
SCRIPTS = {
    "las-at": "train_las_at.py", "las-trades": "train_las_at.py --objective trades",
    "las-awp": "train_las_at.py --awp 0.01 --clamp", "l2l": "train_l2l.py",
    "adt": "train_adt.py", "minimax": "train_minimax.py", "gail": "train_gail.py",
}  # fmt: skip


def named(name: str) -> Game:
    """A row of `GAMES`, or the game whose rules somebody's own code makes."""
    if name in GAMES:
        return GAMES[name]

    def make(config: Config, threat: Threat) -> Rules:
        rules: Rules = own_code(name).make(games.Rules, "rules, an advgame.games.Rules", threat)
        return rules

    return Game("of your own code", make)


# of some games
OPTIONS = ("attack_steps", "step_size", "attack_mode", "beta", "noise", "transport", "replays")

# what a data set changes in Config
RECIPES = recipes()


class Job(DefenderJob[Config, Any]):
    """The training by any of `GAMES`."""

    config = Config
    helped = True
    peeked = {**DefenderJob.peeked, "game": "pgd-at", "preset": "default"}  # noqa: RUF012
    recipes = RECIPES

    def defaults(self, **peeked: Any) -> Config:
        """The settings of a game on a data set under a preset."""
        usual = super().defaults(**peeked)
        game = usual.game
        if game not in GAMES:  # `check` refuses it
            return usual
        changes: dict[str, Any] = dict(GAMES[game].settings)
        if "replays" in changes:  # each epoch is worth so many
            changes["epochs"] = max(1, usual.epochs // changes["replays"])
        if usual.preset == "repo":
            changes |= PUBLISHED.get(game, {})
        return replace(usual, **changes)

    @override
    def title(self, config: Config) -> str:
        return config.game

    @override
    def purpose(self, config: Config) -> Criterion:
        return named(config.game).purpose

    @override
    def check(self, config: Config) -> Config:
        if config.game in SCRIPTS:
            raise InputError(
                f"{config.game} is not a game of this script: use {retold(SCRIPTS[config.game])}"
            )
        if any(sign in config.game for sign in ".:("):
            own_code(config.game).find()
        elif config.game not in GAMES:
            raise unknown("game", config.game, GAMES)
        config = super().check(config)
        published = config.game in PUBLISHED and config.dataset in ("cifar10", "cifar100")
        if config.preset == "repo" and not published:
            raise InputError(
                f"no published settings of {config.game} on {config.dataset} here: leave --preset "
                "away"
            )
        for name in OPTIONS:
            value, word = getattr(config, name), f"--{name.replace('_', '-')}"
            if (value is None) == (name in named(config.game).settings):
                lacks = f"{config.game} has no {name}: leave {word} away"
                raise InputError(f"{config.game} needs {word}" if value is None else lacks)
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        if config.game == "standard":
            found["--game standard"] = ("eps_ramp",)
        if colour(config.dataset) is False:
            found[f"--dataset {config.dataset}"] = ("normalise",)
        elif config.init is not None:
            found["--init, whose weights say how images are normalised,"] = ("normalise",)
        elif not is_built_in(config.model):
            found[f"--model {config.model}, which normalises its own input,"] = ("normalise",)
        return found

    @override
    def normalised(self, config: Config) -> bool:
        return config.normalise

    def descents(self, config: Config, data: Splits, fabric: Fabric) -> int:
        """Each batch is replayed in Free; a budget's clock counts no steps."""
        replays = (config.replays or 1) if config.budget is None else 1
        return super().descents(config, data, fabric) * replays

    @override
    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        return named(config.game).make(config, ball(config))

    def from_command_line(self) -> RunFolder | None:
        """Run what was typed, or list the games."""
        if "--list" not in sys.argv[1:]:
            return super().from_command_line()
        for name, game in GAMES.items():
            words = [f"--{key.replace('_', '-')} {value}" for key, value in game.settings.items()]
            print(f"{name:16} {game.about}\n{'':16} {' '.join(words)}".rstrip())
        print(f"{'module:factory':16} rules of your own: docs/extending.md")
        return None


job = Job()

if __name__ == "__main__":
    job.main()

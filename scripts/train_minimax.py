"""Train a classifier by Machine vs Machine and report its robustness.

    python scripts/train_minimax.py                                     # digits, Minimax
    python scripts/train_minimax.py --defence alt                       # plain descent and ascent
    python scripts/train_minimax.py --defence sens                      # penalty on the slope
    python scripts/train_minimax.py --dataset mnist --data-dir D        # the paper's CNN and ε
    python scripts/train_minimax.py --resume runs/NAME                  # go on after a kill

The report has a column that no attack of the game itself can flatter: `learned:attnet-curr`, an
AttNet trained from scratch on the finished classifier (best of --restarts, chosen on the
validation split). A run leaves that attacker, and the game's own, as files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro
from lightning_fabric import Fabric
from torch import nn

from advgame.attacks import Attack
from advgame.checks import parse_eps
from advgame.classifiers import Normalise, make_classifier
from advgame.cli import peek, run_script, typed_options
from advgame.data import DATASETS, STATISTICS, Splits
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.judge import judge
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.minimax import Minimax, SensitivityTraining
from advgame.games.training import PANELS, DefenderTraining, Rules
from advgame.losses import check_smoothing
from advgame.runs import RunFolder, command, commit
from advgame.script import Script
from advgame.seeding import derive_seed, seeded_init
from advgame.settings import RunConfig, check_run
from advgame.solvers import (
    Direction,
    Optimistic,
    extragradient,
    maximin,
    sensitivity,
    simultaneous,
    unrolled,
)
from advgame.threat import Linf
from agents.attacker_file import NAME
from agents.attnet import (
    AttNet,
    AttNetAttack,
    AttNetAttacker,
    AttNetPlayer,
    Bound,
    load_attnet,
)
from agents.best_response import best_response

Defence = Literal[
    "plain", "lwa", "sens", "alt", "minimax", "maximin", "unrolled", "extragradient", "optimistic"
]
CURR = "learned:attnet-curr"


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by Machine vs Machine and report its robustness.

    The defaults shown are those of the --dataset on the same command line.
    """

    model: str = "minimax_cnn"
    """small_cnn, minimax_cnn, resnet18, preact_resnet18 or wrn-DEPTH-WIDEN, e.g. wrn-34-10"""
    lr: float = 1e-3
    """of Adam on the defender (the paper: 1e-4, for many more steps)"""
    weight_decay: float = 0.0
    """weight decay of the defender"""
    schedule: Literal["onecycle", "multistep", "constant"] = "constant"
    """learning-rate schedule, per step"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "32-true"
    """gradients of gradients need it"""
    defence: Defence = "minimax"
    """lwa and sens learn against FGSM; the last six against AttNet, each by its solver"""
    gamma: float = 1.0
    """minimax and maximin: γ of the sensitivity penalty"""
    penalty: float = 0.5
    """sens: weight of the input's slope over ε; 0.5 is the paper's γ = ηN"""
    ascent_steps: int = 1
    """of the attacker per step of the defender"""
    unroll: int = 1
    """unrolled: ascents that the defender sees through, at --attacker-lr"""
    attacker_lr: float = 1e-3
    """of Adam on AttNet"""
    hidden: int = 300
    """width of AttNet's three hidden layers"""
    dropout: float = 0.5
    """of AttNet, while it learns"""
    bound: Bound = "tanh"
    """how AttNet stays in the ball: tanh or clip"""
    eps_ramp: float = 0.0
    """share of the training over which ε grows from 0"""
    response_steps: int = 1000
    """of the fresh AttNet on the finished classifier; 0 trains none (the paper: 30,000)"""
    restarts: int = 2
    """fresh AttNets, of which the strongest counts"""


# what a data set changes in Config: pixels of the paper lie in [-1, 1], its η is 2ε
RECIPES: dict[str, dict[str, Any]] = {
    "mnist": {"eps": "0.15", "epochs": 10, "batch_size": 128, "eval_n": 1000},
    "cifar10": {"eps": "0.05", "epochs": 30, "batch_size": 128, "eval_n": 1000},
}


def defaults(dataset: str = "digits") -> Config:
    """The settings of a data set."""
    known = dataset if dataset in DATASETS else "digits"  # tyro refuses the name that was typed
    return Config(**{"dataset": known, **RECIPES.get(known, {})})


def check(config: Config) -> Config:
    """Refuse what cannot work, before any work."""
    check_run(config)
    if config.devices > 1:
        raise InputError("these solvers differentiate gradients: one device only")
    if config.compile:
        raise InputError("these solvers differentiate gradients, which --compile cannot")
    if config.precision != "32-true":
        raise InputError("these solvers differentiate gradients: they run in full precision only")
    if config.grad_clip is not None and config.defence not in ("plain", "lwa", "sens"):
        raise InputError("solvers take their own steps: --grad-clip is not for them")
    for name in ("attacker_lr", "ascent_steps", "restarts"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be above 0, not {getattr(config, name)}")
    for name in ("response_steps", "unroll"):
        if getattr(config, name) < 0:
            raise InputError(f"{name} must be 0 or above, not {getattr(config, name)}")
    if not 0 <= config.eps_ramp < 1:
        raise InputError(f"eps_ramp must lie in [0, 1), not {config.eps_ramp}")
    rules(config, (1, 2, 2), 2, "cpu")  # these refuse what is left
    fresh(config, (1, 2, 2), 2)
    return config


def direction(config: Config) -> Direction:
    """Where the two players go."""
    made: dict[str, Callable[[], Direction]] = {
        "alt": lambda: simultaneous,
        "minimax": lambda: sensitivity(config.gamma),
        "maximin": lambda: maximin(sensitivity(config.gamma)),
        "unrolled": lambda: unrolled(config.unroll, config.attacker_lr),
        "extragradient": lambda: extragradient(config.lr, config.attacker_lr),
        "optimistic": Optimistic,
    }
    return made[config.defence]()


def rules(config: Config, shape: tuple[int, int, int], classes: int, device: Any) -> Rules:
    """The game."""
    threat = Linf(parse_eps(config.eps))
    if config.defence == "plain":
        return AdversarialTraining(threat)
    if config.defence in ("lwa", "sens"):
        return SensitivityTraining(threat, config.penalty if config.defence == "sens" else 0.0)
    with seeded_init(config.seed, "attacker"):
        network = fresh(config, shape, classes).to(device)
    player = AttNetPlayer(network, config.attacker_lr)
    return Minimax(threat, player, direction(config), config.ascent_steps)


def fresh(config: Config, shape: tuple[int, int, int], classes: int) -> AttNet:
    """An AttNet that knows nothing yet."""
    return AttNet(shape, classes, config.hidden, config.dropout, config.bound)


def build(config: Config, data: Splits, fabric: Fabric) -> DefenderTraining:
    """Defender and game, on their data."""
    shape, classes = data.train.shape, data.train.classes
    check_smoothing(config.true_probability, classes)
    colour = config.dataset in STATISTICS
    with seeded_init(config.seed, "defender"):
        normalise = Normalise(*STATISTICS[config.dataset]) if colour else None
        module = make_classifier(config.model, shape, classes, normalise)
    defender = Defender(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        true_probability=config.true_probability,
        grad_clip=config.grad_clip,
        fabric=fabric,
        algorithm="adam",
    )
    return DefenderTraining(
        rules(config, shape, classes, fabric.device),
        defender,
        data.train,
        config.batch_size,
        config.seed,
        crop=colour,
        flip=colour and config.dataset != "svhn",
        ramp_steps=round(config.eps_ramp * config.epochs * (len(data.train) // config.batch_size)),
    )


def own_attacker(game: DefenderTraining, threat: Linf) -> Attack | None:
    """What the network does to the validation split."""
    if not isinstance(game.rules, Minimax):
        return None
    assert isinstance(game.rules.attacker, AttNetPlayer)
    return AttNetAttack(game.rules.attacker.module, threat)


def main(config: Config, typed: Collection[str] = ()) -> RunFolder:
    """Train and report: see `advgame.script.Script.run`."""
    return Script(check, build, finish, own_attacker).run(config, typed)


def finish(
    config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Linf
) -> dict[str, Any]:
    """The attackers as files, then the classifier's report."""
    about = {"command": command(), "commit": commit(), "config": asdict(config)}
    if isinstance(game.rules, Minimax):
        assert isinstance(game.rules.attacker, AttNetPlayer)
        AttNetAttacker(game.rules.attacker.module, about).save(run.path / NAME)

    def respond(model: nn.Module) -> dict[str, Attack]:
        if not config.response_steps:
            return {}
        path = run.path / "attnet-curr.safetensors"
        if path.exists():  # of an evaluation that was interrupted
            return {CURR: load_attnet(path)(threat, 0)}
        found = best_response(
            model,
            data.train,
            data.validation,
            threat,
            steps=config.response_steps,
            restarts=config.restarts,
            seed=derive_seed(config.seed, "response"),
            make=lambda: fresh(config, data.train.shape, data.train.classes),
        )
        accuracies = {"validation_accuracies": found.restarts}
        AttNetAttacker(found.network, about | accuracies).save(path)
        return {CURR: AttNetAttack(found.network, threat)}

    return judge(
        run,
        game.defender.module,
        data.test if config.eval_n is None else data.test.first(config.eval_n),
        threat,
        dataset=config.dataset,
        attacks=config.attacks,
        seed=config.seed,
        title=f"Machine vs Machine on {config.dataset}, {config.defence}, seed {config.seed}",
        panels=PANELS,
        respond=respond,
    )


def _from_command_line() -> RunFolder:
    return main(tyro.cli(Config, default=defaults(**peek(dataset="digits"))), typed_options(Config))


if __name__ == "__main__":
    run_script(_from_command_line)

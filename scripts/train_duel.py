"""The duel: two players, who learn against each other, play the trainings of a classifier.

    python scripts/train_duel.py                                   # PPO against PPO, on digits
    python scripts/train_duel.py --order alternating --turn 5      # one side learns at a time
    python scripts/train_duel.py --attacker fixed                  # only the defender learns
    python scripts/train_duel.py --attacker random --defender random   # the controls alone
    python scripts/train_duel.py --attacker runs/LAS               # LAS-AT's policy attacks
    python scripts/train_duel.py --resume runs/NAME                # go on, to the same bits

The environment is `envs.duel`, its step `advgame.games.duel`, the players are in `agents.duel`. A
run leaves one folder: settings, TensorBoard events, metrics.csv, checkpoints, curves.png, a policy
file of each side that learned, report.json and report.md: every attacker against every defender,
random and fixed ones among them. Standings are taken on validation images; test images are not
touched.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import override

from advgame.choices import Order, Stake
from advgame.classifiers.names import check_model
from advgame.data.names import recipe
from advgame.errors import InputError
from advgame.run import job as jobs
from advgame.run.fitting import fit_batch
from advgame.run.folder import Metrics, RunFolder
from advgame.run.job import about
from advgame.run.options import Count, Must, NotNegative, Positive, parse_radius
from advgame.run.settings import Dataset, recipes

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.data import Splits
    from advgame.games.strategy import StrategySpace
    from advgame.run.loop import Validate
    from agents.duel import Cell, DuelGame, Named
    from envs.duel import DuelEnv

SIDES = ("attacker", "defender")
OWN = ("ppo", "fixed", "random")
LEARNERS_OWN = ("policy_lr", "entropy_coef", "hidden", "order", "turn", "epochs", "updates")


@dataclass(frozen=True)
class Config:
    """Let an attacker and a defender play the trainings of a classifier, and learn from them.

    The defaults shown are those of the --dataset on the same command line.
    """

    attacker: str = "ppo"
    """ppo learns; fixed (PGD-10 at ε₀) and random are the controls; or a run folder: of this
    script, whose attacker then plays, or of train_las_at.py, whose policy does"""
    defender: str = "ppo"
    """ppo learns; fixed (plain adversarial training) and random are the controls; or a run folder
    of this script, whose defender then plays"""
    order: Order = "simultaneous"
    """whether both learn after every match, or take turns"""
    turn: Count = 5
    """alternating: updates of a turn"""
    reward: Stake = "robust"
    """what is played for on held-out images: robust accuracy, or the loss"""
    pay: Literal["step", "end"] = "step"
    """after each step what it changed, or once after a match, which takes half of the time"""
    steps: Count | None = None
    """steps of a match; one pass over the training images when not given"""
    held_out: Count = 64
    """validation images that the standing is taken on"""
    duels: Count = 4
    """matches of an update, side by side"""
    epochs: Count = 10
    """validations on the way"""
    updates: Count = 5
    """updates per epoch"""
    matches: Annotated[int, Must("be 2 or above", lambda n: n >= 2)] = 8
    """of each pair of players in the report; a validation has one per duel"""
    policy_lr: Positive = 3e-3
    """learning rate of the players"""
    entropy_coef: NotNegative = 0.003
    """weight of their entropy bonus"""
    hidden: Count = 64
    """units of their two hidden layers"""
    model: str = "small_cnn"
    """of the classifier; as in train.py"""
    lr: Positive = 0.05
    """learning rate of the classifier, which the defender multiplies"""
    awp: Positive = 0.01
    """γ of weight perturbation, which the defender turns on and off"""
    batch_size: Count = 64
    """images per step"""
    eps: str = "0.15"
    """ε₀, the radius of the standing, e.g. 0.15 or 8/255"""
    dataset: Dataset = "digits"
    """whose images; as in train.py"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout (all but digits)"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    image_size: Count | None = None
    """resize images and crop them to so many pixels square; None leaves them"""
    seed: int = 0
    """seed of the run"""
    accelerator: str = "auto"
    """of the classifier: auto (CUDA where there is one, else CPU) or one that Lightning Fabric
    knows; players live on the CPU"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the current time when empty"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""


# data set -> ε₀; MNIST has that of digits: its 0.3 goes with a ramp of ε, which no match has
EPS = {name: usual["eps"] for name, usual in recipes().items() if name not in ("digits", "mnist")}


@dataclass(frozen=True)
class Made:
    """What the job works with.

    Args:
        data: the images.
        envs: the duels of the players that were asked for.
        plain: duels in which an attacker chooses for the whole batch, as the controls do.
        named: side -> name -> what makes a player that does not learn.
        game: of those who learn; None where nobody does.
        frozen: side -> the policy that plays it and was learned in another run.
    """

    data: Splits
    envs: list[DuelEnv]
    plain: list[DuelEnv]
    named: dict[str, dict[str, Named]]
    game: DuelGame | None
    frozen: dict[str, nn.Module]


def make_envs(
    config: Config, data: Splits, fabric: Fabric, space: StrategySpace | None, per_image: bool
) -> list[DuelEnv]:
    """The duels: all begin with the same classifier.

    Args:
        config: all settings.
        data: training and validation images, on their device.
        fabric: the device.
        space: the attacker's lists; LAS-AT's when None.
        per_image: the attacker chooses for each image, which it sees.
    """
    from advgame.classifiers.saved import new_classifier
    from advgame.defender import Defender
    from advgame.evaluation import check_classifier
    from advgame.seeding import seeded_init
    from advgame.threat import Linf
    from envs.duel import DuelEnv

    found = []
    for _ in range(config.duels):
        with seeded_init(config.seed, "defender"):
            module = new_classifier(config.model, data.train.shape, data.train.classes)
        check_classifier(module.to(fabric.device), data.train)
        env = DuelEnv(
            data=data.train,
            held_out=data.validation.first(config.held_out),
            defender=Defender(module, lr=config.lr, fabric=fabric),
            threat=Linf(parse_radius(config.eps, "Linf")),
            space=space,
            batch_size=config.batch_size,
            max_cycles=config.steps,
            per_image=per_image,
            images=per_image,
            reward=config.reward,
            pay=config.pay,
            gamma=config.awp,
        )
        found.append(env)
    return found


def load(config: Config) -> Splits:
    """Training, validation and test images, of which a batch must fit the first."""
    from advgame.data import load_data

    return load_data(
        config.dataset,
        config.data_dir,
        download=config.download,
        image_size=config.image_size,
    )


def make(config: Config, data: Splits, fabric: Fabric) -> Made:
    """The duels, their players, and the game of those who learn."""
    from advgame.seeding import derive_seed, stream
    from advgame.threat import Linf
    from agents import duel

    data, las = data.to(fabric.device), None
    if config.attacker not in OWN:
        threat = Linf(parse_radius(config.eps, "Linf"))
        las = duel.read_las(Path(config.attacker), data.train.shape, threat)
    space = las[1] if las else None
    plain = make_envs(config, data, fabric, space, False)
    envs = make_envs(config, data, fabric, space, True) if las else plain
    sizes = {"attacker": plain[0].space.sizes, "defender": plain[0].lessons.sizes}
    named = {side: duel.controls(plain[0], side) for side in SIDES}
    players: dict[str, duel.Player] = {}
    frozen: dict[str, nn.Module] = {}
    for side in SIDES:
        who = getattr(config, side)
        if who == "ppo":
            players[side] = duel.Learner(
                sizes[side],
                config.duels,
                plain[0].max_cycles,
                derive_seed(config.seed, f"ppo {side}"),
                lr=config.policy_lr,
                entropy_coef=config.entropy_coef,
                hidden=config.hidden,
            )
            continue
        if las is not None and side == "attacker":
            frozen[side] = las[0]
            named[side][who] = partial(duel.LasAttacker, las[0])
        elif who not in OWN:
            saved = duel.read_policy(Path(who) / duel.FILES[side], side, sizes[side])
            frozen[side] = saved
            named[side][who] = partial(duel.Sampled, saved, saved.sizes)
        players[side] = named[side][who](stream(config.seed, f"player {side}"))
    game = None
    if any(isinstance(one, duel.Learner) for one in players.values()):
        game = duel.DuelGame(
            envs, players, config.seed, fabric, config.updates, config.order, config.turn
        )
    return Made(data, envs, plain, named, game, frozen)


def measured(config: Config, made: Made) -> list[Cell]:
    """Every attacker against every defender: the chosen ones and the controls."""
    from agents.duel import against_all

    attackers, defenders = made.named["attacker"], made.named["defender"]
    count, seed = config.matches, config.seed
    chosen = {config.attacker: attackers[config.attacker]}
    rest = {name: make for name, make in attackers.items() if name != config.attacker}
    return [
        *against_all(made.envs, chosen, defenders, count, seed),
        *against_all(made.plain, rest, defenders, count, seed),
    ]


def validator(config: Config, made: Made) -> Validate:
    """What each learner gains over its fixed control, against the fixed other side."""
    import torch

    from agents.duel import Sampled, against_all

    assert made.game is not None
    named, game = made.named, made.game
    usual = {side: {"fixed": named[side]["fixed"]} for side in SIDES}

    def robust(**learned: Named) -> float:
        players = {**usual, **{side: {"ppo": make} for side, make in learned.items()}}
        (cell,) = against_all(
            made.plain, players["attacker"], players["defender"], config.duels, config.seed
        )
        return sum(cell.robust) / config.duels

    before = robust()

    def validate(_: torch.nn.Module) -> dict[str, float]:
        found = {}
        for side, learner in game.learners.items():
            rise = robust(**{side: partial(Sampled, learner.frozen(), learner.sizes)}) - before
            found[f"eval/{side}_gain"] = rise if side == "defender" else 0.0 - rise
        return found

    return validate


def compared(config: Config, cells: list[Cell]) -> list[str]:
    """Each chosen player beside its controls, match by match, in words."""
    from agents.duel import level

    by_pair = {(cell.attacker, cell.defender): cell for cell in cells}
    chosen, lines = (config.attacker, config.defender), []
    for place, side in enumerate(SIDES):
        mine, others = chosen[place], {pair[1 - place] for pair in by_pair}
        for control in ("fixed", "random"):
            for other in sorted(others) if mine not in ("fixed", "random") else ():
                pairs = [(one, other) if place == 0 else (other, one) for one in (mine, control)]
                ours, theirs = (by_pair[one, two].robust for one, two in pairs)
                mean, error = level([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
                lines.append(
                    f"- {side} {mine} for {control}, against {SIDES[1 - place]} {other}: "
                    f"{mean:+.1f} ± {error:.1f} points of robust accuracy"
                )
    return lines


def as_markdown(config: Config, cells: list[Cell], held_out: int, command: str) -> str:
    """The report: standings at a match's end, attackers by defenders.

    Args:
        config: all settings.
        cells: what was measured.
        held_out: images that there are for the standing, at most those asked for.
        command: that made it.
    """
    from agents.duel import level

    defenders = list(dict.fromkeys(cell.defender for cell in cells))
    rows: dict[str, list[str]] = {}
    for cell in cells:
        mean, error = level([100 * one for one in cell.robust])
        rows.setdefault(cell.attacker, []).append(f"{mean:.1f} ± {error:.1f}")
    return "\n".join(
        [
            f"# Duel: attacker {config.attacker}, defender {config.defender}, seed {config.seed}",
            "",
            f"Robust accuracy in % (PGD-10 at ε₀ = {config.eps}) on {held_out} validation "
            f"images of {config.dataset} at the end of a match: mean and standard error of "
            f"{config.matches} matches, which are the same for every pair. The attacker wants it "
            "low. A policy draws its moves.",
            "",
            f"| attacker | {' | '.join(f'defender {name}' for name in defenders)} |",
            "|---" * (len(defenders) + 1) + "|",
            *[f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()],
            "",
            "In place of a control, match by match (mean and standard error of the differences):",
            "",
            *compared(config, cells),
            "",
            f"`{command}`",
            "",
        ]
    )


def title(config: Config) -> str:
    """The run in a line, as pictures and the screen have it."""
    return f"Duel, attacker {config.attacker}, defender {config.defender}, seed {config.seed}"


class Job(jobs.Job[Config, Made]):
    """The job in which two players play the trainings of a classifier."""

    config = Config
    peeked = {"dataset": "digits"}  # noqa: RUF012

    @override
    def defaults(self, **peeked: str) -> Config:
        changes: dict[str, Any] = {**self.peeked, **peeked}
        return self.config(eps=EPS.get(recipe(changes["dataset"]), Config.eps), **changes)

    @override
    def check(self, config: Config) -> Config:
        from advgame.seeding import derive_seed

        parse_radius(config.eps, "Linf")
        config = super().check(config)
        check_model(config.model)
        if config.awp >= 1:
            raise InputError(f"awp must lie between 0 and 1, not {config.awp}")
        for side in SIDES:
            if (who := getattr(config, side)) not in OWN:
                try:
                    RunFolder.open(who)
                except InputError as error:
                    raise InputError(
                        f"--{side} {who}: choose from {', '.join(OWN)}, or name a run folder "
                        f"({error})"
                    ) from error
        derive_seed(config.seed, "check")
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        learning = [side for side in SIDES if getattr(config, side) == "ppo"]
        if not learning:
            return {"a duel in which nobody learns": LEARNERS_OWN}
        if len(learning) == 1:
            return {"a duel in which one side learns": ("order", "turn")}
        return {} if config.order == "alternating" else {f"--order {config.order}": ("turn",)}

    @override
    def fabric(self, config: Config) -> Fabric:
        from advgame.run.devices import make_fabric

        return make_fabric(config.accelerator, 1, "32-true")

    def build(self, config: Config, fabric: Fabric) -> Made:
        """The duels, their players, and the game of those who learn."""
        return make(config, load(config), fabric)

    @override
    def settle(self, config: Config, fabric: Fabric, typed: Collection[str]) -> tuple[Config, Made]:
        """The same; the batch size gives way to few images where it was not typed."""
        data = load(config)
        config = fit_batch(config, self.usual(config), typed, len(data.train), 1, tell=True)
        return config, make(config, data, fabric)

    @override
    def images(self, made: Made) -> Mapping[str, Any]:
        return made.data.about()

    @override
    def frozen(self, made: Made) -> Mapping[str, nn.Module]:
        return made.frozen

    def work(self, config: Config, run: RunFolder, made: Made, *, resume: bool) -> None:
        """Learn, where anybody does; then measure everybody, and write the report."""
        flags = [] if made.game is None else self.learn(config, run, made, resume)
        began = time.perf_counter()
        cells = measured(config, made)
        known, held_out = about(config), len(made.plain[0].held_out)
        run.write_text("report.md", as_markdown(config, cells, held_out, known["command"]))
        report = {
            **known,
            "cells": [asdict(cell) for cell in cells],
            "flags": flags,
            "device": run.about()["device"],
            "timing": {"measuring_seconds": time.perf_counter() - began},
        }
        run.write_json("report.json", report)  # last: a run that has it is finished

    def learn(
        self, config: Config, run: RunFolder, made: Made, resume: bool
    ) -> list[dict[str, str]]:
        """Play to the end, save and draw; the learners' flags. The last policies are reported."""
        from advgame.health import deaths
        from advgame.run.curves import game_figure, save_figure
        from advgame.run.loop import Trainer, load_best
        from advgame.run.plan import TrainingPlan
        from agents import duel

        game = made.game
        assert game is not None
        plan = TrainingPlan(config.epochs, "constant")
        select = f"eval/{next(iter(game.learners))}_gain"
        validate = validator(config, made)
        trainer = Trainer(game, run, plan, validate, select=select, role="policy")
        trainer.fit(resume=resume)
        load_best(run, game.learner.module, "last")
        for side, learner in game.learners.items():
            policy = learner.frozen()
            duel.write_policy(run.path / duel.FILES[side], policy, side)
            made.named[side]["ppo"] = partial(duel.Sampled, policy, policy.sizes)
        rows = Metrics.read(run.path / "metrics.csv")
        save_figure(game_figure(rows, title(config), duel.PANELS), run.path / "curves.png")
        return [one.as_dict() for one in deaths(rows)]

    def told(self, run: RunFolder) -> str:
        """The standing that the chosen players come to, beside the controls', and the flags."""
        report, said = run.report(), []
        config = report["config"]
        for pair in ((config["attacker"], config["defender"]), ("fixed", "fixed")):
            cells = [c for c in report["cells"] if (c["attacker"], c["defender"]) == pair]
            robust = cells[0]["robust"]
            said.append(f"{' against '.join(pair)} {100 * sum(robust) / len(robust):.1f} %")
        flags = [f"\nflag {one['name']}: {one['meaning']}" for one in report["flags"]]
        return (
            f"robust accuracy at a match's end: {', '.join(said)}; more in "
            f"{run.path}/report.md{''.join(flags)}"
        )


job = Job()

if __name__ == "__main__":
    job.main()

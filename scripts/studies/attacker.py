"""Is a learned schedule of gradient steps better than PGD, MIM and APGD at equal queries?

    python scripts/study.py attacker --runs-dir runs/study/digits

Attackers are trained by `train_attacker.py` on one classifier (a seed each) and attack test images
of classifiers that they have not seen: other seeds of the same training, and another training.
The classifiers are run folders of `study.py las_at`: fixed is PGD-AT, reinforce LAS-AT. A query
is a forward of the classifier on one image; final forwards and first looks count, and every attack
may stop at the first query that fools. Success is the share of the images that are classified
correctly as they are.

Finished attackers are kept and interrupted ones resumed, so that the command can be given again.
Writes `<out>/attacker_<dataset>.json`, `.md` and `.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import train_attacker
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import GradientAttack, attacked, mim, pgd
from advgame.data import ImageSet, load_data
from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.look import WIDTH, style
from advgame.losses import margin
from advgame.run import table
from advgame.run.cells import Cell, check_cells, split_flags
from advgame.run.curves import save_figure
from advgame.run.files import read_json
from advgame.run.options import Count, Must, refuse_unasked
from advgame.run.settings import OptionalDataset
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs
from advgame.seeding import derive_seed, stream
from advgame.statistics import spread
from advgame.targets import Target, from_run
from advgame.threat import Threat
from agents.attacker import LearnedAttack, load_attacker

LEARNED = "learned"
Several = Annotated[int, Must("be 2 or above", lambda value: value >= 2)]


@dataclass(frozen=True)
class Task:
    """What an attack is given: correctly classified images, and how many looks at each."""

    model: nn.Module
    x: Tensor
    y: Tensor
    ball: Threat
    queries: int
    seed: int

    def run(self, attack: GradientAttack | LearnedAttack, chance: str) -> Tensor:
        """Adversarial examples of an attack of ours."""
        rng = stream(self.seed, chance, self.x.device)
        return attack.run(self.model, self.x, self.y, rng=rng, check=False).x_adv


Contestant = Callable[[Task], Tensor]


def stepped(make: Callable[[Threat, int], GradientAttack]) -> Contestant:
    """A gradient attack of Q-1 steps and a last look."""
    return lambda task: task.run(
        replace(make(task.ball, task.queries - 1), stop_when_fooled=True), "start"
    )


def apgd(loss: str) -> Contestant:
    """AutoAttack's APGD: a random start and Q-1 steps; its look at the clean images is free."""

    def attack(task: Task) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack

        judge = APGDAttack(
            task.model,
            n_iter=task.queries - 1,
            norm=task.ball.norm,
            eps=float(task.ball.eps),
            seed=derive_seed(task.seed, "apgd") % 2**31,
            loss=loss,
            device=task.x.device,
        )
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            found: Tensor = judge.perturb(task.x, task.y)
        return found.detach()

    return attack


def learned(folders: Mapping[int, Path]) -> Contestant:
    """The learned attacker of the task's seed, as a contestant."""
    attackers = {seed: load_attacker(folder) for seed, folder in folders.items()}
    return lambda task: task.run(attackers[task.seed].attack(task.ball, task.queries), "jumps")


HAND_MADE: dict[str, Contestant] = {
    "PGD": stepped(pgd),
    "I-FGSM": stepped(lambda ball, steps: replace(pgd(ball, steps), start=None)),
    "MIM": stepped(mim),
    "APGD-CE": apgd("ce"),
    "APGD-DLR": apgd("dlr"),
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare learned attackers with hand-made ones at equal query budgets."""

    runs_dir: str = "runs/study/digits"
    train_on: tuple[str, ...] = ("fixed-seed0",)
    """classifiers that the attackers learn on, by name of the run"""
    test_on: tuple[str, ...] = (
        *(f"fixed-seed{seed}" for seed in (1, 2, 3, 4)),
        *(f"reinforce-seed{seed}" for seed in (1, 2, 3, 4)),
    )
    """classifiers that are attacked"""
    seeds: Several = 3
    """attackers, and repetitions of the attacks that start at random"""
    budgets: tuple[Several, ...] = (5, 10, 20, 50)
    """queries per image"""
    n: Count | None = None
    """test images; None takes all"""
    title: str = ""
    """name of the table's files; the data set's when empty"""
    attackers: str = "runs/attackers"
    """run folders of the attackers; not committed"""
    out: str = "results/referee"
    dataset: OptionalDataset = None
    """whose images; the classifiers' own when not given"""
    data_dir: str | None = None
    """data folder (all but digits)"""


class AttackerStudy(Study[Config]):
    """A cell is an attack on a classifier at a budget; attackers are trained before the first."""

    about, listed = "A learned schedule against hand-made ones at equal queries", "cells"
    ending = ("Hardware: {device}. Commit {commit}.", "Command: `{command}`.")
    identity, sharing = ("attack", "classifier", "seed", "queries"), ("n",)
    unsaid: Mapping[str, Any] = {"trained_on": list(Config.train_on)}

    @property
    @override
    def stem(self) -> str:
        return f"attacker_{self.config.title or short_name(self.dataset)}"

    @cached_property
    def victims(self) -> dict[str, Target]:
        """The classifiers of the run folders ``--test-on``, which are attacked."""
        root = Path(self.config.runs_dir)
        return {name: from_run(root / name) for name in self.config.test_on}

    @property
    def dataset(self) -> str:
        """The data set that the attacked classifiers were trained on, unless another is named."""
        if self.config.dataset is not None:
            return self.config.dataset
        own = next(iter(self.victims.values())).dataset
        refuse_unasked(" ".join(self.config.test_on), "dataset", own)
        return own

    @override
    def check(self) -> None:
        super().check()
        config = self.config
        if not config.budgets:
            raise InputError("--budgets names none")
        if shared := set(config.train_on) & set(config.test_on):
            raise InputError(f"{min(shared)} is both trained on and attacked")

    def trainings(self) -> dict[int, tuple[str, list[str]]]:
        """Seed -> folder and flags of every learned attacker."""
        config = self.config
        known = [str(Path(config.runs_dir) / name) for name in config.train_on]
        words = ["--classifier", *known, *split_flags(config.extra)]
        words += ["--data-dir", config.data_dir] if config.data_dir else []
        words += ["--dataset", config.dataset] if config.dataset else []
        name = f"{'+'.join(config.train_on)}-attacker"
        return {seed: (f"{name}{seed}", [*words, "--seed", str(seed)]) for seed in self.seeds()}

    def reports(self) -> dict[int, Path]:
        """Seed -> report of every learned attacker that is finished."""
        root = Path(self.config.attackers)
        found = {s: root / name / "report.json" for s, (name, _) in self.trainings().items()}
        return {seed: path for seed, path in found.items() if path.exists()}

    def cells(self) -> dict[str, dict[str, Any]]:
        """Every attack on every classifier, at every budget and seed."""
        config = self.config
        values = ((LEARNED, *HAND_MADE), config.test_on, self.seeds(), config.budgets)
        found = [dict(zip(self.identity, one, strict=True)) for one in product(*values)]
        return {" ".join(map(str, cell.values())): cell for cell in found}

    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse attackers that cannot learn, or learned otherwise, and lost classifiers."""
        root = Path(self.config.attackers)
        check_cells(train_attacker, dict(self.trainings().values()), root)
        _ = self.victims

    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        """Train attackers, then measure attack by attack."""
        config, screen = self.config, Console(stderr=True)
        if cells and not config.finished_only:
            script, todo = Path(str(train_attacker.__file__)), dict(self.trainings().values())
            root = Path(config.attackers)
            self.run_all([Cell(script, root / name, flags) for name, flags in todo.items()])
        done = {seed: path.parent for seed, path in self.reports().items()}
        contestants = {LEARNED: learned(done), **HAND_MADE}
        size = next(iter(self.victims.values())).image_size
        test = load_data(self.dataset, config.data_dir, image_size=size).test
        test = test if config.n is None else test.first(config.n)
        for name, contestant in contestants.items():
            mine = [cell for cell in cells.values() if cell["attack"] == name]
            ready = [cell for cell in mine if name != LEARNED or cell["seed"] in done]
            yield [measure(contestant, self.victims[c["classifier"]], test, c) for c in ready]
            screen.print(f"measured {name}")

    @override
    def facts(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "trained_on": list(self.config.train_on)}

    def found(self, runs: Runs) -> dict[str, Any]:
        """Spread over seeds of the mean over classifiers; differences paired by classifier."""
        attackers = [read_json(path) for path in self.reports().values()]
        return {"attackers": attackers, "summary": summarise(runs)}

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        sizes, known = [run["n"] for run in runs], {**self.unsaid, **about}["trained_on"]
        victims = list(dict.fromkeys(run["classifier"] for run in runs))
        seeds = len({run["seed"] for run in runs})
        shown = table.Number("", 2, 100, "half_interval")
        found, gaps = about["summary"]["success"], about["summary"]["differences"]
        signed = replace(shown, minus=LEARNED)
        return [
            f"# {self.about}, {about['dataset']}",
            f"Success in % of the {min(sizes)} to {max(sizes)} test "
            f"images that are classified correctly, mean over {len(victims)} classifiers; ± is "
            f"half of the 95 % t-interval over {seeds} seeds (attackers, random starts). "
            f"Attackers trained on {', '.join(known)}; attacked: {', '.join(victims)}.",
            table.markdown(
                ["attack", *(f"{q} queries" for q in budgets_of(found))],
                [
                    [name, *(shown.words(row.get(q)) for q in budgets_of(found))]
                    for name, row in found.items()
                ],
            ),
            "Differences in points, paired by classifier, with the 95 % t-interval over "
            "classifiers:",
            table.markdown(
                ["pair", "difference"], [[name, signed.words(gap)] for name, gap in gaps.items()]
            ),
            "A query is a forward on one image. PGD, I-FGSM: step ε/4; MIM: ε/steps. PGD and APGD "
            "start at random, the others at the clean image, so that I-FGSM and MIM do not vary; "
            "APGD's look at the clean image is not counted.",
        ]

    @override
    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        victims = {run["classifier"] for run in runs}
        title = f"Attack success on {about['dataset']}, {len(victims)} unseen classifiers"
        save_figure(picture(about["summary"], title), self.path.with_suffix(".png"), pdf=True)


def measure(
    contestant: Contestant, victim: Target, images: ImageSet, cell: Mapping[str, Any]
) -> dict[str, Any]:
    """Success of one attack on one classifier."""
    x, y, ball = images.floats(), images.labels, victim.threat
    with attacked(victim.model):
        with torch.no_grad():
            right = margin(victim.model(x), y) < 0
        x, y = x[right], y[right]
        x_adv = contestant(Task(victim.model, x, y, ball, cell["queries"], cell["seed"]))
        assert (ball.size(x_adv - x) <= float(ball.eps) + 1e-6).all()
        with torch.no_grad():
            fooled = margin(victim.model(x_adv), y) > 0
    return {**cell, "n": len(x), "success": float(fooled.float().mean())}


def averaged(runs: Runs, unit: str) -> list[Run]:
    """A run per attack at a budget and per unit, success averaged over whatever else differs."""
    found: dict[tuple[str, Any], list[float]] = {}
    for run in runs:
        name = f"{run['attack']} at {run['queries']}"
        found.setdefault((name, run[unit]), []).append(run["success"])
    return [{"method": name, "seed": one, "success": mean(v)} for (name, one), v in found.items()]


def summarise(runs: Runs) -> dict[str, Any]:
    """Spread over seeds of the mean over classifiers; differences paired by classifier."""
    attacks = dict.fromkeys(run["attack"] for run in runs)
    budgets = dict.fromkeys(run["queries"] for run in runs)
    over_seeds, pairs = table.summarise(averaged(runs, "seed")), averaged(runs, "classifier")
    differences = {}
    for factor in (1, 2):  # at as many queries, and at half as many
        for q in (q for q in budgets if factor * q in budgets):
            for one, other in ((f"{LEARNED} at {q}", f"{a} at {factor * q}") for a in attacks):
                gaps = table.differences(pairs, "success", one, other)
                if gaps and not other.startswith(LEARNED):
                    differences[f"{one} - {other}"] = spread(gaps)
    success = {
        attack: {
            str(q): over_seeds[name]["success"]
            for q in budgets
            if (name := f"{attack} at {q}") in over_seeds
        }
        for attack in attacks
    }
    return {"success": success, "differences": differences}


def budgets_of(success: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every number of queries that any attack has, as `summarise` names it."""
    return list(dict.fromkeys(q for row in success.values() for q in row))


@style()
def picture(summary: dict[str, Any], title: str) -> Figure:
    """Figure of success against queries per image, a line per attack."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    for number, (name, row) in enumerate(summary["success"].items()):
        queries = [int(q) for q in row]
        values = [100 * v["mean"] for v in row.values()]
        spans = [100 * (v["half_interval"] or 0) for v in row.values()]
        style = {"lw": 2.4, "color": "black", "zorder": 5} if name == LEARNED else {"lw": 1.2}
        shifted = [q * 1.015 ** (number - 2) for q in queries]  # so that bars stand apart
        axis.errorbar(shifted, values, spans, label=name, marker="o", ms=3, capsize=2, **style)
    ticks = [int(q) for q in budgets_of(summary["success"])]
    axis.set(xscale="log", xlabel="queries per image", ylabel="success, %", title=title)
    axis.set_xticks(ticks, [str(q) for q in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


main = AttackerStudy.main

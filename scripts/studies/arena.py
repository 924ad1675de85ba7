"""Is a mixture of classifiers more robust than its best member, and than one of equal compute?

    python scripts/study.py arena --seeds 5                                  # digits
    python scripts/study.py arena --dataset mnist --data-dir DIR --rounds 3 --n 500
    python scripts/study.py arena --methods pgd-at uniform-2 long-uniform-2  # some rows

Single classifiers by three games; the best of these games by PGD-10 on validation images gives
members to uniform mixtures of 2 and 4 seeds; the equilibrium of a tournament of the three on
validation images; PSRO; BARRE; and the controls that decide, one classifier of that best game with
the training compute of a whole mixture, in counted forwards per training image.

All are judged as mixtures, a single one with weight 1, by `evaluate.py`: expected robust accuracy
on test images under ascent on expected losses alone, as published, under ARC, under the union of
the members' own adversarial examples, and under the worst of all for each image. A seed has
classifiers of its own in every row. Finished cells are kept: the command can be given again.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

from typing_extensions import override

from advgame.arena.mixture_file import write_mixture
from advgame.data.names import recipe
from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import Cell, check_cells, size_in, split_flags, usable, without
from advgame.run.files import read_json
from advgame.run.folder import Metrics, RunFolder
from advgame.run.options import Count, Names
from advgame.run.settings import Dataset
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Runs
from studies.compare import RECIPES

# name -> script and flags
SINGLES = {
    "pgd-at": "train.py --game pgd-at",
    "trades": "train.py --game trades",
    "las-random": "train_las_at.py --agent random",
}
UNIFORM = {"uniform-2": 2, "uniform-4": 4}
NASH = "nash"
ROUNDS = {"psro": "psro.py", "barre": "psro.py --response barre"}
# one classifier with the training compute of
CONTROLS = {f"long-{name}": name for name in (*UNIFORM, *ROUNDS)}
METHODS = (*SINGLES, *UNIFORM, NASH, *ROUNDS, *CONTROLS)
MEMBERS = max(UNIFORM.values())
"""Classifiers of a game that a seed of the study may have."""
ARC = ("arc", "arc:warm")


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare mixtures with single classifiers, also of their compute."""

    dataset: Dataset = "digits"
    """what --dataset of the trainings takes; further options of theirs in --extra"""
    data_dir: str | None = None
    """data folder (all but digits)"""
    methods: tuple[str, ...] = METHODS
    """which rows; long-NAME is one classifier with NAME's training compute"""
    base: str = ""
    """game of uniform mixtures and of controls; the best by validation when empty"""
    rounds: Count = 5
    """of PSRO, and classifiers of BARRE beyond the first"""
    attacks: Names = ("autoattack-lite",)
    """on each member, beside the attacks on the mixture"""
    n: Count | None = None
    """test images; None takes all"""
    seeds: Count = 5
    runs_dir: str = "runs/arena"
    out: str = "results/arena"


class Arena(Study[Config]):
    """Trainings, mixtures of them, and their judgement."""

    about = "Mixtures of classifiers on {dataset}"
    control = "pgd-at"
    sharing = ("rounds", "attacks", "n")

    @override
    def check(self) -> None:
        super().check()
        for name in self.config.methods:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        if self.config.base and self.config.base not in SINGLES:
            raise unknown("base", self.config.base, SINGLES)
        for name, of in CONTROLS.items():
            if name in self.config.methods and of not in self.config.methods:
                raise InputError(f"{name} has the compute of {of}: add it to --methods")

    def cells(self) -> dict[str, dict[str, Any]]:
        """All but the controls, whose compute the others say."""
        return self._named([name for name in self.config.methods if name not in CONTROLS])

    @override
    def later_cells(self, runs: Runs) -> dict[str, dict[str, Any]]:
        done = {run["method"] for run in runs}
        asked = [name for name in self.config.methods if CONTROLS.get(name) in done]
        found = self._named(asked)
        for cell in found.values():
            of = CONTROLS[cell["method"]]
            cell["budget"] = mean(run["forwards"] for run in runs if run["method"] == of)
        return found

    def _named(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {
            f"{method}-seed{seed}": {"method": method, "seed": seed}
            for seed in self.seeds()
            for method in methods
        }

    @override
    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse trainings that cannot work, or whose folders had other flags."""
        for name, words in (SINGLES | ROUNDS).items():
            check_cells(script_of(words), {name: self.flags(words, self.config.first_seed)})
        self.agree(self.root / "trained", f"--rounds {self.config.rounds} {self.config.extra}")
        self.agree(self.root / "judged", shlex.join(self.judging()))

    def judging(self) -> list[str]:
        """Flags of `evaluate.py` that every row is judged with."""
        return ["--attacks", *self.config.attacks, "--n", str(self.config.n)]

    def flags(self, words: str, seed: int) -> list[str]:
        """Flags of a training: those that all share, and its own."""
        config, (_, *own) = self.config, split_flags(words)
        whose = recipe(config.dataset, size_in(config.extra))
        shared = [*split_flags(RECIPES[whose]), "--dataset", config.dataset]
        shared += ["--data-dir", config.data_dir] if config.data_dir else []
        # a training's own report is of no use here
        shared += ["--attacks", "fgsm", "--eval-n", "100", *split_flags(config.extra)]
        own += ["--rounds", str(config.rounds)] if words in ROUNDS.values() else []
        return [*usable(shared, own, script_of(words)), *own, "--seed", str(seed)]

    def training(self, game: str, number: int) -> Cell:
        """The training of a single classifier, or the rounds of PSRO or BARRE.

        Args:
            game: of `SINGLES` or `ROUNDS`.
            number: its seed.
        """
        words = (SINGLES | ROUNDS)[game]
        folder = self.root / "trained" / f"{game}-{number}"
        return Cell(Path(str(script_of(words).__file__)), folder, self.flags(words, number))

    def longer(self, cell: Mapping[str, Any]) -> Cell:
        """The training of a control, by its budget."""
        short = self.training(self.base, MEMBERS * cell["seed"])
        folder = short.folder.with_name(f"{cell['method']}-{self.base}-{cell['seed']}")
        budget = ["--budget", f"{cell['budget']:.0f}"]
        return Cell(short.script, folder, [*without(short.flags, ["epochs"]), *budget])

    @cached_property
    def base(self) -> str:
        """The game of uniform mixtures: the best by PGD-10 on validation images."""
        if self.config.base:
            return self.config.base
        scores = {
            game: mean(
                max(row.get("eval/robust", 0) for row in Metrics.read(path / "metrics.csv"))
                for path in (self.training(game, MEMBERS * seed).folder for seed in self.seeds())
            )
            for game in SINGLES
        }
        return max(scores, key=lambda game: scores[game])

    def members(self, cell: Mapping[str, Any]) -> list[Cell]:
        """The trainings that a row makes use of; PSRO's and BARRE's are one."""
        method, first = cell["method"], MEMBERS * cell["seed"]
        if "budget" in cell:
            return [self.longer(cell)]
        if method in UNIFORM:
            return [self.training(self.base, first + one) for one in range(UNIFORM[method])]
        if method == NASH:
            return [self.training(game, first) for game in SINGLES]
        return [self.training(method, first)]

    def mixture(self, name: str, cell: Mapping[str, Any]) -> Path:
        """The file of what is judged; written once its members are there."""
        members = [one.folder for one in self.members(cell)]
        if cell["method"] in ROUNDS:
            return members[0] / "mixture.json"
        path = self.root / "mixtures" / f"{self.told(name, cell)}.json"
        if not path.exists() and cell["method"] == NASH:
            shares = self.tournament(name, members)
            write_mixture(path, [Path(one) for one in shares], list(shares.values()))
        elif not path.exists():
            write_mixture(path, members, [1 / len(members)] * len(members))
        return path

    def tournament(self, name: str, members: Sequence[Path]) -> dict[str, float]:
        """The equilibrium of a tournament on validation images, by folder."""
        from advgame.arena import hold_tournament
        from advgame.arena.tournament import playable
        from advgame.classifiers.saved import run_classifier
        from advgame.data import load_data
        from advgame.run.defender_job import ball

        config = self.config
        size = size_in(config.extra)
        data = load_data(config.dataset, config.data_dir, image_size=size).validation
        runs = {str(path): RunFolder.open(path) for path in members}
        models = {path: run_classifier(run, data.shape, data.classes) for path, run in runs.items()}
        threat = ball(script_of(SINGLES["pgd-at"]).job.parse(self.flags(SINGLES["pgd-at"], 0)))
        rows = {Path(path).name: model for path, model in models.items()}
        folder = self.root / "tournaments" / name
        content = hold_tournament(folder, rows, data, threat, transfer=("aa:apgd-ce",))
        played = playable(content["games"]["all"]["per_image"]["defender"])
        return {str(path): played[path.name] for path in members if path.name in played}

    def told(self, name: str, cell: Mapping[str, Any]) -> str:
        """A row's folder, with the base where it depends on it."""
        own = cell["method"] in (*SINGLES, NASH, *ROUNDS)
        return name if own else f"{self.base}-{name}"

    def judged(self, name: str, cell: Mapping[str, Any]) -> Path:
        """The folder of a row's evaluation."""
        return self.root / "judged" / self.told(name, cell)

    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        """Train what is missing, mix, judge."""
        if not self.config.finished_only:
            self._train(cells)
            judge, todo = Path(__file__).parents[1] / "evaluate.py", []
            for name, cell in cells.items():
                words = [str(self.mixture(name, cell)), *self.judging()]
                words += ["--data-dir", self.config.data_dir] if self.config.data_dir else []
                todo.append(Cell(judge, self.judged(name, cell), words))
            self.run_all(todo)
        for name, cell in cells.items():
            if (self.judged(name, cell) / "report.json").exists():
                yield [self.read(name, cell)]

    def _train(self, cells: Mapping[str, Any]) -> None:
        based = any(cell["method"] in UNIFORM for cell in cells.values())
        first = [
            self.training(game, MEMBERS * seed)
            for game in SINGLES
            for seed in self.seeds()
            if based and not self.config.base
        ]
        first += [
            one
            for cell in cells.values()
            if cell["method"] not in UNIFORM
            for one in self.members(cell)
        ]
        self.run_all(different(first))  # the base is known from here on
        self.run_all(different([one for cell in cells.values() for one in self.members(cell)]))

    def read(self, name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
        """What the evaluation of a row found, and what its training took."""
        trained = [one.folder for one in self.members(cell)]
        return {
            **{"method": cell["method"], "seed": cell["seed"]},
            "base": self.base if cell["method"] in (*UNIFORM, *CONTROLS) else "",
            **judgement(self.judged(name, cell)),
            "forwards": sum(map(forwards, trained)),
        }

    @override
    def place(self, run: Mapping[str, Any]) -> Any:
        return METHODS.index(run["method"]) if run["method"] in METHODS else len(METHODS)

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        first = runs[0]
        columns: table.Columns = {
            **judged_columns(self.control),
            "worst − mixture of equal compute": over_mixture,
            "forwards per training image": table.Mean("forwards", 0),
        }
        bases = table.names(run["base"] for run in runs if run["base"])
        return [
            f"# {self.title}",
            f"{judged_how(first)} Uniform mixtures and controls (long-NAME: one classifier with "
            f"NAME's training compute) are of {bases}, the best by PGD-10 on validation images "
            "unless it was asked for.",
            table.render(columns, table.rows(runs)),
        ]


def judgement(folder: Path) -> dict[str, Any]:
    """What an evaluation of a mixture found.

    Args:
        folder: of `evaluate.py`; its classifier is a mixture, or one of weight 1.
    """
    report = read_json(folder / "report.json")
    with (folder / "verdicts.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    return {
        "n": report["n"],
        **report["threat"],
        "clean": report["accuracy"]["clean"],
        "adaptive": report["mixture"]["adaptive_alone"],
        "arc": worst(images, ARC),
        "union": worst(images, [name for name in images[0] if name.startswith("members:")]),
        "worst_case": report["worst_case"],
        "members": len(report["mixture"]["members"]),
        "flags": [flag["name"] for flag in report["flags"]],
        "device": report["device"],
        "commit": RunFolder.open(folder).about()["commit"],
    }


def judged_columns(control: str) -> table.Columns:
    """Columns of a table of mixtures.

    Args:
        control: the row that the others are compared with.
    """
    return {
        **{"method": table.row_name, "seeds": table.seeds},
        "members": table.Mean("members", 1),
        "clean": table.Percent("clean"),
        "adaptive PGD alone": table.Percent("adaptive"),
        "ARC": table.Percent("arc"),
        "union": table.Percent("union"),
        "**worst of all**": table.Percent("worst_case"),
        "adaptive − worst": table.Percent(gap),
        f"worst − {control}, paired, 95 %": table.Paired("worst_case", minus=control),
    }


def gap(run: table.Run) -> float:
    """How much accuracy adaptive PGD alone leaves that the worst of all attacks takes."""
    return float(run["adaptive"] - run["worst_case"])


def judged_how(run: table.Run) -> str:
    """What those columns say, with the ball and images of a run."""
    return (
        f"{run['norm']} ε = {run['eps']:.4g}, {run['n']} test images. Expected accuracy in %, mean "
        "± sd over seeds, under an attacker that knows members and weights and not the draw. "
        "Adaptive PGD: the worst of ascent on three expected losses. ARC: from the clean image, "
        "and from where ascent ends. Union: the members' own adversarial examples."
    )


def script_of(words: str) -> ModuleType:
    """The module of a training's script, by its words."""
    return import_module(words.split()[0].removesuffix(".py"))


def over_mixture(row: table.Row) -> str:
    """Column: a control less the mixture whose compute it has, paired over seeds."""
    mixture = CONTROLS.get(row.name)
    return table.Paired("worst_case", minus=mixture)(row) if mixture else "–"


def different(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells, each folder of them once."""
    return list({cell.folder: cell for cell in cells}.values())


def worst(images: Sequence[Mapping[str, str]], columns: Sequence[str]) -> float:
    """Expected accuracy under the worst of some columns of verdicts.csv for each image."""
    return mean(min(float(row[name]) for name in ("clean", *columns)) for row in images)


def forwards(folder: Path) -> float:
    """Counted forwards per training image of a training, or of all of PSRO's."""
    from advgame.arena.rounds import trained_forwards

    about = RunFolder.open(folder).about()
    if (folder / "rounds.json").exists():
        rounds = read_json(folder / "rounds.json")
        spent = sum(one["forwards"] for one in (rounds["begin"], *rounds["rounds"]))
        return float(spent / about["data"]["train"])
    return trained_forwards(folder) / float(about["data"]["train"])


main = Arena.main

"""Studies whose cells are trainings: `TrainingStudy`, `MethodsStudy`, and what they say of cells.

* `TrainingStudy`: a cell is a method x seed, a run of a script in a process of its own.
* `MethodsStudy`: the usual options besides, of a training on one data set judged by attacks.
"""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from typing_extensions import override

from advgame.data.names import is_own
from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import Cell, check_cells, size_in, split_flags, usable, values_of
from advgame.run.curves import Rows, save_figure, seeds_figure
from advgame.run.files import read_json
from advgame.run.folder import Metrics
from advgame.run.options import Names
from advgame.run.selection import selected_by
from advgame.run.settings import Dataset
from advgame.run.study import ConfigT, Study, StudyConfig
from advgame.run.table import Run, Runs


@dataclass(frozen=True)
class MethodsConfig(StudyConfig):
    """What a study of methods on a data set can be asked."""

    dataset: Dataset = "digits"
    """what --dataset of the trainings takes; further options of theirs in --extra"""
    methods: tuple[str, ...] = ()
    """which methods"""
    attacks: Names = ()
    """attacks of the reports; the training script's own when empty"""
    data_dir: str | None = None
    """data folder (all but digits)"""


RESERVED = {"name", "resume", "runs_dir", "seed"}
"""Options by which cells differ: the study sets them."""
MethodsT = TypeVar("MethodsT", bound=MethodsConfig)
Flags = Sequence[str]


class Finished:
    """What the folder of a finished training holds.

    Args:
        folder: ``METHOD-seedN``.

    Raises:
        InputError: damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = read_json(folder / "report.json")
        self.about = read_json(folder / "config.json")
        self.settings: Mapping[str, Any] = self.about["config"]
        self.rows = Metrics.read(folder / "metrics.csv")

    def facts(self) -> dict[str, Any]:
        """What every study notes of a run."""
        return {
            "method": self.folder.name.rsplit("-seed", 1)[0],
            "seed": self.settings["seed"],
            "n": self.report["n"],
            "commit": self.about["commit"],
            "device": self.about["device"],
            "flags": [flag["name"] for flag in self.report["flags"]],
        }

    def trained_epochs(self) -> float:
        """Passes over the training images; a budget may end within one, also within the first."""
        from advgame.run.loop import COSTS  # imports torch

        first, last = self.rows[0], self.rows[-1]
        if len(self.rows) > 1:
            return float(last["step"] / first["step"])
        if "cost/spent" not in first:
            return float(self.settings["epochs"])
        prices = zip(COSTS, (1.0, *self.settings["prices"]), strict=True)
        step: float = sum(first[kind] * price for kind, price in prices)
        return float(first["cost/spent"] / step)

    def accuracies(self) -> dict[str, float]:
        """On the test images: ``accuracy_ATTACK`` of each attack, ``worst_case`` of all."""
        found = {f"accuracy_{name}": value for name, value in self.report["accuracy"].items()}
        return {**found, "worst_case": self.report["worst_case"]}


class TrainingStudy(Study[ConfigT]):
    """A table over seeds, whose cells are runs of a script."""

    script: ModuleType
    """of the cells, with its `advgame.run.job.Job` as ``job``"""
    methods: Mapping[str, str]
    """name -> flags of the script, as they are typed; the table's rows are in this order"""
    curves: Mapping[str, str] = {}
    """tags of the picture -> titles of its panels; a run has them in its ``curves``"""

    def asked(self) -> Sequence[str]:
        """The names of the methods that are to be run."""
        return tuple(self.methods)

    def check(self) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            InputError: as `Study.check`, or a method that there is not.
        """
        super().check()
        if odd := [name for name in self.asked() if name not in self.methods]:
            raise unknown("method", odd[0], self.methods)

    def shared(self) -> list[str]:
        """Flags of the training script that every cell is given."""
        return split_flags(self.same())

    def cells(self) -> dict[str, list[str]]:
        """Folder -> flags of every cell."""
        flags = {name: self.flags(name) for name in self.asked()}
        return {
            f"{name}-seed{seed}": [*words, "--seed", str(seed)]
            for seed in self.seeds()
            for name, words in flags.items()
        }

    def flags(self, method: str) -> list[str]:
        """Flags of a method's cells: those of all cells that it makes use of, and its own."""
        own = split_flags(self.methods[method])
        return [*usable(self.shared(), own, self.script), *own]

    @override
    def key(self, name: str, cell: Any) -> tuple[Any, ...]:
        method, seed = name.rsplit("-seed", 1)
        return method, int(seed)

    def prepare(self, cells: Mapping[str, Flags]) -> None:
        """Refuse cells whose script would refuse them, or whose folders had other flags."""
        check_cells(self.script, cells)
        self.check_extra(cells)
        self.agree(self.root, self.same())

    def check_extra(self, cells: Mapping[str, Flags], heard: Collection[str] = ()) -> None:
        """Refuse options of ``--extra`` that no cell has: the results would name them all the same.

        Args:
            cells: their flags.
            heard: options that the study itself makes use of.

        Raises:
            InputError: which one.
        """
        made = [values_of(flags) for flags in cells.values()]
        for option, values in values_of(split_flags(self.config.extra)).items():
            used = any(one.get(option) == values for one in made) or option in heard
            if option in RESERVED or not used:
                raise InputError(
                    f"--extra: --{option.replace('_', '-')} is set by the study itself, or no "
                    "method makes use of it"
                )

    def make(self, cells: Mapping[str, Flags]) -> Iterator[Runs]:
        """Run what is not finished, and read it."""
        if self.config.finished_only:
            cells = {name: flags for name, flags in cells.items() if self.finished(name)}
        elif cells:
            self.run(cells)
        yield [self.read(self.root / name) for name in cells]

    def run(self, cells: Mapping[str, Flags]) -> None:
        """Run or resume cells, each in a process of its own."""
        self.run_all([self.cell(name, flags) for name, flags in cells.items()])

    def cell(self, name: str, flags: Flags) -> Cell:
        """The training of a method and seed."""
        return Cell(Path(str(self.script.__file__)), self.root / name, flags)

    def finished(self, name: str) -> bool:
        """Whether a cell can be read."""
        return (self.root / name / "report.json").exists()

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found, with the keys of `identity`."""

    def place(self, run: Run) -> Any:
        """In the order of the methods; those of earlier versions come last."""
        order, name = list(self.methods), run[self.identity[0]]
        return order.index(name) if name in order else len(order)

    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """Curves over time of the methods whose cells have them all."""
        if not self.curves:
            return
        method = self.identity[0]
        bare = {run[method] for run in runs if "curves" not in run}  # of earlier versions
        shown = [run for run in runs if run[method] in self.methods and run[method] not in bare]
        tags = {tag: title for tag, title in self.curves.items() if drawn(shown, tag)}
        if tags:
            title = f"{self.title}: mean and range over seeds"
            figure = seeds_figure(drawable(shown), tags, title)
            save_figure(figure, self.path.with_suffix(".png"), pdf=True)


class MethodsStudy(TrainingStudy[MethodsT]):
    """Methods of a training script on one data set, judged by attacks."""

    @override
    def asked(self) -> Sequence[str]:
        return self.config.methods

    def same(self) -> str:
        """Flags that runs of a results file share: attacks, and ``--extra``."""
        attacks = ["--attacks", *self.config.attacks] if self.config.attacks else []
        return shlex.join([*attacks, *split_flags(self.config.extra)])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of one's own images; "" of a known data set, which its name tells.

        Files and folders are called alike where they hold other images, or change.
        """
        if not is_own(self.config.dataset):
            return ""
        from advgame.data import load_data

        config = self.config
        found = load_data(config.dataset, config.data_dir, image_size=size_in(config.extra))
        return str(found.about()["sha256"])

    def facts(self) -> dict[str, Any]:
        """What all runs are about: one's own images by their digest."""
        return {"data": self.digest} if self.digest else {}

    @override
    def agree(self, root: Path, flags: str) -> None:
        super().agree(root, f"{flags} --images {self.digest}" if self.digest else flags)

    def images(self) -> list[str]:
        """Flags that name the data set."""
        folder = ["--data-dir", self.config.data_dir] if self.config.data_dir else []
        return ["--dataset", self.config.dataset, *folder]

    @override
    def shared(self) -> list[str]:
        return [*self.images(), *super().shared()]

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found: accuracies, where a study does not read more."""
        cell = Finished(folder)
        return {**cell.facts(), **cell.accuracies()}

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The title, and a table of accuracies, where a study does not tell more."""
        named = [key.removeprefix("accuracy_") for key in runs[0] if key.startswith("accuracy_")]
        columns: table.Columns = {
            **{"method": table.row_name, "seeds": table.seeds},
            **table.accuracies([name for name in named if name != "clean"]),
        }
        words = f"{runs[0]['n']} test images; mean ± sd over seeds, in %."
        return [f"# {self.title}", words, table.render(columns, table.rows(runs))]


def attacks_of(runs: Runs, of: str = "accuracy_") -> list[str]:
    """The attacks that any run was judged by, in the order of the runs; learned ones left out.

    Args:
        runs: of a results file.
        of: what the keys of their numbers begin with.
    """
    keys = dict.fromkeys(key for run in runs for key in run if key.startswith(of))
    found = [key.removeprefix(of) for key in keys]
    return [name for name in found if name != "clean" and not name.startswith("learned:")]


def selection(runs: Runs) -> str:
    """What selected the weights of the cells, in a sentence that names the exceptions."""
    pairs = dict.fromkeys((run["method"], selected_by(run)) for run in runs)
    usual = Counter(words for _, words in pairs).most_common(1)[0][0]
    others = [f"{method}: by {words}" for method, words in pairs if words != usual]
    return f"Weights selected by {usual}" + (f" ({'; '.join(others)})" if others else "")


def training_images(first: Run) -> str:
    """How many training images the cells had, in words."""
    return f"training images: {first['train_n'] or 'all'}"


def thinned(rows: Rows, tags: Collection[str]) -> dict[str, list[tuple[int, float]]]:
    """Curves, small enough for a results file: tag -> (epoch, value to four digits)."""
    return {
        tag: [(int(row["epoch"]), float(f"{row[tag]:.4g}")) for row in rows if tag in row]
        for tag in tags
        if any(tag in row for row in rows)
    }


def drawn(runs: Runs, tag: str) -> bool:
    """Whether any run has a curve."""
    return any(tag in run["curves"] for run in runs)


def drawable(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Rows]]:
    """Method -> the rows of its seeds, for `seeds_figure`.

    Args:
        runs: a ``method`` and ``curves`` each, which `thinned` made.
    """
    found: dict[str, list[Rows]] = {}
    for run in runs:
        curves: Mapping[str, Sequence[tuple[int, float]]] = run["curves"]
        rows = [{"epoch": e, tag: value} for tag, points in curves.items() for e, value in points]
        found.setdefault(run["method"], []).append(rows)
    return found

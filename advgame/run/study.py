"""A study: cells that are run once, one results file, a table and pictures of what they found.

A study is a class of `scripts/studies/`. It says its cells, what it reads of a finished one, and
its table, the paper's own numbers among the columns. What all studies do is here: check every cell
before the first one, run or resume what is missing, keep what the results file holds, write JSON,
Markdown and pictures, or write the latter again from the JSON. The classes:

* `Study`: whatever its cells are; it can measure in its own process.
* `TrainingStudy`: a cell is a method x seed, a run of a script in a process of its own.
* `MethodsStudy`: the usual options besides, of a training on one data set judged by attacks.
"""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from typing_extensions import override

from advgame.data.names import short_name
from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import (
    Cell,
    check_cells,
    note_flags,
    run_cells,
    same_flags,
    split_flags,
    usable,
    values_of,
)
from advgame.run.curves import Rows, save_figure, seeds_figure
from advgame.run.engines import EngineConfig, check_engine, make_engine
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import Metrics, made_by
from advgame.run.options import Count, Names, Whole, check_types
from advgame.run.selection import selected_by
from advgame.run.settings import Dataset
from advgame.run.table import Run, Runs, names, summarise


@dataclass(frozen=True)
class StudyConfig(EngineConfig):
    """What every study can be asked."""

    seeds: Count = 3
    """seeds per method"""
    first_seed: Whole = 0
    """the first of them; keep those that you tuned on out"""
    missing_only: bool = False
    """leave out what the results hold already, also where its folders are gone"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    from_json: bool = False
    """train and read nothing: write table and pictures again from the results file"""
    extra: str = ""
    """further flags of the script for every cell, e.g. --extra="--epochs 5" """
    runs_dir: str = "runs/study"
    """run folders, one per cell; not committed"""
    out: str = "results"
    """where the results go"""


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
ConfigT = TypeVar("ConfigT", bound=StudyConfig)
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

    def accuracies(self) -> dict[str, float]:
        """On the test images: ``accuracy_ATTACK`` of each attack, ``worst_case`` of all."""
        found = {f"accuracy_{name}": value for name, value in self.report["accuracy"].items()}
        return {**found, "worst_case": self.report["worst_case"]}


class Study(ABC, Generic[ConfigT]):
    """Cells, and what is told of them.

    Args:
        config: what it is asked.
    """

    listed = "runs"
    """what the results file calls the list of its runs"""
    identity: tuple[str, ...] = ("method", "seed")
    """keys by which the runs of a results file differ"""
    sharing: tuple[str, ...] = ()
    """options that they share, by which a file without them was made as is usual"""
    control = ""
    """a method; the summary has differences to it"""
    flat = False
    """whether cells lie in ``--runs-dir`` itself, not in a folder there that is called `stem`"""
    parallel = True
    """whether cells are processes, of which there can be several at a time"""
    remembers = True
    """whether finished cells are found again in their folders"""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self._flags: dict[Path, str] = {}

    about: str
    """what is studied, for titles; options in braces"""
    files = "{dataset}"
    """name of the results' files without suffix; options in braces"""
    ending: tuple[str, ...] = (
        "Flags raised: {flags}.",
        "Hardware: {device}. Cells made at commit {commits}.",
        "Command: `{command}`.",
    )
    """last paragraphs of the results for people"""

    @property
    def stem(self) -> str:
        """Name of the results' files without suffix."""
        return re.sub(r"[^\w.-]+", "-", self.files.format(**self._words()).replace("/", "of"))

    @property
    def title(self) -> str:
        """The title of the table and of the pictures."""
        return self.about.format(**self._words())

    def _words(self) -> dict[str, Any]:
        """The options as titles and files name them."""
        words = dict(vars(self.config))
        if "dataset" in words and words["dataset"] is not None:
            words["dataset"] = short_name(words["dataset"])
        return words

    @property
    def root(self) -> Path:
        """The folder that the cells' run folders lie in."""
        return Path(self.config.runs_dir) / ("" if self.flat else self.stem)

    @property
    def path(self) -> Path:
        """The JSON file of the results; table and pictures lie beside it."""
        return Path(self.config.out) / f"{self.stem}.json"

    def same(self) -> str:
        """Flags that runs of a results file share: ``--extra``, and `sharing` where changed."""
        words = list[str]()
        for option in self.sharing:
            value, usual = getattr(self.config, option), getattr(type(self.config), option)
            if value != usual:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{option}", *map(str, values)]
        return shlex.join([*words, *split_flags(self.config.extra)])

    def check(self) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            InputError: a setting that is not what its type asks for.
        """
        check_types(type(self.config), vars(self.config), "settings")
        if not self.parallel and (self.config.jobs > 1 or self.config.engine != "local"):
            raise InputError("this study measures in its own process: no --jobs, no --engine")
        check_engine(self.config)

    def seeds(self) -> range:
        """The seeds that every method is run with."""
        first = self.config.first_seed
        return range(first, first + self.config.seeds)

    @abstractmethod
    def cells(self) -> Mapping[str, Any]:
        """Name of every cell -> what `make` must know of it."""

    def later_cells(self, runs: Runs) -> Mapping[str, Any]:
        """Cells that depend on what the others found."""
        return {}

    def key(self, name: str, cell: Any) -> tuple[Any, ...]:
        """The `identity` of the run that a cell makes."""
        return tuple(cell[part] for part in self.identity)

    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse cells that cannot work, before the first one."""

    def run_all(self, cells: Sequence[Cell], jobs: int | None = None) -> None:
        """Run or resume processes by the engine that is asked for.

        Args:
            cells: of any scripts; those that make use of others come after them.
            jobs: at a time, where not as many as asked for.
        """
        run_cells(cells, make_engine(self.config), jobs or self.config.jobs, self._note_flags)

    def agree(self, root: Path, flags: str) -> None:
        """Refuse a folder whose cells had other flags; these are noted before the first cell.

        An engine that is not there is found out between the two.

        Raises:
            InputError: which it had.
        """
        same_flags(root, flags)
        self._flags[root] = flags

    def _note_flags(self) -> None:
        for root, flags in self._flags.items():
            note_flags(root, flags)

    @abstractmethod
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        """Run cells; what they found is saved whenever some of it is given."""

    def place(self, run: Run) -> Any:
        """Where a run stands in the table, before its seed."""
        return 0

    def facts(self) -> dict[str, Any]:
        """What all runs of a results file are about; the file holds it."""
        return {}

    def found(self, runs: Runs) -> dict[str, Any]:
        """What the results file holds beside the runs.

        Raises:
            InputError: runs that do not belong into one table.
        """
        return {"summary": summarise(runs, self.control, self.identity[0])}

    @abstractmethod
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The results for people: paragraphs and tables of Markdown, without `closing`."""

    def closing(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """How the results end: `ending` with what is known of flags, hardware and commits."""
        name = self.identity[0]
        facts = {
            "flags": names(f"{run[name]}: {flag}" for run in runs for flag in run.get("flags", ())),
            "devices": names(run.get("device", "cpu") for run in runs),
            "commits": names(run.get("commit", "")[:12] for run in runs),
            "commit": about["commit"][:12],
        }
        known = {"device": facts["devices"], **about, **facts}
        return [line.format(**known) for line in self.ending]

    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """Draw beside `path`; nothing where there is nothing to draw."""

    @classmethod
    def main(cls, config: ConfigT) -> None:
        """Run what is missing, then write the results; see `play`."""
        cls(config).play()

    def play(self) -> None:
        """Run what is missing, then write the results.

        Raises:
            InputError: settings that cannot work, found before any work; cells that failed.
        """
        config, made = self.config, list[Run]()
        if config.from_json:
            self.write_again()
            return
        self.check()
        cells = self.cells()
        if not cells:
            raise InputError("nothing to run: ask for one method at least")
        held = self.earlier()  # refuses before any work
        self.prepare(cells)
        about, asked = dict[str, Any](), 0
        for later in (False, True):
            todo = self.later_cells(self.earlier(made)) if later else cells
            if later and not todo:
                break
            asked += len(todo)
            if config.missing_only or not self.remembers:
                known = set(map(self.told_apart, held))
                todo = {name: one for name, one in todo.items() if self.key(name, one) not in known}
            for part in self.make(todo):
                made += part
                about = self.save(made) if made or held else {}
        if not made and not held:
            raise InputError(f"{self.root} holds no finished cell: leave --finished-only away")
        about = about or self.save(made)
        self.write(about)
        print(
            f"{len(made)} cells, {len(about[self.listed])} in all, {asked - len(made)} left out; "
            f"{self.path.with_suffix('.md')}"
        )

    def write_again(self) -> None:
        """Write the results of the JSON file, which may have been edited.

        Raises:
            InputError: it does not hold results of this study.
        """
        about = read_json(self.path)
        try:
            keys = Counter(map(self.told_apart, about[self.listed]))
            if twice := [key for key, count in keys.items() if count > 1]:
                raise InputError(
                    f"{self.path} has {' '.join(map(str, twice[0]))} twice: restore it"
                )
            self.write(about)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} holds no results of this study ({type(error).__name__}: {error}): "
                "restore it"
            ) from error

    def told_apart(self, run: Run) -> tuple[Any, ...]:
        """By what a run differs from the others; what an older one does not say is 0."""
        first, *others = self.identity
        return (run[first], *(run.get(part, 0) for part in others))

    def earlier(self, made: Runs = ()) -> list[Run]:
        """These runs, and those that the results file has besides, whose folders may be gone.

        Returns:
            the runs in the order of their seeds.

        Raises:
            InputError: the file's runs had other flags, or it is damaged.
        """
        kept: list[Run] = []
        if self.path.exists():
            file = read_json(self.path, "restore it, or choose another --out")
            if (had := file.get("extra", "")) != self.same():
                raise InputError(
                    f"{self.path} holds runs made with other flags, {had!r}, not "
                    f"{self.same()!r}: choose another --out"
                )
            for fact, value in self.facts().items():
                if (other := file.get(fact, value)) != value:
                    raise InputError(
                        f"{self.path} is about {fact} {other}, not {value}: choose another name"
                    )
            new = set(map(self.told_apart, made))
            try:
                kept = [run for run in file[self.listed] if self.told_apart(run) not in new]
            except (AttributeError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path} holds no runs: restore it, or choose another --out"
                ) from error
        return sorted([*kept, *made], key=lambda run: run.get("seed", 0))

    def save(self, made: Runs) -> dict[str, Any]:
        """Write the results file; gives what it holds."""
        runs = sorted(self.earlier(made), key=self.place)
        about = {
            **made_by(),
            "device": hardware(runs, self.config.jobs, self.config.threads),
            "extra": self.same(),
            **self.facts(),
            **self.found(runs),
            self.listed: runs,
        }
        write_atomically(self.path, json.dumps(about) + "\n")
        return about

    def write(self, about: Mapping[str, Any]) -> None:
        """Write table and pictures of a results file's content."""
        runs = about[self.listed]
        text = [*self.document(runs, about), *self.closing(runs, about)]
        write_atomically(self.path.with_suffix(".md"), "\n\n".join(text) + "\n")
        self.pictures(runs, about)


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


def hardware(runs: Runs, jobs: int, threads: int = 1) -> str:
    """What cells were made on, in words; those that note no ``device`` are older, of the CPU."""
    devices = names(run.get("device", "cpu") for run in runs)
    each = "a thread each" if threads == 1 else f"{threads} threads each"
    return f"{devices}; {jobs} process(es), {each}"


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

"""A study: cells that are run once, one results file, a table and pictures of what they found.

A study is a class of `scripts/studies/`. It says its cells, what it reads of a finished one, and
its table, the paper's own numbers among the columns. What all studies do is here: check every cell
before the first one, run or resume what is missing, keep what the results file holds, write JSON,
Markdown and pictures, or write the latter again from the JSON. A `Study` may measure in its own
process. Those whose cells are trainings are in `advgame.run.training_study`.
"""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run.cells import (
    Cell,
    note_flags,
    run_cells,
    same_flags,
    split_flags,
)
from advgame.run.engines import EngineConfig, check_engine, make_engine
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import made_by
from advgame.run.options import Count, Whole, check_types
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


ConfigT = TypeVar("ConfigT", bound=StudyConfig)


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
    unsaid: Mapping[str, Any] = {}
    """of `facts`: what a results file that does not say one is about; others are as asked for"""
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
                about = self.save(made) if made else {}
        if not made and not held:
            raise InputError(f"{self.root} holds no finished cell: leave --finished-only away")
        if not about:  # the file stays as it is: this command made none of its runs
            about = read_json(self.path)
            self.check_summary(about[self.listed], about)
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
            self.check_summary(about[self.listed], about)
            self.write(about)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} holds no results of this study ({type(error).__name__}: {error}): "
                "restore it"
            ) from error

    def check_summary(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """Refuse what `found` says of other runs than those that the file lists.

        A table of the runs would stand beside differences and pictures of others.

        Raises:
            InputError: of which method it is.
        """
        there = Counter(run.get(self.identity[0]) for run in runs)
        told = {
            name: one["seeds"]
            for name, one in about.get("summary", {}).items()
            if isinstance(one, Mapping) and isinstance(one.get("seeds"), int)
        }
        for name in dict.fromkeys((*there, *told)) if told else ():
            if there[name] != told.get(name, 0):
                raise InputError(
                    f"{self.path} lists {there[name]} runs of {name}, its summary is of "
                    f"{told.get(name, 0)}: restore it"
                )

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
                if (other := file.get(fact, self.unsaid.get(fact, value))) != value:
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


def hardware(runs: Runs, jobs: int, threads: int = 1) -> str:
    """What cells were made on, in words; those that note no ``device`` are older, of the CPU."""
    devices = names(run.get("device", "cpu") for run in runs)
    each = "a thread each" if threads == 1 else f"{threads} threads each"
    return f"{devices}; {jobs} process(es), {each}"

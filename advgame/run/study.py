"""A study: methods trained over seeds, a table and pictures of what they found.

A study is a class: its methods with their flags, what it reads from a finished run, its columns and
the paper's own numbers. What all of them do is here: check every cell before the first one, run or
resume what is missing, keep what the results file holds, write JSON, Markdown and pictures.
"""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from advgame.errors import InputError, unknown
from advgame.run.cells import (
    check_cells,
    hardware,
    run_cells,
    same_flags,
    split_flags,
    summarise,
    usable,
    with_earlier,
)
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import Metrics, made_by
from advgame.run.options import Names

Run = Mapping[str, Any]
Runs = Sequence[Run]


@dataclass(frozen=True)
class StudyConfig:
    """What every study can be asked."""

    dataset: str = "digits"
    """data set"""
    methods: tuple[str, ...] = ()
    """which methods"""
    attacks: Names = ()
    """attacks of the reports; the training script's own when empty"""
    seeds: int = 3
    """seeds 0, 1, … per method"""
    missing_only: bool = False
    """leave out what the results hold already, also where its folders are gone"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    from_json: bool = False
    """train and read nothing: write table and pictures again from the results file"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/study"
    """run folders, one per cell; not committed"""
    out: str = "results"
    """where the results go"""
    extra: str = ""
    """further flags of the training script for every cell, e.g. --extra="--epochs 5" """
    data_dir: str | None = None
    """data folder (all but digits)"""


ConfigT = TypeVar("ConfigT", bound=StudyConfig)


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


class Study(ABC, Generic[ConfigT]):
    """A table over seeds, of one training script.

    Args:
        config: what it is asked.
    """

    script: ModuleType
    """the training script, with ``parse``, ``check`` and ``idle``"""
    methods: Mapping[str, tuple[str, ...]]
    """name -> flags of the script; the table's rows are in this order"""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    @abstractmethod
    def stem(self) -> str:
        """Of the results' files, and of the folder of runs."""

    def same(self) -> str:
        """Flags that runs of one results file must share: attacks, and ``--extra``."""
        attacks = ["--attacks", *self.config.attacks] if self.config.attacks else []
        return shlex.join([*attacks, *split_flags(self.config.extra)])

    def shared(self) -> list[str]:
        """Flags of every cell."""
        folder = ["--data-dir", self.config.data_dir] if self.config.data_dir else []
        return ["--dataset", self.config.dataset, *folder, *split_flags(self.same())]

    def check(self) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            InputError: a method that there is not.
        """
        if odd := [name for name in self.config.methods if name not in self.methods]:
            raise unknown("method", odd[0], self.methods)

    def cells(self) -> dict[str, list[str]]:
        """Folder -> flags of every cell."""
        shared, asked = self.shared(), self.config.methods
        used = {name: usable(shared, self.methods[name], self.script) for name in asked}
        return {
            f"{name}-seed{seed}": [*used[name], "--seed", str(seed), *self.methods[name]]
            for seed in range(self.config.seeds)
            for name in asked
        }

    def row(self, cell: str) -> tuple[str, int]:
        """The ``method`` and ``seed`` that `read` will find in a cell of this name."""
        method, seed = cell.rsplit("-seed", 1)
        return method, int(seed)

    def later_cells(self, runs: Runs) -> dict[str, list[str]]:
        """Cells whose flags depend on what the others found."""
        return {}

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found, with a ``method`` and a ``seed``."""

    def place(self, run: Run) -> Any:
        """Where a run stands in the table."""
        return list(self.methods).index(run["method"])

    def found(self, runs: Runs) -> dict[str, Any]:
        """What the results file holds beside the runs."""
        return {"summary": summarise(runs)}

    @abstractmethod
    def markdown(self, runs: Runs, about: Mapping[str, Any]) -> str:
        """The results for people."""

    def pictures(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        """Draw into ``path`` with another suffix; none where there is nothing to draw."""

    def main(self) -> None:
        """Train what is missing, then write the results.

        Raises:
            InputError: settings that cannot work, found before any training; cells that failed.
        """
        config, path = self.config, Path(self.config.out) / f"{self.stem}.json"
        root = Path(config.runs_dir) / self.stem
        self.check()
        if config.from_json:
            about = read_json(path)
            self._write(about["runs"], about, path)
            return
        todo = self.cells()
        check_cells(self.script, todo, config.jobs)
        held = with_earlier([], path, self.same())  # refuses before any training
        known = {(r["method"], r["seed"]) for r in held} if config.missing_only else set()
        same_flags(root, self.same())
        made = self._run(todo, root, known)
        later = self.later_cells(with_earlier(made, path, self.same()))
        made += self._run(later, root, known)
        if not (made or held):
            raise InputError(f"{root} holds no finished cell: leave --finished-only away")
        runs = sorted(with_earlier(made, path, self.same()), key=self.place)
        device = hardware(runs, config.jobs)
        about = {**made_by(), "device": device, "extra": self.same(), **self.found(runs)}
        write_atomically(path, json.dumps({**about, "runs": runs}) + "\n")
        self._write(runs, about, path)
        lacking = len(todo) + len(later) - len(made)
        table = path.with_suffix(".md")
        print(f"{len(made)} cells, {len(runs)} in all, {lacking} left out; {table}")

    def _run(
        self, cells: Mapping[str, Sequence[str]], root: Path, known: set[tuple[str, int]]
    ) -> list[dict[str, Any]]:
        """Train the cells that are not known, and read them."""
        todo = {name: flags for name, flags in cells.items() if self.row(name) not in known}
        if self.config.finished_only:
            todo = {name: todo[name] for name in todo if (root / name / "report.json").exists()}
        elif todo:
            run_cells(Path(str(self.script.__file__)), root, todo, self.config.jobs)
        return [self.read(root / name) for name in todo]

    def _write(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        write_atomically(path.with_suffix(".md"), self.markdown(runs, about))
        self.pictures(runs, about, path)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def provenance_lines(runs: Runs, about: Mapping[str, Any]) -> list[str]:
    """How a table ends: flags raised, hardware, commits, command."""
    flags = ", ".join(sorted({f"{run['method']}: {flag}" for run in runs for flag in run["flags"]}))
    made = ", ".join(sorted({run["commit"][:12] for run in runs}))
    return [
        *("", f"Flags raised: {flags or 'none'}.", ""),
        *(f"Hardware: {about['device']}. Cells made at commit {made}.", ""),
        *(f"Command: `{about['command']}`.", ""),
    ]

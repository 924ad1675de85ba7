"""Do all engines give the same numbers, and what does a cell cost besides?

    python scripts/study.py engines                       # five minutes on two idle cores
    python scripts/study.py engines --cells 2 --engines local,slurm --out runs/results

The same tiny trainings, by processes alone (`bare`: nothing but the commands, so many at a time)
and by each engine: `local`, a Ray cluster that begins on this machine, and SLURM as submitit's
local executor plays it. The weights must be equal to the byte. What an engine takes is the
difference to `bare`: once, to begin, and per cell.

Writes `<out>/engines.json` and `.md`. It needs an idle machine: contestants come one after the
other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import train
from typing_extensions import override

from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import Cell, Engine, check_cells, run_cells
from advgame.run.engines import ENGINES, Local, Ray, Slurm, check_package
from advgame.run.files import digest
from advgame.run.folder import cpu_name
from advgame.run.options import Count, Names
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs

BARE = "bare"
FLAGS = (
    "--game pgd-at --train-n 100 --epochs 1 --batch-size 50 --attacks fgsm --eval-n 20 "
    "--accelerator cpu"
)


@dataclass(frozen=True)
class Config(StudyConfig):
    """Run the same cells by every engine."""

    engines: Names = ENGINES
    """which, beside the bare commands"""
    cells: Count = 12
    """tiny trainings, a seed each"""
    at_once: Count = 2
    """cells at a time"""
    seeds: Count = 1
    """how often everything is run"""
    jobs: Count = 1
    runs_dir: str = "runs/engines"
    out: str = "results/cluster"


class Engines(Study[Config]):
    """A run is all cells by one engine, once."""

    about, files = "The same cells by each engine", "engines"
    ending = ("Commit {commit}. Command: `{command}`.",)
    parallel = remembers = False

    @override
    def check(self) -> None:
        super().check()
        if odd := [name for name in self.config.engines if name not in ENGINES]:
            raise unknown("engine", odd[0], ENGINES)
        for name in self.config.engines:
            check_package(name)

    def cells(self) -> dict[str, dict[str, Any]]:
        """All cells by the bare commands and by each engine, so often as asked."""
        return {
            f"{name}-{number}": {"method": name, "seed": number}
            for number in self.seeds()
            for name in (BARE, *self.config.engines)
        }

    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse folders that are there: a cell that was finished before takes no time."""
        check_cells(train, {"a cell": FLAGS.split()})
        for name in cells:
            if (self.root / name).exists():
                raise InputError(f"{self.root / name} is there: delete it, or choose --runs-dir")

    @override
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        for name, cell in cells.items() if not self.config.finished_only else ():
            yield [{**cell, **self.measured(cell["method"], self.root / name)}]

    def measured(self, engine: str, root: Path) -> dict[str, Any]:
        """Seconds until the first cell and until the last has ended, and the weights' checksums."""
        script = Path(str(train.__file__))
        todo = [
            Cell(script, root / f"cell{n}", [*FLAGS.split(), "--seed", str(n)])
            for n in range(self.config.cells)
        ]
        began, begun = time.perf_counter(), list[float]()
        run_cells(
            todo,
            make(engine, self.config),
            self.config.at_once,
            lambda: begun.append(time.perf_counter()),
        )
        ended = time.perf_counter()
        weights = [cell.folder / "checkpoints" / "last.safetensors" for cell in todo]
        return {
            "start": round(begun[0] - began, 3),
            "seconds": round(ended - begun[0], 3),
            "cells": len(todo),
            "weights": [digest(path)[:16] for path in weights],
        }

    def facts(self) -> dict[str, Any]:
        """How many cells, and what this machine is."""
        config = self.config
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "at_once": config.at_once}
        return {**machine, "cells": config.cells}

    @override
    def place(self, run: Run) -> Any:
        return (BARE, *ENGINES).index(run["method"])

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """A line per engine: beginning, all cells, and what a cell takes more than bare."""
        together: dict[str, list[Run]] = {}
        for run in runs:
            together.setdefault(run["method"], []).append(run)
        bare = mean(run["seconds"] for run in together[BARE])
        rounds, lines = -(-about["cells"] // about["at_once"]), []
        for name, mine in together.items():
            seconds = mean(run["seconds"] for run in mine)
            more = f"{(seconds - bare) / rounds:+.2f}" if name != BARE else ""
            start = mean(run["start"] for run in mine)
            lines.append([name, str(len(mine)), f"{start:.2f}", f"{seconds:.1f}", more])
        equal = len({tuple(run["weights"]) for run in runs}) == 1
        head = ["engine", "runs", "to begin, s", "all cells, s", "more than bare, s per cell"]
        return [
            f"# {self.title}",
            f"{about['cells']} trainings of a thread, {about['at_once']} at a time; "
            f"{about['cpu']}, {about['cores']} cores. Ray's cluster is this machine, SLURM is "
            "submitit's local executor.",
            f"The weights of each cell are {'equal to the byte' if equal else 'NOT EQUAL'} by all.",
            table.markdown(head, lines),
        ]


class Bare:
    """The commands of the cells, and nothing around them."""

    def start(self, roots: Sequence[Path]) -> None:
        """Commands need nothing that is not there."""

    def run(self, cell: Cell) -> None:
        """Run the command, to its end."""
        words = [sys.executable, os.path.relpath(cell.script), *cell.words(Path())]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(words, env=env, check=False, capture_output=True).returncode:
            raise InputError(f"{cell.folder.name} failed")

    def stop(self) -> None:
        """They end by themselves: Ctrl-C reaches their group, too."""

    def close(self) -> None:
        """Commands leave nothing but their folders behind."""


def make(name: str, config: Config) -> Engine:
    """An engine on this machine, by name."""
    if name == BARE:
        return Bare()
    if name == "ray":
        os.environ.setdefault("RAY_worker_niceness", "0")  # else any other work delays its cells
        return Ray("", 0, 1)
    if name == "slurm":
        return Slurm({"timeout_min": 60}, cluster="local")
    return Local([None] * config.at_once)


main = Engines.main

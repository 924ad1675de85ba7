"""Workers: processes that share the work of one job by a folder of claims, started by an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from advgame.errors import InputError
from advgame.run.cells import Worker, run_cells
from advgame.run.engines import EngineConfig, check_engine, make_engine
from advgame.run.options import Whole, refuse_idle

ENGINE = tuple(field.name for field in fields(EngineConfig) if field.name != "jobs")
"""options of how workers are run"""


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(EngineConfig):
    """How many processes share the work, and what runs them."""

    jobs: Whole = 0
    """processes that share the work, started by --engine; with 0 this one does it"""
    threads: Whole = 0
    """CPU threads of a worker; with 0 local ones share those of this process, others have 1"""

    unkept: ClassVar[tuple[str, ...]] = ("jobs", *ENGINE)
    """what is found does not depend on these: `advgame.run.job.kept` leaves them out"""


def check_workers(config: WorkersConfig, what: str) -> None:
    """Refuse an engine that cannot run, or that has nothing to run.

    Args:
        config: all settings of a job.
        what: the job, in words.

    Raises:
        InputError: what is wrong.
    """
    if config.jobs:
        check_engine(config)
        return
    refuse_idle(config, type(config)(), {f"{what} in one process (no --jobs)": ENGINE})


def run_workers(
    config: WorkersConfig, script: Path, folder: Path, words: Sequence[str], again: str
) -> None:
    """Have processes share the work, by the engine that is asked for, until all of it is done.

    Args:
        config: which `check_workers` has passed; without ``jobs`` nothing is done.
        script: what a worker runs.
        folder: of the work, which is there and has the claims.
        words: of a worker's command line.
        again: the options that go on with the folder.

    Raises:
        InputError: a worker failed, its last words; the others have done what was left.
    """
    if not config.jobs:
        return
    workers = [Worker(script, folder / f"worker{n}", words) for n in range(config.jobs)]
    engine = make_engine(replace(config, threads=threads_of(config)))
    try:
        run_cells(workers, engine, config.jobs)
    except InputError as problem:
        raise InputError(f"{problem}; {again} goes on") from problem


def threads_of(config: WorkersConfig) -> int:
    """The CPU threads of a worker: those asked for, or an equal part of this process's.

    A worker's attacks run in as many threads as it has (`advgame.attacks.shards`), so that the
    workers of one machine have no more of them than one process.
    """
    if config.threads or config.engine != "local":
        return config.threads or 1
    import torch

    return max(1, torch.get_num_threads() // config.jobs)

"""What runs a study's cells: processes here, tasks of a Ray cluster, jobs of SLURM.

Same cells, same numbers from all three: a cell is one command, with its own number of threads, and
its folder is all that is left of it. The clusters are Ray's and SLURM's business (submitit gives
SLURM its jobs); nothing here schedules machines.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import queue
import secrets
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advgame.errors import InputError, unknown
from advgame.run.accelerators import cuda_devices
from advgame.run.cells import Cell, Engine, run_cell, signals_passed_on, stop_children
from advgame.run.files import write_atomically
from advgame.run.options import Count
from advgame.run.program import STARTED_BY

ENGINES = ("local", "ray", "slurm")
_OWN = {
    "ray": ("ray_address",),
    "slurm": ("slurm_partition", "slurm_minutes", "slurm_more"),
}
_PACKAGES = {"ray": "ray", "slurm": "submitit"}
_RETRIES = 5  # of a cell whose machine was lost
_TIMES = 1000  # that a job may reach its time limit; submitit's own 3 end a long cell


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs the cells, and how many of them."""

    jobs: Count = 2
    """cells at a time, each a process"""
    threads: Count = 1
    """of a cell; numbers may depend on it"""
    engine: str = "local"
    """what runs the cells: local, ray or slurm (docs/cluster.md)"""
    gpus_per_cell: float | None = None
    """GPUs of a cell, or a share such as 0.5; None is one where there are any (slurm: none)"""
    ray_address: str = ""
    """of a Ray cluster, auto or HOST:PORT; empty begins one on this machine"""
    slurm_partition: str = ""
    """that jobs are submitted to"""
    slurm_minutes: Count = 1440
    """after which a job is submitted again"""
    slurm_more: str = ""
    """further options of sbatch, e.g. --slurm-more="account=me constraint=h100" """


def check_engine(config: EngineConfig) -> None:
    """Refuse an engine that cannot run, before any work.

    Raises:
        InputError: no such engine, its package is not installed, options of another one, or GPUs
            that are not there.
    """
    if config.engine not in ENGINES:
        raise unknown("engine", config.engine, ENGINES)
    usual = type(config)
    for engine, names in _OWN.items():
        for name in names:
            if engine != config.engine and getattr(config, name) != getattr(usual, name):
                raise InputError(f"--{name.replace('_', '-')} is for --engine {engine}")
    check_package(config.engine)
    asked = config.gpus_per_cell
    if asked is not None and (asked < 0 or (asked > 1 and asked != int(asked))):
        raise InputError(f"--gpus-per-cell is a share, such as 0.5, or a whole number, not {asked}")
    if config.engine == "local":
        gpu_slots(visible_gpus(), asked, config.jobs)
    if config.engine == "slurm":
        if asked is not None and asked != int(asked):
            raise InputError("--engine slurm gives whole GPUs only: --gpus-per-cell 1, or 0")
        if shutil.which("sbatch") is None:
            raise InputError("--engine slurm: there is no sbatch here, start it on a login node")
        extra_settings(config.slurm_more)


def check_package(engine: str) -> None:
    """Refuse an engine whose package is not installed.

    Raises:
        InputError: what to install.
    """
    if (package := _PACKAGES.get(engine)) is not None:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"--engine {engine} needs {package}: pip install 'advgame[{engine}]' "
                f"(in a clone: pip install -e '.[{engine}]')"
            ) from error


def make_engine(config: EngineConfig) -> Engine:
    """The engine that cells are run by, not yet started.

    Args:
        config: which `check_engine` has passed.
    """
    if config.engine == "ray":
        return Ray(config.ray_address, config.gpus_per_cell, config.threads)
    if config.engine == "slurm":
        return Slurm(
            {
                "timeout_min": config.slurm_minutes,
                "slurm_partition": config.slurm_partition or None,
                "slurm_additional_parameters": extra_settings(config.slurm_more),
                "gpus_per_node": int(config.gpus_per_cell or 0),
            },
            config.threads,
        )
    return Local(gpu_slots(visible_gpus(), config.gpus_per_cell, config.jobs), config.threads)


def extra_settings(text: str) -> dict[str, str]:
    """What ``--slurm-more`` says: ``account=me constraint=h100``, as sbatch's long options.

    Raises:
        InputError: a word that is no NAME=VALUE.
    """
    words = text.split()
    if odd := [word for word in words if "=" not in word]:
        raise InputError(f"--slurm-more takes NAME=VALUE, as account=me, not {odd[0]!r}")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    there = cuda_devices()
    return named[:there] or [str(number) for number in range(there)]


def gpu_slots(gpus: Sequence[str], per_cell: float | None, jobs: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of the cells that run at a time; None leaves it.

    Args:
        gpus: those that are there.
        per_cell: how many a cell has, or what share of one; None shares them out one by one, and
            more than one cell has the same where there are more cells than GPUs.
        jobs: cells at a time.

    Raises:
        InputError: more are asked for than there are.
    """
    if per_cell is None:
        return [gpus[number % len(gpus)] if gpus else None for number in range(jobs)]
    if per_cell <= 0:
        return [""] * jobs
    whole = max(1, int(per_cell))
    groups = [",".join(gpus[k : k + whole]) for k in range(0, len(gpus) - whole + 1, whole)]
    slots = [group for _ in range(max(1, int(1 / per_cell + 1e-9))) for group in groups]
    if len(slots) < jobs:
        raise InputError(
            f"--jobs {jobs} with --gpus-per-cell {per_cell:g}: this machine has {len(gpus)} GPU(s) "
            f"that can be used, enough for {len(slots)} cell(s) at a time"
        )
    return [*slots[:jobs]]


class Local:
    """Processes on this machine, each with its own GPU where there are any.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each of the cells that run at a time.
        threads: of a cell.
    """

    def __init__(self, slots: Sequence[str | None], threads: int = 1) -> None:
        self._threads = threads
        self._slots: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for slot in slots:
            self._slots.put(slot)

    def start(self, roots: Sequence[Path]) -> None:
        """Processes need nothing that is not there."""

    def run(self, cell: Cell) -> None:
        """Run a cell in a process, on GPUs that no other cell of this study has."""
        slot = self._slots.get()
        try:
            gpus = {} if slot is None else {"CUDA_VISIBLE_DEVICES": slot}
            run_cell(cell, {**_threads(self._threads), **gpus})
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Ask the processes to write a checkpoint and end."""
        stop_children()

    def close(self) -> None:
        """Processes have left nothing but their folders."""


@dataclass(frozen=True)
class Place:
    """What a cell on another machine must find there.

    Args:
        cwd: the study's folder, where relative paths begin.
        env: of the environment of its process.
        tokens: files that the study has written -> what is in them.
    """

    cwd: Path
    env: Mapping[str, str]
    tokens: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def here(cls, roots: Sequence[Path], threads: int) -> Place:
        """This study's, with a token in each of its folders; `clear` removes them."""
        tokens = {root.absolute() / f".token-{secrets.token_hex(4)}": "" for root in roots}
        for path in tokens:
            tokens[path] = secrets.token_hex(8)
            write_atomically(path, tokens[path])
        kept = {name: os.environ[name] for name in ("PYTHONPATH", STARTED_BY) if name in os.environ}
        return cls(Path.cwd(), {**kept, **_threads(threads)}, tokens)

    def missing(self) -> str:
        """What this machine does not see, in words; "" where it sees all."""
        for path, content in self.tokens.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != content:
                return (
                    f"{socket.gethostname()} does not see {path.parent} as the study does: "
                    "--runs-dir must lie on storage that all machines share, under the same path"
                )
        if not self.cwd.is_dir():
            return f"{socket.gethostname()} does not see {self.cwd}, where the study was started"
        return ""

    def run(self, cell: Cell) -> str:
        """Run a cell on this machine; returns what went wrong, in words."""
        try:
            if not (problem := self.missing()):
                run_cell(cell, self.env, self.cwd)
        except InputError as error:
            problem = str(error)
        return problem

    def clear(self) -> None:
        """Remove the tokens, which no cell looks for any more."""
        for path in self.tokens:
            path.unlink(missing_ok=True)


class Ray:
    """Tasks of a Ray cluster; one whose machine is lost is run again, and goes on from its folder.

    Args:
        address: of the cluster, ``auto`` or HOST:PORT; "" begins one on this machine.
        gpus: of a cell, or what share of one; None is one where the cluster has any.
        threads: of a cell.
    """

    def __init__(self, address: str, gpus: float | None, threads: int) -> None:
        self._address, self._gpus, self._threads = address, gpus, threads
        self._refs: set[Any] = set()

    def start(self, roots: Sequence[Path]) -> None:
        """Connect, and ask every machine whether it sees the folders.

        Raises:
            InputError: nothing answers at the address, no machine has so many CPUs or GPUs, or one
                does not see the folders.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        _check_address(self._address)
        how: dict[str, Any] = {"include_dashboard": False} if not self._address else {}
        try:
            ray.init(address=self._address or "local", logging_level=logging.ERROR, **how)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise InputError(
                f"--ray-address {self._address}: {str(error).splitlines()[0]}"
            ) from error
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        most = max((node["Resources"].get("CPU", 0.0) for node in nodes), default=0.0)
        if self._threads > most:  # Ray would wait for such a machine for ever
            raise InputError(
                f"--threads {self._threads}: the machines of the cluster have {most:g} CPUs at most"
            )
        most = max((node["Resources"].get("GPU", 0.0) for node in nodes), default=0.0)
        gpus = min(most, 1.0) if self._gpus is None else self._gpus
        if gpus > most:
            raise InputError(
                f"--gpus-per-cell {gpus:g}: the machines of the cluster have {most:g} at most"
            )
        self._place = Place.here(roots, self._threads)
        needs: Any = {"num_cpus": self._threads, "num_gpus": gpus, "max_retries": _RETRIES}
        self._task = ray.remote(**needs)(Place.run)
        look = ray.remote(num_cpus=0)(Place.missing)
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        asked = [look.options(scheduling_strategy=one) for one in there]
        try:
            said = ray.get([one.remote(self._place) for one in asked], timeout=120)
        except ray.exceptions.RayError as error:
            raise InputError(f"a machine of the cluster cannot run advgame: {error}") from error
        if problem := next(filter(None, said), ""):
            raise InputError(problem)

    def run(self, cell: Cell) -> None:
        """Run a cell as a task, on whatever machine has room."""
        import ray

        ref = self._task.options(name=cell.folder.name).remote(self._place, cell)
        self._refs.add(ref)
        try:
            problem = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise InputError(f"{cell.folder.name} was lost: {_line(error)}") from error
        finally:
            self._refs.discard(ref)
        if problem:
            raise InputError(problem)

    def stop(self) -> None:
        """Ask the tasks to end, as by Ctrl-C."""
        import ray

        for ref in tuple(self._refs):
            ray.cancel(ref)

    def close(self) -> None:
        """Leave the cluster; one that was begun here ends."""
        import ray

        if hasattr(self, "_place"):
            self._place.clear()
        ray.shutdown()


class Slurm:
    """Jobs of SLURM, each a cell, which submitit submits.

    Args:
        settings: of submitit's executor.
        threads: of a cell.
        cluster: ``slurm``; submitit's ``local`` and ``debug`` need none, for tests.
    """

    def __init__(
        self, settings: Mapping[str, Any], threads: int = 1, cluster: str = "slurm"
    ) -> None:
        self._settings, self._threads, self._cluster = settings, threads, cluster
        self._one_at_a_time, self._jobs = threading.Lock(), set[Any]()

    def start(self, roots: Sequence[Path]) -> None:
        """Make the folder ``slurm`` for the jobs' logs, beside the runs."""
        import submitit

        self._place = Place.here(roots, self._threads)
        folder = roots[0].absolute() / "slurm"
        self._executor = submitit.AutoExecutor(
            folder, cluster=self._cluster, slurm_max_num_timeout=_TIMES
        )
        self._executor.update_parameters(
            name="advgame", cpus_per_task=self._threads, **self._settings
        )

    def run(self, cell: Cell) -> None:
        """Run a cell as a job, and wait for it."""
        with self._one_at_a_time:
            try:
                job = self._executor.submit(_Requeued(self._place, cell))
            except Exception as error:  # sbatch says no: another partition, too many jobs
                raise InputError(f"{cell.folder.name} was not submitted: {_line(error)}") from error
            self._jobs.add(job)
        try:
            problem = job.result()
        except Exception as error:  # submitit raises kinds of its own for jobs that are lost
            raise InputError(
                f"{cell.folder.name} was lost, job {job.job_id}: {_line(error)}"
            ) from error
        finally:
            self._jobs.discard(job)
        if problem:
            raise InputError(problem)

    def stop(self) -> None:
        """Cancel the jobs; SLURM asks them to end, and they their cells."""
        for job in tuple(self._jobs):
            job.cancel()

    def close(self) -> None:
        """Nothing is left behind but the logs."""
        if hasattr(self, "_place"):
            self._place.clear()


@dataclass(frozen=True)
class _Requeued:
    """A cell as submitit calls it: at its time limit, or preempted, it is submitted again."""

    place: Place
    cell: Cell

    def __call__(self) -> str:
        # where a job is cancelled SLURM may ask this process alone, and submitit makes light of it
        with signals_passed_on():
            return self.place.run(self.cell)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@functools.cache
def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count)}


def _line(error: Exception) -> str:
    """The last line of what an engine says, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check_address(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself would try for minutes.

    Raises:
        InputError: what was tried.
    """
    if address in ("", "auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        raise InputError(f"--ray-address is auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray-address {address}: nothing answers there ({error})") from error

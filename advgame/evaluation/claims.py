"""Work that any number of processes share, wherever they run: each task is taken by one of them.

The processes see one folder, and nothing else of each other: no launcher, no collective, no
barrier. A task is taken by making a claim, a file that only one process can make. It names its
worker, and the worker has a file, too, which it holds locked and touches every `BEAT` seconds. A
worker is dead if its file is not locked any more, which those on its machine see at once, or if its
file did not change for `LEASE` seconds, which the others see. No clocks are compared: each observer
waits by its own. Whoever finds a task claimed by the dead makes the task's next claim, which
again only one process can.

A worker that was only slow may end a task that another has taken over. So tasks must come out
equal whoever works on them, and be written whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

BEAT, LEASE, POLL = 10.0, 120.0, 0.5
"""Seconds between two signs of life, without one until a worker counts as dead, between looks."""


@dataclass(frozen=True)
class Task:
    """A part of the work, which may wait for others.

    Args:
        name: of a file.
        done: whether it is finished, by whomever.
        work: finishes it.
        ready: whether what it depends on is finished.
    """

    name: str
    done: Callable[[], bool]
    work: Callable[[], object]
    ready: Callable[[], bool] = lambda: True


def share(
    tasks: Sequence[Task], folder: Path | None, tell: Callable[[str], None] = lambda line: None
) -> None:
    """Work on what no other process works on, until every task is done.

    Args:
        tasks: in an order in which one process alone can work on them.
        folder: where the processes meet; None is one process.
        tell: told when there is nothing left to take.
    """
    if folder is None:
        for task in tasks:
            task.work()
        return
    left, waits = list(tasks), False
    with Claims(folder / ".claims") as claims:
        while left := [task for task in left if not task.done()]:
            if waits:
                time.sleep(POLL)
            waits, before = True, waits
            for task in left:
                if task.ready():
                    with claims.taken(task.name) as mine:
                        if mine and not task.done():  # its last worker may have ended just now
                            task.work()
                            waits = False
            if waits and not before:
                tell(f"{len(left)} task(s) left, which other processes work on")
        claims.forget(task.name for task in tasks)


class Claims:
    """What this process works on, and who else works on what; a context.

    Args:
        folder: of all claims, made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._workers = folder, folder / "workers"
        self._me = f"{_machine()}.{secrets.token_hex(8)}"
        self._lock = FileLock(self._workers / self._me)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._seen: dict[str, tuple[int, float]] = {}  # worker -> last sign of life, since when

    def __enter__(self) -> Self:
        self._workers.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(timeout=0)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        self._lock.release()
        (self._workers / self._me).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a file system that is away for a while
                os.utime(self._workers / self._me)

    @contextmanager
    def taken(self, name: str) -> Iterator[bool]:
        """Whether a task is this process's own within the block."""
        made = self._made(name)
        number = max(made, default=-1)
        if made and self._alive(made[number]):
            yield False
            return
        try:
            with self._path(name, number + 1).open("x", encoding="utf-8") as file:
                file.write(self._me)
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            for other in range(number + 2):
                self._path(name, other).unlink(missing_ok=True)

    def forget(self, names: Iterable[str]) -> None:
        """Remove what was left of tasks that are done, by a worker killed just after them."""
        done = set(names)
        for path in self.folder.iterdir():
            if path.name.rpartition(".")[0] in done:
                path.unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _made(self, name: str) -> dict[int, str]:
        """Number of each claim of a task -> its worker."""
        found: dict[int, str] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                of, _, number = entry.name.rpartition(".")
                if of == name and number.isdecimal():
                    with suppress(OSError):  # its worker has just ended
                        text = Path(entry.path).read_text(encoding="utf-8")
                        found[int(number)] = text or entry.name  # killed before it said its name
        return found

    def _alive(self, worker: str) -> bool:
        path = self._workers / worker
        if worker.rpartition(".")[0] == _machine():
            if path.exists() and not _free(path):
                return True
            path.unlink(missing_ok=True)
            return False
        try:
            with path.open("rb") as file:  # a network's file system looks again on opening
                beat = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            beat = 0
        now = time.monotonic()
        last, since = self._seen.get(worker, (-1, now))
        if beat != last:
            self._seen[worker] = beat, now
            return True
        return now - since < LEASE


def _free(path: Path) -> bool:
    """Whether nobody holds a lock, of those on this machine."""
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False


def _machine() -> str:
    """This machine's name, since it was started: names alone may come twice in a cluster."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    told = boot.read_text(encoding="utf-8")[:8] if boot.exists() else ""
    return f"{socket.gethostname()}-{told}"

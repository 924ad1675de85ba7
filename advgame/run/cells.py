"""A study's cells: runs of scripts, a process each, kept when finished."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from typing_extensions import override

from advgame.errors import InputError
from advgame.own_code import is_own_code
from advgame.run.files import write_atomically
from advgame.run.interrupt import hangup
from advgame.run.job import kept, resume_settings
from advgame.run.options import split_names


@dataclass(frozen=True)
class Cell:
    """A run of a script into a folder, which goes on where it stopped.

    Args:
        script: takes ``--runs-dir``, ``--name`` and ``--resume``; ends by writing report.json.
        folder: of the run.
        flags: of a new run; one that is resumed has its own, and is given `options_again`.
        after: folders of the runs that it makes use of.
    """

    script: Path
    folder: Path
    flags: Sequence[str]
    after: Sequence[Path] = ()

    @property
    def finished(self) -> bool:
        """Whether its run has ended, so that it is left alone."""
        return self.ended(Path())

    @property
    def ready(self) -> bool:
        """Whether what it makes use of is finished."""
        return all(map(_finished, self.after))

    def ended(self, cwd: Path) -> bool:
        """`finished`, seen from the folder that its paths begin in."""
        return _finished(cwd / self.folder)

    def words(self, cwd: Path) -> list[str]:
        """Of its command line, after the script: those of a new run, or of one that goes on."""
        if (cwd / self.folder / "config.json").exists():
            return ["--resume", str(self.folder), *options_again(self.flags)]
        where = ["--runs-dir", str(self.folder.parent), "--name", self.folder.name]
        return [*self.flags, *where]


@dataclass(frozen=True)
class Worker(Cell):
    """One of several processes of one command, which share its work by a folder of claims.

    Args:
        folder: a name for it, in the folder that all of them see.
        flags: all words of the command.
    """

    @override
    def ended(self, cwd: Path) -> bool:
        return False  # it looks itself for what is left to do

    @override
    def words(self, cwd: Path) -> list[str]:
        return [*self.flags]


def _finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


class Engine(Protocol):
    """What runs cells, here or elsewhere: `advgame.run.engines` has those that there are."""

    def start(self, roots: Sequence[Path]) -> None:
        """Get ready, before the first cell.

        Args:
            roots: the folders that the cells' folders lie in.

        Raises:
            InputError: what it needs is not there.
        """
        ...

    def run(self, cell: Cell) -> None:
        """Run or resume a cell to its end; called in several threads at a time.

        Raises:
            InputError: it failed; its last words.
        """
        ...

    def stop(self) -> None:
        """Ask the cells under way to end, so that they can be resumed."""
        ...

    def close(self) -> None:
        """Leave nothing behind, once no cell is under way."""
        ...


def run_cell(cell: Cell, env: Mapping[str, str], cwd: Path | None = None) -> None:
    """Run or resume a cell in a process on this machine, which ends with the process that asks.

    Args:
        cell: to be run; a finished one is left alone.
        env: of its environment what differs from this process's.
        cwd: where its paths begin; None is the current folder.

    Raises:
        InputError: the script failed; its last words.
    """
    if cell.ended(cwd or Path()):
        return
    words = [sys.executable, os.path.relpath(cell.script, cwd)]  # the run notes its command
    words += cell.words(cwd or Path())
    how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    # a session of its own: Ctrl-C reaches the study alone, which passes it on once; a second signal
    # would kill a cell while it writes its checkpoint
    how |= {"start_new_session": True, "preexec_fn": _end_with(os.getpid())}
    with subprocess.Popen(words, env={**os.environ, **env}, **how) as child:
        _CHILDREN.add(child)
        try:
            stderr = _last_words(child)
        except BaseException:
            child.terminate()
            raise
        finally:
            _CHILDREN.discard(child)
    if child.returncode:
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        said = errors[-1].removeprefix("error: ") if errors else stderr[-500:]
        if child.returncode == -signal.SIGKILL:  # nothing that it said is of its end
            said = "none, it was killed, as the system does where memory is full"
        raise InputError(f"{cell.folder.name} failed, its last words: {said}")


def _last_words(child: subprocess.Popen[str]) -> str:
    """What a process says on stderr until its end; looks up every second, as for Ctrl-C by Ray."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=1)[1]


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child calls first, so that it is killed where its parent is; Linux alone can do it.

    More exactly, where the thread is that has started it, and which waits for it.
    It would hold its folder's lock else, and whoever takes the cell over would be refused.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:
        return None

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the question
            os._exit(1)

    return ask


_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def options_again(flags: Sequence[str]) -> list[str]:
    """The options among flags that a resumed run is given, too.

    They are those whose values name code, which it wants typed again, and where its data lie now.
    """
    pairs = [flag.split("=", 1) if flag.startswith("--") else [flag] for flag in flags]
    words = [word for pair in pairs for word in pair]
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    options = [words[start:end] for start, end in pairwise([*starts, len(words)])]
    return [
        word
        for option in options
        if option_of(option[0]) == "data_dir"
        or any(is_own_code(name) for value in option[1:] for name in split_names(value))
        for word in option
    ]


def split_flags(text: str) -> list[str]:
    """The words of ``--extra``.

    Raises:
        InputError: a quotation that does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"these flags cannot be read, {text!r}: {error}") from error


_ELSEWHERE = ("accelerator", "data_dir", "download", "name", "resume", "runs_dir")
"""settings that may be others where a finished cell is taken for the one that is asked for"""


def check_cells(script: Any, cells: Mapping[str, Sequence[str]], root: Path | None = None) -> None:
    """Refuse cells that cannot run, before the first one.

    Args:
        script: the module of their script, whose ``job`` is an `advgame.run.job.Job`.
        cells: name of the folder -> flags.
        root: where their folders go, if one that is there must have the settings of its cell, but
            for where it was made and its data lay.

    Raises:
        InputError: what the script would say, and of which cell.
    """
    for name, flags in cells.items():
        try:
            asked = script.job.check(script.job.parse(flags))
            if root is not None and (root / name).exists():
                same = [setting for setting in kept(asked) if setting not in _ELSEWHERE]
                resume_settings(root / name, asked, same)
        except InputError as problem:
            raise InputError(f"{name}: {problem}") from problem


def run_cells(
    cells: Sequence[Cell],
    engine: Engine,
    jobs: int,
    begun: Callable[[], object] = lambda: None,
) -> None:
    """Run, resume or skip every cell, ``jobs`` at a time; prints what is done.

    Whenever there is room the first cell begins whose ``after`` is finished, whatever its script.

    Args:
        cells: of any scripts; those that make use of others come after them.
        engine: what runs them.
        jobs: cells at a time.
        begun: called once the engine is there, before the first cell.

    Raises:
        InputError: the engine is not there, or cells failed. After the first that fails no further
            cell begins; it is told at once.
        SystemExit: SIGTERM or SIGHUP; as with Ctrl-C, cells under way are asked to stop and can be
            resumed.
    """
    waiting = [cell for cell in cells if not cell.finished]
    if not waiting:
        return
    roots = sorted({cell.folder.parent for cell in waiting})
    console, failed = Console(stderr=True), list[str]()
    number = len(cells) - len(waiting)
    under_way: dict[Future[None], Cell] = {}
    try:
        engine.start(roots)
        begun()
        with ThreadPoolExecutor(jobs) as pool, _terminated_with_us():
            try:
                while waiting or under_way:
                    for cell in [one for one in waiting if one.ready][: jobs - len(under_way)]:
                        waiting.remove(cell)
                        under_way[pool.submit(engine.run, cell)] = cell
                    assert under_way, "cells that make use of others come with those"
                    for future in wait(under_way, return_when=FIRST_COMPLETED)[0]:
                        cell = under_way.pop(future)
                        try:
                            future.result()
                        except InputError as problem:
                            failed.append(str(problem))
                            told = f"{problem}; no further cell begins"
                            console.print(told, markup=False, highlight=False, soft_wrap=True)
                            waiting.clear()
                        else:
                            number += 1
                            told = f"{number}/{len(cells)} {cell.script.stem} {cell.folder.name}"
                            console.print(told, highlight=False, soft_wrap=True)
            except BaseException:  # Ctrl-C and its kind: cells under way leave a checkpoint and end
                engine.stop()
                raise
    finally:
        engine.close()
    if failed:
        raise InputError("; ".join(failed))


def stop_children() -> None:
    """Ask the cells that this process has started to end."""
    for child in tuple(_CHILDREN):
        child.terminate()


_CHILDREN: set[subprocess.Popen[str]] = set()


@contextlib.contextmanager
def signals_passed_on() -> Iterator[None]:
    """SIGTERM asks the cells that this process has started to end, in the block.

    In the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop_children())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _terminated_with_us() -> Iterator[None]:
    """SIGTERM and SIGHUP end the study as Ctrl-C does, in the block; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed sends two
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *hangup())}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def usable(words: Sequence[str], flags: Sequence[str], script: Any) -> list[str]:
    """The words that a method makes use of; its training would refuse the others.

    Args:
        words: of all methods of a study.
        flags: of the method.
        script: the module of its training script, whose ``job`` is an `advgame.run.job.Job`.
    """
    idle = script.job.idle(script.job.parse(flags))
    return without(words, [name for names in idle.values() for name in names])


def without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Words of a command line less these options and their values.

    Args:
        words: ``--some-option 5 6`` or ``--some-option=5``, and others.
        options: fields such as ``some_option``.
    """
    kept: list[str] = []
    dropped = False
    for word in words:
        if word.startswith("--"):
            dropped = option_of(word) in options
        if not dropped:
            kept.append(word)
    return kept


def option_of(word: str) -> str:
    """The field that ``--some-option`` or ``--some-option=5`` sets: ``some_option``."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def values_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Option -> the values that a command line has last for it."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            _, equals, value = word.partition("=")
            found[last := option_of(word)] = [value] if equals else []
        elif found:
            found[last].append(word)
    return found


def size_in(flags: str) -> int | None:
    """The ``--image-size`` among the words of ``--extra``; None where there is no such number.

    Raises:
        InputError: a quotation that does not end.
    """
    size = values_of(split_flags(flags)).get("image_size", [""])[-1:]
    return int(size[0]) if size and size[0].isdigit() else None


def same_flags(root: Path, flags: str) -> None:
    """Finished cells are reused, so they must have been made with the same further flags.

    Args:
        root: the folder of the cells.
        flags: which `note_flags` notes there before the first cell.

    Raises:
        InputError: they were not.
    """
    note = root / "extra.txt"
    made = any(root.glob("*/config.json"))
    had = note.read_text(errors="replace") if note.exists() else None
    if made and had is not None and had != flags:
        raise InputError(
            f"{root} holds cells made with other flags, {had!r}, not {flags!r}: "
            "choose another --runs-dir"
        )


def note_flags(root: Path, flags: str) -> None:
    """Note by what further flags the cells of a folder are made."""
    note = root / "extra.txt"
    if not note.exists() or note.read_text(errors="replace") != flags:
        write_atomically(note, flags)

"""A study's cells: runs of a training script, a process each, kept when finished."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from advgame.errors import InputError
from advgame.own_code import is_own_code
from advgame.run.files import write_atomically
from advgame.run.interrupt import hangup
from advgame.run.job import resume_settings
from advgame.run.options import split_names


def run_cell(script: Path, folder: Path, flags: Sequence[str]) -> None:
    """Run a script into ``folder``, resume it where it stopped, or leave a finished run alone.

    Args:
        script: takes ``--runs-dir``, ``--name`` and ``--resume``; ends by writing report.json.
        folder: of the run.
        flags: of a new run; one that is resumed has its own.

    Raises:
        InputError: the script failed; its last words.
    """
    if (folder / "report.json").exists():
        return
    words = [sys.executable, os.path.relpath(script)]  # the run notes its command
    if (folder / "config.json").exists():
        words += ["--resume", str(folder), *code_options(flags)]
    else:
        words += [*flags, "--runs-dir", str(folder.parent), "--name", folder.name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a session of its own: Ctrl-C reaches the study alone, which passes it on once; a second signal
    # would kill a cell while it writes its checkpoint
    with subprocess.Popen(words, text=True, env=env, start_new_session=True, **pipes) as child:
        _CHILDREN.add(child)
        try:
            _, stderr = child.communicate()
        finally:
            _CHILDREN.discard(child)
    if child.returncode:
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        said = errors[-1].removeprefix("error: ") if errors else stderr[-500:]
        raise InputError(f"{folder.name} failed, its last words: {said}")


def code_options(flags: Sequence[str]) -> list[str]:
    """The options among flags whose values name code, which a resumed run wants typed again."""
    pairs = [flag.split("=", 1) if flag.startswith("--") else [flag] for flag in flags]
    words = [word for pair in pairs for word in pair]
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    options = [words[start:end] for start, end in pairwise([*starts, len(words)])]
    return [
        word
        for option in options
        if any(is_own_code(name) for value in option[1:] for name in split_names(value))
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


def check_cells(
    script: Any,
    cells: Mapping[str, Sequence[str]],
    root: Path = Path(),
    agreeing: Collection[str] = (),
) -> None:
    """Refuse cells that cannot run, before the first one.

    Args:
        script: the module of their script, whose ``job`` is an `advgame.run.job.Job`.
        cells: name of the folder -> flags.
        root: where their folders go.
        agreeing: settings in which a cell must agree with the folder that is there.

    Raises:
        InputError: what the script would say, and of which cell.
    """
    for name, flags in cells.items():
        try:
            asked = script.job.parse(flags)
            script.job.check(asked)
            if agreeing and (root / name).exists():
                resume_settings(root / name, asked, agreeing)
        except InputError as problem:
            raise InputError(f"{name}: {problem}") from problem


def run_cells(script: Path, root: Path, cells: Mapping[str, Sequence[str]], jobs: int) -> None:
    """Run, resume or skip every cell, ``jobs`` at a time; prints what is done.

    Args:
        script: of all cells.
        root: where their folders go.
        cells: name of the folder -> flags.
        jobs: processes at a time.

    Raises:
        InputError: fewer than one process, or cells that failed. After the first that fails no
            further cell begins; it is told at once.
        SystemExit: SIGTERM or SIGHUP; as with Ctrl-C, cells under way are asked to stop and can be
            resumed.
    """
    console, failed = Console(stderr=True), list[str]()
    with ThreadPoolExecutor(jobs) as pool, _terminated_with_us():
        names = {
            pool.submit(run_cell, script, root / name, flags): name for name, flags in cells.items()
        }
        left, number = set(names), 0
        try:
            while left:
                ended, left = wait(left, return_when=FIRST_COMPLETED)
                for future in ended:
                    try:
                        future.result()
                    except InputError as problem:
                        failed.append(str(problem))
                        console.print(f"{problem}; no further cell begins")
                        left = {other for other in left if not other.cancel()}
                    else:
                        number += 1
                        console.print(f"{number}/{len(names)} {names[future]}")
        except BaseException:  # Ctrl-C and its kind: cells under way leave a checkpoint and end
            pool.shutdown(wait=False, cancel_futures=True)
            for child in tuple(_CHILDREN):
                child.terminate()
            raise
    if failed:
        raise InputError("; ".join(failed))


_CHILDREN: set[subprocess.Popen[str]] = set()


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
        words: ``--some-option 5`` or ``--some-option=5``, and others.
        options: fields such as ``some_option``, each with one value.
    """
    kept: list[str] = []
    left = iter(words)
    for word in left:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") in options:
            if "=" not in word:
                next(left, None)
        else:
            kept.append(word)
    return kept


def same_flags(root: Path, flags: str) -> None:
    """Finished cells are reused, so they must have been made with the same further flags.

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
    if had != flags:
        write_atomically(note, flags)

"""A study's cells: runs of a training script, a process each, kept when finished."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from advgame.errors import InputError
from advgame.run.curves import Rows
from advgame.run.files import read_json, write_atomically
from advgame.run.interrupt import hangup
from advgame.statistics import spread


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
        words += ["--resume", str(folder)]
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


def split_flags(text: str) -> list[str]:
    """The words of ``--extra``.

    Raises:
        InputError: a quotation that does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"these flags cannot be read, {text!r}: {error}") from error


def check_cells(script: Any, cells: Mapping[str, Sequence[str]], jobs: int) -> None:
    """Refuse a study that cannot run, before its first cell and before it writes anything.

    Args:
        script: the module of its training script, whose ``job`` is an `advgame.run.job.Job`.
        cells: name of the folder -> flags.
        jobs: processes at a time.

    Raises:
        InputError: no cell, fewer than one process, or what the first cell's training would say.
    """
    if jobs < 1:
        raise InputError(f"jobs must be 1 or above, not {jobs}")
    if not cells:
        raise InputError("nothing to run: ask for one seed and one method at least")
    job = getattr(script, "job", script)
    for name, flags in cells.items():
        try:
            job.check(job.parse(flags))
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


def whole_number(words: Sequence[str], flag: str) -> int:
    """The value of ``--flag 5`` or ``--flag=5``; of several the last counts.

    Raises:
        InputError: no whole number above 0.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value", type=int)
    try:
        value: int = parser.parse_known_args(list(words))[0].value
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    if value < 1:
        raise InputError(f"{flag} must be 1 or above, not {value}")
    return value


def usable(words: Sequence[str], flags: Sequence[str], script: Any) -> list[str]:
    """The words that a method makes use of; its training would refuse the others.

    Args:
        words: of all methods of a study.
        flags: of the method.
        script: the module of its training script, whose ``job`` is an `advgame.run.job.Job`.
    """
    job = getattr(script, "job", script)
    idle = job.idle(job.parse(flags))
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


def hardware(runs: Sequence[Mapping[str, Any]], jobs: int) -> str:
    """What cells were made on, in words; those that note no ``device`` are older, of the CPU."""
    devices = ", ".join(sorted({run.get("device", "cpu") for run in runs}))
    return f"{devices}; {jobs} process(es), a thread each"


def thinned(rows: Rows, tags: Collection[str]) -> dict[str, list[tuple[int, float]]]:
    """Curves, small enough for a results file: tag -> (epoch, value to four digits)."""
    return {
        tag: [(int(row["epoch"]), float(f"{row[tag]:.4g}")) for row in rows if tag in row]
        for tag in tags
        if any(tag in row for row in rows)
    }


def drawable(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Rows]]:
    """Method -> the rows of its seeds, for `advgame.run.curves.seeds_figure`.

    Args:
        runs: a ``method`` and ``curves`` each, which `thinned` made.
    """
    found: dict[str, list[Rows]] = {}
    for run in runs:
        curves: Mapping[str, Sequence[tuple[int, float]]] = run["curves"]
        rows = [{"epoch": e, tag: value} for tag, points in curves.items() for e, value in points]
        found.setdefault(run["method"], []).append(rows)
    return found


def with_earlier(
    runs: Sequence[Mapping[str, Any]], path: Path, flags: str
) -> list[Mapping[str, Any]]:
    """These runs, and those that a results file has beside them, whose folders may be gone.

    Args:
        runs: a ``method`` and ``seed`` each; they replace the file's own of that name.
        path: of the file, which need not exist; it holds ``runs`` and ``extra``.
        flags: that all runs of a file share, its ``extra``.

    Returns:
        the runs in the order of their seeds.

    Raises:
        InputError: the file's runs had other flags.
    """
    kept: list[Mapping[str, Any]] = []
    if path.exists():
        earlier = read_json(path, "restore it, or choose another --out")
        had = earlier.get("extra", "")
        if had != flags:
            raise InputError(
                f"{path} holds runs made with other flags, {had!r}, not {flags!r}: "
                "choose another --out"
            )
        new = {(run["method"], run["seed"]) for run in runs}
        try:
            kept = [run for run in earlier["runs"] if (run["method"], run["seed"]) not in new]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no runs: restore it, or choose another --out"
            ) from error
    return sorted([*runs, *kept], key=lambda run: run["seed"])


def summarise(
    runs: Sequence[Mapping[str, Any]], control: str | None = None
) -> dict[str, dict[str, Any]]:
    """Spread over seeds of every number (a float) that all runs of a method have.

    Args:
        runs: a ``method`` and ``seed`` each.
        control: a method; ``worst_minus_control`` is the difference of ``worst_case`` to its run of
            the same seed.
    """
    summary: dict[str, dict[str, Any]] = {}
    partner = {r["seed"]: r["worst_case"] for r in runs if r["method"] == control}
    for method in dict.fromkeys(r["method"] for r in runs):
        mine = [r for r in runs if r["method"] == method]
        numbers = [
            k for k, v in mine[0].items() if isinstance(v, float) and all(k in r for r in mine)
        ]
        summary[method] = {"seeds": len(mine)} | {k: spread([r[k] for r in mine]) for k in numbers}
        pairs = [r["worst_case"] - partner[r["seed"]] for r in mine if r["seed"] in partner]
        if pairs and method != control:
            summary[method]["worst_minus_control"] = spread(pairs)
    return summary

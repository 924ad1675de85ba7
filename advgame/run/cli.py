"""What every training script does around its game: devices, resuming, errors in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from advgame.errors import InputError
from advgame.evaluation.verdicts import out_of_memory
from advgame.run.folder import RunFolder
from advgame.run.options import check_types
from advgame.run.progress import unread_streams

ConfigT = TypeVar("ConfigT")
_FREE = ("resume", "data_dir", "download")  # may differ when a run goes on


def run_script(
    job: Callable[[], object], stopped: str = "--resume with the run's folder goes on"
) -> None:
    """Run a script's job; a person's mistake becomes one line on stderr.

    A log that nobody reads any more, as of ``train.py | head -1``, does not stop the job.

    Args:
        job: what to run.
        stopped: what to say to Ctrl-C.

    Raises:
        SystemExit: 2 for bad input, 1 for a full disk, full memory and their kind, 130 for Ctrl-C.
    """
    # MKL's sums depend on where in memory an array lies, unless told otherwise before its first
    # call; a resumed run would drift from the run that was never stopped.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    for screen in (sys.stdout, sys.stderr):
        if isinstance(screen, io.TextIOWrapper):
            screen.reconfigure(errors="backslashreplace")  # a terminal may not know what ε is
    with unread_streams():
        try:
            job()
        except InputError as problem:
            _exit(problem, 2)
        except OSError as problem:
            _exit(problem, 1)
        except (MemoryError, RuntimeError) as problem:
            if isinstance(problem, RuntimeError) and not out_of_memory(problem):
                raise
            _exit(f"too little memory: {str(problem).splitlines()[0]}", 1)
        except KeyboardInterrupt:
            _exit(f"interrupted; {stopped}", 130)


def _exit(problem: Exception | str, code: int) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(code) from None


def resume_settings(
    path: Path, asked: ConfigT, typed: Collection[str]
) -> tuple[RunFolder, ConfigT]:
    """The run at ``path`` and its own settings.

    Args:
        path: a run folder.
        asked: the settings of the command line that resumes.
        typed: the fields that were really asked for; a value that differs from the run's own
            is refused, except for where the data lies.

    Raises:
        InputError: not a run of this script and version, or another setting is asked for.
    """
    run = RunFolder.open(path)
    saved = _rebuild(type(asked), run)
    for name in typed:
        want, had = getattr(asked, name), getattr(saved, name)
        if name not in _FREE and want != had:
            raise InputError(
                f"{path} was started with {name}={had}, not {want}: leave "
                f"--{name.replace('_', '-')} away, or start a new run"
            )
    if not (path / "report.json").exists():
        run.take_conditions()
        if getattr(saved, "devices", 1) > 1:  # Fabric's processes take them from there
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    moved = {name: getattr(asked, name) for name in ("data_dir", "download") if name in typed}
    if "download" not in moved and hasattr(saved, "download"):
        moved["download"] = False  # a folder may be a stranger's: it fetches nothing unasked
    return run, replace(cast(Any, saved), **moved)


def _rebuild(kind: type[ConfigT], run: RunFolder) -> ConfigT:
    stored: Mapping[str, Any] = run.about()["config"]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    if values.keys() != {field.name for field in fields(cast(Any, kind))}:
        raise InputError(
            f"{run.path} holds the settings of another script or version: resume it with those"
        )
    check_types(kind, values, f"{run.path}/config.json")
    return kind(**values)

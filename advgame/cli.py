"""What every training script does around its game: devices, resuming, errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lightning_fabric import Fabric

from advgame.errors import InputError
from advgame.runs import RunFolder

ConfigT = TypeVar("ConfigT")
_FREE = ("resume", "name", "runs_dir", "data_dir", "download")  # may differ when a run goes on


def peek(**defaults: str) -> dict[str, str]:
    """The values of a few options on the command line, before it is parsed in full.

    They decide what the other options' defaults are, which ``--help`` then shows.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    try:
        known, _ = parser.parse_known_args()
    except argparse.ArgumentError:  # an option without its value: the full parser says so better
        return defaults
    return dict(vars(known))


def run_script(job: Callable[[], object]) -> None:
    """Run a script's job; a person's mistake becomes one line on stderr.

    Raises:
        SystemExit: 2 for bad input, 1 for a full disk and its kind.
    """
    try:
        job()
    except InputError as problem:
        _exit(problem, 2)
    except OSError as problem:
        _exit(problem, 1)


def _exit(problem: Exception, code: int) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(code) from None


def make_fabric(accelerator: str, devices: int, precision: str) -> Fabric:
    """Launch Lightning Fabric; ``precision="auto"`` is bf16-mixed on a GPU, else 32-true.

    Raises:
        InputError: a device or precision that is not there.
    """
    try:
        if precision == "auto":
            device = Fabric(accelerator=accelerator, devices=devices).device
            precision = "bf16-mixed" if device.type == "cuda" else "32-true"
        fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]
        fabric.launch()
    except Exception as error:  # Fabric raises its own kinds for devices that are not there
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot use accelerator {accelerator!r} x {devices}: {reason}") from error
    return fabric


def resume_settings(path: Path, asked: ConfigT, defaults: ConfigT) -> tuple[RunFolder, ConfigT]:
    """The run at ``path`` and its own settings.

    Args:
        path: a run folder.
        asked: the settings of the command line that resumes.
        defaults: what the command line would have given by itself; an ``asked`` value that
            differs from both this and the run's own is refused.

    Raises:
        InputError: not a run of this script and version, or another setting is asked for.
    """
    run = RunFolder.open(path)
    saved = _rebuild(type(asked), run)
    for field in fields(asked):  # type: ignore[arg-type]
        want, had = getattr(asked, field.name), getattr(saved, field.name)
        if field.name not in _FREE and want not in (getattr(defaults, field.name), had):
            raise InputError(
                f"{path} was started with {field.name}={had}, not {want}: leave "
                f"--{field.name.replace('_', '-')} away, or start a new run"
            )
    return run, saved


def _rebuild(kind: type[ConfigT], run: RunFolder) -> ConfigT:
    stored: Mapping[str, Any] = run.about()["config"]
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except TypeError as error:
        raise InputError(
            f"{run.path} holds the settings of another script or version: resume it with those"
        ) from error

"""What every training script does around its game: devices, resuming, errors in one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from tyro.constructors import PrimitiveConstructorSpec

from advgame.checks import check_types
from advgame.errors import InputError
from advgame.evaluation.verdicts import out_of_memory
from advgame.run.folder import RunFolder
from advgame.run.progress import unread_streams

ConfigT = TypeVar("ConfigT")
# An option that takes names, with spaces or commas between: --attacks fgsm,pgd20 autoattack
Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME [NAME ...]",
        instance_from_str=lambda words: tuple(
            name for word in words for part in word.split(",") if (name := part.strip())
        ),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]
_FREE = ("resume", "data_dir", "download")  # may differ when a run goes on


def peek(words: Sequence[str], **defaults: str) -> dict[str, str]:
    """The values of a few options among the words of a command line, before it is parsed in full.

    They decide what the other options' defaults are, which ``--help`` then shows.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    try:
        known, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:  # an option without its value: the full parser says so better
        return defaults
    return dict(vars(known))


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


class _Bf16Mixed(MixedPrecision):
    """bf16 where autocast says so. Fabric's own also rounds the images, by up to 0.5/255.

    The classifier would then not learn from the images that the attack made.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data


def check_devices(accelerator: str, devices: int) -> None:
    """Refuse more processes than there are CPUs; Fabric itself refuses more GPUs than there are.

    Raises:
        InputError: how many there are.
    """
    there = os.cpu_count() or 1
    if devices > there and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise InputError(
            f"--devices {devices}: a process each, and this machine has {there} CPU(s): ask for "
            "no more than those"
        )


def make_fabric(accelerator: str, devices: int, precision: str) -> Fabric:
    """Launch Lightning Fabric.

    ``accelerator="auto"`` is CUDA where there is one, else the CPU; ``precision="auto"`` is
    bf16-mixed on CUDA, else 32-true. What is not bf16 is fp32: cuDNN's TF32, with three digits,
    is switched off for the process.

    Raises:
        InputError: a device or precision that is not there.
    """
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    try:
        kind = Fabric(accelerator=accelerator, devices=devices).device.type
        if precision == "auto":
            precision = "bf16-mixed" if kind == "cuda" else "32-true"
        how: Any = (
            {"plugins": _Bf16Mixed(kind)} if precision == "bf16-mixed" else {"precision": precision}
        )
        fabric = Fabric(accelerator=accelerator, devices=devices, **how)
        fabric.launch()
    except Exception as error:  # Fabric raises its own kinds for devices that are not there
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot use accelerator {accelerator!r} x {devices}: {reason}") from error
    return fabric


def typed_options(kind: type) -> set[str]:
    """The fields of a settings class that stand on the command line.

    Raises:
        InputError: an option of several values that is given twice, of which the last would count.
    """
    given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    words = [word.lstrip("-").replace("-", "_") for word in given]
    for field in fields(kind):
        if isinstance(field.default, tuple) and words.count(field.name) > 1:
            word = f"--{field.name.replace('_', '-')}"
            raise InputError(f"{word} is given twice: name all after one {word}")
    return {f.name for f in fields(kind) if {f.name, f"no_{f.name}"} & set(words)}  # --no-FLAG


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

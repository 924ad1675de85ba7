"""The jobs of `scripts/`, and how a person starts them; imports no torch.

A clone has ``python scripts/train_las_at.py``, an installed package ``advgame train-las-at``. Both
run the same file. What is printed, and what a run notes of its command, is the form that was typed.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

STARTED_BY = "ADVGAME_STARTED_BY"
"""of the environment: the words before a job's name; processes that a job starts inherit it"""
_PACKAGE = Path(__file__).resolve().parents[1]
_SCRIPT = re.compile(r"(?<![\w/.])(?:python scripts/)?(\w+)\.py\b")


def scripts() -> Path:
    """The folder of the jobs: in the installed package, or beside it in a clone."""
    inside = _PACKAGE / "scripts"
    return inside if inside.is_dir() else _PACKAGE.parent / "scripts"


def jobs() -> dict[str, Path]:
    """Name of every job, e.g. ``train-las-at`` -> its script."""
    found = sorted(scripts().glob("*.py"))
    return {
        path.stem.replace("_", "-"): path
        for path in found
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }


def program() -> list[str]:
    """The words that started this process, up to the job's name: ``advgame train-las-at``."""
    script = Path(sys.argv[0])
    if STARTED_BY in os.environ and script.resolve().parent == scripts().resolve():
        return [*shlex.split(os.environ[STARTED_BY]), script.stem.replace("_", "-")]
    return ["python", sys.argv[0]]


def prog() -> str:
    """`program` as one text, for ``--help``."""
    return " ".join(program())


def going_on(path: Path, again: Sequence[str] = ()) -> str:
    """The command that resumes a run; its options alone in a program that is none of the jobs.

    Args:
        path: the run folder.
        again: options that must be typed again, see `advgame.run.options.typed_again`.
    """
    words = ["--resume", str(path), *again]
    ours = Path(sys.argv[0]).resolve() in {script.resolve() for script in jobs().values()}
    return shlex.join([*program(), *words] if ours else words)


def retold(text: str) -> str:
    """A text that names scripts, with the names that are typed here.

    ``python scripts/train.py`` and ``train.py`` become ``advgame train`` where that is the command.
    """
    by = os.environ.get(STARTED_BY)
    names = {script.stem: name for name, script in jobs().items()} if by else {}
    return _SCRIPT.sub(lambda m: f"{by} {names[m[1]]}" if m[1] in names else m[0], text)


def taken_names() -> str:
    """What stands where ``envs`` or ``agents`` of this package should, in a line; else "".

    These names are common: somebody's own folder may be found first, or have been imported first.
    """
    for name in ("envs", "agents"):
        found = sys.modules.get(name)
        spec = found.__spec__ if found else find_spec(name)
        if spec is None or spec.origin is None:
            return f"advgame's own package {name} is not there: install advgame again"
        place = Path(spec.origin).resolve()
        if _PACKAGE.parent not in (place.parent, place.parent.parent):  # envs.py, envs/__init__.py
            return (
                f"the package {name} is that of {place}, where advgame's own is needed: "
                "rename that one, or take its folder off PYTHONPATH"
            )
    return ""

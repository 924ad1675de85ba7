"""Experiments over seeds, each a table of methods with the papers' own numbers beside ours.

    python scripts/study.py                                   # the studies, a line each
    python scripts/study.py l2l --help                        # what one can be asked
    python scripts/study.py l2l --dataset digits --seeds 3
    python scripts/study.py l2l --from-json                   # table and picture again

A cell is a training (method x seed) in its own process, or a measurement. Finished cells are kept
and interrupted ones resumed, so that a command can be given again; cells that the results file
holds stay there, also where their folders are gone. Results are `<out>/*.json`, `.md` and `.png`.
A study is a file of `scripts/studies/`, with a `Config` and a `main`; it needs no other place.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from advgame.errors import unknown
from advgame.run.cli import run_script
from advgame.run.program import prog, retold

_FOLDER = Path(__file__).with_name("studies")
OF_FLAGS = ("--extra", "--slurm-more")
"""Options whose value is flags."""
STUDIES = {path.stem: path for path in sorted(_FOLDER.glob("[a-z]*.py"))}


def run(words: Sequence[str]) -> None:
    """Run the study that the first word names, with the others as its settings.

    Raises:
        InputError: no such study, or settings that it refuses.
    """
    if not words or words[0] in ("-h", "--help"):
        print(retold(__doc__ or ""))
        for name, path in STUDIES.items():
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"{name:14} {retold(about.splitlines()[0])}")
        return
    name, *rest = words
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    import tyro  # it takes a while, which a list need not wait for

    study = import_module(f"studies.{name}")
    typed = f"{prog()} {name}" if name in sys.argv[1:2] else prog()  # compare.py says no name
    study.main(tyro.cli(study.Config, args=joined(rest), prog=typed))


def joined(words: Sequence[str]) -> list[str]:
    """``--extra "--epochs 5"`` as ``--extra="--epochs 5"``: a value of dashes seems an option."""
    found, left = list[str](), iter(words)
    for word in left:
        value = next(left, None) if word in OF_FLAGS else None
        found.append(word if value is None else f"{word}={value}")
    return found


if __name__ == "__main__":
    run_script(lambda: run(sys.argv[1:]))

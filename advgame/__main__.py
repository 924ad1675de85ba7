"""The command ``advgame``: the jobs of `scripts/` by name, in any folder.

``advgame`` lists them, ``advgame train-las-at --help`` explains one. ``python -m advgame`` is the
same.
"""

from __future__ import annotations

import os
import sys

ENDING = """
advgame JOB --help explains a job. Runs go to the folder runs/ in which you stand.
"""


def main() -> None:
    """Run the job that the first word names, as ``python scripts/JOB.py`` with the other words.

    Raises:
        SystemExit: 2 where there is no such job, 130 for Ctrl-C; else as the job ends.
    """
    by_module = sys.argv[0].endswith("__main__.py")
    # of ``python -m`` the folder that one stands in, where any name may be taken, unless it is the
    # one in which this package lies, as in a clone; else bin/
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]
    import runpy

    from advgame.run.cli import run_script
    from advgame.run.program import STARTED_BY, jobs

    os.environ[STARTED_BY] = "python -m advgame" if by_module else "advgame"
    chosen: list[str] = []
    run_script(lambda: chosen.extend(_chosen(sys.argv[1:])))
    if chosen:
        script = jobs()[chosen[0]]
        sys.path.insert(0, str(script.parent))
        sys.argv = [str(script), *sys.argv[2:]]
        try:
            runpy.run_path(str(script), run_name="__main__")
        except KeyboardInterrupt:  # while it imports, which takes seconds; later it answers itself
            print("error: interrupted before it began", file=sys.stderr)
            raise SystemExit(130) from None


def _chosen(words: list[str]) -> list[str]:
    """The job that is asked for; none where something is told instead."""
    from advgame import __version__
    from advgame.errors import InputError, unknown
    from advgame.run.program import jobs, taken_names

    first = words[0] if words else "--help"
    if first in ("--help", "-h"):
        _list()
    elif first == "--version":
        print(f"advgame {__version__}")
    elif first not in jobs():
        raise unknown("job", first, [*jobs(), "--help", "--version"])
    elif taken := taken_names():
        raise InputError(taken)
    else:
        return [first]
    return []


def _list() -> None:
    """The jobs, a line each: the first of their scripts' docstrings."""
    import ast

    from advgame.run.program import jobs, retold

    print("usage: advgame JOB [options]\n")
    for name, script in jobs().items():
        about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        print(f"  {name:22} {retold(about.splitlines()[0])}")
    print(ENDING, end="")


if __name__ == "__main__":
    main()

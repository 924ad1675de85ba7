"""Games on equal terms: `study.py compare`."""

import sys

import study

from advgame.run.cli import run_script

if __name__ == "__main__":
    run_script(lambda: study.run(["compare", *sys.argv[1:]]))

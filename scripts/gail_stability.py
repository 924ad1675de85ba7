"""How stable is imitation?: `study.py gail`."""

import sys

import study

from advgame.run.cli import run_script

if __name__ == "__main__":
    run_script(lambda: study.run(["gail", *sys.argv[1:]]))

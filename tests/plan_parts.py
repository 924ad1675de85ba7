"""Steps of a plan that end in all ways; a worker imports this file, which takes no torch."""

import os
import subprocess
import sys
import time

from advgame.errors import InputError


def good(work):
    work.note({"seen": 1})
    return {"seen": 2, "before": sorted(work.before), "pid": os.getpid()}


def bad(work):
    work.note({"seen": 1})
    raise InputError("it cannot be done")


def crash(work):
    os._exit(7)


def leave(work):
    sys.exit(3)


def hang(work):
    work.note({"child": subprocess.Popen(["sleep", "1000"]).pid})
    time.sleep(1000)
    return {}

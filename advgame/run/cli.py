"""`run_script`: runs a script's main function, with errors in one line and exit codes."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from advgame.errors import InputError
from advgame.run.program import taken_names
from advgame.run.progress import unread_streams


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
    _keep_freed_memory()
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
        except ImportError:
            if taken := taken_names():
                _exit(taken, 2)
            raise
        except (MemoryError, RuntimeError) as problem:
            from advgame.evaluation.verdicts import out_of_memory

            if isinstance(problem, RuntimeError) and not out_of_memory(problem):
                raise
            _exit(f"too little memory: {str(problem).splitlines()[0]}", 1)
        except KeyboardInterrupt:
            _exit(f"interrupted; {stopped}", 130)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: it would hand a layer's activations back after each pass.

    The kernel would then map and clear the same pages again for the next pass. No arithmetic
    changes.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, (2 << 30) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def _exit(problem: Exception | str, code: int) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(code) from None

"""Stops a long job on Ctrl-C, SIGTERM or a closed terminal at a point where it can go on later."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

PASSED_ON = 10.0
"""Seconds in which a further SIGTERM is taken for the same request, which came by two ways."""


def hangup() -> tuple[int, ...]:
    """SIGHUP, which a terminal sends as it closes, unless nohup asked to ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return () if ignored else (signal.SIGHUP,)


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step in progress.

    A second one kills, but for SIGHUP: a terminal that is closed sends it twice. SIGTERM is sent to
    every process of a job by systemd, SLURM and others, and a study or torchrun passes it on: one
    that follows another signal at once does not kill, either.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM, *hangup()):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        elif number == signal.SIGHUP or (
            number == signal.SIGTERM and now - self._since < PASSED_ON
        ):
            return
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

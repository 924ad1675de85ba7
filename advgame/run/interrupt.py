"""Stops a long job on Ctrl-C, SIGTERM or a closed terminal at a point where it can go on later."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


def hangup() -> tuple[int, ...]:
    """SIGHUP, which a terminal sends as it closes, unless nohup asked to ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return () if ignored else (signal.SIGHUP,)


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step in progress.

    A second one kills, but for SIGHUP: a terminal that is closed sends it twice.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM, *hangup()):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

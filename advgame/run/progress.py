"""Progress of a job on stderr: a bar on a terminal, a line at a time in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class _Unread:
    """A text stream that drops what can no longer be written: nobody reads it, or no room is left.

    Args:
        stream: whose other attributes are this one's.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write where somebody still reads; returns the text's length either way."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is held back, where that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def end(self) -> None:
        """Write what is held back, or drop it: Python would fail over it at its end."""
        try:
            self._stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def unread_streams() -> Iterator[None]:
    """Within the block no job ends because of its log, as of ``train.py | head -1`` at line 2."""
    before = sys.stdout, sys.stderr
    wrapped: Any = [stream and _Unread(stream) for stream in before]  # None where it was closed
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in wrapped:
            if stream is not None:
                stream.end()
        sys.stdout, sys.stderr = before


class TrainingProgress:
    """What a training says on stderr; begins with the run's folder, so that one can watch it.

    Args:
        path: the run's folder.
        total: its steps, or what its budget is.
        done: steps that were made before, or what was spent.
        shown: False keeps silent.
        unit: of both numbers, in words.
    """

    def __init__(self, path: Path, total: int, done: int, shown: bool, unit: str = "step") -> None:
        console = Console(stderr=True)
        self._lines = console if shown and not console.is_terminal else None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._total, self._unit = total, unit
        self._task = self._bar.add_task("", total=total, completed=done, note="")
        if shown:
            console.print(f"{path}: {unit} {done} of {total}", highlight=False, soft_wrap=True)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, done: int, note: str = "") -> None:
        """Steps made so far; ``note`` is what an epoch found, empty within epochs."""
        self._bar.update(self._task, completed=done)
        if not note:
            return
        self._bar.update(self._task, note=note)
        if self._lines is not None:
            line = f"{self._unit} {done} of {self._total}: {note}"
            self._lines.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def telling(begin: str) -> Iterator[Callable[[str], None]]:
    """Tell on stderr what an evaluation is at.

    Args:
        begin: the first line, which stays, e.g. the folder that ``--resume`` takes.

    Yields:
        what takes the next line: on a terminal it stands in the place of the last one.
    """
    console = Console(stderr=True)

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(begin)
    if not console.is_terminal:
        yield line
        return
    with console.status("") as status:
        yield status.update

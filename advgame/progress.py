"""How far a training is, on a terminal as a bar, in a file as a line per epoch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """What a training says on stderr; begins with the run's folder, so that one can watch it.

    Args:
        path: the run's folder.
        total: its steps.
        done: steps that were made before.
        shown: False keeps silent.
    """

    def __init__(self, path: Path, total: int, done: int, shown: bool) -> None:
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
        self._total = total
        self._task = self._bar.add_task("", total=total, completed=done, note="")
        if shown:
            console.print(f"{path}: step {done} of {total}", highlight=False, soft_wrap=True)

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
            line = f"step {done} of {self._total}: {note}"
            self._lines.print(line, highlight=False, soft_wrap=True)

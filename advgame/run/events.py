"""`EventFile`: the one TensorBoard file of a run, which a run that goes on appends to."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_PATTERN = "events.out.tfevents.*"
_AROUND = 16  # bytes of a record beside its content: length and two checksums


class EventFile:
    """Appends summaries to the newest event file of a folder, or begins one.

    torch's `SummaryWriter` begins a new file each time, so that a run that was resumed and judged
    has three or more.

    Args:
        folder: of the run.
        purge_step: in a file that goes on, events from this step on are discarded.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob(_PATTERN))
        self.new = not old
        path = folder / f"{_PATTERN[:-1]}{int(time.time()):010d}.advgame" if self.new else old[-1]
        if old:
            os.truncate(path, _whole(path))
        self._records = RecordWriter(path.open("ab"))
        if self.new:
            self._write(file_version="brain.Event:2")
        elif purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Summary, step: int) -> None:
        """Append a summary of one step of the run."""
        self._write(step=step, summary=summary)

    def flush(self) -> None:
        """Let readers see what was added."""
        self._records.flush()

    def close(self) -> None:
        """Flush the file and close it, also after an error."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())


def _whole(path: Path) -> int:
    """How many bytes of an event file are whole records; a kill may have cut the last one short."""
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            record = struct.unpack("<Q", head)[0] + _AROUND
            if end + record > size:
                break
            end += record
            file.seek(end)
    return end

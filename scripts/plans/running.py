"""Steps of a plan, one after the other within a time limit, each noted as it ends.

Steps run in a worker process, so that one that fails, hangs or crashes takes no other with it. The
worker is kept from step to step, since a new one imports and sets a device up for many seconds; a
step that ends badly costs it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from advgame.run.files import read_json, write_atomically

Facts = dict[str, Any]
SPARE = 3.0
"""seconds before the end of all at which a step is stopped: the worker dies, the file is written"""


@dataclass(frozen=True)
class Work:
    """What a step is given.

    Args:
        plan: settings of the plan; whatever can be pickled.
        folder: where the plan is unpacked.
        before: name -> result of the steps that were done.
        ends: when the step will be stopped, in seconds since 1970.
        note: tells what was found so far, which is kept also of a step that does not end well.
    """

    plan: Any
    folder: Path
    before: Mapping[str, Facts]
    ends: float
    note: Callable[[Facts], None] = lambda facts: None


@dataclass(frozen=True)
class Step:
    """A step of a plan.

    Args:
        name: in the results.
        do: the work; returns what was found. It runs in another process: a function of a module.
        least: seconds without which it is not begun.
        most: seconds after which it is stopped.
        needs: steps that must have been done.
    """

    name: str
    do: Callable[[Work], Facts]
    least: float
    most: float
    needs: tuple[str, ...] = ()


class Record:
    """The JSON file of a plan: who made it, and state, seconds and result of each step.

    Args:
        path: of the file. What it holds already is kept.
        about: of this visit: command, versions, settings.
    """

    def __init__(self, path: Path, about: Facts) -> None:
        self.path = path
        known = read_json(path) if path.exists() else {"visits": [], "steps": {}}
        self.visits: list[Facts] = [*known["visits"], about]
        self.steps: dict[str, Facts] = known["steps"]

    def done(self) -> dict[str, Facts]:
        """Name -> result of the steps that were done, now or in a visit before."""
        return {
            name: row.get("result", {})
            for name, row in self.steps.items()
            if row["state"] == "done"
        }

    def put(self, name: str, **facts: Any) -> None:
        """Replace what is known of a step, and write the file.

        Args:
            name: of the step.
            facts: ``state`` and the rest; a step that is not done again keeps the ``result`` that
                a visit before has left, where this one has found nothing.
        """
        had = self.steps.get(name, {}).get("result")
        if facts["state"] != "done" and had and not facts.get("result"):
            facts["result"] = had
        self.steps[name] = facts
        content = {"visits": self.visits, "steps": self.steps}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")


def play(
    steps: Sequence[Step], plan: object, folder: Path, record: Record, ends: float
) -> dict[str, str]:
    """Take the steps that are not done yet; returns the state of each.

    ``done``, ``failed``, ``out of time`` (begun and stopped) or ``skipped``.

    Args:
        steps: in order.
        plan: their settings.
        folder: where the plan is unpacked.
        record: where everything is noted.
        ends: of all, in seconds since 1970.
    """
    worker = Worker()
    try:
        for step in steps:
            if step.name in record.done():
                continue
            left = ends - SPARE - time.time()
            if why := _in_the_way(step, record, left):
                record.put(step.name, state="skipped", why=why)
            else:
                _take(step, worker, plan, folder, record, min(step.most, left))
            row = record.steps[step.name]
            told = row.get("why") or f"{row['seconds']:.0f} s"
            print(f"{step.name}: {row['state']}, {told.splitlines()[-1]}", flush=True)
    finally:
        worker.stop()
    return {step.name: str(record.steps[step.name]["state"]) for step in steps}


def _in_the_way(step: Step, record: Record, left: float) -> str:
    """Why a step cannot be taken, "" if it can."""
    lacking = [name for name in step.needs if name not in record.done()]
    if lacking:
        return f"it needs {', '.join(lacking)}, which was not done"
    if left < step.least:
        return f"it asks for {step.least:.0f} s, and {max(left, 0):.0f} s are left"
    return ""


def _take(
    step: Step, worker: Worker, plan: object, folder: Path, record: Record, seconds: float
) -> None:
    began = time.time()
    facts: Facts = {}

    def note(found: Facts) -> None:
        facts.clear()
        facts.update(found)
        record.put(step.name, state="running", result=dict(facts))

    note({})
    work = Work(plan, folder, record.done(), began + seconds)
    state, told = worker.do(step.do, work, note)
    spent = round(time.time() - began, 3)
    if state == "done":
        record.put(step.name, state=state, seconds=spent, result=told)
    else:
        record.put(step.name, state=state, seconds=spent, why=told, result=dict(facts))


class Worker:
    """A process that does a step when it is told to; started where there is none."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def do(
        self, do: Callable[[Work], Facts], work: Work, note: Callable[[Facts], None]
    ) -> tuple[str, Any]:
        """Do a step until ``work.ends``; returns its state, and its result or what went wrong.

        Args:
            do: the step.
            work: what it is given, but for ``note``, which stays on this side.
            note: told what the step tells.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send((do, replace(work, note=_silent)))
            while pipe.poll(max(0.0, work.ends - time.time())):
                kind, told = pipe.recv()
                if kind == "note":
                    note(told)
                    continue
                if kind == "failed":
                    self.stop()  # a device that has failed once may answer nothing any more
                return kind, told
        except (EOFError, ConnectionError):
            code = self.stop()
            return "failed", f"its process died with exit code {code}"
        self.stop()
        return "out of time", "it was stopped"

    def _start(self) -> Connection:
        fresh = multiprocessing.get_context("spawn")
        self._pipe, theirs = fresh.Pipe()
        self._process = fresh.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()  # or the end of the process would not be seen here
        return self._pipe

    def stop(self) -> int | None:
        """End the process with all that it has started; returns its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return None
        pipe.close()
        process.join(0.2)  # one that crashed tells its own exit code
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()  # one that has just begun has no group of its own yet
        process.join()
        return process.exitcode


def _silent(facts: Facts) -> None:
    """What stands for ``note`` on the way between the processes."""


def _serve(pipe: Connection) -> None:
    """Do what comes through the pipe, in a process group of its own, until it is closed."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)  # however the parent ended

    threading.Thread(target=follow, daemon=True).start()
    while True:
        try:
            do, work = pipe.recv()
        except EOFError:
            return
        try:
            answer = "done", do(replace(work, note=lambda facts: pipe.send(("note", facts))))
        except BaseException:  # a script's own SystemExit, too
            answer = "failed", traceback.format_exc()
        pipe.send(answer)


def as_text(steps: Mapping[str, Facts]) -> str:
    """What the results say, in a few lines."""
    lines = []
    for name, row in steps.items():
        result = row.get("result") or {}
        shown = {k: v for k, v in result.items() if isinstance(v, bool | int | float)}
        lines.append(f"{name}: {row['state']} {json.dumps(shown)}")
    return "\n".join(lines)

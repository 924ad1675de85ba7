"""Is anything lost when processes and machines are killed? Random kills, on this machine.

    python scripts/study.py kills                       # half an hour on two busy cores
    python scripts/study.py kills --parts workers --workers 4 --kills 8 --out runs/results

Two parts. `workers`: one process evaluates a classifier; then many workers do the same in one
folder, and random ones are killed by SIGKILL at random moments, with another begun in the place of
each. The verdicts must be equal to the byte, and no cell (an attack on a batch) may be lost, or
begun again without a kill. `cluster`: trainings by processes; then by a Ray cluster of three
machines that this one plays (`ray.cluster_utils.Cluster`), one of which is killed in the middle.
The weights must be equal to the byte.

The seed draws the moments and the victims; what a kill meets depends on the machine besides.
Writes `<out>/kills.json` and `.md`.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import train
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from typing_extensions import override

from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import Cell, check_cells, run_cells
from advgame.run.engines import Local, Ray, check_package
from advgame.run.files import digest
from advgame.run.folder import commit, cpu_name
from advgame.run.options import Count, Names
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs

WORKERS, CLUSTER = PARTS = ("workers", "cluster")
TRAINING = (
    "--game pgd-at --train-n 200 --epochs 10 --batch-size 50 --validate-every 10 --attacks fgsm "
    "--eval-n 20 --accelerator cpu"
)
MACHINES = 3
MARK = " on images "  # in the line that an evaluation writes when it begins a cell
LATER = 1.0  # seconds that are added at most to the moment of a kill


@dataclass(frozen=True)
class Config(StudyConfig):
    """Kill workers of an evaluation, and a machine of a cluster."""

    parts: Names = PARTS
    """workers of one evaluation, a cluster's trainings"""
    what: str = "zoo:digits/pgd-at-small_cnn-seed0"
    """the classifier that is evaluated"""
    attacks: Names = ("pgd100", "aa:apgd-ce")
    """of the evaluation"""
    n: Count = 360
    """test images"""
    batch_size: Count = 4
    """images of a cell"""
    workers: Count = 20
    """processes of one evaluation at a time"""
    kills: Count = 40
    """of workers"""
    cells: Count = 6
    """trainings on the cluster"""
    seeds: Count = 1
    """how often everything is done, with other moments and victims"""
    jobs: Count = 1
    runs_dir: str = "runs/kills"
    out: str = "results/cluster"


class Kills(Study[Config]):
    """A run is a part: the same work without and with kills."""

    about, files = "Killed workers, a killed machine", "kills"
    ending = ("Made at commit {commits}. Command: `{command}`.",)
    parallel = remembers = False

    @override
    def check(self) -> None:
        super().check()
        if odd := [name for name in self.config.parts if name not in PARTS]:
            raise unknown("part", odd[0], PARTS)
        if CLUSTER in self.config.parts:
            check_package("ray")

    def cells(self) -> dict[str, dict[str, Any]]:
        """Every part that is asked for, so often as asked."""
        return {
            f"{part}-{seed}": {"method": part, "seed": seed}
            for seed in self.seeds()
            for part in self.config.parts
        }

    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse folders that are there: what was finished before is not computed."""
        check_cells(evaluate, {"the evaluation": self.evaluation()})
        check_cells(train, {"a training": TRAINING.split()})
        for name in cells:
            if (self.root / name).exists():
                raise InputError(f"{self.root / name} is there: delete it, or choose --runs-dir")

    def evaluation(self) -> list[str]:
        """The command line that all workers are given, but for the folder."""
        config = self.config
        sizes = ["--n", str(config.n), "--batch-size", str(config.batch_size)]
        return [config.what, "--attacks", *config.attacks, *sizes, "--accelerator", "cpu"]

    @override
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        does = {WORKERS: self.workers, CLUSTER: self.cluster}
        for name, cell in cells.items() if not self.config.finished_only else ():
            chance = random.Random(cell["seed"])
            found = does[cell["method"]](self.root / name, chance)
            yield [{**cell, "commit": commit(), **found}]

    def workers(self, root: Path, chance: random.Random) -> dict[str, Any]:
        """One evaluation by a process, and by workers of which some are killed."""
        config = self.config
        alone = evaluated(root / "alone", self.evaluation(), 1, [], chance)
        latest = max(1, alone["cells"] - config.workers)  # later than that, some wait for others
        moments = sorted(chance.randrange(latest) for _ in range(config.kills))
        found = evaluated(root / "killed", self.evaluation(), config.workers, moments, chance)
        return {
            **found,
            "lost": alone["cells"] - found["cells"],
            "equal": found["verdicts"] == alone["verdicts"],
            "alone": alone,
        }

    def cluster(self, root: Path, chance: random.Random) -> dict[str, Any]:
        """Trainings by processes, and by a cluster that loses a machine."""
        alone, killed = root / "alone", root / "killed"
        began = time.perf_counter()
        run_cells(self.trainings(alone), Local([None] * MACHINES), MACHINES)
        between = time.perf_counter()
        lost = on_lossy_cluster(self.trainings(killed), chance)
        ended = time.perf_counter()
        weights = {
            folder: [digest(path)[:16] for path in sorted(folder.glob("*/checkpoints/last.*"))]
            for folder in (alone, killed)
        }
        again = {
            cell.folder.name: starts(cell.folder) - starts(alone / cell.folder.name)
            for cell in self.trainings(killed)
        }
        return {
            "machines": MACHINES,
            "cells": self.config.cells,
            **lost,
            "gone_on": {name: sorted(steps.elements()) for name, steps in again.items() if steps},
            "equal": weights[alone] == weights[killed],
            "seconds": round(ended - between, 1),
            "weights": weights[killed],
            "alone": {"seconds": round(between - began, 1), "weights": weights[alone]},
        }

    def trainings(self, root: Path) -> list[Cell]:
        """Trainings in a folder, a seed each."""
        script, words = Path(str(train.__file__)), TRAINING.split()
        return [
            Cell(script, root / f"cell{seed}", [*words, "--seed", str(seed)])
            for seed in range(self.config.cells)
        ]

    def facts(self) -> dict[str, Any]:
        """Processor and cores, which the seconds are of."""
        return {"cpu": cpu_name(), "cores": os.cpu_count()}

    @override
    def place(self, run: Run) -> Any:
        return PARTS.index(run["method"])

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """A table of each part, a line per run."""
        texts = [f"# {self.title}", f"{about['cpu']}, {about['cores']} cores, beside other work."]
        if mine := [run for run in runs if run["method"] == WORKERS]:
            texts += [
                "## Workers of one evaluation",
                "Each worker is `scripts/evaluate.py`, a thread. A cell is an attack on a batch. "
                "Random workers are killed by SIGKILL at random moments; in the place of each "
                "another begins. `alone` is one process.",
                workers_table(mine),
            ]
        if mine := [run for run in runs if run["method"] == CLUSTER]:
            texts += [
                "## A machine of a cluster",
                f"Trainings of a thread, on a Ray cluster of {MACHINES} machines that this one "
                "plays, a training at a time on each. One machine is killed while all are at work. "
                "`alone` is the same by processes, as many at a time.",
                cluster_table(mine),
            ]
        return texts


def workers_table(runs: Runs) -> str:
    """What became of the cells of evaluations whose workers were killed."""
    head = ["seed", "workers", "kills", "of these at a cell", "cells", "lost"]
    head += ["begun once, twice, …", "computed to the end, at most", "begun again without a kill"]
    head += ["verdicts", "s", "alone, s"]
    lines = []
    for run in runs:
        begun = ", ".join(map(str, run["begun"]))
        line = [run["seed"], run["workers"], run["kills"], run["at_a_cell"], run["cells"]]
        line += [run["lost"], begun, f"{run['ended']} time(s)", run["unasked"]]
        line += [same(run["equal"]), f"{run['seconds']:.0f}", f"{run['alone']['seconds']:.0f}"]
        lines.append([str(one) for one in line])
    return table.markdown(head, lines)


def cluster_table(runs: Runs) -> str:
    """What became of the trainings of clusters that lost a machine."""
    head = ["seed", "machines", "trainings", "finished at the kill", "gone on, at step"]
    head += ["weights", "s", "alone, s"]
    lines = []
    for run in runs:
        steps = ", ".join(str(one) for gone_on in run["gone_on"].values() for one in gone_on)
        line = [run["seed"], run["machines"], run["cells"], run["finished"], steps or "none"]
        line += [same(run["equal"]), f"{run['seconds']:.0f}", f"{run['alone']['seconds']:.0f}"]
        lines.append([str(one) for one in line])
    return table.markdown(head, lines)


def same(equal: bool) -> str:
    """Whether bytes are equal, in words that stand out where they are not."""
    return "equal to the byte" if equal else "NOT EQUAL"


def evaluated(
    root: Path, flags: Sequence[str], workers: int, moments: Sequence[int], chance: random.Random
) -> dict[str, Any]:
    """An evaluation by so many processes of one command, of which some are killed.

    Args:
        root: where the evaluation's folder goes, and what each worker says on stderr.
        flags: of the evaluation.
        workers: at a time; in the place of a killed one another begins.
        moments: at how many finished cells one is killed, ascending; up to `LATER` is added.
        chance: draws what is added, and the victim.

    Raises:
        InputError: a worker failed; its last words.
    """
    logs, folder = root / "logs", root / "judged"
    logs.mkdir(parents=True)
    script = os.path.relpath(str(evaluate.__file__))
    words = [sys.executable, script, *flags, "--runs-dir", str(root), "--name", folder.name]
    every, killed = list[Path](), list[Path]()

    def begin() -> tuple[subprocess.Popen[bytes], Path]:
        every.append(logs / f"{len(every):04d}.txt")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with every[-1].open("wb") as file:
            how: Any = {"env": env, "stdout": subprocess.DEVNULL, "stderr": file}
            return subprocess.Popen(words, **how), every[-1]

    def finished() -> int:
        return len(list(folder.glob("evaluation/*/*.json")))

    began = time.perf_counter()
    crew = [begin() for _ in range(workers)]
    try:
        for moment in moments:
            while finished() < moment and any(one.poll() is None for one, _ in crew):
                time.sleep(0.1)
            time.sleep(chance.uniform(0, LATER))
            place = chance.randrange(workers)
            victim, log = crew[place]
            if victim.poll() is not None:
                break  # all cells are there, or it failed: both are told below
            victim.kill()
            victim.wait()
            killed.append(log)
            crew[place] = begin()
        for one, log in crew:
            if one.wait():
                raise InputError(f"a worker failed, its last words: {log.read_text()[-500:]}")
    finally:
        for one, _ in crew:
            one.kill()
            one.wait()
    return {
        "workers": workers,
        "kills": len(killed),
        "cells": finished(),
        **counted([log.read_text() for log in every], [log.read_text() for log in killed]),
        "verdicts": digest(folder / "verdicts.csv")[:16],
        "seconds": round(time.perf_counter() - began, 1),
    }


def counted(logs: Sequence[str], killed: Sequence[str]) -> dict[str, Any]:
    """How often cells were worked on.

    Args:
        logs: what each worker said on stderr: a line whenever it begins a cell.
        killed: the same of those that were killed; one was at a cell where that is its last line.

    Returns:
        ``begun``, the numbers of cells that were begun once, twice, and so on; ``at_a_cell``, of
        kills; ``ended``, how often a cell was computed to its end at most, one that a worker ended
        just before its kill left out; ``unasked``, the number of times that a cell was begun again
        without a kill at it before.
    """
    lines = [[*map(str.strip, log.splitlines())] for log in logs]
    begun = Counter(line for log in lines for line in log if MARK in line)
    last = [log.splitlines()[-1].strip() for log in killed if log.strip()]
    cut = Counter(line for line in last if MARK in line)
    often = Counter(begun.values())
    return {
        "begun": [often[times] for times in range(1, max(often, default=0) + 1)],
        "at_a_cell": cut.total(),
        "ended": max((begun - cut).values(), default=0),
        "unasked": sum(max(0, times - 1 - cut[cell]) for cell, times in begun.items()),
    }


def on_lossy_cluster(cells: Sequence[Cell], chance: random.Random) -> dict[str, Any]:
    """Run trainings on a cluster of which a machine is killed in the middle.

    The moment: at least a third of the trainings is finished, and every machine is at one that has
    a checkpoint of an epoch.

    Args:
        cells: the trainings.
        chance: draws the machine; the one that the cluster's head is on stays.

    Returns:
        ``finished``, the number of trainings that were finished at that moment.

    Raises:
        InputError: there was no such moment.
    """
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # else any other work delays its cells
    cluster, found = Cluster(initialize_head=True), dict[str, Any]()
    machines, over = [cluster.add_node() for _ in range(MACHINES - 1)], threading.Event()

    def lose() -> None:
        while not over.wait(0.1):
            ended = [cell for cell in cells if cell.finished]
            at_work = [one for one in cells if one.folder.exists() and not one.finished]
            saved = [one for one in at_work if any(one.folder.glob("checkpoints/step_*[1-9]*"))]
            if 3 * len(ended) >= len(cells) and len(saved) == len(at_work) == MACHINES:
                cluster.remove_node(chance.choice(machines), allow_graceful=False)
                found["finished"] = len(ended)
                return

    killer = threading.Thread(target=lose)
    killer.start()
    try:
        run_cells(cells, Ray(cluster.address, 0, 1), MACHINES)
    finally:
        over.set()
        killer.join()
        cluster.shutdown()  # type: ignore[no-untyped-call]
    if not found:
        raise InputError("no machine was killed: all had no checkpoint at a time, try more --cells")
    return found


def starts(folder: Path) -> Counter[int]:
    """The steps from which processes went on with a run: its event file says at which next one."""
    return Counter(
        event.step - 1
        for path in folder.glob("events.*")
        for event in EventFileLoader(str(path)).Load()
        if event.session_log.status == SessionLog.START
    )


main = Kills.main

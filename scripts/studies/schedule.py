"""How long would it take on a cluster? Counted passes, an assumed GPU, simulated failures.

    python scripts/study.py schedule --seeds 200
    python scripts/study.py schedule --seeds 200 --fp32 60 --failure-hours 1 --out runs/results

Nothing is measured: the passes are counted ones, what a GPU does in a second is assumed, and the
schedule is simulated, with a machine that fails now and then. There are two plans. Ten thousand
CIFAR-10 images under AutoAttack standard for a WRN-34-10 on 64 GPUs, by batch size: workers share
one folder, as `evaluate.py` has it. And the study `compare`, 23 games by 5 seeds of PreActResNet-18
with an evaluation of each, on 32 GPUs: a cell is a process on a GPU.

A seed draws the failures, and which images stand. Writes `<out>/schedule.json` and `.md`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from plans.schedule import Cluster, Piece, Played, autoattack, simulate, training
from typing_extensions import override

from advgame.errors import InputError
from advgame.run import table
from advgame.run.files import read_json
from advgame.run.options import Count, NotNegative, Positive
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs
from advgame.seeding import derive_seed

GFLOP = {"wrn-34-10": 13.318, "preact_resnet18": 1.111}
"""Of a forward of a 32x32 image: two per multiplication, convolutions and matrix products."""
STANDING = {"clean": 0.86, "apgd-ce": 0.58, "apgd-t": 0.54}
"""Share of images that are right, and that still stand: about what the best L∞ 8/255 classifiers
of this size reach without more data (assumed)."""
LEFT_OUT = "feature-scatter-repo"  # a variant of another game
EPOCHS, TRAINED, VALIDATED, JUDGED, SEEDS = 30, 49_000, 1_000, 1000, 5
VALIDATION = 24  # forwards' worth of clean, FGSM and PGD-10
CONTROL, FREE = "pgd-at", "free"
COMPARE, SORTED = "compare, 23 games x 5 seeds", ", long ones first"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Predict the time of two plans on a cluster."""

    batches: tuple[Count, ...] = (500, 125, 50, 25)
    """images of a piece of the evaluation"""
    fp32: Positive = 40.0
    """assumed: what a GPU does in evaluations, TFLOP/s without TF32"""
    bf16: Positive = 60.0
    """assumed: what it does in trainings"""
    half: NotNegative = 8.0
    """assumed: images at a time at which it reaches half of that"""
    start: NotNegative = 40.0
    """assumed: seconds until a process has imported, loaded, and made its first pass"""
    failure_hours: Positive = 6.0
    """a machine of the cluster fails so often, on average"""
    notice: NotNegative = 120.0
    """seconds until others take over: the lease of a claim; assumed also of Ray and SLURM"""
    repair: NotNegative = 1800.0
    """assumed: seconds until a machine that failed is back"""
    counted: str = "results/compare/digits-epochs.json"
    """whose runs say what a step of each game costs"""
    seeds: Count = 200
    jobs: Count = 1
    runs_dir: str = ""
    out: str = "results/cluster"


class Schedule(Study[Config]):
    """Plans as rows, simulations as seeds."""

    about, files, ending = (
        "Two plans on a cluster, simulated",
        "schedule",
        ("Command: `{command}`.",),
    )
    parallel = remembers = False

    @override
    def check(self) -> None:
        super().check()
        if not self.config.batches:
            raise InputError("--batches names no size")

    def cells(self) -> dict[str, dict[str, Any]]:
        """A simulation per plan and seed."""
        return {
            f"{plan}-seed{seed}": {"method": plan, "seed": seed}
            for plan in self.clusters
            for seed in self.seeds()
        }

    @cached_property
    def clusters(self) -> dict[str, Cluster]:
        """Plan -> what it runs on."""
        config = self.config
        workers = Cluster(
            64,
            start=config.start,
            each=1.0,
            failure=3600 * config.failure_hours,
            notice=config.notice,
            repair=config.repair,
        )
        found = {f"AutoAttack, batches of {size}": workers for size in config.batches}
        study = replace(workers, gpus=32, start=0.0, each=config.start)
        return {**found, COMPARE: study, f"{COMPARE}{SORTED}": study}

    @cached_property
    def passes(self) -> dict[str, float]:
        """Game -> forwards' worth of a step, per image."""
        found: dict[str, list[float]] = {}
        for run in read_json(Path(self.config.counted))["runs"]:
            found.setdefault(run["method"], []).append(run["forwards_per_image"])
        return {game: mean(each) for game, each in found.items() if game != LEFT_OUT}

    def pieces(self, plan: str, seed: int) -> list[Piece]:
        """The work of a plan; the seed draws which images stand."""
        config, rng = self.config, random.Random(derive_seed(seed, f"images of {plan}"))
        if plan.startswith(COMPARE):
            return self.comparison(rng, longest_first=plan.endswith(SORTED))
        size, second = int(plan.split()[-1]), GFLOP["wrn-34-10"] / (1e3 * config.fp32)
        return autoattack(10_000, size, STANDING, second, config.half, rng)

    def comparison(self, rng: random.Random, *, longest_first: bool) -> list[Piece]:
        """The surrogate, then trainings, each with its evaluation after it."""
        config, flop = self.config, GFLOP["preact_resnet18"] / 1e3
        train = flop / config.bf16 * (1 + config.half / 128)
        judge = flop / config.fp32

        def trained(game: str) -> Piece:
            epochs = max(1, EPOCHS // 8) if game == FREE else EPOCHS
            images = TRAINED + VALIDATED * VALIDATION / self.passes[game]
            return training(epochs, round(images), self.passes[game], train)

        trainings = [trained(game) for _ in range(SEEDS) for game in self.passes]
        if longest_first:
            trainings.sort(key=lambda piece: -piece.seconds)
        found = [trained(CONTROL)]
        for one in trainings:
            batches = autoattack(JUDGED, 500, STANDING, judge, config.half, rng)
            parts = [part for batch in batches for part in batch.parts]
            found += [one, Piece(parts, (0, len(found)))]
        return found

    @override
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        yield [self.told(**cell) for cell in cells.values() if not self.config.finished_only]

    def told(self, method: str, seed: int) -> Run:
        """What a simulation of a plan with failures comes to."""
        pieces, cluster = self.pieces(method, seed), self.clusters[method]
        played = simulate(pieces, cluster, derive_seed(seed, f"failures of {method}"))
        return {"method": method, "seed": seed, **rounded(played)}

    def facts(self) -> dict[str, Any]:
        """What was assumed, and what the plans come to where nothing fails."""
        own = asdict(self.config)
        names = ("fp32", "bf16", "half", "start", "failure_hours", "notice", "repair", "counted")
        plans = {}
        for plan, cluster in self.clusters.items():
            pieces = self.pieces(plan, 0)
            work = sum(piece.seconds for piece in pieces)
            sound = simulate(pieces, Cluster(cluster.gpus, start=cluster.start, each=cluster.each))
            plans[plan] = {
                **{"gpus": cluster.gpus, "pieces": len(pieces), "gpu_hours": round(work / 3600, 3)},
                **{"longest": round(max(piece.seconds for piece in pieces), 1), **rounded(sound)},
            }
        return {"assumed": {name: own[name] for name in names}, "plans": plans}

    @override
    def place(self, run: Run) -> Any:
        return [*self.clusters, run["method"]].index(run["method"])

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """A line per plan, and all that is assumed."""
        lines = []
        for plan, sound in about["plans"].items():
            mine = [run for run in runs if run["method"] == plan]
            minutes = [run["seconds"] / 60 for run in mine]
            cuts = quantiles(minutes, n=20, method="inclusive") if len(mine) > 1 else 20 * minutes
            lines.append(
                [
                    *(plan, f"{sound['gpus']}", f"{sound['pieces']}", f"{sound['gpu_hours']:.1f}"),
                    f"{sound['longest'] / 60:.1f}",
                    *(f"{sound['seconds'] / 60:.1f}", f"{100 * sound['efficiency']:.0f}"),
                    f"{mean(minutes):.1f} ({cuts[0]:.1f} – {cuts[-1]:.1f})",
                    f"{100 * mean(run['efficiency'] for run in mine):.0f}",
                    f"{mean(run['failures'] > 0 for run in mine):.2f}",
                    f"{mean(run['lost'] for run in mine) / 3600:.2f}",
                ]
            )
        said = about["assumed"]
        head = ["plan", "GPUs", "pieces", "GPU-hours of work", "longest piece, min"]
        head += ["minutes, nothing fails", "efficiency, %", "minutes (5 – 95 %)", "efficiency, %"]
        head += ["runs with a failure", "GPU-hours done again"]
        return [
            f"# {self.title}",
            "Nothing here is measured. Efficiency is the work's GPU-seconds over those of all GPUs "
            f"until the last piece is done. The right half is the mean over {table_seeds(runs)} "
            f"simulations in which a machine of 8 GPUs fails every {said['failure_hours']:g} hours "
            f"on average, is missed after {said['notice']:g} s and back after "
            f"{said['repair']:g} s.",
            table.markdown(head, lines),
            f"Assumed of a GPU: {said['fp32']:g} TFLOP/s in fp32, {said['bf16']:g} in bf16, half "
            f"of it with {said['half']:g} images at a time; {said['start']:g} s to start a "
            "process. Assumed of the classifiers: "
            + ", ".join(f"{name} {100 * share:.0f} %" for name, share in STANDING.items())
            + " of the images stand. Counted: an image that survives costs AutoAttack 1,900 input "
            "gradients and 7,900 forwards; what a step of each game costs is that of "
            f"`{said['counted']}`. A gradient costs a forward. A forward is "
            + " and ".join(f"{value:g} GFLOP ({name})" for name, value in GFLOP.items())
            + ".",
            f"The study trains {EPOCHS} epochs of {TRAINED:,} images, a checkpoint after each, "
            f"and judges {JUDGED:,} images by AutoAttack alone. An attack that is cut off begins "
            "again, an attack that had ended on a batch does not.",
        ]


def table_seeds(runs: Runs) -> int:
    """How many simulations each plan has."""
    return len({run["seed"] for run in runs})


def rounded(played: Played) -> dict[str, Any]:
    """A simulation's outcome as the results file holds it."""
    return {
        "seconds": round(played.seconds, 1),
        "efficiency": round(played.efficiency, 4),
        "failures": played.failures,
        "lost": round(played.lost, 1),
    }


main = Schedule.main

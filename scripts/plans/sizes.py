"""The steps of the GPU plan in order, and their sizes on a GPU and in a rehearsal; no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from plans.running import Facts, Step, Work


@dataclass(frozen=True)
class Plan:
    """Sizes of the plan.

    Args:
        network: classifier of the throughput table.
        shape: of its images.
        eps: radius of the ball.
        batch: images at a time there.
        repeats: turns that count.
        matrix: side of the matrices that are multiplied.
        training: options of every training.
        speedruns: seconds up to which a recipe is taken -> its options, shortest first.
        limits: seconds that the speedruns may train.
        images: test images that are judged.
        attack: that judges them.
        part: of the images, judged together.
        start: seconds that a training takes to begin and to end, guessed.
        tests: seconds that the tests may take.
        epochs: of a speedrun at most, however many fit.
    """

    network: str
    shape: tuple[int, int, int]
    eps: float
    batch: int
    repeats: int
    matrix: int
    training: str
    speedruns: Mapping[float, str]
    limits: tuple[float, ...]
    images: int
    attack: str = "autoattack"
    part: int = 250
    start: float = 45
    tests: float = 120
    epochs: int = 1000


FULL = Plan(
    network="preact_resnet18",
    shape=(3, 32, 32),
    eps=8 / 255,
    batch=512,
    repeats=15,
    matrix=8192,
    training="--dataset cifar10 --model preact_resnet18 --batch-size 512 --lr 0.3 --ema 0.995",
    speedruns={
        120: "--game n-fgsm",
        math.inf: "--game pgd-at --attack-steps 5 --step-size 0.4 --awp 0.005",
    },
    limits=(60, 290),
    images=1000,
)
"""For a GPU. The recipes are not tuned: N-FGSM has the cheapest step that does not overfit
catastrophically in its paper; in more time PGD and AWP give more (their papers), and cost four
times as much."""
MINIATURE = Plan(
    network="small_cnn",
    shape=(1, 8, 8),
    eps=0.15,
    batch=16,
    repeats=1,
    matrix=128,
    training="--dataset digits --train-n 96 --batch-size 32 --ema 0.9",
    speedruns={
        60: "--game n-fgsm",
        math.inf: "--game pgd-at --attack-steps 2 --step-size 0.5 --awp 0.005",
    },
    limits=(60, 120),
    images=8,
    attack="autoattack-lite",
    part=4,
    start=0,
    tests=600,
    epochs=5,
)
"""The same in a minute on a CPU: a rehearsal, of which no number means anything."""
COLOUR = "--dataset cifar10 --model lean_resnet --train-n 96 --batch-size 32 --ema 0.9"
"""Options of the rehearsal's trainings where CIFAR-10 was carried."""


def steps(plan: Plan) -> list[Step]:
    """All steps in order; a classifier is judged after it has been trained."""
    least, most = min(10, plan.start), 3 * plan.start or plan.tests
    found = [
        Step("data", _do("restore_images"), least, most),
        Step("environment", _do("environment"), least, most),
        Step("tests", _do("tests"), least, plan.tests),
        Step("pgd", _do("pgd"), least, most, ("environment",)),
        Step("attack-env", _do("attack_env"), least, most, ("environment",)),
        Step("n-fgsm", _do("n_fgsm"), least, most, ("data", "environment")),
        Step("las", _do("las"), least, most, ("data", "environment")),
    ]
    for limit in plan.limits:
        name = f"speedrun-{limit:g}"
        longest = 1.2 * limit + most + 60
        found.append(Step(name, _do("speedrun", limit), limit + plan.start, longest, ("data",)))
        found.append(Step(f"judge-{limit:g}", _do("judge", name), least, math.inf, (name,)))
    return found


def _do(name: str, *given: Any) -> functools.partial[Facts]:
    """A function of `plans.steps`, which is imported where it is called: it takes torch."""
    return functools.partial(_call, name, *given)


def _call(name: str, *given: Any) -> Facts:
    *settings, work = given
    assert isinstance(work, Work)
    found: Facts = getattr(import_module("plans.steps"), name)(*settings, work)
    return found

"""How steady an imitator is after it has learned: what a run's evaluations say, by fixed rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import mean, median
from typing import Any

from advgame.errors import InputError
from advgame.statistics import permutation_test

REACHED, DIP, DROP = 0.95, 0.90, 0.70
IN_A_ROW = 5  # evaluations of 0.95 or more, after which a run has settled


def score(true_return: float, random: float, expert: float) -> float:
    """0 is the random policy's mean return, 1 the expert's.

    Raises:
        InputError: an expert that is no better than chance.
    """
    if expert <= random:
        raise InputError(f"the expert's return {expert} is not above the random policy's {random}")
    return (true_return - random) / (expert - random)


@dataclass(frozen=True)
class Stability:
    """One run's evaluations after it first reached 0.95; None where it never did.

    Args:
        first: iteration of the first evaluation with a score of 0.95 or more.
        after: number of evaluations after that one.
        dips: share of them below 0.90.
        drops: times that the score fell below 0.70, coming from above.
        worst: lowest score among them.
        settled: iteration of the fifth evaluation in a row with 0.95 or more. A single one may
            be luck, early on, and what follows it is learning and no fall.
        settled_dips: share of the evaluations after that which are below 0.90.
        last: mean score over the evaluations of the last 50 iterations, whether or not the run
            ever reached 0.95.
        best: highest score of the run.
    """

    first: int | None
    after: int
    dips: float | None
    drops: int | None
    worst: float | None
    settled: int | None
    settled_dips: float | None
    last: float
    best: float


def stability(iterations: Sequence[int], scores: Sequence[float]) -> Stability:
    """Judge one run.

    Args:
        iterations: of the evaluations, increasing.
        scores: of the same length, see `score`.

    Raises:
        InputError: nothing to judge, or lists that do not fit together.
    """
    if not scores or len(scores) != len(iterations):
        raise InputError("stability needs one score per evaluation, and at least one")
    start = next((i for i, one in enumerate(scores) if one >= REACHED), None)
    recent = [s for i, s in zip(iterations, scores, strict=True) if i > iterations[-1] - 50]
    last, best = mean(recent), max(scores)
    if start is None:
        return Stability(None, 0, None, None, None, None, None, last, best)
    later = list(scores[start + 1 :])
    before = list(scores[start:-1])
    windows = range(IN_A_ROW, len(scores) + 1)
    settled = next((i for i in windows if min(scores[i - IN_A_ROW : i]) >= REACHED), None)
    rest = [] if settled is None else scores[settled:]
    return Stability(
        first=iterations[start],
        after=len(later),
        dips=mean(one < DIP for one in later) if later else None,
        drops=sum(now < DROP <= was for was, now in zip(before, later, strict=True)),
        worst=min(later) if later else None,
        settled=None if settled is None else iterations[settled - 1],
        settled_dips=mean(one < DIP for one in rest) if rest else None,
        last=last,
        best=best,
    )


def judged(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with what its scores say, where it does not say so itself.

    Scores of earlier files are rounded to three digits, which can cross a threshold.

    Args:
        run: ``scores``, and ``every``, the iterations from one to the next.
    """
    steps = [run["every"] * (k + 1) for k in range(len(run["scores"]))]
    return {**asdict(stability(steps, run["scores"])), **run}


def as_rows(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """A row per evaluation: ``iteration``, ``score``, and the run's ``curves`` where it has any."""
    columns = {"score": run["scores"], **run.get("curves", {})}
    return [
        {"iteration": run["every"] * (k + 1), **{tag: one[k] for tag, one in columns.items()}}
        for k in range(len(run["scores"]))
    ]


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Over the seeds of each method.

    Args:
        results: a run each: ``method``, ``iterations``, ``diverged`` and `Stability`'s fields.

    Returns:
        method -> numbers; a run that never reached 0.95 counts as below 0.90 throughout.
    """
    summary = {}
    for method in dict.fromkeys(r["method"] for r in results):
        mine = [r for r in results if r["method"] == method]
        reached = [r for r in mine if r["first"] is not None]
        summary[method] = {
            "seeds": len(mine),
            "iterations": max(r["iterations"] for r in mine),
            "reached": len(reached),
            "diverged": sum(r["diverged"] is not None for r in mine),
            "first": median(r["first"] for r in reached) if reached else None,
            "dips": [1.0 if r["dips"] is None else r["dips"] for r in mine],
            "drops": [r["drops"] for r in mine],
            "settled": sum(r["settled"] is not None for r in mine),
            "settled_dips": [r["settled_dips"] for r in mine],
            "worst": min((r["worst"] for r in reached if r["worst"] is not None), default=None),
            "last": [r["last"] for r in mine],
            "best": [r["best"] for r in mine],
        }
    return summary


def pairwise(
    summary: Mapping[str, Mapping[str, Any]], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Is the difference between two methods more than that between seeds?

    Args:
        summary: of `summarise`.
        methods: those to compare; left out where they have fewer than three seeds.

    Returns:
        a permutation test per pair: p for the share below 0.90 and for the last 50 iterations.
    """
    enough = [m for m in summary if summary[m]["seeds"] >= 3 and m in methods]
    return [
        {
            "pair": [one, other],
            "dips": permutation_test(summary[one]["dips"], summary[other]["dips"]),
            "last": permutation_test(summary[one]["last"], summary[other]["last"]),
        }
        for one, other in combinations(enough, 2)
    ]

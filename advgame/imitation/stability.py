"""How steady an imitator is after it has learned: what a run's evaluations say, by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, median
from typing import Any

from advgame.errors import InputError
from advgame.statistics import difference_interval, permutation_test

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


def stability(iterations: Sequence[int], scores: Sequence[float]) -> dict[str, Any]:
    """Judge one run's evaluations after it first reached 0.95.

    Args:
        iterations: of the evaluations, increasing.
        scores: of the same length, see `score`.

    Returns:
        ``first``: iteration of the first evaluation with a score of 0.95 or more;
        ``after``: number of evaluations after that one, ``dips``: share of them below 0.90,
        ``drops``: times that the score fell below 0.70, coming from above, ``worst``: the lowest;
        ``settled``: iteration of the fifth evaluation in a row with 0.95 or more (a single one may
        be luck, early on, and what follows it is learning and no fall), ``settled_dips``: share
        of the evaluations after that which are below 0.90; ``last``: mean score over the
        evaluations of the last 50 iterations, ``best``: the highest score, both whether or not the
        run ever reached 0.95. Others are None where it never did.

    Raises:
        InputError: nothing to judge, or lists that do not fit together.
    """
    if not scores or len(scores) != len(iterations):
        raise InputError("stability needs one score per evaluation, and at least one")
    recent = [s for i, s in zip(iterations, scores, strict=True) if i > iterations[-1] - 50]
    nothing = dict.fromkeys(("first", "dips", "drops", "worst", "settled", "settled_dips"))
    found: dict[str, Any] = {**nothing, "after": 0, "last": mean(recent), "best": max(scores)}
    start = next((i for i, one in enumerate(scores) if one >= REACHED), None)
    if start is None:
        return found
    before, later = scores[start:-1], scores[start + 1 :]
    found |= {"first": iterations[start], "after": len(later)}
    found["drops"] = sum(now < DROP <= was for was, now in zip(before, later, strict=True))
    if later:
        found |= {"dips": mean(one < DIP for one in later), "worst": min(later)}
    windows = range(IN_A_ROW, len(scores) + 1)
    settled = next((i for i in windows if min(scores[i - IN_A_ROW : i]) >= REACHED), None)
    if settled is not None:
        found["settled"] = iterations[settled - 1]
        if rest := scores[settled:]:
            found["settled_dips"] = mean(one < DIP for one in rest)
    return found


def with_stability(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with what its scores say, where it does not say so itself.

    Scores of earlier files are rounded to three digits, which can cross a threshold.

    Args:
        run: ``scores``, and ``every``, the iterations from one to the next.
    """
    steps = [run["every"] * (k + 1) for k in range(len(run["scores"]))]
    return {**stability(steps, run["scores"]), **run}


def as_rows(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """A row per evaluation: ``iteration``, ``score``, and the run's ``curves`` where it has any."""
    columns = {"score": run["scores"], **run.get("curves", {})}
    return [
        {"iteration": run["every"] * (k + 1), **{tag: one[k] for tag, one in columns.items()}}
        for k in range(len(run["scores"]))
    ]


def below(run: Mapping[str, Any], evaluations: int | None = None) -> float:
    """Share of evaluations below 0.90 after a run first reached 0.95; 1 where it never did.

    A run that diverged counts as below 0.90 from there to its end. One that first reaches 0.95 at
    its last evaluation has none after it, and no dip.

    Args:
        run: ``every``, ``scores``, ``diverged``, ``dips``, and ``asked``, how many iterations it
            was to have (the ``iterations`` that it had where it does not say).
        evaluations: look at the first of them only; all when None.
    """
    if evaluations is None and run["diverged"] is None and run["dips"] is not None:
        return float(run["dips"])  # of scores that are not rounded
    missing = 0
    if run["diverged"] is not None:
        missing = max(1, _asked(run) // max(1, run["every"]) - len(run["scores"]))
    scores = [*run["scores"], *[-math.inf] * missing][:evaluations]
    start = next((i for i, one in enumerate(scores) if one >= REACHED), None)
    if start is None:
        return 1.0
    later = scores[start + 1 :]
    return mean(one < DIP for one in later) if later else 0.0


def _asked(run: Mapping[str, Any]) -> int:
    """How many iterations a run was to have, as far as is known."""
    asked: int = run.get("asked", run["iterations"])
    return asked


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Over the seeds of each method.

    Args:
        results: a run each: ``method``, ``iterations``, what `stability` says, and what `below`
            asks for.

    Returns:
        method -> numbers; ``dips`` is `below`.
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
            "dips": [below(r) for r in mine],
            "drops": [r["drops"] for r in mine],
            "settled": sum(r["settled"] is not None for r in mine),
            "settled_dips": [r["settled_dips"] for r in mine],
            "worst": min((r["worst"] for r in reached if r["worst"] is not None), default=None),
            "last": [r["last"] for r in mine],
            "best": [r["best"] for r in mine],
        }
    return summary


def pairwise(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Is the difference between two methods more than that between seeds?

    Dips are not spread evenly over a run, so both methods are looked at for as long as the shorter
    of them was to run.

    Args:
        results: as of `summarise`.
        methods: those to compare; left out where they have fewer than three seeds, or the shorter
            has no evaluation.

    Returns:
        per pair the number of ``iterations`` that are compared, the mean shares below 0.90 there,
        the 95 % interval of the second's less the first's, and permutation tests: p of these
        shares, of the falls where both methods had all their runs for as long and all arrived,
        and of the mean score of the last 50 iterations.
    """
    runs = {m: [r for r in results if r["method"] == m] for m in methods}
    found = []
    for one, other in combinations([m for m in runs if len(runs[m]) >= 3], 2):
        both = (runs[one], runs[other])
        length = min(max(_asked(r) for r in side) for side in both)
        if any(length < r["every"] for side in both for r in side):
            continue
        shares = [
            [below(r, length // r["every"] if _asked(r) > length else None) for r in side]
            for side in both
        ]
        last = [[r["last"] for r in side] for side in both]
        whole = all(_asked(r) == length and r["drops"] is not None for s in both for r in s)
        falls = [[float(r["drops"]) for r in side] for side in both] if whole else None
        found.append(
            {
                "pair": [one, other],
                "iterations": length,
                "shares": [mean(side) for side in shares],
                "interval": difference_interval(*shares),
                "dips": permutation_test(*shares),
                "falls": permutation_test(*falls) if falls else None,
                "last": permutation_test(*last),
            }
        )
    return found

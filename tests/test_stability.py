"""Stability of an imitator: runs judged by hand, who settles, who falls, lucky evaluations."""

import pytest
from scipy import stats

from advgame.errors import InputError
from advgame.imitation.stability import (
    as_rows,
    below,
    pairwise,
    score,
    stability,
    summarise,
    with_stability,
)
from advgame.statistics import permutation_test


def test_scores_run_from_chance_to_the_expert():
    assert score(-200, random=-200, expert=-100) == 0
    assert score(-105, random=-200, expert=-100) == pytest.approx(0.95)
    with pytest.raises(InputError, match="not above"):
        score(1, random=2, expert=2)


NEVER = dict.fromkeys(("first", "dips", "drops", "worst", "settled", "settled_dips"))


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        (  # not after: the evaluation at 30; falls: 0.96 -> 0.6, 0.92 -> 0.69, not 0.6 -> 0.65
            [0.2, 0.5, 0.96, 0.6, 0.65, 0.92, 0.69, 1.0],
            {"first": 30, "after": 5, "dips": 3 / 5, "drops": 2, "worst": 0.6, "best": 1.0}
            | {"last": (0.6 + 0.65 + 0.92 + 0.69 + 1.0) / 5, "settled": None},
        ),
        ([0.1, 0.94], {**NEVER, "after": 0, "last": 0.52, "best": 0.94}),
        ([0.1, 0.97], {**NEVER, "first": 20, "after": 0, "drops": 0, "last": 0.535, "best": 0.97}),
    ],
)
def test_a_run_by_hand(scores, wanted):
    found = stability([10 * (k + 1) for k in range(len(scores))], scores)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)


def test_a_lucky_evaluation_is_not_settling():
    scores = [0.96, 0.2, 0.5, *[1.0] * 4, 0.95, 0.94, 0.5, 0.96, 1.0]
    found = stability([10 * (k + 1) for k in range(len(scores))], scores)
    assert found["first"] == 10
    assert found["dips"] == pytest.approx(3 / 11)
    assert found["settled"] == 80  # the fifth in a row
    assert found["settled_dips"] == pytest.approx(1 / 4)
    assert stability([10, 20, 30, 40], [1.0] * 4)["settled"] is None
    assert stability([10, 20, 30, 40, 50], [1.0] * 5)["settled_dips"] is None


def test_a_run_of_an_older_file_is_judged_by_its_rounded_scores():
    assert with_stability({"every": 10, "scores": [0.96, 0.97]})["first"] == 10
    assert with_stability({"every": 10, "scores": [0.96, 0.97], "first": 20})["first"] == 20


def run_of(method, seed, scores, **more):
    run = {"method": method, "seed": seed, "every": 10, "scores": scores, "diverged": None}
    return with_stability({**run, "iterations": 10 * len(scores), **more})


def test_a_run_that_diverges_is_not_steady():
    """It reached 0.95 at 20, stayed for two evaluations, and had six more to come."""
    calm = {"scores": [0.2, 0.96, 1.0, 1.0], "asked": 100}
    died = run_of("a", 0, **calm, diverged={"iteration": 43})
    assert below(run_of("a", 0, **calm)) == 0
    assert below(died) == pytest.approx(6 / 8)
    assert below(died, 3) == 0
    assert below(died, 5) == pytest.approx(1 / 3)
    assert below(run_of("a", 0, [0.5], diverged={"iteration": 12})) == 1
    assert summarise([died])["a"]["dips"] == [pytest.approx(6 / 8)]


def test_who_arrives_last_has_no_dip_and_who_never_arrives_all():
    found = summarise([run_of("a", 0, [0.1, 0.97]), run_of("a", 1, [0.1, 0.9])])["a"]
    assert found["dips"] == [0.0, 1.0]


def test_pairs_are_compared_for_as_long_as_the_shorter_ran():
    """Equal in the first 60 iterations; after that the longer one has no dip any more."""
    early = [1.0, 0.5, 1.0, 0.5, 1.0, 1.0]
    long = [run_of("long", seed, early + [1.0] * 40) for seed in range(3)]
    short = [run_of("short", seed, early) for seed in range(3)]
    few = [run_of("few", seed, early) for seed in range(2)]
    (test,) = pairwise([*long, *short, *few], ("long", "short", "few", "absent"))
    assert (test["pair"], test["iterations"]) == (["long", "short"], 60)
    assert test["shares"] == [pytest.approx(2 / 5)] * 2
    assert test["dips"] == 1
    late = {"scores": early[:4], "diverged": {"iteration": 45}, "asked": 3000}
    died = [run_of("died", seed, **late) for seed in range(3)]
    (test,) = pairwise([*died, *short], ("died", "short"))  # two of the five are missing: below
    assert test["shares"] == [pytest.approx(4 / 5), pytest.approx(2 / 5)]
    at_once = [run_of("died", s, [0.1], diverged={"iteration": 5}, iterations=5) for s in range(3)]
    assert pairwise([*at_once, *short], ("died", "short")) == [], "nothing to compare"
    assert below(run_of("a", 0, [0.1], every=0, diverged={"iteration": 0})) == 1


def test_a_run_as_rows():
    run = {"every": 10, "scores": [0.5, 1.0], "curves": {"norm": [3.0, 4.0]}}
    assert as_rows(run) == [
        {"iteration": 10, "score": 0.5, "norm": 3.0},
        {"iteration": 20, "score": 1.0, "norm": 4.0},
    ]


def test_nothing_to_judge():
    with pytest.raises(InputError, match="at least one"):
        stability([], [])
    with pytest.raises(InputError, match="one score per evaluation"):
        stability([10], [1.0, 2.0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]),
        ([0.1, 0.2, 0.4], [0.15, 0.3, 0.05, 0.6]),
        ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0]),
    ],
)
def test_permutation_test_is_scipys(first, second):
    def gap(a, b):
        return abs(sum(a) / len(a) - sum(b) / len(b))

    peer = stats.permutation_test(
        (first, second), gap, alternative="greater", n_resamples=10**6, vectorized=False
    )
    assert permutation_test(first, second) == pytest.approx(peer.pvalue)


def test_permutation_test_limits():
    assert permutation_test([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert permutation_test([1, 1], [1, 1]) == 1
    with pytest.raises(InputError, match="two groups"):
        permutation_test([], [1])

"""Statistics of results: intervals over seeds and images, sign tests, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from statistics import mean, stdev

import numpy as np
from scipy.stats import binomtest, norm, ttest_ind
from scipy.stats import t as student_t
from torch import Tensor

from advgame.errors import InputError


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and half of the 95 % t-interval of the mean.

    One value has neither: both are NaN.
    """
    if len(values) < 2:
        return {"mean": mean(values), "sd": float("nan"), "half_interval": float("nan")}
    sd = stdev(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return {"mean": mean(values), "sd": sd, "half_interval": half}


def beats(stronger: Tensor, weaker: Tensor) -> bool:
    """Whether one attack breaks more images than another beyond chance.

    Args:
        stronger: (N,), which images survive the attack that is said to be stronger: bool, or with
            what probability.
        weaker: the same of the other.

    Returns:
        True where a one-sided sign test over the images that one of them does more to has
        p < 0.01.
    """
    mine, other = int((stronger < weaker).sum()), int((weaker < stronger).sum())
    if mine <= other:
        return False
    return float(binomtest(mine, mine + other, alternative="greater").pvalue) < 0.01


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of ``n`` independent images (Wilson 1927)."""
    z = float(norm.ppf(0.975))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    # at shares of 0 and 1 the near end is the share itself, up to rounding
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def paired_interval(differences: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences of 0 and 1, each -1, 0 or 1.

    Half an image is added to each of the four cells of the paired table: where no image differs
    the interval still has a width, about 1.96 / n to either side.

    Args:
        differences: (n,), finite.

    Raises:
        InputError: no difference.

    Source: Agresti & Min 2005, Simple improved confidence intervals for comparing matched
    proportions.
    """
    if not len(differences):
        raise InputError("an interval needs one pair or more")
    n, up, down = len(differences) + 2, int((differences > 0).sum()), int((differences < 0).sum())
    centre = (up - down) / n
    half = float(norm.ppf(0.975)) * (up + down + 1 - (up - down) ** 2 / n) ** 0.5 / n
    middle = (up - down) / len(differences)  # near 1 and -1 it may lie outside, by rounding
    return max(-1.0, min(middle, centre - half)), min(1.0, max(middle, centre + half))


def difference_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of ``second`` less that of ``first``, unpaired (Welch 1947).

    Args:
        first: values of one method, two or more, one per seed.
        second: of the other.

    Returns:
        low and high; both are the difference itself where neither method varies.
    """
    gap = mean(second) - mean(first)
    if not stdev(first) + stdev(second):
        return gap, gap
    found = ttest_ind(list(second), list(first), equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


def permutation_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value for a difference of means, over all ways to share out the values.

    Exact: of two groups of 5 there are 252 ways, so that p is never below 2/252 = 0.008.

    Args:
        first: values of one method, one per seed.
        second: of the other.

    Raises:
        InputError: an empty group, or more than a million ways.
    """
    values = np.array([*first, *second], float)
    if not len(first) or not len(second) or comb(len(values), len(first)) > 1_000_000:
        raise InputError("a permutation test needs two groups with at most a million ways to mix")
    total, n, m = values.sum(), len(first), len(second)
    chosen = np.array([list(one) for one in combinations(range(n + m), n)])
    sums = values[chosen].sum(1)
    gaps = np.abs(sums / n - (total - sums) / m)
    own = abs(mean(first) - mean(second))
    # ties are as extreme as what was seen, whatever the rounding
    return float((gaps >= own - 1e-9 * max(1.0, abs(total))).mean())

"""Statistics of results: intervals over seeds and images, sign tests, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from statistics import mean, stdev
from typing import TypedDict

import numpy as np
from scipy.stats import binomtest, norm, ttest_ind
from scipy.stats import t as student_t
from torch import Tensor

from advgame.errors import InputError


class Spread(TypedDict):
    """Of values over seeds; JSON writes the None of one value as ``null``, and has no NaN."""

    mean: float
    sd: float | None
    half_interval: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and half of the 95 % t-interval of the mean.

    One value has neither: both are None.
    """
    if len(values) < 2:
        return {"mean": mean(values), "sd": None, "half_interval": None}
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
    gap = weaker.double() - stronger.double()
    # a mixture's probabilities are sums of weights, of which equal ones differ in their last bits
    mine, other = int((gap > 1e-6).sum()), int((gap < -1e-6).sum())
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


def crossed_interval(differences: Tensor) -> dict[str, float]:
    """The mean of differences over seeds and images, both drawn at random, with its 95 % interval.

    A difference is that of two methods with the same seed on the same image. With S seeds, N images
    and the mean squares of the two-way table, the variance of the mean is estimated by
    (MS_seed + max(MS_image - MS_rest, 0)) / (S N), with the degrees of freedom of Satterthwaite in
    which the seeds alone count (Hillis 2007, A comparison of denominator degrees of freedom methods
    for multiple observer ROC analysis).

    Args:
        differences: (S, N), two or more of each.

    Returns:
        ``mean``, ``low``, ``high``, and ``p``, two-sided, of a mean of 0.

    Raises:
        InputError: fewer.
    """
    table = differences.double()
    if table.dim() != 2 or min(table.shape) < 2:
        raise InputError("an interval over seeds and images needs two of each")
    (seeds, images), centre = table.shape, table.mean()
    by_seed, by_image = table.mean(1, keepdim=True), table.mean(0, keepdim=True)
    rest = (table - by_seed - by_image + centre).square().sum() / ((seeds - 1) * (images - 1))
    of_seeds = images * by_seed.var()
    top = float(of_seeds + (seeds * by_image.var() - rest).clamp_min(0))
    middle, error = float(centre), (top / (seeds * images)) ** 0.5
    if not error:
        return {"mean": middle, "low": middle, "high": middle, "p": float(middle == 0)}
    freedom = (seeds - 1) * (top / float(of_seeds)) ** 2 if of_seeds else float("inf")
    half = float(student_t.ppf(0.975, freedom)) * error
    p = 2 * float(student_t.sf(abs(middle) / error, freedom))
    return {"mean": middle, "low": middle - half, "high": middle + half, "p": p}


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that all hold at once (Holm 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda one: p[one])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


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

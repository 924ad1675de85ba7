"""Numbers over seeds: spread and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from scipy.stats import t as student_t


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and half of the 95 % t-interval of the mean.

    One value has neither: both are NaN.
    """
    if len(values) < 2:
        return {"mean": mean(values), "sd": float("nan"), "half_interval": float("nan")}
    sd = stdev(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return {"mean": mean(values), "sd": sd, "half_interval": half}

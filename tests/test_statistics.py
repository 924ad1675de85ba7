"""Spread over seeds against a textbook value, paired intervals against their exact coverage."""

import math

import pytest
import torch
from scipy.stats import multinomial

from advgame.errors import InputError
from advgame.statistics import difference_interval, paired_interval, spread


def test_interval_is_students():
    """Five values with sd 1: t(0.975, 4) = 2.776 over the root of 5."""
    found = spread([1 - math.sqrt(2), 1, 1, 1, 1 + math.sqrt(2)])
    assert found["mean"] == pytest.approx(1)
    assert found["sd"] == pytest.approx(1)
    assert found["half_interval"] == pytest.approx(2.7764 / math.sqrt(5), rel=1e-4)


def test_one_value_has_no_interval():
    assert spread([3.0]) == {"mean": 3, "sd": None, "half_interval": None}


def test_a_difference_of_two_methods_is_welchs():
    """Student's sleep data: t = -1.8608 at 17.776 degrees of freedom, R's t.test."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    low, high = difference_interval(first, second)
    assert (low, high) == (pytest.approx(-0.2054832, abs=1e-6), pytest.approx(3.3654832, abs=1e-6))
    assert difference_interval([0.5, 0.5], [0.25, 0.25]) == (-0.25, -0.25)


def differences(n, up, down):
    return torch.tensor([1.0] * up + [-1.0] * down + [0.0] * (n - up - down))


@pytest.mark.parametrize(("up", "down"), [(0.03, 0.03), (0.1, 0.02), (0.4, 0.2)])
def test_a_paired_interval_covers_at_least_as_often_as_it_says(up, down):
    """All tables of 40 pairs, each by its probability. Of Wald's the second covers 0.91 only."""
    n, covered = 40, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = paired_interval(differences(n, b, c))
            held = low <= up - down <= high
            covered += held * multinomial.pmf([b, c, n - b - c], n, [up, down, 1 - up - down])
    assert 0.94 < covered < 1


def test_a_paired_interval_has_a_width_and_ends():
    low, high = paired_interval(differences(200, 0, 0))
    assert low == -high == pytest.approx(-1.96 / 202, rel=1e-3)
    assert paired_interval(differences(5, 5, 0))[1] == 1
    assert paired_interval(differences(5, 0, 5))[0] == -1
    with pytest.raises(InputError, match="one pair"):
        paired_interval(differences(0, 0, 0))
    low, high = paired_interval(differences(1600, 150, 86))
    assert (low + high) / 2 == pytest.approx(64 / 1602)
    assert (high - low) / 2 == pytest.approx(1.96 * (237 - 64**2 / 1602) ** 0.5 / 1602, rel=1e-4)

"""Spread over seeds against a textbook value."""

import math

import pytest

from advgame.statistics import spread


def test_interval_is_students():
    """Five values with sd 1: t(0.975, 4) = 2.776 over the root of 5."""
    found = spread([1 - math.sqrt(2), 1, 1, 1, 1 + math.sqrt(2)])
    assert found["mean"] == pytest.approx(1)
    assert found["sd"] == pytest.approx(1)
    assert found["half_interval"] == pytest.approx(2.7764 / math.sqrt(5), rel=1e-4)


def test_one_value_has_no_interval():
    assert math.isnan(spread([3.0])["half_interval"])

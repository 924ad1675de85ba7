"""Catastrophic overfitting: made-up series, and the curves of a validation."""

import pytest

from advgame.attacks import fgsm, pgd
from advgame.evaluation import score, validator
from advgame.evaluation.overfitting import catastrophic_overfitting
from advgame.seeding import stream
from advgame.threat import Linf


def series(pgd10, fgsm_):
    return [
        {"epoch": n, "eval/robust": p, "eval/fgsm": f, "eval/overfitting": f - p}
        for n, (p, f) in enumerate(zip(pgd10, fgsm_, strict=True), 1)
    ]


def test_a_collapse_is_found_where_it_begins():
    rows = series([0.3, 0.45, 0.44, 0.10, 0.0, 0.4], [0.35, 0.5, 0.52, 0.8, 0.9, 0.5])
    rows.insert(1, {"epoch": 1.5})  # an epoch without validation
    found = catastrophic_overfitting(rows)
    assert found == {"epoch": 4, "fgsm": 0.8, "pgd10": 0.10, "best": 0.45}


@pytest.mark.parametrize(
    ("pgd10", "fgsm_"),
    [
        ([0.3, 0.45, 0.5], [0.35, 0.5, 0.55]),  # health
        ([0.5, 0.45, 0.31], [0.55, 0.52, 0.50]),  # robust overfitting is slow and small
        ([0.5, 0.45, 0.05], [0.55, 0.5, 0.1]),  # a classifier that forgets everything
        ([0.0, 0.01, 0.0], [0.1, 0.6, 0.9]),  # never robust
        ([0.5, 0.2, 0.2], [0.75, 0.55, 0.6]),  # FGSM stood as far above it before
        ([], []),
    ],
)
def test_what_is_no_collapse(pgd10, fgsm_):
    assert catastrophic_overfitting(series(pgd10, fgsm_)) is None


def test_the_validation_has_both_attacks_and_their_difference(honest, digits):
    threat, data = Linf(0.15), digits.validation.subset(slice(80))
    found = validator(data, threat, seed=3, own=pgd(threat, 2))(honest)
    clean, robust = score(honest, data, pgd(threat, 10), stream(3, "validate"))
    assert (found["eval/clean"], found["eval/robust"]) == (clean, robust)
    assert found["eval/fgsm"] == score(honest, data, fgsm(threat), stream(3, "validate"))[1]
    own = score(honest, data, pgd(threat, 2), stream(3, "validate"))[1]
    assert found["eval/own_attacker"] == own
    assert found["eval/overfitting"] == found["eval/fgsm"] - found["eval/robust"]
    assert found["eval/fgsm"] > found["eval/robust"]

"""What chooses the weights of a run among its epochs: a score on the validation split.

A game selects by what it is for. A classifier that learns clean images is not robust in any epoch,
so that PGD-10 would choose an arbitrary early one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from advgame.run.folder import RunFolder

Criterion = Literal["clean", "robust", "own"]
Select = Literal["auto", "clean", "robust", "own"]

# the score that the loop compares, and the words of the report
SCORES: dict[Criterion, tuple[str, str]] = {
    "clean": ("eval/clean", "clean accuracy on the validation split"),
    "robust": ("eval/robust", "PGD-10 accuracy on the validation split"),
    "own": ("eval/own_attacker", "accuracy against the game's own attacker on validation images"),
}


def criterion(run: RunFolder) -> Criterion:
    """What selects a run's weights; runs that do not note it are older, and all took PGD-10."""
    found: Criterion = run.about()["config"].get("select", "robust")
    return found


def selected_by(report: Mapping[str, Any]) -> str:
    """The words of a run's report; older ones have none, and all took PGD-10."""
    return str(report.get("selected_by", SCORES["robust"][1]))

"""Catastrophic overfitting: robustness to PGD collapses while accuracy under FGSM stands or rises.

Single-step training can end so within an epoch (Wong et al. 2020): the classifier has learnt to
make the one step fail, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# of PGD-10's accuracy below its best so far; 20 points, as Wong et al. stop at
_FALL = 0.20
# of the gap to FGSM's accuracy since that best: a collapse of both is another thing
_WIDENED = 0.20


def catastrophic_overfitting(rows: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The first validation at which it shows, or None.

    It shows where PGD-10's accuracy lies more than 20 points below its best so far, and FGSM's
    accuracy is above it by 20 points more than it was at that best. A classifier that never
    resisted PGD at all has nothing to lose, and is not found.

    Args:
        rows: of metrics.csv.

    Returns:
        ``epoch``, both accuracies there, ``fgsm`` and ``pgd10``, and ``best``, PGD-10's before.
    """
    best, gap = 0.0, 0.0
    for row in (row for row in rows if "eval/fgsm" in row):
        robust, over = row["eval/robust"], row["eval/overfitting"]
        if best - robust > _FALL and over - gap > _WIDENED:
            return {
                "epoch": int(row["epoch"]),
                "fgsm": row["eval/fgsm"],
                "pgd10": robust,
                "best": best,
            }
        if robust > best:
            best, gap = robust, over
    return None

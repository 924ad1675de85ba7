"""The look of all pictures: as wide as a column, in type of 8 points, with safe colours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cycler import cycler
from matplotlib import pyplot as plt

# Okabe and Ito 2008, told apart by colour-blind readers too; grey in place of yellow
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#999999")
LINES = len(COLOURS)
"""Lines of a panel at most."""
WIDTH = 6.3
"""Inches of a page's column, so that type of 8 points is of that size there."""
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "legend.fontsize": 7,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures, within a block or a function: a column wide, in 8 points."""
    with plt.rc_context(_STYLE):
        yield

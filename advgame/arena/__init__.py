"""Classifiers against attackers, together: matrix games, and mixtures of classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.arena.matrix_games import (
        Equilibrium,
        exploitability,
        exploitability_per_image,
        solve,
        solve_per_image,
    )

__all__ = [
    "Equilibrium",
    "exploitability",
    "exploitability_per_image",
    "solve",
    "solve_per_image",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

"""Classifiers against attackers, together: matrix games, and mixtures of classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.arena.best_response import ARC, ExpectedLoss, OnMember, OnMixture, WorstOf
    from advgame.arena.judge import (
        MixtureVerdicts,
        evaluate_mixture,
        find_mixture_flags,
        judge_mixture,
    )
    from advgame.arena.matrix_games import (
        Equilibrium,
        exploitability,
        exploitability_per_image,
        solve,
        solve_per_image,
    )
    from advgame.arena.mixture import ClassifierMixture
    from advgame.arena.mixture_file import read_mixture, write_mixture
    from advgame.arena.oracles import Players, Round, psro
    from advgame.arena.population import Answering, Population
    from advgame.arena.sampling import optimal_sampling
    from advgame.arena.tournament import hold_tournament, standings

__all__ = [
    "ARC",
    "Answering",
    "ClassifierMixture",
    "Equilibrium",
    "ExpectedLoss",
    "MixtureVerdicts",
    "OnMember",
    "OnMixture",
    "Players",
    "Population",
    "Round",
    "WorstOf",
    "evaluate_mixture",
    "exploitability",
    "exploitability_per_image",
    "find_mixture_flags",
    "hold_tournament",
    "judge_mixture",
    "optimal_sampling",
    "psro",
    "read_mixture",
    "solve",
    "solve_per_image",
    "standings",
    "write_mixture",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

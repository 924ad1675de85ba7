"""Attacks on classifiers: they never change the model, and form the input gradient only."""

from advgame.attacks.attack import Attack, AttackResult, at_boundary, refusing_changes
from advgame.attacks.gradient import GradientAttack
from advgame.attacks.label_free import LabelFree, Transport, feature_scatter, kl_pgd
from advgame.attacks.modes import BatchNormMode, attacked
from advgame.attacks.named import fast, fgsm, ifgsm, mim, n_fgsm, near_pgd, pgd
from advgame.attacks.slope import Slope

__all__ = [
    "Attack",
    "AttackResult",
    "BatchNormMode",
    "GradientAttack",
    "LabelFree",
    "Slope",
    "Transport",
    "at_boundary",
    "attacked",
    "fast",
    "feature_scatter",
    "fgsm",
    "ifgsm",
    "kl_pgd",
    "mim",
    "n_fgsm",
    "near_pgd",
    "pgd",
    "refusing_changes",
]

"""Attacks on classifiers: they never change the model, and form the input gradient only."""

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.gradient import GradientAttack
from advgame.attacks.modes import BatchNormMode, attacked
from advgame.attacks.named import fgsm, ifgsm, mim, n_fgsm, pgd
from advgame.attacks.slope import Slope

__all__ = [
    "Attack",
    "AttackResult",
    "BatchNormMode",
    "GradientAttack",
    "Slope",
    "attacked",
    "fgsm",
    "ifgsm",
    "mim",
    "n_fgsm",
    "pgd",
]

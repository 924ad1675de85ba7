"""Attacks on classifiers: they never change the model, and form the input gradient only."""

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.gradient import GradientAttack, fgsm, ifgsm, pgd
from advgame.attacks.modes import BatchNormMode, attacked

__all__ = [
    "Attack",
    "AttackResult",
    "BatchNormMode",
    "GradientAttack",
    "attacked",
    "fgsm",
    "ifgsm",
    "pgd",
]

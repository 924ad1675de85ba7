"""Attacks on classifiers: they never change the model, and form the input gradient only."""

from advgame.attacks.gradient import AttackResult, GradientAttack, fgsm, ifgsm, pgd
from advgame.attacks.modes import BatchNormMode, attacked

__all__ = ["AttackResult", "BatchNormMode", "GradientAttack", "attacked", "fgsm", "ifgsm", "pgd"]

"""Attacks on classifiers: they never change the model, and form the input gradient only."""

from advgame.attacks.attack import Attack, AttackResult, at_boundary, refusing_changes
from advgame.attacks.blackbox import SPSA, EoT, Transfer
from advgame.attacks.carlini_wagner import CarliniWagnerLinf
from advgame.attacks.distributional import DistributionalAttack
from advgame.attacks.feature import FeatureAttack
from advgame.attacks.gradient import GradientAttack
from advgame.attacks.label_free import LabelFree, Transport, feature_scatter, kl_pgd
from advgame.attacks.modes import BatchNormMode, attacked
from advgame.attacks.named import fast, fgsm, ifgsm, mim, n_fgsm, near_pgd, pgd
from advgame.attacks.slope import Slope

__all__ = [
    "SPSA",
    "Attack",
    "AttackResult",
    "BatchNormMode",
    "CarliniWagnerLinf",
    "DistributionalAttack",
    "EoT",
    "FeatureAttack",
    "GradientAttack",
    "LabelFree",
    "Slope",
    "Transfer",
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

"""Attacks on classifiers: they never change the model, and form the input gradient only.

Each is imported when it is first used: ``import advgame.attacks`` alone loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.attacks.apgd import APGD
    from advgame.attacks.attack import Attack, AttackResult
    from advgame.attacks.boundary import at_boundary, attacked, refusing_changes
    from advgame.attacks.carlini_wagner import CarliniWagnerLinf
    from advgame.attacks.distributional import DistributionalAttack, Sampler
    from advgame.attacks.fab import FAB
    from advgame.attacks.feature import FeatureAttack
    from advgame.attacks.gradient import (
        GradientAttack,
        fast,
        fgsm,
        ifgsm,
        mim,
        n_fgsm,
        near_pgd,
        pgd,
    )
    from advgame.attacks.input_gradients import InputGradient, finite, input_gradient
    from advgame.attacks.label_free import LabelFree, feature_scatter, kl_pgd
    from advgame.attacks.named import by_name
    from advgame.attacks.spsa import SPSA
    from advgame.attacks.square import Square
    from advgame.attacks.stopping import Seen, StoppingRule
    from advgame.attacks.transfer import EoT, Transfer
    from advgame.choices import BatchNormMode, Transport

__all__ = [
    "APGD",
    "FAB",
    "SPSA",
    "Attack",
    "AttackResult",
    "BatchNormMode",
    "CarliniWagnerLinf",
    "DistributionalAttack",
    "EoT",
    "FeatureAttack",
    "GradientAttack",
    "InputGradient",
    "LabelFree",
    "Sampler",
    "Seen",
    "Square",
    "StoppingRule",
    "Transfer",
    "Transport",
    "at_boundary",
    "attacked",
    "by_name",
    "fast",
    "feature_scatter",
    "fgsm",
    "finite",
    "ifgsm",
    "input_gradient",
    "kl_pgd",
    "mim",
    "n_fgsm",
    "near_pgd",
    "pgd",
    "refusing_changes",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

"""Attacks on classifiers: they never change the model, and form the input gradient only.

Each is imported when it is first used: ``import advgame.attacks`` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from advgame.errors import InputError

if TYPE_CHECKING:
    from advgame.attacks.attack import Attack, AttackResult
    from advgame.attacks.boundary import BatchNormMode, at_boundary, attacked, refusing_changes
    from advgame.attacks.carlini_wagner import CarliniWagnerLinf
    from advgame.attacks.distributional import DistributionalAttack, Sampler
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
    from advgame.attacks.label_free import LabelFree, Transport, feature_scatter, kl_pgd
    from advgame.attacks.spsa import SPSA
    from advgame.attacks.transfer import EoT, Transfer
    from advgame.threat import Threat

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
    "InputGradient",
    "LabelFree",
    "Sampler",
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
_NAMES = {
    "attack": "Attack AttackResult",
    "boundary": "BatchNormMode at_boundary attacked refusing_changes",
    "carlini_wagner": "CarliniWagnerLinf",
    "distributional": "DistributionalAttack Sampler",
    "feature": "FeatureAttack",
    "gradient": "GradientAttack fast fgsm ifgsm mim n_fgsm near_pgd pgd",
    "input_gradients": "InputGradient finite input_gradient",
    "label_free": "LabelFree Transport feature_scatter kl_pgd",
    "spsa": "SPSA",
    "transfer": "EoT Transfer",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """A public name, from the module where it lives (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(f"advgame.attacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'advgame.attacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def by_name(name: str, threat: Threat) -> Attack:
    """An attack of `advgame.evaluation.ATTACKS` that needs nothing but a ball.

    Args:
        name: e.g. ``"pgd20"``, ``"adt:pgd20"``, ``"aa:apgd-ce"``.
        threat: the ball.

    Raises:
        InputError: there is no such name, or it needs more, or is several attacks in a row.
    """
    from advgame.evaluation.attacks import Context, check_attacks, make_suite

    check_attacks((name,))
    suite = make_suite(name, Context(threat))
    if len(suite) > 1:
        parts = ", ".join(f"aa:{part}" for part, _ in suite)
        raise InputError(f"{name} is several attacks in a row: take one, {parts}")
    return suite[0][1]

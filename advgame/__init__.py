"""Attacker-defender games for robust machine learning: the mathematics.

Environments are in the sibling package ``envs``, learners in ``agents``. What most people need is
here by name, and is imported when it is first used: ``import advgame`` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advgame import attacks, games
    from advgame.classifiers import make_classifier
    from advgame.data import ImageSet, Splits, load_data
    from advgame.defender import Defender
    from advgame.errors import InputError
    from advgame.evaluation import Verdicts, evaluate, find_flags
    from advgame.run.folder import RunFolder
    from advgame.run.loop import Trainer, TrainingPlan
    from advgame.threat import L2, Linf, Threat

try:
    __version__ = version("advgame")
except PackageNotFoundError:  # the folder alone, not installed
    __version__ = "unknown"

__all__ = [
    "L2",
    "Defender",
    "ImageSet",
    "InputError",
    "Linf",
    "RunFolder",
    "Splits",
    "Threat",
    "Trainer",
    "TrainingPlan",
    "Verdicts",
    "attacks",
    "evaluate",
    "find_flags",
    "games",
    "load_data",
    "make_classifier",
]

_HOMES = {
    "L2": "threat",
    "Linf": "threat",
    "Threat": "threat",
    "Defender": "defender",
    "ImageSet": "data",
    "Splits": "data",
    "load_data": "data",
    "InputError": "errors",
    "RunFolder": "run.folder",
    "Trainer": "run.loop",
    "TrainingPlan": "run.loop",
    "Verdicts": "evaluation",
    "evaluate": "evaluation",
    "find_flags": "evaluation",
    "make_classifier": "classifiers",
}


def __getattr__(name: str) -> object:
    """A public name, from where it lives (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(f"advgame.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"advgame.{name}")
    raise AttributeError(f"module 'advgame' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

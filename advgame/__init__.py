"""Attacker-defender games for robust machine learning: the mathematics.

Environments are in the sibling package ``envs``, learners in ``agents``. What most people need is
here by name, and is imported when it is first used: ``import advgame`` alone loads no torch.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame import attacks, games, zoo
    from advgame.classifiers import make_classifier
    from advgame.data import ImageSet, Splits, load_data
    from advgame.defender import Defender
    from advgame.errors import InputError
    from advgame.evaluation import Verdicts, evaluate, find_flags
    from advgame.run.callback import Callback
    from advgame.run.folder import RunFolder
    from advgame.run.loop import Trainer
    from advgame.run.plan import TrainingPlan
    from advgame.threat import L2, Linf, Threat

try:
    __version__ = version("advgame")
except PackageNotFoundError:  # the folder alone, not installed
    __version__ = "unknown"

__all__ = [
    "L2",
    "Callback",
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
    "zoo",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

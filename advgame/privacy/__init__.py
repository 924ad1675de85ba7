"""Privacy filters: a representation that keeps one label and hides another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.privacy.filters import BASELINES, FILTERS, Filter, make_filter, mlp
    from advgame.privacy.fresh import INFERENCES, Inference, strongest, try_all
    from advgame.privacy.tasks import ATTRIBUTES, KEEPS, Part, PrivacyTask, make_task, plant
    from advgame.privacy.training import SOLVERS, FilterTraining

__all__ = [
    "ATTRIBUTES",
    "BASELINES",
    "FILTERS",
    "INFERENCES",
    "KEEPS",
    "SOLVERS",
    "Filter",
    "FilterTraining",
    "Inference",
    "Part",
    "PrivacyTask",
    "make_filter",
    "make_task",
    "mlp",
    "plant",
    "strongest",
    "try_all",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

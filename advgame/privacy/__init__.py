"""Privacy filters: a representation that keeps one label and hides another."""

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

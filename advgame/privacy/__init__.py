"""Privacy filters: a representation that keeps one label and hides another."""

from advgame.privacy.filters import BASELINES, FILTERS, Filter, make_filter, mlp
from advgame.privacy.fresh import INFERENCES, Inference, strongest, try_all
from advgame.privacy.game import SOLVERS, PrivacyGame
from advgame.privacy.tasks import ATTRIBUTES, KEEPS, Part, PrivacyTask, make_task, plant

__all__ = [
    "ATTRIBUTES",
    "BASELINES",
    "FILTERS",
    "INFERENCES",
    "KEEPS",
    "SOLVERS",
    "Filter",
    "Inference",
    "Part",
    "PrivacyGame",
    "PrivacyTask",
    "make_filter",
    "make_task",
    "mlp",
    "plant",
    "strongest",
    "try_all",
]

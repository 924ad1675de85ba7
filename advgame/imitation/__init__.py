"""Imitation: demonstrations, GAIL's discriminator, what updates it, and how good an imitator is.

Each public name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.imitation.demonstrations import Demonstrations, shipped
    from advgame.imitation.discriminator import Discriminator
    from advgame.imitation.recording import record
    from advgame.imitation.updater import Update, Updater

__all__ = [
    "Demonstrations",
    "Discriminator",
    "Update",
    "Updater",
    "record",
    "shipped",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

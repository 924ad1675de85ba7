"""Trained classifiers that ship with the package, each with a card that says how robust it is.

Imports no torch until a classifier is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.zoo.entries import Card, card, list, load

__all__ = ["Card", "card", "list", "load"]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

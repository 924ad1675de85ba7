"""Classifiers: images (B, C, H, W) in [0, 1] -> logits (B, K), normalisation inside.

Each also has ``embed`` (images -> features (B, width)), which other networks use as a trunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.classifiers.files import load_into
    from advgame.classifiers.named import make_classifier
    from advgame.classifiers.names import CLASSIFIERS
    from advgame.classifiers.normalise import Normalise
    from advgame.classifiers.resnet import ResidualNet, preact_resnet18, resnet18, wide_resnet
    from advgame.classifiers.saved import load_classifier
    from advgame.classifiers.small import MinimaxCNN, SmallCNN

__all__ = [
    "CLASSIFIERS",
    "MinimaxCNN",
    "Normalise",
    "ResidualNet",
    "SmallCNN",
    "load_classifier",
    "load_into",
    "make_classifier",
    "preact_resnet18",
    "resnet18",
    "wide_resnet",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

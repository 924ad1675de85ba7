"""Data sets as uint8 on the device, their splits, and the stream of training batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.data.batches import Batches, augment
    from advgame.data.images import ImageSet, Splits, stratified_split
    from advgame.data.load import STATISTICS, channel_statistics, load_data, load_test
    from advgame.data.names import DATASETS

__all__ = [
    "DATASETS",
    "STATISTICS",
    "Batches",
    "ImageSet",
    "Splits",
    "augment",
    "channel_statistics",
    "load_data",
    "load_test",
    "stratified_split",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

"""What is read of somebody's own files, and whether there is room for it; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from advgame.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
DARK = 16
"""The highest level of images that are nearly black: of 0..16 digits, of 12 bits in 16."""
_SHARE = 0.7  # of the memory: the training needs some, too


@dataclass(frozen=True)
class Raw:
    """Images of one's own files, as they are split there.

    Args:
        parts: ``train``, ``validation`` and ``test``, as far as they are there, or ``""`` for
            images without a split: uint8 (N, C, H, W) and int64 (N,).
        names: what the classes are called; () where they have numbers only.
        classes: number of classes K.
        notes: what was done to the images, a sentence each.
    """

    parts: dict[str, tuple[Array, Array]]
    names: tuple[str, ...]
    classes: int
    notes: tuple[str, ...] = ()


def check_memory(needed: int, what: str) -> None:
    """Refuse images that would fill the memory, before they are read.

    Args:
        needed: bytes.
        what: whose, in words.

    Raises:
        InputError: how much is there.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _SHARE * there:
        raise InputError(
            f"{what} take {needed / 2**30:.1f} GiB in memory, of which this machine has "
            f"{there / 2**30:.1f}: a smaller --image-size, or fewer images"
        )

"""Digits cut anew: exploration on test images that earlier choices have not seen.

python scripts/train.py --dataset "advgame.data.resplit:digits(7)"
"""

from __future__ import annotations

import torch

from advgame.data.images import ImageSet, Splits, stratified_split
from advgame.data.load import TEST, VALIDATION
from advgame.data.published import read_published
from advgame.errors import InputError


def digits(seed: int) -> Splits:
    """The 1,797 digits, of which shares as usual are test and validation images, drawn anew.

    Most of its test images are training images of the usual split: a classifier of one must not be
    judged on the other.

    Args:
        seed: of the split, 0 or above.
    """
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"the split's seed is a whole number, 0 or above, not {seed!r}")
    parts = read_published("digits", None, download=False, image_size=None)
    images, labels = (torch.cat([getattr(one, k) for one in parts]) for k in ("images", "labels"))
    whole = ImageSet(images, labels, parts[0].classes, parts[0].names)
    rest, test = stratified_split(labels, TEST, seed)
    training, held_out = stratified_split(labels[rest], VALIDATION, seed)
    train, validation = whole.subset(rest[training]), whole.subset(rest[held_out])
    return Splits(f"digits, split {seed}", train, validation, whole.subset(test))

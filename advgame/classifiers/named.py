"""Classifiers by name, as ``--model`` takes them."""

from __future__ import annotations

import re

from torch import nn

from advgame.classifiers.resnet import preact_resnet18, resnet18, wide_resnet
from advgame.classifiers.small import MinimaxCNN, SmallCNN
from advgame.errors import InputError, unknown

CLASSIFIERS = ("small_cnn", "minimax_cnn", "resnet18", "preact_resnet18", "wrn-DEPTH-WIDEN")


def make_classifier(
    name: str, shape: tuple[int, int, int], classes: int, normalise: nn.Module | None = None
) -> nn.Module:
    """Build a classifier by name.

    Args:
        name: one of `CLASSIFIERS`, e.g. ``"small_cnn"`` or ``"wrn-28-10"``.
        shape: (C, H, W) of the images.
        classes: number of classes K.
        normalise: first layer of the residual networks; the small ones take raw pixels.

    Raises:
        InputError: unknown name, or images too small for the network.
    """
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if name == "small_cnn":
        return SmallCNN(shape, classes)
    if name == "minimax_cnn":
        if min(shape[1:]) < 4:
            raise InputError(f"minimax_cnn needs images of at least 4x4 pixels, not {shape}")
        return MinimaxCNN(shape, classes)
    if name == "resnet18":
        return resnet18(classes, shape[0], normalise)
    if name == "preact_resnet18":
        return preact_resnet18(classes, shape[0], normalise)
    if wide:
        return wide_resnet(int(wide[1]), int(wide[2]), classes, shape[0], normalise)
    raise unknown("model", name, CLASSIFIERS)

"""Classifiers by name, as ``--model`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from advgame.classifiers.names import CLASSIFIERS, WIDE
from advgame.classifiers.resnet import (
    Published,
    ResidualNet,
    lean_resnet,
    preact_resnet18,
    resnet18,
    resnet34,
    resnet50,
    wide_resnet,
)
from advgame.classifiers.small import MinimaxCNN, SmallCNN
from advgame.errors import InputError, unknown

RESNETS: dict[str, Callable[..., ResidualNet]] = {
    "lean_resnet": lean_resnet,
    "lean_resnet-half": partial(lean_resnet, width=16),
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}
# PreActResNet-18 as whom it is published by
PREACT: dict[str, Published] = {
    "preact_resnet18": "usual",
    "preact_resnet18-las": "las",
    "preact_resnet18-fast": "fast",
}


def make_classifier(
    name: str, shape: tuple[int, int, int], classes: int, normalise: nn.Module | None = None
) -> nn.Module:
    """Build a classifier by name.

    Args:
        name: one of `CLASSIFIERS`, e.g. ``"small_cnn"`` or ``"wrn-28-10"``. Some published
            networks differ from the usual ones: ``preact_resnet18-las`` (LAS-AT's code) has no
            batch norm before its head, ``preact_resnet18-fast`` (Wong et al. 2020, Andriushchenko
            & Flammarion 2020) neither, and its shortcuts begin before a block's first batch norm;
            ``wrn-28-10-swish`` is DeepMind's (Gowal et al. 2020 and later) with Swish, whose
            strides pad one side.
        shape: (C, H, W) of the images.
        classes: number of classes K.
        normalise: first layer of the residual networks; the small ones take raw pixels.

    Raises:
        InputError: unknown name, or images too small for the network.
    """
    made = _made(name, shape, classes, normalise)
    object.__setattr__(made, "built_as", name)  # a run that is made from Python notes it
    return made


def _made(
    name: str, shape: tuple[int, int, int], classes: int, normalise: nn.Module | None
) -> nn.Module:
    if name == "small_cnn":
        return SmallCNN(shape, classes)
    if name == "minimax_cnn":
        if min(shape[1:]) < 4:
            raise InputError(f"minimax_cnn needs images of at least 4x4 pixels, not {shape}")
        return MinimaxCNN(shape, classes)
    if name in RESNETS:
        return RESNETS[name](classes, shape[0], normalise)
    if name in PREACT:
        return preact_resnet18(classes, shape[0], normalise, PREACT[name])
    if wide := WIDE.fullmatch(name):
        depth, widen = int(wide[1]), int(wide[2])
        return wide_resnet(depth, widen, classes, shape[0], normalise, swish=bool(wide[3]))
    raise unknown("model", name, CLASSIFIERS)

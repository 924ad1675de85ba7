"""Classifiers by name and from files: a run folder, a weights file, somebody's own code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from advgame.classifiers import Normalise, make_classifier
from advgame.classifiers.files import fill, fitting, learned, load_into, read_states, shapes
from advgame.classifiers.names import check_model, is_built_in, model_of, rebuilt, statistics
from advgame.data import STATISTICS
from advgame.errors import InputError
from advgame.own_code import own_code
from advgame.run.folder import RunFolder

Which = Literal["best", "last"]


def new_classifier(
    model: str, shape: tuple[int, int, int], classes: int, normalise: nn.Module | None = None
) -> nn.Module:
    """A new network, as ``--model`` names it.

    Args:
        model: a built-in name (`advgame.classifiers.make_classifier`), or
            ``package.module:factory(1, width=8)``, which is run and returns the network.
        shape: (C, H, W) of the images.
        classes: number of classes K.
        normalise: first layer of a built-in network; somebody's own gets images in [0, 1].

    Raises:
        InputError: no such network, or code that fails or returns no ``nn.Module``.
    """
    check_model(model)
    if is_built_in(model):
        return make_classifier(model, shape, classes, normalise)
    module: nn.Module = own_code(model).make(nn.Module, "a torch.nn.Module")
    return module


@torch.inference_mode(False)
def load_classifier(
    path: str | Path, model: str, shape: tuple[int, int, int], classes: int
) -> nn.Module:
    """A classifier from a weights file, in evaluation mode.

    Args:
        path: safetensors, or what ``torch.save`` wrote of a state dict: see
            `advgame.classifiers.files`.
        model: name of the network, see `new_classifier`.
        shape: (C, H, W) of the images.
        classes: number of classes.

    Raises:
        InputError: missing or damaged file, or weights of another network.
    """
    path = Path(path)
    states = read_states(path)
    if not is_built_in(model):
        module = new_classifier(model, shape, classes)
        load_into(module, path, model)
        return module.eval()

    def made(*, layer: bool) -> nn.Module:
        # its numbers are weights too: only whether there is such a layer must be known
        zeros, ones = (0.0,) * shape[0], (1.0,) * shape[0]
        return make_classifier(model, shape, classes, Normalise(zeros, ones) if layer else None)

    with torch.device("meta"):  # shapes without memory: the name may stand for gigabytes
        whole = made(layer=True)
    state = fitting(states, shapes(whole), path, model, learned(whole))
    module = made(layer="normalise.mean" in state)
    fill(module, state)
    return module.eval()


def run_classifier(
    run: RunFolder,
    shape: tuple[int, int, int],
    classes: int,
    which: Which = "best",
    model: str = "",
) -> nn.Module:
    """The classifier that a run trained.

    Args:
        run: its folder.
        shape: (C, H, W) of the images.
        classes: number of classes.
        which: ``best`` is what validation chose.
        model: the network, where the folder names none, or code: that is run only if a person
            names it. One that is built otherwise than the run notes is told on the screen.

    Raises:
        InputError: the run has no such weights yet, or trained no classifier.
    """
    path, about = run.weights(which), run.about()
    found = load_classifier(path, model_of(run.path, about, model), shape, classes)
    if words := rebuilt(about, model):
        print(f"note: {run.path}: its weights are in a network {words}", file=sys.stderr)
    return found


def normalised(module: nn.Module, how: str, channels: int) -> nn.Module:
    """A classifier of images in [0, 1] from one that was trained on normalised images.

    Args:
        module: the latter, without a layer of its own for that.
        how: see `advgame.classifiers.names.statistics`.
        channels: of the images.

    Raises:
        InputError: it has such a layer, or the numbers are for other images.
    """
    if any(isinstance(part, Normalise) for part in module.modules()):
        raise InputError("these weights bring their own normalisation: leave --normalise away")
    found = statistics(how)
    mean, std = STATISTICS[found] if isinstance(found, str) else found
    if len(mean) not in (1, channels):
        raise InputError(f"--normalise has {len(mean)} means, and the images {channels} channel(s)")
    return nn.Sequential(Normalise(mean, std), module).train(module.training)

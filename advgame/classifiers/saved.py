"""Classifiers from files: a run folder, a weights file, or a function of somebody's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import safetensors
import torch
from torch import nn

from advgame.classifiers import Normalise, make_classifier
from advgame.errors import InputError
from advgame.own_code import own_code
from advgame.run.checkpoint import load_weights
from advgame.run.folder import RunFolder

Which = Literal["best", "last"]


@torch.inference_mode(False)
def load_classifier(path: Path, model: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A classifier from a safetensors file, in evaluation mode.

    Args:
        path: what `advgame.run.checkpoint.save_weights` wrote.
        model: name of the network, see `advgame.classifiers.make_classifier`.
        shape: (C, H, W) of the images.
        classes: number of classes.

    Raises:
        InputError: missing or damaged file, or weights of another network.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a safetensors file of weights ({error})") from error

    def made() -> nn.Module:
        # its numbers are weights too: only whether there is such a layer must be known
        zeros, ones = (0.0,) * shape[0], (1.0,) * shape[0]
        normalise = Normalise(zeros, ones) if "normalise.mean" in held else None
        return make_classifier(model, shape, classes, normalise)

    with torch.device("meta"):  # shapes without memory: the name may stand for gigabytes
        wanted = {name: tuple(value.shape) for name, value in made().state_dict().items()}
    if wanted != held:
        names = sorted(wanted.keys() | held.keys())
        odd = next(name for name in names if wanted.get(name) != held.get(name))
        raise InputError(
            f"{path} does not hold this network's weights ({odd}: {held.get(odd, 'missing')} in "
            f"the file, {wanted.get(odd, 'none')} in {model})"
        )
    module = made()
    load_weights(module, path)
    return module.eval()


def run_classifier(
    run: RunFolder, shape: tuple[int, int, int], classes: int, which: Which = "best"
) -> nn.Module:
    """The classifier that a run trained; ``best`` is what validation chose.

    Raises:
        InputError: the run has no such weights yet, or trained no classifier.
    """
    path = run.path / "checkpoints" / f"{which}.safetensors"
    model = run.about()["config"].get("model")
    if model is None or not path.exists():
        raise InputError(f"{run.path} has no {which} weights of a classifier: is it finished?")
    return load_classifier(path, model, shape, classes)


def imported_classifier(name: str) -> nn.Module:
    """The module that ``package.module:factory`` returns, in the mode that it comes in.

    Raises:
        InputError: it fails, or returns something else.
    """
    module: nn.Module = own_code(name).make(nn.Module, "a torch.nn.Module")
    return module

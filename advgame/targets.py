"""Trained classifiers to attack: those that ship with the package, and those of run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from advgame.classifiers.names import knows
from advgame.classifiers.saved import run_classifier
from advgame.errors import InputError
from advgame.run.folder import RunFolder
from advgame.run.options import parse_radius
from advgame.seeding import seeded_init
from advgame.threat import THREATS, Threat
from advgame.zoo.entries import is_zoo, place

# (C, H, W) and classes, so that a network can be rebuilt where its data do not lie
SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}
_SHIPPED = "zoo:digits/pgd-at-small_cnn-seed0"


@dataclass(frozen=True)
class Target:
    """A trained classifier and what it was trained for.

    Args:
        name: to tell it from others.
        model: in evaluation mode, without weight gradients.
        dataset: name of its data set.
        threat: the ball that it was trained against.
        image_size: what its images were resized to; None where they were not.
    """

    name: str
    model: nn.Module
    dataset: str
    threat: Threat
    image_size: int | None = None


def shipped() -> Target:
    """A small CNN, PGD-AT on digits at L∞ 0.15: the smallest classifier of `advgame.zoo`."""
    return from_run(_SHIPPED)


def _images(run: RunFolder) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) and classes of the images that a run was made on."""
    about = run.about()
    name, noted = about["config"]["dataset"], about.get("data")
    if noted is None and name in SHAPES:  # older runs note none
        return SHAPES[name]
    noted = noted or {}
    try:
        channels, height, width = map(int, noted["shape"])
        return (channels, height, width), int(noted["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run.path}/config.json does not say what images of {name} are like: restore it"
        ) from error


def from_run(path: str | Path, model: str = "") -> Target:
    """The classifier that a training run left and that its validation chose.

    Args:
        path: the run's folder, or ``zoo:NAME``.
        model: the network, where that is somebody's own: see
            `advgame.classifiers.names.model_of`.

    Raises:
        InputError: not a run folder of a classifier, or one without weights.
    """
    run = RunFolder.open(place(path))
    config = run.about()["config"]
    if not {"model", "dataset", "eps"} <= set(config):
        raise InputError(f"{path} is no run of a classifier")
    shape, classes = _images(run)
    own = "" if knows(run.about()) else model
    with seeded_init(0):  # its first weights are overwritten: leave torch's stream alone
        module = run_classifier(run, shape, classes, model=own)
    norm = run.norm()
    ball = THREATS[norm](parse_radius(config["eps"], norm))
    module.requires_grad_(False)
    name = str(path) if is_zoo(path) else run.path.name
    return Target(name, module, config["dataset"], ball, config.get("image_size"))

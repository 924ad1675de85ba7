"""Trained classifiers to attack: the one that ships with the package, and those of run folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from advgame.checkpoint import load_weights
from advgame.checks import parse_eps
from advgame.classifiers import Normalise, make_classifier
from advgame.data import STATISTICS
from advgame.errors import InputError
from advgame.runs import RunFolder
from advgame.seeding import seeded_init
from advgame.threat import Linf, Threat

_SHIPPED = Path(__file__).parent / "classifiers" / "digits_pgd_at.json"


@dataclass(frozen=True)
class Frozen:
    """A trained classifier and what it was trained for.

    Args:
        name: to tell it from others.
        model: in evaluation mode, without weight gradients.
        dataset: name of its data set.
        threat: the ball that it was trained against.
    """

    name: str
    model: nn.Module
    dataset: str
    threat: Threat


def shipped() -> Frozen:
    """A small CNN, PGD-AT on digits at L∞ 0.15; the JSON file beside the weights says how."""
    about = json.loads(_SHIPPED.read_text())
    model = _build(about["model"], about["shape"], about["classes"])
    load_weights(model, _SHIPPED.with_suffix(".safetensors"))
    return _frozen("shipped", model, about)


def from_run(path: Path, which: Literal["best", "last"] = "best") -> Frozen:
    """The classifier that a training run left.

    Args:
        path: a run folder of ``train_las_at.py``.
        which: the weights that validation chose, or the last ones.

    Raises:
        InputError: not such a folder, or one without weights.
    """
    config: dict[str, Any] = RunFolder.open(path).about()["config"]
    weights = path / "checkpoints" / f"{which}.safetensors"
    if not {"model", "dataset", "eps"} <= set(config) or not weights.is_file():
        raise InputError(f"{path} holds no trained classifier: give the folder of a finished run")
    digits = config["dataset"] == "digits"
    # other data need not lie here to rebuild a network: their shapes are known
    colour = config["dataset"] in STATISTICS
    shape = (1, 8, 8) if digits else (3, 32, 32) if colour else (1, 28, 28)
    normalise = None
    if colour and config.get("preset") != "repo":
        normalise = Normalise(*STATISTICS[config["dataset"]])
    classes = 100 if config["dataset"] == "cifar100" else 10
    model = _build(config["model"], shape, classes, normalise)
    load_weights(model, weights)
    return _frozen(path.name, model, config)


def _build(
    name: str, shape: tuple[int, int, int], classes: int, normalise: nn.Module | None = None
) -> nn.Module:
    with seeded_init(0):  # initial weights are overwritten: leave torch's stream alone
        return make_classifier(name, tuple(shape), classes, normalise)  # type: ignore[arg-type]


def _frozen(name: str, model: nn.Module, about: dict[str, Any]) -> Frozen:
    ball = Linf(parse_eps(about["eps"]))
    return Frozen(name, model.eval().requires_grad_(False), about["dataset"], ball)

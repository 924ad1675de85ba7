"""What a stopper has learned, in a file that people can read: one data set's, for another's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from advgame.errors import InputError
from advgame.games.stopping import FEATURES, LearnedStop, Ridge
from advgame.run.files import read_json, write_atomically

NAME = "stopper.json"
"""Of the file in a run folder."""


def write_stopper(path: Path, rule: LearnedStop) -> None:
    """Write the weights of a rule by feature, and its last threshold, which is not read back."""
    weights = dict(zip(FEATURES, rule.regression.weights.tolist(), strict=True))
    content = {"weights": weights, "threshold": rule.threshold}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_stopper(path: Path) -> Ridge:
    """The regression of a file; a run folder stands for its stopper.json.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no {path}: a finished run of --agent stopper leaves a {NAME}")
    weights = read_json(path).get("weights")
    if not isinstance(weights, dict) or list(weights) != list(FEATURES):
        raise InputError(f"{path} does not hold the weights of a stopper: {', '.join(FEATURES)}")
    values = list(weights.values())
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
        raise InputError(f"{path} holds weights that are no finite numbers")
    made = Ridge(len(FEATURES))
    made.weights = torch.tensor(values, dtype=torch.float64)
    return made

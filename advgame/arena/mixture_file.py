"""``mixture.json``: which classifiers are mixed with which weights; imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from advgame.errors import InputError
from advgame.run.files import read_json, write_atomically
from advgame.zoo.entries import is_zoo, place

_OFF = 1e-6  # by how much weights may miss a sum of 1


@dataclass(frozen=True)
class MixtureFile:
    """What such a file says.

    Args:
        members: run folders, files of weights, or ``zoo:NAME``.
        weights: the probability of each, in the same order.
    """

    members: tuple[Path, ...]
    weights: tuple[float, ...]


def is_mixture(what: str) -> bool:
    """Whether a command line's word names a file of a mixture, by its ending."""
    return what.endswith(".json")


def check_weights(weights: Sequence[float], members: int) -> None:
    """Refuse weights that are no probabilities of so many members.

    Raises:
        InputError: what is wrong.
    """
    if not members:
        raise InputError("a mixture needs a member: name classifiers")
    if len(weights) != members:
        raise InputError(
            f"a mixture of {members} members has {members} weights, not {len(weights)}"
        )
    if not all(isinstance(one, int | float) and 0 <= one < math.inf for one in weights):
        raise InputError(f"weights of a mixture must be numbers of 0 or above, not {list(weights)}")
    if abs(sum(weights) - 1) > _OFF:
        raise InputError(f"weights of a mixture must have a sum of 1, not {sum(weights):.7g}")


def read_mixture(path: str | Path) -> MixtureFile:
    """Members and weights; paths of members are relative to the file's folder.

    A member of weight 0 is left out: it is never drawn.

    Raises:
        InputError: no such file, or one that says something else.
    """
    path = Path(path)
    said = read_json(path, 'it must hold {"members": [paths], "weights": [numbers]}')
    members, weights = said.get("members"), said.get("weights")
    if not isinstance(members, list) or not isinstance(weights, list):
        raise InputError(f'{path} must hold {{"members": [paths], "weights": [numbers]}}')
    if not all(isinstance(one, str) and one for one in members):
        raise InputError(f"{path}: members are paths of run folders or weights files")
    try:
        check_weights(weights, len(members))
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem
    found = [Path(one) if is_zoo(one) else path.parent / one for one in members]
    for one in found:
        if not place(one).exists():
            raise InputError(f"{path}: its member {one} does not exist")
        if is_mixture(str(one)):
            raise InputError(f"{path}: its member {one} is a mixture, too: name its members")
    drawn = [pair for pair in zip(found, weights, strict=True) if pair[1] > 0]
    return MixtureFile(tuple(one for one, _ in drawn), tuple(float(share) for _, share in drawn))


def write_mixture(path: Path, members: Sequence[Path], weights: Sequence[float]) -> None:
    """Write such a file, with members' paths relative to its folder.

    Raises:
        InputError: weights that are no probabilities.
    """
    check_weights(weights, len(members))
    paths = [str(one) if is_zoo(one) else os.path.relpath(one, path.parent) for one in members]
    said = {"members": paths, "weights": list(weights)}
    write_atomically(path, json.dumps(said, indent=1) + "\n")

"""Updaters by name. What updates a discriminator in GAIL, by hand or learned; or anything flat."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from advgame.errors import InputError, unknown
from agents.coordinatewise import CoordinatewiseUpdater
from agents.learned_updaters import MLPUpdater, check_disk, check_memory, needed_memory
from agents.plain_updaters import AdamUpdater, Objective, SGDUpdater, Update, Updater

__all__ = [
    "UPDATERS",
    "AdamUpdater",
    "CoordinatewiseUpdater",
    "MLPUpdater",
    "Objective",
    "SGDUpdater",
    "Update",
    "Updater",
    "check_disk",
    "check_room",
    "make_updater",
    "needed_memory",
]

# what keeps a learning U from swinging up (docs/updaters.md)
_stable = partial(MLPUpdater, zero_last=True, scaling="rms", leak=0.1)

UPDATERS: dict[str, tuple[str, Callable[..., Updater]]] = {
    "adam": ("Adam, lr 0.01 as Ho & Ermon's GAIL", AdamUpdater),
    "sgd": ("gradient descent, lr 0.1", partial(SGDUpdater, lr=0.1)),
    "mlp": (
        "L2L's U in full as printed, 2m-8m-4m-m, lr 0.01, our initialisation: can diverge",
        MLPUpdater,
    ),
    "mlp-stable": (
        "L2L's U in full, with our stabilisers: zero last layer, inputs by rms, leak 0.1",
        partial(_stable, lr=3e-7),
    ),
    "mlp-narrow": (
        "U with 512 and 256 hidden units and the same stabilisers; not the paper's",
        partial(_stable, lr=1e-5, hidden=(512, 256)),
    ),
    "coordinatewise": (
        "one small network for all coordinates, Adam when untrained",
        CoordinatewiseUpdater,
    ),
}


def make_updater(
    name: str,
    *,
    lr: float | None,
    seed: int,
    blocks: tuple[int, ...] | None = None,
    **options: Any,
) -> Updater:
    """An updater of `UPDATERS`.

    Args:
        name: which.
        lr: learning rate; of the updater's own Adam where it learns. None takes the name's.
        seed: of a learned updater's weights.
        blocks: sizes of the parameter blocks, for those that scale block by block.
        options: further arguments of the class.

    Raises:
        InputError: unknown name or option, or a setting out of range.
    """
    if name not in UPDATERS:
        raise unknown("updater", name, UPDATERS)
    factory = UPDATERS[name][1]
    known = set(inspect.signature(factory).parameters) - {"lr", "seed", "blocks"}
    if odd := sorted(set(options) - known):
        raise InputError(
            f"updater {name} has no option {odd[0]!r}: choose from {', '.join(sorted(known))}"
        )
    given = {"lr": lr, "seed": seed, "blocks": blocks}
    takes = inspect.signature(factory).parameters
    shared = {key: value for key, value in given.items() if key in takes and value is not None}
    return factory(**shared, **options)


def check_room(updater: Updater, size: int, folder: Path) -> None:
    """Refuse U in full before a run begins where its 4 GB, or its checkpoints, do not fit.

    Args:
        updater: any; only U is large.
        size: m, number of parameters that it updates.
        folder: of the run, which keeps two checkpoints while the next is written.

    Raises:
        InputError: how much is missing.
    """
    if isinstance(updater, MLPUpdater):
        check_memory(size, torch.device("cpu"), updater.hidden)
        check_disk(folder, size, updater.hidden, checkpoints=3)

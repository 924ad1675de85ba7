"""One seed spawns every stream of chance of a run, by name."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch

from advgame.errors import InputError


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream ``name``, independent of the other names' streams.

    Raises:
        InputError: a negative seed.
    """
    if seed < 0:
        raise InputError(f"seed must be 0 or above, not {seed}")
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def stream(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of the stream ``name`` on ``device``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, name))


@contextlib.contextmanager
def seeded_init(seed: int, name: str = "init") -> Iterator[None]:
    """Draw module initialisations from a named stream and leave torch's global one untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, name))
        yield

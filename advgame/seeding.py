"""Named random streams from one seed, and torch's global RNG as a private stream."""

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
        InputError: what `as_seed` refuses.
    """
    sequence = np.random.SeedSequence(as_seed(seed), spawn_key=(zlib.crc32(name.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def as_seed(seed: int) -> int:
    """A seed as torch and JSON take it: they know no integers of NumPy.

    Raises:
        InputError: no integer, a negative seed, or one of more than 63 bits, which no file holds.
    """
    if not isinstance(seed, int | np.integer):
        raise InputError(f"seed must be an integer, not {seed!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in 0..2^63 - 1, not {seed}")
    return int(seed)


def stream(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of the stream ``name`` on ``device``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, name))


@contextlib.contextmanager
def seeded_init(seed: int, name: str = "init") -> Iterator[None]:
    """Draw module initialisations from a named stream and leave torch's global one untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, name))
        yield


class PrivateRNG:
    """Torch's global streams as a private stream, for code that takes no generator (dropout, SB3).

    Inside ``with private:`` the global streams are this object's; outside they are as they were.

    Args:
        seed: where the stream begins.
        device: whose global stream is swapped besides the CPU's.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._states = [torch.Generator().manual_seed(seed).get_state()]
        if self._device.type == "cuda":
            self._states.append(torch.Generator(self._device).manual_seed(seed).get_state())

    def _swap(self) -> None:
        outer = self._get()
        torch.set_rng_state(self._states[0])
        if len(self._states) > 1:
            torch.cuda.set_rng_state(self._states[1], self._device)
        self._states = outer

    def _get(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if len(self._states) > 1:
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def state_dict(self) -> list[torch.Tensor]:
        """Where the stream is; outside of ``with`` only."""
        return list(self._states)

    def load_state_dict(self, states: list[torch.Tensor]) -> None:
        """Go on from a saved place."""
        self._states = list(states)

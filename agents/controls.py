"""Players that never learn: what a learned strategy must beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RandomStrategy:
    """Uniform over all strategies: the control for every claim that a policy has learned.

    Args:
        sizes: number of options of each choice.
        rng: stream of the draws, on the images' device.
    """

    def __init__(self, sizes: tuple[int, ...], rng: torch.Generator) -> None:
        self.sizes, self.rng = sizes, rng

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Indices (B, choices), uniform and independent."""
        columns = [
            torch.randint(size, (len(images),), generator=self.rng, device=images.device)
            for size in self.sizes
        ]
        return torch.stack(columns, 1)

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The stream of the draws."""
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.rng.set_state(state["rng"])


class FixedStrategy:
    """The same strategy for every image; PGD-10 at ε₀ makes the game plain PGD-AT.

    Args:
        action: index of each choice.
    """

    def __init__(self, action: tuple[int, ...]) -> None:
        self.action = action

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """The fixed indices, (B, choices)."""
        return torch.tensor(self.action, device=images.device).expand(len(images), -1)

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

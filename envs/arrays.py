"""NumPy at the rim: any of the project's vector environments as Gymnasium's wrappers know them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from torch import Tensor


def to_numpy(value: Any) -> Any:
    """Tensors to arrays that nothing else writes to, also inside dictionaries and tuples."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, dict):
        return {name: to_numpy(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(to_numpy(one) for one in value)
    return value


class NumpyVectorEnv(VectorWrapper):
    """A torch-native vector environment with arrays in place of tensors.

    Args:
        env: e.g. ``gymnasium.make_vec("advgame/StrategySelection-v0", num_envs=64)``.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment's, in arrays."""
        observations, info = to_numpy(self.env.reset(seed=seed, options=options))
        return observations, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's, in arrays."""
        observations, rewards, terminated, truncated, info = to_numpy(
            self.env.step(np.asarray(actions))
        )
        return observations, rewards, terminated, truncated, info

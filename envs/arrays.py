"""NumPy at the rim: any of the project's vector environments as Gymnasium's wrappers know them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor

from advgame.errors import InputError


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

    Gymnasium's own vector wrappers compute in NumPy: they go around this one.

    Args:
        env: e.g. ``gymnasium.make_vec("advgame/StrategySelection-v0", num_envs=64)``.
        autoreset_mode: when a row that has ended begins anew, as the environment does when None.
            NEXT_STEP makes of an environment whose autoreset is SAME_STEP what
            `gymnasium.wrappers.vector.NormalizeObservation` and loops written for Gymnasium's
            default need: a row's last observation first, and a step with a void action, reward 0
            and the next episode's first observation after it.

    Raises:
        InputError: another mode, which the environment has not.
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], *, autoreset_mode: AutoresetMode | None = None
    ) -> None:
        super().__init__(env)
        own = env.metadata["autoreset_mode"]
        wanted = own if autoreset_mode is None else autoreset_mode
        if wanted not in (own, AutoresetMode.NEXT_STEP):
            raise InputError(f"autoreset_mode must be {own} or NEXT_STEP here, not {wanted!r}")
        self._later = wanted != own
        self.metadata = {**env.metadata, "autoreset_mode": wanted}
        self._waiting = np.zeros(env.num_envs, dtype=bool)
        self._next: Any = None  # where the waiting rows go on

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment's, in arrays."""
        self._waiting[:] = False
        observations, info = to_numpy(self.env.reset(seed=seed, options=options))
        return observations, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's, in arrays; where autoreset was postponed, rows wait for theirs."""
        if not self._later:
            found: tuple[Any, Any, Any, Any, dict[str, Any]] = to_numpy(
                self.env.step(np.asarray(actions))
            )
            return found
        waiting = self._waiting
        if waiting.all():
            self._waiting = np.zeros_like(waiting)
            return self._next, np.zeros(len(waiting), np.float32), ~waiting, ~waiting, {}
        hold = {"hold": torch.from_numpy(waiting)} if waiting.any() else {}
        self._next, rewards, terminated, truncated, info = to_numpy(
            self.env.step(np.asarray(actions), **hold)
        )
        self._waiting = terminated | truncated
        shown = self._next.copy()
        if self._waiting.any():
            shown[self._waiting] = info.pop("final_obs")[self._waiting]
            info |= info.pop("final_info")
            del info["_final_obs"], info["_final_info"]
        return shown, rewards, terminated, truncated, info

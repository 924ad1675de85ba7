"""Adapters of the torch vector environments: NumPy arrays in and out, and one row as an `Env`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError
from envs.actions import as_numbers
from envs.pictures import PicturedVectorEnv
from envs.standard import RENDER_MODES, ids_of


def as_arrays(value: Any) -> Any:
    """Tensors to arrays that nothing else writes to, also inside dictionaries and tuples."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, dict):
        return {name: as_arrays(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(as_arrays(one) for one in value)
    return value


class NumpyVectorEnv(VectorWrapper):
    """A torch-native vector environment with arrays in place of tensors: `envs.to_numpy`.

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
            modes = " or ".join(dict.fromkeys((str(own), str(AutoresetMode.NEXT_STEP))))
            raise InputError(f"autoreset_mode must be {modes} here, not {wanted!r}")
        self._later = wanted != own
        self.metadata = {**env.metadata, "autoreset_mode": wanted}
        self._waiting = np.zeros(env.num_envs, dtype=bool)
        self._next: Any = None  # where the waiting rows go on

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._waiting[:] = False
        observations, info = as_arrays(self.env.reset(seed=seed, options=options))
        return observations, info

    @override
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        waiting = self._waiting
        if waiting.all():
            self._waiting = np.zeros_like(waiting)
            if isinstance(self.env.unwrapped, PicturedVectorEnv):
                self.env.unwrapped.show_present()
            return self._next, np.zeros(len(waiting), np.float32), ~waiting, ~waiting, {}
        hold = {"hold": torch.from_numpy(waiting)} if waiting.any() else {}
        following, rewards, terminated, truncated, info = as_arrays(
            self.env.step(np.asarray(actions), **hold)
        )
        if self._later:  # show what ended rows saw last, and let them wait for their reset
            self._next, following = following, following.copy()
            self._waiting = terminated | truncated
            if self._waiting.any():
                following[self._waiting] = info.pop("final_obs")[self._waiting]
                info |= info.pop("final_info")
                del info["_final_obs"], info["_final_info"]
        return following, rewards, terminated, truncated, info


class SingleEnv(gym.Env[Any, Any]):
    """One episode at a time, in NumPy: ``vector`` with B = 1, whose arguments it takes.

    `step` returns what the episode saw last, and `render` shows it; then `reset` is due. In
    StrategySelection it leads to the image that has been drawn already; the others draw anew.
    """

    vector: ClassVar[Callable[..., VectorEnv[Any, Any, Any]]]
    metadata: dict[str, Any] = {"render_modes": RENDER_MODES}  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        for name in ("num_envs", "n_envs"):
            if name in settings:
                env_id = ids_of(type(self), settings)
                raise InputError(
                    f"gymnasium.make gives one row of {env_id}, without {name}: for several "
                    f'gymnasium.make_vec("{env_id}", num_envs={settings[name]!r}), which gives '
                    "tensors, or envs.make_sb3"
                )
        core: Any = self.vector(1, **settings)
        self.core = core
        self.render_mode = core.render_mode
        self.metadata = {k: v for k, v in core.metadata.items() if k != "autoreset_mode"}
        self.observation_space = core.single_observation_space
        self.action_space = core.single_action_space
        self._begun, self._at_end = False, False

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None and not self._begun:
            seed = int(self.np_random.integers(2**31))
        observation, info = self.core.reset(seed=seed, options=options)
        self._begun, self._at_end = True, False
        return _first(observation), _first(info)

    @override
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before step()")
        if self._at_end:
            raise gym.error.ResetNeeded("the episode has ended: call reset()")
        chosen = as_numbers(action, self.action_space)
        seen, reward, terminated, truncated, info = self.core.step(chosen[None])
        ended = bool(terminated[0]), bool(truncated[0])
        if "final_obs" in info:
            seen = info.pop("final_obs")
            info |= info.pop("final_info")
        self._at_end = any(ended)
        return _first(seen), float(reward[0]), *ended, _first(info)

    @override
    def render(self) -> Any:
        """Where the last `step` or `reset` has led, uint8 (H, W, 3); None without render mode."""
        drawn = self.core.render()
        return None if drawn is None else drawn[0]


to_numpy = NumpyVectorEnv
"""The name in `envs`: a vector environment of tensors with arrays."""


def _first(value: Any) -> Any:
    """Row 0 in NumPy: arrays that nothing else writes to, numbers, dictionaries of either."""
    if isinstance(value, dict):
        return {k: _first(v) for k, v in value.items() if not k.startswith("_")}
    row = value[0].detach().cpu()
    return row.numpy().copy() if row.dim() else row.item()

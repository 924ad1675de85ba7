"""Stable-Baselines3's view of the strategy environment: a NumPy `VecEnv` over the torch core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import Wrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from advgame.errors import InputError
from envs.strategy_selection import StrategySelectionVectorEnv


class StrategySelectionVecEnv(VecEnv):
    """Every image of the batch is one environment whose episodes last one step.

    Args:
        core: the torch environment; it must pay at every step (``reward_interval`` 1), since
            SB3 learns from every reward it sees.
    """

    def __init__(self, core: StrategySelectionVectorEnv) -> None:
        if core.reward_interval != 1:
            raise InputError("SB3 learns from every reward: make the environment pay at each step")
        self.core = core
        super().__init__(core.num_envs, core.single_observation_space, core.single_action_space)
        self.render_mode = None

    def reset(self) -> np.ndarray[Any, Any]:
        """The next images (B, C, H, W); after `seed`, the game from its beginning."""
        observations, _ = self.core.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        array: np.ndarray[Any, Any] = observations.cpu().numpy()
        return array

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Remember the actions (B, 3)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Play them; ``infos[i]`` holds image i's pay-off terms and its terminal observation."""
        observations, rewards, ended, _, info = self.core.step(self._actions)
        terms = {name: value.cpu().numpy() for name, value in info["final_info"].items()}
        last = info["final_obs"].cpu().numpy()
        infos: list[dict[str, Any]] = [
            {
                **{name: value[i] for name, value in terms.items()},
                "terminal_observation": last[i],
                "TimeLimit.truncated": False,
            }
            for i in range(self.num_envs)
        ]
        return observations.cpu().numpy(), rewards.cpu().numpy(), ended.cpu().numpy(), infos

    def close(self) -> None:
        """Close the core."""
        self.core.close()

    def _count(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the core, once per environment asked for."""
        return [getattr(self.core, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the core, which all environments share."""
        setattr(self.core, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of the core once; its result, once per environment asked for."""
        return [getattr(self.core, method_name)(*args, **kwargs)] * self._count(indices)

    def env_is_wrapped(
        self, wrapper_class: type[Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Never: the environments are rows of a batch."""
        return [False] * self._count(indices)

    def get_images(self) -> Sequence[np.ndarray[Any, Any] | None]:
        """Nothing to render."""
        return [None] * self.num_envs

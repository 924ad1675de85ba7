"""Stable-Baselines3's view of the environments: one NumPy `VecEnv` over torch cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import Wrapper
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn
from typing_extensions import override

from advgame.errors import InputError
from envs.adapters import as_arrays
from envs.pictures import PicturedVectorEnv


class SB3VecEnv(VecEnv):
    """Torch-native vector environments as one `VecEnv`: each row of each is an environment.

    ``infos[i]`` holds a row's entries of the core's info and, where its episode has ended, those
    of ``final_info``, ``terminal_observation`` and ``episode``, its return and length as SB3's
    Monitor has them: the true ones of a task that knows them, else the sum of the rewards.

    Args:
        cores: with equal spaces, one per classifier say. SB3 wants a finished row's next
            observation within the same step: cores whose autoreset is NEXT_STEP are asked for it
            (`envs.queries.QueryVectorEnv.restart`), which costs one forward more for each of
            these rows than their own reset.

    Raises:
        InputError: cores of different spaces, one that does not pay at every step, or something
            else than a vector environment of this package without wrappers.
    """

    def __init__(self, *cores: VectorEnv[Any, Any, Any]) -> None:
        for core in cores or (None,):
            _check_core(core)
        spaces = [(core.single_observation_space, core.single_action_space) for core in cores]
        if any(one != spaces[0] for one in spaces):
            raise InputError("SB3 sees all environments as one: give them equal spaces")
        if any(getattr(core, "reward_interval", 1) != 1 for core in cores):
            raise InputError("SB3 learns from every reward: make the environment pay at each step")
        self.cores: tuple[Any, ...] = cores
        self._owners = [core for core in self.cores for _ in range(core.num_envs)]
        super().__init__(len(self._owners), *spaces[0])
        self._sums = np.zeros((2, self.num_envs))  # each row's reward and steps so far
        self.metadata |= {"render_fps": self.cores[0].metadata.get("render_fps", 30)}

    @override
    def reset(self) -> Any:
        seeds = [self._seeds[self._owners.index(core)] for core in self.cores]  # of its first row
        pairs = zip(self.cores, seeds, strict=True)
        seen = [as_arrays(core.reset(seed=seed)[0]) for core, seed in pairs]
        self._reset_seeds()
        self._reset_options()
        self._sums[:] = 0
        return _joined(seen)

    @override
    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        self._actions = actions

    @override
    def step_wait(self) -> VecEnvStepReturn:
        seen, rewards, dones = [], [], []
        infos: list[dict[str, Any]] = []
        parts = np.split(self._actions, np.cumsum([core.num_envs for core in self.cores])[:-1])
        for core, actions in zip(self.cores, parts, strict=True):
            following, reward, terminated, truncated, info = as_arrays(core.step(actions))
            done = terminated | truncated
            last, final = info.pop("final_obs", following), info.pop("final_info", {})
            if done.any() and core.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
                following = as_arrays(core.restart())
            for i in range(core.num_envs):
                infos.append({**_row(info, i), "TimeLimit.truncated": bool(truncated[i])})
                if done[i]:
                    infos[-1] |= {**_row(final, i), "terminal_observation": _row(last, i)}
            seen.append(following)
            rewards.append(reward)
            dones.append(done)
        paid, over = np.concatenate(rewards), np.concatenate(dones)
        self._sums += np.stack([paid, np.ones_like(paid)])
        for row in over.nonzero()[0].tolist():
            total, steps = float(self._sums[0, row]), int(self._sums[1, row])
            ended = infos[row]
            ended["episode"] = {
                "r": ended.get("true_return", total),
                "l": ended.get("length", steps),
            }
        self._sums[:, over] = 0
        return _joined(seen), paid, over, infos

    @override
    def close(self) -> None:
        for core in self.cores:
            core.close()

    def _asked(self, indices: VecEnvIndices) -> list[Any]:
        return [self._owners[i] for i in self._get_indices(indices)]

    @override
    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(core, attr_name) for core in self._asked(indices)]

    @override
    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the cores of these rows, which all their rows share."""
        for core in dict.fromkeys(self._asked(indices)):
            setattr(core, attr_name, value)

    @override
    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of each core once; its result, once per environment asked for."""
        asked = self._asked(indices)
        results = {c: getattr(c, method_name)(*args, **kwargs) for c in dict.fromkeys(asked)}
        return [results[core] for core in asked]

    @override
    def env_is_wrapped(
        self, wrapper_class: type[Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Of Monitor only, whose statistics `step_wait` gives."""
        return [issubclass(wrapper_class, Monitor)] * len(self._asked(indices))

    @override
    def get_images(self) -> Sequence[np.ndarray[Any, Any] | None]:
        """A picture per row where the cores were made with ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            return [None] * self.num_envs
        return [frame for core in self.cores for frame in core.render()]


def make_sb3(
    env: str | VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
    num_envs: int = 1,
    **settings: Any,
) -> SB3VecEnv:
    """What Stable-Baselines3's and sb3-contrib's algorithms take as ``env``.

    Args:
        env: an id, a vector environment of tensors, or several with equal spaces.
        num_envs: rows of an id's environment.
        settings: of an id's environment.

    Raises:
        InputError: as `SB3VecEnv`, or ``num_envs`` or settings beside an environment.
    """
    if isinstance(env, str):
        env = gym.make_vec(env, num_envs, **settings)
    elif settings or num_envs != 1:
        raise InputError("num_envs and settings are an id's: give them to gymnasium.make_vec here")
    return SB3VecEnv(*(env if isinstance(env, Sequence) else [env]))


def _check_core(core: object) -> None:
    """Refuse what does not reset its rows within a step as SB3 wants it."""
    if isinstance(core, VectorWrapper):
        raise InputError(
            f"make_sb3 takes an environment without wrappers, not {core}: Stable-Baselines3's own, "
            "such as VecNormalize, go around what it returns"
        )
    if not isinstance(core, PicturedVectorEnv):
        raise InputError(
            "make_sb3 takes an id of advgame or its vector environments, as gymnasium.make_vec "
            f"gives them, not {core}"
        )


def _joined(parts: list[Any]) -> Any:
    """Observations of several cores as those of one."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _row(value: Any, i: int) -> Any:
    """Row i of an array, or of the arrays in a dictionary, Gymnasium's masks left out."""
    if isinstance(value, dict):
        return {name: one[i] for name, one in value.items() if not name.startswith("_")}
    return value[i]

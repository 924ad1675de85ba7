"""Stable-Baselines3's view of the environments: NumPy `VecEnv`s over the torch cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import Wrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from advgame.errors import InputError
from envs.arrays import to_numpy
from envs.imitation import ImitationVectorEnv
from envs.queries import QueryVectorEnv
from envs.strategy_selection import StrategySelectionVectorEnv


class _Rows(VecEnv):
    """What both adapters say when SB3 asks about single environments, which are rows here."""

    owners: tuple[Any, ...]
    """The torch environment that each row belongs to."""

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Remember the actions (B, choices)."""
        self._actions = actions

    def close(self) -> None:
        """Close the cores."""
        for core in dict.fromkeys(self.owners):
            core.close()

    def _asked(self, indices: VecEnvIndices) -> list[Any]:
        return [self.owners[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the core, once per environment asked for."""
        return [getattr(core, attr_name) for core in self._asked(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the core, which all its rows share."""
        for core in dict.fromkeys(self._asked(indices)):
            setattr(core, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of each core once; its result, once per environment asked for."""
        asked = self._asked(indices)
        results = {c: getattr(c, method_name)(*args, **kwargs) for c in dict.fromkeys(asked)}
        return [results[core] for core in asked]

    def env_is_wrapped(
        self, wrapper_class: type[Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Never: the environments are rows of a batch."""
        return [False] * len(self._asked(indices))

    def get_images(self) -> Sequence[np.ndarray[Any, Any] | None]:
        """Nothing to render."""
        return [None] * self.num_envs


class StrategySelectionVecEnv(_Rows):
    """Every image of the batch is one environment whose episodes last one step.

    Args:
        core: the torch environment; it must pay at every step (``reward_interval`` 1), since
            SB3 learns from every reward it sees.
    """

    def __init__(self, core: StrategySelectionVectorEnv) -> None:
        if core.reward_interval != 1:
            raise InputError("SB3 learns from every reward: make the environment pay at each step")
        self.core, self.owners = core, (core,) * core.num_envs
        super().__init__(core.num_envs, core.single_observation_space, core.single_action_space)
        self.render_mode = None

    def reset(self) -> np.ndarray[Any, Any]:
        """The next images (B, C, H, W); after `seed`, the game from its beginning."""
        observations, _ = self.core.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        array: np.ndarray[Any, Any] = to_numpy(observations)
        return array

    def step_wait(self) -> VecEnvStepReturn:
        """Play them; ``infos[i]`` holds image i's pay-off terms and its terminal observation."""
        observations, rewards, ended, _, info = self.core.step(self._actions)
        terms, last = to_numpy(info["final_info"]), to_numpy(info["final_obs"])
        infos: list[dict[str, Any]] = [
            {
                **{name: value[i] for name, value in terms.items()},
                "terminal_observation": last[i],
                "TimeLimit.truncated": False,
            }
            for i in range(self.num_envs)
        ]
        return to_numpy(observations), to_numpy(rewards), to_numpy(ended), infos


class ImitationVecEnv(_Rows):
    """An imitation environment for SB3's and sb3-contrib's own loops.

    Args:
        core: the torch environment; set its ``theta`` between two calls of ``learn``.
    """

    def __init__(self, core: ImitationVectorEnv) -> None:
        self.core, self.owners = core, (core,) * core.num_envs
        super().__init__(core.num_envs, core.single_observation_space, core.single_action_space)
        self.render_mode = None

    def reset(self) -> np.ndarray[Any, Any]:
        """First observations (B, d); after `seed`, from the seed's beginning."""
        observations, _ = self.core.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        array: np.ndarray[Any, Any] = to_numpy(observations)
        return array

    def step_wait(self) -> VecEnvStepReturn:
        """One step; ``infos[i]`` holds the true reward and, at the end, ``episode`` as Monitor."""
        seen, reward, terminated, truncated, info = to_numpy(self.core.step(self._actions))
        done = terminated | truncated
        infos: list[dict[str, Any]] = [
            {
                "true_reward": info["true_reward"][i],
                "logit": info["logit"][i],
                "TimeLimit.truncated": bool(truncated[i]),
            }
            for i in range(self.num_envs)
        ]
        for i in done.nonzero()[0]:
            last = info["final_info"]
            infos[i]["terminal_observation"] = info["final_obs"][i]
            infos[i]["episode"] = {"r": last["true_return"][i], "l": last["length"][i]}
        return seen, reward, done, infos


class AttackVecEnv(_Rows):
    """Attack environments, white-box or black-box, each row of each of them an environment.

    SB3 wants a finished row's next image within the same step: the core is asked for it, which
    costs one forward more for each of these rows than the core's own reset.

    Args:
        cores: one torch environment per classifier, with equal spaces.
    """

    def __init__(self, cores: Sequence[QueryVectorEnv]) -> None:
        first = cores[0]
        if any(
            one.single_observation_space != first.single_observation_space
            or one.single_action_space != first.single_action_space
            for one in cores
        ):
            raise InputError("SB3 sees all environments as one: give them equal spaces")
        self.cores = tuple(cores)
        self.owners = tuple(core for core in cores for _ in range(core.num_envs))
        super().__init__(
            len(self.owners), first.single_observation_space, first.single_action_space
        )
        self.render_mode = None

    def reset(self) -> Any:
        """The next images' features (B, n); after `seed`, from the seed's beginning."""
        seeds = iter(self._seeds)
        seen = []
        for core in self.cores:
            own = [next(seeds) for _ in range(core.num_envs)]
            seen.append(to_numpy(core.reset(seed=own[0])[0]))
        self._reset_seeds()
        self._reset_options()
        return _joined(seen)

    def step_wait(self) -> VecEnvStepReturn:
        """One query; ``infos[i]`` holds margins and queries, and what a row saw last."""
        seen, rewards, dones = [], [], []
        infos: list[dict[str, Any]] = []
        parts = np.split(self._actions, np.cumsum([core.num_envs for core in self.cores])[:-1])
        for core, actions in zip(self.cores, parts, strict=True):
            last, reward, terminated, truncated, info = to_numpy(core.step(actions))
            done = terminated | truncated
            for i in range(core.num_envs):
                infos.append({k: v[i] for k, v in info.items() if not k.startswith("_")})
                infos[-1]["TimeLimit.truncated"] = bool(truncated[i])
                if done[i]:
                    infos[-1]["terminal_observation"] = _row(last, i)
            seen.append(to_numpy(core.restart()) if done.any() else last)
            rewards.append(reward)
            dones.append(done)
        return _joined(seen), np.concatenate(rewards), np.concatenate(dones), infos


def _joined(parts: list[Any]) -> Any:
    """Observations of several cores as those of one."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _row(observation: Any, i: int) -> Any:
    if isinstance(observation, dict):
        return {name: value[i] for name, value in observation.items()}
    return observation[i]

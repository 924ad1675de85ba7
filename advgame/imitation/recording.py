"""Play whole episodes of a Gymnasium task and keep what was seen and done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch

from advgame.imitation.demonstrations import Demonstrations


def record(act: Callable[[Any], Any], env_id: str, seed: int, episodes: int) -> Demonstrations:
    """Play ``episodes`` episodes, one after the other.

    Args:
        act: observation (d,) -> action; observations are the environment's own.
        env_id: Gymnasium's name of the task.
        seed: episode i begins with ``reset(seed=seed + i)``.
        episodes: how many, 1 or more.
    """
    env = gymnasium.make(env_id)
    observations, actions = [], []
    lengths, returns, terminated = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, steps, over, cut = 0.0, 0, False, False
        while not (over or cut):
            observations.append(np.array(observation, dtype=np.float32))
            action = np.array(act(observation))  # a copy: policy and task may write into theirs
            actions.append(action)
            given = action.copy() if action.ndim else action.item()
            observation, reward, over, cut, _ = env.step(given)
            total, steps = total + float(reward), steps + 1
        lengths.append(steps)
        returns.append(total)
        terminated.append(bool(over))
    env.close()
    taken = torch.from_numpy(np.array(actions))
    return Demonstrations(
        torch.from_numpy(np.array(observations)),
        taken.float() if taken.is_floating_point() else taken.long(),
        torch.tensor(lengths),
        torch.tensor(returns, dtype=torch.float64),
        torch.tensor(terminated),
        env_id,
    )

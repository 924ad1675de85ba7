"""Play whole episodes of a Gymnasium task and keep what was seen and done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations


def record(act: Callable[[Any], Any], env_id: str, seed: int, episodes: int) -> Demonstrations:
    """Play ``episodes`` episodes, one after the other.

    Args:
        act: observation (d,) -> action; observations are the environment's own. Of an answer
            (action, None), as ``predict`` of Stable-Baselines3 gives, the action is taken.
        env_id: Gymnasium's name of the task.
        seed: episode i begins with ``reset(seed=seed + i)``.
        episodes: how many, 1 or more.

    Raises:
        InputError: a task that cannot be made or is of other spaces than `check_spaces` has, no
            episode, an action that is none of the task's, or a reward that is not finite.
    """
    if episodes < 1:
        raise InputError(f"episodes must be 1 or above, not {episodes}")
    try:
        env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise InputError(f"cannot make {env_id!r}: {error}") from error
    check_spaces(env_id, env.observation_space, env.action_space)
    observations, actions = [], []
    lengths, returns, terminated = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, steps, over, cut = 0.0, 0, False, False
        while not (over or cut):
            observations.append(np.array(observation, dtype=np.float32))
            action = _action(act(observation), env.action_space)
            actions.append(action)
            given = action.copy() if action.ndim else action.item()
            observation, reward, over, cut, _ = env.step(given)
            total, steps = total + float(reward), steps + 1
            if not math.isfinite(total):  # NaN would read as a recording without rewards
                raise InputError(f"{env_id} returned a reward that is no finite number: {reward!r}")
        lengths.append(steps)
        returns.append(total)
        terminated.append(bool(over))
    env.close()
    taken = torch.from_numpy(np.array(actions))
    box = isinstance(env.action_space, spaces.Box)  # also one of whole numbers
    return Demonstrations(
        torch.from_numpy(np.array(observations)),
        taken.float() if box or taken.is_floating_point() else taken.long(),
        torch.tensor(lengths),
        torch.tensor(returns, dtype=torch.float64),
        torch.tensor(terminated),
        env_id,
    )


def check_spaces(env_id: str, seen: spaces.Space[Any], acted: spaces.Space[Any]) -> None:
    """Refuse a task that cannot be imitated.

    Args:
        env_id: of the task, for the message.
        seen: its observations; a box (d,) will do.
        acted: its actions; choices from 0 or a box (k,) will do.

    Raises:
        InputError: other spaces.
    """
    if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
        raise InputError(f"{env_id} has observations {seen}: flat boxes only")
    flat_box = isinstance(acted, spaces.Box) and len(acted.shape) == 1
    if not flat_box and not (isinstance(acted, spaces.Discrete) and acted.start == 0):
        raise InputError(f"{env_id} has actions {acted}: Discrete from 0 or flat boxes only")


def _action(answer: Any, space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """The action as an array of its own: policy and task may write into theirs."""
    match answer:
        case (action, None):
            answer = action
        case tuple():
            raise InputError(
                "the policy returned a tuple: give record a function that returns the action "
                "alone, e.g. lambda seen: model.predict(seen)[0]"
            )
    try:
        action = np.array(answer)
    except ValueError as error:
        raise InputError(f"the policy returned {answer!r}, which is no array") from error
    if action.shape != space.shape or action.dtype.kind not in "iuf":
        raise InputError(f"the policy returned {answer!r}, which is no action of {space}")
    if isinstance(space, spaces.Discrete) and not space.contains(action.item()):
        raise InputError(f"the policy returned {answer!r}, which is no action of {space}")
    return action

"""The tasks under imitation: batches of episodes of a base environment, without its time limit.

CartPole and MountainCar are written in tensors, with Gymnasium's dynamics; any other Gymnasium
environment is stepped one by one behind the same face.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError
from advgame.imitation.recording import check_spaces
from advgame.own_code import in_this_folder, in_words
from envs.actions import into_box
from envs.pictures import cart_pole_picture, fitted, mountain_car_picture


class Task(ABC):
    """B episodes that run side by side and begin anew row by row; all of one is its state."""

    observation_space: spaces.Box
    """of one row, raw; (d,)"""
    action_space: spaces.Discrete | spaces.Box
    """of one row"""
    horizon: int
    """steps after which an episode is cut off; whoever steps the task counts them"""
    scale: tuple[Tensor, Tensor]
    """(shift, scale), each (d,): brings observations to about [-1, 1]"""
    state: Tensor
    fps: int = 30
    """pictures per second"""

    @abstractmethod
    def picture(self, row: int) -> Callable[[], Any]:
        """What draws a row as it is now, as `envs.pictures.imitation_picture` takes it."""

    @abstractmethod
    def reset(self, rows: Tensor, rng: torch.Generator) -> None:
        """Begin new episodes in ``rows``, bool (B,)."""

    def observe(self) -> Tensor:
        """The task's own observations (B, d), float32, without shift or scale."""
        return self.state.float()

    @abstractmethod
    def step(self, actions: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step where ``live``, bool (B,).

        Args:
            actions: (B,) integers or (B, k).
            live: rows whose episode goes on; the others stay as they are.

        Returns:
            true rewards (B,), 0 where not live; terminated, bool (B,); truncated, bool (B,): cut
            off by the task itself, whose time limit is not counted here.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The state of every row's episode."""
        return {"state": self.state.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved place.

        Raises:
            InputError: the task's episodes cannot be restored.
        """
        self.state = state["state"].to(self.state.device)


class CartPole(Task):
    """Gymnasium's CartPole-v1 in tensors: +1 per step, over at 12 degrees or 2.4 units.

    Observations are position, velocity, angle in radians and angular velocity; actions push left
    (0) or right (1).

    Args:
        rows: B.
        device: where the states live, in float64 as Gymnasium's.

    Source: Barto, Sutton and Anderson 1983, as gymnasium.envs.classic_control.cartpole.
    """

    horizon, fps = 500, 50
    _gravity, _pole, _length, _force, _tau = 9.8, 0.1, 0.5, 10.0, 0.02
    _total = 1.0 + _pole
    _reach, _angle = 2.4, 12 * 2 * np.pi / 360

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        high = np.array([4.8, np.inf, 24 * 2 * np.pi / 360, np.inf], np.float32)
        self.observation_space: spaces.Box = spaces.Box(-high, high, dtype=np.float32)
        self.action_space: spaces.Discrete | spaces.Box = spaces.Discrete(2)
        self.scale = (torch.zeros(4, device=device), torch.ones(4, device=device))
        self.state = torch.zeros(rows, 4, dtype=torch.float64, device=device)

    @override
    def picture(self, row: int) -> Callable[[], Any]:
        x, _, angle, _ = self.state[row].tolist()
        return partial(cart_pole_picture, x, angle, reach=self._reach, length=self._length)

    @override
    def reset(self, rows: Tensor, rng: torch.Generator) -> None:
        """Start the rows anew, every entry of their states uniform in ±0.05."""
        drawn = torch.rand(self.state.shape, dtype=torch.float64, device=rng.device, generator=rng)
        self.state = torch.where(rows[:, None], 0.1 * drawn - 0.05, self.state)

    @override
    def step(self, actions: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of explicit Euler, as Gymnasium's default."""
        x, v, angle, spin = self.state.unbind(1)
        force = (2.0 * actions - 1) * self._force
        cos, sin = angle.cos(), angle.sin()
        pole = self._pole * self._length
        push = (force + pole * spin.square() * sin) / self._total
        spin_up = (self._gravity * sin - cos * push) / (
            self._length * (4 / 3 - self._pole * cos.square() / self._total)
        )
        speed_up = push - pole * spin_up * cos / self._total
        tau = self._tau
        moved = torch.stack(
            [x + tau * v, v + tau * speed_up, angle + tau * spin, spin + tau * spin_up], 1
        )
        self.state = torch.where(live[:, None], moved, self.state)
        out = (self.state[:, 0].abs() > self._reach) | (self.state[:, 2].abs() > self._angle)
        return live.float(), out & live, torch.zeros_like(live)


class MountainCar(Task):
    """Gymnasium's MountainCar-v0 in tensors: −1 per step until the car is on the hill.

    Observations are position and velocity; actions push left (0), not at all (1) or right (2).

    Args:
        rows: B.
        device: where the states live, in float64 as Gymnasium's.

    Source: Moore 1990, as gymnasium.envs.classic_control.mountain_car.
    """

    horizon = 200
    _force, _gravity, _goal, _top_speed = 0.001, 0.0025, 0.5, 0.07
    _ends = (-1.2, 0.6)

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        low, high = np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32)
        self.observation_space: spaces.Box = spaces.Box(low, high, dtype=np.float32)
        self.action_space: spaces.Discrete | spaces.Box = spaces.Discrete(3)
        self.scale = (
            torch.tensor([-0.3, 0.0], device=device),
            torch.tensor([0.5, 0.03], device=device),
        )
        self.state = torch.zeros(rows, 2, dtype=torch.float64, device=device)

    @override
    def picture(self, row: int) -> Callable[[], Any]:
        x = float(self.state[row, 0])
        return partial(mountain_car_picture, x, ends=self._ends, goal=self._goal)

    @override
    def reset(self, rows: Tensor, rng: torch.Generator) -> None:
        """Position uniform in [−0.6, −0.4], at rest."""
        drawn = torch.rand(len(rows), dtype=torch.float64, device=rng.device, generator=rng)
        start = torch.stack([0.2 * drawn - 0.6, torch.zeros_like(drawn)], 1)
        self.state = torch.where(rows[:, None], start, self.state)

    @override
    def step(self, actions: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, v = self.state.unbind(1)
        v = v + (actions.long() - 1) * self._force - self._gravity * (3 * x).cos()
        v = v.clamp(-self._top_speed, self._top_speed)
        x = (x + v).clamp(*self._ends)
        v = torch.where((x <= self._ends[0]) & (v < 0), 0.0, v)
        self.state = torch.where(live[:, None], torch.stack([x, v], 1), self.state)
        there = (self.state[:, 0] >= self._goal) & (self.state[:, 1] >= 0)
        return -live.float(), there & live, torch.zeros_like(live)


class GymnasiumTask(Task):
    """Any Gymnasium environment with a flat box of observations, B copies stepped in turn.

    Args:
        env_id: registered id, or ``"module:id"``, which imports the module that registers it.
        rows: B.
        render_mode: ``"rgb_array"``, or None where nothing is drawn.

    Raises:
        InputError: unknown id, spaces of another kind, no time limit to go by, or no pictures.
    """

    def __init__(self, env_id: str, rows: int, render_mode: str | None = None) -> None:
        try:
            # the time limit is the caller's to count; own tasks need not take a render_mode
            make = partial(gym.make, env_id, max_episode_steps=-1)
            if render_mode is not None:
                make = partial(make, render_mode=render_mode)
            with in_this_folder():  # a module may lie in it
                self._envs = [make() for _ in range(rows)]
            spec = gym.spec(registered(env_id))
        except (gym.error.Error, ImportError) as error:
            hint = _hint(env_id, str(error))
            raise InputError(f"cannot make {env_id!r}: {error}{hint}") from error
        except Exception as error:  # a stranger's task may raise anything
            raise InputError(f"cannot make {env_id!r}: {in_words(error)}") from error
        if spec.max_episode_steps is None:
            raise InputError(f"{env_id} has no time limit: register it with max_episode_steps")
        seen, acted = self._envs[0].observation_space, self._envs[0].action_space
        check_spaces(env_id, seen, acted)
        assert isinstance(seen, spaces.Box)
        self.observation_space: spaces.Box = seen
        self.action_space: spaces.Discrete | spaces.Box = acted  # type: ignore[assignment]
        self.horizon = spec.max_episode_steps
        self.scale = (torch.zeros(seen.shape), torch.ones(seen.shape))
        self.state, self._id = torch.zeros(rows, *seen.shape), env_id
        self.fps = int(self._envs[0].metadata.get("render_fps", 30))
        if render_mode:
            self._envs[0].reset(seed=0)
            self.picture(0)

    @override
    def picture(self, row: int) -> Callable[[], Any]:
        """The environment's own."""
        try:
            drawn = self._envs[row].render()
        except gym.error.Error as error:
            raise InputError(f"{self._id} draws itself, and cannot: {error}") from error
        if not isinstance(drawn, np.ndarray) or drawn.dtype != np.uint8 or drawn.ndim != 3:
            raise InputError(f"{self._id} has no pictures: leave out render_mode")
        return partial(fitted, drawn.copy())

    @override
    def reset(self, rows: Tensor, rng: torch.Generator) -> None:
        """Each with a seed of its own."""
        for row in rows.nonzero().flatten().tolist():
            seed = int(torch.randint(2**31, (), generator=rng))
            observation, _ = self._envs[row].reset(seed=seed)
            self._see(row, observation)

    @override
    def observe(self) -> Tensor:
        return self.state.clone()

    @override
    def step(self, actions: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the environment's, which is given the action in its own type, and may write into it.

        A float32 cannot be the end of a float64 box: it is brought inside.
        """
        rewards, space = torch.zeros(len(live)), self.action_space
        over, cut = (torch.zeros(len(live), dtype=torch.bool) for _ in range(2))
        for row in live.nonzero().flatten().tolist():
            one = actions[row]
            action = into_box(one.numpy(), space) if isinstance(space, spaces.Box) else int(one)
            observation, reward, over[row], cut[row], _ = self._envs[row].step(action)
            self._see(row, observation)
            rewards[row] = self._number(reward)
        return rewards, over, cut & ~over

    def _see(self, row: int, observation: Any) -> None:
        # a copy: torch takes no reversed views, and the task may go on writing into its array
        seen = torch.as_tensor(np.array(observation, np.float32))
        shape = self.state.shape[1:]
        if seen.shape != shape or not bool(torch.isfinite(seen).all()):
            raise InputError(
                f"{self._id} returned an observation that is not {tuple(shape)} "
                f"finite numbers: {observation!r}"
            )
        self.state[row] = seen

    def _number(self, reward: Any) -> float:
        try:
            if np.isfinite(np.float32(reward)):
                return float(reward)
        except (TypeError, ValueError, OverflowError):
            pass
        raise InputError(f"{self._id} returned a reward that is no finite number: {reward!r}")

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {}  # Gymnasium cannot save the inside of an environment

    @override
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Refused, rather than going on from another place than where the run stopped."""
        raise InputError("an environment that Gymnasium steps cannot be resumed: start a new run")


NATIVE = {"CartPole-v1": CartPole, "MountainCar-v0": MountainCar}


def _hint(env_id: str, said: str) -> str:
    """What a name that Gymnasium does not know may mean, where Gymnasium has not ``said`` so."""
    module, _, task = env_id.rpartition(":")
    if module.endswith(".py"):
        return f" Name the module without .py: {module.removesuffix('.py')}:{task}"
    versions = sorted(name for name in gym.registry if name.rpartition("-v")[0] == task)
    if versions:
        name = f"{module}:{versions[-1]}" if module else versions[-1]
        return f" Its name has a version: {name}"
    if not module and re.fullmatch(r"Environment `\w+` doesn't exist\.", said):
        return f" A task of your own is named with its module: my_task:{task}"
    return ""


def registered(env_id: str) -> str:
    """The id under which a task is registered: without the module that Gymnasium imports first."""
    return env_id.rpartition(":")[2]


def make_task(
    env_id: str,
    rows: int,
    device: torch.device | str = "cpu",
    render_mode: str | None = None,
) -> Task:
    """B rows of a task by its Gymnasium id; in tensors where we have them.

    Args:
        env_id: the task.
        rows: B.
        device: of the states.
        render_mode: ``"rgb_array"`` where the task is to be drawn.

    Raises:
        InputError: an id that Gymnasium does not know, or spaces that cannot be imitated.
    """
    if env_id in NATIVE:  # a module that is named may register another task under this id
        return NATIVE[env_id](rows, device)
    if torch.device(device).type != "cpu":
        raise InputError(f"{env_id} is stepped by Gymnasium, on the CPU")
    return GymnasiumTask(env_id, rows, render_mode)


def play(
    env_id: str,
    act: Callable[[Tensor], Tensor],
    episodes: int,
    rng: torch.Generator,
    horizon: int | None = None,
) -> dict[str, Tensor]:
    """Fresh episodes side by side, each to its end or the time limit.

    Args:
        env_id: the task.
        act: raw observations (B, d) to actions.
        episodes: B.
        rng: draws the starts.
        horizon: the time limit in steps; the task's own when None.

    Returns:
        ``returns`` (B,), true and undiscounted; ``lengths`` (B,); ``terminated``, bool (B,), ended
        by the task and not by a time limit.
    """
    task = make_task(env_id, episodes)
    live = torch.ones(episodes, dtype=torch.bool)
    returns, lengths = torch.zeros(episodes), torch.zeros(episodes)
    terminated = torch.zeros(episodes, dtype=torch.bool)
    task.reset(live, rng)
    for _ in range(task.horizon if horizon is None else horizon):
        rewards, over, cut = task.step(act(task.observe()), live)
        returns += rewards
        lengths += live
        terminated |= over
        live = live & ~(over | cut)
        if not live.any():
            break
    return {"returns": returns, "lengths": lengths, "terminated": terminated}

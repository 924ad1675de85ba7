"""What the attack environments share: images to attack, budgets, rewards, ends, resets.

A subclass brings the mathematics of one query: the white-box `envs.attack`, the black-box
`envs.blackbox`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from advgame.attacks import attacked
from advgame.attacks.menu import check_actions
from advgame.classifiers.foreign import frozen_copy
from advgame.data import ImageSet, load_data
from advgame.errors import InputError
from advgame.seeding import stream
from advgame.targets import shipped
from advgame.threat import Linf, Threat
from envs.pool import Pool
from envs.standard import check_reset

Observation = Tensor | dict[str, Tensor]


class Siege(Protocol):
    """B images under attack; `advgame.attacks.schedule.Ascent` is one."""

    x: Tensor
    y: Tensor
    x_adv: Tensor
    best_x: Tensor
    margin: Tensor
    best_margin: Tensor
    fooled: Tensor
    used: Tensor
    budget: Tensor
    forwards: int
    backwards: int

    def restart(self, rows: Tensor, x: Tensor, y: Tensor, budget: Tensor) -> None:
        """Put other images in the rows at once."""
        ...


SiegeT = TypeVar("SiegeT", bound=Siege)


class QueryVectorEnv(VectorEnv[Observation, Tensor, Tensor], Generic[SiegeT]):
    """B images attacked side by side; a row is an environment, a step is one query of each.

    Autoreset is NEXT_STEP: the step after a row's end is its reset, and that step's forward is
    the new image's first query. Its action is void and its reward 0.

    Args:
        num_envs: B.
        sizes: number of options of each choice.
        width: entries of the feature vector.
        classifier: attacked as a frozen copy in evaluation mode; the shipped one when None.
        data: images with labels; the digits training split when None.
        threat: the ball, one radius for all; that of the shipped classifier when None.
        queries: forwards per image, or several numbers of which each episode draws one.
        gain: reward per unit of best margin gained, the unit being the mean clean margin.
        bonus: reward of success.
        price: of each query.
        images: observe the images too.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int,
        *,
        sizes: tuple[int, ...],
        width: int,
        classifier: nn.Module | None,
        data: ImageSet | None,
        threat: Threat | None,
        queries: int | tuple[int, ...],
        gain: float,
        bonus: float,
        price: float,
        images: bool,
    ) -> None:
        budgets = tuple(np.atleast_1d(queries).tolist())
        if num_envs < 1 or not budgets or not all(type(one) is int and one > 1 for one in budgets):
            raise InputError("num_envs must be 1 or above, queries whole numbers of 2 or above")
        if not all(math.isfinite(value) for value in (gain, bonus, price)):
            raise InputError(f"gain, bonus and price must be finite: {gain}, {bonus}, {price}")
        if threat is not None and not isinstance(threat, Threat):
            raise InputError(f"threat is a ball, e.g. Linf(8 / 255), not {threat!r}")
        if threat is not None and isinstance(threat.eps, Tensor):
            raise InputError("the environment has one radius: give the threat a float")
        given = classifier if classifier is not None else shipped().model
        self.model = frozen_copy(given, "the environment attacks a frozen copy of the classifier")
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        data = (data if data is not None else load_data("digits").train).to(device)
        self.threat = threat or Linf(0.15)
        self.device, self.num_envs, self.sizes, self.images = device, num_envs, sizes, images
        self.gain, self.bonus, self.price = gain, bonus, price
        self._budgets = torch.tensor(budgets, device=device)
        with attacked(self.model):
            self.pool = Pool(self.model, data)
        self.single_action_space = spaces.MultiDiscrete(list(sizes))
        vector = spaces.Box(-1, 1, (width,), np.float32)
        picture = spaces.Box(0, 1, data.shape, np.float32)
        self.single_observation_space = (
            spaces.Dict({"features": vector, "clean": picture, "adversarial": picture})
            if images
            else vector
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.siege: SiegeT | None = None
        """The attack itself: points, margins, queries so far."""

    @abstractmethod
    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> SiegeT:
        """Attacks on new images; makes their first query."""

    @abstractmethod
    def _play(
        self, siege: SiegeT, actions: Tensor, rows: Tensor | None, arrivals: tuple[Tensor, ...]
    ) -> None:
        """One query of every image."""

    @abstractmethod
    def _features(self, siege: SiegeT) -> Tensor:
        """What is seen of every image, (B, width) in [-1, 1]."""

    @torch.inference_mode(False)
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next images; with a seed, from the beginning of that seed's order."""
        seed = check_reset(seed, options, "the rows share one order of images")
        super().reset(seed=seed)
        if seed is not None or self.siege is None:
            start = seed if seed is not None else int(self.np_random.integers(2**31))
            self.pool.begin(start)
            self.rng = stream(start, "attack", self.device)
        self.siege = self._begin(*self._draw(self.num_envs))
        self.done = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self._observe(), self._info()

    def _draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.pool.next(count)
        which = torch.randint(len(self._budgets), (count,), generator=self.rng, device=self.device)
        return x, y, self._budgets[which]

    @torch.inference_mode(False)
    def step(
        self, actions: Tensor | np.ndarray[Any, Any]
    ) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One query for each image; rows that ended at the last step get a new image instead.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: wrong shape or type, or indices outside the lists.
        """
        if self.siege is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        chosen = torch.as_tensor(actions, device=self.device)
        if chosen.shape != (self.num_envs, len(self.sizes)):
            raise InputError(
                f"actions must have shape ({self.num_envs}, {len(self.sizes)}), "
                f"not {tuple(chosen.shape)}"
            )
        check_actions(chosen, self.sizes)
        chosen = chosen.long()
        before, played = self.siege.best_margin, ~self.done
        rows = self.done.nonzero()[:, 0]
        if len(rows):
            self._play(self.siege, chosen, rows, self._draw(len(rows)))
        else:
            self._play(self.siege, chosen, None, ())
        fooled = self.siege.fooled & played
        # the queries left are seen, so that a spent budget is an end and not a time limit, beyond
        # which an agent would have to guess what was still to come
        self.done = fooled | ((self.siege.used >= self.siege.budget) & played)
        gained = (self.siege.best_margin - before) / self.pool.scale
        reward = self.gain * gained + self.bonus * fooled.to(gained) - self.price
        reward = torch.where(played, reward, 0.0).float()
        never = torch.zeros_like(self.done)
        return self._observe(), reward, self.done.clone(), never, self._info()

    @torch.inference_mode(False)
    def restart(self) -> Observation:
        """New images in the rows that have ended, now instead of at the next step.

        For adapters whose other side resets within the step. It costs one forward more for each
        of these rows than `step`'s own reset, and a backward of the points that they left.
        """
        assert self.siege is not None
        rows = self.done.nonzero()[:, 0]
        if len(rows):
            self.siege.restart(rows, *self._draw(len(rows)))
            self.done = torch.zeros_like(self.done)
        return self._observe()

    def _observe(self) -> Observation:
        assert self.siege is not None
        vector = self._features(self.siege)
        if not self.images:
            return vector
        return {
            "features": vector,
            "clean": self.siege.x.float().clone(),
            "adversarial": self.siege.x_adv.float().clone(),
        }

    def _info(self) -> dict[str, Any]:
        assert self.siege is not None
        values = {
            "margin": self.siege.margin.clone(),
            "best_margin": self.siege.best_margin.clone(),
            "queries": self.siege.used.clone(),
            "fooled": self.siege.fooled.clone(),
        }
        every = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        return {**values, **{f"_{name}": every for name in values}}

    def state_dict(self) -> dict[str, Any]:
        """Order of the images and stream, for a run that resets before it goes on."""
        return {"pool": self.pool.state_dict(), "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, at the next reset."""
        self.pool.load_state_dict(state["pool"])
        self.rng.set_state(state["rng"])


class QueryEnv(gym.Env[Any, np.ndarray[Any, Any]]):
    """One image at a time, in NumPy: a vector environment with B = 1."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, core: QueryVectorEnv[Any]) -> None:
        self.core = core
        self.observation_space = core.single_observation_space
        self.action_space = core.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The next image; with a seed, the first of that seed's order."""
        super().reset(seed=seed)
        if seed is None and self.core.siege is None:
            seed = int(self.np_random.integers(2**31))
        observation, info = self.core.reset(seed=seed, options=options)
        return _first(observation), _first(info)

    def step(self, action: np.ndarray[Any, Any]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One query.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or after the episode's end.
            InputError: an action outside the space.
        """
        if self.core.siege is None or bool(self.core.done[0]):
            raise gym.error.ResetNeeded("the episode has ended: call reset()")
        if not self.action_space.contains(np.asarray(action)):
            raise InputError(f"action {action} is not in {self.action_space}")
        seen, reward, terminated, truncated, info = self.core.step(np.asarray(action)[None])
        return _first(seen), float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)


def _first(value: Any) -> Any:
    """Row 0 in NumPy: arrays that nothing else writes to, numbers, dictionaries of either."""
    if isinstance(value, dict):
        return {k: _first(v) for k, v in value.items() if not k.startswith("_")}
    row = value[0].detach().cpu()
    return row.numpy().copy() if row.dim() else row.item()

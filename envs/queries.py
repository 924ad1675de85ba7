"""What the attack environments share: images to attack, budgets, rewards, ends, resets.

A subclass brings the attack of which one query is a step: `envs.attack` by gradients,
`envs.patches` without.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypedDict

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from advgame.attacks import attacked
from advgame.attacks.queries import AttackState, Choices
from advgame.classifiers.foreign import frozen_copy
from advgame.data import ImageSet, load_data
from advgame.errors import InputError
from advgame.evaluation import check_classifier
from advgame.losses import margin
from advgame.seeding import stream
from advgame.targets import shipped
from advgame.threat import Linf, Threat
from envs.actions import as_numbers, choice_space, unflatten
from envs.pictures import PicturedVectorEnv, attack_picture
from envs.standard import (
    RENDER_MODES,
    check_data,
    check_no_time_limit,
    check_num_envs,
    check_render_mode,
    check_reset,
)

Observation = Tensor | dict[str, Tensor]


class Pool:
    """The images that a classifier gets right, drawn one after the other, epoch after epoch.

    Images that are misclassified as they are leave no attack to learn: they are left out.

    Args:
        model: frozen classifier.
        data: images and labels, on its device.

    Raises:
        InputError: images that the classifier cannot take, logits that cannot be attacked, or no
            image that is classified correctly.
    """

    def __init__(self, model: nn.Module, data: ImageSet) -> None:
        check_classifier(model, data)
        with torch.no_grad():
            parts = torch.arange(len(data), device=data.images.device).split(500)
            margins = torch.cat(
                [margin(model(data.floats(part)), data.labels[part]) for part in parts]
            )
        right = margins < 0
        if not bool(right.any()):
            raise InputError("the classifier gets none of these images right: nothing to attack")
        self.data = data.subset(right)
        self.scale = float(-margins[right].mean())
        """Mean clean margin of the images, in logits: the unit of the reward's gain."""
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start anew with the order of ``seed``."""
        self._rng = stream(seed, "order")
        self._order = torch.empty(0, dtype=torch.int64)

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next images (count, C, H, W) in [0, 1] and their labels (count,)."""
        while len(self._order) < count:
            more = torch.randperm(len(self.data), generator=self._rng)
            self._order = torch.cat([self._order, more])
        index, self._order = self._order[:count], self._order[count:]
        index = index.to(self.data.images.device)
        return self.data.floats(index), self.data.labels[index]

    def state_dict(self) -> dict[str, Any]:
        """The order of the images that come next, and its random stream."""
        return {"order": self._order, "rng": self._rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._order = state["order"]
        self._rng.set_state(state["rng"])


class Shared(TypedDict, total=False):
    """The arguments that every attack environment takes, as `QueryVectorEnv` describes them."""

    classifier: nn.Module | None
    data: ImageSet | None
    threat: Threat | None
    queries: int | tuple[int, ...]
    gain: float
    bonus: float
    price: float
    images: bool
    flatten_actions: bool
    render_mode: str | None
    max_episode_steps: int | None


class QueryVectorEnv(PicturedVectorEnv[Observation]):
    """B images attacked side by side; a row is an environment, a step is one query of each.

    Reward:
        gain · (best margin now - before) / (mean clean margin of the images attacked)
        + bonus at success - price. The margin is the largest other logit minus the true one.

    Start:
        The next image of the data that the classifier gets right. ``reset(seed=s)`` restores
        the order, so that two seeded runs are equal; ``reset()`` goes on to other images.

    End:
        ``terminated`` where the classifier is fooled or the budget is spent, which is part of what
        is seen; ``info["fooled"]`` tells the two apart. ``truncated`` never. Autoreset is
        NEXT_STEP: the step after a row's end is its reset, its action is void, its reward 0, and
        its forward is the new image's first query.

    Args:
        num_envs: B.
        choices: what an action chooses from.
        classifier: attacked as a frozen copy in evaluation mode; the shipped one when None.
        data: images with labels; the digits training split when None.
        threat: the ball, one radius for all; L∞ with ε = 0.15 when None.
        queries: forwards per image, or several numbers of which each episode draws one.
        gain: reward per unit of best margin gained, the unit being the mean clean margin.
        bonus: reward of success.
        price: of each query.
        images: observe the clean and the current image, too.
        flatten_actions: one number per action instead of an index per list, for agents such as
            DQN; it is NumPy's ``ravel_multi_index`` of the indices.
        render_mode: ``"rgb_array"`` or None: image, perturbation and point of the last query, and
            the margin at each query.
        max_episode_steps: None; episodes end by ``queries``.

    Raises:
        InputError: a classifier, images or settings that make no such environment.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": RENDER_MODES,
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int,
        choices: Choices,
        *,
        classifier: nn.Module | None = None,
        data: ImageSet | None = None,
        threat: Threat | None = None,
        queries: int | tuple[int, ...] = 10,
        gain: float = 1.0,
        bonus: float = 1.0,
        price: float = 0.01,
        images: bool = False,
        flatten_actions: bool = False,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_render_mode(render_mode)
        check_no_time_limit(max_episode_steps, "its episodes end by `queries`")
        budgets = tuple(np.atleast_1d(queries).tolist())
        check_num_envs(num_envs)
        if not budgets or not all(type(one) is int and one > 1 for one in budgets):
            raise InputError(f"queries must be whole numbers of 2 or above, not {queries!r}")
        check_data(data)
        if classifier is not None and not isinstance(classifier, nn.Module):
            raise InputError(
                "classifier is an nn.Module that returns logits, such as a Defender's `module`, "
                f"not {classifier!r:.60}"
            )
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
        self.device, self.num_envs, self.images = device, num_envs, images
        self.choices, self.sizes = choices, choices.sizes
        self.gain, self.bonus, self.price = gain, bonus, price
        self._budgets = torch.tensor(budgets, device=device)
        with attacked(self.model):
            self.pool = Pool(self.model, data)
        self.flatten_actions, self.render_mode = flatten_actions, render_mode
        self.single_action_space = self._actions()
        vector = spaces.Box(-1, 1, (len(choices.feature_names),), np.float32)
        picture = spaces.Box(0, 1, data.shape, np.float32)
        self.single_observation_space = (
            spaces.Dict({"features": vector, "clean": picture, "adversarial": picture})
            if images
            else vector
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state: AttackState | None = None
        """The attack itself: points, margins, queries so far."""

    def _actions(self) -> spaces.Space[Any]:
        """The space of a row's actions."""
        return choice_space(self.sizes, self.flatten_actions)

    def _read(self, actions: Tensor) -> Tensor:
        """Actions of the right shape, checked, as `_advance` takes them."""
        if self.flatten_actions:
            return unflatten(actions, self.sizes)
        self.choices.check(actions)
        return actions.long()

    def _advance(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for each image; see `advgame.attacks.queries.AttackState.step`."""
        assert self.state is not None
        self.state.step(actions, rows, arrivals)

    @abstractmethod
    def _in_words(self, row: int) -> str:
        """The last action of a row, for its picture."""

    @abstractmethod
    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> AttackState:
        """Attacks on new images; makes their first query."""

    @torch.inference_mode(False)
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The next images; with a seed, from the beginning of that seed's order."""
        seed = check_reset(seed, options, "the rows share one order of images")
        super().reset(seed=seed)
        if seed is not None or self.state is None:
            start = seed if seed is not None else int(self.np_random.integers(2**31))
            self.pool.begin(start)
            self.rng = stream(start, "attack", self.device)
        self.state = self._begin(*self._draw(self.num_envs))
        self.done = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._begin_pictures()
        if self.render_mode:
            self._trace(self.done)
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
        if self.state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        chosen = self._read(as_numbers(actions, self.action_space, self.device))
        before, played = self.state.best_margin, ~self.done
        rows = self.done.nonzero()[:, 0]
        if len(rows):
            self._advance(chosen, rows, self._draw(len(rows)))
        else:
            self._advance(chosen)
        if self.render_mode:
            self._trace(~played)
        fooled = self.state.fooled & played
        # the queries left are seen, so that a spent budget is an end and not a time limit, beyond
        # which an agent would have to guess what was still to come
        self.done = fooled | ((self.state.used >= self.state.budget) & played)
        gained = (self.state.best_margin - before) / self.pool.scale
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
        assert self.state is not None
        rows = self.done.nonzero()[:, 0]
        if len(rows):
            if self.render_mode:
                self._keep_ends(rows.tolist())
            self.state.restart(rows, *self._draw(len(rows)))
            if self.render_mode:
                for row in rows.tolist():
                    self._curves[row] = [float(self.state.margin[row])]
            self.done = torch.zeros_like(self.done)
        return self._observe()

    def _trace(self, begun: Tensor) -> None:
        """Margins of the last query, for the pictures; rows that have begun begin anew."""
        assert self.state is not None
        self.show_present()
        for row, value in enumerate(self.state.margin.tolist()):
            before = [] if bool(begun[row]) else self._curves[row]
            self._curves[row] = [*before, value]

    def _sketch(self, row: int) -> Callable[[], Any]:
        state = self.state
        assert state is not None
        clean, point = (one[row].float().cpu().numpy().copy() for one in (state.x, state.x_adv))
        seen = state.logits[row].detach().float().softmax(0)
        used, size = int(state.used[row]), abs(point - clean).max()
        return partial(
            attack_picture,
            name=type(self).__name__.replace("VectorEnv", "-v0"),
            images=(clean, point),
            scale=float(self.threat.eps if isinstance(self.threat, Linf) or not size else size),
            classes=(int(state.y[row]), int(seen.argmax())),
            confidence=float(seen.max()),
            margins=list(self._curves[row]),
            budget=int(state.budget[row]),
            fooled=bool(state.fooled[row]),
            action=self._in_words(row) if used > 1 else "the image as it is",
        )

    def _observe(self) -> Observation:
        assert self.state is not None
        vector = self.state.features()
        if not self.images:
            return vector
        return {
            "features": vector,
            "clean": self.state.x.float().clone(),
            "adversarial": self.state.x_adv.float().clone(),
        }

    def _info(self) -> dict[str, Any]:
        assert self.state is not None
        values = {
            "margin": self.state.margin.clone(),
            "best_margin": self.state.best_margin.clone(),
            "queries": self.state.used.clone(),
            "fooled": self.state.fooled.clone(),
        }
        every = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        return {**values, **{f"_{name}": every for name in values}}

    def state_dict(self) -> dict[str, Any]:
        """Order of the images and stream; not the attacks under way, which the next reset ends."""
        self._check_begun("state_dict")
        return {"pool": self.pool.state_dict(), "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, at the next reset; call ``reset()`` before, too."""
        self._check_begun("load_state_dict")
        self.pool.load_state_dict(state["pool"])
        self.rng.set_state(state["rng"])

    def _check_begun(self, name: str) -> None:
        if self.state is None:
            raise gym.error.ResetNeeded(f"call reset() before {name}()")

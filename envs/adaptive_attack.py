"""`advgame/AdaptiveAttack-v0`: when does the attack on a training image go on, restart, or stop?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor
from typing_extensions import override

from advgame.checks import check_indices
from advgame.classifiers.foreign import frozen_copy
from advgame.data import ImageSet, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adaptive import FEATURES, AdaptiveAttack, Turn
from advgame.games.costs import DefenderStep
from advgame.losses import margin
from advgame.seeding import stream
from advgame.threat import Linf
from envs.actions import as_numbers, choice_space, unflatten
from envs.adapters import SingleEnv
from envs.pictures import attack_picture
from envs.standard import (
    RENDER_MODES,
    check_data,
    check_defender,
    check_no_time_limit,
    check_num_envs,
    check_render_mode,
    default_defender,
    known_settings,
)
from envs.training import TrainingVectorEnv

Others = Callable[[Tensor], Tensor]
"""Plays the images that are not the agent's: features (m, n) -> actions (m,)."""


class AdaptiveAttackVectorEnv(TrainingVectorEnv):
    """A batch of B images under attack, n of them the agent's; one defender learns from all.

    Description:
        A classifier learns from adversarial examples, which are made query by query. Each step of
        the environment is one gradient query of every image that is still attacked. When all have
        stopped, the classifier learns from where they are (`advgame.games.adaptive`). Images that
        have stopped leave the attack: nothing is computed for them.

    Action space:
        MultiDiscrete, one index per image: go on with one of the step sizes, restart at a random
        point of the ball, or stop. With ``flatten_actions`` Discrete. The action of an image that
        waits for the others is void.

    Observation space:
        Box [-1, 1], `advgame.games.adaptive.FEATURES`, float32, (n, 11) on the defender's device.

    Reward:
        What ``rules.reward`` pays, by default the loss gained by a query, less ``rules.price`` for
        each query. What is paid for the whole batch comes with the last step of the episode.

    Start:
        The next batch of training images, each at a random point of its ball, which is the first
        query. ``reset(seed=s)`` restores the initial defender, optimiser and data order, so that
        two seeded runs are equal; ``reset()`` goes on and drops attacks under way.

    End:
        ``terminated``, of all rows at once, when all B images have stopped or have spent their
        queries, and the defender has learned. ``truncated`` never. Where the agent's have all
        stopped, the others' attacks end within the same step. Autoreset is NEXT_STEP: the step
        after the end is the reset, its action is void, its reward 0.

    Args:
        num_envs: n, images that the agent plays.
        batch_size: B, of which the others follow ``others``. When None: n; where n is 1, 32 or
            as many images as there are.
        others: policy of the other images, features (m, 11) -> actions (m,); uniform when None.
        data: training images; the digits training split when None.
        defender: classifier and optimiser, which the environment owns from now on; a small CNN on
            the CPU when None.
        rules: of the game; L∞ with ε₀ = 0.15 when None.
        crop: random crops of the training images.
        flip: random flips; they come with ``crop`` only.
        flatten_actions: one number per action, for agents such as DQN.
        render_mode: ``"rgb_array"`` or None: image, perturbation, and the margin at each query.
        max_episode_steps: None; episodes end by the rules' ``queries``.

    Raises:
        InputError: settings that make no such environment.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": RENDER_MODES,
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @known_settings()
    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int = 32,
        *,
        batch_size: int | None = None,
        others: Others | None = None,
        data: ImageSet | None = None,
        defender: Defender | None = None,
        rules: AdaptiveAttack | None = None,
        crop: bool = False,
        flip: bool = False,
        flatten_actions: bool = False,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_render_mode(render_mode)
        check_no_time_limit(max_episode_steps, "its episodes end by the rules' `queries`")
        check_num_envs(num_envs)
        check_data(data)
        check_defender(defender)
        data = data if data is not None else load_data("digits").train
        setting = "num_envs" if batch_size is None else "batch_size"
        if batch_size is None:
            batch_size = num_envs if num_envs > 1 else min(32, len(data))
        check_num_envs(batch_size, "batch_size")
        if batch_size < num_envs:
            raise InputError(f"batch_size {batch_size} is smaller than num_envs {num_envs}")
        if rules is not None and not isinstance(rules, AdaptiveAttack):
            raise InputError(f"rules are an AdaptiveAttack(threat), not a {type(rules).__name__}")
        if others is not None and not callable(others):
            raise InputError("others is a policy, a function of features that returns actions")
        rules = rules or AdaptiveAttack(Linf(0.15))
        self.rules = replace(rules, reward=copy.deepcopy(rules.reward))  # it may have a state
        self.rules.threat.check_shape(data.shape)
        self.defender = defender or default_defender(data)
        self.rules.reward.check(self.defender)
        self.data, self.others = data.to(self.defender.device), others
        self.num_envs = num_envs
        self.flatten_actions, self.render_mode = flatten_actions, render_mode
        self.single_observation_space = spaces.Box(-1, 1, (len(FEATURES),), np.float32)
        self.single_action_space = choice_space((self.rules.options,), flatten_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.defender.check_batch(self.data.floats(slice(batch_size)))
        # attacked in place of the defender, which is in training mode and has weight gradients
        self._model = frozen_copy(self.defender.module, "a frozen copy of it is attacked")
        self._own(batch_size, crop=crop, flip=flip, setting=setting)
        self._initial_reward = copy.deepcopy(self.rules.reward.state_dict())
        self.result: DefenderStep | None = None
        """The defender's last step: adversarial examples, losses, cost."""

    @torch.inference_mode(False)
    @torch.enable_grad()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The next images under attack; with a seed, the game from its beginning."""
        self._reset_training(seed, options)
        self._draw()
        return self._observe(), self._info()

    @override
    def _begin(self, seed: int) -> None:
        super()._begin(seed)
        self.rules.reward.load_state_dict(copy.deepcopy(self._initial_reward))
        rank = self.defender.fabric.global_rank
        self._others_rng = stream(seed, f"others{rank}", self.defender.device)
        self._level = 0.0

    def _draw(self) -> None:
        """The next images, and the first query of each."""
        self._x, self._y = self._next_batch()
        self._model.load_state_dict(self.defender.module.state_dict())
        with self.defender.fabric.autocast():
            self.state = self.rules.begin(self._model, self._x, self._y, self._rng)
        device = self._x.device
        self._rows = torch.arange(self.batch_size, device=device)  # that are still attacked
        self._start, self._points = self.state.x_adv.clone(), self.state.x_adv.clone()
        self._eps = self.state.eps.clone()
        self._loss, self._margin = torch.zeros_like(self._eps), torch.zeros_like(self._eps)
        self._logits = self.state.logits.float().clone()
        self._used = torch.zeros_like(self._y)
        self._p = torch.zeros_like(self._eps)
        self._features = torch.zeros(self.batch_size, len(FEATURES), device=device)
        self._features[:, -2] = self._level
        self._features[:, -1] = self.steps / (self.steps + 100)
        self._paid = torch.zeros(self.batch_size, device=device)
        self._over = False
        self._words = ["a random point of the ball"] * self.num_envs
        self._begin_pictures()
        self._note(first=True)

    def _note(self, *, first: bool = False) -> None:
        """What the last query said, at the places of the images that are still attacked."""
        rows, state = self._rows, self.state
        seen, p = self.rules.seen(state, None if first else self._p[rows])
        self._features[rows, : seen.shape[1]] = seen.clamp(-1, 1)
        self._p[rows], self._points[rows] = p, state.x_adv
        self._loss[rows], self._margin[rows] = state.loss, margin(state.logits, state.y)
        self._logits[rows], self._used[rows] = state.logits.float(), state.queries
        if self.render_mode:
            for row in rows[rows < self.num_envs].tolist():
                self._curves[row].append(float(self._margin[row]))

    @property
    def _waiting(self) -> Tensor:
        """Which images have stopped, (B,) bool."""
        waiting = torch.ones(self.batch_size, dtype=torch.bool, device=self._y.device)
        waiting[self._rows] = False
        return waiting

    @torch.inference_mode(False)
    @torch.enable_grad()  # the defender learns in here, also while an agent collects without
    def step(
        self, actions: Tensor | np.ndarray[Any, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One query, or the end, of each image that is still attacked.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: wrong shape or type, or indices outside the list.
        """
        self._check_begun("step")
        sizes = (self.rules.options,)
        chosen = as_numbers(actions, self.action_space, self.defender.device)
        chosen = unflatten(chosen, sizes) if self.flatten_actions else chosen
        check_indices(chosen, sizes)
        reward = torch.zeros(self.batch_size, device=self._y.device)
        if self._over:
            self._draw()
        else:
            self.show_present()
            mine = chosen[:, 0].long()
            self._query(mine, reward)
            while len(self._rows) and bool((self._rows >= self.num_envs).all()):
                self._query(mine, reward)  # of the others only
            self._paid += reward
            if not len(self._rows):
                reward += self._learn()
        ended = torch.full((self.num_envs,), self._over, device=self._y.device)
        never = torch.zeros_like(ended)
        return self._observe(), reward[: self.num_envs], ended, never, self._info()

    def _query(self, mine: Tensor, reward: Tensor) -> None:
        """Let every image go on or stop; adds what its query pays.

        Args:
            mine: (n,) actions of the agent.
            reward: (B,) written into.
        """
        chosen = torch.cat([mine, self._others_choose()])
        if self.render_mode:
            self._words = [self._in_words(int(one)) for one in mine]
        here = chosen[self._rows]
        stops = here == self.rules.stop
        self._features[self._rows, -3] = stops.float()
        going = (~stops).nonzero()[:, 0]
        self._rows = self._rows[going]
        if not len(going):
            return
        before = self.state.loss[going]
        with self.defender.fabric.autocast():
            self.state.step(going, here[going])
        paid = self.rules.reward.query(before, self.state.loss)
        reward[self._rows] += (paid - self.rules.price).float()
        self._note()
        if self.state.queries == self.rules.queries:
            self._features[self._rows, -3] = 1
            self._rows = self._rows[:0]

    def _others_choose(self) -> Tensor:
        """Actions (B - n,) of the images that are not the agent's."""
        count = self.batch_size - self.num_envs
        if self.others is None:
            rng, device = self._others_rng, self._y.device
            return torch.randint(self.rules.options, (count,), generator=rng, device=device)
        if not count:
            return self._y[:0]
        seen = self._features[self.num_envs :].clone()
        chosen = torch.as_tensor(self.others(seen), device=seen.device)
        check_indices(chosen.reshape(-1, 1), (self.rules.options,))
        if chosen.numel() != count:
            raise InputError(f"others must return {count} actions, not {tuple(chosen.shape)}")
        return chosen.flatten().long()

    def _learn(self) -> Tensor:
        """The defender's step; what it pays, (B,)."""
        own = (self._start, self._points, self._loss, self._eps)
        turn = Turn(self.defender, self._x, self._y, *own, self._rng)
        turn.passes.forwards += self.state.forwards / self.batch_size
        turn.passes.input_backwards += self.state.backwards / self.batch_size
        with self._chance:
            self.result, reward = self.rules.learn(turn)
        self.result.stats["game/attacker_reward"] = (self._paid + reward).mean()
        self.result.stats["strategy/steps"] = (self._used - 1).float().mean()
        self.steps += 1
        right = float((-self.result.losses).exp().mean())
        self._level = right if self.steps == 1 else 0.9 * self._level + 0.1 * right
        self._over = True
        return reward.float()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def restart(self) -> Tensor:
        """The next images, now instead of at the next step, where the episode has ended.

        For adapters whose other side resets within the step.
        """
        if self._over:
            if self.render_mode:
                self._keep_ends(range(self.num_envs))
            ended = self._ended
            self._draw()
            self._ended = ended
        return self._observe()

    def _observe(self) -> Tensor:
        return self._features[: self.num_envs].clone()

    def _info(self) -> dict[str, Any]:
        n = self.num_envs
        values = {
            "loss": self._loss[:n].float().clone(),
            "queries": self._used[:n].clone(),
            "fooled": self._margin[:n] > 0,
            "waiting": self._waiting[:n],
        }
        every = torch.ones(n, dtype=torch.bool, device=self._y.device)
        return {**values, **{f"_{name}": every for name in values}}

    def _in_words(self, action: int) -> str:
        sizes = self.rules.step_sizes
        if action < len(sizes):
            return f"last action: on with {sizes[action]:.3g} ε"
        return "last action: " + ("restart" if action == len(sizes) else "stop")

    @override
    def _sketch(self, row: int) -> Callable[[], Any]:
        clean, point = (one[row].float().cpu().numpy().copy() for one in (self._x, self._points))
        seen = self._logits[row].softmax(0)
        size = abs(point - clean).max()
        return partial(
            attack_picture,
            name="AdaptiveAttack-v0",
            images=(clean, point),
            scale=float(
                self._eps[row] if isinstance(self.rules.threat, Linf) or not size else size
            ),
            classes=(int(self._y[row]), int(seen.argmax())),
            confidence=float(seen.max()),
            margins=list(self._curves[row]),
            budget=self.rules.queries,
            fooled=bool(self._margin[row] > 0),
            action="stopped" if bool(self._waiting[row]) else self._words[row],
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy makes the attacks' last forward again, in the training's precision as they did."""
        vars(self).update(state)
        if "state" in state:
            with self.defender.fabric.autocast():
                self.state._forward()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The training's place, of the game too; not the attacks under way."""
        return {
            **super().state_dict(),
            "reward": copy.deepcopy(self.rules.reward.state_dict()),
            "others": self._others_rng.get_state(),
            "level": self._level,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, at the next reset; call ``reset()`` before, too."""
        super().load_state_dict(state)
        self.rules.reward.load_state_dict(copy.deepcopy(state["reward"]))
        self._others_rng.set_state(state["others"])
        self._level = state["level"]


class AdaptiveAttackEnv(SingleEnv):
    """One image of a batch whose others follow a policy: `AdaptiveAttackVectorEnv` with n = 1."""

    vector = AdaptiveAttackVectorEnv

"""`advgame/StrategySelection-v0`: choose a PGD configuration per image, as in LAS-AT."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import warnings
import weakref
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

from advgame.choices import Credit
from advgame.data import ImageSet, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.las_at import LasAt, StepResult
from advgame.games.strategy import CHOICES, StrategySpace
from advgame.threat import Linf
from envs.actions import as_numbers, choice_space, unflatten
from envs.adapters import SingleEnv
from envs.pictures import strategy_picture
from envs.standard import (
    RENDER_MODES,
    check_data,
    check_defender,
    check_kind,
    check_no_time_limit,
    check_num_envs,
    check_render_mode,
    default_defender,
    known_settings,
)
from envs.training import TrainingVectorEnv


class StrategySelectionVectorEnv(TrainingVectorEnv):
    """A batch of B images = B environments that share one learning defender.

    Description:
        A classifier learns from adversarial examples. For each clean image the agent chooses how
        PGD makes the example: the radius ε, the number of steps and the step size. One step of
        the environment is one training step of the defender (`advgame.games.las_at`).

    Action space:
        MultiDiscrete (number of ε values, of step counts, of step sizes) per image, decoded by
        `advgame.games.strategy.StrategySpace`. Tensors or arrays of integers (B, 3). In LAS-TRADES
        there is a fourth choice, β. With ``flatten_actions`` Discrete: one number for all.

    Observation space:
        Box [0, 1] (C, H, W), the clean image, float32; (B, C, H, W) on the defender's device.

    Reward:
        a·R1 + b·R2 + c·R3 per image with the chosen credit, or what ``rules`` have as
        ``LasAt(threat, reward=...)`` or ``progress=...``; the terms stand in ``info`` as
        ``r1``, ``r2``, ``r3``, each (B,). With ``reward_interval`` k they are computed on every
        k-th step; ``info["reward_valid"]`` (B,) says where, elsewhere the reward is 0.

    Start:
        The next batch of training images. ``reset(seed=s)`` restores the initial defender,
        optimiser and data order, so that two seeded runs are equal; ``reset()`` goes on.

    End:
        Each decision ends its episode (``terminated``); autoreset is SAME_STEP: the observation
        returned is the next image, the one just played is ``info["final_obs"]``.

    Args:
        num_envs: B, images per step.
        data: training images; the digits training split when None.
        defender: classifier and optimiser, which the environment owns from now on; a small CNN
            on the CPU when None.
        rules: of the game; L∞ with ε₀ = 0.15 when None. A stopping rule and a progress are copied:
            the environment's own, ``env.rules.rule``, is the one that learns.
        space: the choices; the CIFAR-10 lists of LAS-AT at the rules' ε₀ when None.
        credit: how batch terms are shared out, `advgame.games.las_at.LasAt.pay`.
        reward_interval: k; 0 never pays.
        crop: random crops of the training images.
        flip: random flips; they come with ``crop`` only.
        ramp_steps: over the first steps, ε and step size of every strategy grow linearly to
            what was chosen. MNIST at ε₀ = 0.3 needs it: at full strength from the start, a
            network ends as a constant.
        flatten_actions: one number per action instead of an index per list, for agents such as
            DQN; it is NumPy's ``ravel_multi_index`` of the indices.
        render_mode: ``"rgb_array"`` or None: the image played, its perturbation, the strategy
            chosen for it and what that paid.
        max_episode_steps: None; every episode is one step.

    Source: Jia et al., LAS-AT: Adversarial Training with Learnable Attack Strategy, CVPR 2022.
    """

    metadata = {  # noqa: RUF012
        "render_modes": RENDER_MODES,
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    @known_settings()
    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int = 64,
        *,
        data: ImageSet | None = None,
        defender: Defender | None = None,
        rules: LasAt | None = None,
        space: StrategySpace | None = None,
        credit: Credit = "mixed",
        reward_interval: int = 1,
        crop: bool = False,
        flip: bool = False,
        ramp_steps: int = 0,
        flatten_actions: bool = False,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_render_mode(render_mode)
        check_no_time_limit(max_episode_steps, "every episode is one step")
        check_num_envs(num_envs)
        check_data(data)
        if reward_interval < 0 or ramp_steps < 0:
            raise InputError("reward_interval and ramp_steps must be 0 or above")
        if credit not in ("mixed", "sample", "batch"):
            raise InputError(f"credit must be mixed, sample or batch, not {credit!r}")
        check_defender(defender)
        check_kind("rules", rules, LasAt, "advgame.games.LasAt(advgame.Linf(0.15))")
        check_kind("space", space, StrategySpace, "advgame.games.StrategySpace(eps0=0.15)")
        data = data if data is not None else load_data("digits").train
        rules = rules or LasAt(Linf(0.15))
        # both have a state: the caller's own stay as they are
        progress, rule = copy.deepcopy(rules.progress), copy.deepcopy(rules.rule)
        self.rules = replace(rules, progress=progress, rule=rule)
        ball = self.rules.threat
        cap = ball.whole(math.prod(data.shape)) / 2
        self.space = space or StrategySpace(float(ball.eps), eps_cap=cap)
        _check_space(self.space, self.rules)
        self.defender = defender or default_defender(data)
        self.data = data.to(self.defender.device)
        self.credit: Credit = credit
        self.reward_interval = reward_interval
        self.num_envs, self.ramp_steps = num_envs, ramp_steps
        self.single_observation_space = spaces.Box(0, 1, data.shape, np.float32)
        self.flatten_actions, self.render_mode = flatten_actions, render_mode
        self.single_action_space = choice_space(self.space.sizes, flatten_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.defender.check_batch(self.data.floats(slice(num_envs)))
        if reward_interval and self.rules.progress is None:
            self.defender.check_look_ahead()
            some = torch.zeros(min(2, num_envs), len(self.space.sizes), dtype=torch.int64)
            few = self.data.floats(slice(len(some))), self.data.labels[: len(some)]
            chosen = self.space.decode(some.to(self.defender.device))
            self.rules.try_reward(self.defender.module, *few, chosen)
        self._own(num_envs, crop=crop, flip=flip)
        self._initial_learned = self._learned()
        self.result: StepResult | None = None
        """The last step in full: adversarial examples, losses, pay-offs, cost."""

    @torch.inference_mode(False)
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The images that are next to be played; with a seed, the game from its beginning."""
        self._reset_training(seed, options)
        self.show_present()
        return self.images.clone(), {}

    @override
    def _begin(self, seed: int) -> None:
        super()._begin(seed)
        self._set_learned(self._initial_learned)
        self._begin_pictures()
        self._draw()

    def _learned(self) -> dict[str, Any]:
        """The states of the progress that is paid and of the rule that ends attacks; {} of none."""
        return {
            name: {} if part is None else copy.deepcopy(part.state_dict())
            for name, part in self._learners().items()
        }

    def _set_learned(self, place: dict[str, Any]) -> None:
        """Copies of what `_learned` returned; what ``place`` has not stays as it is."""
        for name, part in self._learners().items():
            if part is not None and name in place:
                part.load_state_dict(copy.deepcopy(place[name]))

    def _learners(self) -> dict[str, Any]:
        return {"progress": self.rules.progress, "rule": self.rules.rule}

    def _draw(self) -> None:
        self.images, self.labels = self._next_batch()

    @property
    def reward_due(self) -> bool:
        """Whether the next step pays a reward: every ``reward_interval``-th does."""
        return self.reward_interval > 0 and (self.steps + 1) % self.reward_interval == 0

    @torch.inference_mode(False)
    @torch.enable_grad()  # the defender learns in here, also while an agent collects without
    def step(
        self, actions: Tensor | np.ndarray[Any, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Play the chosen strategies (B, choices) and move on to the next images.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: wrong shape or type, or indices outside the lists.
        """
        self._check_begun("step")
        chosen = as_numbers(actions, self.action_space, self.defender.device)
        if self.flatten_actions:
            chosen = unflatten(chosen, self.space.sizes)
        strategies = self.space.decode(chosen)
        if (made := self.defender.clock(self.steps)) < self.ramp_steps:
            strategies = strategies.scaled((made + 1) / self.ramp_steps)
        played, due = self.images, self.reward_due
        with self._chance:
            self.result = self.rules.step(
                self.defender,
                played,
                self.labels,
                strategies,
                self._rng,
                credit=self.credit if due else None,
            )
        self.steps += 1
        info = self._info(self.result, played, due)
        if self.render_mode:
            self._trace(chosen, info)
        self._draw()
        payoffs = self.result.payoffs
        reward = payoffs.reward if payoffs else torch.zeros_like(info["loss"])
        ended = torch.ones(self.num_envs, dtype=torch.bool, device=played.device)
        return self.images.clone(), reward, ended, torch.zeros_like(ended), info

    def _trace(self, chosen: Tensor, info: dict[str, Any]) -> None:
        """Remember for the pictures what was played, and what it paid."""
        result, terms = self.result, {k: v.tolist() for k, v in info["final_info"].items()}
        assert result is not None
        paid = result.payoffs.reward.tolist() if result.payoffs else [0.0] * self.num_envs
        self._ended = {}
        for row, reward in enumerate(paid):
            self._curves[row].append(reward)
            self._ended[row] = self._sketch(
                row,
                (info["final_obs"][row], result.x_adv[row]),
                chosen[row].tolist(),
                {name: terms[name][row] for name in ("loss", "r1", "r2", "r3") if name in terms},
            )

    @override
    def _sketch(
        self,
        row: int,
        images: tuple[Tensor, ...] = (),
        chosen: list[int] | None = None,
        terms: dict[str, float] | None = None,
    ) -> Callable[[], Any]:
        """Of the image that is next, or of one that was played."""
        pair = images or (self.images[row],)
        clean, *made = (one.float().cpu().numpy().copy() for one in pair)
        point = made[0] if made else None
        scale = float(self.rules.threat.eps)
        if point is not None:
            scale = float(abs(point - clean).max()) or scale
        lists = [self.space.options(column).tolist() for column in range(len(self.space.sizes))]
        return partial(
            strategy_picture,
            images=(clean, point),
            scale=scale,
            choices=[
                (_IN_WORDS[name], [f"{one:.3g}" for one in lists[i]], chosen[i] if chosen else None)
                for i, name in enumerate(CHOICES[: len(lists)])
            ],
            terms=terms or {},
            rewards=self._curves[row][-100:],
            step=self.steps,
        )

    def _info(self, result: StepResult, played: Tensor, due: bool) -> dict[str, Any]:
        every = torch.ones(self.num_envs, dtype=torch.bool, device=played.device)
        terms: dict[str, Any] = {"reward_valid": every & due, "loss": result.losses}
        if result.payoffs is not None:
            terms |= {name: getattr(result.payoffs, name) for name in ("r1", "r2", "r3")}
        return {
            **terms,
            **{f"_{name}": every for name in terms},
            "final_obs": played,
            "_final_obs": every,
            "final_info": terms,
            "_final_info": every,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """The training's place, the images now shown, and what the rules have learned."""
        place = super().state_dict()  # before the first reset it refuses
        shown = {"images": self.images.cpu(), "labels": self.labels.cpu()}
        return {**place, **shown, **self._learned()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copy of a saved place; call ``reset(seed=…)`` first.

        Weights are loaded apart. A state of an earlier version says nothing of a stopping rule:
        the rule then stays as it is.
        """
        super().load_state_dict(state)
        self._set_learned(state)
        # the images are given away as final_obs: whoever writes into them must not reach the state
        self.images = state["images"].to(self.defender.device, copy=True)
        self.labels = state["labels"].to(self.defender.device, copy=True)


class StrategySelectionEnv(SingleEnv):
    """One image at a time, in NumPy: `StrategySelectionVectorEnv` with B = 1.

    The defender learns from batches of one image, so this is for checkers and for agents that
    know single environments only. Several of them at once, or one in a worker process, are what
    Gymnasium's and SB3's own vectorisers make of the id: a warning says what to use instead.
    Arguments as the vector environment's.
    """

    _playing: ClassVar[weakref.WeakSet[StrategySelectionEnv]] = weakref.WeakSet()

    vector = StrategySelectionVectorEnv

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if self not in self._playing:
            if self._playing:
                gc.collect()  # those that nobody holds do not count
            if self._playing or multiprocessing.parent_process() is not None:
                warnings.warn(_ALONE, stacklevel=2)
            self._playing.add(self)
        return super().reset(seed=seed, options=options)

    @override
    def close(self) -> None:
        """Nothing is held; another single environment is then the only one."""
        self._playing.discard(self)


_IN_WORDS = {"eps": "radius ε", "steps": "steps", "step_size": "step size", "beta": "β"}

_ALONE = (
    "several single StrategySelection environments: each trains a classifier of its own, on "
    "batches of one image. For n images that one classifier learns from, use "
    "gymnasium.make_vec(id, n), which gives tensors, or for Stable-Baselines3 "
    "envs.make_sb3(id, n)"
)


def _check_space(space: StrategySpace, rules: LasAt) -> None:
    """Refuse a space that the rules would not play as it reads."""
    eps0 = float(rules.threat.eps)
    if not math.isclose(space.eps0, eps0, rel_tol=1e-6):
        raise InputError(
            f"the space's ε₀ is {space.eps0:.4g}, that of the rules {eps0:.4g}: give both the same"
        )
    if space.betas and type(rules) is LasAt:
        raise InputError("LasAt has no β: leave the list out, or take LasTrades")

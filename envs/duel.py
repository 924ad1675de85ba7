"""`duel_v0`: attacker and defender, two agents of a PettingZoo environment, play a training.

    env = envs.duel.parallel_env()            # both agents act at once
    env = envs.duel.against(policy)           # one agent; `policy` plays the other side
    env = envs.duel.env()                     # one after the other, neither sees the other's move

It needs PettingZoo, the extra ``advgame[duel]``. One step is `advgame.games.duel.Duel.step`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from torch import Tensor
from typing_extensions import override

from advgame.choices import Stake
from advgame.data import Batches, ImageSet, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.duel import (
    LARGEST_LOSS,
    LESSON,
    Duel,
    DuelStep,
    Lesson,
    LessonSpace,
    Standing,
    payoffs,
    places,
)
from advgame.games.strategy import CHOICES, Strategies, StrategySpace
from advgame.seeding import PrivateRNG, derive_seed, stream
from advgame.threat import Linf, Threat
from envs.actions import as_numbers
from envs.adapters import as_arrays
from envs.pictures import drawn, duel_picture
from envs.standard import (
    RENDER_MODES,
    check_data,
    check_defender,
    check_fit,
    check_num_envs,
    check_render_mode,
    default_defender,
)

try:
    from pettingzoo import ParallelEnv
    from pettingzoo.utils.conversions import parallel_to_aec
except ImportError as _error:
    raise InputError(
        "the duel is a PettingZoo environment: pip install 'advgame[duel]', or pettingzoo"
    ) from _error

AGENTS = ("attacker", "defender")
HELD_OUT = 64
"""Images of the default held-out batch."""

FEATURES = {
    "progress": "steps played over steps of the match",
    "standing": 'robust accuracy on the held-out images; with reward="loss" the loss, negative',
    "rise": "what the last step paid the defender",
    "clean": "accuracy on the held-out images without attack",
    "loss": "cross-entropy on the last adversarial examples before the defender learned from them",
    "accuracy": "share of these that were right",
    "entropy": "of the predictions for these, over that of a uniform one",
    "eps": "place of the last ε in its list, 0 the first and 1 the last; the mean over images",
    "steps": "the same of the number of steps",
    "step_size": "the same of the step size",
    "rate": "the same of the learning rate's factor",
    "clean_weight": "the same of the clean loss' weight",
    "true_probability": "the same of the label smoothing",
    "awp": "1 where the last step perturbed the weights",
}
"""What both agents see."""

Seen = Any  # a vector, or a dict of it and the images
Policy = Callable[[Seen], Any]
"""One agent's observation -> its action."""


class DuelEnv(ParallelEnv[str, Any, Any]):  # type: ignore[misc]  # PettingZoo has no types
    """Two agents play one training of a classifier; an episode is a match of ``max_cycles`` steps.

    Description, actions, observations, rewards: docs/envs/duel_v0.md.

    Args:
        data: training images; the digits training split when None.
        held_out: images that the standing is taken on, which come with ``data``; 64 validation
            images of digits when None. Test images would be learned from.
        defender: classifier and optimiser, which the environment owns from now on; a small CNN on
            the CPU when None.
        threat: ε₀, the ball of the standing; L∞ with 0.15 when None.
        space: the attacker's lists; the CIFAR-10 lists of LAS-AT at ε₀ when None.
        lessons: the defender's lists; `LessonSpace` when None.
        batch_size: B, images per step.
        max_cycles: steps of a match; one pass over the data when None.
        per_image: the attacker chooses for each image, not for the whole batch.
        images: the attacker sees the batch that is next, too.
        reward: what is played for: ``"robust"`` accuracy or ``"loss"``.
        pay: ``"step"`` pays what each step changes; ``"end"`` pays once, after the last step, and
            takes no standing in between, which is about half of a step's time by default.
        gamma: γ of weight perturbation.
        crop: random crops of the training images.
        flip: random flips; they come with ``crop`` only.
        render_mode: ``"rgb_array"`` or None: the match so far.

    Raises:
        InputError: settings that cannot be played.
    """

    metadata = {  # noqa: RUF012
        "name": "duel_v0",
        "render_modes": RENDER_MODES,
        "render_fps": 4,
        "is_parallelizable": True,
    }

    @torch.inference_mode(False)
    def __init__(
        self,
        *,
        data: ImageSet | None = None,
        held_out: ImageSet | None = None,
        defender: Defender | None = None,
        threat: Threat | None = None,
        space: StrategySpace | None = None,
        lessons: LessonSpace | None = None,
        batch_size: int = 64,
        max_cycles: int | None = None,
        per_image: bool = False,
        images: bool = False,
        reward: Stake = "robust",
        pay: Literal["step", "end"] = "step",
        gamma: float = 0.01,
        crop: bool = False,
        flip: bool = False,
        render_mode: str | None = None,
    ) -> None:
        check_render_mode(render_mode)
        check_num_envs(batch_size, "batch_size")
        check_data(data)
        check_data(held_out)
        check_defender(defender)
        if reward not in ("robust", "loss"):
            raise InputError(f"reward must be robust or loss, not {reward!r}")
        if pay not in ("step", "end"):
            raise InputError(f"pay must be step or end, not {pay!r}")
        if (data is None) != (held_out is None):
            raise InputError(
                "data and held_out come together: images to learn from, and others that the "
                "standing is taken on"
            )
        if data is None or held_out is None:
            digits = load_data("digits")
            data, held_out = digits.train, digits.validation.first(HELD_OUT)
        self.rules = Duel(threat or Linf(0.15), gamma)
        ball = self.rules.threat
        if isinstance(ball.eps, Tensor):
            raise InputError("the duel is judged at one eps: give the threat a float")
        cap = ball.whole(math.prod(data.shape)) / 2
        self.space = space or StrategySpace(float(ball.eps), eps_cap=cap)
        if not math.isclose(self.space.eps0, float(ball.eps), rel_tol=1e-6) or self.space.betas:
            raise InputError(f"the space must have the threat's ε₀, {ball.eps:.4g}, and no β")
        self.lessons = lessons or LessonSpace()
        self.lessons.check(data.classes)
        self.defender = defender or default_defender(data)
        self.rules.check(self.defender)
        self.data, self.held_out = data.to(self.device), held_out.to(self.device)
        check_fit(self.defender, self.data)
        check_fit(self.defender, self.held_out)
        self.defender.check_batch(self.data.floats(slice(batch_size)))
        self.batch_size, self.crop, self.flip = batch_size, crop, flip
        Batches(self.data, batch_size, 0)  # refuses a batch that is larger than the data
        if max_cycles is not None:
            check_num_envs(max_cycles, "max_cycles")
        self.max_cycles = int(max_cycles or len(data) // batch_size)
        self.per_image, self.images, self.reward, self.pay = per_image, images, reward, pay
        self.render_mode = render_mode
        self.possible_agents = list(AGENTS)
        self.agents: list[str] = []
        self._make_spaces()
        self._initial = copy.deepcopy(self.defender.module.state_dict())
        self._initial_state = copy.deepcopy(self.defender.state_dict())
        self._seed: int | None = None

    def _make_spaces(self) -> None:
        low, high = np.zeros(len(FEATURES), np.float32), np.ones(len(FEATURES), np.float32)
        names = list(FEATURES)
        largest = 1.0 if self.reward == "robust" else LARGEST_LOSS
        standing, rise, loss = (names.index(name) for name in ("standing", "rise", "loss"))
        low[rise], high[rise] = -largest, largest
        if self.reward == "loss":
            low[standing], high[standing] = -largest, 0.0
        high[loss] = LARGEST_LOSS
        sizes = np.array(self.space.sizes)
        if self.per_image:
            sizes = np.tile(sizes, (self.batch_size, 1))
        self._action_spaces: dict[str, spaces.MultiDiscrete] = {
            "attacker": spaces.MultiDiscrete(sizes),
            "defender": spaces.MultiDiscrete(list(self.lessons.sizes)),
        }
        self._observation_spaces: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(low, high, dtype=np.float32) for name in AGENTS
        }
        if self.images:
            shape = (self.batch_size, *self.data.shape)
            self._observation_spaces["attacker"] = spaces.Dict(
                features=self._observation_spaces["attacker"],
                images=spaces.Box(0, 1, shape, np.float32),
            )

    @property
    def device(self) -> torch.device:
        """Where the classifier and all images lie."""
        return self.defender.device

    @override
    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self._observation_spaces[agent]

    @override
    def action_space(self, agent: str) -> spaces.MultiDiscrete:
        return self._action_spaces[agent]

    @override
    @torch.inference_mode(False)
    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Seen], dict[str, dict[str, Any]]]:
        """Begin a match: classifier and optimiser as they were given, images in a new order.

        Args:
            seed: of the order and of all draws; with equal seeds equal matches. The seed of a
                match follows from that of the one before where there is none.
            options: there are none.

        Returns:
            Observations and infos by agent.
        """
        if seed is None:
            seed = (
                int(seeding.np_random()[0].integers(2**31))
                if self._seed is None
                else derive_seed(self._seed, "next match")
            )
        self._begin(int(seed))
        self.first = self.standing = self._judge()
        self._draw()
        info = self._told(self.standing)
        return self._observations(), {agent: dict(info) for agent in self.agents}

    def _begin(self, seed: int) -> None:
        derive_seed(seed, "check")
        self._seed, self.steps = seed, 0
        self.defender.module.load_state_dict(self._initial)
        self.defender.load_state_dict(copy.deepcopy(self._initial_state))
        data, size = self.data, self.batch_size
        self._batches = Batches(data, size, seed, crop=self.crop, flip=self.flip)
        self._rng = stream(seed, "attack", self.device)
        self._chance = PrivateRNG(derive_seed(seed, "dropout"), self.device)
        self.agents = list(self.possible_agents)
        self._last = [0.0] * (len(FEATURES) - 3)  # what progress, standing and clean leave
        self._curve: list[float] = []
        self._choices: list[list[float]] = []
        self._played: tuple[Tensor, Tensor] | None = None

    def _draw(self) -> None:
        self.batch, self.labels = self._batches.next()

    def _judge(self) -> Standing:
        """Where the classifier stands, under the same attack at every step of a match."""
        assert self._seed is not None
        x, y = self.held_out.floats(), self.held_out.labels
        standing = self.rules.judge(
            self.defender.module, x, y, stream(self._seed, "judge", self.device)
        )
        self._curve.append(standing.value(self.reward))
        return standing

    @override
    @torch.inference_mode(False)
    @torch.enable_grad()  # the defender learns in here, also while an agent collects without
    def step(
        self, actions: dict[str, Any]
    ) -> tuple[
        dict[str, Seen],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """One training step of the classifier, as both agents have chosen it.

        Args:
            actions: of each agent, indices of its lists.

        Returns:
            Observations, rewards, terminated, truncated and infos by agent. After the last step
            both are terminated and `agents` is empty.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or after a match's end.
            InputError: an agent without an action, or one outside its lists.
        """
        if not self.agents:
            raise gym.error.ResetNeeded("call reset(): no match is being played")
        strategies, lesson, chosen = self._read(actions)
        played = self.batch
        with self._chance:
            made = self.rules.step(
                self.defender, played, self.labels, strategies, lesson, self._rng
            )
        self.steps += 1
        over = self.steps >= self.max_cycles
        before = self.standing
        judged = over or self.pay == "step"
        if judged:
            self.standing = self._judge()
        paid = payoffs(before, self.standing, self.reward)
        self._last = [paid[1], made.loss, made.accuracy, made.entropy, *chosen]
        self._choices.append(chosen)
        self._played = (played[:3], made.x_adv[:3])
        info = self._told(before) | self._moves(made, strategies, lesson) | {"judged": judged}
        self._draw()
        seen = self._observations()
        ended = dict.fromkeys(AGENTS, over)
        rewards = dict(zip(AGENTS, paid, strict=True))
        infos = {agent: dict(info) for agent in AGENTS}
        if over:
            self.agents = []
        return seen, rewards, ended, dict.fromkeys(AGENTS, False), infos

    def _read(self, actions: dict[str, Any]) -> tuple[Strategies, Lesson, list[float]]:
        """The moves, and where they lie in their lists."""
        _check_agents(actions, AGENTS)
        strategy, taught = (
            as_numbers(actions[agent], self._action_spaces[agent], self.device) for agent in AGENTS
        )
        rows = strategy if self.per_image else strategy[None]
        lesson = self.lessons.decode(taught)
        strategies = self.space.decode(rows.expand(self.batch_size, -1))
        chosen = [*places(rows, self.space.sizes), *places(taught[None], self.lessons.sizes)]
        return strategies, lesson, chosen

    def _observations(self) -> dict[str, Seen]:
        rise, *rest = self._last
        now = [self.steps / self.max_cycles, self.standing.value(self.reward), rise]
        vector = np.array([*now, self.standing.clean, *rest], np.float32)
        seen: dict[str, Seen] = {agent: vector.copy() for agent in AGENTS}
        if self.images:
            seen["attacker"] = {"features": seen["attacker"], "images": as_arrays(self.batch)}
        return seen

    def _told(self, before: Standing) -> dict[str, Any]:
        """What every info holds: the standing now, and the one that the pay is counted from."""
        terms = {name: getattr(self.standing, name) for name in ("robust", "clean", "loss")}
        return terms | {f"{name}_before": getattr(before, name) for name in terms}

    def _moves(self, made: DuelStep, strategies: Strategies, lesson: Lesson) -> dict[str, Any]:
        moves = {name: float(getattr(strategies, name).float().mean()) for name in CHOICES[:3]}
        taught = {name: float(getattr(lesson, name)) for name in LESSON}
        taught["clean_weight"] = taught.pop("clean")
        return {
            "adversarial_loss": made.loss,
            "adversarial_accuracy": made.accuracy,
            "entropy": made.entropy,
            "passes": float(made.stats["attacker/forwards_per_image"]),
            **moves,
            **taught,
        }

    @override
    def render(self) -> np.ndarray[Any, Any] | None:
        """The match so far, uint8 (H, W, 3); None, and a warning, without render mode.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not drawn(self.render_mode, self._seed is not None):
            return None
        clean, point = self._played or (self.batch[:3], self.batch[:3])
        return duel_picture(
            step=self.steps,
            steps=self.max_cycles,
            about="robust accuracy" if self.reward == "robust" else "−loss under PGD-10",
            curve=self._curve,
            every=1 if self.pay == "step" else self.max_cycles,
            choices=self._choices,
            names=[name.replace("_", " ") for name in (*CHOICES[:3], *_SHORT)],
            images=(as_arrays(clean), as_arrays(point)),
            scale=float((point - clean).abs().max()) or float(self.rules.threat.eps),
        )

    def state_dict(self) -> dict[str, Any]:
        """The place in the match, weights included: containers, numbers and tensors.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._seed is None:
            raise gym.error.ResetNeeded("call reset() before state_dict()")
        return {
            "seed": self._seed,
            "weights": {k: v.cpu().clone() for k, v in self.defender.module.state_dict().items()},
            "defender": copy.deepcopy(self.defender.state_dict()),
            "batches": self._batches.state_dict(),
            "rng": self._rng.get_state(),
            "chance": self._chance.state_dict(),
            "steps": self.steps,
            "agents": list(self.agents),
            "standings": [vars(one).copy() for one in (self.first, self.standing)],
            "batch": (self.batch.cpu(), self.labels.cpu()),
            "last": list(self._last),
            "curve": list(self._curve),
            "choices": copy.deepcopy(self._choices),
            "played": self._played and tuple(one.cpu() for one in self._played),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, to the same bits; no reset is needed."""
        self._begin(state["seed"])
        self.defender.module.load_state_dict(state["weights"])
        self.defender.load_state_dict(copy.deepcopy(state["defender"]))
        self._batches.load_state_dict(state["batches"])
        self._rng.set_state(state["rng"])
        self._chance.load_state_dict(state["chance"])
        self.steps, self.agents = state["steps"], list(state["agents"])
        self.first, self.standing = (Standing(**one) for one in state["standings"])
        self.batch, self.labels = (one.to(self.device) for one in state["batch"])
        self._last, self._curve = list(state["last"]), list(state["curve"])
        self._choices = copy.deepcopy(state["choices"])
        played = state["played"]
        self._played = played and tuple(one.to(self.device) for one in played)


def _check_agents(actions: object, agents: tuple[str, ...]) -> None:
    """Refuse what are no actions of these agents, and of nobody else."""
    if not isinstance(actions, dict) or actions.keys() != set(agents):
        raise InputError(f"actions are a dict of {' and '.join(agents)}")


_SHORT = ("learning rate", "clean weight", "smoothing", "AWP")


class OneSidedEnv(ParallelEnv[str, Any, Any]):  # type: ignore[misc]  # as above
    """The duel with one agent, and a policy on the other side: `against`.

    Args:
        core: the duel.
        agent: who is left to play.
        opponent: the other side's policy.
    """

    def __init__(self, core: DuelEnv, agent: str, opponent: Policy) -> None:
        if agent not in AGENTS:
            raise InputError(f"agent must be {' or '.join(AGENTS)}, not {agent!r}")
        self.core, self.agent, self.opponent = core, agent, opponent
        self.other = AGENTS[1 - AGENTS.index(agent)]
        self.metadata, self.render_mode = core.metadata, core.render_mode
        self.possible_agents = [agent]
        self.agents: list[str] = []

    @override
    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self.core.observation_space(agent)

    @override
    def action_space(self, agent: str) -> spaces.MultiDiscrete:
        return self.core.action_space(agent)

    @override
    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Seen], dict[str, dict[str, Any]]]:
        seen, infos = self.core.reset(seed, options)
        self._seen, self.agents = seen[self.other], [self.agent]
        return self._own(seen), self._own(infos)

    @override
    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        if not self.agents:
            raise gym.error.ResetNeeded("call reset(): no match is being played")
        _check_agents(actions, (self.agent,))
        both = {**actions, self.other: self.opponent(self._seen)}
        told = self.core.step(both)
        self._seen = told[0][self.other]
        if not self.core.agents:
            self.agents = []
        seen, rewards, ended, cut, infos = (self._own(one) for one in told)
        return seen, rewards, ended, cut, infos

    def _own(self, of_both: dict[str, Any]) -> dict[str, Any]:
        return {self.agent: of_both[self.agent]}

    @override
    def render(self) -> np.ndarray[Any, Any] | None:
        return self.core.render()


def parallel_env(**settings: Any) -> DuelEnv:
    """The duel as a PettingZoo ParallelEnv.

    Args:
        settings: of `DuelEnv`.
    """
    return DuelEnv(**settings)


def env(**settings: Any) -> Any:
    """The duel as a PettingZoo AECEnv, where agents act in turn and the second sees no move.

    Args:
        settings: of `DuelEnv`.
    """
    return parallel_to_aec(DuelEnv(**settings))


def against(opponent: Policy, agent: str = "defender", **settings: Any) -> OneSidedEnv:
    """The duel for one agent, as learners of one agent need it, through SuperSuit say.

    Args:
        opponent: plays the other side: its observation -> its action.
        agent: who is left to play.
        settings: of `DuelEnv`.

    Raises:
        InputError: as `DuelEnv`, another agent, or an opponent that cannot be called.
    """
    if not callable(opponent):
        raise InputError(f"an opponent maps its observation to its action, unlike {opponent!r}")
    return OneSidedEnv(DuelEnv(**settings), agent, opponent)

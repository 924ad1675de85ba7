"""GAIL as the training loop sees it: one step is one iteration of policy and discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.games.gail import Gail
from advgame.health import tagged
from advgame.imitation.demonstrations import Demonstrations
from advgame.imitation.discriminator import CHANCE_LOSS
from advgame.imitation.updater import Updater
from advgame.run.curves import Curves, Panels
from advgame.seeding import derive_seed, stream
from agents.imitator import Imitator, Rollout
from envs.imitation import ImitationVectorEnv
from envs.tasks import make_task, play

Source = Literal["discriminator", "fixed", "true"]
_KEPT = 64  # pairs of each iteration that replay remembers: 2 MB in 1,000 iterations of CartPole

PANELS: Panels = {
    "True return": (
        "per episode",
        {"eval/return": "deterministic policy", "policy/true_return": "while learning"},
    ),
    f"Discriminator's loss (chance {CHANCE_LOSS:.3f})": (
        "nats",
        {"discriminator/loss": "loss"},
    ),
    "Discriminator's accuracy": (
        "share",
        {
            "discriminator/accuracy_policy": "policy's pairs",
            "discriminator/accuracy_expert": "expert's pairs",
        },
    ),
    "θ_D": ("norm", {"discriminator/norm": "‖θ_D‖", "discriminator/step": "step"}),
    "Policy": ("nats", {"policy/entropy": "entropy", "policy/kl": "KL of the step"}),
}


class GailTraining:
    """`advgame.run.loop.Game` over an imitation environment.

    Args:
        env: the environment; reset here.
        player: the policy.
        rules: the discriminator's objective.
        updater: of the discriminator.
        source: what pays the policy. ``discriminator``: GAIL. ``fixed``: the environment's first
            ``theta`` for ever (zeros pay a constant). ``true``: the task's own reward, what the
            loop reaches without a game.
        replay: share of the discriminator's policy side that is drawn from all earlier
            iterations. A discriminator that sees the present policy alone forgets what it
            learnt of states that the policy has left, the absorbing one among them; replay is
            its answer to the mean of all policies so far (fictitious play).
        seed: of starts and samples.
        iterations: per epoch of the loop, which evaluates once per epoch.
    """

    def __init__(
        self,
        env: ImitationVectorEnv,
        player: Imitator,
        rules: Gail,
        updater: Updater,
        *,
        source: Source = "discriminator",
        replay: float = 0.0,
        seed: int = 0,
        iterations: int = 10,
    ) -> None:
        if not 0 <= replay < 1:
            raise InputError(f"replay must lie in [0, 1), not {replay}")
        if env.device.type != "cpu":
            raise InputError(
                f"GAIL's players learn on the CPU: make the environment there, not on {env.device}"
            )
        self.env, self.rules, self.updater = env, rules, updater
        self.learner = self.player = player
        self.source, self.replay, self.steps_per_epoch = source, replay, iterations
        self._memory = torch.zeros(0, env.code.pair_size)
        self._rng = stream(seed, "discriminator samples")
        env.reset(seed=derive_seed(seed, "episodes") % 2**31)
        updater.init(env.theta)

    def step(self) -> dict[str, Tensor]:
        """One iteration: play, improve the discriminator, improve the policy.

        The policy is paid by the discriminator that watched it play, before its update.
        """
        code = self.env.code
        rollout = self.player.collect(self.env)
        rewards = rollout.true_rewards if self.source == "true" else rollout.rewards
        stats = {"policy/reward": float(rewards.mean()), **self._batch_health(rollout)}
        if self.source == "discriminator":
            pairs = code.pairs(rollout.observations.flatten(0, 1), rollout.executed.flatten(0, 1))
            self.env.theta, watched = self.rules.step(
                self.env.theta, self._remembered(pairs), self.updater, self._rng
            )
            stats |= watched
        stats |= self.player.learn(rollout, rewards)
        if code.choices > 1:  # where there is one there is nothing to choose
            share = stats["policy/entropy"] / math.log(code.choices)
            stats |= tagged("policy", {"entropy": share})
        if len(rollout.true_returns):
            stats["policy/true_return"] = float(rollout.true_returns.mean())
        return {name: torch.tensor(value) for name, value in stats.items()}

    def _batch_health(self, rollout: Rollout) -> dict[str, float]:
        """Whether the rows are at one place of their episodes, and whether any pair is live."""
        angle = 2 * math.pi * self.env._clock.double() / self.env.task.horizon
        length = torch.stack([angle.cos().mean(), angle.sin().mean()]).norm()
        signs = {"phase": float(length)}
        if self.env.code.absorbing:
            share = float(rollout.observations[..., -1].mean())
            signs |= {"absorbing": share, "blind": float(share > 0.995)}
        return tagged("batch", signs)

    def _remembered(self, pairs: Tensor) -> Tensor:
        """The policy's pairs, ``replay`` of them replaced by earlier ones; a few are kept."""
        if not self.replay:
            return pairs
        shuffled = pairs[torch.randperm(len(pairs), generator=self._rng)]
        old = round(self.replay * len(pairs)) if len(self._memory) else 0
        drawn = torch.randint(max(1, len(self._memory)), (old,), generator=self._rng)
        mixed = torch.cat([shuffled[old:], self._memory[drawn]])
        self._memory = torch.cat([self._memory, shuffled[:_KEPT]])
        return mixed

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """No scalars of the epoch beyond the means of its steps."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Episodes, policy's optimiser and streams, discriminator, updater."""
        return {
            "env": self.env.state_dict(),
            "player": self.player.state_dict(),
            "theta": self.env.theta,
            "memory": self._memory,
            "updater": self.updater.state_dict(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.env.load_state_dict(state["env"])
        self.player.load_state_dict(state["player"])
        self.env.theta = state["theta"].to(self.env.device)
        self.updater.load_state_dict(state["updater"])
        self._memory = state["memory"]
        self._rng.set_state(state["rng"])


def judge_returns(
    env: ImitationVectorEnv, player: Imitator, episodes: int, seed: int
) -> Callable[[nn.Module], dict[str, float]]:
    """The evaluation of every run: fresh episodes of the task, deterministic policy, true return.

    The starts are the same at every evaluation and for every run of a seed, so that two
    evaluations differ by their policies alone.

    Args:
        env: whose task, time limit and encoding.
        player: whose policy.
        episodes: how many, side by side.
        seed: of the starts.

    Returns:
        a function for `advgame.run.loop.Trainer`: mean true return, its standard error over
        episodes, and the worst episode.
    """

    def act(raw: Tensor) -> Tensor:
        return player.act(env.code.observe(raw), deterministic=True)

    def validate(_: nn.Module) -> dict[str, float]:
        rng = stream(seed, "evaluation")
        returns = play(env.task_id, act, episodes, rng, env.task.horizon)["returns"]
        return {
            "eval/return": float(returns.mean()),
            "eval/standard_error": float(returns.std() / episodes**0.5),
            "eval/worst_episode": float(returns.min()),
        }

    return validate


def random_policy(space: spaces.Space[Any]) -> Callable[[Tensor], Tensor]:
    """Raw observations (B, d) to uniform actions (B,) or (B, k), the same draws every time.

    Args:
        space: the task's actions; where a box has no end, within 1 of the other or of 0.
    """
    rng = stream(0, "random policy")

    def act(raw: Tensor) -> Tensor:
        if isinstance(space, spaces.Discrete):
            return torch.randint(int(space.n), (len(raw),), generator=rng)
        assert isinstance(space, spaces.Box)
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        if np.issubdtype(space.dtype, np.integer):  # the ends as often as the others
            low, high = low.double(), high.double()  # 127 + 128 is no int8
            drawn = torch.rand(len(raw), *low.shape, generator=rng, dtype=torch.float64)
            return torch.minimum(low + ((high - low + 1) * drawn).floor(), high)
        below = torch.where(low.isfinite(), low, torch.where(high.isfinite(), high, 0) - 1)
        above = torch.where(high.isfinite(), high, torch.where(low.isfinite(), low, 0) + 1)
        return below + (above - below) * torch.rand(len(raw), *low.shape, generator=rng)

    return act


def random_returns(env_id: str, episodes: int) -> Tensor:
    """True returns (episodes,) of random actions, from the same starts every time."""
    act = random_policy(make_task(env_id, 1).action_space)
    return play(env_id, act, episodes, stream(0, "random starts"))["returns"]


def dummy_expert(env: ImitationVectorEnv, trajectories: int, seed: int) -> Demonstrations:
    """What a policy does that always takes action 0 of a discrete task, in a box the nearest to 0.

    The control of a loop that claims to imitate: who learns the task from this learnt it from
    something else.

    Args:
        env: whose task and time limit.
        trajectories: how many.
        seed: of the starts.
    """
    action = torch.zeros(env.single_action_space.shape or ())
    if env.code.choices:
        action = action.long()
    else:  # a box need not hold 0
        space = env.single_action_space
        assert isinstance(space, spaces.Box)
        low, high = (torch.as_tensor(end, dtype=torch.float32) for end in (space.low, space.high))
        action = action.clamp(low, high)
    seen: list[Tensor] = []

    def act(raw: Tensor) -> Tensor:
        seen.append(raw)
        return action.expand(trajectories, *action.shape)

    played = play(env.task_id, act, trajectories, stream(seed, "dummy"), env.task.horizon)
    lengths, returns = played["lengths"].long(), played["returns"].double()
    rows = [raw[row : row + 1] for row, n in enumerate(lengths.tolist()) for raw in seen[:n]]
    observations = torch.cat(rows)
    actions = action.expand(len(observations), *action.shape).clone()
    ended = played["terminated"]
    return Demonstrations(observations, actions, lengths, returns, ended, env.env_id)

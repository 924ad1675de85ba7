"""REINFORCE over whole episodes: returns-to-go, and a learned baseline.

    ∇ E[Σ r] ≈ mean_t ∇ log π(a_t | s_t)·(G_t - V(s_t)),   G_t = r_t + γ·G_{t+1} within an episode

An update plays every row of an environment for as many steps as the longest episode takes. Rows
that end early begin another episode, which is then cut: V(s) stands for what was cut off.
Budgets end episodes for good (the queries left are part of what is seen), so that G ends there.

Source: Williams 1992; Sutton & Barto 2018, 13.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from lightning_fabric import Fabric
from torch import Tensor

from advgame.errors import InputError
from advgame.health import entropy_sign
from agents.policies import FeaturePolicy, FeatureValue, entropies, log_probability, sample


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of `EpisodicReinforce`.

    Args:
        steps: of every row per update; the longest episode's.
        lr: learning rate of the policy (Adam).
        value_lr: learning rate of the baseline (Adam).
        discount: γ.
        entropy_coef: weight of the entropy bonus, per choice in nats, relative to advantages of
            unit size.
        grad_clip: largest gradient norm.
    """

    steps: int
    lr: float = 3e-3
    value_lr: float = 3e-3
    value_steps: int = 2
    discount: float = 1.0
    entropy_coef: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.value_lr <= 0 or self.grad_clip <= 0:
            raise InputError("REINFORCE needs steps >= 1, learning rates and grad_clip above 0")
        if not 0 <= self.discount <= 1 or self.entropy_coef < 0:
            raise InputError("REINFORCE needs a discount in [0, 1] and entropy_coef >= 0")


@dataclass(frozen=True)
class Rollout:
    """What T steps of B rows brought.

    Args:
        seen: (T, B, n) features before each step.
        actions: (T, B, choices).
        rewards: (T, B).
        ended: (T, B) bool, terminated or truncated at this step.
        decided: (T, B) bool; False where the step was a row's reset and the action void.
        last: (B, n) features after the last step.
    """

    seen: Tensor
    actions: Tensor
    rewards: Tensor
    ended: Tensor
    decided: Tensor
    last: Tensor


def collect(
    env: VectorEnv[Any, Any, Any], policy: FeaturePolicy, steps: int, rng: torch.Generator
) -> Rollout:
    """Play from fresh episodes in every row; the environment's autoreset is NEXT_STEP."""
    seen, _ = env.reset()
    ended = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    record: list[tuple[Tensor, ...]] = []
    for _ in range(steps):
        with torch.no_grad():
            actions = sample(policy(seen), rng)
        following, reward, terminated, truncated, _ = env.step(actions)
        decided, ended = ~ended, terminated | truncated
        record.append((seen, actions, reward, ended, decided))
        seen = following
    all_seen, actions, rewards, ends, decisions = (
        torch.stack(one) for one in zip(*record, strict=True)
    )
    return Rollout(all_seen, actions, rewards, ends, decisions, last=seen)


def returns_to_go(rollout: Rollout, beyond: Tensor, discount: float) -> Tensor:
    """G of every step, (T, B).

    Args:
        rollout: where a row was reset, the return passes through and belongs to no decision.
        beyond: (B,) what an episode that is still running is expected to bring yet.
        discount: γ.
    """
    following, found = beyond, []
    for reward, ended, decided in zip(
        rollout.rewards.flip(0), rollout.ended.flip(0), rollout.decided.flip(0), strict=True
    ):
        own = reward + discount * torch.where(ended, 0.0, following)
        following = torch.where(decided, own, following)
        found.append(following)
    return torch.stack(found[::-1])


def _per_step(advantage: Tensor, decided: Tensor) -> Tensor:
    """Advantages over their root mean square at each step of the rollout.

    The first steps of an attack gain most. Without this the later ones, whose choices decide
    about the last few images, would drown in the first ones' noise.
    """
    square = torch.zeros(decided.shape, device=advantage.device)
    square[decided] = advantage.square()
    size = (square.sum(1) / decided.sum(1).clamp_min(1)).sqrt().clamp_min(1e-6)
    return advantage / size[:, None].expand_as(square)[decided]


class EpisodicReinforce:
    """Learns a policy over features on one or several environments, which take turns.

    Args:
        envs: torch-native vector environments with equal spaces, whose autoreset is NEXT_STEP.
        policy: π, on the environments' device.
        value: V, the baseline.
        config: settings.
        rng: stream of the draws, on the same device.
        fabric: where this runs; the training loop asks for it.
        names: of the choices, for the curves.
    """

    def __init__(
        self,
        envs: Sequence[VectorEnv[Any, Any, Any]],
        policy: FeaturePolicy,
        value: FeatureValue,
        config: EpisodeConfig,
        rng: torch.Generator,
        fabric: Fabric,
        names: Sequence[str],
    ) -> None:
        self.envs, self.module, self.value, self.config = tuple(envs), policy, value, config
        self.rng, self.fabric, self.names = rng, fabric, tuple(names)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
        self.value_optimizer = torch.optim.Adam(value.parameters(), lr=config.value_lr)
        self._turn = 0

    @property
    def policy(self) -> FeaturePolicy:
        """What has been learned."""
        return self.module

    def update(self) -> dict[str, Tensor]:
        """Play on the next environment and learn from it; returns scalars to log."""
        env = self.envs[self._turn % len(self.envs)]
        self._turn += 1
        rollout = collect(env, self.module, self.config.steps, self.rng)
        return self.learn(rollout)

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """One gradient step of the policy and one of the baseline."""
        with torch.no_grad():
            beyond = self.value(rollout.last)
        decided = rollout.decided
        goal = returns_to_go(rollout, beyond, self.config.discount)[decided]
        seen, actions = rollout.seen[decided], rollout.actions[decided]
        values = self.value(seen)
        advantage = goal - values.detach()
        for _ in range(self.config.value_steps):
            self.value_optimizer.zero_grad()
            F.mse_loss(values, goal).backward()
            self.value_optimizer.step()
            values = self.value(seen)
        scaled = _per_step(advantage, decided)
        logits = self.module(seen)
        entropy = entropies(logits)
        loss = -(log_probability(logits, actions) * scaled).mean()
        self.optimizer.zero_grad()
        (loss - self.config.entropy_coef * entropy.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip)
        self.optimizer.step()
        explained = 1 - advantage.var(correction=0) / goal.var(correction=0).clamp_min(1e-12)
        named = zip(self.names, entropy.detach(), strict=True)
        episodes = rollout.ended.sum().clamp_min(1)
        return entropy_sign(entropy, self.module.sizes) | {
            "game/reward_per_query": rollout.rewards[rollout.decided].mean(),
            "game/return": rollout.rewards.sum() / episodes,
            "attacker/policy_loss": loss.detach(),
            "attacker/gradient_norm": norm,
            "attacker/explained_variance": explained,
            **{f"strategy/entropy_{name}": one for name, one in named},
        }

    def state_dict(self) -> dict[str, Any]:
        """Baseline, optimisers, stream and whose turn it is; the policy is saved apart."""
        return {
            "value": self.value.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "turn": self._turn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.value.load_state_dict(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.rng.set_state(state["rng"])
        self._turn = state["turn"]

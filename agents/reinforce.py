"""REINFORCE for one decision per image (LAS-AT), and for whole episodes (learning to attack).

    ∇ E[R] ≈ mean ∇ log π(a | s)·A,  plus an entropy bonus

The advantage A is a reward less one of several baselines (`Reinforce`), or a return-to-go less a
learned value (`EpisodicReinforce`).

Source: Williams 1992; Sutton & Barto 2018, 13.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from lightning_fabric import Fabric
from torch import Tensor, nn
from typing_extensions import override

from advgame.defender import share_statistics
from advgame.errors import InputError
from advgame.games.strategy import CHOICES
from advgame.health import note_gradient
from advgame.optimizers import load_optimizer
from agents.policies import (
    FeaturePolicy,
    FeatureValue,
    StrategyPolicy,
    ValueNet,
    entropies,
    entropy_stats,
    log_probability,
    sample,
)
from agents.settings import EpisodeConfig, ReinforceConfig


def averaging(fabric: Fabric) -> Callable[[nn.Module], None] | None:
    """Average a network's gradients, and batch norm's statistics, over several processes.

    The learners take it as ``synchronise``; one process needs none.
    """
    if fabric.world_size == 1:
        return None

    def average(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(cast(Tensor, fabric.all_reduce(parameter.grad)))
        share_statistics(module, fabric)

    return average


class PolicyGradient:
    """A policy that climbs, a value network that follows: their steps and their state.

    Args:
        policy: π.
        optimizer: of its weights.
        value: V, or None where nothing is predicted.
        value_lr: of Adam on V.
        grad_clip: largest gradient norm of the policy.
        rng: stream of the draws, on the policy's device.
        synchronise: called after each backward pass, to average gradients over processes.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        value: nn.Module | None,
        value_lr: float,
        grad_clip: float,
        rng: torch.Generator,
        synchronise: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.policy, self.optimizer, self.value, self.rng = policy, optimizer, value, rng
        self._clip, self._synchronise = grad_clip, synchronise or (lambda module: None)
        if value is not None:
            self.value_optimizer = torch.optim.Adam(value.parameters(), lr=value_lr)

    def climb(self, loss: Tensor) -> Tensor:
        """One step of the policy down its loss; the norm of the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        self._synchronise(self.policy)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self._clip)
        note_gradient(self.optimizer)
        self.optimizer.step()
        return norm

    def fit_value(self, seen: Tensor, goal: Tensor, steps: int = 1) -> Tensor:
        """V of what was seen, (B,), before ``steps`` steps towards the goal (B,)."""
        assert self.value is not None
        values = []
        for _ in range(steps):
            values.append(self.value(seen))
            self.value_optimizer.zero_grad()
            F.mse_loss(values[-1], goal).backward()
            self._synchronise(self.value)
            self.value_optimizer.step()
        first: Tensor = values[0].detach()
        return first

    def state_dict(self) -> dict[str, Any]:
        """Policy, value network, optimisers and the stream of the draws."""
        names = ["policy", "optimizer"]
        if self.value is not None:
            names += ["value", "value_optimizer"]
        states = {name: getattr(self, name).state_dict() for name in names}
        return states | {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        for name in ("policy", "value"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        for name in ("optimizer", "value_optimizer"):
            if name in state:
                load_optimizer(getattr(self, name), state[name])
        self.rng.set_state(state["rng"])


_MEMORY = 0.95  # of the moving averages


class Reinforce(PolicyGradient):
    """LAS-AT's strategy player: A = R - b for a choice of baselines b.

    Args:
        policy: π, on the device of the images.
        config: settings.
        rng: stream of the draws, on the images' device.
        value: V, needed for the baseline ``"value"``.
        synchronise: called after each backward pass, to average gradients over processes.
    """

    def __init__(
        self,
        policy: StrategyPolicy,
        config: ReinforceConfig,
        rng: torch.Generator,
        value: ValueNet | None = None,
        synchronise: Callable[[nn.Module], None] | None = None,
    ) -> None:
        if config.lr <= 0 or config.grad_clip <= 0 or config.entropy_coef < 0:
            raise InputError("REINFORCE needs lr > 0, grad_clip > 0 and entropy_coef >= 0")
        if (value is None) == (config.baseline == "value"):
            raise InputError("REINFORCE takes a ValueNet exactly when its baseline is 'value'")
        weights, lr, decay = policy.parameters(), config.lr, config.weight_decay
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            optimizer = torch.optim.Adam(weights, lr, weight_decay=decay)
        else:
            optimizer = torch.optim.SGD(weights, lr, config.momentum, weight_decay=decay)
        super().__init__(policy, optimizer, value, 1e-3, config.grad_clip, rng, synchronise)
        self.config = config
        device = next(policy.parameters()).device
        self._mean = torch.zeros((), device=device)  # moving mean of the reward
        self._square = torch.zeros((), device=device)  # moving mean of the squared advantage
        self._updates = 0
        self._choice: tuple[Tensor, list[Tensor], Tensor] | None = None

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Draw a strategy per image; in training mode and with a graph when it will learn."""
        self.policy.train(learn)
        with torch.set_grad_enabled(learn):
            logits = self.policy(images)
        actions = sample([one.detach() for one in logits], self.rng)
        self._choice = (images, logits, actions) if learn else None
        return actions

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """One gradient step from the rewards (B,) of the last choices.

        Raises:
            InputError: the last `act` did not announce that it would learn.
        """
        if self._choice is None:
            raise InputError("call act(images, learn=True) before learn(reward)")
        images, logits, actions = self._choice
        self._choice = None
        advantage = reward - self._baseline(images, reward)
        entropy = entropies(logits)
        loss = -(log_probability(logits, actions) * self._scaled(advantage, reward)).mean()
        loss = loss - self.config.entropy_coef * entropy.sum()
        return entropy_stats(CHOICES, logits, entropy) | {
            "attacker/gradient_norm": self.climb(loss),
            "attacker/loss": loss.detach(),
            "attacker/advantage_mean": advantage.mean(),
            "attacker/advantage_spread": advantage.std(correction=0),
        }

    def _baseline(self, images: Tensor, reward: Tensor) -> Tensor:
        """What is taken off the reward, (B,).

        It does not depend on the image's own action, but where the reward has a part that the
        batch shares, as R2 and R3 of mixed credit: leave-one-out then cancels that part.
        """
        kind = self.config.baseline
        if kind == "none":
            return torch.zeros_like(reward)
        if kind == "loo" or not self._updates:
            others = max(len(reward) - 1, 1)
            return (reward.sum() - reward) / others
        mean = (self._mean / (1 - _MEMORY**self._updates)).expand_as(reward)
        # V(x) is of the reward beyond its moving average
        return mean if self.value is None else mean + self.fit_value(images, reward - mean)

    def _scaled(self, advantage: Tensor, reward: Tensor) -> Tensor:
        """The advantage over its moving root mean square; keeps the moving averages."""
        self._updates += 1
        self._mean = _MEMORY * self._mean + (1 - _MEMORY) * reward.mean()
        self._square = _MEMORY * self._square + (1 - _MEMORY) * advantage.square().mean()
        if not self.config.scale_advantage:
            return advantage
        return advantage / (self._square / (1 - _MEMORY**self._updates)).sqrt().clamp_min(1e-6)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averages": (self._mean, self._square, self._updates)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        mean, square, self._updates = state["averages"]
        self._mean, self._square = mean.to(self._mean.device), square.to(self._square.device)
        self._choice = None


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
    columns = [torch.stack(one) for one in zip(*record, strict=True)]
    return Rollout(*[*columns, seen])


def returns_to_go(rollout: Rollout, beyond: Tensor, discount: float) -> Tensor:
    """G of every step, (T, B): G_t = r_t + γ·G_{t+1} within an episode.

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


def _mean_return(rollout: Rollout) -> Tensor:
    """Mean return of the episodes that ended, which all began in the rollout; 0 of none.

    What an episode that is still running has been paid is in no return.
    """
    finished = rollout.ended.flip(0).cumsum(0).flip(0) > 0  # an end comes yet
    return rollout.rewards[finished].sum() / rollout.ended.sum().clamp_min(1)


def _per_step(advantage: Tensor, decided: Tensor) -> Tensor:
    """Advantages over their root mean square at each step of the rollout.

    The first steps of an attack gain most. Without this the later ones, whose choices decide
    about the last few images, would drown in the first ones' noise.
    """
    square = torch.zeros(decided.shape, device=advantage.device)
    square[decided] = advantage.square()
    size = (square.sum(1) / decided.sum(1).clamp_min(1)).sqrt().clamp_min(1e-6)
    return advantage / size[:, None].expand_as(square)[decided]


class EpisodicReinforce(PolicyGradient):
    """Learns a policy over features on one or several environments, which take turns: A = G - V.

    An update plays every row of an environment for as many steps as the longest episode takes.
    Rows that end early begin another episode, which is then cut: V(s) stands for what was cut off.
    Budgets end episodes for good (the queries left are part of what is seen), so that G ends there.

    Args:
        envs: torch-native vector environments with equal spaces, whose autoreset is NEXT_STEP.
        policy: π, on the environments' device.
        value: V, the baseline.
        config: settings.
        rng: stream of the draws, on the same device.
        fabric: where this runs; the training loop asks for it.
        names: of the choices, for the curves.
    """

    policy: FeaturePolicy

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
        adam = torch.optim.Adam(policy.parameters(), lr=config.lr)
        super().__init__(policy, adam, value, config.value_lr, config.grad_clip, rng)
        self.envs, self.config, self.fabric, self.names = tuple(envs), config, fabric, names
        self._turn = 0

    @property
    def module(self) -> FeaturePolicy:
        """The policy network, which the training loop saves."""
        return self.policy

    def update(self) -> dict[str, Tensor]:
        """Play on the next environment and learn from it; returns scalars to log."""
        env = self.envs[self._turn % len(self.envs)]
        self._turn += 1
        return self.learn(collect(env, self.policy, self.config.steps, self.rng))

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """One gradient step of the policy, ``value_steps`` of the baseline."""
        assert self.value is not None
        with torch.no_grad():
            beyond = self.value(rollout.last)
        decided = rollout.decided
        goal = returns_to_go(rollout, beyond, self.config.discount)[decided]
        seen, actions = rollout.seen[decided], rollout.actions[decided]
        advantage = goal - self.fit_value(seen, goal, self.config.value_steps)
        logits = self.policy(seen)
        entropy = entropies(logits)
        loss = -(log_probability(logits, actions) * _per_step(advantage, decided)).mean()
        norm = self.climb(loss - self.config.entropy_coef * entropy.sum())
        stats = entropy_stats(self.names, logits, entropy)
        if goal.max() > goal.min():  # where all returns are the same there is nothing to explain
            share = advantage.var(correction=0) / goal.var(correction=0)
            stats["attacker/explained_variance"] = 1 - share
        return stats | {
            "attacker/gradient_norm": norm,
            "attacker/policy_loss": loss.detach(),
            "game/reward_per_query": rollout.rewards[decided].mean(),
            "game/return": _mean_return(rollout),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"turn": self._turn}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._turn = state["turn"]

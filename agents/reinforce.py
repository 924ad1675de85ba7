"""REINFORCE (Williams 1992) for one-step decisions, with baselines that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.games.strategy import CHOICES
from advgame.health import entropy_sign
from agents.policies import StrategyPolicy, ValueNet, entropies, log_probability, sample

Baseline = Literal["none", "loo", "running", "value"]


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of `Reinforce`.

    Args:
        optimizer: Adam, or SGD.
        lr: learning rate.
        baseline: what is taken off the reward. ``"none"`` (published); ``"loo"`` the mean reward
            of the other images in the batch, which removes every term that they share;
            ``"running"`` a moving average over batches; ``"value"`` that plus a learned V(x).
        scale_advantage: divide advantages by a moving root mean square.
        entropy_coef: weight of the entropy bonus, per choice in nats.
        grad_clip: largest gradient norm.
        momentum: of SGD.
        weight_decay: of either optimiser.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    baseline: Baseline = "value"
    scale_advantage: bool = True
    entropy_coef: float = 0.1
    grad_clip: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0


# `repo`: LAS-AT's CIFAR-10 settings (reward without baseline, no bonus, SGD at 1e-4, clip 1);
# `repo-momentum`: the policy's optimiser of its CIFAR-100 script
_REPO = ReinforceConfig("sgd", 1e-4, "none", scale_advantage=False, entropy_coef=0.0)
PRESETS = {
    "default": ReinforceConfig(),
    "repo": _REPO,
    "repo-momentum": replace(_REPO, momentum=0.9, weight_decay=5e-4),
}
_MEMORY = 0.95  # of the moving averages


def averaging(fabric: Fabric) -> Callable[[nn.Module], None] | None:
    """Average a network's gradients over several processes, for `Reinforce`'s ``synchronise``."""
    if fabric.world_size == 1:
        return None

    def average(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(cast(Tensor, fabric.all_reduce(parameter.grad)))

    return average


class Reinforce:
    """∇ E[R] ≈ mean_i ∇ log π(a_i | x_i)·(R_i - b_i), plus an entropy bonus.

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
        self.policy, self.config, self.rng = policy, config, rng
        self.synchronise = synchronise
        weights, decay = policy.parameters(), config.weight_decay
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(weights, config.lr, weight_decay=decay)
        else:
            self.optimizer = torch.optim.SGD(
                weights, config.lr, config.momentum, weight_decay=decay
            )
        self.value = value
        if (value is None) == (config.baseline == "value"):
            raise InputError("REINFORCE takes a ValueNet exactly when its baseline is 'value'")
        if value is not None:
            self.value_optimizer = torch.optim.Adam(value.parameters(), lr=1e-3)
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
        centred = reward - self._baseline(images, reward)
        entropy = entropies(logits)
        loss = -(log_probability(logits, actions) * self._scaled(centred, reward)).mean()
        loss = loss - self.config.entropy_coef * entropy.sum()
        self.optimizer.zero_grad()
        loss.backward()
        if self.synchronise is not None:
            self.synchronise(self.policy)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        self.optimizer.step()
        named = {
            f"strategy/entropy_{name}": value.detach()
            for name, value in zip(CHOICES, entropy, strict=False)
        }
        sizes = [one.shape[1] for one in logits]
        return (
            named
            | entropy_sign(entropy, sizes)
            | {
                "attacker/policy_loss": loss.detach(),
                "attacker/gradient_norm": norm,
                "attacker/advantage_mean": centred.mean(),
                "attacker/advantage_spread": centred.std(correction=0),
            }
        )

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
        return mean if self.value is None else mean + self._fitted_value(images, reward - mean)

    def _fitted_value(self, images: Tensor, beyond: Tensor) -> Tensor:
        """V(x) of the reward beyond its moving average, (B,); then one step towards it."""
        assert self.value is not None
        values: Tensor = self.value(images)
        self.value_optimizer.zero_grad()
        F.mse_loss(values, beyond).backward()
        if self.synchronise is not None:
            self.synchronise(self.value)
        self.value_optimizer.step()
        return values.detach()

    def _scaled(self, advantage: Tensor, reward: Tensor) -> Tensor:
        """The advantage over its moving root mean square; keeps the moving averages."""
        self._updates += 1
        self._mean = _MEMORY * self._mean + (1 - _MEMORY) * reward.mean()
        self._square = _MEMORY * self._square + (1 - _MEMORY) * advantage.square().mean()
        if not self.config.scale_advantage:
            return advantage
        return advantage / (self._square / (1 - _MEMORY**self._updates)).sqrt().clamp_min(1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Policy, baseline, optimisers, moving averages and the stream of the draws."""
        state = {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "averages": (self._mean, self._square, self._updates),
        }
        if self.value is not None:
            state["value"] = self.value.state_dict()
            state["value_optimizer"] = self.value_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.value is not None:
            self.value.load_state_dict(state["value"])
            self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.rng.set_state(state["rng"])
        mean, square, self._updates = state["averages"]
        self._mean, self._square = mean.to(self._mean.device), square.to(self._square.device)
        self._choice = None

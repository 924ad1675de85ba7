"""GAIL's discriminator: what it minimises, and one step of it by hand-made or learned updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.health import tagged
from advgame.imitation.discriminator import (
    Discriminator,
    gradient_penalty,
    half_way,
    imitation_loss,
    label_entropy,
)
from advgame.imitation.updater import Objective, Updater

_TINY = 1e-12  # parameters may all be 0


@dataclass(frozen=True)
class Gail:
    """The rules of GAIL's discriminator; the policy's half is any RL algorithm (`agents.gail`).

    Args:
        discriminator: the network.
        expert: (E, inputs), all expert pairs, encoded.
        entropy: weight of D's label entropy in its objective, mean over the pairs of both sides.
            Ho & Ermon's 0.001 is of the sum of the two sides' means, which would be 0.002 here.
        penalty: weight of the gradient penalty; 0 for none.
        penalty_target: norm of the gradient that is not penalised.
        controller: weight k of C-GAIL's k/2·(D − 1/2)², mean over each side (Luo et al. 2024,
            algorithm 1): near an equilibrium it is what draws D back to 1/2.
        steps: discriminator steps per iteration, on the same pairs.
        all_expert: every step sees all expert pairs, in a new order; otherwise as many as the
            policy's, drawn with replacement, as Ho & Ermon.

    Source: Ho & Ermon 2016, algorithm 1; L2L, algorithm 3, whose U is the updater.

    Raises:
        InputError: no step, or a negative weight.
    """

    discriminator: Discriminator
    expert: Tensor
    entropy: float = 1e-3
    penalty: float = 0.0
    penalty_target: float = 1.0
    controller: float = 0.0
    steps: int = 1
    all_expert: bool = False

    def __post_init__(self) -> None:
        weights = (self.entropy, self.penalty, self.penalty_target, self.controller)
        if self.steps < 1 or not all(0 <= one < math.inf for one in weights):
            raise InputError(
                "steps must be 1 or above, entropy, penalty, penalty_target and controller finite "
                f"and 0 or above, not {self.steps}, {weights}"
            )

    def objective(self, policy: Tensor, expert: Tensor, mix: Tensor) -> Objective:
        """What the discriminator minimises, as a function of θ_D.

        Args:
            policy: (B, inputs).
            expert: (E, inputs).
            mix: (min(B, E), 1) in [0, 1], where between the two the gradient is penalised.
        """
        between = mix * policy[: len(mix)] + (1 - mix) * expert[: len(mix)]

        def loss(theta: Tensor) -> Tensor:
            both = self.discriminator.logits(theta, torch.cat([policy, expert]))
            low, high = both[: len(policy)], both[len(policy) :]
            value = imitation_loss(low, high)
            if self.entropy:
                value = value - self.entropy * label_entropy(both)
            if self.controller:
                value = value + self.controller * (half_way(low) + half_way(high))
            if self.penalty:
                slope = gradient_penalty(self.discriminator, theta, between, self.penalty_target)
                value = value + self.penalty * slope
            return value

        return loss

    def step(
        self, theta: Tensor, policy: Tensor, updater: Updater, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Improve θ_D against what the policy just did.

        Args:
            theta: (m,), which paid the policy.
            policy: (B, inputs), the pairs of the rollout, encoded.
            updater: of θ_D, with its own state.
            rng: draws expert pairs and where the gradient is penalised.

        Returns:
            the new θ_D and, before the first step: loss without regularisers, accuracy on both
            sides, mean logits; after the last: ‖θ_D‖, the length of the step, signs of life of
            discriminator and updater, and what the updater itself says under other names.

        Raises:
            FloatingPointError: the norm of θ_D or its logits are no longer finite.
        """
        with torch.no_grad():
            low = self.discriminator.logits(theta, policy)
            high = self.discriminator.logits(theta, self.expert)
        stats = {
            "discriminator/loss": float(imitation_loss(low, high)),
            "discriminator/accuracy_policy": float((low < 0).float().mean()),
            "discriminator/accuracy_expert": float((high > 0).float().mean()),
            "discriminator/logit_policy": float(low.mean()),
            "discriminator/logit_expert": float(high.mean()),
        }
        new = theta
        for _ in range(self.steps):
            count = len(self.expert)
            if self.all_expert:
                drawn = torch.randperm(count, generator=rng)
            else:
                drawn = torch.randint(count, (len(policy),), generator=rng)
            expert = self.expert[drawn]
            # both sides are shuffled, so that any part of one is a sample of all of it
            shuffled = policy[torch.randperm(len(policy), generator=rng)]
            mix = torch.rand(min(len(policy), len(expert)), 1, generator=rng)
            update = updater.update(new, self.objective(shuffled, expert, mix))
            gradient = update.grad.norm() / new.norm().clamp_min(_TINY)
            new = update.params
        norm = new.norm()
        if not bool(norm.isfinite() & low.isfinite().all() & high.isfinite().all()):
            raise FloatingPointError("the discriminator diverged: its numbers are no longer finite")
        stats["discriminator/norm"] = float(norm)
        stats["discriminator/step"] = float((new - theta).norm())
        stats |= tagged("discriminator", {"gradient": float(gradient)})
        stats |= tagged("updater", {"step": stats["discriminator/step"] / max(float(norm), _TINY)})
        # a learned updater may overflow in a number of its own while θ_D is still finite
        own = {name: float(value) for name, value in update.stats.items()}
        finite = {name: value for name, value in own.items() if math.isfinite(value)}
        stats |= {name: value for name, value in finite.items() if name not in stats}
        return new, stats

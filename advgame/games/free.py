"""Free adversarial training: one backward pass for both classifier and perturbation.

    m times per batch:   θ ← θ - lr · ∇_θ mean loss(f(x + δ), y),   δ ← clip(δ + ε sign ∇_δ)

δ is carried over from batch to batch. Source: Shafahi et al. 2019, whose ball is L∞; in L2 the step
is ε ∇_δ / ‖∇_δ‖₂, and δ is scaled back to length ε.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.games.training import Rules
from advgame.threat import Threat


class Free(Rules):
    """The rules.

    A batch is replayed m times and the optimiser steps each time; a step returns the last of them,
    and draws nothing. The learning rate and the epochs count batches: E epochs cost about E·m
    epochs of plain training, which is why the paper divides the number of epochs by m. The
    gradients are those of training mode, both.

    ∇_δ is taken at the image, clip(x + δ). The authors' PyTorch code (FreeAdversarialTraining)
    takes it through the clip, where it is 0 for what would leave [0, 1]: there δ is stuck for as
    long as the next batches are as black as this one. On CIFAR-10 few pixels are; on digits, where
    a third of x + δ lies outside, AutoAttack leaves that form 34 % and this one 58 %
    (results/compare). fast_adversarial's Free, whose epochs and rate ``--preset repo`` has, does
    not clip, and projects x + δ on [0, 1] after each replay, not on the next batch's x.

    Args:
        threat: the ball, one radius for all.
        replays: m.

    Raises:
        InputError: a radius per image, or no replay.
    """

    def __init__(self, threat: Threat, replays: int = 8) -> None:
        if isinstance(threat.eps, Tensor):
            raise InputError("Free is played in a ball with one eps for all images")
        if replays < 1:
            raise InputError(f"replays must be 1 or above, not {replays}")
        self.threat, self.replays = threat, replays
        self.delta: Tensor | None = None  # (B, C, H, W), in the ball

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat, passes, leaves = self.threat.scaled(scale), Passes(), list[Tensor]()
        eps = float(threat.eps)
        delta = torch.zeros_like(x) if self.delta is None else self.delta.to(x)

        def loss(model: nn.Module) -> Tensor:
            leaves.append((x + delta).clamp_(0, 1).requires_grad_())
            return defender.loss(model(leaves[-1]), y)

        for _ in range(self.replays):
            losses = defender.descend(loss)
            gradient = leaves[-1].grad
            assert gradient is not None
            defender.step()
            passes.add_descent(defender)
            delta = threat.shrink(delta + eps * threat.steepest(gradient))
        self.delta = delta
        x_adv = leaves[-1].detach()
        stats = {"game/adversarial_loss": losses.mean()}
        stats |= perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.delta}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta = state["delta"]

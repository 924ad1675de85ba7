"""Adversarial weight perturbation (AWP, Wu et al. 2020) round the defender of any game.

    θ ← θ - lr · ∇ L(θ + v),    v_l = γ ‖θ_l‖ g_l / ‖g_l‖,   g = ∇ L(θ)

for every layer's weight, L being the very loss that the game descends; what has one dimension
(biases, batch norm) is not perturbed. The published code finds g with a copy whose learning rate
cancels out: γ is the only knob. It makes the optimiser's step at θ + v and subtracts v then; here
θ is back, to the bit, before the step, which changes weight decay by the factor 1 + γ at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advgame.defender import Defender, DefenderLoss
from advgame.errors import InputError
from advgame.run.options import parse_number


def descend_at_worst(
    descend: Callable[[DefenderLoss], Tensor], module: nn.Module, loss: DefenderLoss, gamma: float
) -> Tensor:
    """Form the gradient at θ + v, and leave θ as it was, to the bit; returns the loss there (B,).

    Args:
        descend: `Defender.descend`, which is called twice.
        module: the classifier, whose weights are θ.
        loss: of the classifier.
        gamma: γ.
    """
    buffers = [buffer.clone() for buffer in module.buffers()]
    descend(loss)
    weights = [p for p in module.parameters() if p.dim() > 1 and p.grad is not None]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        for weight in weights:
            weight.add_(_shift(weight, gamma))
    losses = descend(loss)
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    return losses


def _shift(weight: Tensor, gamma: float) -> Tensor:
    """The layer's v, 0 where its gradient is 0."""
    assert weight.grad is not None
    tiny = torch.finfo(weight.dtype).tiny
    direction = weight.grad / weight.grad.abs().max().clamp_min(tiny)  # squares may underflow
    ratio: Tensor = gamma * weight.norm() / direction.norm().clamp_min(tiny)
    return direction * ratio


class AWPDefender(Defender):
    """A defender under adversarial weight perturbation, whatever the game.

    Its `descend` forms two gradients: the first finds v, the second, at θ + v, is what the
    optimiser follows. Batch norm's running statistics are those of the second pass, as published.
    A loss with ``sensitivity`` is descended without perturbation.

    Args:
        module: the classifier.
        gamma: γ, size of a layer's perturbation over that of its weight; 0.01 in AT-AWP, 0.005
            in TRADES-AWP.
        warm_up: descents before the perturbation begins, in the unit of `Defender.clock`, as
            TRADES-AWP has it. A network without
            batch norm may otherwise stay a constant: there the worst weights nearby undo the
            little that a step gains.
        settings: of `Defender`.

    Raises:
        InputError: γ not above 0, a negative warm-up.
    """

    def __init__(self, module: nn.Module, gamma: float, warm_up: int = 0, **settings: Any) -> None:
        if not parse_number(gamma, "gamma") > 0:
            raise InputError(f"gamma must be above 0, not {gamma}")
        if warm_up < 0:
            raise InputError(f"warm_up must be 0 or above, not {warm_up}")
        super().__init__(module, **settings)
        self.gamma, self.warm_up, self.made = gamma, warm_up, 0

    def descend(self, loss: DefenderLoss) -> Tensor:
        """Form the gradient at the perturbed weights; returns the loss there (B,)."""
        self.made += 1
        self.descents = 1 if self.clock(self.made) <= self.warm_up else 2
        if self.descents == 1:
            return super().descend(loss)
        return descend_at_worst(super().descend, self.module, loss, self.gamma)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser state, and how far the warm-up is."""
        return {**super().state_dict(), "made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        super().load_state_dict(state)
        self.made = state["made"]


def make_defender(
    module: nn.Module, gamma: float | None, warm_up: int, **settings: Any
) -> Defender:
    """A defender of these settings, under adversarial weight perturbation where γ is given."""
    if gamma is None:
        return Defender(module, **settings)
    return AWPDefender(module, gamma, warm_up, **settings)

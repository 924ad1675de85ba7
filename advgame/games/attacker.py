"""What games with an attacker network share: who learns to attack, and a step of both players.

θ ← θ − α₁ ∇_θ loss(f(x + δ; θ), y)        φ ← φ + α₂ ∇_φ loss(f(x + δ; θ), y)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from advgame.attacks import InputGradient
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.training import Rules
from advgame.health import tagged
from advgame.threat import Linf, Threat


@dataclass(frozen=True)
class Sampled:
    """What an attacker network made of one batch.

    Args:
        x_adv: (B, C, H, W) adversarial examples, differentiable in φ.
        bonus: scalar that the attacker ascends besides the loss, differentiable in φ; None is 0.
        stats: scalar tensors to log.
    """

    x_adv: Tensor
    bonus: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)


class AttackerPlayer(Protocol):
    """A network φ that learns to attack, with its optimiser."""

    optimizer: Optimizer
    """Of the network's parameters."""
    gradients: int
    """Input gradients that an attack asks for, per image."""
    cells: int
    """Forwards of the network per attack on an image."""

    @property
    def module(self) -> nn.Module:
        """The network, whose modes the game sets."""
        ...

    def sample(self, gradient: InputGradient, threat: Threat, rng: torch.Generator) -> Sampled:
        """One adversarial example of each image; ``gradient`` holds images and labels, too."""
        ...

    def step(self) -> None:
        """One step up along the gradients on φ, which are then cleared."""
        ...

    def signs(self, gradient: InputGradient, threat: Threat) -> dict[str, float]:
        """Signs of life on a batch, see `advgame.health`; nothing is changed or drawn."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimisers of the networks that learn."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        ...


def check_ball(threat: Threat) -> None:
    """Refuse what is not an L∞ ball of one radius.

    Raises:
        InputError: another ball, or a radius per image.
    """
    if not isinstance(threat, Linf) or isinstance(threat.eps, Tensor):
        raise InputError("this game is played in an L∞ ball with one eps for all images")


@dataclass(frozen=True)
class AttackerRules(Rules):
    """Rules of a game whose attacker is a network: a subclass says how both players step.

    Args:
        threat: the L∞ ball, one radius for all.
        attacker: learns to attack.

    Raises:
        InputError: another ball.
    """

    threat: Threat
    attacker: AttackerPlayer

    def __post_init__(self) -> None:
        check_ball(self.threat)

    def health(self, defender: Defender, x: Tensor, y: Tensor) -> dict[str, float]:
        """The attacker's signs of life by tag."""
        signs = self.attacker.signs(self._gradient(defender, x, y), self.threat)
        return tagged("attacker", signs)

    def _gradient(self, defender: Defender, x: Tensor, y: Tensor) -> InputGradient:
        """What the attacker is told of the defender."""
        return InputGradient(defender.module, x, y)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.attacker.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.attacker.load_state_dict(state)


def joint_step(defender: Defender, attacker: AttackerPlayer, sampled: Sampled, y: Tensor) -> Tensor:
    """One step of both players from the same point; returns the defender's losses (B,).

    One backward pass of the defender's mean loss gives its own gradient, which it descends, and the
    gradient at the samples, from which one backward pass of the network goes on, together with
    the bonus's, and which the attacker ascends. So φ learns against the θ before the step, in
    training mode, and where the defender smooths labels the attacker ascends that loss.

    Args:
        defender: θ.
        attacker: φ.
        sampled: what the attacker made of the batch, with its graph.
        y: labels (B,).
    """
    x_adv, leaves = sampled.x_adv.detach(), list[Tensor]()

    def loss(model: nn.Module) -> Tensor:  # asked twice where weights are perturbed
        leaves.append(x_adv.clone().requires_grad_())
        return defender.loss(model(leaves[-1]), y)

    losses = defender.descend(loss)
    defender.step()
    ends = [sampled.x_adv] if sampled.bonus is None else [sampled.x_adv, sampled.bonus]
    torch.autograd.backward(ends, [leaves[-1].grad, None][: len(ends)])  # on into φ
    attacker.step()
    return losses

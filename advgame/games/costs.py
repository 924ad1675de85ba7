"""Counted forward and backward passes of a game's step, and statistics of its perturbations."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from advgame.attacks import AttackResult
from advgame.defender import Defender
from advgame.threat import Threat, per_image


@dataclass(frozen=True)
class DefenderStep:
    """What one step of such a game did.

    Args:
        x_adv: (B, C, H, W) adversarial examples that the defender trained on.
        losses: (B,) its training losses.
        stats: scalar tensors to log.
    """

    x_adv: Tensor
    losses: Tensor
    stats: dict[str, Tensor]


@dataclass
class Passes:
    """Passes of one step, per image.

    Args:
        forwards: of the defender, F.
        backwards: of the defender with weight gradients, B, worth 2 F.
        input_backwards: of the defender down to its input only, B_x, worth 1 F.
        attacker_forwards: of the attacker network.
        attacker_backwards: of the attacker network, with weight gradients.
    """

    forwards: float = 0
    backwards: float = 0
    input_backwards: float = 0
    attacker_forwards: float = 0
    attacker_backwards: float = 0

    def add_attack(self, made: AttackResult) -> None:
        """Add the forward and backward passes per image that an attack needed."""
        self.forwards += made.forwards / len(made.x_adv)
        self.input_backwards += made.backwards / len(made.x_adv)

    def add_descent(self, defender: Defender, batches: int = 1) -> None:
        """What `Defender.descend` spends on a loss of so many batches."""
        self.forwards += batches * defender.descents
        self.backwards += batches * defender.descents

    def worth(self) -> float:
        """The defender's share, in forwards of the defender: F = B_x = 1 and B = 2.

        What they take differs by network: `scripts/benchmark.py --only games` measures it.
        """
        return self.forwards + self.input_backwards + 2 * self.backwards

    def stats(self, device: torch.device) -> dict[str, Tensor]:
        """Everything as scalars, ``attacker/forwards_per_image`` what they are worth."""
        scalars = {f"cost/{name}": count for name, count in asdict(self).items()}
        scalars["attacker/forwards_per_image"] = self.worth()
        return {name: torch.full((), float(n), device=device) for name, n in scalars.items()}


def relative_size(delta: Tensor, threat: Threat) -> Tensor:
    """Perturbations (B, C, H, W) in units in which no mean |δ| is above 1.

    The unit is what each pixel changes by where all change alike and the ball's face is reached: ε
    in L∞, ε/√(C·H·W) in L2.
    """
    return delta / per_image(threat.eps / threat.whole(delta[0].numel()), delta)


def perturbation_stats(delta: Tensor, threat: Threat) -> dict[str, Tensor]:
    """Size, smoothness and saturation of perturbations (B, C, H, W).

    In the unit of `relative_size`:

    - ``attacker/size``: mean |δ|;
    - ``attacker/variation``: mean |difference of neighbouring pixels|: 0 for a constant,
      1 for independent signs at ±ε, 2 for a chessboard;
    - ``attacker/on_face``: share of the pixels that the ball's face holds.
    """
    scaled = relative_size(delta, threat)
    # a side of one pixel has no neighbours
    sides = [one.mean() for dim in (2, 3) if (one := scaled.diff(dim=dim).abs()).numel()]
    return {
        "attacker/size": scaled.abs().mean(),
        "attacker/variation": torch.stack(sides).mean() if sides else scaled.new_zeros(()),
        "attacker/on_face": threat.on_face(delta).mean(),
    }

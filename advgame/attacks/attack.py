"""What every attack is to those who use one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttackResult:
    """What an attack did.

    Args:
        x_adv: (B, C, H, W), the adversarial examples, in the ball and in [0, 1].
        loss: (B,) loss at ``x_adv`` where the attack computed it (``keep="best"`` or several
            restarts), else None; it is what the attack maximises, or minimises when targeted.
        fooled: (B,) whether the attack succeeded, with ``stop_when_fooled``, else None.
        forwards: number of image forwards made, summed over the batch.
        backwards: number of image input-backwards made.
    """

    x_adv: Tensor
    loss: Tensor | None
    fooled: Tensor | None
    forwards: int
    backwards: int


class Attack(Protocol):
    """Perturbs images within a threat model; holds settings only.

    Hand-made and learned attacks alike are of this form, so that an evaluation, a game or a
    comparison takes either.
    """

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        rng: torch.Generator | None = None,
        check: bool = True,
    ) -> AttackResult:
        """Attack one batch.

        Args:
            model: maps (B, C, H, W) in [0, 1] to logits (B, K); left exactly as it was found.
            x: clean images in [0, 1].
            y: (B,) labels.
            rng: stream of all draws, on the images' device.
            check: validate the input first.

        Raises:
            InputError: input that cannot be attacked.
        """
        ...

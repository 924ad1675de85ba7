"""L2L's attacker: a network that turns an image and its input gradient into a perturbation.

    δ = ε·g(𝒜(x, y, θ); φ),  g ending in tanh, so that δ lies in the L∞ ball by construction

    Naive   𝒜 = x
    Grad    𝒜 = [x, scaled ∇ₓ loss(f(x; θ), y)]
    k-Step  the Grad cell k times with the same φ, each at the point that the last one reached

Source: Jiang, Chen et al., Learning to Defend by Learning to Attack (L2L), section 2.2. Its
projection is printed with a maximum where the ball needs a minimum: sign(δ)·min(|δ|, ε).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from advgame.attacks import InputGradient
from advgame.errors import InputError
from advgame.losses import full_precision
from advgame.threat import Threat, per_image
from agents.attacker_bodies import make_body
from agents.attacker_network import AttackerNetwork, DeltaSampler, placed
from agents.settings import Scaling, Width

GRADIENTS = {"naive": 0, "grad": 1, "two-step": 2}
"""The paper's attackers by the number of input gradients that they ask for."""


def scaled(gradient: Tensor, scaling: Scaling) -> Tensor:
    """A gradient (B, C, H, W) with largest entry 1, and 0 where it is 0 throughout.

    Args:
        gradient: of any magnitude.
        scaling: ``"image"`` divides each image's by its own largest entry, so that one image's
            perturbation does not depend on the others. ``"paper"`` divides all by the batch's,
            as the published code does: one confident mistake shrinks everybody else's channel.
    """
    size = gradient.abs()
    largest = size.flatten(1).amax(1) if scaling == "image" else size.max().expand(len(size))
    return gradient / per_image(largest.clamp_min(torch.finfo(size.dtype).tiny), gradient)


class L2LNetwork(AttackerNetwork):
    """g, and how it is unrolled.

    Args:
        shape: (C, H, W) of the images.
        gradients: input gradients it asks for: 0 is Naive, 1 Grad, k k-Step.
        width: of the body, one of `agents.attacker_bodies.WIDTHS`.
        scaling: of the gradient channels, see `scaled`.

    Raises:
        InputError: unknown width or scaling, or a negative number of gradients.
    """

    file_kind = "l2l"
    adam: ClassVar[dict[str, Any]] = {"weight_decay": 2e-4}

    def __init__(
        self,
        shape: tuple[int, int, int],
        gradients: int = 1,
        width: Width = "small",
        scaling: Scaling = "image",
    ) -> None:
        super().__init__(shape, gradients=gradients, width=width, scaling=scaling)
        if gradients < 0:
            raise InputError(f"an attacker asks for 0 or more gradients, not {gradients}")
        if scaling not in ("image", "paper"):
            raise InputError(f"unknown scaling {scaling!r}: choose image or paper")
        self.gradients, self.cells, self.scaling = gradients, max(gradients, 1), scaling
        self.body = make_body(width, shape[0] * (2 if gradients else 1), shape)

    def sampler(self, gradient: InputGradient, threat: Threat) -> DeltaSampler:
        """Unroll the cells; nothing is drawn.

        The gradient channels are constants: ∂/∂φ of a later cell reaches the earlier ones through
        the point that it starts from, and there is no second-order term.
        """
        x = full_precision(gradient.x)
        moved = torch.zeros_like(x)  # δ/ε
        for cell in range(self.cells):
            point = placed(moved, x, threat) if cell else x
            told = [point]
            if self.gradients:
                told.append(scaled(gradient(point) if cell else gradient.at_clean(), self.scaling))
            move = self.body(torch.cat(told, 1).to(self.dtype)).to(x.dtype)
            moved = (moved + move).clamp(-1, 1)
        return lambda rng: moved

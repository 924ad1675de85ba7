"""AttNet: a fully connected network that is given the image and its label and perturbs the image.

    z(x) = x + ε·g(x, y; v),  clipped to [0, 1]

It sees no gradient of the classifier, and it is told the label. A classifier that learns against it
can therefore learn to read the label off the perturbation: errors below the clean error are a sign
of that, not of robustness.

Source: Hamm & Mehra 2018, Machine vs Machine, section 4.1 and appendix: three hidden layers of 300,
dropout 0.5. How the perturbation is bounded is not said there; tanh is ours, clipping an option.

Taken at its word this network dies, in two ways, both measured (results/minimax):

- Most pixels of an MNIST image are -1, the same ones in all images. This common part of the input
  drowns image and label: in a game most hidden units are soon off for every image and the others
  on for every image, and all images get one perturbation. So each comes less its own mean.
- Adam's first steps agree on every weight, so that within 100 steps at its usual rate of 1e-3 all
  outputs lie far beyond 3 in front of tanh, where hardly any gradient comes back. So each image's
  outputs are brought to one root mean square first.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from advgame.attacks import InputGradient
from advgame.errors import InputError
from advgame.losses import full_precision
from advgame.threat import Threat
from agents.attacker_network import AttackerNetwork, DeltaSampler
from agents.settings import Bound

_TINY = 1e-6  # mean square in front of the bound: far below that of a network's first weights


class AttNet(AttackerNetwork):
    """g, a perturbation in units of ε.

    Args:
        shape: (C, H, W) of the images.
        classes: number of classes K.
        hidden: width of the three hidden layers.
        dropout: after each of them, in training mode.
        bound: ``"tanh"``, or ``"clip"``, whose gradient is zero outside the ball.
        scale: root mean square over the pixels of each image's outputs in front of the bound; 0
            leaves the outputs as they are, and they saturate.
        centre: take each image less its mean over channels and pixels; otherwise pixels in
            [-1, 1] as they are.

    Raises:
        InputError: an unknown bound, a width below 1, a dropout outside [0, 1), or a negative
            scale.
    """

    file_kind = "attnet"
    classes: int
    # which way its steps go is the solver's business
    adam: ClassVar[dict[str, Any]] = {"maximize": False, "fused": False}

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        hidden: int = 300,
        dropout: float = 0.5,
        bound: Bound = "tanh",
        scale: float = 2.0,
        centre: bool = True,
    ) -> None:
        super().__init__(
            shape, classes=classes, hidden=hidden, dropout=dropout, bound=bound, scale=scale,
            centre=centre,
        )  # fmt: skip
        if bound not in ("tanh", "clip"):
            raise InputError(f"unknown bound {bound!r}: choose tanh or clip")
        if hidden < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"hidden must be 1 or above and dropout in [0, 1), not {hidden} and {dropout}"
            )
        if not 0 <= scale < math.inf:
            raise InputError(f"scale must be 0 or above, not {scale}")
        self.classes, self.bound, self.scale, self.centre = classes, bound, scale, centre
        pixels = shape[0] * shape[1] * shape[2]
        layers: list[nn.Module] = []
        for width in (pixels + classes, hidden, hidden):
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, pixels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] and labels (B,) -> (B, C, H, W) in [-1, 1]."""
        free = self.unbounded(x, y)
        return free.tanh() if self.bound == "tanh" else free.clamp(-1, 1)

    def unbounded(self, x: Tensor, y: Tensor) -> Tensor:
        """What the bound is applied to, (B, C, H, W)."""
        label = one_hot(y.long(), self.classes).to(x.dtype)
        seen = 2 * x.flatten(1) - 1
        if self.centre:
            seen = seen - seen.mean(1, keepdim=True)
        free: Tensor = self.layers(torch.cat([seen, label], 1))
        if self.scale:
            free = free * (self.scale * (free.square().mean(1, keepdim=True) + _TINY).rsqrt())
        return free.view_as(x)

    def sampler(self, gradient: InputGradient, threat: Threat) -> DeltaSampler:
        """One forward; nothing is drawn, and no gradient is asked for."""
        x = full_precision(gradient.x)
        moved = self(x.to(self.dtype), gradient.y).to(x.dtype)
        return lambda rng: moved

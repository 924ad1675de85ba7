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

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from advgame.attacks import Attack, AttackResult
from advgame.checks import check_known_shape
from advgame.errors import InputError
from advgame.threat import Linf, Threat, per_image
from agents.attacker_file import filled, read_file, reading, write_file

FORMAT = "advgame attnet 2"
Bound = Literal["tanh", "clip"]
_TINY = 1e-6  # mean square in front of the bound: far below that of a network's first weights


class AttNet(nn.Module):
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
        super().__init__()
        if bound not in ("tanh", "clip"):
            raise InputError(f"unknown bound {bound!r}: choose tanh or clip")
        if hidden < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"hidden must be 1 or above and dropout in [0, 1), not {hidden} and {dropout}"
            )
        if not 0 <= scale < math.inf:
            raise InputError(f"scale must be 0 or above, not {scale}")
        self.shape, self.classes, self.bound = shape, classes, bound
        self.scale, self.centre = scale, centre
        self.hidden, self.dropout = hidden, dropout
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

    def perturb(self, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        """z(x) within a ball and [0, 1], (B, C, H, W) as ``x``."""
        moved = self(x.to(next(self.parameters()).dtype), y).to(x.dtype)
        return threat.project(x + moved * per_image(threat.eps, x), x)


@dataclass(frozen=True)
class AttNetAttack(Attack):
    """A trained AttNet attacks any classifier; it asks it nothing, and nothing is drawn.

    Args:
        network: g; in evaluation mode while it attacks.
        threat: an L∞ ball.

    Raises:
        InputError: another ball.
    """

    network: AttNet
    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError(f"AttNet attacks in L∞ balls, not in {self.threat.norm}")

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_known_shape(x, self.network.shape)
        if int(y.max()) >= self.network.classes:
            raise InputError(f"this attacker knows {self.network.classes} classes only")

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        network = self.network.to(x.device)
        training = network.training
        try:
            with torch.no_grad():
                x_adv = network.eval().perturb(x, y, self.threat)
        finally:
            network.train(training)
        return AttackResult(x_adv, None, None, 0, 0)


class AttNetPlayer:
    """AttNet while it learns; which way its optimiser's steps go is the solver's business.

    Args:
        network: on its device.
        lr: of Adam, 1e-3 in the paper.
    """

    def __init__(self, network: AttNet, lr: float = 1e-3) -> None:
        self.module = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr)

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {"network": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class AttNetAttacker:
    """A trained AttNet, ready for any threat.

    Args:
        network: g.
        about: how it came about.
    """

    network: AttNet
    about: dict[str, Any]

    def __call__(self, threat: Threat, queries: int) -> AttNetAttack:
        """The attack within a threat model; it needs no query, whatever the budget."""
        return AttNetAttack(self.network, threat)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        net = self.network
        sizes = [net.shape, net.classes, net.hidden, net.dropout, net.bound, net.scale, net.centre]
        metadata = {
            "format": FORMAT, "network": json.dumps(sizes), "about": json.dumps(self.about)
        }  # fmt: skip
        write_file(path, net, metadata)


def load_attnet(path: Path) -> AttNetAttacker:
    """Read what `AttNetAttacker.save` wrote; a run folder stands for its attacker file.

    Raises:
        InputError: missing or damaged file, or one that holds something else.
    """
    metadata, weights = read_file(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no AttNet: it says {metadata.get('format')!r}")
    with reading(path):
        (colours, height, side), classes, *rest = json.loads(metadata["network"])
        network = filled(lambda: AttNet((colours, height, side), classes, *rest), weights)
        about = json.loads(metadata["about"])
    return AttNetAttacker(network.requires_grad_(False).eval(), about)

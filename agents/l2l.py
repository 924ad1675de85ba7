"""L2L's attacker: a network that turns an image and its input gradient into a perturbation.

    δ = ε·g(𝒜(x, y, θ); φ),  g ending in tanh, so that δ lies in the L∞ ball by construction

    Naive   𝒜 = x
    Grad    𝒜 = [x, scaled ∇ₓ loss(f(x; θ), y)]
    k-Step  the Grad cell k times with the same φ, each at the point that the last one reached

Source: Jiang, Chen et al., Learning to Defend by Learning to Attack (L2L), section 2.2. Its
projection is printed with a maximum where the ball needs a minimum: sign(δ)·min(|δ|, ε).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, AttackResult, BatchNormMode, InputGradient, attacked
from advgame.checks import check_known_shape
from advgame.errors import InputError
from advgame.health import gradient_sign, output_signs
from advgame.losses import Loss, cross_entropy, full_precision
from advgame.threat import Linf, Threat, per_image
from agents.attacker_file import filled, read_file, reading, write_file
from agents.attacker_networks import Width, make_body

FORMAT = "advgame l2l attacker 1"
Scaling = Literal["image", "paper"]
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


class L2LNetwork(nn.Module):
    """g, and how it is unrolled.

    Args:
        shape: (C, H, W) of the images.
        gradients: input gradients it asks for: 0 is Naive, 1 Grad, k k-Step.
        width: of the body, one of `agents.attacker_networks.WIDTHS`.
        scaling: of the gradient channels, see `scaled`.

    Raises:
        InputError: unknown width or scaling, or a negative number of gradients.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        gradients: int = 1,
        width: Width = "small",
        scaling: Scaling = "image",
    ) -> None:
        super().__init__()
        if gradients < 0:
            raise InputError(f"an attacker asks for 0 or more gradients, not {gradients}")
        if scaling not in ("image", "paper"):
            raise InputError(f"unknown scaling {scaling!r}: choose image or paper")
        self.shape, self.gradients, self.width, self.scaling = shape, gradients, width, scaling
        self.body = make_body(width, shape[0] * (2 if gradients else 1), shape)

    @property
    def cells(self) -> int:
        """How often the body runs per attack."""
        return max(self.gradients, 1)

    def perturb(self, x: Tensor, threat: Threat, gradient: InputGradient) -> Tensor:
        """Adversarial examples (B, C, H, W) in the ball and in [0, 1], in fp32 at least; `play`."""
        return self.play(x, threat, gradient)[1]

    def play(self, x: Tensor, threat: Threat, gradient: InputGradient) -> tuple[Tensor, Tensor]:
        """What the network puts out, in units of ε, and the adversarial examples.

        The gradient channels are constants: ∂/∂φ of a later cell reaches the earlier ones through
        the point that it starts from, and there is no second-order term.

        Args:
            x: clean images, not in half precision.
            threat: an L∞ ball; its radius may be per image.
            gradient: the classifier's input gradients on these images.

        Returns:
            (B, C, H, W) in [-1, 1], before the pixel range cuts it, and (B, C, H, W) in the ball
            and in [0, 1].
        """
        moved, x_adv = torch.zeros_like(x), x  # moved: in units of ε, before the pixel range
        for cell in range(self.cells):
            known = [x_adv]
            if self.gradients:
                known.append(scaled(gradient(x_adv) if cell else gradient.at_clean(), self.scaling))
            move = self.body(torch.cat(known, 1).to(self._dtype)).to(x.dtype)
            moved = (moved + move).clamp(-1, 1)
            x_adv = threat.project(x + moved * per_image(threat.eps, x), x)
        return moved, x_adv

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


@dataclass(frozen=True)
class L2LAttack(Attack):
    """A trained network attacks whatever classifier it is given; nothing is drawn.

    Args:
        network: g; in evaluation mode while it attacks.
        threat: an L∞ ball; its radius may be per image, (B,).
        loss: whose gradient it sees.
        mode: batch norm of the classifier while it is attacked.

    Raises:
        InputError: a ball that is not L∞.
    """

    network: L2LNetwork
    threat: Threat
    loss: Loss = cross_entropy
    mode: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError(f"L2L attacks in L∞ balls, not in {self.threat.norm}")

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_known_shape(x, self.network.shape)

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        network = self.network.to(x.device)
        training = network.training
        gradient = InputGradient(model, x, y, loss=self.loss, mode=self.mode, check=check)
        full = full_precision(x.detach())
        try:
            with torch.no_grad():
                x_adv = network.eval().perturb(full, self.threat, gradient)
        finally:
            network.train(training)
        calls = gradient.calls * len(x)
        return AttackResult(x_adv, None, None, calls, calls)


class L2LPlayer:
    """The network while it learns: Adam ascends what the defender descends.

    Args:
        network: on its device.
        lr: learning rate, constant.
        weight_decay: of Adam.
        synchronise: called before each step, to average gradients over processes.
    """

    def __init__(
        self,
        network: L2LNetwork,
        *,
        lr: float = 1e-3,
        weight_decay: float = 2e-4,
        synchronise: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.module, self.synchronise = network, synchronise
        self.optimizer = torch.optim.Adam(
            network.parameters(),
            lr,
            (0.9, 0.999),
            weight_decay=weight_decay,
            maximize=True,
            fused=True,  # a small network's step takes a third of the time
        )

    @property
    def gradients(self) -> int:
        """Input gradients per attack."""
        return self.module.gradients

    @property
    def cells(self) -> int:
        """Forwards of the network per attack."""
        return self.module.cells

    def perturb(self, x: Tensor, threat: Threat, gradient: InputGradient) -> Tensor:
        """`L2LNetwork.perturb`, in the mode that the network is in."""
        return self.module.perturb(x, threat, gradient)

    def step(self) -> None:
        """Up along the gradient that a backward pass left, which is then cleared."""
        if self.synchronise is not None:
            self.synchronise(self.module)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def signs(
        self, x: Tensor, y: Tensor, threat: Threat, gradient: InputGradient
    ) -> dict[str, float]:
        """See `advgame.games.l2l.AttackerPlayer`."""
        with torch.no_grad(), attacked(self.module):
            moved, _ = self.module.play(x, threat, gradient)
        return output_signs(moved, y) | gradient_sign(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {"network": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class L2LAttacker:
    """A trained network, ready for any threat and budget.

    Args:
        network: g.
        about: how it came about: command, settings.
    """

    network: L2LNetwork
    about: dict[str, Any]

    def __call__(self, threat: Threat, queries: int) -> L2LAttack:
        """The attack within a threat model and a budget of forwards per image.

        Raises:
            InputError: a budget below the network's number of gradients, or another norm.
        """
        if queries < self.network.gradients:
            raise InputError(
                f"this attacker makes {self.network.gradients} queries per image: "
                f"allow as many, not {queries}"
            )
        return L2LAttack(self.network, threat)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        network = self.network
        metadata = {
            "format": FORMAT,
            "shape": json.dumps(network.shape),
            "gradients": str(network.gradients),
            "width": network.width,
            "scaling": network.scaling,
            "about": json.dumps(self.about),
        }
        write_file(path, network, metadata)


def load_l2l(path: Path) -> L2LAttacker:
    """Read what `L2LAttacker.save` wrote; a run folder stands for its ``attacker.safetensors``.

    Raises:
        InputError: missing or damaged file, or one that holds something else.
    """
    metadata, weights = read_file(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no L2L attacker: it says {metadata.get('format')!r}")
    with reading(path):
        colours, height, side = json.loads(metadata["shape"])
        gradients, names = int(metadata["gradients"]), (metadata["width"], metadata["scaling"])
        network = filled(
            lambda: L2LNetwork((colours, height, side), gradients, *cast(Any, names)), weights
        )
        about = json.loads(metadata["about"])
    return L2LAttacker(network.requires_grad_(False).eval(), about)

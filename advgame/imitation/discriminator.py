"""GAIL's discriminator as pure functions of one flat parameter vector θ_D.

Sign, once for all: a high logit means expert, D = sigmoid(logit) is the probability of the expert
(Ho & Ermon's code has it so). The L2L paper's D is 1 − ours: it labels the policy's pairs 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advgame.errors import InputError

CHANCE_LOSS = 2 * math.log(2)
"""`imitation_loss` of a discriminator that knows nothing: logit 0 everywhere."""

REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "survival": F.softplus,
    "cost": lambda logit: -F.softplus(-logit),
    "neutral": lambda logit: logit,
}
"""Reward of a pair by its expert-is-high logit, named by what it does to the length of an episode.

survival: −log(1 − D) > 0, every further step pays; cost: log D < 0, every further step costs;
neutral: logit = log D − log(1 − D), of either sign.
"""


@dataclass(frozen=True)
class Discriminator:
    """(s, a) -> hidden layers of tanh -> logit, the parameters one vector (m,).

    Args:
        inputs: size of an encoded pair.
        hidden: widths; (64, 32) is the L2L paper's, appendix C.2.
        spectral_norm: every weight matrix W is used as W / max(1, σ(W)), so that the logit is
            1-Lipschitz in the pair (Miyato et al. 2018; σ exact, as the matrices are small).
    """

    inputs: int
    hidden: tuple[int, ...] = (64, 32)
    spectral_norm: bool = False

    def __post_init__(self) -> None:
        if self.inputs < 1 or any(width < 1 for width in self.hidden):
            raise InputError("a discriminator needs inputs and hidden widths of 1 or above")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Weight and bias of each layer, in the order of the flat vector."""
        widths = (self.inputs, *self.hidden, 1)
        steps = itertools.pairwise(widths)
        return [shape for low, high in steps for shape in ((high, low), (high,))]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of parameters of each weight and bias."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """m, how many parameters θ_D has."""
        return sum(self.blocks)

    def init(self, rng: torch.Generator) -> Tensor:
        """Fresh parameters (m,), uniform in ±1/sqrt(inputs of the layer), as torch's Linear."""
        parts = []
        for weight, bias in zip(self.shapes[::2], self.shapes[1::2], strict=True):
            reach = 1 / math.sqrt(weight[1])
            for shape in (weight, bias):
                drawn = torch.rand(math.prod(shape), generator=rng, device=rng.device)
                parts.append(reach * (2 * drawn - 1))
        return torch.cat(parts)

    def logits(self, theta: Tensor, pairs: Tensor) -> Tensor:
        """Expert-is-high logits.

        Args:
            theta: (m,).
            pairs: (B, inputs), encoded by `advgame.imitation.pairs.PairCode`.

        Returns:
            (B,).
        """
        if theta.shape != (self.size,) or pairs.shape[1:] != (self.inputs,):
            raise InputError(
                f"this discriminator takes theta ({self.size},) and pairs (B, {self.inputs}), "
                f"not {tuple(theta.shape)} and {tuple(pairs.shape)}"
            )
        parts = [
            part.view(shape)
            for part, shape in zip(theta.split(self.blocks), self.shapes, strict=True)
        ]
        value = pairs
        for layer, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            if self.spectral_norm:
                weight = weight / torch.linalg.matrix_norm(weight, 2).clamp(min=1)
            value = F.linear(value.tanh() if layer else value, weight, bias)
        return value.squeeze(1)


def imitation_loss(policy: Tensor, expert: Tensor) -> Tensor:
    """Σ over both sides of the mean cross-entropy; `CHANCE_LOSS` where nothing is known.

    The negative of the objective that D maximises (Ho & Ermon 2016, eq. 14; L2L eq. 4).

    Args:
        policy: (B,) logits of the policy's pairs, which should be low.
        expert: (E,) logits of the expert's pairs, which should be high.
    """
    return F.softplus(policy).mean() + F.softplus(-expert).mean()


def label_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the Bernoulli D in nats, Ho & Ermon's regulariser (theirs: twice that).

    Args:
        logits: (B,).
    """
    return (
        F.softplus(-logits) * logits.sigmoid() + F.softplus(logits) * (-logits).sigmoid()
    ).mean()


def half_way(logits: Tensor) -> Tensor:
    """Mean of (D − 1/2)²/2, C-GAIL's controller (Luo et al. 2024, algorithm 1) without its weight.

    Args:
        logits: (B,) of one side.
    """
    return (logits.sigmoid() - 0.5).square().mean() / 2


def gradient_penalty(
    discriminator: Discriminator, theta: Tensor, pairs: Tensor, target: float
) -> Tensor:
    """Mean of (‖∂logit/∂pair‖ − target)² (Gulrajani et al. 2017, eq. 3).

    Args:
        discriminator: whose logit.
        theta: (m,).
        pairs: (B, inputs), on lines between policy and expert pairs.
        target: the norm wanted; 1 in the paper, 0 keeps the logit flat.
    """
    points = pairs.detach().requires_grad_()
    logits = discriminator.logits(theta, points)
    (slope,) = torch.autograd.grad(logits.sum(), points, create_graph=True)
    # the root's derivative at 0 is infinite
    norm = (slope.square().sum(1) + 1e-12).sqrt()
    return (norm - target).square().mean()

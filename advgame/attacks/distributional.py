"""Attacks that draw adversarial examples from a distribution, and keep the worst of k.

    max over p of  E_(δ ~ p) [ loss(f(x + δ), y) ] + λ H(p)

is climbed for each image on its own: δ = ε·tanh(u), u ~ N(μ, diag σ²), with the reparameterised
gradient. Networks that have learned to sample are `Sampler`s, too: `agents.attacker_network`.

Source: Dong et al. 2020, Adversarial distributional training (ADT), ADT-EXP.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import at_boundary, attacked
from advgame.attacks.input_gradients import InputGradient
from advgame.choices import BatchNormMode
from advgame.distributions import TanhNormal
from advgame.errors import InputError
from advgame.losses import Loss, cross_entropy, full_precision, margin, misclassified
from advgame.threat import Linf, Threat, per_image


def worst_of(model: nn.Module, points: Iterable[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Of several adversarial examples of each image, the one of largest margin.

    The margin is above 0 exactly where the classifier is wrong, so that an image is wrong at the
    worst sample if it is at any. The largest cross-entropy does not promise that. Where the
    classifier does not answer (NaN) it is wrong, and the margin is infinite.

    Args:
        model: in the mode that it is to be attacked in.
        points: batches (B, C, H, W), one or more.
        y: (B,) labels.

    Returns:
        (B, C, H, W) and the margins (B,) there.
    """
    best: tuple[Tensor, Tensor] | None = None
    for point in points:
        with torch.no_grad():
            logits = model(point)
            reached = margin(logits, y)
            silent = misclassified(logits, y) & ~(reached >= 0)
            reached = reached.masked_fill(silent, torch.inf)
        if best is None:
            best = point, reached
        else:
            better = reached > best[1]
            best = (
                torch.where(per_image(better, point), point, best[0]),
                torch.where(better, reached, best[1]),
            )
    assert best is not None
    return best


class Sampler(Attack):
    """An attack that draws: of ``draws`` samples of an image it returns that of largest margin.

    ``loss`` of the result is the margin, where there was something to choose from. The samples of
    one image share the costly part, which a subclass brings: `_prepare`.
    """

    draws: int
    mode: BatchNormMode

    @abstractmethod
    def _prepare(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, check: bool
    ) -> tuple[Callable[[], Tensor], int]:
        """What gives a fresh adversarial example of each image, (B, C, H, W), at each call.

        Returns:
            it, and the forwards (and input-backwards) per image that it took to make it.
        """

    @at_boundary
    def draw(
        self, model: nn.Module, x: Tensor, y: Tensor, count: int, rng: torch.Generator
    ) -> Iterator[Tensor]:
        """``count`` adversarial examples of each image, one batch (B, C, H, W) after another."""
        sample, _ = self._prepare(model, x, y, rng, check=False)
        return (sample() for _ in range(count))

    @override
    def _draws(self) -> str | None:
        return "this attack, which draws samples,"

    @override
    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        # one that draws nothing needs no stream
        sample, passes = self._prepare(model, x, y, rng or torch.Generator(x.device), check)
        calls = passes * len(x)
        if self.draws == 1:
            return AttackResult(sample(), None, None, calls, calls)
        with attacked(model, self.mode):
            x_adv, margins = worst_of(model, (sample() for _ in range(self.draws)), y)
        return AttackResult(x_adv, margins, None, calls + self.draws * len(x), calls)


@dataclass(frozen=True)
class Fitted:
    """A distribution per image.

    Args:
        distribution: of δ/ε, (B, C, H, W).
        losses: (B,) expected loss before the last step, over its draws.
    """

    distribution: TanhNormal
    losses: Tensor


@dataclass(frozen=True)
class DistributionalAttack(Sampler):
    """ADT-EXP's inner problem as an attack: fit a distribution per image, draw, keep the worst.

    μ and ρ begin at 0 (σ = 0.693). Each step draws ``samples`` perturbations and moves both by
    Adam, whose published betas (0, 0) make it a step of ``lr`` along the gradient's sign.

    Args:
        threat: an L∞ ball; its radius may be per image, (B,).
        steps: of Adam.
        samples: draws per step, a forward and an input-backward each.
        lr: of Adam, in units of u.
        betas: of Adam.
        lam: λ, the weight of the entropy per dimension (the mean over an image's C·H·W elements,
            as in the published code); a sum over dimensions has λ/(C·H·W).
        draws: k: of so many samples of the fitted distribution the worst is returned; 1 needs no
            forward to tell.
        accumulate: never clear the gradients of the steps before, as published: a momentum
            without decay.
        batch_mean: divide the objective by B, as published. Adam divides by the gradient's size
            plus 1e-8, so that images that the classifier is sure of then move less, the less the
            larger the batch.
        loss: what is climbed.
        mode: batch norm and dropout while attacking.

    Raises:
        InputError: settings that no attack can use.
    """

    threat: Threat
    steps: int = 7
    samples: int = 5
    lr: float = 0.3
    betas: tuple[float, float] = (0.0, 0.0)
    lam: float = 0.01
    draws: int = 10
    accumulate: bool = False
    batch_mean: bool = False
    loss: Loss = cross_entropy
    mode: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError(f"ADT's distributions are of L∞ balls, not of {self.threat.norm}")
        for name in ("steps", "samples", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or above, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0, not {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must lie in [0, 1), not {self.betas}")
        if not 0 <= self.lam < math.inf:
            raise InputError(f"lam must be 0 or above, not {self.lam}")

    def place(self, value: Tensor, x: Tensor) -> Tensor:
        """Clip x + ε·a to [0, 1]; ``value`` may hold several samples, (S, B, C, H, W)."""
        return self.threat.project(x + value * per_image(self.threat.radii(x), x), x)

    def fit(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, *, check: bool = False
    ) -> Fitted:
        """Climb: ``steps`` · ``samples`` forwards and input-backwards.

        Args:
            model: left as it was.
            x: (B, C, H, W) clean images.
            y: (B,).
            rng: of the draws, on the images' device.
            check: look at the first logits, and refuse those that cannot be attacked.
        """
        x = full_precision(x.detach())
        found = TanhNormal(*(torch.zeros_like(x, requires_grad=True) for _ in "μρ"))
        leaves = [found.mean, found.raw]
        adam = torch.optim.Adam(leaves, self.lr, self.betas, maximize=True)
        scale = 1 / len(x) if self.batch_mean else 1.0
        gradient = InputGradient(model, x, y, loss=self.loss, mode=self.mode, check=check)
        for _ in range(self.steps):
            with torch.enable_grad():
                draw = found.sample(rng, self.samples)
                points = self.place(draw.value, x)
                # through the classifier one batch at a time
                gradients, losses = zip(*map(gradient.and_losses, points.detach()), strict=True)
                entropy = self.lam / x[0].numel() * found.entropy(draw).sum()
                # the gradient at a point is a constant: the chain rule through the points alone
                climbed = (points * torch.stack(gradients)).sum() + entropy
            if not self.accumulate:
                adam.zero_grad()
            (scale * climbed).backward(inputs=leaves)
            adam.step()
        fitted = TanhNormal(*(leaf.detach() for leaf in leaves))
        return Fitted(fitted, torch.stack(losses).mean(0))

    @override
    def _prepare(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, check: bool
    ) -> tuple[Callable[[], Tensor], int]:
        fitted = self.fit(model, x, y, rng, check=check).distribution
        return lambda: self.place(fitted.sample(rng).value, x), self.steps * self.samples

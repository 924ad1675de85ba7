"""The tanh-Gaussian distribution that ADT draws perturbations from, in units of ε.

    a = tanh(u),  u = μ + σ r,  r ~ N(0, I),  σ = softplus(ρ)

Entropies are in nats and those of a, not of δ = ε·a, so that they can be compared over radii: per
dimension δ has log ε more. The largest is log 2 = 0.693 per dimension, that of U(-1, 1). What
clipping to the pixel range does to a sample is not in them.

Source: Dong et al. 2020, Adversarial distributional training (ADT), ADT-EXP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2 = math.log(2)
_HALF_LOG_2PI = math.log(2 * math.pi) / 2
_TAIL = -15.0  # below it softplus(ρ) is exp(ρ) to fp32's last bit


@dataclass(frozen=True)
class Draw:
    """One sample, or several, and how they came about.

    Args:
        noise: r.
        latent: u.
        value: a, in (-1, 1) (at ±1 where tanh rounds to it).
    """

    noise: Tensor
    latent: Tensor
    value: Tensor


@dataclass(frozen=True)
class TanhNormal:
    """The distribution of a, independent elements.

    Args:
        mean: μ of u, of any shape, e.g. (B, C, H, W).
        raw: ρ, the same shape.
    """

    mean: Tensor
    raw: Tensor

    @property
    def spread(self) -> Tensor:
        """σ = softplus(ρ), the standard deviation of u."""
        return F.softplus(self.raw)

    def sample(self, rng: torch.Generator, count: int | None = None) -> Draw:
        """Draw by reparameterisation: gradients reach μ and ρ.

        Args:
            rng: of r, on the device of μ.
            count: number of samples, which stand in front of the shape; None draws one, of the
                shape itself.
        """
        shape = self.mean.shape if count is None else (count, *self.mean.shape)
        noise = torch.randn(
            shape, generator=rng, device=self.mean.device, dtype=self.mean.dtype
        )  # fmt: skip
        latent = self.mean + self.spread * noise
        return Draw(noise, latent, latent.tanh())

    def log_density(self, draw: Draw) -> Tensor:
        """The log-density of every element, of a, with all constants."""
        gauss = -draw.noise.square() / 2 - _HALF_LOG_2PI - self._log_spread()
        return gauss - log_slope(draw.latent)

    def entropy(self, draw: Draw) -> Tensor:
        """An unbiased estimate of the entropy of every element of a, from its own draw.

            H(a) = ½ log 2πe + log σ + E[log(1 - tanh²u)]

        The Gaussian's part is exact, where -log p(a) has r²/2 for ½: the same gradient and mean,
        less variance.
        """
        return 0.5 + _HALF_LOG_2PI + self._log_spread() + log_slope(draw.latent)

    def _log_spread(self) -> Tensor:
        # softplus underflows where its logarithm is still an ordinary number
        inner = F.softplus(self.raw.clamp_min(_TAIL)).log()
        return torch.where(self.raw > _TAIL, inner, self.raw)


def log_slope(latent: Tensor) -> Tensor:
    """log(1 - tanh²u), the logarithm of tanh's derivative, finite wherever u is.

    1 - tanh²u = 4 / (e^u + e^-u)², so that it is 2 (log 2 - |u| - log(1 + e^(-2|u|))).
    """
    size = latent.abs()
    return 2 * (LOG_2 - size - torch.log1p(torch.exp(-2 * size)))

"""Threat models: balls of radius ε around a clean image, cut with the pixel range [0, 1].

A ball is one object with five small methods, so that no attack asks which norm it works in.
Its radius is a float or one number per image, a tensor (B,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self, overload

import torch
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError
from advgame.run.options import parse_eps

Index = Tensor | slice
_ON_FACE = 1e-3  # how near to the face counts as on it: rounding moves projected points by less


@overload
def per_image(value: Tensor, like: Tensor) -> Tensor: ...
@overload
def per_image(value: float | Tensor, like: Tensor) -> float | Tensor: ...
def per_image(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number per image (B,) shaped (B, 1, 1, 1) to multiply ``like``; floats pass through."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Threat(ABC):
    """A ball of radius ``eps`` in [0, 1] pixel units.

    Args:
        eps: float, or tensor (B,) with one radius per image.

    Raises:
        InputError: a radius that is not finite and above 0, or a tensor that is not (B,).
    """

    eps: float | Tensor
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.eps, Tensor):
            if self.eps.dim() != 1 or not len(self.eps) or not self.eps.is_floating_point():
                raise InputError("eps per image must be a float tensor (B,), B 1 or above")
            if not bool(((self.eps > 0) & torch.isfinite(self.eps)).all()):
                raise InputError("every eps must be finite and above 0")
        else:
            object.__setattr__(self, "eps", parse_eps(self.eps))

    def select(self, index: Index) -> Self:
        """The same ball for a subset of the batch."""
        if not isinstance(self.eps, Tensor):
            return self
        return self.with_radii(self.eps[index])

    def with_radii(self, eps: Tensor) -> Self:
        """The same kind of ball with radii (B,) that are known to be valid: none is checked."""
        ball = object.__new__(type(self))
        object.__setattr__(ball, "eps", eps)
        return ball

    def radii(self, x: Tensor) -> float | Tensor:
        """ε as images have it: radii from NumPy are float64, which no fp32 classifier takes.

        Raises:
            InputError: not one for each image.
        """
        if not isinstance(self.eps, Tensor):
            return self.eps
        if len(self.eps) != len(x):
            raise InputError(f"eps has {len(self.eps)} entries for {len(x)} images")
        return self.eps.to(x)

    def scaled(self, factor: float) -> Self:
        """The ball of ``factor`` times the radius, however large that is."""
        if not 0 < factor < math.inf:
            raise InputError(f"a ball is scaled by a factor above 0, not {factor}")
        ball = object.__new__(type(self))
        object.__setattr__(ball, "eps", self.eps * factor)
        return ball

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation: (B, C, H, W) -> (B,)."""

    @classmethod
    @abstractmethod
    def whole(cls, pixels: int) -> float:
        """The radius from which on a ball holds every image of so many pixels."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a ball that holds every image of a shape (C, H, W).

        Raises:
            InputError: which radius would do.
        """
        whole = self.whole(math.prod(shape))
        if not isinstance(self.eps, Tensor) and self.eps >= whole:
            raise InputError(
                f"{self.norm} ε = {self.eps:g} holds every image of {math.prod(shape)} pixels, "
                f"which lie within {whole:.3g}: did you mean {self.eps:g}/255?"
            )

    @abstractmethod
    def steepest(self, grad: Tensor) -> Tensor:
        """The direction of unit norm along which the loss rises fastest; same shape as ``grad``."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around ``x``, cut with [0, 1], that stands for ``x_adv``.

        For L∞ it is the nearest point of the cut. For L2 it is the nearest point of the ball,
        clipped to [0, 1], which stays in the ball because ``x`` itself lies in [0, 1].
        """

    @abstractmethod
    def shrink(self, delta: Tensor) -> Tensor:
        """The nearest perturbation of size ε or less; [0, 1] is not looked at."""

    def projector(self, x: Tensor) -> Callable[[Tensor, Index], Tensor]:
        """`project` around fixed images, as a function of points and of their rows in ``x``."""
        return lambda x_adv, rows: self.select(rows).project(x_adv, x[rows])

    @abstractmethod
    def on_face(self, delta: Tensor) -> Tensor:
        """Share of each perturbation's pixels that the ball's face holds, in [0, 1]: (B,)."""

    @abstractmethod
    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """A uniform draw from the ball around ``x``, clipped to [0, 1]."""


@dataclass(frozen=True)
class Linf(Threat):
    """Every pixel may change by at most ε, which is 1 at most."""

    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = float(self.eps.max()) if isinstance(self.eps, Tensor) else self.eps
        if largest > 1:
            raise InputError(f"eps is in [0, 1] pixels: did you mean {largest:g}/255?")

    @override
    def size(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)

    @classmethod
    @override
    def whole(cls, pixels: int) -> float:
        return 1.0

    @override
    def steepest(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Clip to [x - ε, x + ε] and to [0, 1]."""
        return self.projector(x)(x_adv, slice(None))

    def projector(self, x: Tensor) -> Callable[[Tensor, Index], Tensor]:
        """Both clips are one box, computed once for all steps of an attack."""
        eps = per_image(self.radii(x), x)
        low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
        return lambda x_adv, rows: torch.clamp(x_adv, low[rows], high[rows])

    def shrink(self, delta: Tensor) -> Tensor:
        """Every entry of δ is clipped to [-ε, ε]."""
        eps = per_image(self.radii(delta), delta)
        return torch.clamp(delta, -eps, eps)  # type: ignore[arg-type]  # both of one kind

    def on_face(self, delta: Tensor) -> Tensor:
        """Share of the pixels with |δ| = ε, to one part in a thousand."""
        # ±1 by sign, and their mean, take half the time of comparing and counting
        side = delta.abs().sub_((1 - _ON_FACE) * per_image(self.eps, delta)).sign_()
        return (side.flatten(1).mean(1) + 1) / 2

    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Every pixel moves by U(-ε, ε)."""
        noise = torch.empty_like(x).uniform_(-1, 1, generator=rng)
        return (x + noise * per_image(self.radii(x), x)).clamp_(0, 1)


@dataclass(frozen=True)
class L2(Threat):
    """The Euclidean norm of the change is at most ε."""

    norm: ClassVar[str] = "L2"

    def size(self, delta: Tensor) -> Tensor:
        """The root of the sum of squares of each image."""
        size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return size

    @classmethod
    def whole(cls, pixels: int) -> float:
        """The root of the number of pixels."""
        return math.sqrt(pixels)

    def steepest(self, grad: Tensor) -> Tensor:
        """∇ / ‖∇‖₂, and 0 where the gradient is 0.

        Scaled by the largest entry first: gradients of confident networks are small enough
        for their squares to underflow in fp32.
        """
        tiny, grad = torch.finfo(grad.dtype).tiny, grad.nan_to_num()  # as sign: NaN points nowhere
        largest = grad.abs().flatten(1).amax(1).clamp_min(tiny)
        scaled = grad / per_image(largest, grad)
        return scaled / per_image(self.size(scaled).clamp_min(tiny), grad)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Shrink δ to length ε where it is longer, then clip to [0, 1]."""
        return (x + self.shrink(x_adv - x)).clamp_(0, 1)

    def shrink(self, delta: Tensor) -> Tensor:
        """Scale δ to length ε where it is longer."""
        size = self.size(delta)
        # a tensor also for one radius: torch divides a float by way of the reciprocal, which
        # rounds otherwise, and a radius per image must equal one image at a time
        radii = self.radii(delta)
        eps = radii if isinstance(radii, Tensor) else torch.full_like(size, radii)
        scale = (eps / size.clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1)
        return delta * per_image(scale, delta)

    def on_face(self, delta: Tensor) -> Tensor:
        """1 where ‖δ‖₂ = ε, to one part in a thousand, else 0."""
        return (self.size(delta) >= (1 - _ON_FACE) * self.eps).float()

    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Uniform in the d-ball: a Gaussian direction times ε·U^(1/d)."""
        direction = torch.empty_like(x).normal_(generator=rng)
        direction = direction / per_image(self.size(direction), x)
        radius = torch.empty_like(x[:, 0, 0, 0]).uniform_(0, 1, generator=rng)
        radius = radius ** (1 / x[0].numel()) * self.radii(x)
        return (x + direction * per_image(radius, x)).clamp_(0, 1)


@dataclass(frozen=True)
class GaussianStart:
    """Where TRADES' attack and its kin begin: so near the image that it is hardly noise.

    At the image itself the divergence of both outputs has no gradient.

    Args:
        deviation: of every pixel.
    """

    deviation: float = 1e-3

    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Every pixel moves by N(0, deviation²), clipped to [0, 1]."""
        noise = torch.empty_like(x).normal_(generator=rng)
        return (x + noise * self.deviation).clamp_(0, 1)


THREATS: dict[str, Callable[[float | Tensor], Threat]] = {"Linf": Linf, "L2": L2}

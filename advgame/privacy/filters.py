"""Filters z = T(x; u): (n, D) -> (n, d), those that learn and those that do not.

What a filter gives out has mean 0 and covariance 1 over the training data. Without that a learned
filter fools the adversary that it grew up with by the scale of z alone: it moves what it should
hide into a direction of little variance, where that adversary learns slowly and a fresh one, which
rescales z, finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advgame.errors import InputError, unknown
from advgame.seeding import seeded_init, stream

FILTERS = ("linear", "mlp")
BASELINES = ("random", "pca", "raw")


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer; smooth, since solvers and L-BFGS use the curvature."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Whiten(nn.Module):
    """To mean 0 and covariance 1.

    In training a batch is whitened by itself, in evaluation as the last training batch was.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("root", torch.eye(dim))

    def forward(self, z: Tensor) -> Tensor:
        """(n, d) -> (n, d).

        Raises:
            InputError: z cannot be whitened, since it is not finite or does not vary.
        """
        if self.training:
            self.mean = z.mean(0)
            centred = z - self.mean
            covariance = centred.T @ centred / len(z)
            # relative to the mean variance, so that the scale of z does not matter
            ridge = 1e-5 * covariance.diagonal().mean() * torch.eye(z.shape[1]).to(z)
            self.root, failed = torch.linalg.cholesky_ex(covariance + ridge)
            if failed:
                raise InputError(
                    "training diverged: what the filter gives out is not finite or a constant"
                )
        white: Tensor = torch.linalg.solve_triangular(self.root, (z - self.mean).T, upper=False).T
        return white


class Filter(nn.Module):
    """A map and the scaling of what it gives out.

    Args:
        body: (n, D) -> (n, d).
        scale: (n, d) -> (n, d).
        dim: d.
    """

    def __init__(self, body: nn.Module, scale: nn.Module, dim: int) -> None:
        super().__init__()
        self.body, self.scale, self.dim = body, scale, dim

    def forward(self, x: Tensor) -> Tensor:
        """Filter images x (n, D) and scale what comes out: z (n, d)."""
        z: Tensor = self.scale(self.body(x))
        return z

    @torch.no_grad()
    def fit_scale(self, x: Tensor) -> Filter:
        """Take the scaling from the training data (n, D); the filter is then ready for use."""
        self.train()(x)
        return self.eval()


def make_filter(kind: str, x: Tensor, dim: int, seed: int, hidden: int = 32) -> Filter:
    """A filter, its scaling fitted.

    Args:
        kind: ``"linear"`` and ``"mlp"`` are there to be trained; ``"random"`` projects on random
            orthonormal directions, ``"pca"`` on those of the largest variance, ``"raw"`` gives
            all of x.
        x: training data (n, D).
        dim: d; of no effect on ``"raw"``.
        seed: of the first weights and of the random projection.
        hidden: width of the MLP.

    Raises:
        InputError: unknown kind, or a dimension outside 1..D.
    """
    if kind not in (*FILTERS, *BASELINES):
        raise unknown("filter", kind, (*FILTERS, *BASELINES))
    size = x.shape[1]
    if not 1 <= dim <= size:
        raise InputError(f"dim must lie in 1..{size} for {size} pixels, not {dim}")
    if hidden < 1:
        raise InputError(f"hidden must be 1 or above, not {hidden}")
    if kind == "raw":
        # pixels that never change have no inverse covariance: each is scaled by itself
        return (
            Filter(nn.Identity(), nn.BatchNorm1d(size, affine=False, momentum=1.0), size)
            .to(x)
            .fit_scale(x)
        )
    with seeded_init(seed, "filter"):
        body = mlp(size, hidden, dim) if kind == "mlp" else nn.Linear(size, dim)
    if kind in BASELINES:
        directions = principal(x, dim) if kind == "pca" else _orthonormal(size, dim, seed)
        assert isinstance(body, nn.Linear)
        body.weight.data, body.bias.data = directions, -directions @ x.mean(0).cpu()
        body.requires_grad_(False)
    return Filter(body, Whiten(dim), dim).to(x).fit_scale(x)


def principal(x: Tensor, dim: int) -> Tensor:
    """The ``dim`` orthonormal directions (dim, D) of largest variance, on the CPU."""
    centred = (x - x.mean(0)).double().cpu()
    directions: Tensor = torch.linalg.svd(centred, full_matrices=False)[2][:dim]
    return directions.float()


def _orthonormal(size: int, dim: int, seed: int) -> Tensor:
    drawn = torch.randn(size, dim, generator=stream(seed, "projection"), dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(drawn)[0]
    return columns.T.float()

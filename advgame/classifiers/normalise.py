"""Normalisation as a classifier's first layer: images outside stay in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(x - mean) / std per channel; mean and std are buffers in [0, 1] pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return (x - self.mean) / self.std

"""Adam for weights whose gradient is an outer product, as after one vector through a layer.

The gradient of a weight matrix is δ⊗h then. It is formed and used up a block of rows at a time, in
the cache: for huge layers a quarter of the memory, and most of the writing, is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's own
_BLOCK = 1 << 22  # weights whose gradient exists at a time: 16 MB


@dataclass
class Moments:
    """A matrix of weights with Adam's two moments, all (rows, columns)."""

    value: Tensor
    mean: Tensor
    square: Tensor

    @staticmethod
    def zeros(rows: int, columns: int, device: torch.device) -> Moments:
        """All zero; the memory of zeros is taken when they are first written."""
        value, mean, square = (torch.zeros(rows, columns, device=device) for _ in range(3))
        return Moments(value, mean, square)

    def adam(self, delta: Tensor, source: Tensor, lr: float, steps: int) -> None:
        """One Adam step for the gradient δ⊗h, of which only a block of rows exists at a time.

        Args:
            delta: δ (rows,), gradient of the layer's outputs.
            source: h (columns,), its inputs.
            lr: learning rate.
            steps: how many steps were made before.
        """
        block = max(_BLOCK // len(source), 1)
        scratch = torch.empty(min(block, len(delta)), len(source), device=delta.device)
        for start in range(0, len(delta), block):
            rows = slice(start, start + block)
            part = delta[rows]
            adam(
                [self.value[rows]],
                [torch.mul(part[:, None], source, out=scratch[: len(part)])],
                [self.mean[rows]],
                [self.square[rows]],
                [],
                [torch.tensor(float(steps), device=delta.device)],
                fused=True,
                amsgrad=False,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                lr=lr,
                weight_decay=0.0,
                eps=_EPS,
                maximize=False,
            )


def fill_uniform(values: Tensor, limit: float, rng: torch.Generator) -> None:
    """Uniform in ±limit; drawn on the CPU so that every device begins with the same numbers."""
    drawn = values if values.device.type == "cpu" else torch.empty(values.shape)
    drawn.uniform_(-limit, limit, generator=rng)
    if drawn is not values:
        values.copy_(drawn)

"""A first convolution whose backward to the image costs little: what every attack asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class FirstConv2d(nn.Conv2d):
    """`nn.Conv2d` for images of few channels, with another way to the gradient for the image.

    Libraries tune that gradient for many channels; for one or three, a product with the weights and
    a sum over the overlapping windows takes less time on a CPU. The weights' names and all forwards
    are `nn.Conv2d`'s, to the bit; the image's gradient differs by rounding. With weights that are
    being trained, and on other devices, all is `nn.Conv2d`'s.

    Neither groups nor dilation are meant, nor another padding than zeros.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W')."""
        learning = any(one.requires_grad for one in self.parameters())
        attacked = x.requires_grad and torch.is_grad_enabled() and not learning
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        if not (attacked and exact and x.device.type == "cpu"):
            return super().forward(x)
        out: Tensor = _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return out


class _Convolution(torch.autograd.Function):
    """A convolution with constant weights."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(weight)
        ctx.size = x.shape[-2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        windows = weight.flatten(1).t() @ gradient.flatten(2)  # (B, C k k, windows)
        image = F.fold(windows, ctx.size, weight.shape[-2:], padding=ctx.padding, stride=ctx.stride)
        return image, None, None, None, None

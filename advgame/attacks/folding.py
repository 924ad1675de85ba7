"""Batch norm folded into the convolution before it: what a training's attacks ask is cheaper so.

With its running statistics batch norm is a scale and a shift per channel, which the convolution's
weights and bias take over. Logits and gradients are the same but for rounding, so that evaluations
do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_FOLDING = ContextVar("folding", default=False)


@contextlib.contextmanager
def folding() -> Iterator[None]:
    """Within the block attacks fold, see `folded`."""
    outer = _FOLDING.set(True)
    try:
        yield
    finally:
        _FOLDING.reset(outer)


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block, and within `folding`, batch norm is folded where a network says it can be.

    A module's class names the pairs in ``folds``: a convolution, and the batch norm that alone sees
    its output. Nothing of the modules has changed afterwards.

    Args:
        model: any classifier, frozen and in evaluation mode.
    """
    with contextlib.ExitStack() as undone:
        for module in list(model.modules()) if _FOLDING.get() else []:
            pairs = vars(type(module)).get("folds", ())  # a subclass may have another forward
            parts = dict(module.named_modules()) if pairs else {}
            for first, second in pairs:
                conv, norm = parts.get(first), parts.get(second)
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    undone.enter_context(_pair_folded(conv, module, second, norm))
        yield


class _Folded(nn.Module):
    """In the place of a batch norm; no `nn.Identity`, which says that a network has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@contextlib.contextmanager
def _pair_folded(
    conv: nn.Conv2d, module: nn.Module, place: str, norm: nn.BatchNorm2d
) -> Iterator[None]:
    mean, variance, own = norm.running_mean, norm.running_var, dict(conv._parameters)
    if mean is None or variance is None:  # it has the batch's own in every mode
        yield
        return
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    conv._parameters.update(weight=weight, bias=bias)
    module.set_submodule(place, _Folded())
    try:
        yield
    finally:
        conv._parameters.update(own)
        module.set_submodule(place, norm)

"""Refusals of images, labels and logits that no attack and no training can use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from advgame.errors import InputError


def check_known_shape(x: Tensor, shape: Sequence[int]) -> None:
    """Refuse images that a learned attacker was not made for.

    Args:
        x: (B, C, H, W).
        shape: (C, H, W) of those that it learned from.

    Raises:
        InputError: another shape.
    """
    if tuple(x.shape[1:]) != tuple(shape):
        raise InputError(f"this attacker is for images of {tuple(shape)}, not {tuple(x.shape[1:])}")


def check_indices(actions: Tensor, sizes: Sequence[int]) -> None:
    """Refuse what is not one index per row and list of choices.

    Args:
        actions: (B, lists), integers.
        sizes: length n of every list.

    Raises:
        InputError: wrong shape or type, or an index outside 0..n-1.
    """
    integral = not actions.is_floating_point() and actions.dtype != torch.bool
    if actions.dim() != 2 or actions.shape[1] != len(sizes) or not integral:
        raise InputError(
            f"actions must be integer indices (B, {len(sizes)}), not "
            f"{tuple(actions.shape)} of {actions.dtype}"
        )
    limit = torch.tensor(sizes, device=actions.device)
    if not bool(((actions >= 0) & (actions < limit)).all()):
        raise InputError(f"actions must lie in 0..n-1 with n = {sizes} per column")


def check_images(x: Tensor) -> None:
    """Refuse what is not a batch of images in [0, 1].

    Args:
        x: (B, C, H, W), floating point.

    Raises:
        InputError: wrong type, shape, range, or not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4 or x.numel() == 0:
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"images must be a non-empty float tensor (B, C, H, W), not {got}")
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if math.isnan(low) or math.isnan(high):
        raise InputError("images contain NaN: clean the data before attacking or training on it")
    if low < 0 or high > 1:
        raise InputError(
            f"images must lie in [0, 1], not [{low:.4g}, {high:.4g}]: "
            "rescale them, and put any normalisation inside the classifier"
        )


def check_labels(y: Tensor, batch: int, classes: int | None = None) -> None:
    """Refuse what is not one class index per image.

    Args:
        y: (B,) integer labels.
        batch: B, the number of images.
        classes: number of classes K, when it is known.

    Raises:
        InputError: wrong type, shape, or a label outside 0..K-1.
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError("labels must be an integer tensor (B,)")
    if y.shape != (batch,):
        raise InputError(f"labels must have shape ({batch},), one per image, not {tuple(y.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or (classes is not None and high >= classes):
        raise InputError(
            f"labels must lie in 0..{'K-1' if classes is None else classes - 1}, "
            f"found {low if low < 0 else high}"
        )


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether every row (B, K) lies in [0, 1] and sums to one, as softmax outputs do.

    Up to the rounding of the precision that they were computed in, which full-precision numbers
    tell, too: those of bf16 and fp16 have no further digits.
    """
    rows, slack = logits.detach().float(), 1e-4
    for dtype, rounding in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        if torch.equal(rows.to(dtype).float(), rows):
            slack = max(slack, rounding)
    inside = bool(((rows >= 0) & (rows <= 1)).all())
    return inside and bool(((rows.sum(1) - 1).abs() < slack).all())


def check_logits(logits: Tensor, y: Tensor) -> int:
    """Refuse classifier outputs that an attack on logits cannot use.

    Args:
        logits: (B, K) classifier outputs.
        y: (B,) labels.

    Returns:
        K, the number of classes.

    Raises:
        InputError: wrong shape, numbers that are not finite, softmax outputs, or labels outside the
            K classes.
    """
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the classifier must return logits (B, K), not a {type(logits).__name__}: "
            "wrap it in a module that returns the logits alone"
        )
    if not logits.is_floating_point() or logits.layout != torch.strided or logits.is_meta:
        raise InputError(
            f"logits must be dense floating-point numbers, not {logits.dtype} ({logits.layout}, "
            f"{logits.device.type})"
        )
    if logits.dim() != 2 or logits.shape[0] != y.shape[0]:
        raise InputError(
            f"the classifier must map (B, C, H, W) to logits (B, K), not {tuple(logits.shape)}"
        )
    masked = logits.isneginf()
    if not bool((logits.isfinite() | masked).all()) or bool(masked.all(1).any()):
        raise InputError("the classifier returns NaN or infinite logits: its weights are broken")
    if bool(masked.any()):
        raise InputError(
            f"the classifier gives class {int(masked.any(0).nonzero()[0])} a logit of -inf, as a "
            "mask does: attacks compare logits by their differences, so mask with a finite number, "
            "e.g. logits.masked_fill(mask, -1e4)"
        )
    classes = int(logits.shape[1])
    if classes < 2:
        raise InputError("the classifier has one class only: there is nothing to take it for")
    check_labels(y, logits.shape[0])
    if int(y.max()) >= classes:
        raise InputError(
            f"the classifier has {classes} outputs, so that labels must lie in 0..{classes - 1}, "
            f"found {int(y.max())}"
        )
    if looks_like_probabilities(logits):
        raise InputError(
            "the classifier returns probabilities: return logits (remove the final softmax), "
            "since saturated softmax hides gradients and fakes robustness"
        )
    return classes

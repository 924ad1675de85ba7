"""Checks of what users hand in: images, labels, logits and numbers typed as text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from advgame.errors import InputError


def check_types(kind: type, values: Mapping[str, Any], where: object) -> None:
    """Refuse values that are not of the types of a settings class.

    Args:
        kind: the settings class.
        values: some of its fields, by name.
        where: whose they are, for the message.

    Raises:
        InputError: which value, and what it should be.
    """
    hints, every = get_type_hints(kind), CollectionCheckStrategy.ALL_ITEMS
    for name, value in values.items():
        try:
            check_type(value, hints[name], collection_check_strategy=every)
        except TypeCheckError as error:
            raise InputError(f"{where}: {name} cannot be {value!r} ({error})") from error


def refuse_idle(config: object, usual: object, idle: Mapping[str, Collection[str]]) -> None:
    """Refuse options that change nothing, where they differ from what is usual.

    Args:
        config: all settings.
        usual: the same with nothing asked for.
        idle: why -> options, e.g. ``{"--agent ppo": ["baseline"]}``.

    Raises:
        InputError: the first of them.
    """
    for why, names in idle.items():
        for name in names:
            if getattr(config, name) != getattr(usual, name):
                word = f"--{name.replace('_', '-')}"
                raise InputError(f"{why} makes no use of {word}: leave it away")


def parse_number(text: str | float, name: str = "value") -> float:
    """A finite number typed as ``"0.15"`` or as a fraction ``"8/255"``.

    Raises:
        InputError: not a number, a zero denominator, or not finite.
    """
    parts = str(text).split("/")
    try:
        value = float(parts[0]) if len(parts) == 1 else float(parts[0]) / float(parts[1])
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if len(parts) > 2 or not math.isfinite(value):
        raise InputError(f"{name} must be a number such as 0.15 or 8/255, not {text!r}")
    return value


def parse_eps(text: str | float) -> float:
    """The radius ε of a threat model, in [0, 1] pixel units.

    Raises:
        InputError: not a number, not finite, or not above 0.
    """
    eps = parse_number(text, "eps")
    if eps <= 0:
        raise InputError(f"eps must be above 0, not {text!r}")
    return eps


def parse_linf_eps(text: str | float) -> float:
    """The radius of an L∞ ball as a person types it; 1 and above are levels of 255, not pixels.

    Raises:
        InputError: as `parse_eps`, or 1 and above, which holds every image.
    """
    eps = parse_eps(text)
    if eps >= 1:
        raise InputError(f"eps is in [0, 1] pixels: did you mean {text}/255?")
    return eps


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

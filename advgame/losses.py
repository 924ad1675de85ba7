"""Losses per image, (B, K) logits and (B,) labels -> (B,), always computed in at least fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from advgame.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def full_precision(values: Tensor) -> Tensor:
    """The values in fp64 if they are, in fp32 otherwise."""
    return values if values.dtype == torch.float64 else values.float()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy -log softmax(logits)[y] per image: (B, K) and (B,) -> (B,)."""
    return F.cross_entropy(full_precision(logits), y.long(), reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Max over other classes minus the true class, (B,): above 0 where misclassified.

    Source: Carlini & Wagner's f6 with κ = ∞ and the sign that an attack maximises.
    """
    logits, rows = full_precision(logits), y.long()[:, None]
    true = logits.gather(1, rows)[:, 0]
    other = logits.scatter(1, rows, -torch.inf).amax(1)
    return other - true


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the answers are another class than the label, or no class: (…, K) and (…) -> (…).

    An answer whose largest logit is NaN or infinite is no class, as in
    `advgame.evaluation.predict`: comparing `argmax` takes a row of NaN for class 0.
    """
    best = logits.max(-1)
    return (best.indices != y) | ~best.values.isfinite()


def clipped_margin(logits: Tensor, y: Tensor, kappa: float) -> Tensor:
    """`margin` up to κ, beyond which nothing is gained, (B,).

    Source: Carlini & Wagner 2017, f6 with confidence κ and the sign that an attack maximises.
    """
    return margin(logits, y).clamp_max(kappa)


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """KL( softmax(clean) ‖ softmax(logits) ) of two (B, K), (B,); differentiable in both.

    Source: Zhang et al. 2019 (TRADES).
    """
    # in logarithms throughout: the derivative of p log p is infinite where p has underflowed
    p = F.log_softmax(full_precision(clean), 1)
    q = F.log_softmax(full_precision(logits), 1)
    return (p.exp() * (p - q)).sum(1)


def divergence_from(clean: Tensor) -> Loss:
    """`divergence` from known clean logits (B, K), as the loss of an attack.

    What the attack takes for labels are the images' row numbers in ``clean``, so that images may
    leave the batch early.
    """
    return lambda logits, rows: divergence(clean[rows], logits)


def boosted_cross_entropy(logits: Tensor, y: Tensor, fit: Loss = cross_entropy) -> Tensor:
    """``fit``(logits, y) - log(1 - the largest probability of another class), (B,).

    Source: Wang et al. 2020 (MART), eq. 7 ("BCE"), with the constants of the published code.
    """
    p = F.softmax(full_precision(logits), 1)
    other = p.scatter(1, y.long()[:, None], -1.0).amax(1)
    return fit(logits, y) - torch.log(1.0001 - other + 1e-12)


def check_smoothing(true_probability: float, classes: int) -> None:
    """Refuse a probability of the true class outside [1/K, 1].

    Raises:
        InputError: it is outside.
    """
    if not 1 / classes <= true_probability <= 1:
        raise InputError(
            f"label smoothing keeps a probability in [1/{classes}, 1] on the true class, "
            f"not {true_probability}"
        )


def smoothed_cross_entropy(logits: Tensor, y: Tensor, true_probability: float) -> Tensor:
    """Cross-entropy to a target with ``true_probability`` f on y and (1-f)/(K-1) elsewhere, (B,).

    LAS-AT's label smoothing (its "factor"); f = 0.7 with ten classes is torch's
    ``label_smoothing`` of K(1-f)/(K-1) = 1/3, and f = 1 is plain cross-entropy.

    Raises:
        InputError: f outside [1/K, 1].
    """
    classes = logits.shape[1]
    check_smoothing(true_probability, classes)
    smoothing = classes * (1 - true_probability) / (classes - 1)
    return F.cross_entropy(
        full_precision(logits), y.long(), reduction="none", label_smoothing=smoothing
    )


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (B,): `margin` over the gap from the first to the third logit.

    It does not change when the logits are shifted or scaled. Two classes have no third logit:
    there it is the margin over the gap of the two, -1 or 1, whose gradient is useless, so the
    margin itself is returned.

    Source: Croce & Hein 2020 (AutoAttack), eq. 6, with its sign: what an attack maximises.
    """
    difference = margin(logits, y)
    if logits.shape[1] < 3:
        return difference
    top = full_precision(logits).topk(3, dim=1).values
    return difference / (top[:, 0] - top[:, 2] + 1e-12)

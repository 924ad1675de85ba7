"""Tests of a classifier for masked gradients and other defects, which the flags run.

A probe returns name -> meaning of what it saw. It compares counts of images by a test, or sizes by
a wide margin: an honest classifier, plain or robust, must pass all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advgame.attacks import Attack, input_gradient, pgd
from advgame.checks import looks_like_probabilities
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.verdicts import withstand
from advgame.losses import Loss, cross_entropy, margin, misclassified
from advgame.seeding import stream
from advgame.statistics import beats
from advgame.threat import Threat

_QUERIES = 300
_STEP = 1 / 255  # the smallest change that an image file can hold


class _Differentiates(TorchFunctionMode):
    """Notices whether a forward pass of the classifier calls autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def outputs(model: nn.Module, data: ImageSet) -> dict[str, str]:
    """Randomness, dependence on the batch, probabilities, constants, gradients inside."""
    images, found = data.floats(), {}
    with torch.no_grad(), _Differentiates() as inside:
        passes = [model(images) for _ in range(5)]
        # of one image there is one half: not every classifier takes no images
        halves = torch.cat([model(half) for half in (images[0::2], images[1::2]) if len(half)])
    whole = torch.cat([passes[0][0::2], passes[0][1::2]])
    scale = float(passes[0].abs().max().clamp_min(1))
    if any(float((one - passes[0]).abs().max()) > 1e-4 for one in passes[1:]):
        found["randomised_output"] = (
            "repeated passes differ: use autoattack-rand and eot-pgd20, which average over chance"
        )
    elif float((whole - halves).abs().max()) > 1e-3 * scale:
        found["batch_dependent"] = (
            "an image's logits depend on the other images in its batch (batch statistics in "
            "evaluation mode?): attacks regroup images, so that numbers mean nothing"
        )
    if looks_like_probabilities(passes[0]):
        found["softmax_output"] = "outputs are probabilities, not logits"
    if inside.seen:
        found["gradient_inside"] = (
            "the classifier itself computes gradients in its forward pass: attacks through it "
            "are unreliable"
        )
    same = float((passes[0] - passes[0][:1]).abs().max()) == 0
    if same and bool((images != images[:1]).any()):
        found["constant_output"] = "every image has the same logits: the input is ignored"
    said = passes[0].argmax(1).unique()
    if len(said) == 1 and len(data.labels.unique()) > 1:
        found["constant_class"] = (
            f"every image is given class {int(said)}: the accuracy is the share of that class, and "
            "no attack moves it"
        )
    return found


def gradients(model: nn.Module, data: ImageSet, seed: int) -> dict[str, str]:
    """Zero, random or non-finite gradients, and gradients that do not say what a step does."""
    found = {}
    loss, logits = _input_gradients(model, data, cross_entropy)
    # the margin is linear in the logits, so that its rounding is harmless
    once, again = (_input_gradients(model, data, margin)[0] for _ in range(2))
    if not bool(torch.isfinite(torch.cat([logits, loss], 1)).all()):
        found["non_finite"] = "logits or gradients are NaN or infinite"
    zero = float((~(loss.abs().amax(1) > 0)).float().mean())
    if zero > 0.05:
        found["zero_gradients"] = f"{zero:.0%} of the images have an input gradient of exactly zero"
    moves = once.abs().amax(1) > 0
    if bool((_cosine(once, again)[moves] < 0.9).any()):
        found["randomised_gradient"] = "two gradients at the same image differ"
    kept = _predicted(model, data, once, seed)[moves]
    if len(kept) and (float(kept.median()) < 0.7 or float((kept < 0.5).float().mean()) > 0.15):
        found["gradient_does_not_predict"] = (
            f"what small random steps do and what the gradient says of them agree by a cosine of "
            f"{float(kept.median()):.2f} (median; 1 is right): it is shattered or false"
        )
    return found


def _input_gradients(model: nn.Module, data: ImageSet, loss: Loss) -> tuple[Tensor, Tensor]:
    """Input gradients (N, C·H·W) of a loss per image, and the logits (N, K)."""
    images = data.floats().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        gradient = input_gradient(loss(logits, data.labels).sum(), images)
    return gradient.flatten(1), logits.detach()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of rows, (N,); scaled first, since confident networks' gradients are tiny; NaN is 0."""
    a, b = (v / v.abs().amax(1, keepdim=True) for v in (a, b))
    return F.cosine_similarity(a, b).nan_to_num()


def _predicted(model: nn.Module, data: ImageSet, gradient: Tensor, seed: int) -> Tensor:
    """Cosine between what 32 random steps gain and what the gradient promises, (N,)."""
    images, rng = data.floats(), stream(seed, "steps", data.images.device)
    gained, promised = [], []
    for _ in range(32):
        v = random_signs(images, rng)
        with torch.no_grad():
            up, down = (margin(model(images + s * _STEP * v), data.labels) for s in (1, -1))
        gained.append((up - down) / (2 * _STEP))
        promised.append((gradient * v.flatten(1)).sum(1))
    return _cosine(torch.stack(gained, 1), torch.stack(promised, 1))


def random_signs(like: Tensor, rng: torch.Generator) -> Tensor:
    """-1 or 1 for each pixel, in the shape and the type of the images."""
    return torch.randint(0, 2, like.shape, generator=rng, device=like.device).to(like) * 2 - 1


def _survive(model: nn.Module, data: ImageSet, attack: Attack, seed: int) -> tuple[Tensor, Tensor]:
    """Which images stay right, (N,), and the loss reached, (N,)."""
    images, rng = data.floats(), stream(seed, "flags", data.images.device)
    x_adv = attack.run(model, images, data.labels, rng=rng, check=False).x_adv
    with torch.no_grad():
        logits = model(x_adv)
    return ~misclassified(logits, data.labels), cross_entropy(logits, data.labels)


def loss_growth(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> dict[str, str]:
    """More ε and more steps must not lose loss, and a ball of every grey must fool everything."""
    found = {}
    _, small = _survive(model, data, pgd(threat.scaled(0.5), 10), seed)
    _, few = _survive(model, data, pgd(threat, 10), seed)
    _, many = _survive(model, data, pgd(threat, 50), seed)
    if float(few.mean()) < float(small.mean()) - 1e-3:
        found["loss_falls_with_eps"] = "PGD-10 reaches less loss at ε than at ε/2"
    if float(many.mean()) < 0.98 * float(few.mean()) - 1e-3:
        found["loss_falls_with_steps"] = "PGD-50 reaches less loss than PGD-10"
    whole = type(threat)(threat.whole(data.images[0].numel()))
    right, _ = _survive(model, data, pgd(whole, 100), seed)
    clean = withstand(model, data)
    if int((right & clean).sum()) > 0.1 * int(clean.sum()):
        found["unbounded_attack_fails"] = (
            f"{float((right & clean).float().mean()):.0%} survive PGD-100 without a bound: "
            "the gradients do not lead anywhere"
        )
    return found


def _rescaled(logits: Tensor, y: Tensor, by: float) -> Tensor:
    return cross_entropy(logits * by, y)


def stronger_attacks(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> dict[str, str]:
    """Attacks that should not beat PGD on cross-entropy: on the margin, and without gradients."""
    found = {}
    usual, _ = _survive(model, data, pgd(threat, 20), seed)
    by_margin, _ = _survive(model, data, replace(pgd(threat, 20), loss=margin), seed)
    with torch.no_grad():
        logits = model(data.floats())
        gaps, spread = margin(logits, data.labels), float(logits.float().std(1).mean())
    # logits that were made small, as by a temperature, are tried at a trained network's size, too
    scales = (1.0, 10.0) if 0 < spread < 1 else (1.0,) if 0 < spread < math.inf else ()
    for scale in scales:
        loss = partial(_rescaled, by=scale / spread)
        by_scale, _ = _survive(model, data, replace(pgd(threat, 20), loss=loss), seed)
        if beats(by_scale, usual):
            more = int((usual & ~by_scale).sum()) - int((by_scale & ~usual).sum())
            found["logit_scale"] = (
                f"PGD on logits of spread {scale:g} breaks {more} more of {len(data)} images than "
                f"PGD on the logits, whose spread is {spread:.2g}: cross-entropy is blind there"
            )
    gap = float((usual & ~by_margin).float().mean())
    # tiny logits flatten cross-entropy too; a linear classifier's gap can honestly reach 0.18
    least = 0.1 if float(gaps.abs().median()) < 0.1 else 0.2
    if gap > least and beats(by_margin, usual):
        found["saturated_loss"] = (
            f"the margin as loss breaks {gap:.0%} of the images that cross-entropy leaves: "
            "cross-entropy is a poor guide at this scale of the logits"
        )
    square = AutoAttackPart(threat, "square", seed=seed, square_queries=_QUERIES)
    try:
        square.check_task(data.classes, data.shape)
    except InputError:  # images too small for it
        return found
    searched, _ = _survive(model, data, square, seed)
    gap = float((usual & by_margin & ~searched).float().mean())
    if gap > 0.03 and beats(searched, usual & by_margin):
        found["black_box_beats_white_box"] = (
            f"Square with {_QUERIES} queries breaks more images than PGD-20 on two losses: "
            "gradients are masked"
        )
    return found

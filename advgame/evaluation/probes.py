"""What the flags try on a classifier: each probe returns name -> meaning of what it saw.

A probe compares counts of images by a test, or sizes by a wide margin: an honest classifier, plain
or robust, must pass all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advgame.attacks import Attack, pgd
from advgame.checks import looks_like_probabilities
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.verdicts import predict
from advgame.losses import cross_entropy, margin
from advgame.seeding import stream
from advgame.statistics import beats
from advgame.threat import Threat

_QUERIES = 300
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def handed_in(model: nn.Module) -> dict[str, str]:
    """The mode that the classifier came in; all attacks set the evaluation mode themselves."""
    if any(isinstance(module, _MODAL) and module.training for module in model.modules()):
        return {
            "training_mode": "the classifier came in training mode, where batch norm and dropout "
            "make it another function: it was evaluated in evaluation mode"
        }
    return {}


class _Differentiates(TorchFunctionMode):
    """Notices calls of autograd."""

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
        halves = torch.cat([model(images[0::2]), model(images[1::2])])
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
    if len(data) > 1 and float((passes[0] - passes[0][:1]).abs().max()) == 0:
        found["constant_output"] = "every image has the same logits: the input is ignored"
    return found


def gradients(model: nn.Module, data: ImageSet) -> dict[str, str]:
    """Zero gradients, and gradients that do not predict what a small step does."""
    images, found = data.floats().requires_grad_(), {}
    with torch.enable_grad():
        logits = model(images)
    zero = float(_zeros(cross_entropy(logits, data.labels), images).float().mean())
    if zero > 0.05:
        found["zero_gradients"] = f"{zero:.0%} of the images have an input gradient of exactly zero"
    # the margin is linear in the logits, so that its rounding is harmless
    with torch.enable_grad():
        gap = margin(model(images), data.labels)
    slope = _gradient(gap, images)
    step = 1 / 255  # the smallest change that an image file can hold
    moved = images.detach() + step * slope.sign()
    with torch.no_grad():
        gain = margin(model(moved), data.labels) - gap.detach()
    promised = step * slope.abs().flatten(1).sum(1)
    kept = gain / promised.clamp_min(1e-12)
    if float(kept.median()) < 0.3 and float(promised.median()) > 1e-5:
        found["gradient_does_not_predict"] = (
            f"a step of 1/255 along the gradient gains {float(kept.median()):.0%} of what the "
            "gradient promises: it is shattered"
        )
    return found


def _gradient(loss: Tensor, images: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(images)
    (grad,) = torch.autograd.grad(loss.sum(), images, allow_unused=True)
    return torch.zeros_like(images) if grad is None else grad


def _zeros(loss: Tensor, images: Tensor) -> Tensor:
    return _gradient(loss, images).flatten(1).abs().amax(1) == 0


def _survive(model: nn.Module, data: ImageSet, attack: Attack, seed: int) -> tuple[Tensor, Tensor]:
    """Which images stay right, (N,), and the loss reached, (N,)."""
    images, rng = data.floats(), stream(seed, "flags", data.images.device)
    x_adv = attack.run(model, images, data.labels, rng=rng, check=False).x_adv
    with torch.no_grad():
        logits = model(x_adv)
    return logits.argmax(1) == data.labels, cross_entropy(logits, data.labels)


def growth(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> dict[str, str]:
    """More ε and more steps must not lose loss, and a ball of every grey must fool everything."""
    found = {}
    _, small = _survive(model, data, pgd(threat.scaled(0.5), 10), seed)
    _, few = _survive(model, data, pgd(threat, 10), seed)
    _, many = _survive(model, data, pgd(threat, 50), seed)
    if float(few.mean()) < float(small.mean()) - 1e-3:
        found["loss_falls_with_eps"] = "PGD-10 reaches less loss at ε than at ε/2"
    if float(many.mean()) < 0.98 * float(few.mean()) - 1e-3:
        found["loss_falls_with_steps"] = "PGD-50 reaches less loss than PGD-10"
    whole = type(threat)(1.0 if threat.norm == "Linf" else float(data.images[0].numel()) ** 0.5)
    right, _ = _survive(model, data, pgd(whole, 100), seed)
    clean = predict(model, data.floats()) == data.labels
    if int((right & clean).sum()) > 0.1 * int(clean.sum()):
        found["unbounded_attack_fails"] = (
            f"{float((right & clean).float().mean()):.0%} survive PGD-100 without a bound: "
            "the gradients do not lead anywhere"
        )
    return found


def rivals(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> dict[str, str]:
    """Attacks that should not beat PGD on cross-entropy: on the margin, and without gradients."""
    found = {}
    usual, _ = _survive(model, data, pgd(threat, 20), seed)
    by_margin, _ = _survive(model, data, replace(pgd(threat, 20), loss=margin), seed)
    gap = float((usual & ~by_margin).float().mean())
    if gap > 0.1 and beats(by_margin, usual):
        found["saturated_loss"] = (
            f"the margin as loss breaks {gap:.0%} of the images that cross-entropy leaves: the "
            "logits saturate it"
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

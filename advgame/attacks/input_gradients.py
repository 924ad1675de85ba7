"""Input gradients of a classifier: formed here for every attack, and made finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from advgame.attacks.boundary import attacked
from advgame.checks import check_logits
from advgame.choices import BatchNormMode
from advgame.losses import Loss, cross_entropy
from advgame.threat import per_image


def input_gradient(
    total: Tensor, *leaves: Tensor, create_graph: bool = False, retain_graph: bool = False
) -> Tensor:
    """d(total)/d(leaf); zero where the classifier cuts the graph, which the flags then report.

    Args:
        total: a number, usually the sum of losses per image.
        leaves: images (B, C, H, W) that ``total`` was computed from; the gradients of several
            batches follow each other as rows.
        create_graph: keep what differentiating the gradient itself needs.
        retain_graph: keep the graph, for another number's gradient.
    """
    if not total.requires_grad:
        found = tuple(torch.zeros_like(leaf) for leaf in leaves)
    else:
        found = torch.autograd.grad(
            total,
            leaves,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return found[0] if len(found) == 1 else torch.cat(found)


def finite(grad: Tensor) -> Tensor:
    """A gradient of which a norm, a sum or a product may be taken.

    One infinite entry makes a norm infinite and all other entries 0, one NaN makes everything
    NaN. What is infinite becomes the largest finite size among its image's entries (1 where there
    is none), with its sign; NaN points nowhere and becomes 0.

    Args:
        grad: (B, ...).
    """
    # a sum with one such entry is not finite; on a CPU asking costs less than mending
    if grad.device.type == "cpu" and math.isfinite(grad.sum().item()):
        return grad
    bounded = torch.where(grad.isfinite(), grad, 0.0)
    largest = per_image(bounded.abs().flatten(1).amax(1), grad)
    largest = torch.where(largest > 0, largest, 1.0)
    # sign(NaN) is 0
    return torch.where(grad.isfinite(), grad, grad.sign() * largest)


class InputGradient:
    """∇ₓ loss(f(x), y) of one classifier on one batch, for attackers that ask for it as they go.

    It is a constant to whoever uses it. The gradient at the clean images is formed once, however
    often it is asked for: while θ stays as it is, so does the gradient.

    Args:
        model: the classifier; it is as it was after every call.
        x: (B, C, H, W) clean images; passes are made in their precision.
        y: (B,) labels.
        loss: whose gradient, summed over images: an image's own does not depend on the others'.
        mode: batch norm and dropout of these passes.
        restore_buffers: False lets passes in training mode move the running statistics.
        check: look at the first logits, and refuse those that cannot be attacked.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        mode: BatchNormMode = "eval",
        restore_buffers: bool = True,
        check: bool = False,
    ) -> None:
        self.model, self.x, self.y, self.loss = model, x, y, loss
        self.mode, self.restore_buffers, self._check = mode, restore_buffers, check
        self.calls = 0
        """Forwards, and input-backwards, of the batch so far."""
        self.clean_losses: Tensor | None = None
        """(B,) at the clean images, once their gradient was asked for."""
        self._clean: Tensor | None = None

    def at_clean(self) -> Tensor:
        """The gradient at the clean images (B, C, H, W).

        Raises:
            InputError: with ``check``, logits that cannot be attacked.
        """
        if self._clean is None:
            self._clean, self.clean_losses = self.and_losses(self.x)
        return self._clean

    def __call__(self, points: Tensor) -> Tensor:
        """The gradient at ``points`` (B, C, H, W), detached from whatever they depend on."""
        return self.and_losses(points)[0]

    def and_losses(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient at ``points``, and the losses (B,) there."""
        # a gradient in half precision would lose what an attack lives on
        full = torch.float64 if points.dtype == torch.float64 else torch.float32
        leaf = points.detach().to(full).requires_grad_()
        keep = self.restore_buffers
        held = attacked(self.model, self.mode, restore_buffers=keep, one_pass=True)
        with held, torch.enable_grad():
            logits = self.model(leaf.to(self.x.dtype))
            if self._check:
                check_logits(logits, self.y)
                self._check = False
            losses = self.loss(logits, self.y)
            grad = finite(input_gradient(losses.sum(), leaf))
        self.calls += 1
        return grad, losses.detach()

"""The input gradient of a classifier, for attackers that are networks and ask for it as they go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advgame.attacks.gradient import finite, input_gradient
from advgame.attacks.modes import BatchNormMode, attacked
from advgame.checks import check_logits
from advgame.losses import Loss, cross_entropy


class Slope:
    """∇ₓ loss(f(x), y) of one classifier on one batch, a constant to whoever uses it.

    The gradient at the clean images is formed once, however often it is asked for: while θ stays
    as it is, so does the gradient.

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
            self._clean, self.clean_losses = self._form(self.x)
        return self._clean

    def __call__(self, points: Tensor) -> Tensor:
        """The gradient at ``points`` (B, C, H, W), detached from whatever they depend on."""
        return self._form(points)[0]

    def _form(self, points: Tensor) -> tuple[Tensor, Tensor]:
        # a gradient in half precision would lose what an attack lives on
        full = torch.float64 if points.dtype == torch.float64 else torch.float32
        leaf = points.detach().to(full).requires_grad_()
        with (
            attacked(self.model, self.mode, restore_buffers=self.restore_buffers),
            torch.enable_grad(),
        ):
            logits = self.model(leaf.to(self.x.dtype))
            if self._check:
                check_logits(logits, self.y)
                self._check = False
            losses = self.loss(logits, self.y)
            grad = finite(input_gradient(losses.sum(), leaf))
        self.calls += 1
        return grad, losses.detach()

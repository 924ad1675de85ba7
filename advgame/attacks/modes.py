"""Attacking never changes the model: one context manager sets its mode and puts everything back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

BatchNormMode = Literal["eval", "train"]


@contextlib.contextmanager
def attacked(
    model: nn.Module, mode: BatchNormMode = "eval", *, restore_buffers: bool = True
) -> Iterator[None]:
    """Freeze ``model`` while it is attacked, then restore it bit for bit.

    Every module's training flag, every parameter's ``requires_grad`` and ``.grad`` and every
    buffer are afterwards as before. Frozen parameters keep autograd from storing what only
    weight gradients need, so that an attack step costs one forward and one input-backward.

    Args:
        model: any classifier.
        mode: ``"eval"`` uses batch norm's running statistics, ``"train"`` the batch's own (and
            turns dropout on); the running statistics are restored in either case.
        restore_buffers: False lets passes in training mode move the running statistics, as some
            published code does.
    """
    modes = [(module, module.training) for module in model.modules()]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    buffers = list(model.buffers()) if restore_buffers else []
    saved = [buffer.detach().clone() for buffer in buffers]
    model.train(mode == "train")
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, saved)

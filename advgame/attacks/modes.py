"""Attacking never changes the model: one context manager sets its mode and puts everything back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from advgame.classifiers.foreign import set_mode
from advgame.errors import InputError

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

    Raises:
        InputError: weights that were made under ``torch.inference_mode()``, which autograd refuses.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "the classifier's weights were made under torch.inference_mode(), where no gradient "
            "can pass: make or load it outside of that mode"
        )
    # a frozen script has no mode
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    buffers = _Buffers(model) if restore_buffers else None
    set_mode(model, training=mode == "train")
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if buffers is not None:
            buffers.restore()


class _Buffers:
    """All buffers of a model, to be put back whether a forward wrote into them or replaced them."""

    def __init__(self, model: nn.Module) -> None:
        # a script's dictionaries are views that cannot be put back: its tensors are written into
        self.places = [
            (module, dict(module._buffers))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        scripts = [one for one in model.modules() if isinstance(one, torch.jit.ScriptModule)]
        named = [one for _, own in self.places for one in own.values() if one is not None]
        named += [buffer for script in scripts for buffer in script.buffers()]
        self.tensors = list(dict.fromkeys(named))  # some may be shared
        self.values = [tensor.detach().clone() for tensor in self.tensors]

    def restore(self) -> None:
        for module, own in self.places:
            now = module._buffers
            if now.keys() != own.keys() or any(now[name] is not own[name] for name in own):
                now.clear()
                now.update(own)
        if self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.values)

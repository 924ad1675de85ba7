"""Copies, freezes and saves other people's modules, and says in words where that fails."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from advgame.errors import InputError

_POWER_ITERATIONS = 30


@contextlib.contextmanager
def copying(module: nn.Module, purpose: str) -> Iterator[None]:
    """Within the block ``module`` is copied by `copy.deepcopy`.

    Args:
        module: the original.
        purpose: what needs the copy, for the message.

    Raises:
        InputError: which attribute cannot be copied.
    """
    try:
        yield
    except Exception as error:  # a stranger's attribute may raise anything
        place, found = next(_uncopyable(module), ("", error))
        reason = str(found).split("\n")[0].split(".  ")[0] or type(found).__name__
        raise InputError(
            f"{purpose}, and this {type(module).__name__} cannot be copied{place}: {reason}; make "
            "what it holds anew in forward, detach it, or give its module a __deepcopy__"
        ) from error


def _uncopyable(module: nn.Module) -> Iterator[tuple[str, Exception]]:
    """Attributes that deepcopy refuses, and why."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            inner = value if name in ("_parameters", "_buffers") else {name: value}
            for attribute, held in {} if name == "_modules" else inner.items():
                try:
                    copy.deepcopy(held)
                except Exception as error:
                    yield f" (its {'.'.join(filter(None, (path, attribute)))})", error


def frozen_copy(module: nn.Module, purpose: str) -> nn.Module:
    """A copy in evaluation mode, as far as it has modes, without weight gradients.

    Raises:
        InputError: a module that cannot be copied.
    """
    with copying(module, purpose):
        twin = copy.deepcopy(module)
    set_mode(twin, training=False)
    for parameter in twin.parameters():
        parameter.detach_().requires_grad_(False)  # a script's copies are no leaves
    return twin


def set_mode(module: nn.Module, *, training: bool) -> None:
    """Training or evaluation mode; an exported graph has the one that it was exported in.

    Raises:
        InputError: training mode of an exported graph, or a module whose ``train`` fails.
    """
    try:
        module.train(training)
    except Exception as error:  # a stranger's method may raise anything
        exported = any(isinstance(part, torch.fx.GraphModule) for part in module.modules())
        if training or not exported:
            mode = "training" if training else "evaluation"
            raise InputError(
                f"this {type(module).__name__} cannot be put into {mode} mode ({error}): hand in a "
                "module whose train() works; of an exported graph the one that it was made from"
            ) from error
        for part in module.modules():
            part.training = False


@torch.no_grad()
def settle_spectral_norms(module: nn.Module) -> None:
    """Give spectral normalisation the singular vectors of the weights that are there now.

    A moving average has averages of unit vectors, which are shorter: σ would be too small, and the
    weights W / σ too large.
    """
    for part in module.modules():
        if isinstance(part, ParametrizationList):
            _settle(part)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):  # of torch.nn.utils.spectral_norm
                for _ in range(_POWER_ITERATIONS):
                    hook.compute_weight(part, do_power_iteration=True)


def _settle(chain: ParametrizationList) -> None:
    norms = [one for one in chain if isinstance(one, _SpectralNorm)]
    before = [one.training for one in norms]
    for one in norms:
        one.training = True  # in which each pass is a power iteration
    for _ in range(_POWER_ITERATIONS if norms else 0):
        chain()
    for one, mode in zip(norms, before, strict=True):
        one.training = mode


def weights(module: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a module: its parameters and buffers, contiguous, none shared.

    Raises:
        InputError: a state that safetensors cannot hold.
    """
    held: dict[str, Tensor] = {}
    places = set[int]()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(_unsaved(module, name, f"it is a {type(value).__name__}, no tensor"))
        try:
            own = value.detach().contiguous()
            place = own.untyped_storage().data_ptr()
            held[name] = own.clone() if place in places else own
            places.add(place)
            safetensors.torch.save({name: held[name].flatten()[:1].clone()})
        except Exception as error:  # sparse, quantised and what else there may be
            raise InputError(_unsaved(module, name, str(error).splitlines()[0])) from error
    return held


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's parameters and buffers, in hexadecimal digits.

    Raises:
        InputError: see `weights`.
    """
    return hashlib.sha256(safetensors.torch.save(weights(module))).hexdigest()


def built_as(module: nn.Module) -> str:
    """How a network can be built again, as far as it tells: what ``--model`` takes, or its class.

    A built-in name of one that `advgame.classifiers.make_classifier` made, ``module:Class`` of
    somebody's own, and for torch's, which say nothing, their class alone.
    """
    name = getattr(module, "built_as", None)
    if isinstance(name, str):
        return name
    kind, home = type(module), type(module).__module__
    if home == "__main__":
        home = Path(getattr(sys.modules[home], "__file__", "__main__")).stem
    if home.partition(".")[0] == "torch":
        return f"torch.nn.{kind.__name__}"
    return f"{home}:{kind.__qualname__}"


def _unsaved(module: nn.Module, name: str, reason: str) -> str:
    return (
        f"the weights of this {type(module).__name__} cannot be saved as safetensors: {name} "
        f"({reason}); keep plain dense tensors in its state_dict"
    )


def check_savable(module: nn.Module) -> None:
    """Refuse, before any training, a module whose weights cannot be saved and loaded back.

    Raises:
        InputError: what cannot be.
    """
    state = weights(module)
    try:
        with torch.no_grad():
            module.load_state_dict(state)
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(
            f"this {type(module).__name__} does not take its own state_dict back: {reason}"
        ) from error

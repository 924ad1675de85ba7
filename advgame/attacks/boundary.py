"""The context of an attack: sets the model's mode, and leaves model, images and autograd alone."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from advgame.attacks.folding import folded
from advgame.choices import BatchNormMode
from advgame.classifiers.foreign import set_mode
from advgame.errors import InputError
from advgame.losses import full_precision

CallT = TypeVar("CallT", bound=Callable[..., Any])


def at_boundary(call: CallT) -> CallT:
    """Decorate a method (self, model, x, y, ...) that attacks: the caller's context is left.

    Inside there is no inference mode, whatever the caller is in: an attack that forms gradients
    would find none there and return the clean images. Images and labels made in that mode are
    copied; images in another memory layout become contiguous, once, and integer labels int64. With
    ``check`` a classifier that changes the images in place is refused, and it is a copy that it has
    changed.

    A classifier whose weights are all of one precision is given images in it, and the attack's own
    arithmetic is at least fp32; images and classifier of mixed precisions are taken as they are.
    """

    @functools.wraps(call)
    def entered(self: Any, model: nn.Module, x: Tensor, y: Tensor, *args: Any, **more: Any) -> Any:
        check = more.get("check", True)
        pure = refusing_changes(model) if check else contextlib.nullcontext()
        with torch.inference_mode(False), pure:
            x, dtype = _own(x, copy=check), precision(model)
            if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point():
                return call(self, model, x, _labels(y), *args, **more)
            x = full_precision(x)
            cast = given_in(model, dtype) if x.dtype != dtype else contextlib.nullcontext()
            with cast:
                return call(self, model, x, _labels(y), *args, **more)

    return entered  # type: ignore[return-value]


def _own(value: Any, copy: bool = False) -> Any:
    """A tensor that autograd takes, contiguous; anything else is left to the checks."""
    if not isinstance(value, Tensor):
        return value
    return (value.clone() if copy or value.is_inference() else value).detach().contiguous()


def _labels(value: Any) -> Any:
    """Labels as `_own` has them; uint8 would pick by mask and count up to 255 only."""
    value = _own(value)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return value
    return value if value.dtype == torch.bool else value.long()


def precision(model: nn.Module) -> torch.dtype | None:
    """What all weights of a classifier are of; None where they differ, or where it has none."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


@contextlib.contextmanager
def given_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block ``model`` is given its images in ``dtype``, whatever they are in.

    Gradients come back in the precision that the images were in.
    """
    if isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
        yield
        return

    def cast(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        first = given[0] if given else None
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return given
        return first.to(dtype), *given[1:]

    # first of all hooks: the others see what the classifier sees
    hook = model.register_forward_pre_hook(cast, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def refusing_changes(model: nn.Module) -> Iterator[None]:
    """Within the block, a forward that changes its input in place, or autograd's mode, is refused.

    What it is given may be an attack's own iterate, or the caller's images.

    Raises:
        InputError: what was seen.
    """
    thread = threading.local()  # some attacks ask in several
    graph = torch.is_grad_enabled()

    def versions(given: tuple[Any, ...]) -> list[int]:
        tensors = (one for one in given if isinstance(one, Tensor))
        return [one._version for one in tensors if not one.is_inference()]

    def before(_: nn.Module, given: tuple[Any, ...]) -> None:
        vars(thread).setdefault("seen", []).append([torch.is_grad_enabled(), *versions(given)])

    def after(_: nn.Module, given: tuple[Any, ...], logits: object) -> None:
        enabled, *found = thread.seen.pop()
        if versions(given) != found:
            raise InputError(_CHANGES)
        if enabled and not torch.is_grad_enabled():
            raise InputError(_SWITCHES_OFF)

    if not isinstance(model, nn.Module):
        raise InputError(
            f"a classifier is a torch.nn.Module, not a {type(model).__name__}: wrap it in one "
            "whose forward calls it"
        )
    try:
        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    except RuntimeError as error:  # torch.jit's
        raise InputError(
            f"a {type(model).__name__} takes no hooks, by which attacks watch a classifier: wrap "
            "it in a torch.nn.Module of your own whose forward calls it"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in ("in-place", "inplace")):
            raise InputError(_CHANGES) from error
        raise
    finally:
        torch.set_grad_enabled(graph)
        for hook in hooks:
            hook.remove()


_SWITCHES_OFF = (
    "the classifier switches autograd off in its forward pass (such as "
    "torch.set_grad_enabled(False)), so that no gradient comes back to the images: leave the mode "
    "to the caller"
)
_CHANGES = (
    "the classifier changes the images that it is given in place (such as x -= mean): let it make "
    "a new tensor (x = x - mean)"
)


@contextlib.contextmanager
def attacked(
    model: nn.Module,
    mode: BatchNormMode = "eval",
    *,
    restore_buffers: bool = True,
    one_pass: bool = False,
) -> Iterator[None]:
    """Set the mode of ``model`` while it is attacked, then restore it bit for bit.

    Every module's training flag, every parameter's ``requires_grad`` and ``.grad`` and every
    buffer are afterwards as before. Where all weights are of one precision other than fp32, images
    are given to the model in it. Target parameters keep autograd from storing what only
    weight gradients need, so that an attack step costs one forward and one input-backward.

    What passes share is made once, if it costs more than a pass can save: under autocast each
    weight is cast once in the block, to the same numbers, and within
    `advgame.attacks.folding.folding` batch norm is folded, to others by rounding.

    Args:
        model: any classifier.
        mode: ``"eval"`` uses batch norm's running statistics, ``"train"`` the batch's own (and
            turns dropout on); the running statistics are restored in either case.
        restore_buffers: False lets passes in training mode move the running statistics, as some
            published code does.
        one_pass: whether there is one pass only, maybe among somebody else's: nothing is then made
            for several, and autocast's cache, which otherwise ends with the block, is left alone.

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
    dtype = precision(model)
    usual = dtype is None or dtype == torch.float32
    shared = contextlib.nullcontext() if one_pass else _made_once(model, mode)
    try:
        with (
            contextlib.nullcontext() if dtype is None or usual else given_in(model, dtype),
            shared,
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if buffers is not None:
            buffers.restore()


@contextlib.contextmanager
def _made_once(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """What all passes of the block share."""
    with folded(model) if mode == "eval" else contextlib.nullcontext():
        casts = _casting(model)
        for module, name, _, stand_in in casts:
            module._parameters[name] = stand_in
        try:
            yield
        finally:
            for module, name, weight, _ in casts:
                module._parameters[name] = weight
            if casts:
                torch.clear_autocast_cache()


def _casting(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
    """What autocast would cast at every pass, as (module, name, weight, stand-in).

    It keeps the casts of weights that learn, and an attack's do not. A stand-in shares its weight's
    memory and learns as far as autocast can tell; nobody asks for its gradient.
    """
    if not torch.is_autocast_cache_enabled() or not any(
        torch.is_autocast_enabled(kind) for kind in {p.device.type for p in model.parameters()}
    ):
        return []
    modules = [one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule)]
    if any(hasattr(one, "_orig_mod") or one._compiled_call_impl for one in modules):
        return []  # a compiled graph would form the stand-ins' gradients, too
    places = [
        (module, name, weight)
        for module in modules
        for name, weight in module._parameters.items()
        # other kinds of parameters may not be what they were once detached
        if type(weight) is nn.Parameter and weight.dtype == torch.float32
    ]
    stand_ins = {weight: nn.Parameter(weight.detach()) for _, _, weight in places}
    return [(module, name, weight, stand_ins[weight]) for module, name, weight in places]


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
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in dict.fromkeys(named):  # some may be shared
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        # those of a kind are copied by one kernel on a GPU, where each would take one
        self.tensors = list(kinds.values())
        self.values = [[torch.empty_like(one) for one in some] for some in self.tensors]
        self._copy(self.values, self.tensors)

    def restore(self) -> None:
        for module, own in self.places:
            now = module._buffers
            if now.keys() != own.keys() or any(now[name] is not own[name] for name in own):
                now.clear()
                now.update(own)
        self._copy(self.tensors, self.values)

    @staticmethod
    @torch.no_grad()
    def _copy(there: list[list[Tensor]], here: list[list[Tensor]]) -> None:
        for kind, values in zip(there, here, strict=True):
            torch._foreach_copy_(kind, values)

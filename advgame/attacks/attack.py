"""What every attack is to those who use one, and what it does where a stranger's call comes in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from advgame.errors import InputError

CallT = TypeVar("CallT", bound=Callable[..., Any])


@dataclass(frozen=True)
class AttackResult:
    """What an attack did.

    Args:
        x_adv: (B, C, H, W), the adversarial examples, in the ball and in [0, 1].
        loss: (B,) loss at ``x_adv`` where the attack computed it (``keep="best"`` or several
            restarts), else None; it is what the attack maximises, or minimises when targeted.
        fooled: (B,) whether the attack succeeded, with ``stop_when_fooled``, else None.
        forwards: number of image forwards made, summed over the batch.
        backwards: number of image input-backwards made.
    """

    x_adv: Tensor
    loss: Tensor | None
    fooled: Tensor | None
    forwards: int
    backwards: int


class Attack(Protocol):
    """Perturbs images within a threat model; holds settings only.

    Hand-made and learned attacks alike are of this form, so that an evaluation, a game or a
    comparison takes either.
    """

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        rng: torch.Generator | None = None,
        check: bool = True,
    ) -> AttackResult:
        """Attack one batch.

        Args:
            model: maps (B, C, H, W) in [0, 1] to logits (B, K); left exactly as it was found.
            x: clean images in [0, 1].
            y: (B,) labels.
            rng: stream of all draws, on the images' device.
            check: validate the input first.

        Raises:
            InputError: input that cannot be attacked.
        """
        ...


def at_boundary(call: CallT) -> CallT:
    """Decorate a method (self, model, x, y, ...) that attacks: the caller's context is left.

    Inside there is no inference mode, whatever the caller is in: an attack that forms gradients
    would find none there and return the clean images. Images and labels made in that mode are
    copied; images in another memory layout become contiguous, once. With ``check`` a classifier
    that changes the images in place is refused, and it is a copy that it has changed.
    """

    @functools.wraps(call)
    def entered(self: Any, model: nn.Module, x: Tensor, y: Tensor, *args: Any, **more: Any) -> Any:
        check = more.get("check", True)
        pure = refusing_changes(model) if check else contextlib.nullcontext()
        with torch.inference_mode(False), pure:
            return call(self, model, _own(x, copy=check), _own(y), *args, **more)

    return entered  # type: ignore[return-value]


def _own(value: Any, copy: bool = False) -> Any:
    """A tensor that autograd takes, contiguous; anything else is left to the checks."""
    if not isinstance(value, Tensor):
        return value
    return (value.clone() if copy or value.is_inference() else value).detach().contiguous()


@contextlib.contextmanager
def refusing_changes(model: nn.Module) -> Iterator[None]:
    """Within the block, a forward that changes its input in place is refused.

    What it is given may be an attack's own iterate, or the caller's images.

    Raises:
        InputError: what was seen.
    """
    seen: list[list[int]] = []

    def versions(given: tuple[Any, ...]) -> list[int]:
        return [one._version for one in given if isinstance(one, Tensor)]

    def before(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(versions(given))

    def after(_: nn.Module, given: tuple[Any, ...], logits: object) -> None:
        if versions(given) != seen.pop():
            raise InputError(_CHANGES)

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
        for hook in hooks:
            hook.remove()


_CHANGES = (
    "the classifier changes the images that it is given in place (such as x -= mean): let it make "
    "a new tensor (x = x - mean)"
)

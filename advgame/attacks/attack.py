"""The base class of all attacks on classifiers, and what an attack returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from advgame.attacks.boundary import at_boundary
from advgame.checks import check_images, check_labels
from advgame.errors import InputError


@dataclass(frozen=True)
class AttackResult:
    """What an attack did.

    Args:
        x_adv: (B, C, H, W), the adversarial examples, in the ball and in [0, 1].
        loss: (B,) loss at ``x_adv`` where the attack computed it (``keep="best"`` or several
            restarts), else None; it is what the attack maximises, or minimises when targeted.
        fooled: (B,) whether the attack succeeded, where it looked, else None.
        forwards: number of image forwards made, summed over the batch.
        backwards: number of image input-backwards made.
        steps: (B,) int64 that each image made, where a rule stopped them, else None.
    """

    x_adv: Tensor
    loss: Tensor | None
    fooled: Tensor | None
    forwards: int
    backwards: int
    steps: Tensor | None = None


class Attack(ABC):
    """Perturbs images within a threat model; a subclass holds settings only and brings `_attack`.

    Hand-made and learned attacks alike are of this class, so that an evaluation, a game or a
    comparison takes either.
    """

    @at_boundary
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
            rng: stream of all draws, on the images' device; needed where the attack draws.
            check: validate the input first; a training loop that validated its data set turns
                it off.

        Raises:
            InputError: input that cannot be attacked, or a subclass that does not return an
                `AttackResult` with images of the shape of ``x``, on its device. Those in another
                precision, such as NumPy's fp64, are brought to that of the attack's arithmetic.
        """
        if rng is None and (drawn := self._draws()):
            raise InputError(f"{drawn} needs rng, a torch.Generator on the images' device")
        if check:
            self._check(x, y)
        made = self._attack(model, x, y, rng, check)
        if not isinstance(made, AttackResult):
            raise InputError(
                f"{type(self).__name__}._attack must return an AttackResult, not "
                f"{type(made).__name__}: AttackResult(x_adv, None, None, forwards, backwards)"
            )
        return self._of_one_kind(made, x)

    def _of_one_kind(self, made: AttackResult, x: Tensor) -> AttackResult:
        """What a subclass returned, as images that classifiers of those in ``x`` take."""
        found, name = made.x_adv, f"{type(self).__name__}._attack"
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{name} must return images as a floating-point tensor, not {got}")
        if found.shape != x.shape:
            raise InputError(
                f"{name} must return images of the shape of those that it is given, "
                f"{tuple(x.shape)}, not {tuple(found.shape)}"
            )
        if found.device != x.device:
            raise InputError(
                f"{name} must return images on the device of those that it is given, {x.device}, "
                f"not {found.device}"
            )
        if found.dtype == x.dtype:
            return made
        # fp32 where the images are of less: rounding could leave the ball
        return replace(made, x_adv=found.to(torch.promote_types(x.dtype, torch.float32)))

    def perturb(
        self, model: nn.Module, x: Tensor, y: Tensor, *, rng: torch.Generator | None = None
    ) -> Tensor:
        """`run`'s adversarial examples alone, (B, C, H, W)."""
        return self.run(model, x, y, rng=rng).x_adv

    @abstractmethod
    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        """The attack itself: ``rng`` is there if `_draws` says so, ``check`` asks for a look at
        the first logits.
        """

    def _draws(self) -> str | None:
        """What is drawn from ``rng``; None where the attack does without."""
        return None

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Refuse images and labels that cannot be attacked."""
        check_images(x)
        check_labels(y, len(x))

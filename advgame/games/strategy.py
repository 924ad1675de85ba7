"""The strategies of LAS-AT: which ε, how many steps and what step size, image by image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from advgame.errors import InputError

CHOICES = ("eps", "steps", "step_size")
"""What a strategy consists of, in the order of an action's columns."""

EPS_CAP = 0.5
"""From ε = 0.5 on, every image can become the same grey, and nothing is left to learn."""


@dataclass(frozen=True)
class Strategies:
    """One PGD configuration per image.

    Args:
        eps: (B,) radius in pixel units.
        steps: (B,) int64 number of steps.
        step_size: (B,) step in pixel units.
    """

    eps: Tensor
    steps: Tensor
    step_size: Tensor

    def scaled(self, factor: float) -> Strategies:
        """The same strategies with ε and step size times ``factor``."""
        return replace(self, eps=self.eps * factor, step_size=self.step_size * factor)


@dataclass(frozen=True)
class StrategySpace:
    """The lists that a strategy is chosen from.

    ε and step sizes are in units of ε₀/8, so that CIFAR's 8/255 makes them 1/255 as in the
    LAS-AT paper and one space serves every data set.

    Args:
        eps0: ε₀, the radius that the defender is judged at, in pixel units.
        eps_units: choices of ε; those that reach `EPS_CAP` in pixels are left out.
        steps: choices of the number of steps.
        step_size_units: choices of the step size.

    Raises:
        InputError: an empty list, or a number that no attack can use.
    """

    eps0: float
    eps_units: tuple[float, ...] = tuple(range(3, 16))
    steps: tuple[int, ...] = tuple(range(3, 15))
    step_size_units: tuple[float, ...] = tuple(range(1, 6))

    def __post_init__(self) -> None:
        if self.eps0 <= 0:
            raise InputError(f"eps must be above 0, not {self.eps0}")
        kept = tuple(u for u in self.eps_units if u * self.eps0 / 8 < EPS_CAP)
        object.__setattr__(self, "eps_units", kept)
        for name in ("eps_units", "steps", "step_size_units"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise InputError(f"{name} must be a list of numbers above 0, not {values}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of choices of ε, steps and step size."""
        return len(self.eps_units), len(self.steps), len(self.step_size_units)

    def decode(self, actions: Tensor) -> Strategies:
        """Indices (B, 3) -> strategies, on the actions' device.

        Raises:
            InputError: wrong shape or type, or an index outside its list.
        """
        integral = not actions.is_floating_point() and actions.dtype != torch.bool
        if actions.dim() != 2 or actions.shape[1] != 3 or not integral:
            raise InputError(
                f"actions must be integer indices (B, 3), not {tuple(actions.shape)} "
                f"of {actions.dtype}"
            )
        actions = actions.long()
        limit = torch.tensor(self.sizes, device=actions.device)
        if not bool(((actions >= 0) & (actions < limit)).all()):
            raise InputError(f"actions must lie in 0..n-1 with n = {self.sizes} per column")
        unit = self.eps0 / 8
        eps, steps, size = (
            torch.tensor(values, device=actions.device)[actions[:, column]]
            for column, values in enumerate((self.eps_units, self.steps, self.step_size_units))
        )
        return Strategies(eps.float() * unit, steps, size.float() * unit)

    def index(self, eps_units: float, steps: int, step_size_units: float) -> tuple[int, int, int]:
        """Indices of one configuration.

        Raises:
            InputError: a value that is not in its list.
        """
        wanted = (eps_units, steps, step_size_units)
        lists = (self.eps_units, self.steps, self.step_size_units)
        for name, value, values in zip(CHOICES, wanted, lists, strict=True):
            if value not in values:
                raise InputError(
                    f"no {name} of {value:g} in this strategy space: it has "
                    f"{', '.join(f'{v:g}' for v in values)}"
                )
        return (
            self.eps_units.index(eps_units),
            self.steps.index(steps),
            self.step_size_units.index(step_size_units),
        )


def _upto(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


# ε, steps, step sizes of the published command lines (LAS-AT's README); "centred" is ours: its
# means are PGD-AT's ε₀, 10 steps and ε₀/4, so that random draws from it differ in variety only
SPACES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "las-pgd-at-cifar10": (_upto(3, 15), _upto(3, 14), _upto(1, 5)),
    "las-pgd-at-cifar100": (_upto(3, 15), _upto(3, 12), _upto(1, 5)),
    "las-pgd-at-tiny": (_upto(3, 15), _upto(3, 14), _upto(1, 5)),
    "las-awp-cifar10": (_upto(7, 15), _upto(8, 16), _upto(2, 5)),
    "las-awp-cifar100": (_upto(7, 15), _upto(8, 15), _upto(2, 5)),
    "las-trades-cifar10": (_upto(5, 9), _upto(7, 14), _upto(2, 4)),
    "las-trades-cifar100": (_upto(5, 10), _upto(7, 14), _upto(2, 4)),
    "centred": (_upto(3, 13), _upto(6, 14), _upto(1, 3)),
}


def strategy_space(preset: str, eps0: float) -> StrategySpace:
    """The published space ``preset`` at the radius ``eps0``.

    Raises:
        InputError: unknown preset.
    """
    if preset not in SPACES:
        raise InputError(f"unknown strategy space {preset!r}: choose one of {', '.join(SPACES)}")
    return StrategySpace(eps0, *SPACES[preset])


class StrategyPlayer(Protocol):
    """Whoever chooses the strategies: a learner, or a control that never learns."""

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Choose for each image (B, C, H, W); returns indices (B, 3) on its device.

        Args:
            images: the clean images.
            learn: whether `learn` will be called with the rewards of these choices.
        """
        ...

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Take the rewards (B,) of the last choices; returns scalars to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the player's next choice depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...

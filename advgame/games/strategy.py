"""The strategies of LAS-AT: which ε, how many steps and what step size, image by image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advgame.checks import check_indices
from advgame.errors import InputError, unknown

CHOICES = ("eps", "steps", "step_size", "beta")
"""What a strategy consists of, in the order of an action's columns; β in LAS-TRADES only."""

EPS_CAP = 0.5
"""From ε = 0.5 on, every image can become the same grey in L∞, and nothing is left to learn."""


@dataclass(frozen=True)
class Strategies:
    """One PGD configuration per image.

    Args:
        eps: (B,) radius in pixel units.
        steps: (B,) int64 number of steps.
        step_size: (B,) step in pixel units.
        beta: (B,) weight of TRADES' divergence, in LAS-TRADES.
    """

    eps: Tensor
    steps: Tensor
    step_size: Tensor
    beta: Tensor | None = None

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
        eps_units: choices of ε; those that reach ``eps_cap`` in pixels are left out.
        steps: choices of the number of steps.
        step_size_units: choices of the step size.
        betas: choices of β; empty where the game has none.
        eps_cap: from there on every image can become the same grey: half of the threat's
            ``whole(C·H·W)``, which is 0.5 in L∞ and √(C·H·W)/2 in L2.

    Raises:
        InputError: an empty list, or a number that no attack can use.
    """

    eps0: float
    eps_units: tuple[float, ...] = tuple(range(3, 16))
    steps: tuple[int, ...] = tuple(range(3, 15))
    step_size_units: tuple[float, ...] = tuple(range(1, 6))
    betas: tuple[float, ...] = ()
    eps_cap: float = EPS_CAP

    def __post_init__(self) -> None:
        if self.eps0 <= 0:
            raise InputError(f"eps must be above 0, not {self.eps0}")
        kept = tuple(u for u in self.eps_units if u * self.eps0 / 8 < self.eps_cap)
        object.__setattr__(self, "eps_units", kept)
        for name in ("eps_units", "steps", "step_size_units", "betas"):
            values = getattr(self, name)
            if (not values and name != "betas") or any(value <= 0 for value in values):
                raise InputError(f"{name} must be a list of numbers above 0, not {values}")

    @property
    def lists(self) -> tuple[tuple[float, ...], ...]:
        """What each column of an action chooses from."""
        lists = (self.eps_units, self.steps, self.step_size_units)
        return (*lists, self.betas) if self.betas else lists

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of ε, steps and step size, and of β where there is one."""
        return tuple(len(values) for values in self.lists)

    def options(self, column: int) -> Tensor:
        """What a column of an action chooses from, (n,), in the units of `decode`'s strategies."""
        actions = torch.zeros(self.sizes[column], len(self.sizes), dtype=torch.int64)
        actions[:, column] = torch.arange(self.sizes[column])
        values: Tensor = getattr(self.decode(actions), CHOICES[column])
        return values

    def decode(self, actions: Tensor) -> Strategies:
        """Indices (B, 3), or (B, 4) with β -> strategies, on the actions' device.

        Raises:
            InputError: wrong shape or type, or an index outside its list.
        """
        check_indices(actions, self.sizes)
        actions = actions.long()
        unit = self.eps0 / 8
        eps, steps, size, *beta = (
            torch.tensor(values, device=actions.device)[actions[:, column]]
            for column, values in enumerate(self.lists)
        )
        beta_ = beta[0].float() if beta else None
        return Strategies(eps.float() * unit, steps, size.float() * unit, beta_)

    def index(self, *wanted: float) -> tuple[int, ...]:
        """Indices of one configuration: ε in units of ε₀/8, steps, step size, and β if any.

        Raises:
            InputError: a value that is not in its list.
        """
        if len(wanted) != len(self.lists):
            raise InputError(f"a strategy has {len(self.lists)} numbers here, not {len(wanted)}")
        for name, value, values in zip(CHOICES, wanted, self.lists, strict=False):
            if value not in values:
                raise InputError(
                    f"no {name} of {value:g} in this strategy space: it has "
                    f"{', '.join(f'{v:g}' for v in values)}"
                )
        return tuple(values.index(value) for value, values in zip(wanted, self.lists, strict=True))


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


BETAS = _upto(5, 9)
"""LAS-TRADES' choices of β, on all data sets."""


def strategy_space(
    preset: str, eps0: float, betas: tuple[float, ...] = (), eps_cap: float = EPS_CAP
) -> StrategySpace:
    """The published space ``preset`` at the radius ``eps0``, with choices of β if there are any.

    Raises:
        InputError: unknown preset.
    """
    if preset not in SPACES:
        raise unknown("strategy space", preset, SPACES)
    return StrategySpace(eps0, *SPACES[preset], betas, eps_cap)

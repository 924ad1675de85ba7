"""The strategies of LAS-AT: which ε, how many steps and what step size, image by image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advgame.checks import check_indices
from advgame.errors import InputError
from advgame.games.spaces import BETAS as BETAS
from advgame.games.spaces import CHOICES as CHOICES
from advgame.games.spaces import SPACES as SPACES
from advgame.games.spaces import check_list, parse_space

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
        if self.eps_units and not self.below_cap():
            raise InputError(
                f"every choice of ε reaches {self.eps_cap:g}, from where on all images can become "
                "the same grey; in L2 give the space its eps_cap"
            )
        object.__setattr__(self, "eps_units", self.below_cap())
        for name in ("eps_units", "steps", "step_size_units", "betas"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if values or name != "betas":
                check_list(name, values)

    def below_cap(self) -> tuple[float, ...]:
        """The choices of ε, in units of ε₀/8, that lie below ``eps_cap`` in pixels."""
        return tuple(unit for unit in self.eps_units if unit * self.eps0 / 8 < self.eps_cap)

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


def strategy_space(
    space: str, eps0: float, betas: tuple[float, ...] = (), eps_cap: float = EPS_CAP
) -> StrategySpace:
    """A space by its published name, or of lists as a person types them.

    Args:
        space: a name of `SPACES`, or ``"eps=4,6,8 steps=3,10 step_size=1,2"``.
        eps0: ε₀, the radius that the defender is judged at.
        betas: choices of β where the game has them, unless ``space`` has a list of them.
        eps_cap: as in `StrategySpace`.

    Raises:
        InputError: an unknown name, lists that no attack can use, a list of β where the game has
            none, or a typed ε that reaches ``eps_cap``.
    """
    lists = parse_space(space)
    if lists.beta and not betas:
        raise InputError("--space has a list of beta, which --objective trades alone has")
    made = StrategySpace(
        eps0, lists.eps, lists.steps, lists.step_size, (lists.beta or betas), eps_cap
    )
    if lists.typed and len(made.eps_units) < len(lists.eps):
        largest = lists.eps[-1]
        raise InputError(
            f"--space: an eps of {largest:g} is {largest * eps0 / 8:.3g} in pixels, and from "
            f"{eps_cap:.3g} on all images can become the same grey: leave it away"
        )
    return made

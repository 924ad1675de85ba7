"""What a learned attacker chooses from: one move per gradient query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advgame.errors import InputError

MOVES = ("on", "best", "random")
LOSSES = ("ce", "dlr", "margin", "second")
DIRECTIONS = ("steepest", "accumulated")
CHOICES = ("step_size", "momentum", "loss", "direction", "move")
"""What a move consists of, in the order of an action's columns."""


@dataclass(frozen=True)
class Moves:
    """One chosen move per image.

    Args:
        step_size: (B,) α in units of ε.
        momentum: (B,) m, the share of the last displacement in the new one.
        loss: (B,) index into `Menu.losses`.
        accumulated: (B,) bool, whether the direction follows Σ g/‖g‖₁ instead of g.
        best: (B,) bool, step from the best point so far, along the gradient found there.
        random: (B,) bool, do not step: go to a random point of the ball.
        chosen: (B, choices) the indices themselves.
    """

    step_size: Tensor
    momentum: Tensor
    loss: Tensor
    accumulated: Tensor
    best: Tensor
    random: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Menu:
    """The lists that a move is chosen from.

    Args:
        step_sizes: α in units of ε; L∞'s ball is 2ε wide.
        momenta: m; APGD's is 0.25.
        losses: of `LOSSES`. ``"second"`` is the logit of the class that was second among the
            wrong ones at the start, minus the true one's: another target to try.
        directions: of `DIRECTIONS`.
        moves: of `MOVES`: go on from the current point, from the best, or to a random one.

    Raises:
        InputError: an empty list, an unknown name, or a number that no attack can use.
    """

    step_sizes: tuple[float, ...] = (2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
    momenta: tuple[float, ...] = (0, 0.25, 0.5)
    losses: tuple[str, ...] = LOSSES
    directions: tuple[str, ...] = DIRECTIONS
    moves: tuple[str, ...] = MOVES

    def __post_init__(self) -> None:
        if not self.step_sizes or min(self.step_sizes) <= 0:
            raise InputError(f"step_sizes must be numbers above 0, not {self.step_sizes}")
        if not self.momenta or not all(0 <= m < 1 for m in self.momenta):
            raise InputError(f"momenta must lie in [0, 1), not {self.momenta}")
        for name, known in (("losses", LOSSES), ("directions", DIRECTIONS), ("moves", MOVES)):
            asked = getattr(self, name)
            if not asked or not set(asked) <= set(known):
                raise InputError(f"{name} must be of {', '.join(known)}, not {asked}")

    @property
    def lists(self) -> tuple[tuple[float, ...] | tuple[str, ...], ...]:
        """The options of each of `CHOICES`."""
        return self.step_sizes, self.momenta, self.losses, self.directions, self.moves

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of options of each of `CHOICES`."""
        return tuple(len(one) for one in self.lists)

    def index(
        self, step_size: float, momentum: float, loss: str, direction: str, move: str
    ) -> tuple[int, ...]:
        """Indices of one move.

        Raises:
            InputError: a value that is not in its list.
        """
        wanted = (step_size, momentum, loss, direction, move)
        for name, value, values in zip(CHOICES, wanted, self.lists, strict=True):
            if value not in values:
                raise InputError(f"no {name} {value!r} on this menu: it has {values}")
        return tuple(one.index(value) for value, one in zip(wanted, self.lists, strict=True))

    def decode(self, actions: Tensor, *, check: bool = True) -> Moves:
        """Indices (B, 5) -> moves, on the actions' device.

        Args:
            actions: one column per choice.
            check: look at the indices, which costs a host synchronisation on a GPU.

        Raises:
            InputError: wrong shape or type, or an index outside its list.
        """
        if check:
            check_actions(actions, self.sizes)
        step, momentum, loss, direction, move = actions.long().unbind(1)
        device = actions.device
        names = torch.tensor([MOVES.index(one) for one in self.moves], device=device)[move]
        running = torch.tensor([one == "accumulated" for one in self.directions], device=device)
        return Moves(
            torch.tensor(self.step_sizes, device=device, dtype=torch.float32)[step],
            torch.tensor(self.momenta, device=device, dtype=torch.float32)[momentum],
            loss,
            running[direction],
            names == MOVES.index("best"),
            names == MOVES.index("random"),
            actions.long(),
        )


def check_actions(actions: Tensor, sizes: tuple[int, ...]) -> None:
    """Refuse what is not one index per image and choice.

    Raises:
        InputError: wrong shape or type, or an index outside 0..n-1.
    """
    integral = not actions.is_floating_point() and actions.dtype != torch.bool
    if actions.dim() != 2 or actions.shape[1] != len(sizes) or not integral:
        raise InputError(
            f"actions must be integer indices (B, {len(sizes)}), not {tuple(actions.shape)} "
            f"of {actions.dtype}"
        )
    limit = torch.tensor(sizes, device=actions.device)
    if not bool(((actions >= 0) & (actions < limit)).all()):
        raise InputError(f"actions must lie in 0..n-1 with n = {sizes} per column")

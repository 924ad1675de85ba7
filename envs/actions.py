"""Actions in the forms that agents know: one choice for DQN, a box of numbers for SAC."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from advgame.attacks.gradient_steps import CHOICES, Menu, Step
from advgame.errors import InputError

LARGEST = 2**16
"""Actions of one choice: a network with an output for each is as large as that."""


def choice_space(sizes: tuple[int, ...], flatten: bool) -> spaces.MultiDiscrete | spaces.Discrete:
    """The space of one index per list, or of one number for all lists.

    Args:
        sizes: options of each list.
        flatten: whether it is one number.

    Raises:
        InputError: more combinations than `LARGEST`.
    """
    if not flatten:
        return spaces.MultiDiscrete(list(sizes))
    number = math.prod(sizes)
    if number > LARGEST:
        raise InputError(
            f"flatten_actions makes {' x '.join(map(str, sizes))} = {number} actions, more than "
            f"{LARGEST}: shorten the lists, or leave the actions as they are"
        )
    return spaces.Discrete(number)


def unflatten(actions: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Numbers (B,) to indices (B, lists), the last list running fastest.

    It is NumPy's ``unravel_index``; ``ravel_multi_index`` is the way back.

    Raises:
        InputError: no integers, or outside of 0..n-1.
    """
    number = math.prod(sizes)
    if actions.is_floating_point() or actions.dtype == torch.bool:
        raise InputError(f"actions must be integers, not {actions.dtype}")
    actions = actions.long()
    if not bool(((actions >= 0) & (actions < number)).all()):
        raise InputError(f"actions must be integers from 0 to {number - 1}")
    return torch.stack(torch.unravel_index(actions, sizes), 1)


def as_numbers(
    actions: Any, space: spaces.Space[Any], device: torch.device | str = "cpu"
) -> Tensor:
    """Actions as a tensor of the shape that a space has.

    Args:
        actions: tensor, array or list.
        space: of a vector environment's actions, or of one action.
        device: of the tensor.

    Raises:
        InputError: no numbers, or another shape.
    """
    if isinstance(actions, np.ndarray):
        actions = actions.copy()  # torch takes no reversed views, and would share the memory
    try:
        given = torch.as_tensor(actions, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"actions must be numbers of shape {space.shape}, not {actions!r:.60}"
        ) from error
    if tuple(given.shape) != space.shape:
        raise InputError(f"actions must have shape {space.shape}, not {tuple(given.shape)}")
    return given


def rounded(actions: Tensor, space: spaces.Box) -> Tensor:
    """Actions as a task is given them by `into_box`: in a box of integers the nearest whole ones.

    Args:
        actions: (k,) or (B, k) of any type.
        space: (k,).
    """
    whole = np.issubdtype(space.dtype, np.integer) and actions.is_floating_point()
    return actions.round() if whole else actions


def into_box(actions: np.ndarray[Any, Any], space: spaces.Box) -> np.ndarray[Any, Any]:
    """Actions as a box has them: of its type, and inside of it where rounding has left it.

    Args:
        actions: (k,) or (B, k) numbers of any type; whole ones are the nearest in a box of
            integers.
        space: (k,).
    """
    inside = np.clip(actions, space.low, space.high)  # NumPy's wider type of the two
    if np.issubdtype(space.dtype, np.integer):
        inside = np.rint(inside)
    made: np.ndarray[Any, Any] = inside.astype(space.dtype)
    return made


class StepBox:
    """Gradient steps as points of a box [-1, 1], for agents such as SAC.

    The first entry is the step size on a logarithmic scale, -1 the smallest of the menu and 1 the
    largest; the second the momentum, in proportion. Then there is a score for each loss,
    direction and move, of which the largest is taken. A list of one option has no entry.

    Args:
        menu: whose range and options are meant.
    """

    def __init__(self, menu: Menu) -> None:
        self.menu = menu
        sizes, momenta = menu.step_sizes, menu.momenta
        self._scales = [
            (math.log2(min(sizes)), math.log2(max(sizes))),
            (min(momenta), max(momenta)),
        ]
        named = [
            name for name, (low, high) in zip(CHOICES, self._scales, strict=False) if low < high
        ]
        scores = zip(CHOICES[2:], menu.lists[2:], strict=True)
        named += [f"{name}_{one}" for name, of in scores if len(of) > 1 for one in of]
        self.names = tuple(named)
        """What each entry is."""
        if not named:
            raise InputError("this menu has one step only: there is nothing to choose")
        self.space = spaces.Box(-1, 1, (len(named),), np.float32)

    def read(self, actions: Tensor) -> Tensor:
        """Points (B, n) of the box, float32.

        Raises:
            InputError: no numbers, NaN, or outside.
        """
        if not actions.is_floating_point():
            raise InputError(f"actions must be floats, not {actions.dtype}")
        if not bool((actions.abs() <= 1).all()):  # NaN is no less than 1
            raise InputError(
                "actions must lie in [-1, 1]: clip them, e.g. numpy.clip(actions, -1, 1)"
            )
        return actions.float()

    def decode(self, actions: Tensor) -> tuple[Step, Tensor]:
        """The steps of points (B, n), and the menu's nearest steps as indices (B, 5)."""
        at, values, nearest = 0, [], []
        for (low, high), options in zip(self._scales, self.menu.lists, strict=False):
            value = torch.full_like(actions[:, 0], low)
            if low < high:
                value = low + (high - low) * (actions[:, at] + 1) / 2
                at += 1
            values.append(value)
            places = [math.log2(one) if len(values) == 1 else one for one in options]  # type: ignore[arg-type]
            distance = value[:, None] - torch.tensor(places, device=value.device)
            nearest.append(distance.abs().argmin(1))
        for options in self.menu.lists[2:]:
            width = len(options) if len(options) > 1 else 0
            scores = actions[:, at : at + width]
            nearest.append(scores.argmax(1) if width else torch.zeros_like(nearest[0]))
            at += width
        indices = torch.stack(nearest, 1)
        size, momentum = values
        return self.menu.decode(indices)._replace(size=size.exp2(), momentum=momentum), indices

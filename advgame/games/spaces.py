"""The lists of LAS-AT's strategies: the published ones by name, and those that a person types.

Imports no torch, so that a script refuses a typo at once; `advgame.games.strategy` makes a
`StrategySpace` of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from advgame.errors import InputError, unknown
from advgame.run.options import parse_number

CHOICES = ("eps", "steps", "step_size", "beta")
"""What a strategy consists of, in the order of an action's columns; β in LAS-TRADES only."""


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


@dataclass(frozen=True)
class Lists:
    """What strategies are chosen from.

    Args:
        eps: ε in units of ε₀/8.
        steps: numbers of steps.
        step_size: step sizes in units of ε₀/8.
        beta: β; None where nothing was said of it.
        typed: whether a person typed the lists, instead of a name.
    """

    eps: tuple[float, ...]
    steps: tuple[int, ...]
    step_size: tuple[float, ...]
    beta: tuple[float, ...] | None = None
    typed: bool = False


def check_list(name: str, values: tuple[float, ...]) -> None:
    """Refuse a list that is empty, not of finite numbers above 0, or does not go up.

    Raises:
        InputError: which list, and what is wrong with it.
    """
    if not values or not all(0 < value < math.inf for value in values):
        raise InputError(f"{name} must be a list of numbers above 0, not {_shown(values)}")
    if list(values) != sorted(set(values)):
        raise InputError(f"{name} must go up, each number once, not {_shown(values)}")
    if name == "steps" and any(value != int(value) for value in values):
        raise InputError(f"steps must be whole numbers, not {_shown(values)}")


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values) or "an empty one"


def parse_space(text: str) -> Lists:
    """The lists of a name, or of words such as ``"eps=4,6,8 steps=3,10 step_size=1,2"``.

    Args:
        text: a name of `SPACES`, or a list for each of eps, steps and step_size, and for beta in
            LAS-TRADES. Typed numbers go up; ε and step sizes are in units of ε₀/8.

    Raises:
        InputError: an unknown name or list, one that is missing or there twice, or numbers that no
            attack can use.
    """
    if "=" not in text:
        if text not in SPACES:
            raise unknown("strategy space", text, SPACES)
        return Lists(*SPACES[text])
    found: dict[str, tuple[float, ...]] = {}
    for word in text.split():
        name, sign, values = word.partition("=")
        if not sign:
            raise InputError(
                f"--space has {word!r} among its lists: write eps=4,6,8 with no spaces in a list, "
                "or a name alone"
            )
        if name not in CHOICES:
            raise unknown("list of --space", name, CHOICES)
        if name in found:
            raise InputError(f"--space has {name} twice: name its numbers in one list")
        if "/" in values:
            raise InputError(
                f"--space counts ε and step sizes in eighths of ε₀, so that 8 is --eps itself: "
                f"write eps=4,6,8 with no fractions, not {word!r}"
            )
        found[name] = tuple(parse_number(one, name) for one in values.split(",") if one.strip())
        check_list(name, found[name])
    if missing := [name for name in CHOICES[:3] if name not in found]:
        raise InputError(
            f"--space needs a list of {' and of '.join(missing)}, too: for example "
            "eps=4,6,8 steps=3,10 step_size=1,2"
        )
    steps = tuple(int(value) for value in found["steps"])
    return Lists(found["eps"], steps, found["step_size"], found.get("beta"), typed=True)

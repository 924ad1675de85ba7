"""Policy-space response oracles: two players who answer each other's mixtures, round after round.

Of a game with too many strategies to write down, a few are known: the restricted game. Each round
solves it, has each player answer the other's mixture, and adds both answers. With exact answers it
is the double oracle (McMahan et al. 2003), which ends at an equilibrium of a finite game. Answers
that are learned make it PSRO (Lanctot et al. 2017, algorithm 1) with the equilibrium of the
restricted game as its meta-strategy.

How far a pair of mixtures is from an equilibrium is told by best responses. Those that were found
may not be the best: what they gain is a *lower bound* on exploitability, and 0 proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from advgame.arena.matrix_games import Equilibrium, Floats, best_replies, solve_per_image
from advgame.errors import InputError

PLAYED = 1e-9
"""A strategy of a smaller probability is not played: it is what the simplex method leaves of 0."""


class Players(Protocol):
    """Who keeps both players' strategies, by number, and answers mixtures of them."""

    def errors(self, row: int, column: int) -> Floats:
        """What the defender's strategy ``row`` pays to the attacker's ``column``, (N,) images."""
        ...

    def attack(self, column: int, defender: Floats) -> None:
        """Make the attacker's strategy of this number: its answer to a mixture of the rows (D,)."""
        ...

    def defend(self, row: int, attacker: Floats) -> None:
        """Make the defender's strategy of this number: its answer to a mixture of the columns.

        Args:
            row: the number.
            attacker: (N, A) where the attacker picks for each image, else (1, A).
        """
        ...


@dataclass(frozen=True)
class Round:
    """A round.

    Args:
        number: from 1.
        equilibrium: of the restricted game that the round began with, D rows and A columns.
        attacker_gain: what the attacker's answer is paid beyond the value, 0 or above.
        defender_gain: what the defender's answer saves of the value, 0 or above.
        errors: (N, D + 1, A + 1), the restricted game with both answers.
    """

    number: int
    equilibrium: Equilibrium
    attacker_gain: float
    defender_gain: float
    errors: Floats

    @property
    def gap(self) -> float:
        """What both answers gain together: a lower bound on the exploitability of the mixtures."""
        return self.attacker_gain + self.defender_gain


def psro(
    players: Players, rows: int = 1, columns: int = 1, *, per_image: bool = True
) -> Iterator[Round]:
    """Rounds without end; the caller stops when it has seen enough.

    Args:
        players: with the first strategies of both.
        rows: how many of the defender's there are.
        columns: how many of the attacker's.
        per_image: whether the attacker picks its strategy after it has seen the image.

    Raises:
        InputError: a player without a first strategy.
    """
    if min(rows, columns) < 1:
        raise InputError(f"both players need a strategy to begin with, not {rows} and {columns}")
    errors = _game(players, rows, columns, None)
    for number in count(1):
        found = restricted(errors, per_image=per_image)
        players.attack(columns, found.defender)
        players.defend(rows, found.attacker)
        rows, columns = rows + 1, columns + 1
        errors = _game(players, rows, columns, errors)
        worst, best = best_replies(
            errors if per_image else errors.mean(0, keepdims=True),
            np.append(found.defender, 0),
            np.pad(found.attacker, ((0, 0), (0, 1))),
        )
        gains = max(0.0, worst - found.value), max(0.0, found.value - best)
        yield Round(number, found, *gains, errors)


def restricted(errors: Floats, *, per_image: bool = True) -> Equilibrium:
    """The equilibrium of a restricted game.

    On an image where the attacker's choice changes no known strategy's error, any choice is one of
    an equilibrium. It mixes there as elsewhere on average: a new classifier is to meet its attacks
    on these images, too.

    Args:
        errors: (N, D, A).
        per_image: whether the attacker picks its strategy after it has seen the image.

    Returns:
        with the attacker's mixtures (N, A), or (1, A) where it has not seen the image.
    """
    game = errors if per_image else errors.mean(0, keepdims=True)
    found = solve_per_image(game)
    matters, columns = (np.ptp(game, axis=2) > 0).any(1), game.shape[2]
    usual = found.attacker[matters].mean(0) if matters.any() else np.full(columns, 1 / columns)
    attacker = np.where(matters[:, None], found.attacker, usual)
    return Equilibrium(found.value, found.defender, attacker)


def support(shares: Floats) -> int:
    """How many strategies a mixture (S,), or any of several mixtures (N, S), plays."""
    return int((shares > PLAYED).reshape(-1, shares.shape[-1]).any(0).sum())


def _game(players: Players, rows: int, columns: int, known: Floats | None) -> Floats:
    """The errors of all pairs, (N, D, A); those that are known are not asked for again."""
    had = (0, 0) if known is None else known.shape[1:]
    cells = [
        [
            known[:, d, a]
            if known is not None and d < had[0] and a < had[1]
            else players.errors(d, a)
            for a in range(columns)
        ]
        for d in range(rows)
    ]
    return np.moveaxis(np.array(cells, dtype=np.float64), 2, 0)

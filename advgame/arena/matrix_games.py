"""Zero-sum matrix games of defenders (rows) and attackers (columns), by linear programme.

The defender mixes rows by p and pays, the attacker is paid. Two games are made of the errors
e[i, d, a] of classifier d on image i under attack a:

- the attacker commits to a mixture q of attacks before it sees the image:
  min_p max_q  Σ_d Σ_a p_d q_a mean_i e[i, d, a]
- the attacker picks for each image, knowing p but not which classifier was drawn:
  min_p mean_i max_a Σ_d p_d e[i, d, a]

The second never is below the first. One programme solves both, as the first is the second on one
image.

Source: von Neumann 1928; the programme is that of Dantzig 1951.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack, kron

from advgame.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

_TIGHT = 1e-10  # HiGHS' least tolerance; costs are scaled to [0, 1]
_OFF = 1e-6  # by how much a mixture may miss a sum of 1


@dataclass(frozen=True)
class Equilibrium:
    """What neither player can improve alone.

    Where a game has several equilibria, this is one that the simplex method ends at.

    Args:
        value: what the defender pays and the attacker is paid, in expectation.
        defender: (D,) probabilities of the rows.
        attacker: probabilities of the columns: (A,), or (N, A) where it picks for each image.
    """

    value: float
    defender: Floats
    attacker: Floats


def solve(costs: ArrayLike) -> Equilibrium:
    """The equilibrium of a matrix game.

    Args:
        costs: (D, A), what row d pays to column a; any finite numbers.

    Raises:
        InputError: no such matrix.
    """
    found = solve_per_image(_numbers(costs, "DA")[None])
    return Equilibrium(found.value, found.defender, found.attacker[0])


def solve_per_image(errors: ArrayLike) -> Equilibrium:
    """The equilibrium where the attacker picks its attack after it has seen the image.

    Args:
        errors: (N, D, A), e.g. 1 where classifier d errs on image i under attack a.

    Raises:
        InputError: no such array.
    """
    costs = _numbers(errors, "NDA")
    low, high = float(costs.min()), float(costs.max())
    scale = high - low or 1.0
    # images that meet the same errors are one, with a weight
    kinds, which, counts = np.unique(
        (costs - low) / scale, axis=0, return_inverse=True, return_counts=True
    )
    n, rows, columns = kinds.shape
    weights = counts / len(costs)
    # minimise Σ_i w_i t_i over p and t, with Σ_d p_d e[i, d, a] - t_i ≤ 0 for all i and a
    paid = csr_array(kinds.transpose(0, 2, 1).reshape(n * columns, rows))
    bound = kron(eye_array(n), np.ones((columns, 1)))
    found = linprog(
        np.concatenate([np.zeros(rows), weights]),
        A_ub=hstack([paid, -bound]).tocsr(),
        b_ub=np.zeros(n * columns),
        A_eq=np.concatenate([np.ones(rows), np.zeros(n)])[None],
        b_eq=np.ones(1),
        bounds=[(0, None)] * rows + [(None, None)] * n,
        method="highs",
        options={"primal_feasibility_tolerance": _TIGHT, "dual_feasibility_tolerance": _TIGHT},
    )
    assert found.success, found.message  # such a programme has a solution
    # by duality the price of each row of the programme is the attacker's w_i q[i, a]
    prices = -found.ineqlin.marginals.reshape(n, columns)
    attacker = _normal(prices)[which.reshape(-1)]
    return Equilibrium(low + scale * float(found.fun), _normal(found.x[:rows]), attacker)


def exploitability(costs: ArrayLike, defender: ArrayLike, attacker: ArrayLike) -> float:
    """What both players together would gain by their best responses: 0 in equilibrium only.

    Args:
        costs: (D, A).
        defender: (D,) probabilities.
        attacker: (A,) probabilities.

    Returns:
        max_a Σ_d p_d c[d, a] - min_d Σ_a q_a c[d, a], which OpenSpiel calls NashConv.

    Raises:
        InputError: arrays that do not fit, or no probabilities.
    """
    costs = _numbers(costs, "DA")
    mixed = _mixture(attacker, costs.shape[1:], "attacker")[None]
    return exploitability_per_image(costs[None], defender, mixed)


def exploitability_per_image(errors: ArrayLike, defender: ArrayLike, attacker: ArrayLike) -> float:
    """`exploitability` where the attacker picks for each image.

    Args:
        errors: (N, D, A).
        defender: (D,) probabilities.
        attacker: (N, A) probabilities.

    Raises:
        InputError: arrays that do not fit, or no probabilities.
    """
    worst, best = best_replies(errors, defender, attacker)
    return worst - best


def best_replies(
    errors: ArrayLike, defender: ArrayLike, attacker: ArrayLike
) -> tuple[float, float]:
    """What a pair of mixtures comes to when the other player replies best.

    Args:
        errors: (N, D, A).
        defender: (D,) probabilities.
        attacker: (N, A) probabilities.

    Returns:
        what the defender's mixture pays at worst, and what the attacker's is paid at least.

    Raises:
        InputError: arrays that do not fit, or no probabilities.
    """
    costs = _numbers(errors, "NDA")
    p = _mixture(defender, costs.shape[1:2], "defender")
    q = _mixture(attacker, (costs.shape[0], costs.shape[2]), "attacker")
    worst = np.einsum("d,nda->na", p, costs).max(1).mean()
    best = np.einsum("na,nda->d", q, costs).min() / len(costs)
    return float(worst), float(best)


def _numbers(given: ArrayLike, axes: str) -> Floats:
    """An array of finite numbers, with as many axes as there are letters."""
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"a game is an array of numbers ({', '.join(axes)}): {error}") from error
    if found.ndim != len(axes) or not found.size or not np.isfinite(found).all():
        raise InputError(
            f"a game is a non-empty array ({', '.join(axes)}) of finite numbers, not one of shape "
            f"{found.shape}"
        )
    return found


def _mixture(given: ArrayLike, shape: tuple[int, ...], whose: str) -> Floats:
    wrong = InputError(
        f"the {whose}'s mixture must be probabilities of shape {shape}: 0 or above, of sum 1"
    )
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if found.shape != shape or not (found >= 0).all() or (abs(found.sum(-1) - 1) > _OFF).any():
        raise wrong
    return found


def _normal(shares: Floats) -> Floats:
    """Probabilities from what rounding may have left a little below 0, or off a sum of 1."""
    kept = np.maximum(shares, 0)
    normal: Floats = kept / kept.sum(-1, keepdims=True)
    return normal

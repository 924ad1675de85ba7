"""With which probabilities the members of a mixture of classifiers are best drawn.

Source: Dbouk & Shanbhag 2023, On the robustness of randomized ensembles to adversarial
perturbations: the algorithm OSP (optimal sampling probability), a projected subgradient method. The
worst-case error of a mixture is convex in its weights, as a maximum of linear functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from advgame.arena.matrix_games import Floats
from advgame.errors import InputError


def on_simplex(point: Floats) -> Floats:
    """The nearest probabilities (M,) to a point (M,) (Duchi et al. 2008, figure 1)."""
    falling = np.sort(point)[::-1]
    excess = (falling.cumsum() - 1) / np.arange(1, len(point) + 1)
    least = excess[np.nonzero(falling > excess)[0][-1]]
    nearest: Floats = np.maximum(point - least, 0)
    return nearest


def optimal_sampling(
    errors: Callable[[Floats], Floats], members: int, *, steps: int = 10, rate: float = 1.0
) -> tuple[Floats, float]:
    """The best weights that a projected subgradient method visits, from equal ones.

    α ← Π(α - a / t · g), where g[m] is the error rate of member m under the attack on α: a
    subgradient of the worst-case error, as far as the attack is the worst. The schedule a / t is
    that of the authors' code, where a is 10 times the learning rate of the moment; ours is fixed.

    Args:
        errors: weights (M,) -> (N, M), 1 where a member errs on an image's adversarial example,
            which is made for the mixture of these weights.
        members: M.
        steps: attacks.
        rate: a.

    Returns:
        the weights (M,), and the mixture's error under the attack on them.

    Raises:
        InputError: no member, or no step.
    """
    if min(members, steps) < 1 or not rate > 0:
        raise InputError(
            f"members and steps must be 1 or above and the rate above 0, not {members}, {steps} "
            f"and {rate}"
        )
    weights = np.full(members, 1 / members)
    best, least = weights, np.inf
    for step in range(1, steps + 1):
        gradient = errors(weights).mean(0)
        cost = float(weights @ gradient)
        if cost < least:
            best, least = weights, cost
        weights = on_simplex(weights - rate / step * gradient)
    return best, least

"""What minimax and maximin solutions promise each other, asked of measured error rates.

Source: Hamm & Mehra 2018, Machine vs Machine, lemma 1. It holds for exact optima; players that
learned for a while may violate it, and the paper's own tables violate item 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def lemma_one(
    results: Sequence[Mapping[str, Any]], worst: str
) -> list[tuple[str, int, int, float]]:
    """Lemma 1's inequalities on measured error rates, seed by seed.

    Args:
        results: a ``method`` and ``seed`` each, the error under a fresh attacker, and for games
            with an attacker network what `agents.exploitability.exploitability` found, and
            ``game/error_fresh``, the error under a fresh attacker on all images (cells without had
            no other response than that);
            ``"minimax"`` and ``"maximin"`` are the methods that items 2, 4 and 5 are about.
        worst: key of the error under a fresh attacker.

    Returns:
        for each item: what is compared, how often it holds, of how many, and the largest
        violation.
    """
    items: dict[str, list[float]] = {  # what should be 0 or above
        "1. f(u, v*(u)) ≥ f(u, v): a fresh attacker does more than the game's own": [],
        "2. f(u*, v*(u*)) ≤ f(u, v*(u)): minimax loses least to a fresh attacker": [],
        "3. f(u*(v), v) ≤ f(u, v): a defender that responds loses less than the game's own": [],
        "4. f(u*(v*), v*) ≥ f(u*(v), v): maximin's attack does most to who responds": [],
        "5. maximin ≤ minimax: f(u*(v*), v*) ≤ f(u*, v*(u*))": [],
    }
    first, second, third, fourth, fifth = items.values()
    for seed in dict.fromkeys(r["seed"] for r in results):
        cells = {r["method"]: r for r in results if r["seed"] == seed}
        games = {name: r for name, r in cells.items() if "game/error" in r}
        first += [
            r.get("game/error_fresh", r["game/error_attacker_responds"]) - r["game/error"]
            for r in games.values()
        ]
        third += [r["game/error"] - r["game/error_defender_responds"] for r in games.values()]
        if minimax := cells.get("minimax"):
            others = (r for name, r in cells.items() if name != "minimax" and worst in r)
            second += [r[worst] - minimax[worst] for r in others]
        if maximin := games.get("maximin"):
            reached = maximin["game/error_defender_responds"]
            others = (r for name, r in games.items() if name != "maximin")
            fourth += [reached - r["game/error_defender_responds"] for r in others]
            if game := games.get("minimax"):
                fifth.append(game["game/error_attacker_responds"] - reached)
    return [
        (name, sum(v >= 0 for v in values), len(values), max(0.0, -min(values)))
        for name, values in items.items()
        if values
    ]

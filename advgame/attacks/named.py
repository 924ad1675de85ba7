"""An attack by the name that it has in evaluations, such as ``adt:pgd20``."""

from __future__ import annotations

from advgame.attacks.attack import Attack
from advgame.errors import InputError
from advgame.seeding import as_seed
from advgame.threat import Threat


def by_name(name: str, threat: Threat, seed: int = 0) -> Attack:
    """An attack of `advgame.evaluation.ATTACKS` that needs nothing but a ball.

    Args:
        name: e.g. ``"pgd20"``, ``"adt:pgd20"``, ``"aa:apgd-ce"``.
        threat: the ball.
        seed: of AutoAttack's attacks; others draw from the stream that `Attack.run` is given.

    Raises:
        InputError: there is no such name, or it needs more, or is several attacks in a row.
    """
    # the registry imports the attacks, and AutoAttack: only those who ask by name need it
    from advgame.evaluation.attacks import Context, check_attacks, make_suite

    check_attacks((name,))
    suite = make_suite(name, Context(threat, seed=as_seed(seed)))
    if len(suite) > 1:
        parts = ", ".join(f"aa:{part}" for part, _ in suite)
        raise InputError(f"{name} is several attacks in a row: take one, {parts}")
    return suite[0][1]

"""A learned attacker of any kind from its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from advgame.attacks import Attack
from advgame.errors import InputError
from advgame.threat import Threat
from agents import attacker, attnet, l2l
from agents.attacker_file import read_file

_LOADERS: dict[str, Callable[[Path], Callable[[Threat, int], Attack]]] = {
    attacker.FORMAT: attacker.load_attacker,
    l2l.FORMAT: l2l.load_l2l,
    attnet.FORMAT: attnet.load_attnet,
}


def load_any_attacker(path: Path) -> Callable[[Threat, int], Attack]:
    """What a file or run folder holds, as a function of the threat and of the query budget.

    Raises:
        InputError: missing or damaged file, or one that holds no attacker.
    """
    said = read_file(path)[0].get("format")
    if said not in _LOADERS:
        raise InputError(f"{path} is no attacker: it says {said!r}")
    return _LOADERS[said](path)

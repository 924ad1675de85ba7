"""A learned attacker of any kind from its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from advgame.attacks import Attack
from advgame.errors import InputError
from advgame.threat import Threat
from agents import adt, attacker, attnet, l2l
from agents.attacker_file import read_file

_LOADERS: dict[str, Callable[[Path], Callable[[Threat, int], Attack]]] = {
    attacker.FORMAT: attacker.load_attacker,
    l2l.FORMAT: l2l.load_l2l,
    attnet.FORMAT: attnet.load_attnet,
    adt.FORMAT: adt.load_adt,
}


def learned_name(path: Path, attack: Attack) -> str:
    """What a report calls a learned attacker: its file's or folder's name, and its samples."""
    name, draws = path.stem if path.suffix else path.name, getattr(attack, "draws", 1)
    return f"learned:{name}" + (f"-worst-of-{draws}" if draws > 1 else "")


def load_any_attacker(path: Path) -> Callable[[Threat, int], Attack]:
    """What a file or run folder holds, as a function of the threat and of the query budget.

    Raises:
        InputError: missing or damaged file, or one that holds no attacker.
    """
    said = read_file(path)[0].get("format")
    if said not in _LOADERS:
        raise InputError(f"{path} is no attacker: it says {said!r}")
    return _LOADERS[said](path)

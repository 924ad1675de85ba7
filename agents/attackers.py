"""Learned attackers of every kind from their files: `load_attacker`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from advgame.attacks import Attack
from advgame.errors import InputError
from agents import attacker, attacker_network
from agents.adt import ADTNetwork
from agents.attacker import Attacker
from agents.attacker_file import filled, read_file, reading
from agents.attacker_network import AttackerNetwork
from agents.attnet import AttNet
from agents.l2l import L2LNetwork

KINDS: dict[str, type[AttackerNetwork]] = {
    kind.file_kind: kind for kind in (L2LNetwork, ADTNetwork, AttNet)
}
# formats of files that earlier versions wrote
_FORMER: dict[str, type[AttackerNetwork]] = {
    "advgame l2l attacker 1": L2LNetwork,
    "advgame adt generator 1": ADTNetwork,
    "advgame attnet 2": AttNet,
}


def load_attacker(path: Path) -> AttackerNetwork | Attacker:
    """A trained attacker from its file, of any kind; a run folder stands for the file in it.

        attacker = load_attacker(Path("runs/NAME"))
        result = attacker.attack(Linf(8 / 255), queries=10).run(model, x, y, rng=rng)

    Returns:
        a network, or a policy over gradient steps; ``about`` says how it came about.

    Raises:
        InputError: missing or damaged file, or one that holds no attacker.
    """
    of_policy = read_file(path)[0].get("format") == attacker.FORMAT
    return attacker.load_attacker(path) if of_policy else load_network(path)


def load_network(path: Path) -> AttackerNetwork:
    """A trained attacker network from its file: see `load_attacker`.

    Raises:
        InputError: missing or damaged file, or one that holds something else.
    """
    metadata, weights = read_file(path)
    said = metadata.get("format")
    if said != attacker_network.FORMAT and said not in _FORMER:
        raise InputError(f"{path} is no attacker network: it says {said!r}")
    with reading(path):
        network = filled(_maker(metadata), weights)
        network.about = json.loads(metadata["about"])
    return network.requires_grad_(False).eval()


def _maker(metadata: Mapping[str, str]) -> Callable[[], AttackerNetwork]:
    """The network that a file's metadata describe, without its weights."""
    if metadata["format"] not in _FORMER:
        kind, named = KINDS[metadata["kind"]], json.loads(metadata["network"])
        colours, height, side = named.pop("shape")
        return lambda: kind((colours, height, side), **named)
    if "network" in metadata:
        (colours, height, side), *rest = json.loads(metadata["network"])
    else:  # L2L's
        colours, height, side = json.loads(metadata["shape"])
        rest = [int(metadata["gradients"]), metadata["width"], metadata["scaling"]]
    if rest[-1:] == ["raw"]:  # as ADT's first files ended
        raise InputError("it does not say of how many images its raw gradients were the mean")
    former = _FORMER[metadata["format"]]
    return lambda: former((colours, height, side), *rest)


def learned_name(path: Path, attack: Attack) -> str:
    """What a report calls a learned attacker: its file's or folder's name, and its samples."""
    name, draws = path.name if path.is_dir() else path.stem, getattr(attack, "draws", 1)
    return f"learned:{name}" + (f"-worst-of-{draws}" if draws > 1 else "")

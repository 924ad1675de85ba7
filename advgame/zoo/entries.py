"""The zoo's folders: names, cards, checksums, and loading. Imports no torch until it loads.

An entry ``DATASET/MODEL`` is a run folder in small, ``advgame/zoo/DATASET/MODEL/``: the run's
``config.json``, ``checkpoints/best.safetensors``, the ``report.json`` of its evaluation, and
``card.json``. So whatever takes a run folder takes ``zoo:DATASET/MODEL``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from advgame.errors import InputError, unknown
from advgame.run.files import digest, read_json
from advgame.run.folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

PREFIX = "zoo:"
HOME = Path(__file__).parent
CARD = "card.json"
_AGAIN = "install advgame again"


@dataclass(frozen=True)
class Card:
    """What is known of a classifier of the zoo; made from its run and its report, never by hand.

    Args:
        name: ``DATASET/GAME-NETWORK-seedN``.
        dataset: whose training images it learned from and whose test images judged it.
        game: what trained it.
        network: a built-in name of `advgame.make_classifier`.
        norm: of the ball.
        eps: radius of the ball, in pixels of [0, 1].
        command: that trained it.
        commit: of the source that trained it.
        selected_by: what chose the weights.
        judged: command of the evaluation.
        n: test images that were attacked.
        accuracy: attack, or ``clean`` -> share of the n images that stay right.
        autoattack_interval: low and high end of AutoAttack's 95 % interval (Wilson 1927).
        flags: names of the signs that the numbers may not hold.
        sha256: of the weights' file.
    """

    name: str
    dataset: str
    game: str
    network: str
    norm: str
    eps: float
    command: str
    commit: str
    selected_by: str
    judged: str
    n: int
    accuracy: dict[str, float]
    autoattack_interval: tuple[float, float]
    flags: tuple[str, ...]
    sha256: str

    def __str__(self) -> str:
        low, high = (100 * end for end in self.autoattack_interval)
        clean, robust = (100 * self.accuracy[one] for one in ("clean", "autoattack"))
        return (
            f"{self.name}: {self.network} on {self.dataset}, {self.game}, {self.norm} "
            f"ε = {self.eps:.4g}; of {self.n} test images clean {clean:.1f} %, AutoAttack "
            f"{robust:.1f} % ({low:.1f} – {high:.1f}); flags: {', '.join(self.flags) or 'none'}"
        )


def list() -> tuple[str, ...]:
    """The names of all classifiers, sorted."""
    found = HOME.glob(f"*/*/{CARD}")
    return tuple(sorted(path.parent.relative_to(HOME).as_posix() for path in found))


def is_zoo(what: str | Path) -> bool:
    """Whether a word of a command line names a classifier of the zoo: ``zoo:NAME``."""
    return str(what).startswith(PREFIX)


def card(name: str) -> Card:
    """The card of a classifier.

    Args:
        name: of `list`, with or without ``zoo:`` in front.

    Raises:
        InputError: no such name, or a damaged card.
    """
    path = _folder(name) / CARD
    said = read_json(path, _AGAIN)
    if said.keys() != {field.name for field in fields(Card)}:
        raise InputError(f"{path} is no card of this version: {_AGAIN}")
    low, high = said["autoattack_interval"]
    return Card(**{**said, "autoattack_interval": (low, high), "flags": tuple(said["flags"])})


def place(what: str | Path) -> Path:
    """The run folder that ``zoo:NAME`` stands for; any other word is the path that it says.

    Args:
        what: as a command line names a run or a file of weights.

    Raises:
        InputError: no such name in the zoo, or weights that are not those of the card.
    """
    if not is_zoo(what):
        return Path(what)
    folder = _folder(str(what))
    weights = RunFolder(folder).weights()
    if digest(weights) != card(str(what)).sha256:
        raise InputError(f"{weights} is damaged, its checksum is not the card's: {_AGAIN}")
    return folder


def load(name: str) -> nn.Module:
    """A classifier: images (B, C, H, W) in [0, 1] -> logits (B, K), as RobustBench's models.

    Args:
        name: of `list`, with or without ``zoo:`` in front.

    Returns:
        The network in evaluation mode, without weight gradients; ``requires_grad_(True)`` lets it
        be trained on.

    Raises:
        InputError: no such name, or weights that are not those of the card.
    """
    from advgame.targets import from_run

    return from_run(PREFIX + name.removeprefix(PREFIX)).model


def _folder(name: str) -> Path:
    known, bare = list(), name.removeprefix(PREFIX)
    if bare not in known:
        raise unknown("classifier of the zoo", bare, known)
    return HOME / bare

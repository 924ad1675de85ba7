"""What an evaluation has found so far: one cell per attack and batch, committed as it is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advgame.checkpoint import write_atomically
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.threat import Threat


@dataclass(frozen=True)
class Cell:
    """What one attack did to one batch.

    Args:
        survive: ``"1"`` or ``"0"`` per image of the batch: still classified correctly.
        largest: the largest perturbation, in the threat's norm; inf outside [0, 1].
        forwards: images passed through the classifier.
        backwards: images whose input gradient was formed.
        seconds: wall-clock.
        batch: images at a time; fewer than asked for where the memory was too small.
    """

    survive: str
    largest: float
    forwards: int
    backwards: int
    seconds: float
    batch: int


class Cells:
    """Cells by name, in memory, and in a folder if there is one.

    Args:
        folder: where they are kept; None keeps them in memory only.
        about: what they depend on; a folder with cells of anything else is refused.

    Raises:
        InputError: the folder holds cells of another evaluation, or damaged ones.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        self.folder = folder
        self._cells: dict[str, Cell] = {}
        if folder is None:
            return
        settings = folder / "settings.json"
        if settings.exists():
            if json.loads(settings.read_text()) != about:
                raise InputError(
                    f"{folder} holds an evaluation of other weights, images or settings: "
                    "choose another folder"
                )
        else:
            write_atomically(settings, json.dumps(about, indent=1))
        self.reload()

    def reload(self) -> None:
        """Read what this and other processes have written."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*/*.json")):
            name = f"{path.parent.name}/{path.stem}"
            try:
                self._cells[name] = Cell(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path} is damaged: delete it and resume") from error

    def get(self, name: str) -> Cell | None:
        """The cell ``attack/start``, if it is done."""
        return self._cells.get(name)

    def put(self, name: str, cell: Cell) -> None:
        """Keep a cell; on disk it is there whole or not at all."""
        self._cells[name] = cell
        if self.folder is not None:
            write_atomically(self.folder / f"{name}.json", json.dumps(asdict(cell)))


def fingerprint(
    model: nn.Module, data: ImageSet, threat: Threat, seed: int, batch_size: int, *more: nn.Module
) -> dict[str, Any]:
    """Everything that verdicts depend on, as plain values.

    Args:
        model: the classifier.
        data: the images.
        threat: the ball.
        seed: of the attacks.
        batch_size: images at a time.
        more: further networks that attacks make use of.
    """
    return {
        "format": 1,
        "networks": [_network(module) for module in (model, *more)],
        "images": _digest(data.images, data.labels),
        "threat": [threat.norm, float(threat.eps)],
        "seed": seed,
        "batch_size": batch_size,
    }


def describe(attack: object) -> str:
    """An attack's kind and its plain settings, in words."""
    fields = getattr(attack, "__dict__", {}).items()
    plain = {k: v for k, v in fields if isinstance(v, str | int | float | bool | tuple | Threat)}
    return f"{type(attack).__qualname__}({plain})"


def _network(module: nn.Module) -> str:
    """Architecture and weights; code that was edited behind the same names is not seen."""
    state = module.state_dict()
    shape = hashlib.sha256(f"{module!r}{list(state)}".encode()).hexdigest()
    return f"{type(module).__qualname__} {shape[:16]} {_digest(*state.values())}"


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

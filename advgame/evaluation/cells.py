"""Storage of an evaluation: a JSON file per attack and batch, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advgame.attacks.boundary import attacked
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.run.files import read_json, write_atomically
from advgame.seeding import PrivateRNG
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
        no_answer: images whose largest logit was NaN or infinite; they do not survive.
    """

    survive: str
    largest: float
    forwards: int
    backwards: int
    seconds: float
    batch: int
    no_answer: int = 0

    def __post_init__(self) -> None:
        counts = (self.forwards, self.backwards, self.batch, self.no_answer)
        if (
            not isinstance(self.survive, str)
            or set(self.survive) - {"0", "1"}
            or not all(isinstance(one, int) for one in counts)
            or not all(isinstance(one, int | float) for one in (self.largest, self.seconds))
        ):
            raise TypeError("this is not what an attack did to a batch")


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
        there = any(folder.glob("*/*.json"))  # looked at first: another process may begin just now
        if settings.exists():
            had = read_json(settings, f"delete {folder}, and it is evaluated again")
            other = other_attribute(had, about)
            if other or _without_attributes(had) != _without_attributes(about):
                raise InputError(
                    f"{folder} holds an evaluation of other weights, images or settings"
                    f"{other and f' ({other} was another)'}: choose another folder"
                )
        elif there:
            raise InputError(
                f"{settings} is lost, and with it what the cells beside it are of: "
                f"restore it, or delete {folder}, and it is evaluated again"
            )
        else:
            write_atomically(settings, json.dumps(about, indent=1))
        for path in sorted(folder.glob("*/*.json")):
            self.get(f"{path.parent.name}/{path.stem}")

    def get(self, name: str) -> Cell | None:
        """The cell ``attack/start``, if this or another process has done it.

        Raises:
            InputError: its file is damaged.
        """
        if name not in self._cells and self.folder is not None:
            path = self.folder / f"{name}.json"
            if path.exists():
                try:
                    self._cells[name] = Cell(**read_json(path, "delete it and resume"))
                except TypeError as error:
                    raise InputError(f"{path} is damaged: delete it and resume") from error
        return self._cells.get(name)

    def put(self, name: str, cell: Cell) -> None:
        """Keep a cell; on disk it is there whole or not at all."""
        self._cells[name] = cell
        if self.folder is not None:
            write_atomically(self.folder / f"{name}.json", json.dumps(asdict(cell)))


def cell_key(name: str, part: str, start: int) -> str:
    """The name of a cell, which is that of its file, without ending.

    Args:
        name: of the attack.
        part: of the suite that the attack may be.
        start: the first image of the batch.
    """
    attack, part = file_name(name), file_name(part)
    return f"{attack if part == attack else f'{attack}.{part}'}/{start:06d}"


def file_name(name: str) -> str:
    """A name as that of a file; one of own code with arguments is told apart by a checksum."""
    plain = name.replace(":", "-")
    if re.fullmatch(r"[\w. -]+", plain):
        return plain
    short = re.sub(r"[^\w.]+", "-", plain)[:60]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def as_bits(mask: Tensor) -> str:
    """Which images survive (n,), as a cell holds it."""
    return "".join("1" if bit else "0" for bit in mask.tolist())


def as_mask(bits: str) -> Tensor:
    """What `as_bits` wrote, as a bool tensor (n,)."""
    return torch.tensor([bit == "1" for bit in bits])


def fingerprint(
    model: nn.Module, data: ImageSet, threat: Threat, seed: int, batch_size: int, *more: nn.Module
) -> dict[str, Any]:
    """Everything that verdicts depend on, as plain values; see `other_attribute`.

    Args:
        model: the classifier.
        data: the images.
        threat: the ball.
        seed: of the attacks.
        batch_size: images at a time.
        more: further networks that attacks by name make use of.
    """
    return {
        "format": 3,
        "device": data.images.device.type,
        "networks": [_network(module) for module in (model, *more)],
        _ATTRIBUTES: [_attributes(module, data) for module in (model, *more)],
        "images": _digest(data.images, data.labels),
        "threat": [threat.norm, float(threat.eps)],
        "seed": seed,
        "batch_size": batch_size,
    }


_IN_WORDS = (
    *(type(None), str, bytes, int, float, complex, range, slice),
    *(re.Pattern, PurePath, torch.dtype, torch.device),
)
"""Kinds whose `repr` says all"""


def describe(value: object, above: tuple[object, ...] = ()) -> str:
    """An attack and all that it holds, in words: the same for the same settings and weights only.

    Attacks within attacks, losses, radii per image and networks are looked into, and what a loss
    has enclosed. Of a function with a name its code is not seen, of a lambda it is; of anything
    else without attributes the kind is all that is seen.

    Args:
        value: the attack, or a part of it.
        above: what it is part of: nothing is looked into within itself.
    """
    if any(value is one for one in above):
        return "itself"

    def parts(*held: object) -> list[str]:
        return [describe(one, (*above, value)) for one in held]

    if isinstance(value, _IN_WORDS):
        return repr(value)
    match value:
        case nn.Module():
            return _network(value)
        case Tensor() | np.ndarray() | np.generic():
            return _digest(torch.as_tensor(value))
        case Mapping():
            return str(parts(*value.keys(), *value.values()))
        case tuple() | list() | set() | frozenset():
            # each process has the words of a set in an order of its own
            return str((sorted if isinstance(value, Set) else list)(parts(*value)))
        case partial():
            return f"partial {parts(value.func, value.args, value.keywords)}"
        case MethodType():
            return f"method {parts(value.__func__, value.__self__)}"
        case FunctionType():
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            named = f"{value.__module__}.{value.__qualname__}"
            return f"{named} {parts(held, value.__defaults__, value.__kwdefaults__, *_body(value))}"
        case type():
            return f"{value.__module__}.{value.__qualname__}"
    return str(parts(type(value), getattr(value, "__dict__", None), *_slots(value)))


def _body(function: FunctionType) -> tuple[object, ...]:
    """What somebody's lambda does, as it is compiled: lambdas are all called alike.

    Ours are told apart by where they stand, so that folders go on under another Python.
    """
    ours = str(function.__module__).split(".")[0] in ("advgame", "agents", "envs")
    return () if ours or function.__name__ != "<lambda>" else _compiled(function.__code__)


def _compiled(code: CodeType) -> tuple[object, ...]:
    inner = (_compiled(one) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.co_code, code.co_names, tuple(inner)


def _slots(value: object) -> tuple[object, ...]:
    """What its class keeps in ``__slots__`` and in no ``__dict__``, by name; () where nothing."""
    state = object.__getstate__(value)
    return state[1:] if isinstance(state, tuple) else ()


def _network(module: nn.Module) -> str:
    """Architecture and weights; code that was edited behind the same names is not seen."""
    state = module.state_dict()
    shape = hashlib.sha256(f"{module!r}{list(state)}".encode()).hexdigest()
    # quantised modules keep their weights packed, others what they like
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    rest = [describe(value) for value in state.values() if not isinstance(value, Tensor)]
    more = f" {rest}" if rest else ""
    return f"{type(module).__qualname__} {shape[:16]} {_digest(*tensors)}{more}"


_ATTRIBUTES = "attributes"
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


def other_attribute(had: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The name of an attribute of a network that two `fingerprint` know, and not alike; or "".

    One that only one of them knows says nothing: folders of earlier versions know none, and what a
    network makes at its first forward is there from then on.

    Args:
        had: what a folder has noted.
        now: of the networks that are there.
    """
    pairs = zip(had.get(_ATTRIBUTES, ()), now.get(_ATTRIBUTES, ()), strict=False)
    for before, after in pairs:
        for name in before.keys() & after.keys():
            if before[name] != after[name]:
                return str(name)
    return ""


def _without_attributes(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != _ATTRIBUTES}


def _attributes(module: nn.Module, data: ImageSet) -> dict[str, str]:
    """What a network's own code may look at beside its weights: plain values and hidden buffers.

    A noise's σ, a number of bits, a mean: none is in the weights. What a forward of two images
    changes, such as a counter, is no setting and left out.

    Args:
        module: any network.
        data: images for it, where it is.
    """
    before = dict(_settings_in(module))
    own = PrivateRNG(0, data.images.device)
    with own, attacked(module), torch.no_grad():
        module(data.subset(slice(2)).floats())
    after = dict(_settings_in(module))
    return {name: value for name, value in before.items() if after.get(name) == value}


def _settings_in(module: nn.Module) -> Iterator[tuple[str, str]]:
    torchs_own = vars(nn.Module()).keys()
    for path, part in module.named_modules():
        name = f"{path}." if path else ""
        hidden: set[str] = getattr(part, "_non_persistent_buffers_set", set())
        for key, buffer in part.named_buffers(recurse=False):
            if key in hidden:
                yield name + key, describe(buffer)
        if type(part).__module__.split(".")[0] == "torch":
            continue  # its settings are in its words
        for key, value in vars(part).items():
            if key not in torchs_own and _is_plain(value):
                yield name + key, describe(value)


def _is_plain(value: object) -> bool:
    """Whether it is a number, a name, a tensor, a function, or made of such; no place or device."""
    match value:
        case nn.Module():
            return False
        case str():
            return "/" not in value and "\\" not in value and not _DEVICE.fullmatch(value)
        case bool() | int() | float() | Tensor() | np.ndarray() | np.generic() | torch.dtype():
            return True
        case FunctionType():
            return True
        case Mapping():
            return all(map(_is_plain, (*value.keys(), *value.values())))
        case tuple() | list() | set() | frozenset():
            return all(map(_is_plain, value))
    return value is None


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

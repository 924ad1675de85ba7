"""Weights files of any make: safetensors, and what ``torch.save`` wrote, of ours and published.

No code of a file runs: of a pickle only tensors and plain containers are made, anything else in it
becomes an empty stand-in.
"""

from __future__ import annotations

import difflib
import pickle
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from advgame.classifiers.layouts import SPARE, guess, layout_of, ours, unwrapped
from advgame.errors import InputError

Shape = tuple[int, ...]
State = dict[str, Tensor]
# where checkpoints keep a network's weights, the first of them that fit best
_PLACES = ("state_dict", "model_state_dict", "net", "model", "network", "ema", "best", "last")
_NEAR = 5
_NORMALISING = ("mean", "std", "mu", "sigma", "new_mean", "new_std")


class _StandIn:
    """In place of whatever a checkpoint holds besides tensors and containers."""

    def __init__(self, *args: object) -> None:
        pass

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError),
    TypeError,  # torch 2.8, of a stand-in that is used as a dict
    zipfile.BadZipFile,
)


def read_states(path: Path) -> dict[str, State]:
    """The state dicts of a file, by the place in which each lies; "" is the file itself.

    Args:
        path: safetensors, or of ``torch.save``; the file's beginning tells which.

    Raises:
        InputError: no such file, a damaged one, or one that holds no weights; in one line.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, and neither a run's nor a file of weights")
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    try:
        # a header's length may begin as a zip or a pickle does, which have no "{" behind it
        length = int.from_bytes(head[:8], "little")
        ours = head[8:] == b"{" and length < path.stat().st_size
        if ours or (head[:2] != b"PK" and head[:1] != b"\x80"):
            return {"": safetensors.torch.load_file(path)}
        with warnings.catch_warnings():  # of files that are old or of another kind
            warnings.simplefilter("ignore")
            found = _of_zip(path) if head[:2] == b"PK" else _loaded(path)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is not a safetensors file of weights, nor one of torch.save ({error})"
        ) from error
    except _UNREADABLE as e:
        raise InputError(f"{path} {_refusal(e)}") from e
    if isinstance(found, _StandIn):
        raise InputError(f"{path} {_WHOLE}")
    states = dict(_states(found))
    if not states:
        raise InputError(
            f"{path} holds no weights: none of its tensors has a name, as in "
            "torch.save(net.state_dict(), path)"
        )
    return states


_WHOLE = (
    "holds a whole pickled object, which would run code: where you trust it, save its weights "
    "once, torch.save(torch.load(path, weights_only=False).state_dict(), new_path)"
)


def _refusal(error: Exception) -> str:
    """Why a file of torch.save is not read, in words."""
    said = str(error)
    if "TorchScript" in said:
        return (
            "is a TorchScript program: save its weights once, "
            "torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    if "is blocked" in said or "Unsupported global" in said:
        name = said.split("GLOBAL ", 1)[-1].split()[0]
        return f"{_WHOLE} (it names {name})"
    if _StandIn.__name__ in said:
        return (
            "holds an object of a class of its own beside the weights, e.g. a dict's subclass with "
            "settings, which is not made: where you trust it, save the weights alone once, e.g. "
            "torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"
        )
    line = (said.splitlines() or [type(error).__name__])[0].split(". ")[0]
    return f"cannot be read as weights, it is damaged or of another kind ({line[:150]})"


def _of_zip(path: Path) -> Any:
    """What ``torch.save`` wrote; a zip file of another origin or with damaged parts is refused."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("TorchScript")
        packed = [one for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED]
        if packed or not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise ValueError("a zip file, but no checkpoint of torch.save")
        if broken := archive.testzip():
            raise ValueError(f"{broken} in it has another checksum than it was written with")
    odd = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_StandIn, name) for name in odd]):
        found = _loaded(path)
    if odd and not isinstance(found, _StandIn):
        print(f"note: {path} also holds {', '.join(sorted(odd))}: passed over", file=sys.stderr)
    return found


def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def _states(found: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """The state dicts within, those of the usual places first."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        return
    inner = list[tuple[str, State]]()
    if depth < 2:
        for name in sorted(found, key=lambda one: _PLACES.index(one) if one in _PLACES else 99):
            if not name.startswith(("optim", "sched")):
                inner += _states(found[name], f"{place}.{name}".strip("."), depth + 1)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if tensors and not inner:
        inner = [(place, tensors)]
    yield from inner


def load_into(module: nn.Module, path: str | Path, name: str = "") -> None:
    """Fill a network with the weights of a file, whatever wrote it.

    Args:
        module: any network; a layer of its own that normalises images keeps its numbers where the
            file has none.
        path: of the file.
        name: of the network, for messages; its class when empty.

    Raises:
        InputError: the file cannot be read, or is of another network.
    """
    path = Path(path)
    named = name or type(module).__name__
    state = fitting(read_states(path), shapes(module), path, named, learned(module))
    fill(module, state)


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `fitting` found; what the file has not stays as it is."""
    own = {name: value for name, value in module.state_dict().items() if name not in state}
    module.load_state_dict({**own, **state})


def shapes(module: nn.Module) -> dict[str, Shape]:
    """Names of a network's weights -> their shapes."""
    return {
        name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def learned(module: nn.Module) -> set[str]:
    """Names of the weights that a training changes."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, weight in named if weight.requires_grad}


def fitting(
    states: Mapping[str, State],
    wanted: Mapping[str, Shape],
    path: Path,
    name: str,
    learned: Collection[str],
) -> State:
    """The weights of a network, by its own names.

    Args:
        states: what `read_states` found.
        wanted: the network's names and shapes.
        path: the file, for messages.
        name: the network's name, for messages.
        learned: those of ``wanted`` that a training changes: the file must have them.

    Raises:
        InputError: what does not fit, in one line, with the nearest names.
    """
    tried = [
        (place, renamed)
        for place, state in states.items()
        for renamed in _renamings(state, wanted, name)
    ]
    best = max(tried, key=lambda one: _fits(one[1], wanted))  # of equal ones the first
    places = dict.fromkeys(at for at, one in tried if _fits(one, wanted) == _fits(best[1], wanted))
    if len(places) > 1:
        others = ", ".join(list(places)[1:])
        print(f"note: {path}: the weights in {best[0]} are taken, not {others}", file=sys.stderr)
    found = {
        key: value.reshape(wanted[key])
        if key.startswith("normalise.") and key in wanted and value.numel() == _size(wanted[key])
        else value
        for key, value in best[1].items()
    }
    found = {key: value for key, value in found.items() if key in wanted or not _spare(key)}
    missing = [
        key for key in wanted if key not in found and (key in learned or not _own(key, found))
    ]
    odd = [key for key in found if key not in wanted]
    other = [key for key in found if key in wanted and tuple(found[key].shape) != wanted[key]]
    if not missing and not odd and not other:
        return found
    held = {key: tuple(value.shape) for key, value in states[best[0]].items()}
    looks = guess({bare: held[key] for key, bare in unwrapped(held).items()})
    hint = f"; it looks like --model {looks}" if looks and looks != name else ""
    right = len(found) - len(odd) - len(other)
    raise InputError(
        f"{path} does not hold this network's weights: {right} of its {len(held)} keys fit "
        f"{name}, which has {len(wanted)}; {_told(found, wanted, missing, odd, other, name)}{hint}"
    )


def _told(
    found: State,
    wanted: Mapping[str, Shape],
    missing: list[str],
    odd: list[str],
    other: list[str],
    name: str,
) -> str:
    """The first thing that does not fit, in words."""
    if odd:
        near = difflib.get_close_matches(odd[0], list(wanted), _NEAR, 0.0)
        return f"the file has {odd[0]}; nearest in {name}: {', '.join(near)}"
    if missing:
        near = difflib.get_close_matches(missing[0], list(found), _NEAR, 0.0)
        return f"the file lacks {missing[0]}; nearest in it: {', '.join(near)}"
    *_, last = wanted
    there, here = (tuple(found[other[0]].shape), wanted[other[0]])
    heads = {last.rpartition(".")[0] + end for end in (".weight", ".bias")}
    if set(other) <= heads and len(there) == len(here):
        return f"the file is for {there[0]} classes, the network here for {here[0]}"
    if len(other) == 1 and len(there) == len(here) == 4 and there[1] != here[1]:
        return f"the file is for images of {there[1]} channel(s), the network here for {here[1]}"
    return f"{other[0]} is {there} in the file and {here} in {name}"


def _renamings(state: State, wanted: Mapping[str, Shape], name: str) -> Iterator[dict[str, Tensor]]:
    """A state dict under its own names, without wrappers, and as ours names the same parts."""
    yield state
    bare = unwrapped(state)
    plain = {new: state[old] for old, new in bare.items()}
    yield plain
    if "stem.weight" in wanted:
        if (layout_of(plain) == "deepmind") == name.endswith("-swish"):  # another function
            table = ours(plain, wanted)
            yield {table[key]: value for key, value in plain.items()}
        return
    # the network here may be wrapped: nn.Sequential(Normalise(...), net) has "1." in front
    for key in wanted if plain else ():
        if key.endswith("." + (first := next(iter(plain)))):
            placed = {key.removesuffix(first) + one: value for one, value in plain.items()}
            if all(wanted.get(one) == tuple(value.shape) for one, value in placed.items()):
                yield placed


def _fits(found: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> tuple[int, int]:
    """How many names and shapes fit, then how few do not."""
    right = sum(wanted.get(key) == tuple(value.shape) for key, value in found.items())
    named = sum(key in wanted for key in found)
    return right + named, -len(found)


def _own(key: str, found: Collection[str]) -> bool:
    """Whether a network's own number may stay: a normalisation of which the file has nothing."""
    layer, dot, last = key.rpartition(".")
    if last in _NORMALISING:
        return not any(layer + dot + other in found for other in _NORMALISING)
    return last == "num_batches_tracked"


def _spare(key: str) -> bool:
    return key.endswith("num_batches_tracked") or SPARE.fullmatch(key) is not None


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())

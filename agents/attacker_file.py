"""Attackers in safetensors files: weights, and in the metadata what they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.run.files import write_atomically

ModuleT = TypeVar("ModuleT", bound=nn.Module)
NAME = "attacker.safetensors"
"""Of the file in a run folder."""


def write_file(path: Path, module: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all."""
    weights = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    write_atomically(path, safetensors.torch.save(weights, dict(metadata)))


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and weights; a run folder stands for its attacker.safetensors.

    Raises:
        InputError: missing or damaged file, or weights that are NaN or infinite.
    """
    path = path / NAME if path.is_dir() else path
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise InputError(
            f"no attacker file {path}: ADT-EXP and games without a network leave none "
            "(--attacks adt:exp-worst-of-10 is ADT-EXP's)"
        ) from error
    except (safetensors.SafetensorError, OSError) as error:
        if path.suffix == ".zip":
            raise InputError(
                f"{path} is no attacker of this package: opening an agent of Stable-Baselines3 "
                f"runs code, so ask for it by --attacks \"agents:SB3Attack('{path}')\""
            ) from error
        raise InputError(f"{path} is not a safetensors file ({error})") from error
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise InputError(f"{path} cannot attack: its weights {broken[0]} are NaN or infinite")
    return metadata, weights


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, metadata that cannot be understood are a damaged file.

    Raises:
        InputError: what was wrong.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or of another version ({reason})") from error


def filled(make: Callable[[], ModuleT], weights: Mapping[str, Tensor]) -> ModuleT:
    """A network with the weights of a file; it takes memory only once they are found to fit.

    Args:
        make: the network, of the sizes that the file's metadata say.
        weights: name -> tensor.

    Raises:
        InputError: weights of another network.
    """
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in make().state_dict().items()}
    held = {name: value.shape for name, value in weights.items()}
    if wanted != held:
        odd = min(n for n in wanted.keys() | held.keys() if wanted.get(n) != held.get(n))
        raise InputError(f"its weights {odd} are not those of the network that it names")
    module = make()
    module.load_state_dict(weights)
    return module

"""Checkpoints that survive a kill at any moment, and load without running code.

A checkpoint is a folder ``step_00000123``: modules as safetensors, everything else in
``state.pt`` (plain containers, numbers and tensors, read back with ``weights_only=True``), files
of the run that belong to that step, and ``manifest.json`` with the SHA-256 of every file. It is
written under another name and renamed when complete, so that a folder of that name is whole or
does not exist.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from advgame.classifiers.foreign import weights
from advgame.errors import InputError
from advgame.run.files import UMASK, digest, link_or_copy, read_json, sync, write_atomically

FORMAT = 1


def save_weights(module: nn.Module, path: Path) -> None:
    """Parameters and buffers as safetensors, atomically.

    A module that has ``file_metadata``, words by name, has them in its file.

    Raises:
        InputError: a state that safetensors cannot hold, see
            `advgame.classifiers.foreign.check_savable`.
    """
    metadata: dict[str, str] | None = getattr(module, "file_metadata", None)
    packed = safetensors.torch.save(weights(module), metadata)
    write_atomically(path, packed if metadata is None else _in_order(packed, metadata))


def _in_order(packed: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with its words in one order, as safetensors has them in any: same bits."""
    size = int.from_bytes(packed[:8], "little")
    header = {**json.loads(packed[8 : 8 + size]), "__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + packed[8 + size :]


def load_weights(module: nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote.

    Raises:
        InputError: missing or damaged file, or weights of another network.
    """
    try:
        module.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"no weights file {path}") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{path} does not hold this network's weights ({reason})") from error


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first one is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        state: Mapping[str, Any],
        rank: int = 0,
        files: Collection[Path] = (),
    ) -> Path:
        """Write one checkpoint; the older ones stay usable whatever happens.

        Args:
            step: training step, part of the name.
            modules: saved as ``<name>.safetensors``.
            state: containers, numbers and tensors.
            rank: with several processes each rank writes its own state under the same step.
            files: of the run as they are now, kept under their names; they must be replaced later,
                not changed in place, since the checkpoint may hold links to them.

        Raises:
            OSError: disk full or not writable.
        """
        final = self.folder / f"step_{step:08d}{f'.rank{rank}' if rank else ''}"
        partial: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(".partial", f".{final.name}.", self.folder))
            partial.chmod(0o777 & ~UMASK)
            for name, module in modules.items():
                save_weights(module, partial / f"{name}.safetensors")
            for path in files:
                link_or_copy(path, partial / path.name)
            with (partial / "state.pt").open("wb") as file:
                torch.save(dict(state), file)
            sync(partial / "state.pt")
            digests = {file.name: digest(file) for file in sorted(partial.iterdir())}
            manifest = {"format": FORMAT, "step": step, "sha256": digests}
            write_atomically(partial / "manifest.json", json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync(self.folder)
        except BaseException as error:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError):  # torch reports a failed write as such
                raise OSError(f"checkpoint {final.name} could not be written: {error}") from error
            raise
        self._forget_old(step, rank)
        return final

    def _steps(self, rank: int) -> list[Path]:
        suffix = f".rank{rank}" if rank else ""
        return sorted(self.folder.glob(f"step_{'[0-9]' * 8}{suffix}"))

    def reached(self) -> int | None:
        """The step of the newest checkpoint, whole or not; None where there is none."""
        return max(map(step_of, self._steps(0)), default=None)

    def _forget_old(self, step: int, rank: int) -> None:
        """Keep the newest; what is no checkpoint, or is of later steps, takes nobody's place."""
        known = [path for path in self._steps(rank) if step_of(path) <= step]
        kept = [path for path in known if _manifest(path)][-self.keep :]
        for path in known:
            if path < kept[0]:
                shutil.rmtree(path, ignore_errors=True)

    def newest(self, rank: int = 0, at_most: int | None = None) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each newer one that is not.

        Args:
            rank: of which process.
            at_most: ignore checkpoints of later steps.

        Raises:
            InputError: there are checkpoints and none is whole, or the newest one was written by
                an incompatible version.
        """
        complaints: list[str] = []
        for path in reversed(self._steps(rank)):
            if at_most is not None and step_of(path) > at_most:
                continue
            problem = _problem(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path} is damaged ({problem}): going back to the one before")
        if complaints:
            raise InputError(
                f"no checkpoint in {self.folder} is whole ({complaints[0]}): "
                "restore one from a backup, or start a new run"
            )
        return None, []

    @staticmethod
    def load(path: Path, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Fill the modules and return the state of a checkpoint that `newest` found whole.

        Raises:
            InputError: it is of other modules, or holds more than containers, numbers and tensors.
        """
        for name, module in modules.items():
            load_weights(module, path / f"{name}.safetensors")
        try:
            state: dict[str, Any] = torch.load(
                path / "state.pt", weights_only=True, map_location="cpu", mmap=True
            )
        except (pickle.UnpicklingError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}/state.pt is not what a run wrote ({reason})") from error
        return state


def step_of(path: Path) -> int:
    """The training step in a checkpoint's name."""
    return int(path.name[5:13])


def _manifest(path: Path) -> dict[str, Any]:
    """Of a checkpoint folder; empty where there is none that can be read."""
    try:
        found: dict[str, Any] = read_json(path / "manifest.json")
    except InputError:
        return {}
    return found


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None.

    Raises:
        InputError: it was written by an incompatible version.
    """
    manifest = _manifest(path)
    digests = manifest.get("sha256")
    if not isinstance(digests, dict):
        return "no readable manifest.json"
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {manifest.get('format')}, this version reads {FORMAT}: "
            "resume with the version of advgame that wrote it"
        )
    if manifest.get("step") != step_of(path) or "state.pt" not in digests:
        return "manifest.json is of another checkpoint"
    for name, written in digests.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if digest(file) != written:
            return f"{name} does not match its checksum"
    return None

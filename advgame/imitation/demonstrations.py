"""What an expert did: trajectories to imitate, their files, and those that ship with the package.

Observations are as the environment gives them; scaling, subsampling and padding are the
learner's business.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.imitation.layouts import HDF5, Episodes, fitting, layout_of, read_hdf5
from advgame.run.files import write_atomically

_SHIPPED = Path(__file__).parent
_UNPACKED = 2**28  # bytes; what unpacks to more must fill a twentieth of that in its file
_TENSORS = ("observations", "actions", "lengths", "returns", "terminated")


@dataclass(frozen=True)
class Demonstrations:
    """Trajectories of an expert, one after the other.

    Args:
        observations: float32 (N, d), what the expert saw before each of its N actions.
        actions: int64 (N,) of a discrete task, float32 (N, k) of a continuous one.
        lengths: int64 (T,), transitions of each trajectory, 1 or more; they sum to N.
        returns: float64 (T,), the true returns without discount; all NaN where none is known.
        terminated: bool (T,), whether the task ended the trajectory; its time limit did otherwise.
        env_id: Gymnasium's name of the task.

    Raises:
        InputError: other types or shapes, or numbers that are not finite.
    """

    observations: Tensor
    actions: Tensor
    lengths: Tensor
    returns: Tensor
    terminated: Tensor
    env_id: str

    def __post_init__(self) -> None:
        trajectories = self.lengths.shape
        continuous = self.actions.is_floating_point()
        _check("observations", self.observations, torch.float32, 2)
        _check("actions", self.actions, *((torch.float32, 2) if continuous else (torch.int64, 1)))
        _check("lengths", self.lengths, torch.int64, 1)
        numbers = self.returns if self.paid else torch.zeros_like(self.returns)
        _check("returns", numbers, torch.float64, 1)
        _check("terminated", self.terminated, torch.bool, 1)
        if self.returns.shape != trajectories or self.terminated.shape != trajectories:
            raise InputError(
                f"lengths, returns and terminated must have one entry per trajectory, not "
                f"{len(self.lengths)}, {len(self.returns)} and {len(self.terminated)}"
            )
        total, shortest, longest = len(self.observations), self.lengths.min(), self.lengths.max()
        # one that is too long alone could make the sum wrap around to the right one
        if shortest < 1 or longest > total or int(self.lengths.sum()) != total:
            raise InputError(
                f"lengths must be 1 or more and sum to the {total} observations, not "
                f"{sum(self.lengths.tolist())} in lengths from {shortest} to {longest}"
            )
        if len(self.actions) != total:
            raise InputError(f"{total} observations need as many actions, not {len(self.actions)}")
        if not continuous and int(self.actions.min()) < 0:
            raise InputError(f"actions count from 0, found {int(self.actions.min())}")
        if not self.env_id:
            raise InputError("env_id must name the task, e.g. CartPole-v1")

    def __len__(self) -> int:
        """T, how many trajectories there are."""
        return len(self.lengths)

    @property
    def paid(self) -> bool:
        """Whether the recording holds rewards, so that returns are known."""
        return not bool(self.returns.isnan().all())

    def trajectory(self, index: int) -> tuple[Tensor, Tensor]:
        """Observations (n, d) and actions (n,) or (n, k) of one trajectory.

        Raises:
            InputError: no such trajectory.
        """
        if not 0 <= index < len(self):
            raise InputError(f"trajectory must lie in 0..{len(self) - 1}, not {index}")
        start = int(self.lengths[:index].sum())
        here = slice(start, start + int(self.lengths[index]))
        return self.observations[here], self.actions[here]

    def subset(self, trajectories: int) -> Demonstrations:
        """The first so many trajectories.

        Raises:
            InputError: none, or more than there are.
        """
        if not 1 <= trajectories <= len(self):
            raise InputError(
                f"there are {len(self)} demonstrations of {self.env_id}: ask for 1..{len(self)} "
                f"(--trajectories), not {trajectories}"
            )
        total = int(self.lengths[:trajectories].sum())
        return Demonstrations(
            self.observations[:total],
            self.actions[:total],
            self.lengths[:trajectories],
            self.returns[:trajectories],
            self.terminated[:trajectories],
            self.env_id,
        )

    def as_module(self) -> nn.Module:
        """The tensors as buffers, so that `advgame.classifiers.foreign.weights_digest` takes them.

        Their digest does not depend on the layout or on the name of a file.
        """
        module = nn.Module()
        for name in _TENSORS:
            module.register_buffer(name, getattr(self, name))
        return module

    def save(self, path: Path | str) -> None:
        """Write a NumPy archive, atomically; equal demonstrations become equal bytes.

        Raises:
            InputError: a name that does not end in .npz.
            OSError: disk full or not writable.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(f"demonstrations go into .npz files, not {path.name}")
        arrays = {name: getattr(self, name).cpu().numpy() for name in _TENSORS}
        file = io.BytesIO()
        np.savez_compressed(file, env_id=np.array(self.env_id), **arrays)
        write_atomically(path, file.getvalue())

    @staticmethod
    def load(
        path: Path | str, env_id: str | None = None, action_space: spaces.Space[Any] | None = None
    ) -> Demonstrations:
        """Read what `save` wrote, or a file of D4RL, `imitation` or Minari; nothing runs as code.

        An episode that does not end in the file is left out, with a note on stderr.

        Args:
            path: an .npz file. Besides our own keys those of D4RL (``observations``, ``actions``,
                ``rewards``, ``terminals``, ``timeouts``) and of `imitation` (``obs``, ``acts``,
                ``rews``, ``terminal``, ``indices``, or transitions with ``dones``) are read;
                without rewards the returns are NaN. Where h5py is installed an .hdf5 of D4RL or
                Minari, too.
            env_id: the task, which the others' files do not name; ours must be of it.
            action_space: the task's. Actions must be in it; numbers such as 1.0 are choices where
                it is discrete. Without it integers are choices.

        Raises:
            InputError: missing or damaged file, no demonstrations in it, or none of this task.
        """
        path = Path(path)
        try:
            held = read_hdf5(path, _limit(path)) if path.suffix in HDF5 else _read(path)
        except FileNotFoundError as error:
            raise InputError(f"no demonstrations file {path}") from error
        except InputError as error:
            said = str(error)
            raise InputError(said if said.startswith(str(path)) else f"{path}: {said}") from error
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            kind = "HDF5" if path.suffix in HDF5 else ".npz without pickle"
            raise InputError(f"{path} cannot be read as {kind}: {error}") from error
        if isinstance(held, Episodes):
            if env_id is None:
                raise InputError(f"{path} does not name its task: give env_id, e.g. CartPole-v1")
            arrays: dict[str, Any] = {name: getattr(held, name) for name in _TENSORS}
            if held.left_out:
                total = len(held.observations) + held.left_out
                print(
                    f"note: {path}: {held.left_out:,} of {total:,} transitions are left out, of "
                    "episodes that do not end in it",
                    file=sys.stderr,
                )
        else:
            arrays = held
            written = arrays.pop("env_id")
            if written.dtype.kind != "U" or written.ndim:
                raise InputError(f"{path}: env_id must be one string, not {written.dtype}")
            named = str(written)
            # the module that Gymnasium imports before a task is no part of its name
            if env_id is not None and env_id.rpartition(":")[2] != named.rpartition(":")[2]:
                raise InputError(f"{path} holds demonstrations of {named}, not of {env_id}")
            env_id = named
        try:
            if isinstance(held, Episodes) or action_space is not None:
                both = arrays["observations"], arrays["actions"]
                arrays["observations"], arrays["actions"] = fitting(*both, action_space)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return Demonstrations(**tensors, env_id=env_id)
        except (ValueError, TypeError) as error:  # torch has no strings and no swapped bytes
            raise InputError(f"{path}: {error}") from error


def slug(env_id: str) -> str:
    """The task's name as a file name: ``CartPole-v1`` -> ``cartpole_v1``."""
    return re.sub(r"\W+", "_", env_id).lower()


def provenance(env_id: str) -> dict[str, Any]:
    """How the demonstrations that come with the package were made, and how good the expert is.

    Raises:
        InputError: there are none of this task.
    """
    about = {one["env_id"]: one for one in map(_json, sorted(_SHIPPED.glob("*.json")))}
    if env_id not in about:
        raise InputError(
            f"no demonstrations of {env_id!r} come with the package, only of {', '.join(about)}: "
            "record your own policy, docs/imitation.md, Demonstrations, and give the file"
        )
    return about[env_id]


def shipped(env_id: str) -> Demonstrations:
    """The demonstrations that come with the package.

    Raises:
        InputError: there are none of this task.
    """
    provenance(env_id)
    return Demonstrations.load(_SHIPPED / f"{slug(env_id)}.npz")


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _limit(path: Path) -> int:
    """Bytes that a file may unpack to."""
    return max(_UNPACKED, 20 * path.stat().st_size)


def _read(path: Path) -> Episodes | dict[str, Any]:
    """The episodes of another project's archive, or the arrays of ours.

    What they say of their size is compared before memory is taken.

    Raises:
        InputError: an archive of something else.
        ValueError: an array is not of the size that it says, or would unpack to far more than its
            file has.
        OSError, RuntimeError, zipfile.BadZipFile, zlib.error: no archive, or a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        own = [field.name for field in fields(Demonstrations)]
        layout = layout_of(held, own)
        wanted = own
        if layout is not None:
            wanted = [*layout.keys, *(name for name in layout.more if name in held)]
        members = [archive.getinfo(f"{name}.npy") for name in wanted]
        packed, unpacked = path.stat().st_size, sum(one.file_size for one in members)
        if unpacked > _limit(path):
            raise ValueError(f"its {packed:,} bytes would unpack to {unpacked:,}")
        for one in members:
            if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{one.filename} is not packed as NumPy does")
            with archive.open(one) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{one.filename} is no plain array")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype.hasobject:
                    raise ValueError(
                        f"{one.filename} holds Python objects, a pickle: save numbers, "
                        "e.g. numpy.asarray(values, numpy.float32)"
                    )
                if file.tell() + math.prod(shape) * dtype.itemsize != one.file_size:
                    raise ValueError(f"{one.filename} does not hold the {shape} that it says")
        arrays = {
            one.filename.removesuffix(".npy"): np.lib.format.read_array(archive.open(one))
            for one in members
        }
    return arrays if layout is None else layout.split(arrays)


def _check(name: str, values: Tensor, dtype: torch.dtype, dimensions: int) -> None:
    """Refuse another type, other dimensions, nothing at all, NaN and infinity."""
    if values.dtype != dtype or values.dim() != dimensions or values.numel() == 0:
        raise InputError(
            f"{name} must be non-empty {dtype} with {dimensions} dimension(s), not "
            f"{tuple(values.shape)} of {values.dtype}"
        )
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} contain NaN or infinity")

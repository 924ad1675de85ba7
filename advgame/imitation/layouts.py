"""Demonstrations of other projects: arrays of D4RL, `imitation` and Minari, split into episodes.

Each layout is a table of arrays that are known by their keys. Nothing here opens a pickle: `infos`,
an array of objects, is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from advgame.errors import InputError

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
HDF5 = (".hdf5", ".h5")


@dataclass(frozen=True)
class Episodes:
    """Whole episodes, one after the other.

    Args:
        observations: (N, d), before each action.
        actions: (N,) or (N, k).
        lengths: (T,), transitions of each.
        returns: (T,), sums of the rewards; NaN where the file has none.
        terminated: bool (T,), ended by the task and not by its time limit.
        left_out: transitions of episodes that do not end in the file.
    """

    observations: Array
    actions: Array
    lengths: Array
    returns: Array
    terminated: Array
    left_out: int


@dataclass(frozen=True)
class Layout:
    """How one project keeps demonstrations.

    Args:
        whose: the project.
        keys: arrays that there must be.
        more: arrays that are read where there are any.
        split: episodes of them.
    """

    whose: str
    keys: tuple[str, ...]
    more: tuple[str, ...]
    split: Callable[[Arrays], Episodes]


def _steps(
    observations: Array, actions: Array, rewards: Array | None, over: Array, cut: Array
) -> Episodes:
    """Of one row per transition: an episode ends where the task is over, or is cut off."""
    if rewards is None:  # `imitation` and experts in the field often have none
        rewards = np.full(len(observations), np.nan)
    numbers = {"actions": actions, "rewards": rewards, "ends": over, "time limits": cut}
    for name, one in numbers.items():
        if one.shape[:1] != observations.shape[:1] or one.size == 0:
            raise InputError(f"{len(observations)} observations and {len(one)} {name} do not fit")
    is_over: Array = np.asarray(over.reshape(len(over), -1).astype(bool).any(1))
    ends = np.flatnonzero(is_over | cut.reshape(len(cut), -1).astype(bool).any(1))
    if not len(ends):
        raise InputError(
            "no episode ends in it: terminals, timeouts or dones are 0 everywhere; set timeouts "
            "to 1 where an episode reaches its time limit"
        )
    kept, lengths = ends[-1] + 1, np.diff(ends, prepend=-1)
    starts = ends + 1 - lengths
    paid = np.add.reduceat(rewards[:kept].astype(np.float64).reshape(kept, -1).sum(1), starts)
    return Episodes(
        observations[:kept],
        actions[:kept],
        lengths,
        paid,
        is_over[ends],
        len(observations) - int(kept),
    )


def _d4rl(arrays: Arrays) -> Episodes:
    over = arrays["terminals"]
    cut = arrays.get("timeouts", np.zeros_like(over))
    return _steps(arrays["observations"], arrays["actions"], arrays.get("rewards"), over, cut)


def _transitions(arrays: Arrays) -> Episodes:
    over = arrays["dones"]
    return _steps(arrays["obs"], arrays["acts"], arrays.get("rews"), over, np.zeros_like(over))


def _trajectories(arrays: Arrays) -> Episodes:
    """Of `imitation`: one observation more than actions in each, ``indices`` cut the actions."""
    seen, acted, paid = arrays["obs"], arrays["acts"], arrays.get("rews")
    whole = np.atleast_1d(arrays["terminal"]).astype(bool)
    cuts = np.atleast_1d(arrays.get("indices", np.zeros(0))).astype(np.int64)
    bounds = np.concatenate([[0], cuts, [len(acted)]])
    lengths = np.diff(bounds)
    if len(lengths) != len(whole) or lengths.min() < 1 or len(seen) != len(acted) + len(whole):
        raise InputError(
            f"{len(seen)} obs, {len(acted)} acts, {len(cuts)} indices and {len(whole)} terminal do "
            "not fit: a trajectory of n acts has n + 1 obs, and indices has one entry less than "
            "there are trajectories"
        )
    # the last observation of each trajectory is followed by no action
    before = np.delete(seen, bounds[1:] + np.arange(len(whole)), axis=0)
    ends = np.zeros(len(acted), bool)
    ends[bounds[1:] - 1] = True
    found = _steps(before, acted, paid, ends, np.zeros_like(ends))
    if not whole.any():
        raise InputError(
            "no trajectory ends in it: terminal is False for all of them; `imitation` sets it to "
            "True where an episode is over, also by its time limit"
        )
    rows = np.repeat(whole, lengths)
    return Episodes(
        found.observations[rows],
        found.actions[rows],
        lengths[whole],
        found.returns[whole],
        np.ones(int(whole.sum()), bool),
        int((~rows).sum()),
    )


D4RL = Layout("D4RL's", ("observations", "actions", "terminals"), ("rewards", "timeouts"), _d4rl)
LAYOUTS = (
    D4RL,
    Layout("imitation's", ("obs", "acts", "terminal"), ("rews", "indices"), _trajectories),
    Layout("imitation's transitions", ("obs", "acts", "dones"), ("rews",), _transitions),
)


def layout_of(names: Sequence[str], own: Sequence[str]) -> Layout | None:
    """Which layout an archive has; None is our own.

    Args:
        names: of its arrays.
        own: of ours.

    Raises:
        InputError: none of them; which keys were found and which are wanted.
    """
    held = set(names)
    if held.issuperset(own):
        return None
    for layout in LAYOUTS:
        if held.issuperset(layout.keys):
            return layout
    wanted = "; or ".join(
        f"{one.whose} {', '.join(one.keys)}" + "".join(f" ({name})" for name in one.more)
        for one in LAYOUTS
    )
    nearest = min(LAYOUTS, key=lambda one: len(set(one.keys) - held))
    missing = [name for name in nearest.keys if name not in held]
    hint = f"; for {nearest.whose} {missing[0]} is missing" if len(missing) == 1 else ""
    raise InputError(
        f"holds no demonstrations: its keys are {', '.join(sorted(held)) or 'none'}{hint}. Wanted "
        f"are ours, {', '.join(own)}; or {wanted}"
    )


def read_hdf5(path: Path, most: int) -> Episodes:
    """Episodes of D4RL's or Minari's file, where h5py is installed.

    Args:
        path: the file.
        most: bytes that it may hold.

    Raises:
        InputError: no h5py, another layout, or more than that.
        OSError: no such file, or no HDF5.
    """
    try:
        import h5py  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        keys = (*D4RL.keys, *D4RL.more)
        raise InputError(
            f"{path} needs h5py, which is not installed: pip install h5py, or where it is, convert "
            f"the file once: import h5py, numpy; f = h5py.File({path.name!r}); "
            f"numpy.savez({path.stem + '.npz'!r}, **{{k: f[k][()] for k in {keys} if k in f}})"
        ) from error
    with h5py.File(path, "r") as file:
        sizes: list[int] = []
        file.visititems(lambda _, one: sizes.append(getattr(one, "nbytes", 0)))
        if sum(sizes) > most:
            raise InputError(f"{path} holds {sum(sizes):,} bytes, more than the {most:,} read here")
        parts = [file[name] for name in sorted(file, key=_number) if name.startswith("episode_")]
        if parts:
            return _minari(parts)
        arrays = {name: one[()] for name, one in file.items() if isinstance(one, h5py.Dataset)}
    missing = [name for name in D4RL.keys if name not in arrays]
    if missing:
        raise InputError(
            f"{path} holds no demonstrations: its keys are {', '.join(arrays) or 'none'}, wanted "
            f"are {', '.join((*D4RL.keys, *D4RL.more))}, or groups episode_0, episode_1, … as "
            "Minari's"
        )
    return D4RL.split(arrays)


def _number(name: str) -> tuple[int, str]:
    """Episodes in their order: episode_2 comes before episode_10."""
    tail = name.rpartition("_")[2]
    return (int(tail) if tail.isdigit() else -1, name)


def _minari(episodes: Sequence[Any]) -> Episodes:
    """A group per episode, with an observation more than actions."""
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    columns: dict[str, list[Array]] = {key: [] for key in keys}
    for one in episodes:
        for key in keys:
            if not hasattr(one.get(key), "dtype"):
                raise InputError(f"{one.name} has no array {key}: flat observations only")
            columns[key].append(np.asarray(one[key][()]))
    seen = [one[: len(acted)] for one, acted in zip(*list(columns.values())[:2], strict=True)]
    columns["observations"] = seen
    return _steps(*(np.concatenate(columns[key]) for key in keys))


def fitting(observations: Array, actions: Array, space: spaces.Space[Any] | None) -> list[Array]:
    """Observations (N, d) and actions as `Demonstrations` has them.

    Args:
        observations: (N, d) numbers of any type, or (N,) where d is 1.
        actions: (N,), (N, 1) or (N, k) numbers of any type.
        space: the task's actions; None takes integers for choices.

    Raises:
        InputError: other shapes, numbers that are no choices, or actions outside of the space.
    """
    for name, one in (("observations", observations), ("actions", actions)):
        if one.dtype.kind not in "fiub" or one.ndim not in (1, 2) or one.size == 0:
            raise InputError(
                f"{name} must be numbers (N, size) with N above 0, not {one.shape} of {one.dtype}"
            )
    seen = observations.reshape(len(observations), -1).astype(np.float32)
    discrete = isinstance(space, spaces.Discrete) or (space is None and actions.dtype.kind != "f")
    column = actions.reshape(len(actions), -1)
    if not discrete:
        return [seen, _inside(column.astype(np.float32), space)]
    chosen = column[:, 0]
    known = isinstance(space, spaces.Discrete)
    whole = np.isfinite(chosen).all() and (np.floor(chosen) == chosen).all()
    if column.shape[1] != 1 or not whole:
        odd = f"of size {column.shape[1]}" if column.shape[1] > 1 else _odd(chosen)
        raise InputError(f"actions must be whole numbers (N,) or (N, 1), found some {odd}")
    if known and not (chosen.min() >= 0 and chosen.max() < int(space.n)):  # type: ignore[union-attr]
        raise InputError(
            f"actions go from {chosen.min():g} to {chosen.max():g}, the task has 0 to "
            f"{int(space.n) - 1}"  # type: ignore[union-attr]
        )
    return [seen, chosen.astype(np.int64)]


def _odd(chosen: Array) -> str:
    """The first number that is no choice."""
    whole = np.isfinite(chosen) & (np.floor(chosen) == chosen)
    return f"such as {chosen[~whole][0]:g}"


def _inside(actions: Array, space: spaces.Space[Any] | None) -> Array:
    """Actions (N, k) float32 within a box, brought into it where rounding alone has left it.

    Into its bounds as float32, whatever the type of the box: NumPy would make them float64.
    """
    if not isinstance(space, spaces.Box):
        return actions
    with np.errstate(over="ignore"):  # the largest float64 stands for no bound
        low, high = (end.reshape(-1).astype(np.float32) for end in (space.low, space.high))
    if actions.shape[1] != len(low):
        raise InputError(f"actions have size {actions.shape[1]}, the task's have {len(low)}")
    inside = np.clip(actions, low, high)
    if not np.allclose(inside, actions, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise InputError(
            f"actions go from {actions.min():g} to {actions.max():g}, the task takes {space}: clip "
            "them as the task does, numpy.clip(actions, low, high)"
        )
    return inside

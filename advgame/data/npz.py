"""Arrays of images in a FILE.npz, with the keys of MedMNIST or Keras; imports no torch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from advgame.data.raw import DARK, Array, Raw, check_memory
from advgame.errors import InputError

# split -> the keys of images and labels, in lower case
_KEYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val"), ("x_valid", "y_valid")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
_WANTED = (
    "train_images, train_labels, test_images, test_labels, or x_train, y_train, x_test, y_test"
)
_CHUNK = 4096  # images that are converted at a time

Header = tuple[tuple[int, ...], np.dtype[Any]]


def read_npz(path: Path) -> Raw:
    """All images of a file, as they are split there.

    Raises:
        InputError: keys, shapes or types that are no classification of images, Python objects, or
            a damaged file.
    """
    heads = _headers(path)
    pairs = _pairs(path, heads)
    try:
        return _read(path, heads, pairs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # zlib, zipfile and NumPy raise many kinds
        raise InputError(f"{path} is damaged ({error})") from error


def _read(path: Path, heads: Mapping[str, Header], pairs: Mapping[str, tuple[str, str]]) -> Raw:
    needed = 0
    for images, labels in pairs.values():
        shape, kind = heads[images]
        _layout(images, shape)
        _check_labels(labels, *heads[labels])
        needed += math.prod(shape) * (1 if kind == np.uint8 else 1 + kind.itemsize)
    check_memory(needed, "its images")
    shapes = {images: _planes(heads[images][0]) for images, _ in pairs.values()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"images differ in shape between splits: {shapes}")
    parts, notes = {}, list[str]()
    with np.load(path, allow_pickle=False) as file:
        for split, (images, labels) in pairs.items():
            levels, note = _levels(images, file[images])
            parts[split] = (_channels_first(levels), file[labels].reshape(-1).astype(np.int64))
            if note:
                notes.append(note)
    return Raw(parts, (), _classes(pairs, parts), tuple(notes))


def first_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W) of the training images, from the header.

    Raises:
        InputError: as `read_npz`.
    """
    heads = _headers(path)
    images, _ = next(iter(_pairs(path, heads).values()))
    _layout(images, heads[images][0])
    return _planes(heads[images][0])


def _headers(path: Path) -> dict[str, Header]:
    """Key -> shape and type of its array; no array is read."""
    found: dict[str, Header] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        version = np.lib.format.read_magic(file)
                        if version == (1, 0):
                            shape, _, kind = np.lib.format.read_array_header_1_0(file)
                        else:
                            shape, _, kind = np.lib.format.read_array_header_2_0(file)
                    found[name.removesuffix(".npy")] = (shape, kind)
    except Exception as error:  # zipfile and NumPy raise many kinds
        raise InputError(f"{path} is no npz file, or damaged ({error})") from error
    return found


def _pairs(path: Path, heads: Mapping[str, Header]) -> dict[str, tuple[str, str]]:
    """Split -> the keys of its images and labels."""
    spelled = {name.lower(): name for name in heads}
    found: dict[str, tuple[str, str]] = {}
    for split, known in _KEYS.items():
        for images, labels in known:
            if images not in spelled or labels not in spelled:
                continue
            if split in found:
                raise InputError(
                    f"{path} holds {found[split][0]} and {spelled[images]}, both for {split}: "
                    "leave one"
                )
            found[split] = (spelled[images], spelled[labels])
    if not {"train", "test"} <= found.keys():
        raise InputError(f"{path} holds {', '.join(heads) or 'nothing'}, but not {_WANTED}")
    for name in (name for pair in found.values() for name in pair):
        if heads[name][1].hasobject:
            raise InputError(
                f"{path} holds Python objects ({name}), which could run code when they are read: "
                "save plain arrays, images as uint8 and labels as whole numbers"
            )
    return found


def _layout(name: str, shape: tuple[int, ...]) -> str:
    """Where the channels of an array are: "" without, "last" or "first"."""
    if len(shape) == 3:
        return ""
    if len(shape) == 4 and (shape[3] in (1, 3)) != (shape[1] in (1, 3)):
        return "last" if shape[3] in (1, 3) else "first"
    raise InputError(
        f"{name} has the shape {shape}: images are (N, H, W), (N, H, W, C) or (N, C, H, W) with "
        "one channel or three"
    )


def _planes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of an array of one of the known layouts."""
    match _layout("images", shape):
        case "":
            return 1, shape[1], shape[2]
        case "last":
            return shape[3], shape[1], shape[2]
    return shape[1], shape[2], shape[3]


def _channels_first(images: Array) -> Array:
    match _layout("images", images.shape):
        case "":
            return images[:, None]
        case "last":
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images


def _check_labels(name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
    if len(shape) == 2 and shape[1] > 1:
        raise InputError(
            f"{name} has {shape[1]} labels per image: one class per image is asked for; rows with "
            f"a single 1 become classes by {name}.argmax(1), several labels per image do not"
        )
    if len(shape) not in (1, 2):
        raise InputError(f"{name} has the shape {shape}: labels are (N,) or (N, 1)")
    if kind.kind not in "iu":
        hint = {
            "f": f"save {name}.astype(int)",
            "U": f"numpy.unique({name}, return_inverse=True) numbers names",
        }.get(kind.kind)
        more = f"; {hint}" if hint else ""
        raise InputError(f"{name} is {kind}: labels are whole numbers 0, 1, …, K-1{more}")


def _levels(name: str, images: Array) -> tuple[Array, str]:
    """Images as uint8, and what is to be said of them, "" where nothing is."""
    kind = images.dtype
    if kind.kind not in "iuf":
        raise InputError(f"{name} is {kind}: images are uint8, or floats in [0, 1]")
    if not len(images):
        raise InputError(f"{name} is empty")
    low, high = float(images.min()), float(images.max())
    if low != low:
        bad = int(np.isnan(images).reshape(len(images), -1).any(1).sum())
        raise InputError(f"{name} holds NaN, in {bad} of {len(images)} images: leave these out")
    most = 1 if kind.kind == "f" else 255
    if not (low >= 0 and high <= most):
        hint = ""
        if kind.kind == "f" and 1 < high <= 255:
            hint = ": clip it" if high < 1.01 else ": divide by 255, or save as uint8"
        raise InputError(
            f"{name} is {kind} from {low:g} to {high:g}, and should lie in "
            f"{'[0, 1]' if most == 1 else '0..255'}{hint}"
        )
    if kind.kind != "f":
        dark = f"{name} is {kind} from {low:g} to {high:g}, where 255 is white: nearly black"
        return images.astype(np.uint8, copy=False), dark if high <= DARK else ""
    found, rounded = np.empty(images.shape, np.uint8), False
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK].astype(np.float64) * 255
        near = part.round()
        rounded = rounded or bool(abs(part - near).max() > 255 * float(np.finfo(kind).eps))
        found[start : start + _CHUNK] = near
    return found, f"{name} lay between 256 levels and were rounded to them" if rounded else ""


def _classes(pairs: Mapping[str, tuple[str, str]], parts: Mapping[str, tuple[Array, Array]]) -> int:
    """Number of classes, all of which the training images must have."""
    for split, (images, labels) in parts.items():
        if len(images) != len(labels):
            names = " and ".join(pairs[split])
            raise InputError(f"{names} differ in length, {len(images)} and {len(labels)}")
        if not len(labels):
            raise InputError(f"{pairs[split][0]} is empty")
    known = np.unique(parts["train"][1])
    name = pairs["train"][1]
    if known[0] != 0:
        hint = ": subtract 1" if known[0] == 1 else ""
        raise InputError(f"{name} begins at {known[0]}, and classes count from 0{hint}")
    if len(known) != known[-1] + 1:
        missing = int(np.setdiff1d(np.arange(min(known[-1], 10**6)), known)[0])
        raise InputError(
            f"no image of {name} has the label {missing}: classes are 0, 1, …, K-1 without a gap"
        )
    if len(known) < 2:
        raise InputError(f"{name} has one class, and a classifier needs two or more")
    for split, (_, labels) in parts.items():
        if others := sorted(set(np.unique(labels).tolist()) - set(known.tolist())):
            raise InputError(f"{pairs[split][1]} has the label {others[0]}, which {name} has not")
    return len(known)

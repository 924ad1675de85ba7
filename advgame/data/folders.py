"""Folders of images, a folder per class, decoded once into uint8; imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from advgame.data.raw import DARK, Array, Raw, check_memory
from advgame.errors import InputError

T = TypeVar("T")
U = TypeVar("U")

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_IMAGES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif",
    ".tiff",
)  # fmt: skip
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
_WIDE = ("I;16", "I;16B", "I;16L")  # 16 bits per pixel
_CHUNK = 1024  # headers that are read at a time until one is of colour
_THREADS = min(32, 4 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Tree:
    """Which files a folder holds.

    Args:
        names: the classes, sorted as torchvision's ImageFolder does.
        parts: split -> files and their labels; one split ``""`` where there are no split folders.
    """

    names: tuple[str, ...]
    parts: dict[str, tuple[list[Path], list[int]]]


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder in ``root``; empty where classes lie in ``root`` itself.

    Beside other folders one of such a name is a split only where it has folders of classes in it:
    a train is also a class.

    Raises:
        InputError: two folders for one split.
    """
    words = {word: split for split, known in SPLITS.items() for word in known}
    folders = _folders(root)
    named = [one for one in folders if one.name.lower() in words]
    if len(named) < len(folders):
        named = [one for one in named if _folders(one)]
    found: dict[str, Path] = {}
    for folder in named:
        split = words[folder.name.lower()]
        if split in found:
            raise InputError(
                f"{root} has {found[split].name}/ and {folder.name}/, both for {split}: leave one"
            )
        found[split] = folder
    return {split: found[split] for split in SPLITS if split in found}


def read_tree(root: Path) -> Tree:
    """The images of a folder, by split and class.

    Raises:
        InputError: no classes, empty ones, or others in one split than in another.
    """
    splits = split_folders(root) or {"": root}
    names: tuple[str, ...] = ()
    parts = {}
    for split, folder in splits.items():
        classes = _folders(folder)
        here = tuple(one.name for one in classes)
        if not here:
            raise InputError(_no_classes(folder))
        names = names or here
        if names != here:
            odd = sorted(set(names) ^ set(here))
            where = folder if odd[0] in here else next(iter(splits.values()))
            raise InputError(
                f"class {odd[0]} is in {where} alone: every split needs the same class folders"
                + (f" ({len(odd)} differ)" if len(odd) > 1 else "")
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, one in enumerate(classes):
            inside = _images(one)
            if not inside:
                raise InputError(f"{one} holds no images: fill it, or take the class away")
            paths += inside
            labels += [label] * len(inside)
        parts[split] = (paths, labels)
    if len(names) < 2:
        raise InputError(
            f"{root} has one class, {names[0]}: a classifier needs two folders or more, one per "
            "class"
        )
    return Tree(names, parts)


def first_shape(root: Path) -> tuple[int, int, int]:
    """(C, H, W) of the first image that is found in a folder.

    It has one channel only where all images of the folder are grey, as `decode` has it: their
    headers are read until one is of colour.

    Raises:
        InputError: there is none, or the first is damaged.
    """
    folders = [*split_folders(root).values()] or [root]
    paths = (path for folder in folders for one in _folders(folder) for path in _images(one))
    first = next(paths, None)
    if first is None:
        raise InputError(_no_classes(folders[0]))
    width, height, mode = _header(first)
    grey = mode in _GREY and _all_grey(tuple(paths))
    return (1 if grey else 3), height, width


@lru_cache(maxsize=4)  # settings are asked several times for what their data are like
def _all_grey(paths: tuple[Path, ...]) -> bool:
    """Whether no header is of colour; of damaged files nothing is known before they are read."""

    def grey(path: Path) -> bool:
        try:
            return _header(path)[2] in _GREY
        except InputError:
            return True

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(
            all(pool.map(grey, paths[start : start + _CHUNK]))
            for start in range(0, len(paths), _CHUNK)
        )


def read_folder(root: Path, size: int | None = None) -> Raw:
    """All images of a folder.

    Args:
        root: with class folders, or with split folders of these.
        size: to which images are resized and cropped; None leaves them.

    Raises:
        InputError: as `read_tree` and `decode`.
    """
    tree = read_tree(root)
    paths = [path for inside, _ in tree.parts.values() for path in inside]
    images, notes = decode(paths, size)
    parts, start = {}, 0
    for split, (inside, labels) in tree.parts.items():
        parts[split] = (images[start : start + len(inside)], np.asarray(labels, np.int64))
        start += len(inside)
    return Raw(parts, tree.names, len(tree.names), notes)


def decode(paths: Sequence[Path], size: int | None = None) -> tuple[Array, tuple[str, ...]]:
    """Read images into one array (N, C, H, W), one channel where all of them are grey.

    Args:
        paths: the files.
        size: shorter sides are resized to it, then squares are cut from the centre.

    Returns:
        The images, and what was done to them, a sentence each.

    Raises:
        InputError: damaged files, images of several sizes, or too many for the memory.
    """
    _check_room(paths, _header(paths[0]), size)
    heads = _all(_header, paths)
    sizes = Counter((height, width) for width, height, _ in heads)
    if size is None and len(sizes) > 1:
        raise InputError(_sizes(paths, heads, sizes))
    channels = 1 if all(mode in _GREY for *_, mode in heads) else 3
    height, width = (size, size) if size else next(iter(sizes))
    images = np.empty((len(paths), channels, height, width), np.uint8)

    def read(index: int) -> None:
        images[index] = _pixels(paths[index], channels, size)

    _all(read, range(len(paths)), lambda index: paths[index])
    notes = []
    if wide := sum(mode in _WIDE for *_, mode in heads):
        notes.append(f"{wide} images of 16 bits per pixel were rounded to 8")
    if size and set(sizes) != {(size, size)}:
        notes.append(f"images were resized and cropped to {size}x{size}")
    if (high := int(images.max())) <= DARK:
        notes.append(f"no pixel is above {high}, where 255 is white: nearly black")
    return images, tuple(notes)


def resized(images: Array, size: int) -> Array:
    """Images (N, C, H, W) as `decode` resizes those that it reads."""
    if images.shape[2:] == (size, size):
        return images
    found = np.empty((*images.shape[:2], size, size), np.uint8)

    def fit(index: int) -> None:
        grey, one = images.shape[1] == 1, images[index]
        picture = Image.fromarray(one[0] if grey else np.ascontiguousarray(one.transpose(1, 2, 0)))
        found[index] = _planes(_cropped(picture, size))

    with ThreadPoolExecutor() as pool:
        list(pool.map(fit, range(len(images))))
    return found


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        found = [one.name for one in entries if one.is_dir() and _visible(one.name)]
    return [root / name for name in sorted(found)]


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _images(root: Path) -> list[Path]:
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(filter(_visible, inner))
        found += [
            Path(folder, one)
            for one in sorted(files)
            if _visible(one) and one.lower().endswith(_IMAGES)
        ]
    return found


def _no_classes(folder: Path) -> str:
    flat = any(one.name.lower().endswith(_IMAGES) for one in folder.iterdir())
    return (
        f"{folder} holds "
        + ("images, but no folders of classes" if flat else "no folders of classes with images")
        + ": each class is a folder, e.g. cat/1.png and dog/1.png, maybe in train/, val/ and test/"
    )


def _header(path: Path) -> tuple[int, int, str]:
    """Width, height and mode of a file, without its pixels."""
    try:
        with Image.open(path) as picture:
            mode = picture.mode
            if mode == "I" and picture.format == "PNG":  # how Pillow below 11 calls 16 bits
                mode = "I;16"
            return *picture.size, mode
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"{path} cannot be read as an image ({_reason(error)})") from error


def _pixels(path: Path, channels: int, size: int | None) -> Array:
    try:
        with Image.open(path) as picture:
            picture.load()
            wide = picture.mode in _WIDE or (picture.mode == "I" and picture.format == "PNG")
            if picture.mode in ("I", "F") and not wide:
                raise InputError(f"its pixels are of mode {picture.mode}, not of 8 or 16 bits")
            if wide:
                levels = np.asarray(picture).astype(np.float32) / 257
                plain = Image.fromarray(levels.round().astype(np.uint8))
            else:
                plain = _opaque(picture)
            return _planes(_cropped(plain.convert("L" if channels == 1 else "RGB"), size))
    except InputError as error:
        raise InputError(f"{path} cannot be taken: {error}") from error
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"{path} cannot be read as an image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    said = str(error).splitlines()
    return "no image, or damaged" if not said or "cannot identify" in said[0] else said[0]


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture; what would show through it is unknown, so it must show nothing."""
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            raise InputError("it is transparent in places: put it on a background first")
    return picture


def _cropped(picture: Image.Image, size: int | None) -> Image.Image:
    if size is None or picture.size == (size, size):
        return picture
    width, height = picture.size
    factor = size / min(width, height)
    width, height = max(size, round(width * factor)), max(size, round(height * factor))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _planes(picture: Image.Image) -> Array:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _all(
    work: Callable[[T], U], items: Sequence[T], of: Callable[[T], object] = lambda item: item
) -> list[U]:
    """Work on every item in threads; files that cannot be read are told together.

    Raises:
        InputError: the first of them, and how many others there are.
    """

    def tried(item: T) -> U | InputError:
        try:
            return work(item)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(tried, items))
    bad = [(one, of(item)) for one, item in zip(found, items, strict=True) if _failed(one)]
    if bad:
        others = [str(item) for _, item in bad[1:3]]
        more = f"; {len(bad) - 1} more: {', '.join(others)}" if others else ""
        more += ", …" if len(bad) > 3 else ""
        raise InputError(f"{bad[0][0]}{more}")
    return [one for one in found if not isinstance(one, InputError)]


def _failed(one: object) -> bool:
    return isinstance(one, InputError)


def _check_room(paths: Sequence[Path], first: tuple[int, int, str], size: int | None) -> None:
    width, height, mode = first
    width, height = size or width, size or height
    channels = 1 if mode in _GREY else 3
    check_memory(len(paths) * channels * width * height, f"{len(paths)} images of {width}x{height}")


def _sizes(
    paths: Sequence[Path],
    heads: Sequence[tuple[int, int, str]],
    sizes: Counter[tuple[int, int]],
) -> str:
    """Which sizes there are, the most frequent ones with a file each."""
    where = {(height, width): path for path, (width, height, _) in zip(paths, heads, strict=True)}
    shown = [
        f"{width}x{height} ({number}, e.g. {where[height, width]})"
        for (height, width), number in sizes.most_common(2)
    ]
    more = f" and {len(sizes) - 2} other sizes" if len(sizes) > 2 else ""
    return (
        f"images differ in size: {', '.join(shown)}{more}: --image-size N resizes and crops all "
        "to NxN"
    )

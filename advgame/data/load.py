"""`load_data`: a data set by its name, a folder of images, a FILE.npz, or a function's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from advgame.data.folders import read_folder, resized
from advgame.data.images import ImageSet, Splits, stratified_split
from advgame.data.names import NAMED, check_dataset, located, short_name
from advgame.data.npz import read_npz
from advgame.data.published import read_published
from advgame.data.raw import Raw
from advgame.errors import InputError
from advgame.own_code import is_own_code, own_code

TEST = 0.2  # share of the images where nobody has split them
VALIDATION = 0.15  # share of few training images, digits' among them
_LARGE = 10_000  # training images from which on a smaller share is enough
_LARGE_VALIDATION = 0.02
_LEAST = {TEST: 10, VALIDATION: 7, _LARGE_VALIDATION: 7}  # images of each class to cut from

# mean and standard deviation per channel of the training images, in [0, 1] units
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def load_data(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    train_n: int | None = None,
) -> Splits:
    """Load a data set, split in three the same way each time.

    Args:
        name: one of `DATASETS` (``digits`` is embedded in scikit-learn, the others are read from
            ``data_dir``); a folder of images with a folder per class, maybe within ``train``,
            ``val`` and ``test``; a FILE.npz with the keys of MedMNIST or Keras; or
            ``package.module:function``, code of your own that returns `Splits`.
        data_dir: folder in torchvision's layout (all but digits).
        download: fetch what is missing there.
        image_size: resize the shorter side to it and cut a square from the centre; None leaves
            the images, which must then be of one size.
        train_n: use only this many training images.

    Raises:
        InputError: unknown name, missing or corrupt files, images or labels that are no
            classification, or ``train_n`` out of range.
    """
    found, _ = _load(str(name), data_dir, download=download, image_size=image_size)
    if isinstance(found, ImageSet):
        needs = "images for training and validation besides"
        raise InputError(
            f"{name} returns one ImageSet, which can be evaluated: return advgame.Splits, with "
            f"{needs}"
            if is_own_code(str(name))
            else f"{name} holds test images alone, which can be evaluated: add {needs}, in train/"
        )
    if train_n is None:
        return found
    train = found.train
    if not 1 <= train_n <= len(train):
        raise InputError(f"train_n must lie in 1..{len(train)} for {name}, not {train_n}")
    return replace(found, train=train.first(train_n))


def load_test(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    check: Callable[[Splits | ImageSet], object] = lambda found: None,
    note: Callable[[str], object] = lambda sentence: None,
) -> tuple[ImageSet, ImageSet | None]:
    """The test images of a data set, and its validation images where it has any.

    Args:
        name: as `load_data` takes it; a function may also return one `ImageSet`, and a folder have
            a ``test`` alone.
        data_dir: the same.
        download: the same.
        image_size: the same.
        check: called with all that is there, training images too, which are let go of then.
        note: told what was done to the images, a sentence each.

    Raises:
        InputError: the same, and what ``check`` raises.
    """
    found, notes = _load(str(name), data_dir, download=download, image_size=image_size)
    check(found)
    for sentence in notes:
        note(sentence)
    return (found, None) if isinstance(found, ImageSet) else (found.test, found.validation)


def _load(
    name: str, data_dir: str | Path | None, *, download: bool, image_size: int | None
) -> tuple[Splits | ImageSet, tuple[str, ...]]:
    """The images, and what was done to them, a sentence each."""
    check_dataset(name, data_dir, download=download, image_size=image_size)
    if is_own_code(name):
        made = own_code(name)()
        if not isinstance(made, Splits | ImageSet):
            raise InputError(
                f"{name} must return an advgame.ImageSet or advgame.Splits, not "
                f"{type(made).__name__}: ImageSet.from_floats makes the former"
            )
        return _told(name, made, (), made.notes if isinstance(made, Splits) else ())
    if name not in NAMED:
        found, notes = _own(name, image_size)
        return _told(name, found, notes, notes)
    full, test = read_published(name, data_dir, download=download, image_size=image_size)
    share = VALIDATION if name == "digits" else _LARGE_VALIDATION
    rest, held_out = stratified_split(full.labels, share)
    return Splits(name, full.subset(rest), full.subset(held_out), test), ()


def _told(
    name: str, found: Splits | ImageSet, new: tuple[str, ...], notes: tuple[str, ...]
) -> tuple[Splits | ImageSet, tuple[str, ...]]:
    """Somebody's own images and all notes on them, of which the ``new`` ones are printed."""
    if isinstance(found, Splits) and (repeats := found.repeats()):
        new, notes = (*new, *repeats), (*notes, *repeats)
        found = replace(found, notes=notes)
    for note in new:
        print(f"note: {name}: {note}", file=sys.stderr)
    return found, notes


def _own(name: str, image_size: int | None) -> tuple[Splits | ImageSet, tuple[str, ...]]:
    """A folder or file, with what is missing of the splits cut by us; what was done, in words."""
    path = located(name)
    raw = read_folder(path, image_size) if path.is_dir() else _resized(read_npz(path), image_size)
    notes = list(raw.notes)
    parts = {split: _image_set(raw, *arrays).mixed() for split, arrays in raw.parts.items()}
    if "" in parts:
        rest, cut = _cut(name, parts[""], TEST)
        parts = {"train": rest, "test": cut}
        notes.append(f"{TEST:.0%} of every class are the test images, since nobody has split them")
    if "train" not in parts:
        return parts["test"] if "test" in parts else parts["validation"], raw.notes
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
        notes.append("the validation images are the test images, since there are no others")
    if "test" not in parts:
        raise InputError(
            f"{name} has train/ and no test/: add one, or name the folder train itself, whose "
            "images are then split"
        )
    if "validation" not in parts:
        count, classes = len(parts["train"]), raw.classes
        large = count >= max(_LARGE, 2 * classes / _LARGE_VALIDATION)
        share = _LARGE_VALIDATION if large else VALIDATION
        parts["train"], parts["validation"] = _cut(name, parts["train"], share)
        notes.append(f"{share:.0%} of the training images are cut off for validation")
    return Splits(short_name(name), **parts, notes=tuple(notes)), tuple(notes)


def _image_set(raw: Raw, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), raw.classes, raw.names)


def _resized(raw: Raw, size: int | None) -> Raw:
    parts = raw.parts
    if size is None or all(images.shape[2:] == (size, size) for images, _ in parts.values()):
        return raw
    fitted = {split: (resized(images, size), labels) for split, (images, labels) in parts.items()}
    note = f"images were resized and cropped to {size}x{size}"
    return replace(raw, parts=fitted, notes=(*raw.notes, note))


def _cut(name: str, data: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """The rest, and a share of every class."""
    counts = data.labels.bincount(minlength=data.classes)
    if counts.min() < _LEAST[share]:
        label = int(counts.argmin())
        raise InputError(
            f"{name}: class {data.names[label] if data.names else label} has {counts[label]} "
            f"images, fewer than the {_LEAST[share]} that a split by us needs: add images, or "
            "split them yourself into train, val and test"
        )
    rest, part = stratified_split(data.labels, share)
    return data.subset(rest), data.subset(part)


def channel_statistics(
    name: str, train: ImageSet
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation per channel in [0, 1] units; None of grey images.

    The published ones of CIFAR and SVHN, measured on the training images of other data sets.
    """
    if train.shape[0] == 1:
        return None
    if name in STATISTICS:
        return STATISTICS[name]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in train.images.cpu().unbind(1):  # by counts: no float copy of all images
        shares = torch.bincount(channel.flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float((shares * levels).sum())
        means.append(mean)
        deviations.append(float((shares * (levels - mean) ** 2).sum().sqrt()))
    if not all(deviations):
        raise InputError(f"a colour channel of {name} is the same in every training image")
    return tuple(means), tuple(deviations)

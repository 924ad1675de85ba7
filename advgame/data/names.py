"""What `--dataset` can name, told from words, folders and headers alone; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from advgame.errors import InputError, unknown
from advgame.own_code import is_own_code

SMALL = 16  # pixels; of smaller images the recipe has the small network


@dataclass(frozen=True)
class Named:
    """A published data set.

    Args:
        recipe: whose settings a training has by default.
        colour: whether its images have three channels.
        flip: whether a mirrored image is of the same class.
        folder: where it lies within ``--data-dir``, which is a mistake for that.
    """

    recipe: str
    colour: bool = False
    flip: bool = False
    folder: str = ""


NAMED = {
    "digits": Named("digits"),
    "mnist": Named("mnist", folder="MNIST"),
    "cifar10": Named("cifar10", colour=True, flip=True, folder="cifar-10-batches-py"),
    "cifar100": Named("cifar100", colour=True, flip=True, folder="cifar-100-python"),
    "svhn": Named("svhn", colour=True),
    "tinyimagenet": Named("tinyimagenet", colour=True, flip=True, folder="tiny-imagenet-200"),
    "fashionmnist": Named("fashionmnist", folder="FashionMNIST"),
    "kmnist": Named("mnist", folder="KMNIST"),
    "emnist": Named("mnist", folder="EMNIST"),
    "qmnist": Named("mnist", folder="QMNIST"),
    "usps": Named("mnist"),
    "stl10": Named("cifar10", colour=True, flip=True, folder="stl10_binary"),
    "gtsrb": Named("cifar10", colour=True, folder="gtsrb"),
}
DATASETS = tuple(NAMED)
OWN = "a folder of images, a FILE.npz, or package.module:function"


def is_own(dataset: str) -> bool:
    """Whether words name a folder or file of one's own, that is there or not."""
    return dataset not in NAMED and not is_own_code(dataset)


def check_dataset(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
) -> None:
    """Refuse, before any work, words that name no data, and options that they make no use of.

    Args:
        dataset: a name, a folder, a file, or ``package.module:function``.
        data_dir: folder of a published data set.
        download: whether what is missing there is fetched.
        image_size: to which images are resized.

    Raises:
        InputError: what there is, or what to leave away.
    """
    given = data_dir is not None or download
    if is_own_code(dataset):
        if given or image_size is not None:
            raise InputError(
                f"{dataset} is your code, which makes its images itself: leave --data-dir, "
                "--download and --image-size away"
            )
    elif dataset in NAMED:
        if dataset == "digits" and given:
            raise InputError(
                "digits is embedded and reads no folder: leave --data-dir and --download away, or "
                f"say which data lie there, e.g. --dataset {DATASETS[1]}"
            )
    else:
        _check_path(dataset)
        if given:
            raise InputError(
                f"{dataset} is a folder or file of your own: leave --data-dir and --download "
                f"away, which are for {', '.join(DATASETS[1:6])}, …"
            )


def _check_path(dataset: str) -> None:
    path = located(dataset)
    if path.is_dir() or (path.is_file() and path.suffix == ".npz"):
        return
    if path.exists():
        raise InputError(f"{dataset} is no data set that is known here: --dataset takes {OWN}")
    if os.sep in dataset or path.suffix or dataset.startswith((".", "~")):
        there = path.parent.is_dir()
        near = get_close_matches(path.name, os.listdir(path.parent)) if there else []
        hint = f": did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"there is no {dataset}{hint}")
    beside = get_close_matches(dataset, [one.name for one in Path().iterdir() if one.is_dir()])
    if beside and not get_close_matches(dataset.lower(), NAMED):
        raise InputError(f"there is no {dataset}: did you mean the folder {beside[0]}?")
    raise InputError(f"{unknown('dataset', dataset, NAMED)}; or name {OWN}")


def located(dataset: str) -> Path:
    """The folder or file that words name, ``~`` written out."""
    return Path(dataset).expanduser()


def recipe(dataset: str, image_size: int | None = None) -> str:
    """Whose settings a training on these data has by default; "" where nothing is known.

    Of one's own images the headers tell the number of channels, and the first the size: grey ones
    have ``"grey"``, colour ones ``"cifar10"``, or ``"small"`` below 16 pixels.

    Args:
        dataset: a name, a folder, a file, or ``package.module:function``.
        image_size: to which images are resized.
    """
    if dataset in NAMED:
        return NAMED[dataset].recipe
    shape = _shape(dataset)
    if shape is None:
        return ""
    channels, *sides = shape
    if channels == 1:
        return "grey"
    return "small" if (image_size or min(sides)) < SMALL else "cifar10"


def colour(dataset: str) -> bool | None:
    """Whether the images have three channels; None where nothing tells it beforehand."""
    if dataset in NAMED:
        return NAMED[dataset].colour
    shape = _shape(dataset)
    return None if shape is None else shape[0] == 3


def _shape(dataset: str) -> tuple[int, int, int] | None:
    """(C, H, W) of the first of one's own images, as all are read; None where it cannot be told."""
    from advgame.data import folders, npz

    if is_own_code(dataset):
        return None
    path = located(dataset)
    try:
        return folders.first_shape(path) if path.is_dir() else npz.first_shape(path)
    except (InputError, OSError):  # it is refused, in words, when it is loaded
        return None


def short_name(dataset: str) -> str:
    """What reports and files call the data: a name, or that of the file or folder."""
    if not is_own(dataset):
        return dataset
    path = located(dataset).resolve()
    return path.stem if path.suffix == ".npz" else path.name


def flips(dataset: str) -> bool:
    """Whether a training mirrors images: never your own, whose classes may be left and right."""
    return dataset in NAMED and NAMED[dataset].flip

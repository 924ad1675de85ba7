"""Published data sets: scikit-learn's digits, what torchvision reads, Tiny ImageNet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advgame.data.folders import decode, read_tree, resized
from advgame.data.images import ImageSet, stratified_split
from advgame.data.names import NAMED
from advgame.errors import InputError

# MD5 of MNIST's unpacked files; those of CIFAR, SVHN and STL-10 are checked by torchvision
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# training and test images of files that torchvision takes without a look
_COUNTS = {
    "fashionmnist": (60000, 10000),
    "kmnist": (60000, 10000),
    "emnist": (112800, 18800),
    "qmnist": (60000, 60000),
    "usps": (7291, 2007),
}
_TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
_TINY_CLASSES = 200

Pair = tuple[ImageSet, ImageSet]


def read_published(
    name: str, data_dir: str | Path | None, *, download: bool, image_size: int | None
) -> Pair:
    """Training and test images of a published data set.

    Args:
        name: one of `advgame.data.names.NAMED`.
        data_dir: folder in torchvision's layout (all but digits).
        download: fetch what is missing.
        image_size: resize and crop to so many pixels; None leaves the images.

    Raises:
        InputError: missing, corrupt or other files.
    """
    train, test = _digits() if name == "digits" else _files(name, data_dir, download, image_size)
    return _resized(train, image_size), _resized(test, image_size)


def _resized(data: ImageSet, size: int | None) -> ImageSet:
    if size is None:
        return data
    return replace(data, images=torch.from_numpy(resized(data.images.numpy(), size)))


def _files(name: str, data_dir: str | Path | None, download: bool, size: int | None) -> Pair:
    how = f"pass --data-dir DIR with torchvision's {name} files in it, or add --download"
    if name == "tinyimagenet":
        how = "pass --data-dir DIR with tiny-imagenet-200/ in it, or add --download"
    if data_dir is None:
        raise InputError(f"{name} needs a data folder: {how}")
    root = Path(data_dir).expanduser()
    if not download and not root.is_dir():
        raise InputError(f"no data folder {root}: {how}")
    if root.name and root.name == NAMED[name].folder:
        raise InputError(f"--data-dir is the folder that {root.name} lies in: give {root.parent}")
    try:
        train, test = _READERS[name](name, root, download, size)
    except InputError:
        raise
    except Exception as error:  # torchvision raises many kinds for missing and corrupt files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} in {root} is missing or corrupt ({reason}): {how}") from error
    if name in _COUNTS and (len(train), len(test)) != _COUNTS[name]:
        raise InputError(
            f"{name} in {root} has {len(train)} and {len(test)} images, not "
            f"{' and '.join(map(str, _COUNTS[name]))}: {how}"
        )
    return train, test


def _digits() -> Pair:
    """scikit-learn's 1797 8x8 digits, 17 grey levels; 20 % of every class is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    whole = ImageSet.from_floats(images, torch.from_numpy(bunch.target), 10)
    rest, test = stratified_split(whole.labels, 0.2)
    return whole.subset(rest), whole.subset(test)


def _image_set(images: Any, labels: Any, classes: int, names: Any = ()) -> ImageSet:
    """From arrays (N, H, W), (N, H, W, C) or (N, C, H, W), and class numbers."""
    found = torch.as_tensor(np.asarray(images))
    if found.dim() == 3:
        found = found.unsqueeze(1)
    elif found.shape[-1] == 3:
        found = found.permute(0, 3, 1, 2)
    targets = torch.as_tensor(np.asarray(labels)).long()
    return ImageSet(found.contiguous(), targets, classes, tuple(names))


def _of_torchvision(name: str, root: Path, download: bool, size: int | None) -> Pair:
    from torchvision import datasets

    factory: Callable[..., Any]
    factory, words = {
        "mnist": (_original_files(datasets.MNIST), {}),
        "cifar10": (datasets.CIFAR10, {}),
        "cifar100": (datasets.CIFAR100, {}),
        "svhn": (datasets.SVHN, {}),
        "fashionmnist": (_original_files(datasets.FashionMNIST), {}),
        "kmnist": (_original_files(datasets.KMNIST), {}),
        "emnist": (_original_files(datasets.EMNIST), {"split": "balanced"}),
        "qmnist": (_original_files(datasets.QMNIST), {}),
        "stl10": (datasets.STL10, {}),
    }[name]
    parts = []
    for train in (True, False):
        which: dict[str, Any] = {"train": train}
        if name in ("svhn", "stl10"):
            which = {"split": "train" if train else "test"}
        data = factory(str(root), download=download, **words, **which)
        labels = data.labels if name in ("svhn", "stl10") else data.targets
        if name == "qmnist":  # the first of eight facts about a digit
            labels = labels[:, 0]
        classes = {"cifar100": 100, "emnist": 47}.get(name, 10)
        known = getattr(data, "classes", ())
        names = known if name not in ("mnist", "qmnist", "svhn") else ()  # "7 - seven"
        parts.append(_image_set(data.data, labels, classes, names))
    return parts[0], parts[1]


def _original_files(kind: Any) -> Any:
    """MNIST or its like from the original files alone.

    Files ``processed/*.pt`` of former versions would replace them in torchvision, and of MNIST's
    any others are taken without a look.
    """
    from torchvision.datasets.utils import check_integrity

    class Original(kind):  # type: ignore[misc]
        def _check_legacy_exist(self) -> bool:
            return False

        def _check_exists(self) -> bool:
            if kind.__name__ != "MNIST":
                return bool(super()._check_exists())
            raw = Path(self.raw_folder)
            return all(check_integrity(str(raw / file), md5) for file, md5 in _MNIST.items())

    Original.__name__ = kind.__name__  # the name is also the folder's
    return Original


def _usps(name: str, root: Path, download: bool, size: int | None) -> Pair:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    parts = []
    for split in ("train", "test"):
        _, file, md5 = datasets.USPS.split_list[split]
        if (root / file).exists() and not check_integrity(str(root / file), md5):
            raise RuntimeError(f"{file} is not the published file")
        data = datasets.USPS(str(root), train=split == "train", download=download)
        parts.append(_image_set(data.data, data.targets, 10))
    return parts[0], parts[1]


def _gtsrb(name: str, root: Path, download: bool, size: int | None) -> Pair:
    from torchvision import datasets

    if download:
        for split in ("train", "test"):
            datasets.GTSRB(str(root), split=split, download=True)
    base = root / "gtsrb"
    names, train = _classes_in(base / "GTSRB" / "Training", 43)
    with (base / "GT-final_test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    folder = base / "GTSRB" / "Final_Test" / "Images"
    test = [(folder / row["Filename"], int(row["ClassId"])) for row in rows]
    return _decoded(train, test, len(names), (), size)


def _tinyimagenet(name: str, root: Path, download: bool, size: int | None) -> Pair:
    """200 classes of 64x64 images; the published test images have no labels, so val/ is tested."""
    base = root / NAMED[name].folder
    if download and not base.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        url, md5 = _TINY
        download_and_extract_archive(url, str(root), md5=md5)
    wnids, train = _classes_in(base / "train", _TINY_CLASSES)
    number = {wnid: k for k, wnid in enumerate(wnids)}
    test = []
    for line in (base / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        file, wnid, *_ = line.split("\t")
        test.append((base / "val" / "images" / file, number[wnid]))
    known = {}
    if (base / "words.txt").exists():
        lines = (base / "words.txt").read_text(encoding="utf-8").splitlines()
        known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [known.get(wnid, wnid).split(",")[0] for wnid in wnids]
    return _decoded(train, test, len(wnids), names, size)


def _classes_in(folder: Path, classes: int) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The classes of a folder, and its files with their class numbers."""
    tree = read_tree(folder)
    if len(tree.names) != classes:
        raise InputError(f"{folder} has {len(tree.names)} classes, not {classes}: unpack it anew")
    paths, labels = next(iter(tree.parts.values()))
    return tree.names, list(zip(paths, labels, strict=True))


def _decoded(
    train: list[tuple[Path, int]],
    test: list[tuple[Path, int]],
    classes: int,
    names: Sequence[str],
    size: int | None,
) -> Pair:
    images, _ = decode([path for path, _ in (*train, *test)], size)
    labels = torch.tensor([label for _, label in (*train, *test)])
    whole = ImageSet(torch.from_numpy(images), labels, classes, tuple(names))
    return whole.subset(slice(len(train))).mixed(), whole.subset(slice(len(train), None)).mixed()


_READERS: dict[str, Callable[[str, Path, bool, int | None], Pair]] = {
    **dict.fromkeys(NAMED, _of_torchvision),
    "usps": _usps,
    "gtsrb": _gtsrb,
    "tinyimagenet": _tinyimagenet,
}

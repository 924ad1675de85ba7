"""`load_data`: a data set by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advgame.data.images import ImageSet, Splits, stratified_split
from advgame.data.names import check_dataset
from advgame.errors import InputError
from advgame.own_code import is_own_code, own_code

_VALIDATION = {"digits": 0.15}  # share of the training images; 0.02 elsewhere

# MD5 of MNIST's unpacked files; those of the other data sets are checked by torchvision
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

# within --data-dir
_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST"}
# mean and standard deviation per channel of the training images, in [0, 1] units
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    train_n: int | None = None,
) -> Splits:
    """Load a data set with the package's fixed splits.

    Args:
        name: one of `DATASETS`; ``digits`` is embedded in scikit-learn, the others are read by
            torchvision. Or ``package.module:function``, code of your own that returns `Splits`.
        data_dir: folder in torchvision's layout (all but digits).
        download: let torchvision fetch what is missing.
        train_n: use only this many training images.

    Raises:
        InputError: unknown name, missing or corrupt files, or ``train_n`` out of range.
    """
    found = _load(name, data_dir, download=download)
    if isinstance(found, ImageSet):
        raise InputError(
            f"{name} returns one ImageSet, which can be evaluated: return advgame.Splits, with "
            "images for training and validation besides"
        )
    if train_n is None:
        return found
    train = found.train
    if not 1 <= train_n <= len(train):
        raise InputError(f"train_n must lie in 1..{len(train)} for {name}, not {train_n}")
    return replace(found, train=train.first(train_n))


def load_test(
    name: str, data_dir: str | Path | None = None, *, download: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """The test images of a data set, and its validation images where it has any.

    Args:
        name: as `load_data` takes it; a function may also return one `ImageSet`.
        data_dir: the same.
        download: the same.

    Raises:
        InputError: the same.
    """
    found = _load(name, data_dir, download=download)
    return (found, None) if isinstance(found, ImageSet) else (found.test, found.validation)


def _load(name: str, data_dir: str | Path | None, *, download: bool) -> Splits | ImageSet:
    check_dataset(name, data_dir, download=download)
    if is_own_code(name):
        made = own_code(name)()
        if not isinstance(made, Splits | ImageSet):
            raise InputError(
                f"{name} must return an advgame.ImageSet or advgame.Splits, not "
                f"{type(made).__name__}: ImageSet.from_floats makes the former"
            )
        return made
    full, test = _digits() if name == "digits" else _torchvision(name, data_dir, download)
    rest, held_out = stratified_split(full.labels, _VALIDATION.get(name, 0.02))
    return Splits(name, full.subset(rest), full.subset(held_out), test)


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


def _digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1797 8x8 digits, 17 grey levels; 20 % of every class is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    whole = ImageSet.from_floats(images, torch.from_numpy(bunch.target), 10)
    rest, test = stratified_split(whole.labels, 0.2)
    return whole.subset(rest), whole.subset(test)


def _torchvision(
    name: str, data_dir: str | Path | None, download: bool
) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    how = f"pass --data-dir DIR with torchvision's {name} files in it, or add --download"
    if data_dir is None:
        raise InputError(f"{name} needs a data folder: {how}")
    root = Path(data_dir)
    if not download and not root.is_dir():
        raise InputError(f"no data folder {root}: {how}")
    if root.name == _FOLDERS.get(name):
        raise InputError(f"--data-dir is the folder that {root.name} lies in: give {root.parent}")
    factory = _checked_mnist() if name == "mnist" else getattr(datasets, name.upper())
    parts = []
    for train in (True, False):
        which: dict[str, Any] = (
            {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        )
        try:
            data = factory(str(root), download=download, **which)
        except Exception as error:  # torchvision raises many kinds for missing and corrupt files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{name} in {root} is missing or corrupt ({reason}): {how}") from error
        images = torch.as_tensor(np.asarray(data.data))
        if name == "mnist":
            images = images.unsqueeze(1)
        elif name != "svhn":  # CIFAR comes as (N, H, W, C)
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets))
        parts.append(ImageSet(images, labels.long(), 100 if name == "cifar100" else 10))
    return parts[0], parts[1]


def _checked_mnist() -> Any:
    """MNIST of the original files alone; torchvision takes any others without a look.

    Files ``processed/*.pt`` of former versions would even replace them.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    class MNIST(datasets.MNIST):  # type: ignore[misc]  # the name is also the folder's
        def _check_legacy_exist(self) -> bool:
            return False

        def _check_exists(self) -> bool:
            raw = Path(self.raw_folder)
            return all(check_integrity(str(raw / file), md5) for file, md5 in _MNIST.items())

    return MNIST

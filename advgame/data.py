"""Data sets (digits, MNIST, CIFAR, SVHN) as uint8 on the device, splits, training batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advgame.checks import check_images, check_labels
from advgame.errors import InputError, unknown
from advgame.seeding import stream

DATASETS = ("digits", "mnist", "cifar10", "cifar100", "svhn")
_VALIDATION = {"digits": 0.15}  # share of the training images; 0.02 elsewhere
_SPLIT_SEED = 20220306  # splits belong to the package, not to a run's seed

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


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Args:
        images: uint8 (N, C, H, W), 0..255.
        labels: int64 (N,).
        classes: number of classes K.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise InputError(
                f"images must be uint8 (N, C, H, W), not {self.images.dtype} "
                f"{tuple(self.images.shape)}; `from_floats` converts [0, 1] images"
            )
        if not len(self.images):
            raise InputError("the data set is empty")
        check_labels(self.labels, len(self.images), self.classes)
        with torch.inference_mode(False):  # made there, neither could be learned from
            if self.images.is_inference():
                object.__setattr__(self, "images", self.images.clone())
            labels = self.labels.clone() if self.labels.is_inference() else self.labels
            object.__setattr__(self, "labels", labels.long())  # as torch's losses need them

    @classmethod
    def from_floats(cls, images: Tensor, labels: Tensor, classes: int) -> ImageSet:
        """From float images in [0, 1], rounded to 256 levels.

        Raises:
            InputError: NaN, out of range, or labels outside 0..K-1.
        """
        check_images(images)
        return cls((images * 255).round().to(torch.uint8), labels, classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor | slice) -> Self:
        """The set of the images and labels at ``index``."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def first(self, count: int) -> Self:
        """The first ``count`` images of a fixed shuffle, so that every count is class-mixed."""
        rng = torch.Generator().manual_seed(_SPLIT_SEED)
        order = torch.randperm(len(self), generator=rng)[:count].sort().values
        return self.subset(order.to(self.images.device))

    def to(self, device: torch.device | str) -> Self:
        """The same data set on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def floats(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32 in [0, 1], (n, C, H, W)."""
        return self.images[index].float().div_(255)


@dataclass(frozen=True)
class Splits:
    """A data set's training, validation and test images; validation is cut from training."""

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device | str) -> Splits:
        """Training, validation and test images on ``device``."""
        parts = (part.to(device) for part in (self.train, self.validation, self.test))
        return Splits(self.name, *parts)


def stratified_split(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices (rest, part) with ``share`` of every class in ``part``; fixed by the package."""
    from sklearn.model_selection import train_test_split

    rest, part = train_test_split(
        np.arange(len(labels)), test_size=share, stratify=labels.numpy(), random_state=_SPLIT_SEED
    )
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))


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
            torchvision.
        data_dir: folder in torchvision's layout (all but digits).
        download: let torchvision fetch what is missing.
        train_n: use only this many training images.

    Raises:
        InputError: unknown name, missing or corrupt files, or ``train_n`` out of range.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if name == "digits" and (data_dir is not None or download):
        raise InputError(
            "digits is embedded and reads no folder: leave --data-dir and --download away, or say "
            f"which data lie there, e.g. --dataset {DATASETS[1]}"
        )
    full, test = _digits() if name == "digits" else _torchvision(name, data_dir, download)
    rest, held_out = stratified_split(full.labels, _VALIDATION.get(name, 0.02))
    train = full.subset(rest)
    if train_n is not None:
        if not 1 <= train_n <= len(train):
            raise InputError(f"train_n must lie in 1..{len(train)} for {name}, not {train_n}")
        train = train.first(train_n)
    return Splits(name, train, full.subset(held_out), test)


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


def augment(images: Tensor, rng: torch.Generator, *, flip: bool, pad: int = 4) -> Tensor:
    """Random crop after zero padding and random horizontal flip, each image by its own draw.

    Args:
        images: (B, C, H, W), any type; nothing leaves the device.
        rng: stream of the draws, on the images' device.
        flip: whether to flip (digits must not).
        pad: pixels of zero padding on every side.
    """
    batch, _, height, width = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pad + 1, (2, batch), generator=rng, device=device)
    rows = shift[0, :, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        coin = torch.rand(batch, 1, generator=rng, device=device) < 0.5
        columns = torch.where(coin, width - 1 - columns, columns)
    columns = shift[1, :, None] + columns
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(batch, device=device)[:, None, None]
    # advanced indices around a slice move to the front: (B, H, W, C)
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Batches:
    """An endless stream of training batches, epoch after epoch without replacement.

    Every epoch is a fresh permutation; the last incomplete batch of an epoch is dropped. With
    several processes each draws its own share of the same permutation. The stream's place is
    part of `state_dict`, so that a resumed run sees the same batches.

    Args:
        data: the training images, on the device.
        batch_size: B, images per batch and process.
        seed: seed of the order (equal on all processes) and of the augmentation.
        crop: pad by 4 pixels and crop.
        flip: flip half of the images horizontally (only with ``crop``).
        rank: this process' number.
        world: number of processes.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        *,
        crop: bool = False,
        flip: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 1 <= batch_size * world <= len(data):
            raise InputError(
                f"batch size must lie in 1..{len(data) // world} for {len(data)} training "
                f"images on {world} process(es), not {batch_size}"
            )
        self.data, self.batch_size, self.crop, self.flip = data, batch_size, crop, flip
        self.rank, self.world = rank, world
        self._order_rng = stream(seed, "order")
        self._crop_rng = stream(seed, f"augment{rank}", data.images.device)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def __len__(self) -> int:
        return len(self.data) // (self.batch_size * self.world)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch: float images (B, C, H, W) in [0, 1] and labels (B,)."""
        if self._position >= len(self) or not len(self._order):
            self._order = torch.randperm(len(self.data), generator=self._order_rng)
            self._position = 0
        start = (self._position * self.world + self.rank) * self.batch_size
        self._position += 1
        index = self._order[start : start + self.batch_size].to(self.data.images.device)
        images = self.data.images[index]
        if self.crop:
            images = augment(images, self._crop_rng, flip=self.flip)
        return images.float().div_(255), self.data.labels[index]

    def state_dict(self) -> dict[str, Tensor | int]:
        """The order, the place in it, and the states of both random streams."""
        return {
            "order": self._order,
            "position": self._position,
            "order_rng": self._order_rng.get_state(),
            "crop_rng": self._crop_rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._order, self._position = state["order"], state["position"]
        self._order_rng.set_state(state["order_rng"])
        self._crop_rng.set_state(state["crop_rng"])

"""Labelled images as uint8 on a device, and their training, validation and test splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from advgame.checks import check_images, check_labels
from advgame.errors import InputError

_SPLIT_SEED = 20220306  # splits belong to the package, not to a run's seed
_CAPTION = 14  # letters of a class' name that a picture has room for


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Args:
        images: uint8 (N, C, H, W), 0..255.
        labels: int64 (N,).
        classes: number of classes K.
        names: what the classes are called, in their order; () where they have numbers only.
    """

    images: Tensor
    labels: Tensor
    classes: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise InputError(
                f"images must be uint8 (N, C, H, W), not {self.images.dtype} "
                f"{tuple(self.images.shape)}; `from_floats` converts [0, 1] images"
            )
        if not len(self.images):
            raise InputError("the data set is empty")
        if len(self.names) not in (0, self.classes):
            raise InputError(f"{len(self.names)} names for {self.classes} classes: name each")
        check_labels(self.labels, len(self.images), self.classes)
        with torch.inference_mode(False):  # made there, neither could be learned from
            if self.images.is_inference():
                object.__setattr__(self, "images", self.images.clone())
            labels = self.labels.clone() if self.labels.is_inference() else self.labels
            object.__setattr__(self, "labels", labels.long())  # as torch's losses need them

    @classmethod
    def from_floats(
        cls, images: Tensor, labels: Tensor, classes: int, names: tuple[str, ...] = ()
    ) -> ImageSet:
        """From float images in [0, 1], rounded to 256 levels; the rest as of the class.

        Raises:
            InputError: NaN, out of range, or labels outside 0..K-1.
        """
        check_images(images)
        return cls((images * 255).round().to(torch.uint8), labels, classes, names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def caption(self, true: int, said: int) -> str:
        """True label → prediction, for a picture: names, cut short, where there are any.

        Args:
            true: the image's label.
            said: what a classifier says; -1 is no class.
        """
        if not self.names:
            return f"{true}→{said}"
        words = [self.names[k] if k >= 0 else "none" for k in (true, said)]
        short = [w if len(w) <= _CAPTION else f"{w[: _CAPTION - 1]}…" for w in words]
        return "→\n".join(short)

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

    def mixed(self) -> Self:
        """The same images in a fixed shuffled order: files are read class after class."""
        rng = torch.Generator().manual_seed(_SPLIT_SEED)
        return self.subset(torch.randperm(len(self), generator=rng).to(self.images.device))

    def to(self, device: torch.device | str) -> Self:
        """The same data set on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def floats(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32 in [0, 1], (n, C, H, W)."""
        return self.images[index].float().div_(255)


@dataclass(frozen=True)
class Splits:
    """A data set's training, validation and test images.

    Args:
        name: what reports call it.
        train: what is learned from.
        validation: what weights are selected by; of published data sets cut from training.
        test: what is judged.
        notes: what was done to the images, a sentence each; runs record them.

    Raises:
        InputError: a part that is no `ImageSet`, or whose images or classes are not those of the
            others.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts: dict[str, object] = {
            "training": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        for name, part in parts.items():
            if not isinstance(part, ImageSet):
                raise InputError(
                    f"the {name} images of {self.name} must be an advgame.ImageSet, not "
                    f"{type(part).__name__}: ImageSet.from_floats makes one"
                )
            its, first = _kind(part), _kind(self.train)
            for what in {**first, **its}:
                if its.get(what) != first.get(what):
                    raise InputError(
                        f"the {name} images of {self.name} must be like its training images: "
                        f"{what} is {first.get(what)} there and {its.get(what)} here"
                    )

    def to(self, device: torch.device | str) -> Splits:
        """Training, validation and test images on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )

    def repeats(self) -> tuple[str, ...]:
        """Whether validation or test images are training images, too, pixel for pixel; in words."""
        learned = {*_hashes(self.train)}
        found = []
        for name, part in (("validation", self.validation), ("test", self.test)):
            if count := sum(one in learned for one in _hashes(part)):
                found.append(
                    f"{count} of {len(part)} {name} images are training images, too, pixel for "
                    "pixel: accuracy on them shows memory"
                )
        return tuple(found)

    def about(self) -> dict[str, Any]:
        """What a run notes of its data: shape, classes, counts, and a digest of all images."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        digest = hashlib.sha256()
        for part in parts.values():
            for tensor in (part.images, part.labels):
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return {
            "shape": list(self.train.shape),
            "classes": self.train.classes,
            **({"names": list(self.train.names)} if self.train.names else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
            **{name: len(part) for name, part in parts.items()},
            "sha256": digest.hexdigest(),
        }


def _hashes(data: ImageSet) -> Iterator[int]:
    """Of each image's pixels; equal ones are equal, within a process."""
    return (hash(image.tobytes()) for image in data.images.cpu().numpy())


def _kind(data: ImageSet) -> dict[str, object]:
    """What all images of a task have in common, by name."""
    names = {f"the name of class {number}": name for number, name in enumerate(data.names)}
    return {"the shape": data.shape, "the number of classes": data.classes, **names}


def stratified_split(
    labels: Tensor, share: float, seed: int = _SPLIT_SEED
) -> tuple[Tensor, Tensor]:
    """Indices (rest, part) with ``share`` of every class in ``part``; the package has one seed."""
    from sklearn.model_selection import train_test_split

    rest, part = train_test_split(
        np.arange(len(labels)), test_size=share, stratify=labels.numpy(), random_state=seed
    )
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))

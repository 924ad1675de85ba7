"""Tasks for a privacy filter: grey images with one label to keep and one to hide.

The attribute is planted: a seeded fair coin per image, independent of its class, turns the image
into one of two kinds. So it is known that the labels have nothing in common, and that a filter
can, in principle, keep all of one and nothing of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advgame.checks import check_images
from advgame.data import ImageSet, Splits
from advgame.errors import InputError, unknown
from advgame.seeding import stream

KEEPS = ("class", "attribute", "parity")
SLANT, STROKE = 0.4, 0.3


def _slant(images: Tensor, coin: Tensor) -> Tensor:
    """Sheared to the one side or to the other by SLANT of the height, with zeros beyond."""
    shear = SLANT * (2 * coin - 1)
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    theta = torch.stack([torch.stack([one, shear, zero], 1), torch.stack([zero, one, zero], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def _stroke(images: Tensor, coin: Tensor) -> Tensor:
    """The images with a faint diagonal where the coin fell on 1."""
    diagonal = torch.eye(*images.shape[2:], device=images.device)
    return (images + STROKE * coin[:, None, None, None] * diagonal).clamp(0, 1)


def _inversion(images: Tensor, coin: Tensor) -> Tensor:
    """Black and white exchanged, or not."""
    chosen = coin[:, None, None, None]
    return chosen * (1 - images) + (1 - chosen) * images


_PLANTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slant": _slant,
    "stroke": _stroke,
    "inversion": _inversion,
}
ATTRIBUTES = tuple(_PLANTED)


def plant(images: Tensor, attribute: str, coin: Tensor) -> Tensor:
    """Images of the kind that the coin says.

    Args:
        images: (B, 1, H, W) in [0, 1].
        attribute: one of `ATTRIBUTES`.
        coin: (B,) of 0 and 1.

    Raises:
        InputError: unknown attribute, or images that are not grey ones in [0, 1].
    """
    if attribute not in _PLANTED:
        raise unknown("attribute", attribute, ATTRIBUTES)
    check_images(images)
    if images.shape[1] != 1:
        raise InputError(f"attributes are planted into grey images, not {images.shape[1]} channels")
    return _PLANTED[attribute](images, coin.to(images))


@dataclass(frozen=True)
class Part:
    """One split.

    Args:
        x: (n, D) float, pixels in [0, 1].
        useful: (n,) int64, the label to keep.
        private: (n,) int64, the label to hide.
    """

    x: Tensor
    useful: Tensor
    private: Tensor


@dataclass(frozen=True)
class PrivacyTask:
    """Three splits with both labels.

    Args:
        name: in words.
        train: what filters and inferences learn from.
        validation: what chooses.
        test: what is reported.
        useful_classes: number of classes of the label to keep.
        private_classes: of the label to hide.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    useful_classes: int
    private_classes: int

    def guess(self, label: str) -> float:
        """Chance: test accuracy of the most frequent training class of "useful" or "private"."""
        train, test = getattr(self.train, label), getattr(self.test, label)
        return float((test == train.bincount().argmax()).double().mean())

    def floor(self) -> float:
        """Test accuracy on the private label of an adversary that is told the useful one.

        It answers the private label that is most frequent among training images of that useful
        one. No filter that keeps the useful label whole can push an adversary below it.
        """
        pairs = self.train.useful * self.private_classes + self.train.private
        counts = pairs.bincount(minlength=self.useful_classes * self.private_classes)
        answers = counts.view(self.useful_classes, self.private_classes).argmax(1)
        return float((answers[self.test.useful] == self.test.private).double().mean())


def make_task(data: Splits, keep: str, attribute: str, seed: int) -> PrivacyTask:
    """A task on grey images.

    Args:
        data: images and their classes.
        keep: ``"class"`` hides the attribute, ``"attribute"`` hides the class, ``"parity"``
            keeps whether the class is odd and hides the class, without any attribute.
        attribute: one of `ATTRIBUTES`; of no effect for parity.
        seed: of the coins, one stream per split.

    Raises:
        InputError: unknown words.
    """
    if keep not in KEEPS:
        raise unknown("label to keep", keep, KEEPS)

    def part(split: ImageSet, name: str) -> Part:
        rng = stream(seed, f"attribute-{name}")
        coin = torch.randint(2, (len(split),), generator=rng).to(split.images.device)
        images, classes = split.floats(), split.labels
        if keep == "parity":
            return Part(images.flatten(1), classes % 2, classes)
        x = plant(images, attribute, coin).flatten(1)
        return Part(x, classes, coin) if keep == "class" else Part(x, coin, classes)

    names = {
        "class": f"keep the class, hide the {attribute}",
        "attribute": f"keep the {attribute}, hide the class",
        "parity": "keep the parity, hide the class",
    }
    classes = data.train.classes
    useful = classes if keep == "class" else 2
    private = 2 if keep == "class" else classes
    return PrivacyTask(
        f"{data.name}: {names[keep]}",
        part(data.train, "train"),
        part(data.validation, "validation"),
        part(data.test, "test"),
        useful,
        private,
    )

"""Which images survive which attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advgame.attacks import GradientAttack, attacked, fgsm, pgd
from advgame.checks import check_images, check_labels, check_logits
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.autoattack import autoattack
from advgame.seeding import stream
from advgame.threat import Threat

# name -> attack at a threat model; "autoattack" is AutoAttack standard through pyautoattack
ATTACKS: dict[str, Callable[[Threat], GradientAttack] | None] = {
    "fgsm": fgsm,
    "pgd10": lambda threat: pgd(threat, 10),
    "pgd20": lambda threat: pgd(threat, 20),
    "pgd100": lambda threat: pgd(threat, 100),
    "autoattack": None,
}


@dataclass(frozen=True)
class Verdicts:
    """What an evaluation found, image by image.

    Args:
        correct: name -> bool (N,), whether the image is still classified correctly; ``"clean"``
            comes first.
        largest: name -> the largest perturbation found, in the threat's norm.
        seconds: name -> wall-clock seconds.
    """

    correct: dict[str, Tensor]
    largest: dict[str, float]
    seconds: dict[str, float]

    def accuracy(self) -> dict[str, float]:
        """Share of images that are correct on the clean image and under each attack."""
        clean = self.correct["clean"]
        return {name: float((clean & ok).float().mean()) for name, ok in self.correct.items()}

    def worst_case(self) -> float:
        """Share of images that survive everything."""
        return float(torch.stack(list(self.correct.values())).all(0).float().mean())


def check_attacks(names: tuple[str, ...]) -> None:
    """Refuse names that are not in `ATTACKS`.

    Raises:
        InputError: an unknown name.
    """
    if unknown := [name for name in names if name not in ATTACKS]:
        raise InputError(f"unknown attack {unknown[0]!r}: choose from {', '.join(ATTACKS)}")


def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Classes of float images (N, C, H, W), (N,); the model's mode is the caller's."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(batch_size)])


def score(
    model: nn.Module, data: ImageSet, attack: GradientAttack, rng: torch.Generator
) -> tuple[float, float]:
    """Clean accuracy, and accuracy on images that are correct both clean and attacked."""
    images = data.floats()
    with attacked(model):
        clean = predict(model, images) == data.labels
        x_adv = _in_batches(model, images, data.labels, attack, rng)
        robust = clean & (predict(model, x_adv) == data.labels)
    return float(clean.float().mean()), float(robust.float().mean())


def validator(data: ImageSet, threat: Threat, seed: int) -> Callable[[nn.Module], dict[str, float]]:
    """Scores of a classifier on a validation split: clean, and robust to PGD-10.

    Every call draws the same random starts, so that epochs are compared on equal terms.
    """

    def validate(model: nn.Module) -> dict[str, float]:
        rng = stream(seed, "validate", data.images.device)
        clean, robust = score(model, data, pgd(threat, 10), rng)
        return {"eval/clean": clean, "eval/robust": robust}

    return validate


def evaluate(
    model: nn.Module,
    data: ImageSet,
    threat: Threat,
    attacks: tuple[str, ...] = ("fgsm", "pgd20", "autoattack"),
    *,
    seed: int = 0,
    batch_size: int = 500,
    progress: Callable[[str], None] = lambda line: None,
) -> Verdicts:
    """Attack every image with every attack, the model in evaluation mode.

    Args:
        model: maps images in [0, 1] to logits; left as it was found.
        data: test images, on the model's device.
        threat: the ball, with one radius for all.
        attacks: names from `ATTACKS`.
        seed: of the random starts and of AutoAttack.
        batch_size: images per batch.
        progress: told a line before each attack.

    Raises:
        InputError: unknown attack, or images, labels or logits that cannot be judged.
    """
    check_attacks(attacks)
    images, labels = data.floats(), data.labels
    check_images(images)
    check_labels(labels, len(images))
    correct: dict[str, Tensor] = {}
    largest: dict[str, float] = {"clean": 0.0}
    seconds: dict[str, float] = {}
    with attacked(model):
        with torch.no_grad():
            check_logits(model(images[:batch_size]), labels[:batch_size])
        began = time.perf_counter()
        correct["clean"] = predict(model, images, batch_size) == labels
        seconds["clean"] = time.perf_counter() - began
        for name in attacks:
            progress(f"attacking {len(images)} images with {name}")
            began = time.perf_counter()
            make = ATTACKS[name]
            if make is None:
                x_adv = autoattack(model, images, labels, threat, seed, batch_size)
            else:
                rng = stream(seed, f"evaluate {name}", images.device)
                x_adv = _in_batches(model, images, labels, make(threat), rng, batch_size)
            correct[name] = predict(model, x_adv, batch_size) == labels
            largest[name] = float(threat.size(x_adv - images).max())
            if float(x_adv.min()) < 0 or float(x_adv.max()) > 1:
                largest[name] = float("inf")
            seconds[name] = time.perf_counter() - began
    return Verdicts(_cpu(correct), largest, seconds)


def _cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


def _in_batches(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: GradientAttack,
    rng: torch.Generator,
    batch_size: int = 500,
) -> Tensor:
    """Adversarial examples of many images."""
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([attack.run(model, x, y, rng=rng, check=False).x_adv for x, y in parts])

"""`Verdicts`: which images survive which attack; predictions, accuracies, validation scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, attacked, fgsm, pgd
from advgame.data import ImageSet
from advgame.seeding import stream
from advgame.threat import Threat

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_BATCH = 500  # images at a time


@dataclass(frozen=True)
class Verdicts:
    """What an evaluation found, image by image.

    Args:
        correct: name -> (N,), whether the image is still classified correctly, bool; of a mixture
            of classifiers with what probability, a float. ``"clean"`` comes first.
        largest: name -> the largest perturbation found, in the threat's norm.
        seconds: name -> wall-clock seconds, summed over processes.
        forwards: name -> images passed through the classifier.
        backwards: name -> images whose input gradient was formed.
        no_answer: name -> images whose largest logit was NaN or infinite; they count as
            misclassified.
        notes: what a reader should know besides, one sentence each.
    """

    correct: dict[str, Tensor]
    largest: dict[str, float]
    seconds: dict[str, float]
    forwards: dict[str, int] = field(default_factory=dict)
    backwards: dict[str, int] = field(default_factory=dict)
    no_answer: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def accuracy(self) -> dict[str, float]:
        """Share of images that are correct on the clean image and under each attack."""
        clean = self.correct["clean"]
        return {
            name: float(torch.minimum(clean, ok).float().mean())
            for name, ok in self.correct.items()
        }

    def worst_case(self) -> float:
        """Share of images that survive everything, each under what does most to it."""
        return float(torch.stack(list(self.correct.values())).amin(0).float().mean())


def predict(model: nn.Module, images: Tensor, batch_size: int = _BATCH) -> Tensor:
    """Classes of float images (N, C, H, W), (N,); the model's mode is the caller's.

    An image whose largest logit is NaN or infinite has no class: -1, which no label is.
    """
    with torch.no_grad():
        best = [model(part).max(1) for part in images.split(batch_size)]
    return torch.cat([one.indices.where(one.values.isfinite(), -1) for one in best])


def adversarial(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, rng: torch.Generator | None
) -> Tensor:
    """Adversarial examples of any number of images, a batch at a time.

    Args:
        model: in the mode that it is to be attacked in.
        images: (N, C, H, W), known to be good: they are not checked. They stay as they are.
        labels: (N,).
        attack: what makes them.
        rng: draws for all batches.
    """
    parts = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    # copies: an own attack may work in place
    return torch.cat(
        [attack.run(model, x.clone(), y, rng=rng, check=False).x_adv for x, y in parts]
    )


def withstand(
    model: nn.Module,
    data: ImageSet,
    attack: Attack | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Which images of ``data`` are classified correctly, (N,), under an attack if there is one.

    Args:
        model: in the mode that it is to be attacked in.
        data: the images.
        attack: makes adversarial examples of them, a batch at a time.
        rng: draws for all batches.
    """
    images = data.floats()
    if attack is not None:
        images = adversarial(model, images, data.labels, attack, rng)
    return predict(model, images) == data.labels


@torch.inference_mode(False)
def score(
    model: nn.Module, data: ImageSet, attack: Attack, rng: torch.Generator
) -> tuple[float, float]:
    """Clean accuracy, and accuracy on images that are correct both clean and attacked."""
    with attacked(model):
        clean = withstand(model, data)
        robust = clean & withstand(model, data, attack, rng)
    return float(clean.float().mean()), float(robust.float().mean())


def validator(
    data: ImageSet,
    threat: Threat,
    seed: int,
    own: Attack | None = None,
    fabric: Fabric | None = None,
) -> Callable[[nn.Module], dict[str, float]]:
    """Scores of a classifier on a validation split: clean, under PGD-10 and under FGSM.

    ``eval/overfitting`` is how far FGSM's score lies above PGD-10's. A classifier that has learnt
    to answer single steps only shows in it: `advgame.evaluation.overfitting`.

    Every call draws the same random starts, so that epochs are compared on equal terms. Each batch
    draws from a stream of its own: processes that share the batches find what one alone does.

    Args:
        data: the split.
        threat: the ball.
        seed: of the random starts.
        own: the game's own attacker, whose score is ``eval/own_attacker``.
        fabric: of a training whose processes all call this, and share the batches.
    """
    attacks: dict[str, Attack | None] = {"eval/clean": None, "eval/robust": pgd(threat, 10)}
    attacks["eval/fgsm"] = fgsm(threat)
    if own is not None:
        attacks["eval/own_attacker"] = own
    rank, world = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    device = data.images.device

    def validate(model: nn.Module) -> dict[str, float]:
        right = torch.zeros(len(attacks), len(data), dtype=torch.int32, device=device)
        parts = [(row, start) for row in range(len(right)) for start in range(0, len(data), _BATCH)]
        every = list(attacks.values())
        with attacked(model):
            for row, start in parts[rank::world]:
                part = slice(start, start + _BATCH)
                rng = stream(seed, f"validate {start}" if start else "validate", device)
                right[row, part] = withstand(model, data.subset(part), every[row], rng).int()
        if fabric is not None and world > 1:
            right = cast(Tensor, fabric.all_reduce(right, reduce_op="sum"))
        right = right & right[0]  # what is wrong when clean survives nothing
        found = dict(zip(attacks, right.float().mean(1).tolist(), strict=True))
        return found | {"eval/overfitting": found["eval/fgsm"] - found["eval/robust"]}

    return validate


def out_of_memory(error: RuntimeError) -> bool:
    """A GPU's error has a class of its own; the CPU's is told by its words."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)

"""Checks for classifiers that cheat: they know the test images, or answer by who asks them.

Each probe asks the classifier twice where an honest one must answer the same, and returns name ->
meaning of what it saw. None of them holds against malice: a model is code, see docs/trust.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import numpy as np
import torch
from scipy.stats import fisher_exact
from torch import Tensor, nn

from advgame.attacks import APGD, FAB, Attack, fgsm, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.measure import evaluate
from advgame.evaluation.probes import random_signs
from advgame.evaluation.verdicts import Verdicts, predict, withstand
from advgame.seeding import stream
from advgame.statistics import beats
from advgame.threat import Linf, Threat

_FEW = 0.02  # share of images that rounding may move from one class to another
_ALIKE = 0.999  # correlation of an image with what a network holds


def one_function(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> dict[str, str]:
    """The same answers whoever asks: labels at hand or not, gradients wanted or not, any batch.

    Half of the images that are asked about are adversarial, since a cheat may be honest on others.
    """
    half = data.subset(slice(100))
    rng = stream(seed, "asked", data.images.device)
    x_adv = pgd(threat, 5).run(model, half.floats(), half.labels, rng=rng, check=False).x_adv
    asked = ImageSet.from_floats(
        torch.cat([half.floats(), x_adv.nan_to_num().clamp(0, 1)]),
        torch.cat([half.labels, half.labels]),
        data.classes,
    )
    images = asked.floats()
    alone = _alone(_logits, model, images)
    if not _agree(alone, _alone(_logits, model, images)):
        return {}  # randomised: another flag says so, and no two answers can be compared
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    order = order.to(images.device)
    mixed = torch.empty_like(alone)
    mixed[order] = _logits(model, images[order], 7)
    if not _agree(alone, mixed):
        return {
            "batch_dependent": "an image's logits depend on the other images in its batch, or on "
            "its place there: attacks regroup images, so that numbers mean nothing"
        }
    # a wrong label that would do: the second class, which on a fooled image is the right one
    decoys = alone.nan_to_num().topk(2, 1).indices[:, 1]
    misled = ImageSet(asked.images, decoys, data.classes)
    try:
        believed = _alone(evaluate, model, misled, threat, ()).correct["clean"].to(decoys.device)
    except InputError:
        return {}  # what cannot be evaluated is refused elsewhere
    believed &= alone.argmax(1) != decoys  # where two classes tie
    seen = [_alone(_while_attacked, model, images, y, threat) for y in (asked.labels, decoys)]
    firsts = [answers[: len(images)] for _, answers in seen]
    if float(believed.float().mean()) > _FEW or not _agree(*firsts):
        return {
            "reads_labels": "with other labels in its callers' hands it gives other answers: it "
            "reads them there"
        }
    n = len(images)  # no more at a time than before
    if all(_agree(_alone(_logits, model, x, n), answers) for x, answers in seen):
        return {}
    return {
        "depends_on_caller": "the same images get other logits while it is attacked: what an "
        "attack sees is not what is judged"
    }


def unchanged(model: nn.Module, data: ImageSet, verdicts: Verdicts) -> dict[str, str]:
    """After the attacks the clean images must get the verdicts that they got before."""
    before = verdicts.correct["clean"][: len(data)]
    after = withstand(model, data).to(before.device)
    if not (beats(before, after) or beats(after, before)):
        return {}
    return {
        "changed_since": (
            f"{int((before != after).sum())} of {len(data)} clean images have another verdict than "
            "before the attacks: the classifier changes as it is asked"
        )
    }


def knows_images(
    model: nn.Module, data: ImageSet, threat: Threat, seed: int, held_out: ImageSet | None
) -> dict[str, str]:
    """The test images must be strangers to it: not held, not peaks, no better than other images."""
    seen = ""
    if (share := _held(model, data)) >= 0.5:
        seen = f"{share:.0%} of the images that were looked for lie in its own tensors"
    elif (share := _peaks(model, data, seed)) > 0.5:
        seen = (
            f"on {share:.0%} of them the largest logit falls whichever way the image is changed: "
            "it is highest at these very images"
        )
    elif beats(*_nudged(model, data, seed)):
        seen = "it is right on them, and often wrong when pixels change by 1/255 at random"
    elif held_out is not None:
        seen = _better_than(model, data, held_out, threat, seed)
    return {"test_images_known": f"it seems to know the test images: {seen}"} if seen else {}


def _alone(call: Any, *args: Any) -> Any:
    """A call in a thread of its own, so that no frame above it holds anything but ``args``."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args).result()


def _logits(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """(N, K), without gradients and without labels."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch_size)])


def _while_attacked(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat
) -> tuple[Tensor, Tensor]:
    """What attacks that know ``labels`` ask, (M, C, H, W), and are answered, (M, K).

    The first rows are ``images`` themselves, in a batch as large as an evaluation's.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> None:
        calls.append((given[0].detach().clone(), logits.detach().clone()))  # attacks write in them

    hook = model.register_forward_hook(note)
    try:
        fgsm(threat).run(model, images.repeat(3, 1, 1, 1), labels.repeat(3), check=False)
        # each of AutoAttack's, for a few queries: a cheat may know one of them by its name
        attacks: list[Attack] = [AutoAttackPart(threat, "square", square_queries=5)]
        attacks += [APGD(threat, steps=1)]
        if isinstance(threat, Linf):
            attacks += [FAB(threat, iterations=1, targets=1)]
        for attack in attacks:
            rng = torch.Generator().manual_seed(0)
            with contextlib.suppress(InputError):  # images too small for it
                attack.run(model, images, labels, rng=rng, check=False)
    finally:
        hook.remove()
    asked, answers = zip(*calls, strict=True)
    return torch.cat(asked), torch.cat(answers)


def _agree(one: Tensor, two: Tensor) -> bool:
    """Whether two answers (N, K) lead by the same classes, by about as much, on most images.

    Only the two leading classes are compared: a huge logit elsewhere hides nothing.
    """
    one, two = (logits.float().nan_to_num() for logits in (one, two))
    lead = one.topk(2, 1).indices
    first, second = (logits.gather(1, lead).diff(dim=1)[:, 0] for logits in (one, two))
    least = 0.1 * first.abs().median() + 1e-4 * one.gather(1, lead).abs().amax(1)
    return float(((first - second).abs() > least).float().mean()) <= _FEW


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor and array that a module holds: parameters, buffers, attributes, closures."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        yield torch.from_numpy(value)
    elif isinstance(value, nn.Module):
        for module in value.modules():
            yield from _tensors(vars(module), depth)
    elif depth < 4:
        match value:
            case dict():
                held = [one for one in value.values() if not isinstance(one, nn.Module)]
            case list() | tuple():
                held = list(value)
            case FunctionType():
                held = [cell.cell_contents for cell in value.__closure__ or ()]
            case _:
                held = []
        for one in held:
            yield from _tensors(one, depth + 1)


def _held(model: nn.Module, data: ImageSet) -> float:
    """Share of 16 of the images that lie in the classifier's tensors, whatever their scale."""
    wanted = _centred(data.subset(slice(16)).floats().flatten(1).cpu())
    best = torch.zeros(len(wanted))
    for tensor in _tensors(model):
        if tensor.numel() and tensor.numel() % wanted.shape[1] == 0:
            for rows in tensor.reshape(-1, wanted.shape[1]).split(10_000):
                alike = _centred(rows.cpu().float()) @ wanted.T
                best = torch.maximum(best, alike.amax(0).nan_to_num())
    return float((best > _ALIKE).float().mean())


def _centred(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    scaled: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return scaled


def _peaks(model: nn.Module, data: ImageSet, seed: int) -> float:
    """Share of images where the largest logit falls along 8 random lines, both ways."""
    images, rng = data.floats(), stream(seed, "peaks", data.images.device)
    here, said = _logits(model, images).max(1)
    peak = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for _ in range(8):
        v = random_signs(images, rng)
        for way in (1, -1):
            there = _logits(model, images + way * v / 255).gather(1, said[:, None])[:, 0]
            peak &= there < here
    return float(peak.float().mean())


def _nudged(model: nn.Module, data: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
    """Which images are right with every pixel moved by 1/255 at random, and which as they are."""
    images, rng = data.floats(), stream(seed, "nudge", data.images.device)
    v = random_signs(images, rng)
    # inwards at the ends of [0, 1], so that every pixel moves
    v = torch.where(images <= 0, 1.0, torch.where(images >= 1, -1.0, v))
    moved, still = (predict(model, x) == data.labels for x in (images + v / 255, images))
    return moved, still


def _better_than(
    model: nn.Module, data: ImageSet, held_out: ImageSet, threat: Threat, seed: int
) -> str:
    """How far it does better on the test images than on others of the data set; "" where not."""
    sets = (data, held_out.first(len(data)))
    rng = stream(seed, "held out", data.images.device)
    for name, attack in {"clean": None, "under PGD-20": pgd(threat, 20)}.items():
        right = [withstand(model, one, attack, rng) for one in sets]
        counts = [[int(r.sum()), int((~r).sum())] for r in right]
        test, other = (float(r.float().mean()) for r in right)
        chance = fisher_exact(counts, alternative="greater").pvalue
        if test - other > 0.1 and chance < 1e-3:
            return (
                f"{name} it is right on {test:.0%} of them, and on {other:.0%} of other images of "
                "the same data set"
            )
    return ""

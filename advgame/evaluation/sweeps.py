"""How accuracy and loss depend on the attack: its radius, its steps, its direction, its chance.

A classifier whose accuracy does not fall with more steps or a larger ball, or whose loss is flat
along its own gradient, may be hiding its gradients.

Source: Jiang et al. 2021 (L2L), Fig. 4; Dong et al. 2020 (ADT), diversity of adversarial examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, attacked, pgd
from advgame.attacks.distributional import Sampler
from advgame.attacks.input_gradients import input_gradient
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.verdicts import adversarial, predict, score
from advgame.losses import cross_entropy
from advgame.seeding import stream
from advgame.threat import Threat, per_image


def over_radius(threat: Threat, shares: Sequence[float], steps: int = 10) -> dict[float, Attack]:
    """Radius -> PGD of ``steps`` steps of ε/4, ε being that radius (L2L's Fig. 4: 10 steps)."""
    balls = [threat.scaled(share) for share in shares]
    return {float(ball.eps): pgd(ball, steps) for ball in balls}


def over_steps(threat: Threat, steps: Sequence[int]) -> dict[float, Attack]:
    """Number of steps -> PGD with steps of ε/4, as `over_radius` and a report's ``pgd20``."""
    return {float(count): pgd(threat, count) for count in steps}


def sweep(
    model: nn.Module, data: ImageSet, attacks: Mapping[float, Attack], seed: int
) -> dict[float, float]:
    """Accuracy under each attack; all of them draw from the same stream.

    Args:
        model: left as it was.
        data: images, on the model's device.
        attacks: what is varied -> attack.
        seed: of the random starts.

    Returns:
        What is varied -> share of images that are right both clean and attacked.
    """
    device = data.images.device
    return {
        value: score(model, data, attack, stream(seed, "sweep", device))[1]
        for value, attack in attacks.items()
    }


def landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: torch.Generator,
    *,
    reach: float = 2.0,
    points: int = 21,
) -> Tensor:
    """Mean cross-entropy on a plane through the clean images, cut with [0, 1].

    Args:
        model: left as it was.
        x: (B, C, H, W).
        y: (B,).
        threat: in whose norm both directions have length 1, in units of ε.
        rng: draws the second direction, a random sign or normal vector per image.
        reach: the plane goes from -reach to +reach in both directions.
        points: along each axis; odd, so that the clean images are one.

    Returns:
        (points, points): rows go along the input gradient, columns along the random direction.

    Raises:
        InputError: an even number of points.
    """
    if points < 3 or points % 2 == 0:
        raise InputError(f"points must be an odd number of 3 or above, not {points}")
    noise = torch.randn(x.shape, generator=rng, device=x.device)
    with attacked(model):
        leaf = x.detach().requires_grad_()
        grad = input_gradient(cross_entropy(model(leaf), y).sum(), leaf)
        up, across = (
            threat.steepest(one) * per_image(threat.eps, x) for one in (grad, noise.to(x))
        )
        offsets = torch.linspace(-reach, reach, points).tolist()
        with torch.no_grad():
            losses = [
                cross_entropy(model((x + a * up + b * across).clamp(0, 1)), y).mean()
                for a in offsets
                for b in offsets
            ]
    return torch.stack(losses).view(points, points)


def diversity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    restarts: int,
    rng: torch.Generator,
) -> dict[str, float]:
    """How much an attack's adversarial examples differ from one run to the next.

    Args:
        model: left as it was.
        x: (B, C, H, W).
        y: (B,).
        attack: draws its starts from ``rng``; one without chance has no diversity.
        threat: the attack's ball.
        restarts: runs, 2 or more.
        rng: of all runs.

    Returns:
        Of `differences`.

    Raises:
        InputError: fewer than two runs.
    """
    if restarts < 2:
        raise InputError(f"diversity needs 2 restarts or more, not {restarts}")
    with attacked(model):
        made = [adversarial(model, x, y, attack, rng) for _ in range(restarts)]
    return differences(model, x, y, made, threat)


def differences(
    model: nn.Module, x: Tensor, y: Tensor, made: Sequence[Tensor], threat: Threat
) -> dict[str, float]:
    """How much adversarial examples of the same images differ.

    Args:
        model: left as it was.
        x: (B, C, H, W).
        y: (B,).
        made: two or more batches of adversarial examples (B, C, H, W).
        threat: the ball that they are in.

    Returns:
        ``cosine``: mean cosine of an image's perturbations in two batches, 1 for the same one;
        ``distance``: mean |difference| of their pixels, over the most that the ball allows, which
        is 2ε in L∞ and 2ε/√(C·H·W) in L2;
        ``wrong_classes``: how many wrong classes an image is taken for over all batches, mean.
    """
    with attacked(model):
        said = torch.stack([predict(model, one) for one in made])
    deltas = [(one - x).flatten(1) for one in made]
    pairs = list(combinations(deltas, 2))
    cosines = [torch.cosine_similarity(a, b, dim=1).mean() for a, b in pairs]
    unit = float(threat.eps) / threat.whole(x[0].numel())
    gaps = [(a - b).abs().mean() / (2 * unit) for a, b in pairs]
    wrong = [
        len(set(row) - {label}) for row, label in zip(said.T.tolist(), y.tolist(), strict=True)
    ]
    return {
        "cosine": float(torch.stack(cosines).mean()),
        "distance": float(torch.stack(gaps).mean()),
        "wrong_classes": sum(wrong) / len(wrong),
    }


def variety(
    model: nn.Module, data: ImageSet, sampler: Sampler, threat: Threat, runs: int, seed: int
) -> dict[str, Any]:
    """How far samples of one image's distribution lie apart, and PGD-20's from many starts.

    Args:
        model: left as it was.
        data: images, on the model's device.
        sampler: draws ``runs`` samples of each image from one distribution.
        threat: the ball.
        runs: 2 or more.
        seed: of both.

    Returns:
        ``sampler`` and ``pgd20``: see `differences`; n, runs and seed.
    """
    x, y = data.floats(), data.labels
    draws, starts = (stream(seed, name, x.device) for name in ("variety", "restarts"))
    made = list(sampler.draw(model, x, y, runs, draws))
    pgd20 = diversity(model, x, y, pgd(threat, 20), threat, runs, starts)
    found = {"sampler": differences(model, x, y, made, threat), "pgd20": pgd20}
    return {"n": len(data), "runs": runs, "seed": seed, **found}

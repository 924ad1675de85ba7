"""FAB (Croce & Hein 2020b): the nearest point of the decision boundary, by its linearisation.

Each iteration linearises the boundary to a target class, projects the iterate and the clean image
onto it inside [0, 1], mixes both, and steps a little beyond. From a point that is misclassified
it goes back towards the image. Where the nearest such point lies in the ball the attack succeeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks.attack import AttackResult
from advgame.attacks.input_gradients import input_gradient
from advgame.attacks.shards import ShardedAttack, Shards, logits_of
from advgame.errors import InputError
from advgame.losses import misclassified
from advgame.threat import Linf, per_image

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # of the paper: bias, overshoot, step back


@dataclass(frozen=True)
class FAB(ShardedAttack):
    """FAB towards several classes, from the clean image, in L∞.

    Settings are those of AutoAttack standard. It draws nothing. Images that are misclassified
    within the ball leave the batch, and the others are shared out among torch's threads.

    Args:
        threat: the L∞ ball, with one radius.
        iterations: projections towards each class.
        targets: so many of the likeliest wrong classes are aimed at.

    Raises:
        InputError: another norm, a radius per image, or numbers below 1.
    """

    threat: Linf
    iterations: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf) or isinstance(self.threat.eps, Tensor):
            raise InputError("FAB takes an Linf ball with one eps for all images")
        if min(self.iterations, self.targets) < 1:
            raise InputError("iterations and targets must be 1 or above")

    @override
    def _on_shards(
        self, shards: Shards, x: Tensor, y: Tensor, logits: Tensor, rng: torch.Generator | None
    ) -> AttackResult:
        x_adv, fooled, asked, formed = x.clone(), misclassified(logits, y), len(x), 0
        for rank in range(2, 2 + min(self.targets, logits.shape[1] - 1)):
            rows = (~fooled).nonzero()[:, 0]
            if not len(rows):
                break
            target = logits_of(shards.models[0], x[rows]).sort(dim=1).indices[:, -rank]
            found, fell, steps = shards.run(self._search, x[rows], y[rows], target)
            x_adv[rows[fell]], fooled[rows] = found[fell], fell
            formed += int(steps.sum())
            asked += 2 * int(steps.sum()) + len(rows)
        return AttackResult(x_adv, None, fooled, asked, formed)

    def _search(self, model: nn.Module, *given: Tensor) -> tuple[Tensor, ...]:
        return _Search(model, self.threat, self.iterations, given).run()


class _Search:
    """Images on their way to the boundary; those that reach it within the ball leave."""

    STATE: ClassVar[tuple[str, ...]] = ("x", "y", "target", "rows", "x_adv")

    def __init__(
        self, model: nn.Module, threat: Linf, iterations: int, given: tuple[Tensor, ...]
    ) -> None:
        self.model, self.eps, self.iterations = model, float(threat.eps), iterations
        self.x, self.y, self.target = given
        self.x_adv = self.x
        self.rows = torch.arange(len(self.x), device=self.x.device)
        self.found, self.steps = self.x.clone(), torch.zeros_like(self.y)
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(where it was fooled, whether it was, iterations) of each image."""
        for _ in range(self.iterations):
            if not len(self.rows):
                break
            self._towards_the_boundary()
            beyond = misclassified(logits_of(self.model, self.x_adv), self.y)
            self.steps[self.rows] += 1
            fell = beyond & ((self.x_adv - self.x).abs().flatten(1).amax(1) <= self.eps)
            back = self.x + (self.x_adv - self.x) * _BETA
            moved = torch.where(per_image(beyond, self.x), back, self.x_adv)
            self._leave(fell, moved)
        return self.found, self.fooled, self.steps

    def _towards_the_boundary(self) -> None:
        """Go to (1 - α)(x + η Π(x)) + α (x₀ + η Π(x₀)), clipped to [0, 1]."""
        leaf = self.x_adv.detach().requires_grad_()
        rows = torch.arange(len(self.y), device=leaf.device)
        with torch.enable_grad():
            logits = self.model(leaf).float()
            gap = logits[rows, self.target] - logits[rows, self.y]
            w = input_gradient(gap.sum(), leaf).flatten(1)
        here, clean = self.x_adv.flatten(1), self.x.flatten(1)
        b = (w * here).sum(1) - gap.detach()  # the boundary is ⟨w, z⟩ = b
        deltas = project_onto(torch.cat([here, clean]), w.repeat(2, 1), b.repeat(2))
        sizes = deltas.abs().amax(1).clamp_min(1e-8)
        of_here, of_clean = sizes.chunk(2)
        alpha = (of_here / (of_here + of_clean)).clamp(0.0, _ALPHA_MAX)[:, None]
        to_here, to_clean = deltas.chunk(2)
        mixed = (here + _ETA * to_here) * (1 - alpha) + (clean + to_clean * _ETA) * alpha
        self.x_adv = mixed.clamp(0.0, 1.0).view_as(self.x)

    def _leave(self, fell: Tensor, moved: Tensor) -> None:
        if bool(fell.any()):
            done = self.rows[fell]
            self.found[done], self.fooled[done] = self.x_adv[fell], True
            self.x_adv = moved
            for name in self.STATE:
                setattr(self, name, getattr(self, name)[~fell])
        else:
            self.x_adv = moved


def project_onto(points: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The smallest change in L∞ that brings points onto a hyperplane within [0, 1]^d.

    Where no point of the box lies on the hyperplane, the corner of the box nearest to it is
    aimed at. Every coordinate with w ≠ 0 moves by the same λ towards the hyperplane, or to the
    end of its range if that is nearer: λ solves Σ |w| min(range, λ) = |⟨w, z⟩ - b|. The authors
    sort the ranges. The sum is concave in λ, so that Newton's steps from 0 never pass the solution
    and end at it once no range lies between two of them.

    Args:
        points: (B, d) in [0, 1].
        w: (B, d), normal vectors.
        b: (B,), the hyperplanes are ⟨w, z⟩ = b.

    Returns:
        the changes, (B, d).
    """
    gap = (w * points).sum(1) - b
    side = torch.where(gap >= 0, 1.0, -1.0).to(points)
    missing, way = gap.abs(), w.sign() * side[:, None]
    # a coordinate may go down to 0 where w leads away from the hyperplane, else up to 1; numbers,
    # since torch compares into truth values more slowly on a CPU
    room = torch.lt(way, 0, out=torch.empty_like(points)).sub_(points).abs_()
    pull = w.abs()
    sums = torch.stack([pull, pull * room], 1)
    total = sums[:, 1].sum(1)
    amount, moving = torch.zeros_like(missing), torch.empty_like(points)
    while True:
        torch.gt(room, amount[:, None], out=moving)
        slope, left = torch.bmm(sums, moving[:, :, None]).squeeze(2).unbind(1)
        # all that do not move any more have spent their range
        further = torch.where(slope > 0, (missing - (total - left)) / slope, torch.inf)
        if not bool((further > amount).any()):
            break
        amount = torch.maximum(amount, further)
    return torch.minimum(room, amount[:, None]).mul_(way).neg_()

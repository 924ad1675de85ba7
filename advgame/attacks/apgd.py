"""Auto-PGD (Croce & Hein 2020, algorithm 1): steps that halve where the loss stops rising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks.attack import AttackResult
from advgame.attacks.input_gradients import input_gradient
from advgame.attacks.shards import ShardedAttack, Shards, logits_of
from advgame.errors import InputError
from advgame.losses import cross_entropy, misclassified
from advgame.threat import Threat, per_image

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,), targets (B,)) -> (B,)."""

_RHO, _ALPHA = 0.75, 0.75  # of the paper
_FIRST, _LAST, _SHRINK = 0.22, 0.06, 0.03  # checkpoints: shares of the steps
_LEAST_CLASSES = 4


@dataclass(frozen=True)
class APGD(ShardedAttack):
    """Auto-PGD on the cross-entropy, or on the targeted DLR loss towards several classes.

    The settings are AutoAttack's. Images that are misclassified leave the batch at once, and the
    others are shared out among torch's threads.

    Args:
        threat: the ball, with one radius.
        steps: gradient steps from each start.
        targets: 0 ascends the cross-entropy from one random start. Otherwise so many of the
            likeliest wrong classes are aimed at, one after the other, each from a start of its
            own; it takes four classes or more.

    Raises:
        InputError: a radius per image, or settings below 1.
    """

    threat: Threat
    steps: int = 100
    targets: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("Auto-PGD takes one eps for all images: give the threat a float")
        if self.steps < 1 or self.targets < 0:
            raise InputError(
                f"steps must be 1 or above and targets 0 or above, not {self.steps}, {self.targets}"
            )

    def _draws(self) -> str:
        return "a random start"

    @override
    def _on_shards(
        self, shards: Shards, x: Tensor, y: Tensor, logits: Tensor, rng: torch.Generator | None
    ) -> AttackResult:
        assert rng is not None
        if self.targets and logits.shape[1] < _LEAST_CLASSES:
            raise InputError(
                f"the targeted DLR loss takes {_LEAST_CLASSES} classes or more, not "
                f"{logits.shape[1]}"
            )
        x_adv, fooled, asked, formed = x.clone(), misclassified(logits, y), len(x), 0
        for rank in range(2, 2 + self.targets) if self.targets else (1,):
            rows = (~fooled).nonzero()[:, 0]
            if not len(rows):
                break
            aim = y[rows]
            if self.targets:
                aim = logits_of(shards.models[0], x[rows]).sort(dim=1).indices[:, -rank]
                asked += len(rows)
            start = on_the_face(self.threat, x[rows], rng)
            found, fell, passes = shards.run(self._ascend, x[rows], y[rows], aim, start)
            x_adv[rows[fell]], fooled[rows] = found[fell], fell
            asked, formed = asked + int(passes.sum()), formed + int(passes.sum())
        return AttackResult(x_adv, None, fooled, asked, formed)

    def _ascend(self, model: nn.Module, *given: Tensor) -> tuple[Tensor, ...]:
        loss = _targeted_dlr if self.targets else _untargeted
        return Ascent(model, self.threat, loss, self.steps, given).run()


def _untargeted(logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
    return cross_entropy(logits, y)


def _targeted_dlr(logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_π1 - (z_π3 + z_π4) / 2), equation 7."""
    ordered, rows = logits.sort(dim=1).values, torch.arange(len(y), device=y.device)
    spread = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return -(logits[rows, y] - logits[rows, aim]) / (spread + 1e-12)


def on_the_face(threat: Threat, x: Tensor, rng: torch.Generator) -> Tensor:
    """A random point whose largest entry (L∞), or length (L2), is ε, clipped to [0, 1]."""
    drawn = torch.empty(x.shape, dtype=torch.float32, device=rng.device)
    if threat.norm == "Linf":
        drawn = 2 * drawn.uniform_(generator=rng) - 1
    else:
        drawn = drawn.normal_(generator=rng)
    drawn = drawn.to(x)
    return (x + threat.eps * (drawn / per_image(threat.size(drawn) + 1e-12, x))).clamp(0, 1)


class Ascent:
    """Images in the middle of their ascent; those that fall leave.

    Args:
        model: the classifier.
        threat: the ball, with one radius.
        loss: what is ascended.
        steps: how many.
        given: images, labels, targets and starts, (B, ...) each.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        "x", "y", "aim", "rows", "x_adv", "before", "best", "gradient", "best_gradient",
        "loss", "best_loss", "checked_loss", "step", "halved", "history",
    )  # fmt: skip

    def __init__(
        self, model: nn.Module, threat: Threat, loss: Loss, steps: int, given: tuple[Tensor, ...]
    ) -> None:
        self.model, self.threat, self.of, self.steps = model, threat, loss, steps
        self.x, self.y, self.aim, self.x_adv = given
        self.rows = torch.arange(len(self.x), device=self.x.device)
        self.found, self.passes = self.x_adv.clone(), torch.zeros_like(self.y)
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)
        fell = self._query()
        self.before, self.best = self.x_adv, self.x_adv.clone()
        self.best_gradient = self.gradient.clone()
        self.best_loss, self.checked_loss = self.loss.clone(), self.loss
        self.step = torch.full_like(self.loss, 2.0 * float(threat.eps))
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)
        self.history = self.loss.new_zeros(len(self.x), 1)  # as in the authors' code
        self.project = threat.projector(self.x)
        self._leave(fell)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where it was fooled, whether it was, and forwards, of each image."""
        every, since = max(int(_FIRST * self.steps), 1), 0
        for step in range(self.steps):
            if not len(self.rows):
                break
            self._move(1.0 if step == 0 else _ALPHA)
            self._leave(self._query())
            self._remember()
            since += 1
            if since == every:
                self._check(every)
                since, every = 0, max(every - self._share(_SHRINK), self._share(_LAST))
        return self.found, self.fooled, self.passes

    def _share(self, share: float) -> int:
        return max(int(share * self.steps), 1)

    def _move(self, alpha: float) -> None:
        """Go by z = Π(x + η·steepest(∇)) to Π(x + α (z - x) + (1 - α)(x - x_before))."""
        direction = self.threat.steepest(self.gradient)
        z = self.x_adv + per_image(self.step, self.x) * direction
        z = self.project(z, slice(None)).sub_(self.x_adv).mul_(alpha).add_(self.x_adv)
        moved = z.add_(self.x_adv - self.before, alpha=1 - alpha)
        self.before, self.x_adv = self.x_adv, self.project(moved, slice(None))

    def _query(self) -> Tensor:
        """Loss and gradient at the present points; which images are misclassified there."""
        leaf = self.x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model(leaf).float()
            losses = self.of(logits, self.y, self.aim)
            self.gradient = input_gradient(losses.sum(), leaf)
        self.loss = losses.detach()
        self.passes[self.rows] += 1
        return self._fell(logits.detach())

    def _fell(self, logits: Tensor) -> Tensor:
        """Which of the present images need no further step, (B,)."""
        return misclassified(logits, self.y)

    def _leave(self, fell: Tensor) -> None:
        if not bool(fell.any()):
            return
        done = self.rows[fell]
        self.found[done], self.fooled[done] = self.x_adv[fell], True
        for name in self.STATE:
            setattr(self, name, getattr(self, name)[~fell])
        self.project = self.threat.projector(self.x)

    def _remember(self) -> None:
        better = (self.loss > self.best_loss).nonzero()[:, 0]
        self.best[better] = self.x_adv[better]
        self.best_gradient[better] = self.gradient[better]
        self.best_loss[better] = self.loss[better]
        self.history = torch.cat([self.history, self.loss[:, None]], 1)

    def _check(self, every: int) -> None:
        """Halve the step of an image, and go on from its best point, at a checkpoint.

        It is done where

        1. ρ or less of the steps since the last one raised the loss, or
        2. the step was not halved at the last one, and the best loss is what it was then.
        """
        rises = (self.history[:, -every - 1 :].diff(dim=1) > 0).sum(1)
        stuck = ~self.halved & (self.checked_loss >= self.best_loss)
        self.halved, self.checked_loss = (rises <= _RHO * every) | stuck, self.best_loss.clone()
        self.step = torch.where(self.halved, self.step / 2, self.step)
        wide = per_image(self.halved, self.x)
        self.x_adv = torch.where(wide, self.best, self.x_adv)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)

"""Square (Andriushchenko et al. 2020, algorithms 1 and 2): random search with squares, in L∞.

It asks for logits only. Each query moves one square, the same for all images, to a corner of the
ball, and keeps it where the margin shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks.attack import AttackResult
from advgame.attacks.shards import ShardedAttack, Shards
from advgame.errors import InputError
from advgame.losses import margin, misclassified
from advgame.threat import Linf

# the share of the image that a square covers halves after so many queries
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square(ShardedAttack):
    """The Square attack with the margin loss; settings are those of AutoAttack standard.

    Images that are misclassified leave the batch, and the others are shared out among torch's
    threads.

    Args:
        threat: the L∞ ball, with one radius.
        queries: squares that are tried.
        share: of the image that the first squares cover.

    Raises:
        InputError: another norm, a radius per image, or no query.
    """

    threat: Linf
    queries: int = 5000
    share: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf) or isinstance(self.threat.eps, Tensor):
            raise InputError("Square takes an Linf ball with one eps for all images")
        if self.queries < 1 or not 0 < self.share <= 1:
            raise InputError("queries must be 1 or above, and share lie in (0, 1]")

    def _draws(self) -> str:
        return "a random search"

    @override
    def _on_shards(
        self, shards: Shards, x: Tensor, y: Tensor, logits: Tensor, rng: torch.Generator | None
    ) -> AttackResult:
        assert rng is not None
        fooled, x_adv = misclassified(logits, y), x.clone()
        rows, channels = (~fooled).nonzero()[:, 0], x.shape[1]
        if not len(rows):
            return AttackResult(x, None, fooled, len(x), 0)
        # drawn for all images before they are shared out: stripes to begin with, then squares
        stripes = _uniform((len(rows), channels, 1, x.shape[3]), rng).to(x)
        squares = _uniform((self.queries, 2 + channels), rng)
        places, signs = squares[:, :2].cpu(), squares[:, 2:].to(x)  # the host asks for places

        def search(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return self._search(model, x, y, start, places, signs)

        start = (x[rows] + self.threat.eps * (2 * stripes - 1).sign()).clamp(0, 1)
        found, fell, asked = shards.run(search, x[rows], y[rows], start)
        x_adv[rows[fell]], fooled[rows] = found[fell], fell
        return AttackResult(x_adv, None, fooled, len(x) + int(asked.sum()), 0)

    def _search(
        self, model: nn.Module, x: Tensor, y: Tensor, best: Tensor, places: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(where it was fooled, whether it was, queries) of each image."""
        eps, rows = float(self.threat.eps), torch.arange(len(x), device=x.device)
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        best = best.clone()  # rows of a tensor that other threads have rows of
        found, asked, fooled = best.clone(), torch.zeros_like(y), torch.zeros_like(y) > 0
        logits = model(best).float()
        gap, fell = -margin(logits, y), misclassified(logits, y)
        asked += 1
        for number, (place, sign) in enumerate(zip(places, signs, strict=True)):
            if bool((done := fell | (gap <= 0)).any()):
                found[rows[done]], fooled[rows[done]] = best[done], fell[done]
                y, best, low, high, rows, gap, fell = (
                    one[~done] for one in (y, best, low, high, rows, gap, fell)
                )
            if not len(rows):
                break
            window = self._window(number, x.shape, *place)
            corner = 2 * eps * (2 * sign - 1).sign().view(-1, 1, 1)
            patch = (best[window] + corner).clamp(low[window], high[window])
            point = best.clone()
            point[window] = patch
            logits = model(point).float()
            now, wrong = -margin(logits, y), misclassified(logits, y)
            asked[rows] += 1
            better = wrong | (now < gap) | (now <= 0)
            best[window] = torch.where(better.view(-1, 1, 1, 1), patch, best[window])
            gap, fell = torch.where(better, now, gap), torch.where(better, wrong, fell)
        found[rows], fooled[rows] = best, fell
        return found, fooled, asked

    def _window(
        self, number: int, shape: torch.Size, down: Tensor, right: Tensor
    ) -> tuple[slice, slice, slice, slice]:
        """The square of a query; the last row and column are reached by the largest ones only."""
        height, width = shape[2:]
        share = self.share / 2 ** sum(number > after for after in _HALVINGS)
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        top, left = int((height - side) * down), int((width - side) * right)
        whole = slice(None)
        return whole, whole, slice(top, top + side), slice(left, left + side)


def _uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=rng.device).uniform_(generator=rng)

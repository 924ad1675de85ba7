"""`AttackState`: a batch of images under attack, one query of the classifier per step.

The learned gradient-step attack and the patch attack extend it; the attack environments step it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from advgame.checks import check_indices
from advgame.losses import cross_entropy, dlr, margin, misclassified
from advgame.threat import Threat, per_image


class Choices(ABC):
    """The lists that an agent chooses from; an action holds one index per list."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Number of options in each list."""

    @property
    @abstractmethod
    def feature_names(self) -> tuple[str, ...]:
        """Names of what the agent sees, in the order of `AttackState.features`."""

    def check(self, actions: Tensor) -> None:
        """Refuse what is not one index per image and list, (B, lists).

        Raises:
            InputError: wrong shape or type, or an index outside 0..n-1.
        """
        check_indices(actions, self.sizes)


class AttackState(ABC):
    """B images under attack. Every public tensor has one row per image.

    Args:
        model: a classifier in evaluation mode, without weight gradients;
            `advgame.attacks.attacked` makes it so.
        threat: the ball; its radius may be per image, (B,).
        choices: what an action chooses from.
        x: clean images (B, C, H, W) in [0, 1].
        y: labels (B,).
        budget: queries of each image, (B,) int64; the features know it, nothing enforces it.
    """

    x_adv: Tensor  # where the last query was made
    logits: Tensor  # (B, K) of the last query

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        choices: Choices,
        x: Tensor,
        y: Tensor,
        budget: Tensor,
    ) -> None:
        self.model, self.threat, self.choices, self.dtype = model, threat, choices, x.dtype
        self.forwards = self.backwards = 0
        eps = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        self._start(x, y, budget, eps + torch.as_tensor(threat.eps).to(eps))

    def _start(self, x: Tensor, y: Tensor, budget: Tensor, eps: Tensor) -> None:
        """New images in all rows; makes their first query."""
        # a copy, in fp32 at least: rows of it are overwritten when another image arrives
        self.x = x.detach().to(eps.dtype, copy=True)
        self.y, self.budget, self.eps = y.long().clone(), budget.clone(), eps
        self.best_x = torch.zeros_like(self.x)  # where the margin was highest
        self.margin = self.best_margin = self.start_margin = torch.zeros_like(eps)
        self.change = torch.zeros_like(eps)  # of the margin in the last step
        self.scale = torch.zeros_like(eps)  # standard deviation of the logits at the start
        self.used = torch.zeros_like(self.y)  # queries made
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)  # at any query so far
        # (B, lists), the last action; -1 before the first
        self.chosen = self.y.new_zeros(len(y), len(self.choices.sizes))
        self._query(self._begin(torch.arange(len(y), device=y.device)))

    @abstractmethod
    def step(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for every image.

        Args:
            actions: (B, lists) indices, not checked: `Choices.check` does.
            rows: positions (k,) whose images leave and make room; their actions are void.
            arrivals: images (k, C, H, W), labels (k,) and budgets (k,) that come instead, for
                whom this is the first query.
        """

    @abstractmethod
    def features(self) -> Tensor:
        """What an agent sees of each image, float32 (B, n) in [-1, 1]."""

    @abstractmethod
    def _forward(self, first: Tensor) -> None:
        """Set ``logits`` at ``x_adv``; ``first`` (B,) says for whom it is the first query."""

    def _begin(self, rows: Tensor) -> Tensor:
        """Forget what was known of the rows' images; returns the points where they start."""
        self.used[rows], self.chosen[rows] = 0, -1
        return self.x[rows]

    def _ball(self, rows: Tensor | slice = slice(None)) -> Threat:
        return self.threat.with_radii(self.eps[rows])

    def _go(
        self, point: Tensor, chosen: Tensor, rows: Tensor | None, arrivals: tuple[Tensor, ...]
    ) -> None:
        """Query the new points, the arrivals' in their rows."""
        self.chosen = chosen.clone()
        if rows is not None:
            self.x[rows], self.y[rows], self.budget[rows] = arrivals
            point[rows] = self._begin(rows)
        self._query(point)

    def _query(self, point: Tensor) -> Tensor:
        """The forward at the new points and what it says; whose margin is the best so far, (B,)."""
        first = self.used == 0
        self.x_adv = point
        self._forward(first)
        self.forwards += len(point)
        seen = self.logits.detach()
        reached = margin(seen, self.y).to(self.eps)
        spread = seen.to(self.eps).std(1, correction=0).clamp_min(1e-12)
        self.scale = torch.where(first, spread, self.scale)
        self.start_margin = torch.where(first, reached, self.start_margin)
        self.change = torch.where(first, 0.0, reached - self.margin)
        self.margin = reached
        better = first | (reached > self.best_margin)
        self.best_margin = torch.where(better, reached, self.best_margin)
        wrong = misclassified(seen, self.y)
        # no answer (NaN) has no margin, and is an error: nothing reaches more
        silent = wrong & ~(reached >= 0) & ~self.fooled
        self.best_x = select(self.best_x, point, better | silent)
        self.fooled = wrong | (self.fooled & ~first)
        self.used = self.used + 1
        return better

    def _common_features(self, logits: Tensor, reached: Tensor) -> list[Tensor]:
        """Queries left and urgency, then probability, margin, DLR and progress of a point."""
        left = (self.budget - self.used).to(self.scale)
        return [
            left / self.budget,
            1 / (1 + left.clamp_min(0)),
            torch.exp(-cross_entropy(logits, self.y)),
            squash(reached / self.scale),
            dlr(logits, self.y),
            self._progress(reached),
        ]

    def _progress(self, reached: Tensor) -> Tensor:
        """How far a margin has come from the start's to 0, (B,)."""
        return (reached - self.start_margin) / self.start_margin.abs().clamp_min(1e-12)

    def _rows(self) -> dict[str, Tensor]:
        """All that is kept per image."""
        public = (item for item in vars(self).items() if not item[0].startswith("_"))
        return {name: value for name, value in public if isinstance(value, Tensor)}

    def keep(self, mask: Tensor) -> None:
        """Go on with the rows of ``mask`` (B,) only."""
        self._keep(mask.nonzero()[:, 0])  # once: each mask that picks rows waits for the device

    def _keep(self, rows: Tensor) -> None:
        with torch.enable_grad():  # logits and losses may have a graph
            for name, value in self._rows().items():
                setattr(self, name, value[rows])

    def restart(self, rows: Tensor, x: Tensor, y: Tensor, budget: Tensor) -> None:
        """Put other images in the rows (k,) now, for k forwards more; `step` needs none for it."""
        new = object.__new__(type(self))
        vars(new).update(vars(self), forwards=0)
        new._start(x, y, budget, self.eps[rows])
        self._adopt(rows, new)

    def _adopt(self, rows: Tensor, new: Self) -> None:
        self.forwards += new.forwards
        with torch.enable_grad():  # logits and losses may have a graph
            for name, old in self._rows().items():
                setattr(self, name, old.index_copy(0, rows, getattr(new, name)))


StateT = TypeVar("StateT", bound=AttackState)


def attack_through(
    state: StateT, queries: int, step: Callable[[StateT], None]
) -> tuple[Tensor, Tensor]:
    """An attack from its first query, which ``state`` has made, to its last.

    An image that is fooled leaves the batch at once. Another's result is the best point seen,
    that of the highest margin.

    Args:
        state: the images under attack; afterwards, those that were not fooled before the last step.
        queries: forwards per image, the first one included.
        step: chooses and makes one query of every image that is left.

    Returns:
        the points (B, C, H, W), and who is fooled there (B,).
    """
    rows = torch.arange(len(state.y), device=state.y.device)
    x_adv, fooled = state.best_x.clone(), torch.zeros_like(state.fooled)
    for _ in range(queries - 1):
        if bool(state.fooled.any()):
            done = rows[state.fooled]
            x_adv[done], fooled[done] = state.best_x[state.fooled], True
            rows = rows[~state.fooled]
            state.keep(~state.fooled)
        if not len(rows):
            break
        step(state)
    x_adv[rows], fooled[rows] = state.best_x, state.fooled
    return x_adv, fooled


def select(a: Tensor, b: Tensor, choose_b: Tensor) -> Tensor:
    """Rows of ``a``, or of ``b`` where chosen, bit for bit: `lerp` is exact at 0 and at 1."""
    # on a CPU it takes less than half of `torch.where`'s time
    return torch.lerp(a, b, per_image(choose_b.to(a), a))


def squash(value: Tensor) -> Tensor:
    """V / (1 + |v|), in (-1, 1)."""
    return value / (1 + value.abs())


def in_range(entries: list[Tensor], *more: Any) -> Tensor:
    """Features of each image as one float32 (B, n), within [-1, 1] and without NaN."""
    numbers = torch.stack([one.float() for one in entries], 1)
    whole = torch.cat([numbers, *(one.float() for one in more)], 1)
    return torch.nan_to_num(whole, nan=0.0, posinf=1.0, neginf=-1.0).clamp_(-1, 1)

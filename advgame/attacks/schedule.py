"""Gradient ascent whose every step is chosen: the game that a learned attacker plays.

One query is one forward of the classifier on one image. The forward at the current point keeps
its graph, so that the next move may still choose which loss to send backward through it:

    g  = ∇ loss(x)                      the loss chosen: CE, DLR, margin, second
    x ← Π( b + (1-m)·α·steepest(g or Σg) + m·d )

from b, the current point or the best one, with the last displacement d (0 at the best one),
followed by the forward at the new x. A step costs one F and one B_x, nothing is wasted, and Q
queries are one forward and Q-1 steps. I-FGSM, PGD and MI-FGSM (Σ g/‖g‖₁: μ = 1) are sequences
of such moves, APGD is one up to where it projects; a move may also jump to a random point.

Sources: Madry et al. 2018 (PGD), Dong et al. 2018 (MI-FGSM), Croce & Hein 2020 (APGD, DLR).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from advgame.attacks.input_gradients import finite
from advgame.attacks.menu import CHOICES, Menu, Moves
from advgame.checks import check_logits
from advgame.errors import InputError
from advgame.losses import cross_entropy, dlr, margin
from advgame.threat import Threat, per_image

Start = Literal["clean", "random"]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, …), (B, …) -> (B,); never in half precision, which is no measure of an angle."""
    with torch.autocast(a.device.type, enabled=False):
        product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product


def _cosine(product: Tensor, lengths: Tensor) -> Tensor:
    """⟨a, b⟩ over |a|·|b|, 0 where one of them is 0, (B,)."""
    return torch.where(lengths > 0, product / lengths, 0.0)


def _select(a: Tensor, b: Tensor, choose_b: Tensor) -> Tensor:
    """Rows of ``a``, or of ``b`` where chosen, bit for bit: `lerp` is exact at 0 and at 1."""
    # on a CPU it takes less than half of `torch.where`'s time
    return torch.lerp(a, b, per_image(choose_b.to(a), a))


class Ascent:
    """B images under attack, one query at a time.

    Args:
        model: a frozen classifier in evaluation mode; `advgame.attacks.attacked` makes it one.
        threat: the ball.
        menu: what moves can be chosen.
        x: clean images (B, C, H, W) in [0, 1].
        y: labels (B,).
        budget: queries of each image, (B,) int64; the features know it, nothing enforces it.
        start: begin at the clean image, or at a random point of the ball.
        rng: stream of the random points, on the images' device.
        check: look at the first logits.

    Raises:
        InputError: random points without ``rng``; logits that cannot be attacked.
    """

    # one row per image, (B, C, H, W)
    x: Tensor
    x_adv: Tensor  # where the last query was made
    best_x: Tensor  # where the margin was highest
    gradient: Tensor  # of the last backward
    best_gradient: Tensor  # of the first backward from best_x
    total: Tensor  # Σ g/‖g‖₁ since the start or the last jump
    last: Tensor  # displacement of the last step
    # one number per image, (B,)
    margin: Tensor
    best_margin: Tensor
    start_margin: Tensor
    change: Tensor  # of the margin in the last step
    scale: Tensor  # standard deviation of the logits at the start
    gradient_length: Tensor
    last_length: Tensor
    promise: Tensor  # what the gradient promised for the last displacement
    agreement: Tensor  # what came of it, as a share
    cosine: Tensor  # of the last two gradients
    turned: Tensor  # cosine of the last two displacements
    fooled: Tensor  # at any query so far
    # one integer per image, (B,)
    used: Tensor  # queries made
    rivals: Tensor  # the class that was second among the wrong ones at the start
    since_best: Tensor  # queries since the best margin
    # (B, choices), -1 before the first
    chosen: Tensor
    # (B, K) and (B, losses), with their graph
    logits: Tensor
    losses: Tensor

    _NUMBERS = (
        *("margin", "best_margin", "start_margin", "change", "scale", "gradient_length"),
        *("last_length", "promise", "agreement", "cosine", "turned"),
    )
    _PICTURES = ("x_adv", "best_x", "gradient", "best_gradient", "total", "last")
    _ROWS = (
        *("x", "y", "eps", "budget", "used", "rivals", "since_best", "chosen", "fooled"),
        *("logits", "losses", *_PICTURES, *_NUMBERS),
    )

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        menu: Menu,
        x: Tensor,
        y: Tensor,
        budget: Tensor,
        *,
        start: Start = "clean",
        rng: torch.Generator | None = None,
        check: bool = False,
    ) -> None:
        if rng is None and (start == "random" or "random" in menu.moves):
            raise InputError("random points need rng, a torch.Generator on the images' device")
        self.model, self.threat, self.menu, self.start, self.rng = model, threat, menu, start, rng
        self.dtype = x.dtype
        self.forwards = self.backwards = 0
        # a copy, in fp32 at least: rows of it are overwritten when another image arrives
        self.x = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
        self.y, self.budget = y.long().clone(), budget.clone()
        numbers = self.x.new_zeros(len(x))
        self.eps = numbers + (
            threat.eps.to(numbers) if isinstance(threat.eps, Tensor) else threat.eps
        )
        for name in self._PICTURES:
            setattr(self, name, torch.zeros_like(self.x))
        for name in self._NUMBERS:
            setattr(self, name, numbers.clone())
        self.used, self.rivals, self.since_best = (torch.zeros_like(self.y) for _ in range(3))
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)
        self.chosen = torch.zeros(len(x), len(CHOICES), dtype=torch.int64, device=x.device)
        self._project = self._ball().projector(self.x)
        self._query(self._begin(torch.arange(len(x), device=x.device)))
        if check:
            check_logits(self.logits.detach(), self.y)

    def _begin(self, rows: Tensor) -> Tensor:
        """Forget what was known of the rows' images; returns the points where they start."""
        self.used[rows] = self.since_best[rows] = 0
        self.gradient[rows] = self.gradient_length[rows] = self.cosine[rows] = 0
        self.chosen[rows] = -1
        self._forget(rows)
        return self.x[rows] if self.start == "clean" else self._random(rows)

    def _forget(self, rows: Tensor) -> None:
        """Forget the way that led to where the rows are."""
        self.total[rows] = self.last[rows] = 0
        self.last_length[rows] = self.turned[rows] = self.promise[rows] = 0

    def _ball(self, rows: Tensor | slice = slice(None)) -> Threat:
        return self.threat.with_radii(self.eps[rows])

    def _random(self, rows: Tensor | slice) -> Tensor:
        assert self.rng is not None
        return self._ball(rows).random_start(self.x[rows], self.rng)

    def step(
        self, moves: Moves, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for every image: backward, move, forward.

        Args:
            moves: what each image does.
            rows: positions (k,) whose images leave and make room; their moves are void.
            arrivals: images (k, C, H, W), labels (k,) and budgets (k,) that come instead, for
                whom this is the first query.
        """
        values = self.losses.detach()
        gradient = self._gradient(moves.loss)
        base, along, last = self.x_adv, gradient, self.last
        if "best" in self.menu.moves:
            base = _select(base, self.best_x, moves.best)
            along = _select(along, self.best_gradient, moves.best)
            last = last * per_image((~moves.best).to(last), last)
        way = along
        if "accumulated" in self.menu.directions:
            way = _select(along, self.total, moves.accumulated)
        direction = self.threat.steepest(way)
        move = direction.mul_(per_image(moves.step_size * self.eps, direction))
        if max(self.menu.momenta) > 0:
            move = torch.lerp(move, last, per_image(moves.momentum.to(move), move))
        point = self._project(move.add_(base), slice(None))
        self._remember(along, base, point, moves)
        if "random" in self.menu.moves and len(jumps := moves.random.nonzero()[:, 0]):
            point[jumps] = self._random(jumps)
            self._forget(jumps)
        if rows is not None:
            self.x[rows], self.y[rows], self.budget[rows] = arrivals
            point[rows] = self._begin(rows)
            self._project = self._ball().projector(self.x)
        self._query(point)
        reached = (self.losses.detach() - values).gather(1, moves.loss[:, None])[:, 0]
        known = (self.promise > 0) & ~moves.best
        self.agreement = torch.where(known, reached / self.promise.clamp_min(1e-30), 0.0)

    def _gradient(self, loss: Tensor) -> Tensor:
        """∇ of each image's chosen loss at its current point; kept in what is remembered."""
        with torch.enable_grad():  # the caller may have it off
            total = self.losses.gather(1, loss[:, None]).sum()
        self.backwards += sum(len(leaf) for leaf in self._leaves)
        if total.requires_grad:
            found = torch.autograd.grad(
                total, self._leaves, allow_unused=True, materialize_grads=True
            )
        else:  # a classifier that cuts the graph: an evaluation's flags say so
            found = tuple(torch.zeros_like(leaf) for leaf in self._leaves)
        gradient = finite(found[0] if self._where is None else torch.cat(found)[self._where])
        length = _dot(gradient, gradient).sqrt()
        self.cosine = _cosine(_dot(gradient, self.gradient), length * self.gradient_length)
        self.gradient, self.gradient_length = gradient, length
        if "best" in self.menu.moves:
            self.best_gradient = _select(self.best_gradient, gradient, self.since_best == 0)
        if "accumulated" in self.menu.directions:
            size = gradient.abs().flatten(1).mean(1).clamp_min(1e-30)
            self.total.addcmul_(gradient, per_image(1 / size, gradient))
        return gradient

    def _remember(self, along: Tensor, base: Tensor, point: Tensor, moves: Moves) -> None:
        """The displacement, and what the gradient promised for it."""
        displacement = point - base
        length = _dot(displacement, displacement).sqrt()
        self.turned = _cosine(_dot(displacement, self.last), length * self.last_length)
        self.promise = _dot(along, displacement)
        self.last, self.last_length = displacement, length
        self.chosen = moves.chosen.clone()

    def _query(self, point: Tensor) -> None:
        """The forward at the new points, and what its logits say."""
        first = self.used == 0
        self.x_adv = point
        self._look(first)
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
        self.best_x = _select(self.best_x, point, better)
        self.since_best = torch.where(better, 0, self.since_best + 1)
        wrong = seen.argmax(1) != self.y
        self.fooled = wrong | (self.fooled & ~first)
        self.used = self.used + 1

    def _look(self, first: Tensor) -> None:
        """Logits and losses at the current points, with the graph that the next move needs."""
        leaf = self.x_adv.detach().requires_grad_()
        with torch.enable_grad():
            self.logits = self.model(leaf.to(self.dtype))
            others = self.logits.detach().scatter(1, self.y[:, None], -torch.inf)
            second = others.topk(min(2, others.shape[1] - 1), dim=1).indices[:, -1]
            self.rivals = torch.where(first, second, self.rivals)
            self.losses = self._losses()
        # row i of the gradient is row _where[i] of the leaves' gradients, one after the other
        self._leaves: list[Tensor] = [leaf]
        self._where: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled: the other side makes the last forward again."""
        derived = ("logits", "losses", "_leaves", "_where", "_project")
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._project = self._ball().projector(self.x)
        self._look(torch.zeros_like(self.fooled))

    def _losses(self) -> Tensor:
        """All losses of the menu at the current logits, (B, losses), with their graph."""
        found = []
        for name in self.menu.losses:
            if name == "second":
                rival = self.logits.gather(1, self.rivals[:, None])[:, 0]
                found.append(rival - self.logits.gather(1, self.y[:, None])[:, 0])
            else:
                loss = {"ce": cross_entropy, "dlr": dlr, "margin": margin}[name]
                found.append(loss(self.logits, self.y))
        return torch.stack([one.to(self.eps.dtype) for one in found], 1)

    def _place(self) -> Tensor:
        every = torch.arange(len(self.y), device=self.y.device)
        return every if self._where is None else self._where

    def keep(self, mask: Tensor) -> None:
        """Go on with the rows of ``mask`` (B,) only."""
        rows = mask.nonzero()[:, 0]  # once: each mask that picks rows waits for the device
        self._where = self._place()[rows]
        with torch.enable_grad():
            for name in self._ROWS:
                setattr(self, name, getattr(self, name)[rows])
        self._project = self._ball().projector(self.x)

    def restart(self, rows: Tensor, x: Tensor, y: Tensor, budget: Tensor) -> None:
        """Put other images in the rows (k,) now, for k forwards more; `step` needs none for it."""
        ball = self._ball(rows)
        new = Ascent(self.model, ball, self.menu, x, y, budget, start=self.start, rng=self.rng)
        place = self._place()
        held = sum(len(leaf) for leaf in self._leaves)
        self._where = place.index_copy(0, rows, held + torch.arange(len(rows), device=rows.device))
        self._leaves += new._leaves
        self.forwards += new.forwards
        with torch.enable_grad():
            for name in self._ROWS:
                old = getattr(self, name)
                setattr(self, name, old.index_copy(0, rows, getattr(new, name)))
        self._project = self._ball().projector(self.x)

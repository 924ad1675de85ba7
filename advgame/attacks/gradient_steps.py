"""The learned gradient-step attack: choices of a step, its state, and what an attacker sees.

One query is one forward of the classifier on one image. The forward at the current point keeps
its graph, so that the next step may still choose which loss to send backward through it:

    g  = ∇ loss(x)                      the loss chosen: CE, DLR, margin, second
    x ← Π( b + (1-m)·α·steepest(g or Σg) + m·d )

from b, the current point or the best one, with the last displacement d (0 at the best one),
followed by the forward at the new x. A step costs one F and one B_x, nothing is wasted, and Q
queries are one forward and Q-1 steps. I-FGSM, PGD and MI-FGSM (Σ g/‖g‖₁: μ = 1) are sequences
of such steps, APGD is one up to where it projects; a step may also jump to a random point.

Sources: Madry et al. 2018 (PGD), Dong et al. 2018 (MI-FGSM), Croce & Hein 2020 (APGD, DLR).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from advgame.attacks.input_gradients import finite, input_gradient
from advgame.attacks.queries import AttackState, Choices, in_range, select, squash
from advgame.checks import check_logits
from advgame.choices import MOVES
from advgame.errors import InputError
from advgame.losses import cross_entropy, dlr, margin
from advgame.threat import Threat, per_image

Start = Literal["clean", "random"]
LOSSES = ("ce", "dlr", "margin", "second")
DIRECTIONS = ("steepest", "accumulated")
CHOICES = ("step_size", "momentum", "loss", "direction", "move")
"""What a step consists of, in the order of an action's columns."""

# name -> what it is; s(v) = v / (1 + |v|); σ is the standard deviation of the logits at the start.
# Logits enter relative to their own spread, perturbations relative to ε, queries relative to the
# budget, so that what was learned on one classifier can be used on another.
FEATURES = {
    "queries_left": "queries left over the budget",
    "urgency": "1 / (1 + queries left)",
    "true_probability": "softmax probability of the true class",
    "margin": "s(margin / σ); the margin is the largest other logit minus the true one",
    "dlr": "the DLR loss, cut at ±1",
    "progress": "(margin - start margin) / |start margin|, cut at ±1: 1 at the boundary",
    "best_progress": "the same of the best margin so far",
    "change": "s(change of the margin in the last step / σ)",
    "behind": "s((best margin - margin) / σ)",
    "since_best": "queries since the best margin, over the budget",
    "rival_gap": "s((best other logit - logit of the class second at the start) / σ)",
    "on_face": "share of pixels on the ball's face (L2: 1 on it)",
    "promise": "s(⟨∇, displacement⟩): what the gradient promised of the last step (margins: / σ)",
    "agreement": "gain of the chosen loss over what the gradient promised, cut at ±1",
    "cosine": "cosine of the last two gradients",
    "turned": "cosine of the last two displacements",
}


class Step(NamedTuple):
    """One chosen step per image, each (B,)."""

    size: Tensor  # α in units of ε
    momentum: Tensor  # m, the share of the last displacement in the new one
    loss: Tensor  # index into `Menu.losses`
    accumulated: Tensor  # whether the direction follows Σ g/‖g‖₁ instead of g
    best: Tensor  # whether to step from the best point so far, along the gradient found there
    random: Tensor  # whether to go to a random point of the ball instead


@dataclass(frozen=True)
class Menu(Choices):
    """The lists that a gradient step is chosen from.

    Args:
        step_sizes: α in units of ε; L∞'s ball is 2ε wide.
        momenta: m; APGD's is 0.25.
        losses: of `LOSSES`. ``"second"`` is the logit of the class that was second among the
            wrong ones at the start, minus the true one's: another target to try.
        directions: of `DIRECTIONS`.
        moves: of `MOVES`: go on from the current point, from the best, or to a random one.

    Raises:
        InputError: an empty list, an unknown name, or a number that no attack can use.
    """

    step_sizes: tuple[float, ...] = (2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
    momenta: tuple[float, ...] = (0, 0.25, 0.5)
    losses: tuple[str, ...] = LOSSES
    directions: tuple[str, ...] = DIRECTIONS
    moves: tuple[str, ...] = MOVES

    def __post_init__(self) -> None:
        if not self.step_sizes or not all(0 < one < math.inf for one in self.step_sizes):
            raise InputError(f"step_sizes must be numbers above 0, not {self.step_sizes}")
        if not self.momenta or not all(0 <= m < 1 for m in self.momenta):
            raise InputError(f"momenta must lie in [0, 1), not {self.momenta}")
        for name, known in (("losses", LOSSES), ("directions", DIRECTIONS), ("moves", MOVES)):
            asked = getattr(self, name)
            if not asked or not set(asked) <= set(known):
                raise InputError(f"{name} must be of {', '.join(known)}, not {asked}")

    @property
    def lists(self) -> tuple[tuple[float, ...] | tuple[str, ...], ...]:
        """The options of each of `CHOICES`."""
        return self.step_sizes, self.momenta, self.losses, self.directions, self.moves

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of options of each of `CHOICES`."""
        return tuple(len(one) for one in self.lists)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """`FEATURES`, then one entry per option of the menu, 1 where it was chosen last."""
        last = [f"last_{c}_{i}" for c, n in zip(CHOICES, self.sizes, strict=True) for i in range(n)]
        return (*FEATURES, *last)

    def index(
        self, step_size: float, momentum: float, loss: str, direction: str, move: str
    ) -> tuple[int, ...]:
        """The action of one step.

        Raises:
            InputError: a value that is not in its list.
        """
        wanted = (step_size, momentum, loss, direction, move)
        for name, value, values in zip(CHOICES, wanted, self.lists, strict=True):
            if value not in values:
                raise InputError(f"no {name} {value!r} on this menu: it has {values}")
        return tuple(one.index(value) for value, one in zip(wanted, self.lists, strict=True))

    def decode(self, actions: Tensor) -> Step:
        """Indices (B, 5), not checked, as steps on their device."""
        step, momentum, loss, direction, move = actions.long().unbind(1)

        def pick(values: Any, index: Tensor) -> Tensor:
            return torch.tensor(values, device=actions.device)[index]

        return Step(
            pick([float(size) for size in self.step_sizes], step),
            pick([float(m) for m in self.momenta], momentum),
            loss,
            pick([one == "accumulated" for one in self.directions], direction),
            pick([one == "best" for one in self.moves], move),
            pick([one == "random" for one in self.moves], move),
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, …), (B, …) -> (B,); never in half precision, which is no measure of an angle."""
    with torch.autocast(a.device.type, enabled=False):
        product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product


def _cosine(product: Tensor, lengths: Tensor) -> Tensor:
    """⟨a, b⟩ over |a|·|b|, 0 where one of them is 0, (B,)."""
    return torch.where(lengths > 0, product / lengths, 0.0)


class GradientStepsState(AttackState):
    """B images under attack by chosen gradient steps.

    Args:
        model: see `AttackState`, as are threat, x, y and budget.
        menu: what steps can be chosen.
        start: begin at the clean image, or at a random point of the ball.
        rng: stream of the random points, on the images' device.
        check: look at the first logits.

    Raises:
        InputError: random points without ``rng``; logits that cannot be attacked.
    """

    rivals: Tensor  # the class that was second among the wrong ones at the start
    losses: Tensor  # (B, losses), with their graph, as have the logits
    _GRAPH = ("logits", "losses")

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
        self.menu, self.start, self.rng = menu, start, rng
        super().__init__(model, threat, menu, x, y, budget)
        if check:
            check_logits(self.logits.detach(), self.y)

    def _start(self, x: Tensor, y: Tensor, budget: Tensor, eps: Tensor) -> None:
        def blank() -> Tensor:
            return torch.zeros_like(x, dtype=eps.dtype)

        self.gradient = blank()  # of the last backward
        self.best_gradient = blank()  # of the first backward from best_x
        self.total = blank()  # Σ g/‖g‖₁ since the start or the last jump
        self.last = blank()  # displacement of the last step
        self.gradient_length, self.last_length = torch.zeros_like(eps), torch.zeros_like(eps)
        self.promise = torch.zeros_like(eps)  # what the gradient promised for the last displacement
        self.agreement = torch.zeros_like(eps)  # what came of it, as a share
        self.cosine = torch.zeros_like(eps)  # of the last two gradients
        self.turned = torch.zeros_like(eps)  # cosine of the last two displacements
        self.rivals = torch.zeros_like(y, dtype=torch.int64)
        self.since_best = torch.zeros_like(self.rivals)  # queries since the best margin
        super()._start(x, y, budget, eps)

    def _begin(self, rows: Tensor) -> Tensor:
        self.since_best[rows] = 0
        self.gradient[rows] = self.gradient_length[rows] = self.cosine[rows] = 0
        self._forget(rows)
        clean = super()._begin(rows)
        return clean if self.start == "clean" else self._random(rows)

    def _forget(self, rows: Tensor) -> None:
        """Forget the way that led to where the rows are."""
        self.total[rows] = self.last[rows] = 0
        self.last_length[rows] = self.turned[rows] = self.promise[rows] = 0

    def _random(self, rows: Tensor) -> Tensor:
        assert self.rng is not None
        return self._ball(rows).random_start(self.x[rows], self.rng)

    def step(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for every image: backward, move, forward; see `AttackState.step`."""
        self.take(self.menu.decode(actions), actions, rows, arrivals)

    def take(
        self,
        chosen: Step,
        actions: Tensor,
        rows: Tensor | None = None,
        arrivals: tuple[Tensor, ...] = (),
    ) -> None:
        """`step` with step sizes and momenta that need not be on the menu.

        Args:
            chosen: one step per image.
            actions: (B, 5) indices of the menu's nearest, which the features show.
            rows: see `AttackState.step`.
            arrivals: see there.
        """
        values = self.losses.detach()
        gradient = self._gradient(chosen.loss)
        base, along, last = self.x_adv, gradient, self.last
        if "best" in self.menu.moves:
            base = select(base, self.best_x, chosen.best)
            along = select(along, self.best_gradient, chosen.best)
            last = last * per_image((~chosen.best).to(last), last)
        way = along
        if "accumulated" in self.menu.directions:
            way = select(along, self.total, chosen.accumulated)
        direction = self.threat.steepest(way)
        move = direction.mul_(per_image(chosen.size * self.eps, direction))
        if max(self.menu.momenta) > 0:
            move = torch.lerp(move, last, per_image(chosen.momentum.to(move), move))
        point = self._ball().project(move.add_(base), self.x)
        self._remember(along, point - base)
        if "random" in self.menu.moves and len(jumps := chosen.random.nonzero()[:, 0]):
            point[jumps] = self._random(jumps)
            self._forget(jumps)
        self._go(point, actions.long(), rows, arrivals)
        reached = (self.losses.detach() - values).gather(1, chosen.loss[:, None])[:, 0]
        known = (self.promise > 0) & ~chosen.best
        self.agreement = torch.where(known, reached / self.promise.clamp_min(1e-30), 0.0)

    def _gradient(self, loss: Tensor) -> Tensor:
        """∇ of each image's chosen loss at its current point; kept in what is remembered."""
        with torch.enable_grad():  # the caller may have it off
            total = self.losses.gather(1, loss[:, None]).sum()
        self.backwards += sum(len(leaf) for leaf in self._leaves)
        found = input_gradient(total, *self._leaves)
        gradient = finite(found if self._where is None else found[self._where])
        length = _dot(gradient, gradient).sqrt()
        self.cosine = _cosine(_dot(gradient, self.gradient), length * self.gradient_length)
        self.gradient, self.gradient_length = gradient, length
        if "best" in self.menu.moves:
            self.best_gradient = select(self.best_gradient, gradient, self.since_best == 0)
        if "accumulated" in self.menu.directions:
            size = gradient.abs().flatten(1).mean(1).clamp_min(1e-30)
            self.total.addcmul_(gradient, per_image(1 / size, gradient))
        return gradient

    def _remember(self, along: Tensor, displacement: Tensor) -> None:
        """The displacement, and what the gradient promised for it."""
        length = _dot(displacement, displacement).sqrt()
        self.turned = _cosine(_dot(displacement, self.last), length * self.last_length)
        self.promise = _dot(along, displacement)
        self.last, self.last_length = displacement, length

    def _query(self, point: Tensor) -> Tensor:
        better = super()._query(point)
        self.since_best = torch.where(better, 0, self.since_best + 1)
        return better

    def _forward(self, first: Tensor) -> None:
        """Logits and losses at the current points, with the graph that the next step needs."""
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

    def _losses(self) -> Tensor:
        return torch.stack([self._loss(name).to(self.eps.dtype) for name in self.menu.losses], 1)

    def _loss(self, name: str) -> Tensor:
        if name == "second":
            rival = self.logits.gather(1, self.rivals[:, None])[:, 0]
            return rival - self.logits.gather(1, self.y[:, None])[:, 0]
        return {"ce": cross_entropy, "dlr": dlr, "margin": margin}[name](self.logits, self.y)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled: the other side makes their forwards again."""
        return {name: value for name, value in vars(self).items() if name not in self._GRAPH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with torch.enable_grad():  # each at its batch size, with which rounding differs
            made = [self.model(leaf.to(self.dtype)) for leaf in self._leaves]
            self.logits = torch.cat(made)[self._place()]
            self.losses = self._losses()

    def _place(self) -> Tensor:
        every = torch.arange(len(self.y), device=self.y.device)
        return every if self._where is None else self._where

    def _keep(self, rows: Tensor) -> None:
        self._where = self._place()[rows]
        super()._keep(rows)

    def _adopt(self, rows: Tensor, new: Self) -> None:
        held = sum(len(leaf) for leaf in self._leaves)
        more = held + torch.arange(len(rows), device=rows.device)
        self._where = self._place().index_copy(0, rows, more)
        self._leaves += new._leaves
        super()._adopt(rows, new)

    def features(self) -> Tensor:
        """The vector of each image, float32 (B, n), in the order of `Menu.feature_names`.

        An attacker with the gradient and the label has all of it.
        """
        logits, scale = self.logits.detach(), self.scale
        rival = logits.gather(1, self.rivals[:, None])[:, 0].to(scale)
        true = logits.gather(1, self.y[:, None])[:, 0].to(scale)
        # margins are in logits; CE is in nats and DLR has no unit
        in_logits = torch.tensor([name in ("margin", "second") for name in self.menu.losses])
        loss = self.chosen[:, CHOICES.index("loss")]
        unit = torch.where(in_logits.to(loss.device)[loss], scale, 1.0)
        entries = [
            *self._common_features(logits, self.margin),
            self._progress(self.best_margin),
            squash(self.change / scale),
            squash((self.best_margin - self.margin) / scale),
            self.since_best / self.budget,
            squash((self.margin + true - rival) / scale),
            self._ball().on_face(self.x_adv - self.x),
            squash(self.promise / unit),
            self.agreement,
            self.cosine,
            self.turned,
        ]
        options = [
            torch.arange(size, device=loss.device) == self.chosen[:, column, None]
            for column, size in enumerate(self.menu.sizes)
        ]
        return in_range(entries, *options)

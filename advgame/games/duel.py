"""The duel: attacker and defender choose at the same time how a classifier's next step goes.

    x' = x + δ, with δ by PGD of the attacker's strategies (ε, steps, step size)
    θ ← θ − m·λ ∇ mean[ (1 − w) L_f(θ; x', y) + w L_f(θ; x, y) ],  the defender's lesson (m, w, f)

L_f is the cross-entropy with label smoothing f; with adversarial weight perturbation the gradient
is formed at the worst weights nearby. What the step was worth is v(θ), the classifier's standing
on images that it does not learn from:

    v = robust accuracy under PGD-10 at ε₀,   or   v = −loss there

The defender earns v(θ after) − v(θ before), the attacker the opposite: zero-sum, whereas LAS-AT
(`advgame.games.las_at`) pays its attacker also for what helps the defender. A standing is a
multiple of 2⁻²⁰, so that differences and their sums are exact: what an episode pays is its last
standing less its first, to the bit, in float32 too.

`envs.duel` plays it as a PettingZoo environment. The strategies are LAS-AT's (Jia et al. 2022), the
perturbation of weights is AWP's (Wu et al. 2020); the game is ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advgame.attacks import attacked, pgd
from advgame.checks import check_indices
from advgame.choices import Stake
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.awp import AWPDefender, descend_at_worst
from advgame.games.costs import DefenderStep, Passes
from advgame.games.las_at import LasAt
from advgame.games.strategy import Strategies
from advgame.losses import check_smoothing, cross_entropy, smoothed_cross_entropy
from advgame.threat import Threat

LESSON = ("rate", "clean", "true_probability", "awp")
"""What a lesson consists of, in the order of an action's columns."""
LARGEST_LOSS = 16.0
"""Losses count up to here, also where a classifier has diverged."""
_GRID = 2.0**20


@dataclass(frozen=True)
class Lesson:
    """How the defender learns from a batch.

    Args:
        rate: m, factor of the optimiser's learning rate.
        clean: w, weight of the clean images' loss; that of the adversarial examples is 1 − w.
        true_probability: f, label smoothing; 1 is none.
        awp: whether the gradient is formed at the worst weights nearby.
    """

    rate: float = 1.0
    clean: float = 0.0
    true_probability: float = 1.0
    awp: bool = False


@dataclass(frozen=True)
class LessonSpace:
    """The lists that a lesson is chosen from.

    Args:
        rates: choices of m.
        clean: choices of w.
        true_probabilities: choices of f.
        awp: choices of weight perturbation.

    Raises:
        InputError: an empty list, or a number that nobody can learn with.
    """

    rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    clean: tuple[float, ...] = (0.0, 0.25, 0.5)
    true_probabilities: tuple[float, ...] = (1.0, 0.9, 0.8, 0.6)
    awp: tuple[bool, ...] = (False, True)

    def __post_init__(self) -> None:
        held: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "rates": ("be above 0", lambda m: 0 < m < math.inf),
            "clean": ("lie in [0, 1]", lambda w: 0 <= w <= 1),
            "true_probabilities": ("lie in (0, 1]", lambda f: 0 < f <= 1),
            "awp": ("be True or False", lambda on: isinstance(on, bool)),
        }
        for name, (words, holds) in held.items():
            values = tuple(getattr(self, name))
            if not values or not all(holds(value) for value in values):
                raise InputError(f"{name} must {words}, one value or more, not {values}")
            object.__setattr__(self, name, values)

    @property
    def lists(self) -> tuple[tuple[float, ...], ...]:
        """What each column of an action chooses from."""
        return (self.rates, self.clean, self.true_probabilities, self.awp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of each column."""
        return tuple(len(values) for values in self.lists)

    def check(self, classes: int) -> None:
        """Refuse a label smoothing that so many classes do not have.

        Raises:
            InputError: which one.
        """
        for value in self.true_probabilities:
            check_smoothing(value, classes)

    def decode(self, action: Tensor) -> Lesson:
        """Indices (4,) -> the lesson.

        Raises:
            InputError: wrong shape or type, or an index outside its list.
        """
        check_indices(action[None], self.sizes)
        return Lesson(*[one[i] for one, i in zip(self.lists, action.tolist(), strict=True)])

    def index(self, lesson: Lesson) -> tuple[int, ...]:
        """Indices of a lesson, each of the value of its list that is nearest."""
        return nearest(self.lists, [getattr(lesson, name) for name in LESSON])


@dataclass(frozen=True)
class Standing:
    """How good a classifier is on the held-out images; multiples of 2⁻²⁰.

    Args:
        robust: share of images that are right, clean and under PGD-10 at ε₀.
        clean: share of images that are right.
        loss: mean cross-entropy under PGD-10, at most `LARGEST_LOSS`.
    """

    robust: float
    clean: float
    loss: float

    def value(self, stake: Stake) -> float:
        """The defender's v: robust accuracy, or −loss."""
        return self.robust if stake == "robust" else -self.loss


@dataclass(frozen=True)
class DuelStep(DefenderStep):
    """What one step of the duel did.

    Args:
        loss: mean cross-entropy on the adversarial examples before the step, at most
            `LARGEST_LOSS`.
        accuracy: share of the adversarial examples that were right before the step.
        entropy: of the predictions for them, over that of a uniform one.
    """

    loss: float
    accuracy: float
    entropy: float


@dataclass(frozen=True)
class Duel:
    """The rules.

    Args:
        threat: the ball of radius ε₀ in which the classifier's standing is taken.
        gamma: γ of adversarial weight perturbation, where a lesson asks for it.
    """

    threat: Threat
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise InputError(f"gamma must lie between 0 and 1, not {self.gamma}")

    def check(self, defender: Defender) -> None:
        """Refuse a defender whose lessons could not be chosen.

        Raises:
            InputError: weight perturbation that is always on.
        """
        if isinstance(defender, AWPDefender):
            raise InputError("the defender chooses AWP step by step: give a Defender")

    def step(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        strategies: Strategies,
        lesson: Lesson,
        rng: torch.Generator,
    ) -> DuelStep:
        """One training step: PGD of the strategies, then the lesson.

        Args:
            defender: θ and its optimiser.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            strategies: of the attacker, one PGD configuration per image.
            lesson: of the defender.
            rng: stream of the random starts, on the images' device.
        """
        with defender.under_attack():
            made = (
                LasAt(self.threat)
                .attack(strategies)
                .run(defender.module, x, y, rng=rng, check=False)
            )
        x_adv, w = made.x_adv, lesson.clean
        passes = Passes()
        passes.add_attack(made)
        first: list[Tensor] = []

        def loss(model: nn.Module) -> Tensor:
            logits = model(x_adv)
            first.append(logits.detach())
            losses = smoothed_cross_entropy(logits, y, lesson.true_probability)
            if not w:
                return losses
            clean = smoothed_cross_entropy(model(x), y, lesson.true_probability)
            return (1 - w) * losses + w * clean

        if lesson.awp:
            losses = descend_at_worst(defender.descend, defender.module, loss, self.gamma)
        else:
            losses = defender.descend(loss)
        passes.add_descent(defender, (1 + lesson.awp) * (1 + bool(w)))
        with _times(defender.optimizer, lesson.rate):
            defender.step()
        logits = first[0]  # at θ, before the step
        told = (
            _capped(cross_entropy(logits, y).mean()),
            float(_right(logits, y).float().mean()),
            _entropy(logits),
        )
        stats = {"game/adversarial_loss": losses.mean(), **passes.stats(x.device)}
        return DuelStep(x_adv, losses, stats, *told)

    def judge(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> Standing:
        """The standing of a classifier, which is left as it was.

        Args:
            model: the classifier.
            x: held-out images (N, C, H, W).
            y: (N,).
            rng: stream of PGD's starts; a standing is compared with another one of equal starts.
        """
        x_adv = pgd(self.threat, 10).run(model, x, y, rng=rng, check=False).x_adv
        with attacked(model), torch.no_grad():
            clean, robust = model(x), model(x_adv)
        right = _right(clean, y)
        return Standing(
            _exact(float((right & _right(robust, y)).float().mean())),
            _exact(float(right.float().mean())),
            _exact(_capped(cross_entropy(robust, y).mean())),
        )


def payoffs(before: Standing, after: Standing, stake: Stake) -> tuple[float, float]:
    """What a change of the standing pays the attacker and the defender; their sum is 0."""
    rise = after.value(stake) - before.value(stake)
    return 0.0 - rise, rise  # not −rise: no pay is 0.0, and not −0.0


def nearest(lists: Sequence[Sequence[float]], wanted: Sequence[float]) -> tuple[int, ...]:
    """Indices of the values of the lists that are nearest to those wanted, one of each list."""
    pairs = zip(lists, wanted, strict=True)
    return tuple(min(range(len(of)), key=lambda i: abs(of[i] - one)) for of, one in pairs)


def places(chosen: Tensor, sizes: Sequence[int]) -> list[float]:
    """Where choices (n, lists) lie in their lists on average: 0 the first option, 1 the last."""
    last = torch.tensor([max(size - 1, 1) for size in sizes], device=chosen.device)
    mean: list[float] = (chosen.float().mean(0) / last).tolist()
    return mean


@contextlib.contextmanager
def _times(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Within the block the learning rates are ``factor`` times what they are."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _right(logits: Tensor, y: Tensor) -> Tensor:
    """Which images are classified correctly, (B,); one without finite logits is not."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def _entropy(logits: Tensor) -> float:
    """Mean entropy of the predictions over log K, in [0, 1]; 0 of logits that are not finite."""
    p = logits.float().softmax(1)
    mean = float(torch.special.entr(p).sum(1).mean()) / math.log(logits.shape[1])
    return min(max(mean, 0.0), 1.0) if math.isfinite(mean) else 0.0


def _capped(loss: Tensor) -> float:
    value = float(loss)
    return LARGEST_LOSS if math.isnan(value) else min(value, LARGEST_LOSS)


def _exact(value: float) -> float:
    """The nearest multiple of 2⁻²⁰: sums and differences of such numbers are not rounded."""
    return round(value * _GRID) / _GRID

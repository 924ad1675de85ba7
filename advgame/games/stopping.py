"""When the attack on a training image ends: at its first error, or when going on gains too little.

PGD-AT gives every image the same number of steps. Here each image of a batch has its own, decided
while the attack runs:

- `StopAtError`: FAT's rule (Zhang et al., Attacks Which Do Not Kill Training Make Adversarial
  Learning Stronger, ICML 2020), algorithm 1 with τ = 0.
- `LearnedStop`: ridge regression predicts what the next step gains,
      ŵ = (Σ λ^age φφᵀ + ρ I)⁻¹ Σ λ^age φ g,    g = loss(x_{t+1}) - loss(x_t),
  and an image takes its last step where ŵᵀφ < θ. The threshold θ follows the mean number of
  steps that was asked for, so that what is learned is who gets them. Ours.
- `DealtSteps`: the same numbers of steps, dealt to the images of the batch at random: the control
  that says whether it matters who gets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import Attack, AttackResult, GradientAttack
from advgame.attacks.queries import squash
from advgame.attacks.stopping import Seen, StoppingRule
from advgame.errors import InputError, unknown
from advgame.games.costs import relative_size
from advgame.health import PREFIX
from advgame.losses import full_precision, margin

# name -> what it is; s(v) = v / (1 + |v|)
FEATURES = {
    "one": "1",
    "probability": "p, the softmax probability of the true class",
    "doubt": "p (1 - p)",
    "margin": "m = s(largest other logit - true logit)",
    "margin_square": "m²",
    "fall": "p less p one step ago; 0 at the start",
    "done": "steps done over the most that an image can have",
    "room": "1 - mean |δ| / ε (L2: in the unit where a constant δ on the ball's face has 1)",
    "eps": "ε / ε₀",
}
"""What `LearnedStop` sees of an image."""
PROBES = 20
"""With a fixed threshold one image in so many is attacked to its end, whatever is predicted."""


def true_probability(seen: Seen) -> Tensor:
    """The softmax probability of the true class, (n,)."""
    p: Tensor = full_precision(seen.logits).softmax(1).gather(1, seen.y[:, None])[:, 0]
    return p


def features(seen: Seen, p: Tensor, before: Tensor, eps0: float) -> Tensor:
    """`FEATURES` of each image, (n, 9).

    Args:
        seen: the images, before a step.
        p: (n,) probability of the true class.
        before: (n,) the same one step ago, ``p`` itself at the start.
        eps0: ε₀.
    """
    m = squash(margin(seen.logits, seen.y))
    room = 1 - relative_size(seen.delta, seen.threat).abs().flatten(1).mean(1)
    done = torch.full_like(p, seen.done / seen.limit)
    eps = torch.as_tensor(seen.threat.eps).to(p).expand_as(p) / eps0
    return torch.stack(
        [p.new_ones(len(p)), p, p * (1 - p), m, m * m, p - before, done, room, eps], 1
    )


class Ridge:
    """Linear regression that forgets: what is λ^age old counts as much less.

    Args:
        inputs: length of the feature vector.
        memory: λ, per batch; 0.98 is a memory of 50 batches.
        penalty: ρ.
    """

    def __init__(self, inputs: int, memory: float = 0.98, penalty: float = 1.0) -> None:
        if not 0 < memory <= 1 or penalty <= 0:
            raise InputError("a ridge regression needs a memory in (0, 1] and a penalty above 0")
        self.memory, self.penalty = memory, penalty
        # on the CPU in fp64: normal equations square the condition number
        self.moment = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.product = torch.zeros(inputs, dtype=torch.float64)
        self.weights = torch.zeros(inputs, dtype=torch.float64)

    def fit(self, seen: Tensor, target: Tensor) -> None:
        """One more batch of features (n, inputs) and targets (n,)."""
        rows, goal = seen.cpu().double(), target.cpu().double()
        self.moment = self.memory * self.moment + rows.T @ rows
        self.product = self.memory * self.product + rows.T @ goal
        self.weights = torch.linalg.solve(self.precision(), self.product)

    def precision(self) -> Tensor:
        """Σ λ^age φφᵀ + ρ I: over the variance of the noise, the inverse covariance of w."""
        return self.moment + self.penalty * torch.eye(len(self.weights), dtype=torch.float64)

    def predict(self, seen: Tensor) -> Tensor:
        """Predictions (n,) for features (n, inputs), on their device."""
        return seen @ self.weights.to(seen)

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and weights as they stand."""
        return {name: getattr(self, name) for name in ("moment", "product", "weights")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved place."""
        self.moment, self.product = state["moment"].cpu(), state["product"].cpu()
        self.weights = state["weights"].cpu()


def adapted(threshold: float, mean_steps: float, goal: float, spread: float) -> float:
    """The threshold for the next batch: higher where the images had too many steps.

    Args:
        threshold: θ.
        mean_steps: of the batch.
        goal: what they should be.
        spread: standard deviation of a step's gain, the unit of θ.
    """
    return threshold + 0.05 * spread * (mean_steps - goal)


def step_stats(steps: Tensor, limit: int, least: int = 1) -> dict[str, Tensor]:
    """Scalars to log of the numbers of steps.

    Args:
        steps: (B,) int64 that each image made.
        limit: the most that one can have.
        least: the fewest.
    """
    stats = {
        "strategy/stopped": (steps < limit).float().mean(),
        "strategy/steps_spread": steps.float().std(correction=0),
    }
    if limit > least:
        shares = steps.bincount(minlength=limit + 1) / len(steps)
        entropy = torch.special.entr(shares).sum() / math.log(limit + 1 - least)
        stats[f"{PREFIX}strategy/entropy"] = entropy
    return stats


class StopAtError(StoppingRule):
    """FAT: an image that is misclassified is adversarial enough; it takes no further step.

    It has then made one query more than it has steps.
    """

    last_step = False

    def __init__(self) -> None:
        self._limit, self._steps = 0, torch.zeros(0, dtype=torch.int64)

    def stop(self, seen: Seen) -> Tensor:
        """Where another class has the largest logit."""
        self._limit = seen.limit
        return seen.logits.argmax(1) != seen.y

    @override
    def end(self, steps: Tensor) -> None:
        self._steps = steps

    @override
    def stats(self) -> dict[str, Tensor]:
        return step_stats(self._steps, self._limit, least=0)


class LearnedStop(StoppingRule):
    """Predicts what an image's next step gains, and makes it the last where that is too little.

    An image has as many queries as it has steps: the decision is made where the gradient of the
    step is there already.

    Args:
        eps0: ε₀.
        mean_steps: what the threshold is adapted to.
        regression: of the gain; a new one when None.
        threshold: a fixed θ in nats, whatever number of steps comes of it; None adapts it. A θ
            above what a step gains at first would end every attack after one step, and no gain
            would ever be seen: so one image in `PROBES` goes on, unless it is frozen.
        without: features that it does not see.
        frozen: the regression does not learn any more.

    Raises:
        InputError: a mean of one step or fewer, or a feature that there is not.
    """

    last_step = True

    def __init__(
        self,
        eps0: float,
        mean_steps: float = 3.5,
        regression: Ridge | None = None,
        *,
        threshold: float | None = None,
        without: Sequence[str] = (),
        frozen: bool = False,
    ) -> None:
        if mean_steps <= 1:
            raise InputError(f"every image has a step: a mean of {mean_steps:g} must be above 1")
        self.eps0, self.mean_steps = eps0, mean_steps
        self.regression = regression or Ridge(len(FEATURES))
        if odd := [name for name in without if name not in FEATURES]:
            raise unknown("feature of the stopper", odd[0], FEATURES)
        self.fixed, self.frozen = threshold is not None, frozen
        self.threshold = 0.0 if threshold is None else threshold
        self.spread = 0.0
        self._kept = torch.tensor([float(name not in without) for name in FEATURES])
        self._stats: dict[str, Tensor] = {}

    @override
    def begin(self, images: int) -> None:
        self._images = images
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # features, prediction, gain

    def stop(self, seen: Seen) -> Tensor:
        """Where the step that is next is predicted to gain less than the threshold.

        Of a fixed threshold the probes do not stop.
        """
        with torch.autocast(seen.loss.device.type, enabled=False):
            p, loss = true_probability(seen), full_precision(seen.loss)
            if seen.done == 0:
                self._begin_memory(seen, p, loss)
            else:
                old = self._features[seen.rows], self._predicted[seen.rows]
                self._pairs.append((*old, loss - self._loss[seen.rows]))
            phi = features(seen, p, self._p[seen.rows], self.eps0) * self._kept.to(p)
            predicted = self.regression.predict(phi)
        self._p[seen.rows], self._loss[seen.rows] = p, loss
        self._features[seen.rows], self._predicted[seen.rows] = phi, predicted
        stops: Tensor = predicted < self.threshold
        probes = self.fixed and not self.frozen
        return stops & (seen.rows % PROBES != 0) if probes else stops

    def _begin_memory(self, seen: Seen, p: Tensor, loss: Tensor) -> None:
        """What the last iterate of each image was, by its place in the batch."""
        self._limit = seen.limit
        self._p, self._loss = p.new_zeros(self._images), loss.new_zeros(self._images)
        self._p[seen.rows] = p
        self._first = self._p.clone()
        self._predicted = torch.zeros_like(self._p)
        self._features = p.new_zeros(self._images, len(FEATURES))

    @override
    def end(self, steps: Tensor) -> None:
        self._stats = step_stats(steps, self._limit)
        if len(steps) > 1:
            unsure, sure = steps.float()[self._first.argsort()].chunk(2)
            halves = {"unsure": unsure, "sure": sure}
            self._stats |= {f"strategy/steps_{one}": own.mean() for one, own in halves.items()}
        if self._pairs:
            phi, predicted, gain = (torch.cat(part) for part in zip(*self._pairs, strict=True))
            self._stats |= self._learn(phi, predicted, gain)
        if not self.fixed:
            mean = float(steps.float().mean())
            self.threshold = adapted(self.threshold, mean, self.mean_steps, self.spread)
        self._stats["strategy/threshold"] = torch.tensor(self.threshold, device=steps.device)

    def _learn(self, phi: Tensor, predicted: Tensor, gain: Tensor) -> dict[str, Tensor]:
        """Learn from the gains (n,) that were seen; how well they were predicted."""
        error = (predicted - gain).square().mean()
        stats = {"strategy/gain": gain.mean(), "strategy/prediction_error": error.sqrt()}
        if not self.frozen:
            before = self.regression.weights
            with torch.autocast(phi.device.type, enabled=False):
                self.regression.fit(phi, gain)
            moved = (self.regression.weights - before).norm() / self.regression.weights.norm()
            stats[f"{PREFIX}strategy/step"] = moved.nan_to_num().float().to(phi.device)
            weights = self.regression.weights.float().to(phi.device)
            named = zip(FEATURES, weights, strict=True)
            stats |= {f"strategy/weight_{name}": weight for name, weight in named}
        if len(gain) > 1 and bool(variance := gain.var(correction=0)):
            self.spread = float(variance.sqrt())
            stats[f"{PREFIX}strategy/unexplained"] = error / variance
        return stats

    @override
    def stats(self) -> dict[str, Tensor]:
        return self._stats

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"threshold": self.threshold, "spread": self.spread}
        return {**own, "regression": self.regression.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.spread = state["threshold"], state["spread"]
        self.regression.load_state_dict(state["regression"])


@dataclass(frozen=True)
class DealtSteps(Attack):
    """The numbers of steps that a rule finds, dealt to the images of the batch at random.

    The rule's own attack is made first, and learned from; what it costs is not in the result, so
    that the passes are those of the attack that is a control here.

    Args:
        attack: with its rule.
    """

    attack: GradientAttack

    def _draws(self) -> str:
        return "dealing steps"

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        assert rng is not None
        found = self.attack.run(model, x, y, rng=rng, check=check).steps
        if found is None:
            raise InputError("steps are dealt as a rule found them: give the attack its rule")
        dealt = found[torch.randperm(len(found), generator=rng, device=rng.device)]
        plain = replace(self.attack, steps=dealt, rule=None)
        return replace(plain.run(model, x, y, rng=rng, check=False), steps=dealt)

"""Bandits over whole strategies: which configuration of the attack is worth its passes?

One strategy is played for all images until it has been paid; then the next one is chosen. What a
strategy a pays in a context c is taken for linear in features of both,

    r = φ(a, c)ᵀ w + noise of variance σ²,    A = Σ λ^age φφᵀ + ρ I,    ŵ = A⁻¹ Σ λ^age φ r,

and the largest score is played:

- `LinUCB`:   φᵀŵ + α σ √(φᵀ A⁻¹ φ)    (Li et al., A Contextual-Bandit Approach to Personalized News
  Article Recommendation, WWW 2010; with one w for all arms, which are too many for one each)
- `Thompson`: φᵀw̃, w̃ ~ N(ŵ, α² σ² A⁻¹)   (Chapelle & Li, An Empirical Evaluation of Thompson
  Sampling, NIPS 2011; Agrawal & Goyal, Thompson Sampling for Contextual Bandits with Linear
  Payoffs, ICML 2013)

The first d choices are uniform. λ forgets, since the defender changes (as in D-LinUCB, Russac et
al., NeurIPS 2019, whose bonus has squared discounts besides). σ² is the discounted mean square of
the errors of the predictions, so that rewards may be in any unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError
from advgame.games.stopping import Ridge
from advgame.games.strategy import StrategySpace
from advgame.health import PREFIX, entropy_sign


def arm_features(lists: tuple[tuple[float, ...], ...], arms: Tensor) -> Tensor:
    """What w weighs of each strategy, (n, d): 10, z, s(z²) and products of two z.

    z is a number of the strategy, s(number): less its mean over the list, over its standard
    deviation there. So are squares, that all may be told from the mean. A list of one number has
    no z, a list of two no square. The constant is 10, so that ρ hardly pulls the mean to 0:
    else what is paid for one strategy alone is taken for its features' worth.

    Args:
        lists: what each column of a strategy chooses from.
        arms: (n, choices) indices.
    """
    columns, squares = [], []
    for column, values in enumerate(lists):
        if len(values) == 1:
            continue
        z = _standardised(torch.tensor(values, dtype=torch.float64))
        columns.append(z[arms[:, column]])
        if len(values) > 2:
            squares.append(_standardised(z * z)[arms[:, column]])
    products = [one * two for one, two in combinations(columns, 2)]
    constant = torch.full((len(arms),), 10.0, dtype=torch.float64)
    return torch.stack([constant, *columns, *squares, *products], 1)


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


class LinearBandit(ABC):
    """What the two bandits share: a strategy player, as `agents.las_at.StrategyPlayer`.

    Args:
        space: what is chosen from.
        context: c, a number of about 0 to 1, asked at every choice; None is none.
        rng: stream of the draws.
        exploration: α.
        memory: λ, per choice.
        penalty: ρ. At 1 noise is taken for differences, where there are few payments; at d, as of
            features of length 1 (both papers), little is learned within a hundred.
    """

    def __init__(
        self,
        space: StrategySpace,
        rng: torch.Generator,
        context: Callable[[], float] | None = None,
        *,
        exploration: float = 1.0,
        memory: float = 0.98,
        penalty: float = 3.0,
    ) -> None:
        if exploration <= 0:
            raise InputError(f"a bandit's exploration must be above 0, not {exploration:g}")
        self.space, self.rng, self.context, self.exploration = space, rng, context, exploration
        self.arms = torch.tensor(list(product(*map(range, space.sizes))))
        self._own = arm_features(space.lists, self.arms)
        varying = sum(size > 1 for size in space.sizes)
        # the context shifts the mean, and the worth of each number of a strategy
        self._with_context = 1 + varying if context is not None else 0
        inputs = self._own.shape[1] + self._with_context
        self.regression = Ridge(inputs, memory, penalty)
        self._error = torch.zeros(2, dtype=torch.float64)  # discounted: squares, and how many
        self._paid = torch.zeros(3, dtype=torch.float64)  # the same of r: how many, Σ r, Σ r²
        # how often each option was played, discounted; at first as if each had been, once in all
        self._played = [torch.full((size,), 1 / size) for size in space.sizes]
        self._arm: int | None = None
        self._seen = torch.zeros(inputs, dtype=torch.float64)
        self._choices = 0

    @abstractmethod
    def scores(self, seen: Tensor) -> Tensor:
        """Of every strategy, (n,), of which the largest is played; features (n, d)."""

    @property
    def noise(self) -> float:
        """σ; 1 before anything was paid."""
        squares, count = self._error.tolist()
        return float((squares / count) ** 0.5) if count else 1.0

    def features(self) -> Tensor:
        """φ of every strategy in the present context, (n, d)."""
        if self.context is None:
            return self._own
        return torch.cat([self._own, self.context() * self._own[:, : self._with_context]], 1)

    def uncertainty(self, seen: Tensor) -> Tensor:
        """σ √(φᵀ A⁻¹ φ) of features (n, d), (n,)."""
        solved = torch.linalg.solve(self.regression.precision(), seen.T).T
        size: Tensor = (seen * solved).sum(1).clamp_min(0).sqrt()
        return self.noise * size

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """The strategy that is played until it is paid, for each image; indices (B, choices)."""
        if self._arm is None:
            seen = self.features()
            if self._choices < seen.shape[1]:  # d weights cannot be told from fewer payments
                device = self.rng.device
                drawn = torch.randint(len(seen), (), generator=self.rng, device=device)
                self._arm = int(drawn)
            else:
                self._arm = int(self.scores(seen).argmax())
            self._seen = seen[self._arm]
        return self.arms[self._arm].to(images.device).expand(len(images), -1)

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Take what the strategy was paid, the mean of (B,); returns scalars to log.

        Raises:
            InputError: nothing was chosen since the last payment.
        """
        if self._arm is None:
            raise InputError("call act(images, learn=True) before learn(reward)")
        paid, seen, memory = reward.double().mean().cpu(), self._seen[None], self.regression.memory
        expected, unsure = self.regression.predict(seen)[0], self.uncertainty(seen)[0]
        error = paid - expected
        self._error = memory * self._error + torch.stack([error * error, torch.ones_like(paid)])
        self._paid = memory * self._paid + torch.stack([torch.ones_like(paid), paid, paid * paid])
        for column, played in enumerate(self._played):
            played.mul_(memory)[self.arms[self._arm, column]] += 1
        before = self.regression.weights
        self.regression.fit(seen, paid[None])
        self._arm, self._choices = None, self._choices + 1
        stats = {
            "strategy/expected": expected,
            "strategy/uncertainty": unsure,
            "strategy/noise": torch.tensor(self.noise),
            **self._signs(before),
        }
        return {name: value.float().to(reward.device) for name, value in stats.items()}

    def _signs(self, before: Tensor) -> dict[str, Tensor]:
        """Signs of life; the weights before they were last moved say how far that was."""
        entropies = [torch.special.entr(one / one.sum()).sum() for one in self._played]
        signs = entropy_sign(torch.stack(entropies), self.space.sizes)
        after = self.regression.weights
        signs[f"{PREFIX}strategy/step"] = ((after - before).norm() / after.norm()).nan_to_num()
        count, total, squares = self._paid.tolist()
        variance = squares / count - (total / count) ** 2
        if self._choices > len(after) and variance > 0:  # before that any prediction is a guess
            signs[f"{PREFIX}strategy/unexplained"] = torch.tensor(self.noise**2 / variance)
        return signs

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next choice depends on."""
        return {
            "regression": self.regression.state_dict(),
            "error": self._error,
            "paid": self._paid,
            "played": self._played,
            "arm": self._arm,
            "seen": self._seen,
            "choices": self._choices,
            "rng": self.rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.regression.load_state_dict(state["regression"])
        self._error, self._paid = state["error"].cpu(), state["paid"].cpu()
        self._played = [one.cpu().clone() for one in state["played"]]
        self._arm, self._seen = state["arm"], state["seen"].cpu()
        self._choices = state["choices"]
        self.rng.set_state(state["rng"])


class LinUCB(LinearBandit):
    """Plays what may be best: the prediction and α of its standard deviations."""

    @override
    def scores(self, seen: Tensor) -> Tensor:
        return self.regression.predict(seen) + self.exploration * self.uncertainty(seen)


class Thompson(LinearBandit):
    """Plays what is best under weights drawn from their distribution."""

    @override
    def scores(self, seen: Tensor) -> Tensor:
        rng, inputs = self.rng, seen.shape[1]
        drawn = torch.randn(inputs, 1, dtype=torch.float64, generator=rng, device=rng.device)
        # A = L Lᵀ: L⁻ᵀ ξ has the covariance A⁻¹
        root = torch.linalg.cholesky(self.regression.precision())
        shift: Tensor = torch.linalg.solve_triangular(root.T, drawn.cpu(), upper=True)[:, 0]
        return self.regression.predict(seen) + self.exploration * self.noise * (seen @ shift)


BANDITS: dict[str, type[LinearBandit]] = {"linucb": LinUCB, "thompson": Thompson}
"""By the names that `--agent` has."""

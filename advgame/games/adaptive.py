"""The attack on a training image as a sequence of choices, and what it may be paid for.

Every image of a batch is attacked query by query: go on with one of several step sizes, restart, or
stop. When all have stopped, the defender learns from where they are. `AdaptiveAttack` holds the
rules; `envs.adaptive_attack` plays them with actions and rewards.

Families of rewards, L being the cross-entropy and F the forwards per image of the whole turn:

- `Gain`:     L(x_{t+1}) - L(x_t) at each query; over an episode L(x_T) - L(x_0).
- `Progress`: (L_held(θ) - L_held(θ')) / F, for all images of the batch, θ' being θ after its step.
  What measuring L_held costs is not in F.
- `Regret`:   R2(θ̂) - R2(θ̂_b), θ̂ and θ̂_b being one step ahead along the gradient on these
  examples, and on those of plain PGD from the same starts: a difference reward, as PAIRED's
  (Dennis et al. 2020). R2 is LAS-AT's.
- `LasReward`: LAS-AT's own a·R1 + b·R2 + c·R3 (Jia et al. 2022).

Off each of them goes a price for every query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import GradientAttack
from advgame.attacks.input_gradients import input_gradient
from advgame.attacks.stopping import Seen
from advgame.choices import Credit
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.awp import AWPDefender
from advgame.games.costs import DefenderStep, Passes
from advgame.games.las_at import LasAt
from advgame.games.progress import LearningProgress
from advgame.games.stopping import FEATURES as STOPPING
from advgame.games.stopping import features, true_probability
from advgame.losses import cross_entropy
from advgame.threat import Threat, per_image

# name -> what it is: the stopper's features, but for its constant, and three more
FEATURES = {
    **{name: words for name, words in STOPPING.items() if name != "one"},
    "eps": "ε over the largest ε of the game",
    "waiting": "1 where the image has stopped and waits for the others",
    "defender": "moving mean of exp(-loss) on what the defender learned from: the true class's "
    "probability, where labels are not smoothed",
    "age": "steps of the defender over 100 more than that",
}


@dataclass
class Turn:
    """A batch whose attacks are over, before the defender learns from it.

    Args:
        defender: learns; during `Reward.ahead` it has the gradient, but has not moved.
        x: clean images (B, C, H, W) in [0, 1].
        y: labels (B,).
        start: where the attacks began, (B, C, H, W).
        x_adv: where they ended.
        loss: (B,) there, of the defender in evaluation mode.
        eps: (B,) radii in pixel units.
        rng: stream of further draws, on the images' device.
        passes: per image, of the attacks; what a reward costs is added.
    """

    defender: Defender
    x: Tensor
    y: Tensor
    start: Tensor
    x_adv: Tensor
    loss: Tensor
    eps: Tensor
    rng: torch.Generator
    passes: Passes = field(default_factory=Passes)


class Reward:
    """Pays for queries, and for the batch when the defender learns from it; 0 unless overridden."""

    def check(self, defender: Defender) -> None:
        """Refuse a defender that this reward cannot be measured on, before any work."""
        return

    def query(self, before: Tensor, after: Tensor) -> Tensor:
        """Of one more query, (n,): losses (n,) before it and after it."""
        return torch.zeros_like(after)

    def before(self, turn: Turn) -> None:
        """Measure what is due before the defender's gradient is formed."""
        return

    def ahead(self, turn: Turn) -> Tensor:
        """Of the batch, (B,), while the defender has its gradient and has not moved."""
        return torch.zeros_like(turn.loss)

    def after(self, turn: Turn) -> Tensor:
        """Of the batch, (B,), after the defender's step."""
        return torch.zeros_like(turn.loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next reward depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        return


class Gain(Reward):
    """L(x_{t+1}) - L(x_t): the loss that a query has gained.

    Args:
        weight: of the gain, per nat.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @override
    def query(self, before: Tensor, after: Tensor) -> Tensor:
        return self.weight * (after - before)


class Progress(Reward):
    """(L_held(θ) - L_held(θ')) / F: the fall of the held-out robust loss per forward.

    All images of a batch are paid the same, as the arm of a bandit. It costs an attack on the
    held-out images per turn.

    Args:
        held_out: as in `LearningProgress`.
        threat: the same.
        steps: the same.
        weight: the same.
    """

    def __init__(
        self, held_out: ImageSet, threat: Threat, steps: int = 10, weight: float = 1000.0
    ) -> None:
        self.progress = LearningProgress(held_out, threat, steps, weight)

    @override
    def before(self, turn: Turn) -> None:
        self.progress.begin(turn.defender, len(turn.x), turn.passes)

    @override
    def after(self, turn: Turn) -> Tensor:
        self.progress.spend(turn.passes)
        paid = self.progress.pay(turn.defender, len(turn.x), turn.passes)
        return torch.full_like(turn.loss, paid)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.progress.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress.load_state_dict(state)


class _From:
    """A start that is known already, in place of a random one."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        return self.points.clone()


class Regret(Reward):
    """R2(θ̂) - R2(θ̂_b): what PGD would have taught less of, shared by the batch.

    R2 is LAS-AT's: 4 times the share of the batch that is right under PGD-10 one step ahead. Both
    looks ahead draw the same starts. It costs PGD, a gradient of the defender, and two looks ahead
    per turn.

    Args:
        rules: LAS-AT's, for R2 and its weight.
        steps: of the baseline, PGD from the starts of the attacks judged.
        step_size: of the baseline, in units of ε.
    """

    def __init__(self, rules: LasAt, steps: int = 10, step_size: float = 1 / 4) -> None:
        self.rules, self.steps, self.step_size = rules, steps, step_size

    @override
    def check(self, defender: Defender) -> None:
        if isinstance(defender, AWPDefender):
            raise InputError(
                "Regret forms a second gradient, which AWP's warm-up would count: use Defender"
            )
        defender.check_look_ahead()

    @override
    def before(self, turn: Turn) -> None:
        defender, passes = turn.defender, turn.passes
        ball = self.rules.threat.with_radii(turn.eps)
        start: Any = _From(turn.start)
        plain = GradientAttack(ball, self.steps, self.step_size * turn.eps, start=start)
        with defender.under_attack():
            made = plain.run(defender.module, turn.x, turn.y, rng=turn.rng, check=False)
        passes.add_attack(made)
        # in training mode a pass moves batch norm's statistics
        buffers = [buffer.clone() for buffer in defender.module.buffers()]
        defender.backward(made.x_adv, turn.y)
        passes.add_descent(defender)
        self._starts = turn.rng.get_state()
        self._baseline = self._r2(turn)
        with torch.no_grad():
            for buffer, value in zip(defender.module.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def _r2(self, turn: Turn) -> Tensor:
        ahead = turn.defender.look_ahead()
        with turn.defender.under_attack():
            robust = self.rules.robust(ahead, turn.x, turn.y, turn.rng, turn.passes)
        return self.rules.r2_weight * robust.mean()

    @override
    def ahead(self, turn: Turn) -> Tensor:
        turn.rng.set_state(self._starts)
        return (self._r2(turn) - self._baseline).expand_as(turn.loss).clone()


class LasReward(Reward):
    """LAS-AT's a·R1 + b·R2 + c·R3.

    Args:
        rules: LAS-AT's, with weights and look-ahead.
        credit: who is paid for R2 and R3, see `LasAt.pay`.
    """

    def __init__(self, rules: LasAt, credit: Credit = "mixed") -> None:
        self.rules, self.credit = rules, credit

    @override
    def check(self, defender: Defender) -> None:
        defender.check_look_ahead()

    @override
    def ahead(self, turn: Turn) -> Tensor:
        ahead = turn.defender.look_ahead()
        with turn.defender.under_attack():
            robust = self.rules.robust(ahead, turn.x, turn.y, turn.rng, turn.passes)
            with torch.no_grad():
                clean = (ahead(turn.x).argmax(1) == turn.y).float()
        turn.passes.forwards += 1
        return self.rules.pay(turn.loss, robust, clean, self.credit).reward


class QueriedAttacks:
    """Images of a batch under attack, query by query; a row each while its attack goes on.

    The forward at the present points keeps its graph, so that going on costs its backward and the
    forward at the next points. Every row has made as many queries.

    Args:
        model: the classifier in evaluation mode, without weight gradients.
        ball: with a radius per image.
        step_sizes: of the actions, in units of an image's ε; the action after them restarts.
        x: clean images (n, C, H, W) in [0, 1].
        y: labels (n,).
        rng: stream of starts and restarts, on the images' device.
    """

    x_adv: Tensor  # where the last query was made
    logits: Tensor  # (n, K) there
    loss: Tensor  # (n,) cross-entropy there

    def __init__(
        self,
        model: nn.Module,
        ball: Threat,
        step_sizes: tuple[float, ...],
        x: Tensor,
        y: Tensor,
        rng: torch.Generator,
    ) -> None:
        self.model, self.ball, self.x, self.y, self.rng = model, ball, x, y, rng
        self.sizes = torch.tensor([*step_sizes, 0.0], device=x.device)
        self.queries = self.forwards = self.backwards = 0
        self._query(ball.random_start(x, rng))

    @property
    def eps(self) -> Tensor:
        """The radius of each image's ball (n,), in pixel units."""
        return torch.as_tensor(self.ball.eps)

    def step(self, going: Tensor, actions: Tensor) -> None:
        """One more query of the images that go on; the others are gone.

        Args:
            going: their rows (k,), ascending.
            actions: (k,) what they do.
        """
        self.backwards += len(self.x)
        slope = input_gradient(self._total, self._leaf)
        points = self.x_adv
        if len(going) < len(self.x):
            slope, points, self.x, self.y = (one[going] for one in (slope, points, self.x, self.y))
            self.ball = self.ball.select(going)
        size = self.sizes[actions] * self.eps
        move = self.ball.steepest(slope).mul_(per_image(size, slope))
        points = self.ball.project(move.add_(points), self.x)
        if len(jumps := (actions == len(self.sizes) - 1).nonzero()[:, 0]):
            points[jumps] = self.ball.select(jumps).random_start(self.x[jumps], self.rng)
        self._query(points)

    def _query(self, points: Tensor) -> None:
        self.x_adv = points
        self.queries += 1
        self.forwards += len(points)
        self._forward()

    def _forward(self) -> None:
        """What the model says of the present points, with the graph that going on needs."""
        self._leaf = self.x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model(self._leaf)
            losses = cross_entropy(logits, self.y)
            self._total = losses.sum()
        self.logits, self.loss = logits.detach(), losses.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be copied: the other side makes the last forward again."""
        return {name: value for name, value in vars(self).items() if name not in self._GRAPH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forward()

    _GRAPH = ("_leaf", "_total")


@dataclass(frozen=True)
class AdaptiveAttack:
    """The rules of the game.

    Args:
        threat: the ball of radius ε₀.
        step_sizes: that an action goes on with, in units of the image's ε.
        radii: ε in units of ε₀, of which each image draws one.
        queries: most gradient queries of an image; the first is that of its random start.
        price: of every further query, off the reward.
        reward: what is paid for; `Gain` of its own where None.
    """

    threat: Threat
    step_sizes: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8)
    radii: tuple[float, ...] = (1.0,)
    queries: int = 10
    price: float = 0.05
    reward: Reward = field(default_factory=Gain)

    def __post_init__(self) -> None:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("the game is judged at one eps: give the threat a float")
        if not self.radii or min(self.radii) <= 0:
            raise InputError(f"radii must be numbers above 0, not {self.radii}")
        if not isinstance(self.queries, int) or self.queries < 2:
            raise InputError(f"queries must be a whole number of 2 or above, not {self.queries}")
        if not isinstance(self.reward, Reward):
            raise InputError(f"reward is a Reward such as Gain(), not {self.reward!r:.40}")
        if not self.step_sizes or not all(0 < one < math.inf for one in self.step_sizes):
            raise InputError(f"step_sizes must be numbers above 0, not {self.step_sizes}")

    @property
    def options(self) -> int:
        """Number of actions: a step size each, then restart, then stop."""
        return len(self.step_sizes) + 2

    @property
    def stop(self) -> int:
        """The action that ends an image's attack."""
        return self.options - 1

    def begin(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> QueriedAttacks:
        """Attacks on a batch; makes the first query, at a random point of each image's ball.

        Args:
            model: the classifier in evaluation mode, without weight gradients.
            x: clean images (B, C, H, W).
            y: labels (B,).
            rng: stream of radii, starts and restarts, on the images' device.
        """
        units = torch.tensor(self.radii, device=x.device)
        drawn = torch.randint(len(units), (len(x),), generator=rng, device=x.device)
        ball = self.threat.with_radii(units[drawn] * self.threat.eps)
        return QueriedAttacks(model, ball, self.step_sizes, x, y, rng)

    def seen(self, state: QueriedAttacks, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stopper's features of images under attack (n, 8), and their p (n,).

        Args:
            state: the attacks.
            before: (n,) p at the query before; None at the first.
        """
        delta, rows = state.x_adv - state.x, torch.arange(len(state.y), device=state.y.device)
        said, done = (state.logits, state.loss, state.y), (state.queries - 1, self.queries - 1)
        one = Seen(rows, delta, state.ball, *said, *done)
        p = true_probability(one)
        largest = max(self.radii) * float(self.threat.eps)
        return features(one, p, p if before is None else before, largest)[:, 1:], p

    def learn(self, turn: Turn) -> tuple[DefenderStep, Tensor]:
        """The defender learns from a batch whose attacks are over; what that pays, (B,).

        Args:
            turn: the batch; its passes are completed here.
        """
        self.reward.before(turn)
        losses = turn.defender.backward(turn.x_adv, turn.y)
        turn.passes.add_descent(turn.defender)
        reward = self.reward.ahead(turn)
        turn.defender.step()
        reward = reward + self.reward.after(turn)
        stats = {
            "game/adversarial_loss": losses.mean(),
            "strategy/eps": turn.eps.mean(),
            **turn.passes.stats(turn.x.device),
        }
        return DefenderStep(turn.x_adv, losses, stats), reward

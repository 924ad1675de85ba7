"""Machine vs Machine: a classifier u against what its own gradient, or a network v, makes.

Source: Hamm & Mehra 2018. Their pixels lie in [-1, 1]: their η is 2ε here, and a gradient with
respect to their pixels is half of one with respect to ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import fgsm
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.attacker import AttackerRules, check_ball
from advgame.games.costs import DefenderStep, perturbation_stats
from advgame.games.training import PANELS as TRAINING_PANELS
from advgame.games.training import Rules
from advgame.run.curves import Panels
from advgame.solvers import Direction, Functional, Optimistic, Params, Risk, Solver, sensitivity
from advgame.threat import Threat, per_image

PANELS: Panels = TRAINING_PANELS | {
    "Game": (
        "error rate on held-out images",
        {
            "game/error_attacker_responds": "Stackelberg value f(u, v*(u)): the attacker responds",
            "game/error_pgd": "f(u, PGD-20)",
            "game/error": "f(u, v)",
            "game/error_defender_responds": "f(u*(v), v): the defender responds",
        },
    ),
}

Examples = Callable[[Params], Tensor]
"""v -> adversarial examples z (B, C, H, W)."""
Seen = tuple[Tensor, Tensor]
"""Adversarial examples (B, C, H, W) and the defender's losses there (B,)."""


@dataclass(frozen=True)
class SensitivityTraining(Rules):
    """LWA and Sens-FGSM: the current FGSM, and a penalty on the slope of the loss there.

    The penalised cost is f(u, Z) + γ/2 ‖∂f/∂Z‖², γ = ηN (eq. 7). With f the mean of N losses that
    is the mean of l(z) + s/2 ‖∂l/∂z‖² with s = γ/N = η: per image, whatever the batch size. In
    [0, 1] pixels it is s = ε/2. Its gradient is the total derivative of f(u, Z(u)) where
    z = x + η ∇ₓl (eq. 4, no sign), to first order in η; the attack itself is FGSM with its sign,
    as the tables' names and radii have it.

    Args:
        threat: an L∞ ball.
        penalty: s over the ball's ε; the paper's γ is 0.5, LWA (Huang et al. 2015) 0.

    Raises:
        InputError: a negative penalty, or another ball than L∞ with one radius.
    """

    threat: Threat
    penalty: float = 0.5

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise InputError(f"penalty must be 0 or above, not {self.penalty}")
        check_ball(self.threat)

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat = self.threat.scaled(scale)
        x_adv = fgsm(threat).run(defender.module, x, y, rng=rng, check=False).x_adv
        losses = defender.backward(x_adv, y, self.penalty * float(threat.eps))
        defender.step()
        stats = {"game/adversarial_loss": losses.mean()}
        return DefenderStep(x_adv, losses, stats | perturbation_stats(x_adv - x, threat))


@dataclass(frozen=True)
class Minimax(AttackerRules):
    """f(u, v) = mean l(classifier(z(x; v); u), y), z = x + ε·g(x, y; v), played by a solver.

        u ← u − λ ∂/∂u [f(u, v) + γ/2 ‖∂f/∂v‖²]        v ← v + σ ∂f/∂v        (algorithm 1)

    λ and σ are the rates of the two optimisers.

    Args:
        threat: an L∞ ball, one radius for all.
        attacker: v; its network g maps images (B, C, H, W) and labels (B,) to (B, C, H, W) in
            [-1, 1], and its optimiser's steps go down: the solver turns them.
        direction: of `advgame.solvers`: `sensitivity` is Minimax (algorithm 1), `simultaneous` Alt
            (eq. 19), ``maximin(...)`` Maximin.
        ascent_steps: of the attacker per step of the defender, on the same batch.

    Raises:
        InputError: another ball.
    """

    direction: Direction = field(default_factory=lambda: sensitivity(1.0))
    ascent_steps: int = 1

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of both players; nothing is drawn here.

        What is returned and logged is of the point from which both players step: after the
        attacker's lone ascents, before any step that a direction only imagines.
        """
        threat, seen = self.threat.scaled(scale), list[Seen]()
        risk = risk_of(defender, examples_of(self.attacker.module, threat, x, y), y, seen)
        solver = Solver(
            self.direction, defender.optimizer, self.attacker.optimizer, self.ascent_steps
        )
        followed = solver.step(risk)
        x_adv, losses = seen[self.ascent_steps - 1]  # where the common step begins
        stats = {"game/adversarial_loss": losses.mean(), **followed}
        return DefenderStep(x_adv, losses, stats | perturbation_stats(x_adv - x, threat))

    @override
    def state_dict(self) -> dict[str, Any]:
        inner = self.direction.state_dict() if isinstance(self.direction, Optimistic) else {}
        return {"attacker": super().state_dict(), "direction": inner}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["attacker"])
        if isinstance(self.direction, Optimistic):
            self.direction.load_state_dict(state["direction"])


def examples_of(network: nn.Module, threat: Threat, x: Tensor, y: Tensor) -> Examples:
    """z(x; v) of a network in training mode, which maps images and labels to δ/ε.

    Args:
        network: g.
        threat: an L∞ ball.
        x: clean images (B, C, H, W).
        y: labels (B,).
    """
    g = Functional(network.train())
    return lambda v: threat.project(x + g(v, x, y) * per_image(threat.eps, x), x)


def risk_of(defender: Defender, examples: Examples, y: Tensor, seen: list[Seen]) -> Risk:
    """f(u, v), per image (B,), of a defender in training mode; differentiable in both.

    Args:
        defender: whose loss it is.
        examples: z, of v.
        y: labels (B,).
        seen: takes the adversarial examples and losses of every look at the risk.
    """
    f = Functional(defender.module.train())

    def risk(u: Params, v: Params) -> Tensor:
        x_adv = examples(v)
        losses = defender.loss(f(u, x_adv), y)
        seen.append((x_adv.detach(), losses.detach()))
        return losses

    return risk

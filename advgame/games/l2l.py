"""L2L: defender and attacker network learn against each other, a step each per batch.

    θ ← θ − α₁ ∇_θ mean loss(f(x + δ; θ), y),   δ = g(𝒜(x, y, θ); φ)
    φ ← φ + α₂ ∇_φ mean loss(f(x + δ; θ), y)

Source: Jiang, Chen et al., Learning to Defend by Learning to Attack (L2L), algorithm 2. It writes
the gradient and δ once, before both updates. Like the published code, the alternating form makes
them anew for φ, with the θ that has just been updated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from advgame.attacks import InputGradient, attacked
from advgame.choices import BatchNormMode, Form
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.attacker import AttackerRules, Sampled, joint_step
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.losses import Loss, cross_entropy
from advgame.threat import Threat


@dataclass(frozen=True)
class Modes:
    """Batch norm and dropout, phase by phase; attacking leaves the defender's buffers alone.

    The published code's are gradient train with ``keep_buffers`` False (so that clean images,
    too, move the running statistics), attacker eval, learning eval.

    Args:
        gradient: the defender, while its input gradient is formed for its own step.
        attacker: g, in the defender's step. ``"train"`` saves Naive a forward: its perturbation
            does not depend on θ, so that the attacker's step can use the same one.
        learning: the defender, in the attacker's step (gradient and loss).
        keep_buffers: restore the buffers after the pass of ``gradient``.
    """

    gradient: BatchNormMode = "eval"
    attacker: BatchNormMode = "eval"
    learning: BatchNormMode = "eval"
    keep_buffers: bool = True


@dataclass(frozen=True)
class L2L(AttackerRules):
    """The rules of the game.

    Args:
        threat: the L∞ ball, one radius for all.
        attacker: learns to attack.
        form: ``"alternating"``, as published: the attacker's step computes everything anew with
            the updated θ. ``"shared"``: one forward serves both players, by
            `advgame.games.attacker.joint_step`; a third to two fifths cheaper.
        attacker_steps: of the attacker per step of the defender, on the same batch.
        modes: of batch norm; in the shared form both networks are in training mode.
        loss: whose input gradient the attacker sees; what it ascends when alternating.

    Raises:
        InputError: another ball, or several attacker's steps from one shared forward.
    """

    form: Form = "alternating"
    attacker_steps: int = 1
    modes: Modes = field(default_factory=Modes)
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("alternating", "shared"):
            raise InputError(f"unknown form {self.form!r}: choose alternating or shared")
        if self.attacker_steps < 1:
            raise InputError(f"attacker_steps must be 1 or above, not {self.attacker_steps}")
        if self.form == "shared" and self.attacker_steps > 1:
            raise InputError("a shared forward serves one attacker step: use alternating for more")

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """Algorithm 2 on one batch: a step of the defender, then of the attacker.

        Args:
            defender: θ, learns from the adversarial examples.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            rng: of attackers that draw; g of the paper does not.
            scale: share of ε that is in use.
        """
        threat, shared, attacker = self.threat.scaled(scale), self.form == "shared", self.attacker
        trains = shared or self.modes.attacker == "train"
        kept = shared or (trains and attacker.gradients == 0)  # δ's graph, for φ's step
        gradient = self._gradient(defender, x, y, self.modes.gradient, self.modes.keep_buffers)
        attacker.module.train(trains)
        with torch.set_grad_enabled(kept), defender.fabric.autocast():
            sampled = attacker.sample(gradient, threat, rng)
        x_adv = sampled.x_adv.detach()
        if shared:
            losses = joint_step(defender, attacker, sampled, y)
            ascended, ascents, calls = losses.mean(), 1, gradient.calls
        else:
            losses = defender.backward(x_adv, y)  # θ ← θ − α₁ ∇_θ
            defender.step()
            new, ascents = self._gradient(defender, x, y, self.modes.learning), self.attacker_steps
            ascended = self._ascend(defender, threat, new, rng, sampled if kept else None)
            calls = gradient.calls + new.calls + ascents  # an ascent looks at its loss once
        samples = ascents if kept else 1 + ascents
        passes = Passes(calls, 0, calls, attacker.cells * samples, attacker.cells * ascents)
        passes.add_descent(defender)
        stats = {"game/adversarial_loss": losses.mean(), "game/attacker_loss": ascended}
        if gradient.clean_losses is not None:
            stats["game/clean_loss"] = gradient.clean_losses.mean()
        stats |= perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

    def _ascend(
        self,
        defender: Defender,
        threat: Threat,
        gradient: InputGradient,
        rng: torch.Generator,
        sampled: Sampled | None,
    ) -> Tensor:
        """φ ← φ + α₂ ∇_φ at the new θ; returns the mean loss that the first step began from."""
        reached = []
        self.attacker.module.train()
        for _ in range(self.attacker_steps):
            if sampled is None:
                # a region of its own: autocast keeps its casts of φ until the region ends, those
                # made without gradient or before a step must not be found again
                with defender.fabric.autocast():
                    sampled = self.attacker.sample(gradient, threat, rng)
            with attacked(defender.module, self.modes.learning):
                with defender.fabric.autocast():
                    loss = self.loss(defender.module(sampled.x_adv), gradient.y).mean()
                (loss if sampled.bonus is None else loss + sampled.bonus).backward()  # θ is frozen
            self.attacker.step()
            sampled = None
            reached.append(loss.detach())
        return reached[0]

    @override
    def _gradient(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        mode: BatchNormMode = "eval",
        keep: bool = True,
    ) -> InputGradient:
        return InputGradient(defender.module, x, y, loss=self.loss, mode=mode, restore_buffers=keep)

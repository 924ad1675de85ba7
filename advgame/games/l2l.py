"""L2L: defender and attacker network learn against each other, a step each per batch.

    θ ← θ − α₁ ∇_θ mean loss(f(x + δ; θ), y),   δ = g(𝒜(x, y, θ); φ)
    φ ← φ + α₂ ∇_φ mean loss(f(x + δ; θ), y)

Source: Jiang, Chen et al., Learning to Defend by Learning to Attack (L2L), algorithm 2; the modes
of batch norm are the published code's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from advgame.attacks import BatchNormMode, InputGradient, attacked
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.health import tagged
from advgame.losses import Loss, cross_entropy
from advgame.threat import Linf, Threat

Form = Literal["alternating", "shared"]


class AttackerPlayer(Protocol):
    """Who learns to attack: a network with its optimiser."""

    @property
    def module(self) -> nn.Module:
        """The network g, whose modes the game sets."""
        ...

    @property
    def gradients(self) -> int:
        """Input gradients that an attack asks for."""
        ...

    @property
    def cells(self) -> int:
        """Forwards of g per attack."""
        ...

    def perturb(self, x: Tensor, threat: Threat, gradient: InputGradient) -> Tensor:
        """Adversarial examples (B, C, H, W), differentiable in φ."""
        ...

    def step(self) -> None:
        """One step up along the gradients on φ, which are then cleared."""
        ...

    def signs(
        self, x: Tensor, y: Tensor, threat: Threat, gradient: InputGradient
    ) -> dict[str, float]:
        """Signs of life on a batch, see `advgame.health`; {} of an attacker that cannot learn."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        ...


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
class L2L:
    """The rules of the game.

    Args:
        threat: the L∞ ball, one radius for all.
        attacker: learns to attack.
        form: ``"alternating"``, as published: the attacker's step computes everything anew with
            the updated θ. ``"shared"``: one forward serves both players, and one backward of
            the defender's loss holds the gradients of both, which the defender descends and the
            attacker ascends. That is a simultaneous step, a third to two fifths cheaper: φ learns
            against the θ before the step, both networks are in training mode in the common
            forward, and where the defender smooths labels the attacker ascends that loss.
        attacker_steps: of the attacker per step of the defender, on the same batch.
        modes: of batch norm.
        loss: whose input gradient the attacker sees; what it ascends when alternating.

    Raises:
        InputError: another ball, or several attacker's steps from one shared forward.
    """

    threat: Threat
    attacker: AttackerPlayer
    form: Form = "alternating"
    attacker_steps: int = 1
    modes: Modes = field(default_factory=Modes)
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf) or isinstance(self.threat.eps, Tensor):
            raise InputError("L2L is played in an L∞ ball with one eps for all images")
        if self.form not in ("alternating", "shared"):
            raise InputError(f"unknown form {self.form!r}: choose alternating or shared")
        if self.attacker_steps < 1:
            raise InputError(f"attacker_steps must be 1 or above, not {self.attacker_steps}")
        if self.form == "shared" and self.attacker_steps > 1:
            raise InputError("a shared forward serves one attacker step: use alternating for more")

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of the defender, then of the attacker.

        Args:
            defender: learns from the adversarial examples.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            rng: not used: nothing is drawn.
            scale: share of ε that is in use.
        """
        threat, passes = self.threat.scaled(scale), Passes()
        play = self._shared if self.form == "shared" else self._alternating
        gradient = self._gradient(defender, x, y, self.modes.gradient, self.modes.keep_buffers)
        x_adv, losses, ascended = play(defender, x, y, threat, gradient, passes)
        stats = {"game/adversarial_loss": losses.mean(), "game/attacker_loss": ascended}
        if gradient.clean_losses is not None:
            stats["game/clean_loss"] = gradient.clean_losses.mean()
        stats |= perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

    def health(self, defender: Defender, x: Tensor, y: Tensor) -> dict[str, float]:
        """See `advgame.games.training.Watched`."""
        gradient = self._gradient(defender, x, y, "eval")
        return tagged("attacker", self.attacker.signs(x, y, self.threat, gradient))

    def state_dict(self) -> dict[str, Any]:
        """The attacker's."""
        return self.attacker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.attacker.load_state_dict(state)

    def _gradient(
        self, defender: Defender, x: Tensor, y: Tensor, mode: BatchNormMode, keep: bool = True
    ) -> InputGradient:
        return InputGradient(defender.module, x, y, loss=self.loss, mode=mode, restore_buffers=keep)

    def _perturb(
        self, defender: Defender, x: Tensor, threat: Threat, gradient: InputGradient, passes: Passes
    ) -> Tensor:
        before = gradient.calls
        # a region of its own: autocast keeps its casts of φ until the region ends, those made
        # without gradient or before a step must not be found again
        with defender.fabric.autocast():
            x_adv = self.attacker.perturb(x, threat, gradient)
        passes.forwards += gradient.calls - before
        passes.input_backwards += gradient.calls - before
        passes.attacker_forwards += self.attacker.cells
        return x_adv

    def _shared(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        gradient: InputGradient,
        passes: Passes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.attacker.module.train()
        x_adv = self._perturb(defender, x, threat, gradient, passes)
        leaves: list[Tensor] = []

        def loss(model: nn.Module) -> Tensor:  # asked twice where weights are perturbed
            leaves.append(x_adv.detach().clone().requires_grad_())
            return defender.loss(model(leaves[-1]), y)

        losses = defender.descend(loss)
        defender.step()
        x_adv.backward(leaves[-1].grad)  # on into φ
        self.attacker.step()
        passes.add_descent(defender)
        passes.attacker_backwards += self.attacker.cells
        return x_adv.detach(), losses, losses.mean()

    def _alternating(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        gradient: InputGradient,
        passes: Passes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        reused = self.attacker.gradients == 0 and self.modes.attacker == "train"
        self.attacker.module.train(self.modes.attacker == "train")
        with torch.set_grad_enabled(reused):
            made = self._perturb(defender, x, threat, gradient, passes)
        x_adv = made.detach()
        losses = defender.backward(x_adv, y)
        defender.step()
        passes.add_descent(defender)
        ascended = self._teach(defender, x, y, threat, made if reused else None, passes)
        return x_adv, losses, ascended

    def _teach(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        made: Tensor | None,
        passes: Passes,
    ) -> Tensor:
        """The attacker's steps; returns the mean loss that the first one began from."""
        model, first = defender.module, None
        gradient = self._gradient(defender, x, y, self.modes.learning)
        self.attacker.module.train()
        for _ in range(self.attacker_steps):
            if made is None:
                made = self._perturb(defender, x, threat, gradient, passes)
            with attacked(model, self.modes.learning):
                with defender.fabric.autocast():
                    reached = self.loss(model(made), y).mean()
                reached.backward()  # θ is frozen: into φ only
            self.attacker.step()
            passes.forwards += 1
            passes.input_backwards += 1
            passes.attacker_backwards += self.attacker.cells
            made, first = None, reached.detach() if first is None else first
        assert first is not None
        return first

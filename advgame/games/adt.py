"""ADT: the attacker is a distribution over perturbations, kept wide by an entropy term.

    min_θ  mean_i  max over p_i of  E_(δ ~ p_i) [ loss(f(x_i + δ; θ), y_i) ] + λ H(p_i)

EXP fits a distribution to each image (`advgame.attacks.distributional`); EXP-AM and IMP-AM have a
network that makes it, explicitly or as a sampler, and that takes one step per step of the
defender. λ weighs the entropy per dimension.

Source: Dong et al. 2020, Adversarial distributional training (ADT); the form of the amortised step
is the published code's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advgame.attacks import DistributionalAttack, InputGradient
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.health import tagged
from advgame.threat import Linf, Threat


@dataclass(frozen=True)
class Explicit:
    """ADT-EXP: the defender learns from one fresh sample of the distribution fitted to each image.

    Args:
        attack: fits the distributions; its threat is the game's.

    Raises:
        InputError: a radius per image.
    """

    attack: DistributionalAttack

    def __post_init__(self) -> None:
        if isinstance(self.attack.threat.eps, Tensor):
            raise InputError("ADT is played with one eps for all images")

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of the defender: see `advgame.games.training.Rules`."""
        threat = self.attack.threat.scaled(scale)
        attack = replace(self.attack, threat=threat)
        with defender.fabric.autocast():
            fitted = attack.fit(defender.module, x, y, rng)
        made = attack.steps * attack.samples
        passes = Passes(forwards=made, input_backwards=made)
        draw = fitted.distribution.sample(rng)
        x_adv = attack.place(draw.value, x)
        losses = defender.backward(x_adv, y)
        defender.step()
        passes.add_descent(defender)
        stats = {
            "game/adversarial_loss": losses.mean(),
            "game/attacker_loss": fitted.losses.mean(),
            "game/entropy": fitted.distribution.entropy(draw).mean(),
            "attacker/mean": fitted.distribution.mean.tanh().abs().mean(),
            "attacker/spread": fitted.distribution.spread.mean(),
        }
        stats |= perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every batch is fitted anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Sampled:
    """What a network drew for one batch.

    Args:
        x_adv: (B, C, H, W), differentiable in φ.
        bonus: scalar: λ times the entropy, or its bound; differentiable in φ.
        stats: scalar tensors to log.
    """

    x_adv: Tensor
    bonus: Tensor
    stats: dict[str, Tensor]


class SamplingPlayer(Protocol):
    """A network that learns to sample, with its optimiser."""

    @property
    def module(self) -> nn.Module:
        """The generator."""
        ...

    def sample(
        self, x: Tensor, threat: Threat, gradient: InputGradient, rng: torch.Generator
    ) -> Sampled:
        """One sample per image: one forward of the generator."""
        ...

    def step(self) -> None:
        """One step up along the gradients on φ, which are then cleared."""
        ...

    def signs(
        self, x: Tensor, y: Tensor, threat: Threat, gradient: InputGradient
    ) -> dict[str, float]:
        """Signs of life on a batch, see `advgame.health`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        ...


@dataclass(frozen=True)
class Amortised:
    """ADT-EXP-AM and ADT-IMP-AM: a simultaneous step of defender and generator.

    One backward pass of the defender's mean loss gives its own gradient, which it descends, and
    the gradient at the samples, from which one backward pass of the generator goes on, together
    with the entropy's, and which the generator ascends. So it learns against the θ before the
    step and, other than its input gradients, against a defender in training mode. Where the
    defender smooths labels, the generator ascends that loss.

    Args:
        threat: an L∞ ball, one radius for all.
        attacker: learns to sample.

    Raises:
        InputError: another ball.
    """

    threat: Threat
    attacker: SamplingPlayer

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf) or isinstance(self.threat.eps, Tensor):
            raise InputError("ADT is played in an L∞ ball with one eps for all images")

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of both players: see `advgame.games.training.Rules`."""
        threat, gradient = self.threat.scaled(scale), InputGradient(defender.module, x, y)
        self.attacker.module.train()
        with defender.fabric.autocast():
            sampled = self.attacker.sample(x, threat, gradient, rng)
        x_adv, leaves = sampled.x_adv.detach(), list[Tensor]()

        def loss(model: nn.Module) -> Tensor:  # asked twice where weights are perturbed
            leaves.append(x_adv.clone().requires_grad_())
            return defender.loss(model(leaves[-1]), y)

        losses = defender.descend(loss)
        defender.step()
        torch.autograd.backward((sampled.x_adv, sampled.bonus), (leaves[-1].grad, None))
        self.attacker.step()
        passes = Passes(gradient.calls, 0, gradient.calls, 1, 1)
        passes.add_descent(defender)
        stats = {"game/adversarial_loss": losses.mean(), "game/attacker_loss": losses.mean()}
        if gradient.clean_losses is not None:
            stats["game/clean_loss"] = gradient.clean_losses.mean()
        stats |= sampled.stats | perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

    def health(self, defender: Defender, x: Tensor, y: Tensor) -> dict[str, float]:
        """See `advgame.games.training.Watched`."""
        gradient = InputGradient(defender.module, x, y)
        return tagged("attacker", self.attacker.signs(x, y, self.threat, gradient))

    def state_dict(self) -> dict[str, Any]:
        """The attacker's."""
        return self.attacker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.attacker.load_state_dict(state)

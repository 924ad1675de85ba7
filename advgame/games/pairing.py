"""TRADES, MART and ALP: losses that pair each clean image with its adversarial example.

    θ ← θ - lr · ∇ mean[ own(f(x), f(x'), y) + β · pairing(f(x), f(x'), y) ]

The gradient flows through both outputs. Two forwards, not one of both batches: batch norm sees
clean images and adversarial examples apart, as TRADES' and MART's published code has it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import Attack, kl_pgd, near_pgd, pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.games.training import Rules
from advgame.losses import Loss, boosted_cross_entropy, cross_entropy, divergence
from advgame.threat import Threat

pgd10 = partial(pgd, steps=10)


@dataclass(frozen=True)
class PairedTraining(Rules):
    """The rules; a game says what its two terms are.

    Args:
        threat: the ball.
        beta: β, a number or one per image (B,).
        attack: makes the attack within a ball.

    Raises:
        InputError: β below 0.
    """

    threat: Threat
    beta: float | Tensor
    attack: Callable[[Threat], Attack]

    def __post_init__(self) -> None:
        if not isinstance(self.beta, Tensor) and not self.beta >= 0:
            raise InputError(f"beta must be 0 or above, not {self.beta}")

    @abstractmethod
    def terms(
        self, clean: Tensor, adversarial: Tensor, y: Tensor, fit: Loss
    ) -> tuple[Tensor, Tensor]:
        """The two terms, per image (B,).

        Args:
            clean: logits (B, K) of the images.
            adversarial: logits (B, K) of the adversarial examples.
            y: (B,).
            fit: the defender's loss, cross-entropy with its smoothing.
        """

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat, passes, stats = self.threat.scaled(scale), Passes(), dict[str, Tensor]()
        with defender.under_attack():
            made = self.attack(threat).run(defender.module, x, y, rng=rng, check=False)
        x_adv = made.x_adv
        passes.add_attack(made)

        def loss(model: nn.Module) -> Tensor:
            clean, adversarial = model(x), model(x_adv)
            own, pairing = self.terms(clean, adversarial, y, defender.loss)
            stats["game/clean_loss"] = cross_entropy(clean.detach(), y).mean()
            stats["game/pairing_loss"] = pairing.detach().mean()
            return own + self.beta * pairing

        losses = defender.descend(loss)
        defender.step()
        passes.add_descent(defender, batches=2)
        stats["game/adversarial_loss"] = losses.mean()
        stats |= perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)


@dataclass(frozen=True)
class Trades(PairedTraining):
    """CE(f(x), y) + β KL(f(x) ‖ f(x')), and the attack ascends that KL (Zhang et al. 2019).

    The attack's clean logits are formed once per step, in evaluation mode, not once per step of
    the attack as in the published code.
    """

    beta: float | Tensor = 6.0
    attack: Callable[[Threat], Attack] = kl_pgd

    @override
    def terms(
        self, clean: Tensor, adversarial: Tensor, y: Tensor, fit: Loss
    ) -> tuple[Tensor, Tensor]:
        return fit(clean, y), divergence(clean, adversarial)


@dataclass(frozen=True)
class Mart(PairedTraining):
    """BCE(f(x'), y) + β KL(f(x) ‖ f(x')) (1 - p_y(x)) (Wang et al. 2020, eq. 11).

    β is 5 for their ResNet-18 and 6 for their WRN.
    """

    beta: float | Tensor = 5.0
    attack: Callable[[Threat], Attack] = near_pgd

    @override
    def terms(
        self, clean: Tensor, adversarial: Tensor, y: Tensor, fit: Loss
    ) -> tuple[Tensor, Tensor]:
        missing = 1.0000001 - F.softmax(clean, 1).gather(1, y[:, None])[:, 0]
        return boosted_cross_entropy(adversarial, y, fit), divergence(clean, adversarial) * missing


@dataclass(frozen=True)
class LogitPairing(PairedTraining):
    """Half clean, half adversarial images, and λ = β on the square between both logits (ALP).

    Source: Kannan et al. 2018; the square is the mean over the K logits.
    """

    beta: float | Tensor = 0.5
    attack: Callable[[Threat], Attack] = pgd10

    @override
    def terms(
        self, clean: Tensor, adversarial: Tensor, y: Tensor, fit: Loss
    ) -> tuple[Tensor, Tensor]:
        return (fit(clean, y) + fit(adversarial, y)) / 2, (clean - adversarial).square().mean(1)

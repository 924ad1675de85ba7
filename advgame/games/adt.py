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

import torch
from torch import Tensor

from advgame.attacks import DistributionalAttack
from advgame.defender import Defender
from advgame.games.attacker import AttackerRules, check_ball, joint_step
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.games.training import Rules


@dataclass(frozen=True)
class AdtExp(Rules):
    """ADT-EXP: the defender learns from one fresh sample of the distribution fitted to each image.

    Args:
        attack: fits the distributions; its threat is the game's.

    Raises:
        InputError: a radius per image.
    """

    attack: DistributionalAttack

    def __post_init__(self) -> None:
        check_ball(self.attack.threat)

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One batch: fit p_i to each image, draw δ_i ~ p_i, and let the defender descend there.

        θ ← θ − η ∇_θ mean_i loss(f(x_i + δ_i; θ), y_i)
        """
        threat = self.attack.threat.scaled(scale)
        attack = replace(self.attack, threat=threat)
        with defender.under_attack():
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


@dataclass(frozen=True)
class AdtAmortised(AttackerRules):
    """ADT-EXP-AM and ADT-IMP-AM: a simultaneous step of defender and generator φ.

    It is `advgame.games.attacker.joint_step`: other than its input gradients, the generator meets
    a defender in training mode. H is the player's to estimate, or to bound.
    """

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One batch: draw δ_i ~ p_φ(δ | x_i), then both players step from the same point.

        θ ← θ − η_θ ∇_θ   mean_i loss(f(x_i + δ_i; θ), y_i)
        φ ← φ + η_φ ∇_φ [ mean_i loss(f(x_i + δ_i; θ), y_i) + λ H(p_φ) ]
        """
        threat, gradient = self.threat.scaled(scale), self._gradient(defender, x, y)
        self.attacker.module.train()
        with defender.fabric.autocast():
            sampled = self.attacker.sample(gradient, threat, rng)
        losses = joint_step(defender, self.attacker, sampled, y)
        x_adv = sampled.x_adv.detach()
        passes = Passes(gradient.calls, 0, gradient.calls, self.attacker.cells, self.attacker.cells)
        passes.add_descent(defender)
        stats = {"game/adversarial_loss": losses.mean(), "game/attacker_loss": losses.mean()}
        if gradient.clean_losses is not None:
            stats["game/clean_loss"] = gradient.clean_losses.mean()
        stats |= sampled.stats | perturbation_stats(x_adv - x, threat) | passes.stats(x.device)
        return DefenderStep(x_adv, losses, stats)

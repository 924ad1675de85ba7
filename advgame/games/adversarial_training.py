"""Adversarial training with an attack that does not learn: PGD-AT, FGSM-AT, or none at all.

Sources: Goodfellow et al. 2015 (FGSM-AT), Madry et al. 2018 (PGD-AT; "PGM" in L2L). These are the
controls of a learned attacker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from advgame.attacks import Attack
from advgame.defender import Defender
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.games.training import Rules
from advgame.threat import Threat


@dataclass(frozen=True)
class AdversarialTraining(Rules):
    """The rules.

    Args:
        threat: the ball.
        attack: makes the attack within a ball; None trains on clean images.
    """

    threat: Threat
    attack: Callable[[Threat], Attack] | None = None

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat, passes, x_adv = self.threat.scaled(scale), Passes(), x
        if self.attack is not None:
            with defender.under_attack():
                made = self.attack(threat).run(defender.module, x, y, rng=rng, check=False)
            x_adv = made.x_adv
            passes.add_attack(made)
        losses = defender.backward(x_adv, y)
        defender.step()
        passes.add_descent(defender)
        stats = {"game/adversarial_loss": losses.mean()}
        if self.attack is None:
            stats = {"game/clean_loss": losses.mean()}
        else:
            stats |= perturbation_stats(x_adv - x, threat)
        return DefenderStep(x_adv, losses, stats | passes.stats(x.device))

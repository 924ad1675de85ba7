"""Adversarial training against an attack that does not learn: the controls of a learned attacker.

Without an attack it is plain training, with FGSM or PGD it is FGSM-AT (Goodfellow et al. 2015) or
PGD-AT (Madry et al. 2018; "PGM" in L2L). Batches, schedule and counts are those of the games.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advgame.attacks import Attack
from advgame.defender import Defender
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.threat import Threat


@dataclass(frozen=True)
class AdversarialTraining:
    """The rules.

    Args:
        threat: the ball.
        attack: makes the attack within a ball; None trains on clean images.
    """

    threat: Threat
    attack: Callable[[Threat], Attack] | None = None

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of the defender.

        Args:
            defender: learns.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            rng: stream of random starts, on the images' device.
            scale: share of ε that is in use.
        """
        threat, passes, x_adv = self.threat.scaled(scale), Passes(), x
        if self.attack is not None:
            with defender.fabric.autocast():
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

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the attack does not learn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

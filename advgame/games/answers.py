"""How a classifier learns to answer attackers, as the defender's best response of PSRO.

`DrawnAttacks` answers a mixture of attacks: adversarial training on attacks drawn from it (Lanctot
et al. 2017 have any approximate best response there). `Boosting` is BARRE's rule (Dbouk & Shanbhag
2023): a further member learns from the attack on the mixture that it is to join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.arena.mixture import ClassifierMixture
from advgame.arena.mixture_file import check_weights
from advgame.attacks import Attack
from advgame.defender import Defender
from advgame.games.costs import DefenderStep, Passes, perturbation_stats
from advgame.games.training import Rules
from advgame.threat import Threat


@dataclass(frozen=True)
class DrawnAttacks(Rules):
    """The rules: each image is attacked by one of several attacks, drawn with its weight.

    Args:
        threat: the ball.
        attacks: each makes an attack within a ball, which is run on the defender.
        weights: their probabilities, in the same order.

    Raises:
        InputError: no attack, or weights that are no probabilities.
    """

    threat: Threat
    attacks: Sequence[Callable[[Threat], Attack]]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        check_weights(self.weights, len(self.attacks))

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat, passes, x_adv = self.threat.scaled(scale), Passes(), x.clone()
        shares = torch.tensor(self.weights, device=x.device)
        drawn = torch.multinomial(shares, len(x), replacement=True, generator=rng)
        with defender.under_attack():
            for number in drawn.unique().tolist():
                rows = (drawn == number).nonzero()[:, 0]
                attack = self.attacks[number](threat)
                made = attack.run(defender.module, x[rows], y[rows], rng=rng, check=False)
                x_adv[rows] = made.x_adv
                passes.forwards += made.forwards / len(x)
                passes.input_backwards += made.backwards / len(x)
        return _descended(defender, x, x_adv, y, threat, passes)


@dataclass(frozen=True)
class Boosting(Rules):
    """BARRE's rules: the newest of equally likely members learns from the attack on all of them.

    Source: Dbouk & Shanbhag 2023. Written from memory of the paper and of what the authors' code
    does: there the attack in training is ascent on the expected loss, weights are equal until OSP
    is run, from half of a member's training on, and a further loss term is optional, which is left
    out here. OSP (`advgame.arena.optimal_sampling`) is the caller's, after the training.

    Args:
        threat: the ball.
        others: the members so far, which do not learn; on the defender's device.
        attack: makes an attack on a mixture within a ball.
    """

    threat: Threat
    others: Sequence[nn.Module]
    attack: Callable[[Threat], Attack]

    @override
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        threat, passes = self.threat.scaled(scale), Passes()
        members = [*self.others, defender.module]
        mixture = ClassifierMixture(members, [1 / len(members)] * len(members)).to(x.device)
        with defender.under_attack():
            made = self.attack(threat).run(mixture, x, y, rng=rng, check=False)
        passes.forwards += made.forwards * len(members) / len(x)
        passes.input_backwards += made.backwards * len(members) / len(x)
        return _descended(defender, x, made.x_adv, y, threat, passes)


def _descended(
    defender: Defender, x: Tensor, x_adv: Tensor, y: Tensor, threat: Threat, passes: Passes
) -> DefenderStep:
    """The defender's step at adversarial examples."""
    losses = defender.backward(x_adv, y)
    defender.step()
    passes.add_descent(defender)
    stats = {"game/adversarial_loss": losses.mean(), **perturbation_stats(x_adv - x, threat)}
    return DefenderStep(x_adv, losses, stats | passes.stats(x.device))

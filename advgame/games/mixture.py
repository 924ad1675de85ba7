"""A classifier u against the worst of several attacks: fixed types, and networks that learn.

    min_u max { f(u, z₁(u)), ..., f(u, z_m(u)), max f(u, z(v₁)), ..., max f(u, z(v_n)) }

Source: Hamm & Mehra 2018, Machine vs Machine, equations 20 and 21, which they leave to others; the
solver is K-beam's (Hamm & Noh 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks import GradientAttack, fgsm, ifgsm, pgd
from advgame.choices import Per
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.attacker import check_ball
from advgame.games.costs import DefenderStep, perturbation_stats
from advgame.games.minimax import Examples, Seen, examples_of, risk_of
from advgame.games.training import Rules
from advgame.health import network_signs, tagged
from advgame.optimizers import load_optimizer
from advgame.solvers import KBeam, Risk
from advgame.threat import Threat

FIXED: dict[str, Callable[[Threat], GradientAttack]] = {
    "fgsm": fgsm,
    "ifgsm": lambda threat: ifgsm(threat, 10, threat.eps),
    "pgd": lambda threat: pgd(threat, 10),
}
"""Attacks that do not learn, within a ball; ``ifgsm`` with the paper's steps of ε each."""


def check_mixture(names: Sequence[str]) -> None:
    """Refuse names that are neither in `FIXED` nor those of networks: attnet, attnet2, ...

    Raises:
        InputError: which one; or a name that is there twice.
    """
    if odd := [n for n in names if n not in FIXED and not n.startswith("attnet")]:
        known = ", ".join(FIXED)
        raise InputError(f"unknown attack {odd[0]!r}: choose {known}, attnet, attnet2, ...")
    if len(set(names)) < len(names) or not names:
        raise InputError(f"a mixture names each of its attacks once, not {' '.join(names)!r}")


class Mixture(Rules):
    """The rules: the defender descends at the worst attack, the networks ascend after it.

    Args:
        threat: an L∞ ball, one radius for all.
        fixed: names from `FIXED`; these attacks are run anew in every step, on the current u.
        learned: name -> network g: images (B, C, H, W) and labels (B,) -> (B, C, H, W) in [-1, 1].
        lr: of Adam on the networks.
        per: each sample's own worst attack, or the one that is worst for the batch, as printed.
        ascent_steps: of the networks per step of the defender, at the new u.

    Raises:
        InputError: another ball, names that `check_mixture` refuses, or an unknown ``per``.
    """

    def __init__(
        self,
        threat: Threat,
        fixed: Sequence[str],
        learned: Mapping[str, nn.Module],
        *,
        lr: float = 1e-3,
        per: Per = "sample",
        ascent_steps: int = 1,
    ) -> None:
        check_ball(threat)
        check_mixture([*fixed, *learned])
        if per not in ("sample", "batch"):
            raise InputError(f"unknown per {per!r}: choose sample or batch")
        self.threat, self.fixed, self.learned = threat, list(fixed), dict(learned)
        self.per, self.ascent_steps = per, ascent_steps
        self.names = [*self.fixed, *self.learned]
        groups: list[dict[str, Any]] = [{"params": []} for _ in self.fixed]
        groups += [{"params": list(network.parameters())} for network in self.learned.values()]
        self.optimizer = torch.optim.Adam(groups, lr)

    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """One step of the defender at the worst, then of every network.

        Dropout of the networks is on while they and the defender learn; fixed attacks see the
        defender in evaluation mode.
        """
        threat = self.threat.scaled(scale)
        seen: dict[str, list[Seen]] = {name: [] for name in self.names}
        examples: dict[str, Examples] = {}
        for name in self.fixed:
            made = FIXED[name](threat).run(defender.module, x, y, rng=rng, check=False)
            examples[name] = _constant(made.x_adv)
        for name, network in self.learned.items():
            examples[name] = examples_of(network, threat, x, y)
        risks = [risk_of(defender, examples[name], y, seen[name]) for name in self.names]
        if self.per == "batch":
            risks = [_mean(risk) for risk in risks]
        solver = KBeam(defender.optimizer, self.optimizer, self.ascent_steps)
        followed = solver.step(risks)
        before = [seen[name][0] for name in self.names]  # the first look, at the old u and v
        losses = torch.stack([loss for _, loss in before])
        totals = losses if self.per == "sample" else losses.mean(1, keepdim=True).expand_as(losses)
        images = torch.stack([x_adv for x_adv, _ in before])
        worst, every = totals.argmax(0), torch.arange(len(x), device=x.device)
        x_adv, losses = images[worst, every], losses[worst, every]
        stats = {"game/adversarial_loss": losses.mean()}
        for number, name in enumerate(self.names):
            stats[f"game/lead_{name}"] = followed[f"game/lead{number}"]
        return DefenderStep(x_adv, losses, stats | perturbation_stats(x_adv - x, threat))

    def health(self, defender: Defender, x: Tensor, y: Tensor) -> dict[str, float]:
        """Signs of life of every network by tag, under its name."""
        found: dict[str, float] = {}
        for name, network in self.learned.items():
            found |= tagged(name, network_signs(network, x, y))
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        networks = {name: network.state_dict() for name, network in self.learned.items()}
        return {"networks": networks, "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.learned.items():
            network.load_state_dict(state["networks"][name])
        load_optimizer(self.optimizer, state["optimizer"])


def _constant(x_adv: Tensor) -> Examples:
    return lambda v: x_adv


def _mean(risk: Risk) -> Risk:
    return lambda u, v: risk(u, v).mean()

"""ADT's generators while they learn: ascent of what the defender descends, plus λ entropy.

Source: Dong et al. 2020, Adversarial distributional training (ADT); the published code has Adam
with rate 2e-4 and betas (0.5, 0.999) on the generator and torch's own betas on the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advgame.attacks import InputGradient, attacked
from advgame.distributions import LOG_2
from advgame.errors import InputError
from advgame.games.adt import Sampled
from advgame.health import gradient_sign, output_signs
from advgame.threat import Threat, per_image
from agents.adt import ADTNetwork
from agents.adt_networks import Encoder

Synchronise = Callable[[nn.Module], None]


class ExplicitPlayer:
    """EXP-AM: G makes μ and ρ, whose entropy is estimated from the sample.

    Args:
        network: of kind exp-am, on its device.
        lam: λ, the weight of the entropy per dimension of δ.
        lr: of Adam, constant.
        synchronise: called before each step, to average gradients over processes.

    Raises:
        InputError: a negative λ.
    """

    def __init__(
        self,
        network: ADTNetwork,
        *,
        lam: float = 0.01,
        lr: float = 2e-4,
        synchronise: Synchronise | None = None,
    ) -> None:
        if not 0 <= lam < math.inf:
            raise InputError(f"lam must be 0 or above, not {lam}")
        self.module, self.lam, self.synchronise = network, lam, synchronise
        self.optimizer = torch.optim.Adam(
            network.parameters(), lr, (0.5, 0.999), maximize=True, fused=True
        )

    def sample(
        self, x: Tensor, threat: Threat, gradient: InputGradient, rng: torch.Generator
    ) -> Sampled:
        """See `advgame.games.adt.SamplingPlayer`."""
        found = self.module.distribution(self.module.information(x, threat, gradient))
        draw = found.sample(rng)
        entropy = found.entropy(draw).mean()
        stats = {
            "game/entropy": entropy.detach(),
            "attacker/mean": found.mean.detach().tanh().abs().mean(),
            "attacker/spread": found.spread.detach().mean(),
        }
        x_adv = threat.project(x + draw.value * per_image(threat.eps, x), x)
        return Sampled(x_adv, self.lam * entropy, stats)

    def step(self) -> None:
        """Up along the gradients that a backward pass left, which are then cleared."""
        if self.synchronise is not None:
            self.synchronise(self.module)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def signs(
        self, x: Tensor, y: Tensor, threat: Threat, gradient: InputGradient
    ) -> dict[str, float]:
        """See `advgame.games.adt.SamplingPlayer`; of the mean perturbation tanh(μ)."""
        with torch.no_grad(), attacked(self.module):
            found = self.module.distribution(self.module.information(x, threat, gradient))
        signs = output_signs(found.mean.tanh(), y) | gradient_sign(self.optimizer)
        return signs | {"width": float(found.spread.mean())}

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {"network": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class ImplicitPlayer:
    """IMP-AM: G turns z into δ; an encoder that guesses z from δ bounds the entropy from below.

    The entropy of δ cannot be had, but with z ~ U(-1, 1)^Z the information that δ holds about z
    is at least Z (log 2 - NLL) nats, which is what ``game/entropy`` logs, per dimension of z. A
    generator without noise can be inverted to any precision, where NLL falls without end and δ
    does not become more various: so G is pushed only while NLL is above ``threshold``.

    The published threshold, 0.9, pushes nothing: an encoder that ignores δ reaches
    `agents.adt_networks.PRIOR_NLL`, 0.8696.

    Args:
        network: of kind imp-am, on its device.
        encoder: q(z | δ/ε), on the same.
        lam: λ, the weight of NLL per dimension of z.
        threshold: of NLL; -inf pushes always.
        lazy: the encoder, too, stops at the threshold, as published. Otherwise it goes on, so
            that the bound is as tight as it can make it.
        lr: of Adam on the generator, constant.
        encoder_lr: of Adam on the encoder.
        synchronise: called before each step, to average gradients over processes.

    Raises:
        InputError: a negative λ, or a threshold that is not a number.
    """

    def __init__(
        self,
        network: ADTNetwork,
        encoder: Encoder,
        *,
        lam: float = 1.0,
        threshold: float = 0.5,
        lazy: bool = False,
        lr: float = 2e-4,
        encoder_lr: float = 2e-4,
        synchronise: Synchronise | None = None,
    ) -> None:
        if not 0 <= lam < math.inf or math.isnan(threshold):
            raise InputError(
                f"lam must be 0 or above and threshold a number, not {lam} and {threshold}"
            )
        self.module, self.encoder, self.lam = network, encoder, lam
        self.threshold, self.lazy, self.synchronise = threshold, lazy, synchronise
        self.optimizers = [
            torch.optim.Adam(part.parameters(), rate, betas, maximize=True, fused=True)
            for part, rate, betas in (
                (network, lr, (0.5, 0.999)),
                (encoder, encoder_lr, (0.9, 0.999)),
            )
        ]

    def sample(
        self, x: Tensor, threat: Threat, gradient: InputGradient, rng: torch.Generator
    ) -> Sampled:
        """See `advgame.games.adt.SamplingPlayer`."""
        self.encoder.train()
        information = self.module.information(x, threat, gradient)
        z = self.module.noise(information, rng)
        value = self.module.perturbation(information, z)
        seen = value.view_as(value)  # what the encoder sees, with a gradient of its own
        nll = self.encoder.nll(seen, z)
        pushed = (nll.detach() > self.threshold).to(nll.dtype)
        if self.lazy:
            bonus = -self.lam * nll * pushed
        else:  # λ and the threshold are G's: the encoder learns without them
            bonus = -nll
            seen.register_hook(lambda gradient: gradient * self.lam * pushed)
        stats = {
            "game/entropy": LOG_2 - nll.detach(),
            "attacker/nll": nll.detach(),
            "attacker/pushed": pushed,
            "cost/encoder_passes": torch.ones_like(pushed),
        }
        x_adv = threat.project(x + value * per_image(threat.eps, x), x)
        return Sampled(x_adv, bonus, stats)

    def step(self) -> None:
        """Both up along the gradients that a backward pass left, which are then cleared."""
        for part, optimizer in zip((self.module, self.encoder), self.optimizers, strict=True):
            if self.synchronise is not None:
                self.synchronise(part)
            optimizer.step()
            optimizer.zero_grad()

    def signs(
        self, x: Tensor, y: Tensor, threat: Threat, gradient: InputGradient
    ) -> dict[str, float]:
        """See `advgame.games.adt.SamplingPlayer`; of perturbations from a fixed draw of z."""
        rng = torch.Generator(x.device).manual_seed(0)
        with torch.no_grad(), attacked(self.module):
            information = self.module.information(x, threat, gradient)
            value = self.module.perturbation(information, self.module.noise(information, rng))
        return output_signs(value, y) | gradient_sign(self.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers."""
        return {
            "network": self.module.state_dict(),
            "encoder": self.encoder.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.module.load_state_dict(state["network"])
        self.encoder.load_state_dict(state["encoder"])
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)

"""ADT's generators: networks that make an adversarial distribution for each image, or its samples.

    EXP-AM   (μ, ρ) = G(𝒜),      δ = ε·tanh(μ + softplus(ρ) r),  r ~ N(0, I)
    IMP-AM   δ = ε·tanh(G(𝒜, z)),                                z ~ U(-1, 1)^Z

    𝒜 = [x, g₁, g₂]: the image, its input gradient, and the one at its FGSM example

While they learn they ascend what the defender descends, plus λ entropy: `ExplicitPlayer`,
`ImplicitPlayer`.

Source: Dong et al. 2020, Adversarial distributional training (ADT). 𝒜, and Adam with rate 2e-4 and
betas (0.5, 0.999) on the generator and torch's own betas on the encoder, are the published code's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from advgame.attacks import InputGradient, attacked
from advgame.distributions import LOG_2, TanhNormal
from advgame.errors import InputError
from advgame.games.attacker import Sampled
from advgame.health import gradient_sign, output_signs
from advgame.losses import full_precision
from advgame.threat import Threat
from agents.adt_networks import Encoder, LatentMap, make_generator
from agents.attacker_network import AttackerNetwork, AttackerPlayer, DeltaSampler, placed
from agents.l2l import scaled
from agents.settings import Body, GradientScaling

Kind = Literal["exp-am", "imp-am"]


class ADTNetwork(AttackerNetwork):
    """G, and what it is told.

    Args:
        shape: (C, H, W) of the images.
        kind: ``"exp-am"`` or ``"imp-am"``.
        body: ``"small"`` or ``"resnet-3blocks"``.
        ngf: width of the latter.
        latent: Z, of imp-am.
        scaling: of the gradient channels. ``"image"`` divides each image's by its own largest
            entry: what says where to push does not depend on how sure the classifier is (the raw
            gradient of a confident one is many orders below the pixels beside it), on the batch
            size or on the other images. ``"raw"`` has the gradient of a batch's mean loss, as
            published.
        batch: images in the batch of ``"raw"``, those of a training step: a finished generator
            sees gradients of the size that it learned from, however many images it attacks.

    Raises:
        InputError: an unknown word, or a size below 1.
    """

    file_kind = "adt"
    adam: ClassVar[dict[str, Any]] = {"lr": 2e-4, "betas": (0.5, 0.999)}
    stochastic = True
    gradients = 2

    def __init__(
        self,
        shape: tuple[int, int, int],
        kind: Kind = "exp-am",
        body: Body = "small",
        ngf: int = 256,
        latent: int = 64,
        scaling: GradientScaling = "image",
        batch: int = 64,
    ) -> None:
        super().__init__(
            shape, kind=kind, body=body, ngf=ngf, latent=latent, scaling=scaling, batch=batch
        )
        for name, value, known in (("kind", kind, Kind), ("scaling", scaling, GradientScaling)):
            if value not in get_args(known):
                raise InputError(f"unknown {name} {value!r}: choose {' or '.join(get_args(known))}")
        if min(latent, batch) < 1:
            raise InputError(f"latent and batch must be 1 or above, not {latent} and {batch}")
        self.kind, self.latent, self.scaling, self.batch = kind, latent, scaling, batch
        implicit, colours = kind == "imp-am", shape[0]
        self.latent_map = LatentMap(latent, shape, body) if implicit else None
        inputs, outputs = 3 * colours + implicit, colours * (1 if implicit else 2)
        self.body = make_generator(body, inputs, outputs, shape, ngf)

    def information(self, gradient: InputGradient, threat: Threat) -> Tensor:
        """𝒜 (B, 3C, H, W), a constant: two input gradients; arguments as those of `sampler`."""
        x, first = full_precision(gradient.x), gradient.at_clean()
        second = gradient(placed(threat.steepest(first), x, threat))
        if self.scaling == "raw":
            return torch.cat([x, first / self.batch, second / self.batch], 1)
        return torch.cat([x, scaled(first, "image"), scaled(second, "image")], 1)

    def distribution(self, information: Tensor) -> TanhNormal:
        """The distribution of δ/ε that exp-am makes of 𝒜."""
        made = self.body(information.to(self.dtype)).to(information.dtype)
        mean, raw = made.chunk(2, 1)
        return TanhNormal(mean, raw)

    def noise(self, information: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z (B, Z) of imp-am."""
        size = len(information), self.latent
        at: Any = {"device": information.device, "dtype": information.dtype}
        return 2 * torch.rand(size, generator=rng, **at) - 1

    def perturbation(self, information: Tensor, z: Tensor) -> Tensor:
        """δ/ε (B, C, H, W) that imp-am makes of 𝒜 and z (B, Z)."""
        assert self.latent_map is not None
        extra = self.latent_map(z.to(self.dtype))
        made = self.body(torch.cat([information.to(self.dtype), extra], 1))
        value: Tensor = made.to(information.dtype).tanh()
        return value

    def sampler(self, gradient: InputGradient, threat: Threat) -> DeltaSampler:
        """Samples of each image's distribution, which share 𝒜 and what exp-am makes of it."""
        information = self.information(gradient, threat)
        if self.kind == "exp-am":
            explicit = self.distribution(information)
            return lambda rng: explicit.sample(rng).value
        return lambda rng: self.perturbation(information, self.noise(information, rng))


def matching_encoder(network: ADTNetwork) -> Encoder:
    """A fresh encoder of the size that goes with an imp-am generator."""
    return Encoder(network.shape, network.latent, network.settings["body"])


class ExplicitPlayer(AttackerPlayer):
    """EXP-AM: G makes μ and ρ, whose entropy is estimated from the sample.

    Args:
        network: of kind exp-am, on its device.
        lam: λ, the weight of the entropy per dimension of δ.
        more: `AttackerPlayer`'s.

    Raises:
        InputError: a negative λ.
    """

    module: ADTNetwork

    def __init__(self, network: ADTNetwork, *, lam: float = 0.01, **more: Any) -> None:
        super().__init__(network, **more)
        self.lam = _weight(lam)

    def sample(self, gradient: InputGradient, threat: Threat, rng: torch.Generator) -> Sampled:
        """δ ~ p_φ(δ | x), with λ H(p_φ) as the bonus."""
        found = self.module.distribution(self.module.information(gradient, threat))
        draw = found.sample(rng)
        entropy = found.entropy(draw).mean()
        stats = {
            "game/entropy": entropy.detach(),
            "attacker/mean": found.mean.detach().tanh().abs().mean(),
            "attacker/spread": found.spread.detach().mean(),
        }
        return Sampled(placed(draw.value, gradient.x, threat), self.lam * entropy, stats)

    def signs(self, gradient: InputGradient, threat: Threat) -> dict[str, float]:
        """Signs of life, of the mean perturbation tanh(μ) and of σ."""
        with torch.no_grad(), attacked(self.module):
            found = self.module.distribution(self.module.information(gradient, threat))
        signs = output_signs(found.mean.tanh(), gradient.y) | gradient_sign(self.optimizer)
        return signs | {"width": float(found.spread.mean())}


class ImplicitPlayer(AttackerPlayer):
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
        encoder_lr: of Adam on the encoder.
        more: `AttackerPlayer`'s.

    Raises:
        InputError: a negative λ, or a threshold that is not a number.
    """

    module: ADTNetwork

    def __init__(
        self,
        network: ADTNetwork,
        encoder: Encoder,
        *,
        lam: float = 1.0,
        threshold: float = 0.5,
        lazy: bool = False,
        encoder_lr: float = 2e-4,
        **more: Any,
    ) -> None:
        super().__init__(network, **more)
        if math.isnan(threshold):
            raise InputError(f"threshold must be a number, not {threshold}")
        self.encoder, self.lam = encoder, _weight(lam)
        self.threshold, self.lazy = threshold, lazy
        self.encoder_optimizer = torch.optim.Adam(
            encoder.parameters(), encoder_lr, maximize=True, fused=True
        )

    @property
    def learners(self) -> list[tuple[nn.Module, Optimizer]]:
        """The networks that learn, generator and encoder, each with its optimiser."""
        return [*super().learners, (self.encoder, self.encoder_optimizer)]

    def sample(self, gradient: InputGradient, threat: Threat, rng: torch.Generator) -> Sampled:
        """δ = ε·tanh(G(𝒜, z)), with λ times the encoder's log-likelihood of z as the bonus."""
        self.encoder.train()
        information = self.module.information(gradient, threat)
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
        return Sampled(placed(value, gradient.x, threat), bonus, stats)


def _weight(lam: float) -> float:
    if not 0 <= lam < math.inf:
        raise InputError(f"lam must be 0 or above, not {lam}")
    return lam

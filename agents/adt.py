"""ADT's generators: networks that make an adversarial distribution for each image, or its samples.

    EXP-AM   (μ, ρ) = G(𝒜),      δ = ε·tanh(μ + softplus(ρ) r),  r ~ N(0, I)
    IMP-AM   δ = ε·tanh(G(𝒜, z)),                                z ~ U(-1, 1)^Z

    𝒜 = [x, g₁, g₂]: the image, its input gradient, and the one at its FGSM example

Source: Dong et al. 2020, Adversarial distributional training (ADT); 𝒜 is the published code's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from advgame.attacks import (
    Attack,
    AttackResult,
    BatchNormMode,
    InputGradient,
    at_boundary,
    attacked,
)
from advgame.attacks.distributional import worst_of
from advgame.checks import check_known_shape
from advgame.distributions import TanhNormal
from advgame.errors import InputError
from advgame.losses import Loss, cross_entropy, full_precision
from advgame.threat import Linf, Threat, per_image
from agents.adt_networks import Body, Encoder, LatentMap, make_generator
from agents.attacker_file import filled, read_file, reading, write_file
from agents.l2l import scaled

FORMAT = "advgame adt generator 1"
GRADIENTS = 2
"""Input gradients that a generator asks for, whatever the number of samples."""
Kind = Literal["exp-am", "imp-am"]
GradientScaling = Literal["image", "raw"]


class ADTNetwork(nn.Module):
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
        super().__init__()
        for name, value, known in (("kind", kind, Kind), ("scaling", scaling, GradientScaling)):
            if value not in get_args(known):
                raise InputError(f"unknown {name} {value!r}: choose {' or '.join(get_args(known))}")
        if min(latent, batch) < 1:
            raise InputError(f"latent and batch must be 1 or above, not {latent} and {batch}")
        self.shape, self.kind, self.scaling, self.batch = shape, kind, scaling, batch
        self.settings = [shape, kind, body, ngf, latent, scaling, batch]
        self.latent, self.body_name = latent, body
        implicit, colours = kind == "imp-am", shape[0]
        self.latent_map = LatentMap(latent, shape, body) if implicit else None
        inputs, outputs = 3 * colours + implicit, colours * (1 if implicit else 2)
        self.body = make_generator(body, inputs, outputs, shape, ngf)

    def information(self, x: Tensor, threat: Threat, gradient: InputGradient) -> Tensor:
        """𝒜 (B, 3C, H, W), a constant: two input gradients.

        Args:
            x: clean images, not in half precision.
            threat: an L∞ ball; its radius may be per image.
            gradient: the classifier's input gradients on these images.
        """
        first = gradient.at_clean()
        second = gradient(threat.project(x + threat.steepest(first) * per_image(threat.eps, x), x))
        if self.scaling == "raw":
            return torch.cat([x, first / self.batch, second / self.batch], 1)
        return torch.cat([x, scaled(first, "image"), scaled(second, "image")], 1)

    def distribution(self, information: Tensor) -> TanhNormal:
        """The distribution of δ/ε that exp-am makes of 𝒜."""
        made = self.body(information.to(self._dtype)).to(information.dtype)
        mean, raw = made.chunk(2, 1)
        return TanhNormal(mean, raw)

    def noise(self, information: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z (B, Z) of imp-am."""
        z = torch.rand(
            len(information), self.latent, generator=rng, device=information.device,
            dtype=information.dtype,
        )  # fmt: skip
        return 2 * z - 1

    def perturbation(self, information: Tensor, z: Tensor) -> Tensor:
        """δ/ε (B, C, H, W) that imp-am makes of 𝒜 and z (B, Z)."""
        assert self.latent_map is not None
        extra = self.latent_map(z.to(self._dtype))
        made = self.body(torch.cat([information.to(self._dtype), extra], 1))
        value: Tensor = made.to(information.dtype).tanh()
        return value

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def beside(network: ADTNetwork) -> Encoder:
    """A fresh encoder of the size that goes with an imp-am generator."""
    return Encoder(network.shape, network.latent, network.body_name)


@dataclass(frozen=True)
class ADTAttack(Attack):
    """A generator attacks whatever classifier it is given.

    ``loss`` of the result is the margin, where there was a choice.

    Args:
        network: G; in evaluation mode while it attacks.
        threat: an L∞ ball; its radius may be per image, (B,).
        draws: k: of so many samples the worst is returned; 1 needs no forward to tell.
        loss: whose gradient it sees.
        mode: batch norm of the classifier while it is attacked.

    Raises:
        InputError: a ball that is not L∞, or no sample.
    """

    network: ADTNetwork
    threat: Threat
    draws: int = 10
    loss: Loss = cross_entropy
    mode: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError(f"ADT attacks in L∞ balls, not in {self.threat.norm}")
        if self.draws < 1:
            raise InputError(f"draws must be 1 or above, not {self.draws}")

    @at_boundary
    def draw(
        self, model: nn.Module, x: Tensor, y: Tensor, count: int, rng: torch.Generator
    ) -> Iterator[Tensor]:
        """See `advgame.attacks.distributional.Sampler`."""
        return self._draw(InputGradient(model, x, y, loss=self.loss, mode=self.mode), x, count, rng)

    def _draw(
        self, gradient: InputGradient, x: Tensor, count: int, rng: torch.Generator
    ) -> Iterator[Tensor]:
        network = self.network.to(x.device)
        full = full_precision(x.detach())
        information = network.information(full, self.threat, gradient)
        with _evaluating(network):
            explicit = network.distribution(information) if network.kind == "exp-am" else None

        def one() -> Tensor:
            with _evaluating(network):
                if explicit is not None:
                    value = explicit.sample(rng).value
                else:
                    value = network.perturbation(information, network.noise(information, rng))
            return self.threat.project(full + value * per_image(self.threat.eps, full), full)

        return (one() for _ in range(count))

    def _draws(self) -> str:
        return "this attack, which draws samples,"

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_known_shape(x, self.network.shape)

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        assert rng is not None
        gradient = InputGradient(model, x, y, loss=self.loss, mode=self.mode, check=check)
        points = self._draw(gradient, x, self.draws, rng)
        calls = GRADIENTS * len(x)
        if self.draws == 1:
            return AttackResult(next(points), None, None, calls, calls)
        with attacked(model, self.mode):
            x_adv, margins = worst_of(model, points, y)
        return AttackResult(x_adv, margins, None, calls + self.draws * len(x), calls)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients, then as it was."""
    training = network.training
    try:
        with torch.no_grad():
            network.eval()
            yield
    finally:
        network.train(training)


@dataclass(frozen=True)
class ADTAttacker:
    """A trained generator, ready for any threat and budget.

    Args:
        network: G.
        about: how it came about: command, settings.
    """

    network: ADTNetwork
    about: dict[str, Any]

    def __call__(self, threat: Threat, queries: int) -> ADTAttack:
        """The attack within a threat model: what two gradients leave of the budget are samples.

        Raises:
            InputError: a budget below two forwards per image, or another norm.
        """
        if queries < GRADIENTS:
            raise InputError(
                f"this attacker makes {GRADIENTS} queries per image and one per sample: "
                f"allow as many, not {queries}"
            )
        return ADTAttack(self.network, threat, max(queries - GRADIENTS, 1))

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        metadata = {
            "format": FORMAT,
            "network": json.dumps(self.network.settings),
            "about": json.dumps(self.about),
        }
        write_file(path, self.network, metadata)


def load_adt(path: Path) -> ADTAttacker:
    """Read what `ADTAttacker.save` wrote; a run folder stands for its ``attacker.safetensors``.

    Raises:
        InputError: missing or damaged file, or one that holds something else.
    """
    metadata, weights = read_file(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no ADT generator: it says {metadata.get('format')!r}")
    with reading(path):
        (colours, height, side), *rest = json.loads(metadata["network"])
        if rest[-1:] == ["raw"]:  # as the first files ended
            raise InputError("it does not say of how many images its raw gradients were the mean")
        network = filled(lambda: ADTNetwork((colours, height, side), *rest), weights)
        about = json.loads(metadata["about"])
    return ADTAttacker(network.requires_grad_(False).eval(), about)

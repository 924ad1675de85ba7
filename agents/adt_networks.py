"""Bodies of ADT's generators, and the encoder that bounds an implicit distribution's entropy.

Source: Dong et al. 2020, Adversarial distributional training (ADT); the architectures are the
published code's. At 32x32 and ``ngf`` 256 the generator makes 10.6 billion multiplications per
image, twice those of the WRN-28-10 that it attacks; the encoder 0.03 billion.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from advgame.errors import InputError, unknown
from agents.attacker_bodies import PatchBody
from agents.settings import Body

BODIES: tuple[Body, ...] = get_args(Body)
PRIOR_NLL = (math.log(2 * math.pi / 3) + 1) / 2
"""0.8696: NLL per dimension of z ~ U(-1, 1) under N(0, 1/3), the best that can be said of z
without a look at a."""


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus a shortcut (1x1 conv-BN where channels change), then ReLU.

    Args:
        channels_in: of the input.
        channels_out: of both convolutions.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels_out), nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def begin_as_published(generator: nn.Module) -> None:
    """Weights ~ N(0, 0.02), batch norm's ~ N(1, 0.02), biases 0."""
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ResNetBody(nn.Sequential):
    """The published generator: 3x3 conv, blocks of 2·ngf, 2·ngf and ngf channels, 3x3 conv.

    Args:
        inputs: channels of the information.
        outputs: channels of what it makes.
        ngf: width.
    """

    def __init__(self, inputs: int, outputs: int, ngf: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, ngf, 3, padding=1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(),
            *(ResidualBlock(a, b) for a, b in pairwise((ngf, 2 * ngf, 2 * ngf, ngf))),
            nn.Conv2d(ngf, outputs, 3, padding=1, bias=False),
        )
        begin_as_published(self)


class SmallBody(nn.Module):
    """`agents.attacker_bodies.PatchBody` without its tanh, for small images and classifiers.

    It begins near 0, where the distribution is as wide as EXP's own start.

    Args:
        inputs: channels of the information.
        outputs: channels of what it makes.
        shape: (C, H, W) of the images.
    """

    def __init__(self, inputs: int, outputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.body = PatchBody(inputs, outputs, shape)
        last = self.body.trunk[-2]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.normal_(last.weight, 0, 0.02)
        nn.init.zeros_(last.bias)

    def forward(self, information: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, outputs, H, W)."""
        made: Tensor = self.body.unbounded(information)
        return made


def make_generator(
    name: Body, inputs: int, outputs: int, shape: tuple[int, int, int], ngf: int = 256
) -> nn.Module:
    """A generator's body by name.

    Args:
        name: ``"small"`` or ``"resnet-3blocks"``, the published one.
        inputs: channels of the information.
        outputs: channels of what it makes, without bounds.
        shape: (C, H, W) of the images.
        ngf: width of ``"resnet-3blocks"``.

    Raises:
        InputError: unknown name, a width below 1, or sides that ``small`` cannot divide.
    """
    if name not in BODIES:
        raise unknown("generator", name, BODIES)
    if ngf < 1:
        raise InputError(f"ngf must be 1 or above, not {ngf}")
    if name == "small":
        return SmallBody(inputs, outputs, shape)
    return ResNetBody(inputs, outputs, ngf)


class LatentMap(nn.Sequential):
    """z (B, Z) -> a further channel (B, 1, H, W) of the generator's information: Z-4Z-HW, ReLU.

    Args:
        latent: Z.
        shape: (C, H, W) of the images.
        body: the generator's; beside the published one it begins as published, where z moves the
            channel a seventh as much as with torch's own initial weights.
    """

    def __init__(self, latent: int, shape: tuple[int, int, int], body: Body = "small") -> None:
        _, height, side = shape
        super().__init__(
            nn.Linear(latent, 4 * latent),
            nn.ReLU(),
            nn.Linear(4 * latent, height * side),
            nn.ReLU(),
            nn.Unflatten(1, (1, height, side)),
        )
        if body != "small":
            begin_as_published(self)


class Encoder(nn.Module):
    """q(z | a) = N(mean(a), diag variance(a)), which bounds the information in a about z.

    With z ~ U(-1, 1)^Z the information I(z; a) is at least Z (log 2 - NLL), where NLL is the mean
    negative log-likelihood of z per dimension.

    Args:
        shape: (C, H, W) of a.
        latent: Z.
        body: the generator's: beside ``"small"`` stands a hidden layer of 128, beside
            ``"resnet-3blocks"`` the published convolutions, which need 20 pixels.

    Raises:
        InputError: images too small for the convolutions.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int, body: Body = "small") -> None:
        super().__init__()
        channels, height, side = shape
        self.features: nn.Module
        if body != "small" and min(height, side) < 20:
            raise InputError(
                f"the published encoder needs images of 20 pixels, not {shape[1:]}: use small"
            )
        if body == "small":
            width = 128
            pixels = channels * height * side
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.LeakyReLU())
        else:
            width, layers = 256, list[nn.Module]()
            kernels = ((32, 5, 1), (64, 4, 2), (128, 4, 1), (256, 4, 2))
            for out, kernel, stride in kernels:
                layers += [
                    nn.Conv2d(channels, out, kernel, stride=stride, bias=False),
                    nn.BatchNorm2d(out),
                    nn.LeakyReLU(),
                ]
                channels = out
            self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, 2 * latent)
        if body == "small":
            return
        nn.init.zeros_(self.head.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # variance 2 / (k² out)
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def nll(self, a: Tensor, z: Tensor) -> Tensor:
        """-log q(z | a), mean over dimensions and batch, in nats.

        Args:
            a: (B, C, H, W) perturbations in units of ε.
            z: (B, Z).
        """
        mean, raw = self(a).to(z.dtype).chunk(2, 1)
        variance = F.softplus(raw) + 1e-6
        each = ((z - mean).square() / variance + variance.log() + math.log(2 * math.pi)) / 2
        mean_nll: Tensor = each.mean()
        return mean_nll

    def forward(self, a: Tensor) -> Tensor:
        """Means and what softplus makes variances of, (B, 2Z)."""
        out: Tensor = self.head(self.features(a))
        return out

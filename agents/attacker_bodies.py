"""Bodies of L2L's attacker: information (B, I, H, W) -> perturbation in units of ε, in [-1, 1].

Source: Jiang, Chen et al., Learning to Defend by Learning to Attack (L2L), tables 1 and 7,
appendix B; where the paper and the published code differ, each has a width of its own. With six
channels of information and three of colour the parameters number

    wide       1,630,601   table 1: blocks of 128, 256 and 128
    wide-repo  1,747,851   the published code: a fourth block of 64
    slim       1,434,359   table 7, at half the resolution
    two-block    354,055   the published code's smaller form: blocks of 128 and 64
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor, nn

from advgame.errors import InputError, unknown
from advgame.losses import full_precision
from agents.settings import Width

WIDTHS: tuple[Width, ...] = get_args(Width)
_PLAIN = {"wide": (128, 256, 128), "wide-repo": (128, 256, 128, 64), "two-block": (128, 64)}


class GeneratorBlock(nn.Module):
    """BN-PReLU-conv twice, plus a shortcut: the block of Miyato et al. 2018's generator.

    The shortcut is a 1x1 convolution where the channels change, identity elsewhere. Batch norm
    has no affine part, PReLU one slope. Initialisation as published: Xavier-uniform, gain √2 for
    the 3x3 convolutions and 1 for the shortcut.

    Args:
        channels_in: of the input.
        channels_out: of both convolutions.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = (nn.BatchNorm2d(n, affine=False) for n in (channels_in, channels_out))
        self.act1, self.act2 = nn.PReLU(), nn.PReLU()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1)
            nn.init.xavier_uniform_(self.shortcut.weight)
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight, math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        out = self.conv2(self.act2(self.bn2(self.conv1(self.act1(self.bn1(x))))))
        joined: Tensor = out + self.shortcut(x)
        return joined


def bounded(raised: Tensor) -> Tensor:
    """Hyperbolic tangent in full precision: in bf16 its slope is 0 from 3.5 on."""
    return torch.tanh(full_precision(raised))


def _trunk(inputs: int, stem: int, blocks: Sequence[int], stride: int = 1) -> nn.Sequential:
    """3x3 conv, BN, ReLU, the blocks, and a last BN without affine part."""
    widths = (stem, *blocks)
    return nn.Sequential(
        nn.Conv2d(inputs, stem, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(stem, eps=1e-3),
        nn.ReLU(),
        *(GeneratorBlock(a, b) for a, b in pairwise(widths)),
        nn.BatchNorm2d(widths[-1], affine=False),
    )


class PlainBody(nn.Module):
    """The trunk at full resolution and a 3x3 convolution.

    Args:
        inputs: channels of the information I.
        colours: channels of the images C.
        blocks: channels of the blocks.
    """

    def __init__(self, inputs: int, colours: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.trunk = _trunk(inputs, 64, blocks)
        self.last = nn.Conv2d(blocks[-1], colours, 3, padding=1)

    def forward(self, information: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H, W) in [-1, 1]."""
        return bounded(self.last(self.trunk(information)))


class SlimBody(nn.Module):
    """The trunk at half the resolution, a transposed convolution, and the information again.

    The last convolution sees what the trunk made of the information beside the information
    itself; a learned factor before tanh lets it reach the face of the ball.

    Table 7 prints stride 1 for the first convolution, which would double the size of the image:
    its text says that this layer downsamples. The factor is the published code's.

    Args:
        inputs: channels of the information I.
        colours: channels of the images C.
    """

    def __init__(self, inputs: int, colours: int) -> None:
        super().__init__()
        self.trunk = _trunk(inputs, 128, (256, 128), stride=2)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(128, 16, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(16 + inputs, colours, 3, padding=1, bias=False)
        self.factor = nn.Parameter(torch.tensor(5.0))

    def forward(self, information: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H, W) in [-1, 1]."""
        height, side = information.shape[2:]
        raised = self.up(self.trunk(information))[:, :, :height, :side]  # odd sizes come out larger
        together = torch.cat([raised, information], 1)
        return bounded(self.factor * self.last(together))


class PatchBody(nn.Module):
    """For small images and small classifiers: all convolutions work on patches of pixels.

    A patch of 4x4 pixels (of 2x2 where images are below 16) becomes as many channels, so that
    nothing but one mix of the information itself is computed at full resolution, where a narrow
    network spends its time: a forward costs less than one of `advgame.classifiers.SmallCNN`. Not
    from the paper: its widths cost many times what a small classifier does.

    Args:
        inputs: channels of the information I.
        colours: channels of the images C, or of what is made.
        shape: (C, H, W) of the images.

    Raises:
        InputError: images whose sides a patch does not divide.
    """

    def __init__(self, inputs: int, colours: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        patch, width = (4, 12) if min(shape[1:]) >= 16 else (2, 24)
        if shape[1] % patch or shape[2] % patch:
            raise InputError(
                f"small needs sides that {patch} divides, not {shape[1:]}: choose a larger network"
            )
        self.trunk = nn.Sequential(
            nn.Conv2d(inputs, width, patch, stride=patch, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            GeneratorBlock(width, width),
            nn.BatchNorm2d(width, affine=False),
            nn.Conv2d(width, colours * patch**2, 1),
            nn.PixelShuffle(patch),
        )
        # from 0: a random sign in front of the gradient decides a hundred steps by luck (MNIST)
        self.mix = nn.Parameter(torch.zeros(colours, inputs))
        self.factor = nn.Parameter(torch.tensor(5.0))

    def unbounded(self, information: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H, W), what tanh is applied to."""
        made = self.trunk(information)
        # a 1x1 convolution, faster for so few channels; bmm, since matmul goes another way, to
        # other bits, where a loaded network's weights need no gradient
        weights = self.mix.expand(len(information), -1, -1)
        mixed = torch.bmm(weights, information.flatten(2)).view_as(made)
        raised: Tensor = self.factor * (made + mixed)
        return raised

    def forward(self, information: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H, W) in [-1, 1]."""
        return bounded(self.unbounded(information))


def make_body(width: Width, inputs: int, shape: tuple[int, int, int]) -> nn.Module:
    """An attacker's body by name.

    Args:
        width: one of `WIDTHS`.
        inputs: channels of the information.
        shape: (C, H, W) of the images.

    Raises:
        InputError: unknown width, or images whose sides ``small`` cannot divide.
    """
    if width == "small":
        return PatchBody(inputs, shape[0], shape)
    if width == "slim":
        return SlimBody(inputs, shape[0])
    if width not in _PLAIN:
        raise unknown("width", width, WIDTHS)
    return PlainBody(inputs, shape[0], _PLAIN[width])

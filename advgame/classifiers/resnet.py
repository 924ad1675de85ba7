"""Residual networks for 32x32 images: ResNet-18, PreActResNet-18 and Wide ResNets.

Stems are 3x3 with stride 1 and no pooling. Normalisation is the first layer, identity unless
mean and std are given. Sources: He et al. 2016a, 2016b; Zagoruyko & Komodakis 2016.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from advgame.errors import InputError


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU (He et al. 2016a)."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))
    """convolutions with the batch norm that alone sees their outputs, `advgame.attacks.folding`"""
    expansion = 1
    """output channels per channel of its 3x3 convolutions"""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        joined: Tensor = out + self.shortcut(x)
        return F.relu(joined, inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, each with BN, plus shortcut (He et al. 2016a)."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("shortcut.0", "shortcut.1"))
    expansion = 4

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        outside = self.expansion * channels_out
        self.conv1 = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv3 = nn.Conv2d(channels_out, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, outside, 1, stride=stride, bias=False),
                nn.BatchNorm2d(outside),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, 4 out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        joined: Tensor = self.bn3(self.conv3(out)) + self.shortcut(x)
        return F.relu(joined, inplace=True)


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice plus shortcut (He et al. 2016b; Wide ResNets use the same)."""

    folds = (("conv1", "bn2"),)
    expansion = 1
    raw_shortcut = False
    """whether a convolution in the shortcut sees what the block is given, before BN-ReLU"""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H/stride, W/stride)."""
        active = F.relu(self.bn1(x), inplace=True)
        given = x if self.raw_shortcut else active
        shortcut = x if self.shortcut is None else self.shortcut(given)
        out = self.conv1(active)
        joined: Tensor = self.conv2(F.relu(self.bn2(out), inplace=True)) + shortcut
        return joined


class RawShortcutBlock(PreActBlock):
    """A `PreActBlock` as Wong et al. 2020 publish it."""

    folds = PreActBlock.folds
    raw_shortcut = True


class SwishBlock(PreActBlock):
    """A `PreActBlock` as DeepMind publishes it: Swish, and strides that pad right and below."""

    folds = PreActBlock.folds

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, stride)
        if stride == 2:
            self.conv1.padding = (0, 0)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H/stride, W/stride)."""
        active = F.silu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(F.pad(active, (0, 1, 0, 1)) if self.stride == 2 else active)
        joined: Tensor = self.conv2(F.silu(self.bn2(out))) + shortcut
        return joined


class ResidualNet(nn.Module):
    """A stem, stages of residual blocks (the first of each later stage has stride 2), a head.

    Args:
        block: `BasicBlock`, `Bottleneck`, `PreActBlock` or a kind of that.
        stem: channels of the stem.
        stages: (channels, number of blocks) of each stage.
        classes: number of classes K.
        channels: colour channels of the images.
        normalise: first layer; identity when None.
        last_norm: with pre-activation: whether batch norm and ReLU come before the head.
        strides: of the stem, and of the first block of each stage; the usual ones when None.
    """

    folds = (("stem", "bn_stem"),)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
        stem: int,
        stages: tuple[tuple[int, int], ...],
        classes: int,
        channels: int = 3,
        normalise: nn.Module | None = None,
        *,
        last_norm: bool = True,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        first, *downs = strides or (1, 1, *[2] * (len(stages) - 1))
        self.normalise = normalise or nn.Identity()
        self.stem = _conv3x3(channels, stem, first)
        preactivation = issubclass(block, PreActBlock)
        self.swish = block is SwishBlock
        self.bn_stem = nn.Identity() if preactivation else nn.BatchNorm2d(stem)
        blocks: list[nn.Module] = []
        width = stem
        for (out, count), down in zip(stages, downs, strict=True):
            for number in range(count):
                blocks.append(block(width, out, down if number == 0 else 1))
                width = out * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.bn_last = nn.BatchNorm2d(width) if preactivation and last_norm else nn.Identity()
        self.head = nn.Linear(width, classes)
        self.width = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width), the pooled last stage."""
        out = self.bn_stem(self.stem(self.normalise(x)))
        if not isinstance(self.bn_stem, nn.Identity):
            out = F.relu(out, inplace=True)
        out = self.bn_last(self.blocks(out))
        if not isinstance(self.bn_last, nn.Identity):
            out = F.silu(out) if self.swish else F.relu(out, inplace=True)
        pooled: Tensor = out.mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.head(self.embed(x))
        return logits


Published = Literal["usual", "las", "fast"]
_DEEP_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_FOUR_STAGES = ((64, 2), (128, 2), (256, 2), (512, 2))


def resnet18(
    classes: int = 10, channels: int = 3, normalise: nn.Module | None = None
) -> ResidualNet:
    """ResNet-18 with a CIFAR stem: 11.17 M parameters."""
    return ResidualNet(BasicBlock, 64, _FOUR_STAGES, classes, channels, normalise)


def resnet34(
    classes: int = 10, channels: int = 3, normalise: nn.Module | None = None
) -> ResidualNet:
    """ResNet-34 with a CIFAR stem: 21.28 M parameters."""
    return ResidualNet(BasicBlock, 64, _DEEP_STAGES, classes, channels, normalise)


def resnet50(
    classes: int = 10, channels: int = 3, normalise: nn.Module | None = None
) -> ResidualNet:
    """ResNet-50 with a CIFAR stem, as Madry-lab publishes it: 23.52 M parameters."""
    return ResidualNet(Bottleneck, 64, _DEEP_STAGES, classes, channels, normalise)


def preact_resnet18(
    classes: int = 10,
    channels: int = 3,
    normalise: nn.Module | None = None,
    published: Published = "usual",
) -> ResidualNet:
    """PreActResNet-18 (He et al. 2016) for 32x32 images: 11.17 M parameters.

    Args:
        classes: number of classes K.
        channels: colour channels of the images.
        normalise: first layer; identity when None.
        published: "las" and "fast" have no batch norm before the head, as the codes of LAS-AT and
            of Fast AT; in "fast" shortcuts begin before a block's first batch norm, too.
    """
    block, usual = RawShortcutBlock if published == "fast" else PreActBlock, published == "usual"
    return ResidualNet(block, 64, _FOUR_STAGES, classes, channels, normalise, last_norm=usual)


def lean_resnet(
    classes: int = 10, channels: int = 3, normalise: nn.Module | None = None, width: int = 32
) -> ResidualNet:
    """A network for 32x32 images on a CPU: 1.23 M parameters, 49 M multiplications per image.

    One block per stage and a stem of stride 2, so that only the stem sees the images at full size.

    Args:
        classes: number of classes K.
        channels: colour channels of the images.
        normalise: first layer; identity when None.
        width: channels of stem and first stage. 16 is ``lean_resnet-half``, 0.31 M parameters and
            12.3 M multiplications.
    """
    stages = tuple((width * factor, 1) for factor in (1, 2, 4, 8))
    return ResidualNet(
        PreActBlock, width, stages, classes, channels, normalise, strides=(2, 1, 1, 2, 2)
    )


def wide_resnet(
    depth: int,
    widen: int,
    classes: int = 10,
    channels: int = 3,
    normalise: nn.Module | None = None,
    *,
    swish: bool = False,
) -> ResidualNet:
    """WRN-depth-widen: 28-10 has 36.48 M parameters, 34-10 has 46.16 M.

    TRADES-style code registers an extra unused block (48.26 M for 34-10); this one does not.

    Args:
        depth: 6n + 4, with n blocks in each of the three stages.
        widen: factor of the channels 16, 32, 64.
        classes: number of classes K.
        channels: colour channels of the images.
        normalise: first layer; identity when None.
        swish: `SwishBlock`, DeepMind's form.

    Raises:
        InputError: depth that is not 6n + 4, or a widening factor below 1.
    """
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        raise InputError(f"a wide ResNet has depth 6n + 4 and widening >= 1, not {depth}-{widen}")
    count = (depth - 4) // 6
    stages = tuple((base * widen, count) for base in (16, 32, 64))
    block = SwishBlock if swish else PreActBlock
    return ResidualNet(block, 16, stages, classes, channels, normalise)

"""Networks with the attribute names of published code, written here from its key lists alone."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inside, outside, size, stride=1, padding=None):
    padding = size // 2 if padding is None else padding
    return nn.Conv2d(inside, outside, size, stride=stride, padding=padding, bias=False)


def stages(block, widths, count, first):
    """Rows of blocks; each stage but the first halves the image."""
    rows, width = [], first
    counts = count if isinstance(count, tuple) else (count,) * len(widths)
    for number, out in enumerate(widths):
        row = []
        for place in range(counts[number]):
            row.append(block(width, out, 2 if number and not place else 1))
            width = out
        rows.append(nn.Sequential(*row))
    return rows


class WideBlock(nn.Module):
    """TRADES' block: bn1, conv1, bn2, conv2, convShortcut where the widths differ."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1, self.conv2 = conv(inside, outside, 3, stride), conv(outside, outside, 3)
        self.convShortcut = None if inside == outside else conv(inside, outside, 1, stride)

    def forward(self, x):
        active = self.bn1(x).relu()
        kept = x if self.convShortcut is None else self.convShortcut(active)
        return kept + self.conv2(self.bn2(self.conv1(active)).relu())


class Row(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.layer = row

    def forward(self, x):
        return self.layer(x)


class Wide(nn.Module):
    """TRADES, MART, AWP, LAS-AT, RobustBench: conv1, block1..3, bn1, fc, maybe sub_block1."""

    def __init__(self, depth, widen, classes=10, spare=True, mean=None):
        super().__init__()
        widths, count = [16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1, self.block2, self.block3 = map(Row, stages(WideBlock, widths, count, 16))
        if spare:
            self.sub_block1 = Row(stages(WideBlock, widths[:1], count, 16)[0])
        self.bn1, self.fc = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)
        if mean is not None:
            self.register_buffer("mu", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("sigma", torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1))

    def forward(self, x):
        x = (x - self.mu) / self.sigma if hasattr(self, "mu") else x
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(out).relu().mean((2, 3)))


class PostBlock(nn.Module):
    """The robustness package's and MART's block: conv1, bn1, conv2, bn2, shortcut.0 and .1."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inside, outside, 3, stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = conv(outside, outside, 3), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


class DeepBlock(nn.Module):
    """The robustness package's block of ResNet-50: conv1, bn1 to conv3, bn3, shortcut.0 and .1."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        narrow = outside // 4
        self.conv1, self.bn1 = conv(inside, narrow, 1), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = conv(narrow, narrow, 3, stride), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = conv(narrow, outside, 1), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(out)) + self.shortcut(x)).relu()


class PreBlock(nn.Module):
    """bn1, conv1, bn2, conv2, shortcut.0; `raw` as Fast AT's, else as LAS-AT's and AWP's."""

    raw = False

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), conv(inside, outside, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), conv(outside, outside, 3)
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(conv(inside, outside, 1, stride))

    def forward(self, x):
        active = self.bn1(x).relu()
        kept = self.shortcut(x if self.raw else active) if hasattr(self, "shortcut") else x
        return kept + self.conv2(self.bn2(self.conv1(active)).relu())


class RawPreBlock(PreBlock):
    raw = True


class Residual(nn.Module):
    """ResNets and PreActResNet-18: conv1, layer1..4, linear; bn1 (post) or bn (pre) or neither.

    Args:
        block: of its stages.
        norm: name of the batch norm beside the blocks, if any.
        classes: outputs.
        count: blocks per stage.
        expansion: 4 with `DeepBlock`.
    """

    def __init__(self, block, norm, classes=10, count=2, expansion=1):
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        widths = [expansion * width for width in (64, 128, 256, 512)]
        rows = stages(block, widths, count, 64)
        self.layer1, self.layer2, self.layer3, self.layer4 = rows
        if norm:
            setattr(self, norm, nn.BatchNorm2d(64 if norm == "bn1" else 512))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x):
        out = self.conv1(x)
        if hasattr(self, "bn1"):
            out = self.bn1(out).relu()
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if hasattr(self, "bn"):
            out = self.bn(out).relu()
        return self.linear(out.mean((2, 3)))


class MindBlock(nn.Module):
    """DeepMind's block: batchnorm_0, conv_0, batchnorm_1, conv_1, shortcut; Swish."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv_0 = conv(inside, outside, 3, stride, padding=0)
        self.conv_1 = conv(outside, outside, 3)
        self.shortcut = None if inside == outside else conv(inside, outside, 1, stride)
        self.pad = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x):
        active = F.silu(self.batchnorm_0(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        out = self.conv_0(F.pad(active, self.pad))
        return kept + self.conv_1(F.silu(self.batchnorm_1(out)))


class MindRow(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.block = row

    def forward(self, x):
        return self.block(x)


class Mind(nn.Module):
    """DeepMind's Wide ResNet: mean, std, init_conv, layer.0..2.block, batchnorm, logits."""

    def __init__(self, depth, widen, classes=10):
        super().__init__()
        widths, count = [16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
        self.init_conv = conv(3, 16, 3)
        self.layer = nn.Sequential(*map(MindRow, stages(MindBlock, widths, count, 16)))
        self.batchnorm, self.logits = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        out = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.silu(self.batchnorm(out)).mean((2, 3)))


class Normalizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("new_mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("new_std", torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))

    def forward(self, x):
        return (x - self.new_mean) / self.new_std


class Attacking(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = Normalizer(), model


class RobustnessPackage(nn.Module):
    """normalizer, model, and the same network again in attacker.model."""

    def __init__(self, model):
        super().__init__()
        self.normalizer, self.model = Normalizer(), model
        self.attacker = Attacking(model)

    def forward(self, x):
        return self.model(self.normalizer(x))


def stirred(module, seed=0):
    """With weights and running statistics that no initialisation has: each of them matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(0.5 + torch.rand(part.weight.shape, generator=rng))
                part.bias.copy_(torch.randn(part.bias.shape, generator=rng) / 5)
                part.running_mean.copy_(torch.randn(part.bias.shape, generator=rng) / 5)
                part.running_var.copy_(0.5 + torch.rand(part.bias.shape, generator=rng))
    return module.eval()

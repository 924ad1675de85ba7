"""How published code names the parts of residual networks, and their names here.

Wide ResNets of TRADES, MART, AWP, LAS-AT and RobustBench (``block1.layer.0.conv1``), ResNets and
PreActResNets of the same and of Madry-lab's robustness package (``layer1.0.conv1``), and those of
DeepMind (``layer.0.block.0.conv_0``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Literal

Layout = Literal["wide", "residual", "deepmind"]

_BLOCKS: dict[Layout, re.Pattern[str]] = {
    "wide": re.compile(r"block(\d)\.layer\.(\d+)\.(.+)"),
    "residual": re.compile(r"layer(\d)\.(\d+)\.(.+)"),
    "deepmind": re.compile(r"layer\.(\d)\.block\.(\d+)\.(.+)"),
}
# within a block
_PARTS = {
    "convShortcut.": "shortcut.",
    "batchnorm_0.": "bn1.",
    "batchnorm_1.": "bn2.",
    "conv_0.": "conv1.",
    "conv_1.": "conv2.",
    "downsample.": "shortcut.",
}
# in front of the blocks and behind them
_ENDS = {
    "conv1.": "stem.",
    "init_conv.": "stem.",
    "bn.": "bn_last.",
    "batchnorm.": "bn_last.",
    "fc.": "head.",
    "linear.": "head.",
    "logits.": "head.",
}
# a normalisation that the file brings along
NORMALISATION = {
    **dict.fromkeys(
        ("mu", "mean", "new_mean", "normalize.mean", "normalizer.new_mean"), "normalise.mean"
    ),
    **dict.fromkeys(
        ("sigma", "std", "new_std", "normalize.std", "normalizer.new_std"), "normalise.std"
    ),
}
# wrappers around a network, whose names stand in front of its own
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
# what a file may hold besides: TRADES' second first block, which no image passes; the robustness
# package's second name of the network; the number of averaged weights; counts of operations
SPARE = re.compile(r"(.*\.)?(sub_block1\..+|attacker\..+|n_averaged|total_ops|total_params)")


def layout_of(names: Iterable[str]) -> Layout | None:
    """Whose names these are; none that is known where there are no blocks among them."""
    for name in names:
        for layout, pattern in _BLOCKS.items():
            if pattern.fullmatch(name):
                return layout
    return None


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names -> the same without the wrappers in front."""
    found = {}
    for name in names:
        bare = name
        while wrapper := next((one for one in WRAPPERS if bare.startswith(one)), None):
            bare = bare.removeprefix(wrapper)
        found[name] = bare
    # nn.Sequential(normalisation, network): numbers in front, the first with a mean and deviation
    parts = {name: bare.partition(".") for name, bare in found.items()}
    whole = {front for front, _, rest in parts.values() if rest not in NORMALISATION}
    if len(whole) == 1 and all(front.isdigit() and rest for front, _, rest in parts.values()):
        found = {name: rest for name, (_, _, rest) in parts.items()}
    return found


def ours(names: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Published names -> those of an `advgame.classifiers.ResidualNet`; others stay.

    Args:
        names: without wrappers.
        wanted: the network's own.
    """
    layout = layout_of(names)
    if layout is None:
        return {name: NORMALISATION.get(name, name) for name in names}
    pattern = _BLOCKS[layout]
    counts: dict[int, int] = defaultdict(int)
    for name in names:
        if block := pattern.fullmatch(name):
            stage = int(block[1])
            counts[stage] = max(counts[stage], int(block[2]) + 1)
    starts = {stage: sum(counts[one] for one in counts if one < stage) for stage in counts}
    stem_norm = any(name.startswith("bn_stem.") for name in wanted)
    ends = {**_ENDS, "bn1.": "bn_stem." if stem_norm else "bn_last."}
    found = {}
    for name in names:
        if block := pattern.fullmatch(name):
            part = _replaced(block[3], _PARTS)
            if not stem_norm:  # with pre-activation a convolution alone
                part = part.replace("shortcut.0.", "shortcut.")
            found[name] = f"blocks.{starts[int(block[1])] + int(block[2])}.{part}"
        else:
            found[name] = NORMALISATION.get(name) or _replaced(name, ends)
    return found


def _replaced(name: str, table: dict[str, str]) -> str:
    """With the table's beginning in place of the published one."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def guess(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Which network of ours a state dict looks like, by names and shapes; None where none.

    Args:
        shapes: names without wrappers -> shapes.
    """
    layout = layout_of(shapes)
    if layout is None:
        return None
    blocks = {
        (int(block[1]), int(block[2]))
        for name in shapes
        if (block := _BLOCKS[layout].fullmatch(name))
    }
    if layout == "residual":
        deep = any(".conv3." in name for name in shapes)
        if any(name.startswith("bn1.") for name in shapes):
            known = {(8, False): "resnet18", (16, False): "resnet34", (16, True): "resnet50"}
            return known.get((len(blocks), deep))
        if len(blocks) != 8 or deep:
            return None
        if any(name.startswith("bn.") for name in shapes):
            return "preact_resnet18"
        return "preact_resnet18-las or preact_resnet18-fast"
    stages = {stage for stage, _ in blocks}
    head = shapes.get("fc.weight" if layout == "wide" else "logits.weight", ())
    if len(stages) != 3 or len(blocks) % 3 or len(head) != 2 or head[1] % 64:
        return None
    return f"wrn-{2 * len(blocks) + 4}-{head[1] // 64}" + ("-swish" * (layout == "deepmind"))

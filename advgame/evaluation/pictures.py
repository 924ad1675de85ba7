"""Pictures of sweeps, of loss landscapes, and of adversarial examples side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from advgame.look import COLOURS, WIDTH, style
from advgame.threat import Threat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sweep = Mapping[float, float]
"""What is varied -> accuracy."""


@style()
def sweeps_figure(
    sweeps: Mapping[str, Mapping[str, Sequence[Sweep]]], baseline: str | None, title: str
) -> Figure:
    """Accuracy against what is varied, above; the difference to a baseline, below.

    Args:
        sweeps: name of what is varied -> classifier -> a sweep per seed.
        baseline: the classifier whose mean is taken off below; None for no second row.
        title: of the figure.

    Source: L2L, Fig. 4.
    """
    rows = 1 if baseline is None else 2
    figure, axes = plt.subplots(rows, len(sweeps), figsize=(WIDTH, 2.3 * rows), squeeze=False)
    for column, (varied, classifiers) in enumerate(sweeps.items()):
        for number, (name, seeds) in enumerate(classifiers.items()):
            points = list(seeds[0])
            values = 100 * np.array([[one[p] for p in points] for one in seeds])
            shifts = [np.zeros(len(points))]
            if baseline is not None:
                base = classifiers[baseline]
                shifts.append(100 * np.mean([[one[p] for p in points] for one in base], 0))
            for axis, shift in zip(axes[:, column], shifts, strict=True):
                shown, colour = values - shift, COLOURS[number % len(COLOURS)]
                axis.plot(points, shown.mean(0), "o-", ms=3, color=colour, label=name)
                axis.fill_between(points, shown.min(0), shown.max(0), color=colour, alpha=0.12)
                axis.set(xlabel=varied, xscale="log" if points[-1] > 20 * points[0] else "linear")
        axes[0][column].set(ylabel="accuracy, %", ylim=(0, 102))
        if baseline is not None:
            axes[1][column].set(ylabel=f"difference to {baseline}, points")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    figure.suptitle(title)
    return figure


@style()
def landscapes_figure(
    planes: Mapping[str, Tensor], reach: float, title: str, norm: str = "Linf"
) -> Figure:
    """Loss on the plane of gradient and random direction, a panel per classifier.

    Args:
        planes: classifier -> (points, points), see `advgame.evaluation.sweeps.landscape`.
        reach: of both axes, in units of ε.
        title: of the figure.
        norm: of the ball, whose face is dashed.
    """
    figure, axes = plt.subplots(
        1, len(planes), figsize=(WIDTH, 0.8 + WIDTH / max(len(planes), 2)), squeeze=False
    )
    arrays = {name: plane.cpu().numpy() for name, plane in planes.items()}
    highest = max(float(array.max()) for array in arrays.values())
    # L∞: where the two directions add up to ε in one pixel. L2: a circle, as far as the two
    # directions are at right angles, which a random one nearly is
    turn = np.linspace(0, 2 * np.pi, 100 if norm == "L2" else 5)
    face = (np.cos(turn), np.sin(turn))
    for axis, (name, array) in zip(axes[0], arrays.items(), strict=True):
        edge = reach + reach / (len(array) - 1)  # of the outermost pixels
        drawn = axis.imshow(
            array, origin="lower", extent=(-edge, edge, -edge, edge), cmap="magma", vmin=0,
            vmax=highest,
        )  # fmt: skip
        axis.plot(*face, color="white", lw=1, ls="--")
        axis.set(title=name, xlabel="random direction, ε", ylabel="gradient, ε")
        axis.grid(visible=False)
        axis.label_outer()
    figure.colorbar(drawn, ax=axes[0], shrink=0.8, label="cross-entropy, nats")
    figure.suptitle(title)
    return figure


@style()
def examples_figure(
    x: Tensor,
    made: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
    threat: Threat,
    title: str,
) -> Figure:
    """Adversarial examples of several attacks: a row per attack, two columns per image.

    Args:
        x: (n, C, H, W) clean images in [0, 1].
        made: attack -> adversarial examples of the same shape.
        captions: ``"clean"`` and each attack -> a word per image.
        threat: perturbations are grey where nothing changed, black and white at ±ε for L∞,
            at the largest change elsewhere.
        title: of the figure.

    Source: L2L, Fig. 5.
    """
    count, rows = len(x), {"clean": x, **made}
    figure, axes = plt.subplots(
        len(rows), 2 * count, figsize=(WIDTH, (0.2 + WIDTH / (2 * count)) * len(rows) + 0.3),
        squeeze=False,
    )  # fmt: skip
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        delta = images - x
        reach = (
            float(threat.eps) if threat.norm == "Linf" else float(delta.abs().max().clamp(1e-12))
        )
        shades = (delta / (2 * reach) + 0.5).clamp(0, 1)
        for k in range(count):
            for axis, image in ((line[2 * k], images[k]), (line[2 * k + 1], shades[k])):
                array = image.detach().float().cpu().permute(1, 2, 0).numpy()
                axis.imshow(np.squeeze(array), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            line[2 * k].set_title(captions[name][k])
            if name == "clean":
                line[2 * k + 1].set_visible(False)
        line[0].set_ylabel(textwrap.fill(name.replace(":", ": "), 12))
    figure.suptitle(title)
    return figure


@style()
def differences_figure(contrasts: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Differences of two methods with their intervals, a line each, in points.

    Args:
        contrasts: ``name``, ``mean``, ``low`` and ``high`` each, and whether it is ``primary``.
        title: of the figure.
    """
    lines = list(contrasts)[::-1]  # the first on top
    figure, axis = plt.subplots(figsize=(WIDTH, 1.1 + 0.2 * len(lines)))
    for place, one in enumerate(lines):
        mean, low, high = (100 * one[key] for key in ("mean", "low", "high"))
        colour = COLOURS[3 if one["primary"] else 0]
        axis.errorbar(
            mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color=colour
        )
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(lines)), [one["name"] for one in lines])
    axis.set(xlabel="difference of robust accuracy, points; primary ones in orange-red")
    axis.set_ylim(-0.5, len(lines) - 0.5)
    axis.grid(visible=False, axis="y")
    axis.set_title(title)
    return figure


@style()
def comparison_figure(
    summary: Mapping[str, Mapping[str, Any]], also: Sequence[str], title: str
) -> Figure:
    """Bars of the worst case, the best on top, with other accuracies as marks; in %.

    Args:
        summary: method -> number -> ``mean`` and ``sd`` over seeds (None of one seed).
        also: further numbers, e.g. ``accuracy_clean``; those that a method lacks are left out.
        title: of the figure.
    """
    worst = {name: numbers["worst_case"] for name, numbers in summary.items()}
    names = sorted(worst, key=lambda name: worst[name]["mean"])
    several = [name for name in names if worst[name]["sd"] is not None]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.1 + 0.2 * len(names)))
    axis.barh(
        names, [100 * worst[name]["mean"] for name in names], color=COLOURS[0], alpha=0.7,
        label="worst case, ± sd over seeds" if several else "worst case, one seed",
    )  # fmt: skip
    middles, spreads = ([100 * worst[name][key] for name in several] for key in ("mean", "sd"))
    axis.errorbar(middles, several, xerr=spreads, fmt="none", ecolor="black", capsize=2)
    for number, column in enumerate(also):
        found = [name for name in names if column in summary[name]]
        if not found:
            continue
        values = [100 * summary[name][column]["mean"] for name in found]
        axis.plot(
            values, found, "o|sx"[number], color=COLOURS[3 - number], label=column.split("_", 1)[1]
        )
    axis.set(xlabel="accuracy, %", xlim=(0, 102))
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=1 + len(also))
    axis.set_title(title)
    return figure

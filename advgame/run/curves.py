"""Curves of a game: TensorBoard while it runs, PNG when it ends, and strips of images."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from torch import Tensor
from torch.utils.tensorboard import summary

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from advgame.look import COLOURS, LINES, WIDTH, style
from advgame.run.events import EventFile
from advgame.run.files import write_atomically
from advgame.threat import Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Rows = Sequence[Mapping[str, float]]

Panels = dict[str, tuple[str, dict[str, str]]]
"""Panel title -> (unit of the y axis, columns of metrics.csv with their legends)."""

STEP = "step/"
"""Before the tags of single steps; the same tags without it are means over epochs."""


class Curves:
    """TensorBoard events of a run, in one file.

    Args:
        folder: the run folder.
        purge_step: of a run that goes on: events from this step on are discarded.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.events = EventFile(folder, purge_step)

    def settings(self, about: Mapping[str, Any], scores: Sequence[str]) -> None:
        """Show a run's settings as text, and in the table of all runs (HPARAMS).

        Args:
            about: its ``config.json``; what is no setting of a run from Python is left out.
            scores: tags by which the table compares runs.
        """
        config = {name: about["config"][name] for name in sorted(about["config"])}
        lines = [f"| `{name}` | {_cell(value)} |" for name, value in config.items()]
        facts = ("command", "commit", "device")
        lines += [f"| {name} | {_cell(about[name])} |" for name in facts if name in about]
        self.events.add(
            summary.text("config", "\n".join(["| setting | value |", "|---|---|", *lines])), 0
        )
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.items()
        }
        experiment, start, _ = summary.hparams(plain, dict.fromkeys(scores, 0.0))
        self.events.add(experiment, 0)
        self.events.add(start, 0)
        self.events.flush()

    def layout(self, panels: Panels, tags: Collection[str], step: int) -> None:
        """What the tab CUSTOM SCALARS shows: the game's panels, then the game step by step.

        Args:
            panels: those of curves.png; without any, each tag of the game has a chart.
            tags: those that the run logs; of others nothing is shown.
            step: of the run; TensorBoard takes the last layout.
        """
        charts = {
            f"{title}, {unit}": [tag for tag in columns if tag in tags]
            for title, (unit, columns) in panels.items()
        }
        alone = sorted(tag for tag in tags if tag.startswith(("game/", "eval/")))
        by_step = sorted(tag for tag in tags if tag.startswith(f"{STEP}game/"))
        self._lay_out(
            {
                "The game": charts or {tag: [tag] for tag in alone},
                "The game, step by step": {tag.removeprefix(STEP): [tag] for tag in by_step},
            },
            step,
        )

    def _lay_out(self, categories: Mapping[str, Mapping[str, Sequence[str]]], step: int) -> None:
        shown = {
            name: {
                title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]  # they are patterns
                for title, tags in charts.items()
                if tags
            }
            for name, charts in categories.items()
        }
        self.events.add(summary.custom_scalars({k: v for k, v in shown.items() if v}), step)

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """Log a row; flushed at once, so that curves are live and a kill loses nothing."""
        for tag, value in row.items():
            self.events.add(summary.scalar(tag, value), step)
        self.events.flush()

    def steps(self, points: Sequence[tuple[int, Mapping[str, Tensor]]]) -> None:
        """Log single steps under ``step/<tag>``; the host waits for the device once.

        Args:
            points: numbers of steps, and what the game logged of each.
        """
        named = [(step, tag, value) for step, stats in points for tag, value in stats.items()]
        if not named:
            return
        # players may count on the CPU: their numbers go to the device, whose own come back once
        devices = {value.device for *_, value in named}
        device = next((one for one in devices if one.type != "cpu"), torch.device("cpu"))
        values = torch.stack([value.detach().float().to(device) for *_, value in named])
        for (step, tag, _), value in zip(named, values.tolist(), strict=True):
            self.events.add(summary.scalar(STEP + tag, value), step)

    def histogram(self, tag: str, values: Tensor, step: int, options: Tensor) -> None:
        """Log how often each of several options was chosen, in a bin of its own.

        TensorBoard's own bins grow exponentially: of equally frequent choices some would look
        twice as frequent as others.

        Args:
            tag: of the curve.
            values: (n,), each one of the options.
            step: of the run.
            options: (k,), different numbers.
        """
        known = options.double().sort().values
        middle = (known[1:] + known[:-1]) / 2
        reach = (known[1] - known[0]) / 2 if len(known) > 1 else torch.tensor(0.5)
        edges = torch.cat([known[:1] - reach, middle, known[-1:] + reach])
        drawn = summary.histogram(tag, values.double().cpu().numpy(), edges.numpy())
        self.events.add(drawn, step)

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Show an image (C, H, W) in [0, 1], C = 1 or 3."""
        self.events.add(summary.image(tag, image.cpu(), dataformats="CHW"), step)
        self.events.flush()

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a matplotlib figure in TensorBoard under ``tag``."""
        canvas = FigureCanvasAgg(figure)
        with style():
            canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.events.add(summary.image(tag, pixels, dataformats="HWC"), step)
        self.events.flush()

    def close(self) -> None:
        """Flush and close the events file."""
        self.events.close()


def _cell(value: object) -> str:
    """A setting as the cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


@style()
def panels_figure(count: int, title: str, *, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """An empty figure as wide as a column, two panels a row; one alone takes the whole width.

    Where the last row has room beside it, the figure's last axes are there, without a frame.

    Args:
        count: of panels.
        title: of the figure.
        height: of a row, in inches.
    """
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False)
    figure.suptitle(title)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:count])


@style()
def game_figure(
    rows: Rows, title: str, panels: Panels, *, x: tuple[str, str] = ("epoch", "epoch")
) -> Figure:
    """Panels of curves over time, two a row; empty ones are left out.

    Args:
        rows: of metrics.csv.
        title: of the figure.
        panels: what to draw.
        x: column of the horizontal axis, and its name.
    """
    found = {
        name: (unit, {c: label for c, label in columns.items() if any(c in row for row in rows)})
        for name, (unit, columns) in panels.items()
    }
    shown = {name: panel for name, panel in found.items() if panel[1]}
    folded = {
        name: [textwrap.fill(label, _LEGEND) for label in columns.values()]
        for name, (_, columns) in shown.items()
    }
    most = max((sum(1 + one.count("\n") for one in panel) for panel in folded.values()), default=0)
    figure, axes = panels_figure(len(shown), title, height=2.2 + 0.13 * most)
    for axis, (name, (unit, columns)) in zip(axes, shown.items(), strict=True):
        for column, label in zip(columns, folded[name], strict=True):
            points = [(row[x[0]], row[column]) for row in rows if column in row]
            alone = "o" if len(points) == 1 else None  # a line of one point is invisible
            axis.plot(*zip(*points, strict=True), label=label, marker=alone)
        axis.set(title=name, xlabel=x[1], ylabel=textwrap.fill(unit, _LABEL))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        under = axis.transAxes + ScaledTranslation(0, -_UNDER, figure.dpi_scale_trans)
        axis.legend(
            loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=under, frameon=False,
            borderaxespad=0,
        )  # fmt: skip
    return figure


def shades(clean: Tensor, adversarial: Tensor, threat: Threat) -> tuple[Tensor, float]:
    """Perturbations as images: grey where nothing changed, black and white at the reach.

    Returns:
        the images, and the reach: ε for L∞, the largest change shown otherwise.
    """
    delta = adversarial - clean
    reach = float(threat.eps) if threat.norm == "Linf" else float(delta.abs().max().clamp(1e-12))
    return (delta / (2 * reach) + 0.5).clamp(0, 1), reach


def image_grid(clean: Tensor, adversarial: Tensor, threat: Threat) -> Tensor:
    """Rows of clean images, adversarial examples and perturbations as one image.

    Args:
        clean: (n, C, H, W) in [0, 1].
        adversarial: the same shape.
        threat: the ball.

    Returns:
        (C, 3 · H', n · W'): small images are enlarged by a whole number, so that they can be seen.
    """
    rows = (clean, adversarial, shades(clean, adversarial, threat)[0])
    grid = torch.cat([torch.cat([*row.detach().float()], 2) for row in rows], 1)
    larger = max(1, 64 // clean.shape[2])
    return grid.repeat_interleave(larger, 1).repeat_interleave(larger, 2)


@style()
def image_strip(
    clean: Tensor, adversarial: Tensor, threat: Threat, captions: Sequence[Sequence[str]]
) -> Figure:
    """Rows of clean images, adversarial examples and perturbations.

    Args:
        clean: (n, C, H, W) in [0, 1].
        adversarial: the same shape.
        threat: the ball; `shades` says how perturbations are drawn.
        captions: what the classifier says of the clean and of the adversarial images.
    """
    delta, reach = shades(clean, adversarial, threat)
    count = len(clean)
    figure, axes = plt.subplots(
        3, count, figsize=(1.1 * count + 0.8, 4.0), layout="constrained", squeeze=False
    )
    said = (captions[0], captions[1], [""] * count)
    for axis_row, images, words, label in zip(
        axes,
        (clean, adversarial, delta),
        said,
        ("clean", "adversarial", "perturbation"),
        strict=True,
    ):
        for axis, image, word in zip(axis_row, images, words, strict=True):
            array = image.detach().float().cpu().permute(1, 2, 0).numpy()
            axis.imshow(np.squeeze(array), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(word, fontsize=8)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(label, fontsize=9)
    figure.suptitle(
        f"true label → prediction; {threat.norm} ε = {float(threat.eps):.3g}, "
        f"black and white are changes of ±{reach:.3g}",
        fontsize=8,
    )
    return figure


@style()
def shares_figure(
    shares: Mapping[str, Sequence[Sequence[float]]],
    options: Mapping[str, Sequence[str]],
    title: str,
) -> Figure:
    """How often each option was taken at each query: a stacked panel per choice.

    Options that are never taken are in no legend.

    Args:
        shares: choice -> a row per query from the second on, a share per option.
        options: choice -> names of its options.
        title: of the figure.
    """
    figure, axes = panels_figure(len(shares), title, height=2.7)
    for axis, (name, rows) in zip(axes, shares.items(), strict=True):
        columns = list(zip(*rows, strict=True))
        names = [
            one if any(share) else "_" for one, share in zip(options[name], columns, strict=True)
        ]
        axis.stackplot(range(2, len(rows) + 2), *columns, labels=names, step="mid", colors=COLOURS)
        axis.set(
            title=name.replace("_", " "), xlabel="query", ylim=(0, 1), ylabel="share of images"
        )
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


@style()
def seeds_figure(
    runs: Mapping[str, Sequence[Rows]],
    tags: Mapping[str, str],
    title: str,
    *,
    x: str = "epoch",
    band: tuple[float, float] = (0, 1),
) -> Figure:
    """Curves of several methods over several seeds: a line for the mean, a band of quantiles.

    More than `LINES` methods are shared out, in the order of their names: a column of panels, and a
    legend below it, for each share.

    Args:
        runs: method -> the rows of its seeds.
        tags: column -> quantity with its unit, the name of the vertical axis.
        title: of the figure.
        x: column of the horizontal axis, whose name has no slash.
        band: quantiles over seeds; the range when not given.
    """
    names = sorted(runs)
    shares = -(-len(names) // LINES)
    size = -(-len(names) // shares)
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    figure, axes = panels_figure(len(tags) * len(groups), title)
    cells = [(tag, label, group) for tag, label in tags.items() for group in groups]
    shown: dict[str, Line2D] = {}
    for axis, (tag, label, group) in zip(axes, cells, strict=True):
        axis.set(ylabel=textwrap.fill(label, _LABEL), xlabel=x)
        for number, name in enumerate(group):
            drawn = _band(
                axis, runs[name], x, tag, band, COLOURS[number], "-" if number < 4 else "--"
            )
            if drawn is not None:
                shown[name] = drawn
        if not axis.lines:
            axis.set_axis_off()
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        places = {float(one) for line in axis.lines for one in np.asarray(line.get_xdata())}
        if len(places) == 1:
            axis.set_xticks([*places])
    if len(groups) == 2:
        for left, right in zip(axes[::2], axes[1::2], strict=True):
            right.sharey(left)
    for number, group in enumerate(groups):
        held = [name for name in group if name in shown]
        lines = [shown[name] for name in held]
        if len(figure.axes) > len(axes):
            figure.axes[-1].legend(lines, held, loc="center")
        elif len(groups) == 1:
            wide = max(map(len, held), default=0) > _NAME
            figure.legend(lines, held, loc="outside lower center", ncols=2 if wide else 4)
        else:
            below = axes[number - len(groups)]
            below.legend(lines, held, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return figure


_LABEL = 28  # letters that fit the height of a panel
_LEGEND = 40  # and the width of half a column
_UNDER = 0.4  # inches that ticks and their axis's name take
_NAME = 22  # letters of four names that fit beside each other


def _band(
    axis: Axes,
    seeds: Sequence[Rows],
    x: str,
    tag: str,
    band: tuple[float, float],
    colour: str,
    dashes: str,
) -> Line2D | None:
    """Draw the mean and the band of a method's seeds; None where they have no such column."""
    points: dict[float, list[float]] = {}
    for row in (row for rows in seeds for row in rows if tag in row):
        points.setdefault(row[x], []).append(row[tag])
    if not points:
        return None
    points = dict(sorted(points.items()))  # a seed may have places that one before has not
    values = list(points.values())
    means_ = [sum(one) / len(one) for one in values]
    alone = "o" if len(points) == 1 else None  # a line of one point is invisible
    (line,) = axis.plot(list(points), means_, color=colour, ls=dashes, marker=alone)
    low, high = ([float(np.quantile(one, share)) for one in values] for share in band)
    axis.fill_between(list(points), low, high, color=colour, alpha=0.12, lw=0)
    return line


@style()
def accuracy_figure(
    accuracy: Mapping[str, tuple[float, float, float]], worst: float, title: str
) -> Figure:
    """Bars of accuracy under each attack, in %, with their intervals.

    Args:
        accuracy: attack -> (share, low, high).
        worst: share of images that survive everything, a line.
        title: of the figure.
    """
    width = min(WIDTH, max(3.6, 1.2 + 0.5 * len(accuracy)))
    figure, axis = plt.subplots(figsize=(width, 3.4))
    shares = [100 * share for share, _, _ in accuracy.values()]
    below = [100 * (share - low) for share, low, _ in accuracy.values()]
    above = [100 * (high - share) for share, _, high in accuracy.values()]
    bars = axis.bar(
        list(accuracy), shares, color=[COLOURS[7], *COLOURS[:1] * len(accuracy)][: len(accuracy)]
    )
    axis.errorbar(list(accuracy), shares, (below, above), fmt="none", ecolor="black", capsize=3)
    for bar, share in zip(bars, shares, strict=True):
        axis.annotate(
            f"{share:.1f}", (bar.get_x() + bar.get_width() / 2, 2), ha="center", fontsize=7,
            color="white" if share > 8 else "black",
        )  # fmt: skip
    axis.axhline(100 * worst, color=COLOURS[3], ls="--")
    axis.set(ylabel="accuracy, %", ylim=(0, 105))
    axis.tick_params(axis="x", rotation=35)
    plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
    axis.set_title(f"{title}\nworst case {100 * worst:.1f} % (line)")
    return figure


@style()
def matrix_figure(
    errors: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    *,
    rows: str,
    columns: str,
    first: tuple[int, int],
) -> Figure:
    """Error rates of every defence under every attack, black where the attack always wins.

    Args:
        errors: title of a panel -> a row per defence, a column per attack, in [0, 1].
        title: of the figure.
        rows: name of the vertical axis.
        columns: name of the horizontal axis.
        first: numbers of the first row and of the first column.
    """
    figure, axes = panels_figure(len(errors), title, height=3.0)
    if len(errors) == 1:  # a square panel and its scale of greys
        figure.set_figwidth(4)
    low, left = first[0] - 0.5, first[1] - 0.5
    for axis, (name, one) in zip(axes, errors.items(), strict=True):
        extent = (left, left + len(one[0]), low + len(one), low)
        shown = axis.imshow(
            np.array(one), cmap="Greys", vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        axis.set(xlabel=columns, ylabel=rows, title=name)
        axis.grid(visible=False)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=axes, label="error, share of images", shrink=0.8)
    return figure


@style()
def save_figure(figure: Figure, path: Path, *, pdf: bool = False) -> None:
    """Write a PNG, whole or not at all, and free the figure.

    Args:
        figure: drawn so far.
        path: of the PNG.
        pdf: whether to write a PDF beside it, for papers; equal pictures are equal files.
    """
    for kind, more in {"png": {}, **({"pdf": {"CreationDate": None}} if pdf else {})}.items():
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=180, metadata=more)
        write_atomically(path.with_suffix(f".{kind}"), content.getvalue())
    plt.close(figure)


def means(sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, float]:
    """Averages of sums of tensors by name, as floats."""
    return {name: float(value) / counts[name] for name, value in sums.items()}

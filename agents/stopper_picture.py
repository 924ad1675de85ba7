"""Whom a stopper gives its steps: a table of images, and a picture of it and of the training."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib.ticker import MaxNLocator

from advgame.attacks import attacked
from advgame.data import ImageSet
from advgame.look import COLOURS, style
from advgame.losses import margin
from advgame.run.curves import Rows, panels_figure, save_figure
from advgame.run.files import write_atomically
from advgame.run.folder import Metrics, RunFolder
from advgame.seeding import stream
from agents.las_at import StoppingStrategy, StrategyGame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = 2000
"""At most so many are replayed."""
NAMED = 20
"""Classes whose names fit under a panel."""
_OVER_TIME = (COLOURS[0], COLOURS[3], COLOURS[6], COLOURS[7])


@dataclass(frozen=True)
class Given:
    """What a stopper gives to images, all (n,).

    Args:
        label: int64.
        margin: true logit less the largest other one on the clean image, below 0 where that is
            misclassified.
        eps: radius that was drawn, in pixel units.
        steps: int64, that the attack made.
    """

    label: Tensor
    margin: Tensor
    eps: Tensor
    steps: Tensor

    def as_csv(self) -> str:
        """A line per image, in their order."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["image", *(one.name for one in fields(self))])
        columns = [one.tolist() for one in astuple(self)]
        lines.writerows(
            [image, label, f"{margin:.4f}", f"{eps:.5f}", steps]
            for image, (label, margin, eps, steps) in enumerate(zip(*columns, strict=True))
        )
        return text.getvalue()


def replay(game: StrategyGame, images: ImageSet, seed: int) -> Given:
    """Attack images as the game's player and rule would now; neither they nor the defender learn.

    ε and step size are drawn as in the training, once per image.

    Args:
        game: of a stopper or its control, whose steps are dealt.
        images: e.g. those of the training, not augmented; on the defender's device.
        seed: of the draws.
    """
    env, module = game.env, game.defender.module
    rng = stream(seed, "replay", game.defender.device)
    assert isinstance(game.player, StoppingStrategy)
    player = StoppingStrategy(env.space.sizes, rng, game.player.rule)
    parts = []
    for first in range(0, len(images), env.batch_size):
        part = slice(first, first + env.batch_size)
        x, y = images.floats(part), images.labels[part]
        chosen = env.space.decode(player.act(x, learn=False))
        rules = replace(env.rules, rule=copy.deepcopy(env.rules.rule))  # a rule learns as it ends
        with game.defender.fabric.autocast():
            made = rules.attack(chosen).run(module, x, y, rng=rng, check=False)
            with attacked(module), torch.no_grad():
                clean = -margin(module(x), y)
        assert made.steps is not None
        parts.append((y, clean, chosen.eps, made.steps))
    return Given(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def write_picture(
    run: RunFolder, game: StrategyGame, images: ImageSet, seed: int, title: str
) -> None:
    """strategy.png and .pdf of a run, and strategy.csv with a line per image.

    Args:
        run: whose training has ended.
        game: as the training has left it.
        images: of the training, of which the first `IMAGES` are replayed.
        seed: of the run.
        title: of the picture.
    """
    given = replay(game, images.first(IMAGES), seed)
    write_atomically(run.path / "strategy.csv", given.as_csv())
    rows = Metrics.read(run.path / "metrics.csv")
    names = images.names or [str(label) for label in range(images.classes)]
    figure = stopper_figure(given, rows, names, title)
    save_figure(figure, run.path / "strategy.png", pdf=True)


@style()
def stopper_figure(given: Given, rows: Rows, classes: Sequence[str], title: str) -> Figure:
    """Steps against margin and by class at the end; steps and threshold over the training.

    Args:
        given: at the end of the training.
        rows: of metrics.csv.
        classes: names by label.
        title: of the figure.
    """
    figure, axes = panels_figure(4, title, height=2.5)
    _against_margin(axes[0], given)
    _by_class(axes[1], given, classes)
    _over_time(
        axes[2],
        rows,
        {
            "strategy/steps_unsure": "half of a batch with the smaller p of the true class",
            "strategy/steps_sure": "half with the larger p",
            "strategy/steps": "all",
            "strategy/steps_spread": "standard deviation",
        },
    )
    axes[2].set(title="Steps over the training", ylabel="mean steps")
    _over_time(
        axes[3],
        rows,
        {
            "strategy/threshold": "threshold: a step that is predicted to gain less is the last",
            "strategy/gain": "mean gain of a step that was not the last",
        },
    )
    axes[3].set(title="Gain over the training", ylabel="gain of a step, nats")
    return figure


def _against_margin(axis: Axes, given: Given) -> None:
    """A dot per image, and means of equally many images, of small and of large balls apart."""
    steps = given.steps.float()
    shift = torch.rand(len(steps), generator=torch.Generator().manual_seed(0)) - 0.5
    axis.scatter(
        given.margin, steps + 0.6 * shift, s=3, color=COLOURS[7], alpha=0.35, lw=0, rasterized=True
    )
    middle = given.eps.quantile(0.5)
    halves = {f"ε ≤ {middle:.3g}": given.eps <= middle, f"ε > {middle:.3g}": given.eps > middle}
    for number, (name, chosen) in enumerate(halves.items()):
        bins = _binned(given.margin[chosen], steps[chosen])
        if bins:
            _means(axis, bins, COLOURS[3 * number], name)
    axis.set(
        title="By margin, at the end",
        xlabel="clean margin: true logit less the largest other",
        ylabel="steps of an image",
    )
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="best")


def _by_class(axis: Axes, given: Given, classes: Sequence[str]) -> None:
    """Mean steps of each class, and the mean of all as a line."""
    steps = given.steps.float()
    labels = given.label.unique().tolist()
    bins = [(place, steps[given.label == label]) for place, label in enumerate(labels)]
    if len(labels) > NAMED:  # in order of their means, since names have no room
        ordered = sorted((own for _, own in bins), key=lambda own: float(own.mean()))
        bins = list(enumerate(ordered))
    _means(axis, bins, COLOURS[0], "")
    axis.axhline(float(steps.mean()), color="black", lw=0.8, ls="--")
    axis.set(title="By class, at the end; all: dashed", ylabel="mean steps")
    if len(labels) > NAMED:
        axis.set(xlabel="classes, in the order of their means")
        return
    named = [classes[label] for label in labels]
    axis.set_xticks(range(len(named)), named, rotation=35 if max(map(len, named)) > 2 else 0)
    axis.set(xlabel="class")
    axis.grid(visible=False, axis="x")


def _over_time(axis: Axes, rows: Rows, tags: Mapping[str, str]) -> None:
    """A line per tag, named below the panel."""
    for colour, (tag, label) in zip(_OVER_TIME, tags.items(), strict=False):
        points = [(row["epoch"], row[tag]) for row in rows if tag in row]
        if points:
            alone = "o" if len(points) == 1 else None  # a line of one point is invisible
            axis.plot(*zip(*points, strict=True), label=label, color=colour, marker=alone)
    axis.set(xlabel="epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)


def _binned(x: Tensor, values: Tensor, bins: int = 8) -> list[tuple[float, Tensor]]:
    """Values in the order of x, in bins of equally many: the mean x of each, and its values."""
    order = x.argsort()
    return [(float(x[rows].mean()), values[rows]) for rows in order.tensor_split(bins) if len(rows)]


def _means(axis: Axes, bins: Sequence[tuple[float, Tensor]], colour: str, label: str) -> None:
    """Means with normal 95 % intervals over images."""
    places = [place for place, _ in bins]
    means = [float(own.mean()) for _, own in bins]
    errors = [1.96 * float(own.std(correction=0)) / math.sqrt(len(own)) for _, own in bins]
    line = "-" if label else "none"
    axis.errorbar(
        places, means, errors, fmt="o", ms=3, ls=line, capsize=2, color=colour, label=label
    )

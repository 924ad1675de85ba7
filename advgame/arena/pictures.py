"""The picture of a tournament: a heat map of errors with the mixtures on its margins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from advgame.look import COLOURS, WIDTH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DARK = 0.6  # from here on words in a cell are white


@style()
def tournament_figure(content: Mapping[str, Any]) -> Figure:
    """Errors of every classifier under every attack, and how often either is played.

    Beside the rows are the defender's mixtures, above the columns the attacker's, of the game of
    all columns: one where the attacker commits to a mixture, and one where it picks per image.

    Args:
        content: of tournament.json; ``split`` names other images than those of the test split.
    """
    rows, columns = content["rows"], content["columns"]
    errors = np.array([[content["errors"][d][a]["share"] for a in columns] for d in rows])
    game = content["games"]["all"]
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(max(WIDTH, 2.8 + 0.5 * len(columns)), 2.4 + 0.3 * len(rows)),
        width_ratios=(max(WIDTH - 2.8, 0.5 * len(columns)), 1.3),
        height_ratios=(0.8, 0.3 * len(rows)),
    )
    (above, corner), (heat, beside) = axes
    heat.imshow(errors, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for (d, a), share in np.ndenumerate(errors):
        colour = "white" if share > _DARK else "black"
        heat.text(a, d, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    heat.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    heat.set_yticks(range(len(rows)), rows)
    for shift, kind, colour in (
        (-0.2, "committed", COLOURS[0]),
        (0.2, "per_image", COLOURS[3]),
    ):
        label = f"{kind.replace('_', ' ')}: {100 * game[kind]['value']:.1f} %"
        attacker, defender = ([*game[kind][one].values()] for one in ("attacker", "defender"))
        above.bar(np.arange(len(columns)) + shift, attacker, 0.4, color=colour)
        beside.barh(np.arange(len(rows)) + shift, defender, 0.4, color=colour, label=label)
    above.set(xlim=heat.get_xlim(), ylim=(0, 1), xticks=[], yticks=[0, 1])
    beside.set(ylim=heat.get_ylim(), xlim=(0, 1), yticks=[], xticks=[0, 1])
    for axis in (heat, above, beside):
        axis.grid(visible=False)
    above.set_ylabel("attacker's shares", rotation=0, ha="right", va="center")
    beside.set_xlabel("defender's shares")
    corner.axis("off")
    corner.legend(*beside.get_legend_handles_labels(), loc="center", title="value")
    figure.suptitle(
        f"errors, % of {content['n']} {content.get('split', 'test')} images, {content['norm']} "
        f"ε = {content['eps']:.3g}"
    )
    return figure

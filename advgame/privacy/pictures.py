"""Pictures of what filters keep and give away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*"


def trade_off_figure(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, str]) -> Figure:
    """Accuracy on the useful label against that on the private one, a panel per task.

    Args:
        rows: ``keep``, ``filter``, ``dim``, ``rho``, ``solver``, and spreads ``useful``,
            ``private``, ``private_guess``, ``private_floor``. Those of plain descent and ascent
            and of a ρ other than 1 are left out.
        tasks: what is kept -> title.
    """
    shown = {keep: title for keep, title in tasks.items() if any(r["keep"] == keep for r in rows)}
    kinds = list(dict.fromkeys(row["filter"] for row in rows))
    dims = sorted({row["dim"] for row in rows if row["filter"] != "raw"})
    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=(4.4 * len(shown), 4.3),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, (keep, title) in zip(axes[0], shown.items(), strict=True):
        mine = [r for r in rows if (r["keep"], r["solver"], r["rho"]) == (keep, "minimax", 1)]
        for row in mine:
            spread = {
                name: 0 if row["seeds"] < 2 else 100 * row[name]["sd"]
                for name in ("private", "useful")
            }
            number = dims.index(row["dim"]) if row["dim"] in dims else -1
            axis.errorbar(
                100 * row["private"]["mean"],
                100 * row["useful"]["mean"],
                xerr=spread["private"],
                yerr=spread["useful"],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=f"C{kinds.index(row['filter'])}",
                capsize=2,
                elinewidth=0.8,
            )
        for name, style in (("private_guess", ":"), ("private_floor", "--")):
            axis.axvline(100 * mine[0][name]["mean"], color="black", lw=0.9, ls=style)
        axis.set(title=title, xlabel="private label, accuracy of the strongest, %")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("useful label, accuracy, %")
    for number, kind in enumerate(kinds):
        axes[0][0].plot([], [], "s", color=f"C{number}", label=kind)
    for number, dim in enumerate(dims):
        axes[0][0].plot([], [], _MARKERS[number], color="grey", label=f"d = {dim}")
    axes[0][0].plot([], [], ":", color="black", label="most frequent class")
    axes[0][0].plot([], [], "--", color="black", label="told the useful label")
    figure.legend(loc="outside lower center", ncols=8, fontsize=8)
    return figure

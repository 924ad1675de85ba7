"""The privacy comparison: what a minimax filter keeps and gives away, against PCA and chance.

    python scripts/study.py privacy --seeds 3
    python scripts/study.py privacy --finished-only

Each cell is one run of `train_privacy_filter.py` (task x filter x dimension x seed), started again
where it was interrupted. Baselines are PCA and a random projection of equal dimension, and the raw
images. Then, at one dimension, the minimax filter for several ρ, and by plain descent and ascent
(alt).

Writes `<out>/privacy.json`, `.md` and `.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import train_privacy_filter
from typing_extensions import override

matplotlib.use("Agg")
from matplotlib.figure import Figure

from advgame.errors import InputError
from advgame.look import COLOURS, style
from advgame.privacy import FILTERS
from advgame.run import table
from advgame.run.curves import panels_figure, save_figure
from advgame.run.files import read_json
from advgame.run.options import Count
from advgame.run.study import StudyConfig
from advgame.run.table import Columns, Row, Runs
from advgame.run.training_study import Flags, TrainingStudy

_MARKERS = "osD^vP*"
TASKS = {
    "class": "keep the digit, hide the slant",
    "attribute": "keep the slant, hide the digit",
    "parity": "keep the parity, hide the digit",
}
COMPARED = ("linear", "mlp", "pca", "random")
RHOS = (0.3, 3.0, 10.0)  # beside the default, 1
ABLATED = "linear"


SHOWN: Columns = {
    "seeds": table.seeds,
    "useful": table.Percent("useful"),
    "private, strongest": table.Percent("private"),
    "linear": table.Percent("private_linear"),
    "MLP": table.Percent("private_mlp"),
    "SVM": table.Percent("private_svm"),
    "in the game, validation": table.Percent("private_in_game"),
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare the minimax filter with others over seeds."""

    dims: tuple[int, ...] = (10, 5)
    """d, numbers per image; the first one is that of the ablations"""
    steps: Count = 800
    """of each filter's training"""
    runs_dir: str = "runs/privacy"
    out: str = "results/minimax"


class Privacy(TrainingStudy[Config]):
    """Filters, each as a method of its own: task x filter x dimension, and the ablations."""

    about, files, script = "Privacy filters on digits", "privacy", train_privacy_filter
    ending = ("Hardware: {device}. Cells made at commit {commits}.", "Command: `{command}`.")
    flat, identity, sharing = True, ("cell", "seed"), ("steps",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.dims:
            raise InputError("a study needs a dimension at least")
        first = config.dims[0]
        self.methods = {
            f"{keep}-{kind}-d{dim}": f"--keep {keep} --filter {kind} --dim {dim}"
            for dim in config.dims
            for keep in TASKS
            for kind in COMPARED
        }
        ablated = f"--filter {ABLATED} --dim {first}"
        for keep in TASKS:
            self.methods[f"{keep}-raw"] = f"--keep {keep} --filter raw"
            self.methods[f"{keep}-alt"] = f"--keep {keep} {ablated} --solver alt"
        for rho in RHOS:
            self.methods[f"class-rho{rho:g}"] = f"--keep class {ablated} --rho {rho:g}"

    def prepare(self, cells: Mapping[str, Flags]) -> None:
        """Refuse filters that cannot be made, too."""
        job = train_privacy_filter.job
        for name, flags in cells.items():
            if self.key(name, flags)[1] == self.config.first_seed:
                job.build(job.parse(flags))
        super().prepare(cells)

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        report = read_json(folder / "report.json")
        about = read_json(folder / "config.json")
        settings, private = about["config"], report["private"]
        kept = ("keep", "attribute", "filter", "rho", "solver", "gamma", "ascent_steps", "steps")
        return {
            "cell": folder.name.rsplit("-seed", 1)[0],
            "seed": settings["seed"],
            "dim": report["dim"],
            "n": report["n"],
            **{name: settings[name] for name in kept},
            "useful": report["useful"]["accuracy"],
            "private": private["accuracy"],
            "private_by": private["by"],
            **{f"private_{kind}": one["test"] for kind, one in private["kinds"].items()},
            "private_guess": private["guess"],
            "private_floor": private["floor"],
            "useful_guess": report["useful"]["guess"],
            **({"private_in_game": report["game"]["eval/private"]} if report["game"] else {}),
            "seconds": report["timing"]["seconds"],
            "commit": about["commit"],
            "device": about["device"],
        }

    def found(self, runs: Runs) -> dict[str, Any]:
        """Spread over seeds of every cell."""
        summary = table.summarise(runs, by="cell")
        for row in table.rows(runs, "cell"):
            told = ("keep", "filter", "dim", "rho", "solver")
            summary[row.name] |= {key: row[key] for key in told}
        asked = {self.key(name, cell) for name, cell in self.cells().items()}
        return {"cells": len(asked | set(map(self.told_apart, runs))), "summary": summary}

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        rows = table.rows(runs, "cell")
        text = [
            f"# {self.about}",
            f"{len(runs)} of {about['cells']} cells are finished. "
            f"{runs[0]['n']} test images, {runs[0]['steps']} steps; mean ± sd over seeds, in %. Of "
            "fresh classifiers trained on what a filter gives out: linear, MLP, and a Gaussian "
            "SVM, a kind that no filter was trained against. Strongest: the one of highest "
            "validation accuracy, as for the useful label. One test accuracy has a standard error "
            "of up to 2.6 points. In the game: the adversary that the filter was trained against, "
            "on the validation split; where it says much less than the fresh ones, the filter has "
            "fooled it and nobody else.",
        ]
        for keep, title in TASKS.items():
            mine = [row for row in rows if row["keep"] == keep]
            if not mine:
                continue
            compared = [row for row in mine if (row["rho"], row["solver"]) == (1, "minimax")]
            compared.sort(key=lambda row: (row["dim"], row["filter"] not in FILTERS))
            chance, floor, useful = (
                table.Percent(name)(mine[0])
                for name in ("private_guess", "private_floor", "useful_guess")
            )
            text += [
                f"## {title[0].upper()}{title[1:]}",
                f"Private: most frequent class {chance}, told the useful label {floor}. "
                f"Useful: most frequent class {useful}.",
                _table(compared, dim="d", filter="filter"),
            ]
        mine = [r for r in rows if r["filter"] == ABLATED and r["dim"] == runs[0]["dim"]]
        plain = [row for row in mine if row["rho"] == 1]
        plain.sort(key=lambda row: list(TASKS).index(row["keep"]))
        over = [row for row in mine if (row["keep"], row["solver"]) == ("class", "minimax")]
        over.sort(key=lambda row: row["rho"])
        return [
            *text,
            "## Plain descent and ascent against the sensitivity penalty",
            _table(plain, keep="keep", filter="filter", dim="d", solver="solver"),
            "## The weight ρ of the useful label, " + TASKS["class"],
            _table(over, filter="filter", dim="d", rho="ρ"),
        ]

    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """What filters keep against what they give away."""
        figure = trade_off_figure(list(about["summary"].values()))
        save_figure(figure, self.path.with_suffix(".png"), pdf=True)


def _table(rows: list[Row], **facts: str) -> str:
    """What tells the rows apart, and what they found."""
    told = {title: partial(_fact, key) for key, title in facts.items()}
    return table.render({**told, **SHOWN}, rows)


def _fact(key: str, row: Row) -> str:
    return str(row[key])


@style()
def trade_off_figure(rows: Runs) -> Figure:
    """Accuracy on the useful label against that on the private one, a panel per task.

    Args:
        rows: ``keep``, ``filter``, ``dim``, ``rho``, ``solver``, and spreads ``useful``,
            ``private``, ``private_guess``, ``private_floor``. Those of plain descent and ascent
            and of a ρ other than 1 are left out.
    """
    shown = {keep: title for keep, title in TASKS.items() if any(r["keep"] == keep for r in rows)}
    kinds = list(dict.fromkeys(row["filter"] for row in rows))
    dims = sorted({row["dim"] for row in rows if row["filter"] != "raw"})
    figure, axes = panels_figure(len(shown), "Privacy filters: means over seeds", height=2.6)
    for axis, (keep, title) in zip(axes, shown.items(), strict=True):
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
                color=COLOURS[kinds.index(row["filter"])],
                capsize=2,
                elinewidth=0.8,
            )
        for name, dashes in (("private_guess", ":"), ("private_floor", "--")):
            axis.axvline(100 * mine[0][name]["mean"], color="black", lw=0.9, ls=dashes)
        axis.set(
            title=title,
            xlabel="private label, accuracy of the strongest, %",
            ylabel="useful label, accuracy, %",
        )
    for number, kind in enumerate(kinds):
        axes[0].plot([], [], "s", color=COLOURS[number], label=kind)
    for number, dim in enumerate(dims):
        axes[0].plot([], [], _MARKERS[number], color="grey", label=f"d = {dim}")
    axes[0].plot([], [], ":", color="black", label="most frequent class")
    axes[0].plot([], [], "--", color="black", label="told the useful label")
    handles = axes[0].get_legend_handles_labels()
    if len(figure.axes) > len(axes):
        figure.axes[-1].legend(*handles, loc="center")
    else:
        figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


main = Privacy.main

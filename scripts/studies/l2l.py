"""L2L: does a classifier that learns from a learned attacker end more robust?

    python scripts/study.py l2l --dataset digits --seeds 3
    python scripts/study.py l2l --dataset mnist --data-dir DIR --extra="--train-n 10000"

Methods: the paper's Naive, Grad and 2-Step, as published (alternating) and with one forward for
both players (shared); the controls plain training, FGSM-AT and PGD-AT, on the same batches,
schedule and budget of epochs; ``-3`` has three attacker steps per step of the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import train_l2l

from advgame.run.cells import drawable, summarise, thinned
from advgame.run.curves import save_figure, seeds_figure
from advgame.run.options import Names
from advgame.run.selection import selected_by
from advgame.run.study import (
    Finished,
    Runs,
    Study,
    StudyConfig,
    markdown_table,
    provenance_lines,
)
from studies._comparison import selection

CONTROL = "pgd"
# name -> flags of train_l2l.py
METHODS: dict[str, tuple[str, ...]] = {
    "plain": ("--attacker", "plain"),
    "fgsm": ("--attacker", "fgsm"),
    CONTROL: ("--attacker", "pgd"),
    "naive": ("--attacker", "naive"),
    "grad": ("--attacker", "grad"),
    "two-step": ("--attacker", "two-step"),
    "grad-3": ("--attacker", "grad", "--attacker-steps", "3"),
    "two-step-3": ("--attacker", "two-step", "--attacker-steps", "3"),
    "grad-shared": ("--attacker", "grad", "--form", "shared"),
    "two-step-shared": ("--attacker", "two-step", "--form", "shared"),
}
# clean and PGD-20 on CIFAR-10, WRN-34-10, ε 0.03 (the paper's table 2); fgsm is its row "Kurakin
# et al. (2016)". Its 94.64 and 0.15 are of Zheng et al. (2016), another defence, not a plain net
PAPER = {
    "fgsm": (85.25, 45.89),
    CONTROL: (87.30, 47.04),
    "naive": (94.53, 0.01),
    "grad": (85.84, 51.17),
    "two-step": (85.35, 54.32),
}
CURVES = {
    "attacker/size": "mean |δ| / ε",
    "attacker/variation": "mean |difference of neighbours| / ε",
    "attacker/on_face": "share of pixels at the face",
    "game/adversarial_loss": "adversarial loss",
    "eval/robust": "validation PGD-10 accuracy",
}
ATTACKS = ("fgsm", "l2l:pgd20", "l2l:pgd100", "cw", "autoattack")


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare learned attackers with controls over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    attacks: Names = ATTACKS
    """attacks of the reports"""
    runs_dir: str = "runs/l2l"
    """run folders, one per cell; not committed"""
    out: str = "results/l2l"
    """where the results go"""


class L2LStudy(Study[Config]):
    """The paper's tables 2, 3 and 8."""

    script = train_l2l
    methods = METHODS

    @property
    def stem(self) -> str:
        """The data set."""
        return self.config.dataset

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found."""
        cell = Finished(folder)
        report, rows, settings = cell.report, cell.rows, cell.settings
        last = rows[-max(1, len(rows) // 8) :]  # the end of the training
        kept = [n for n in rows[-1] if n.startswith(("game/", "attacker/", "cost/", "eval/"))]
        return {
            **cell.facts(),
            "epochs": settings["epochs"],
            "eps": report["threat"]["eps"],
            "train_n": settings["train_n"],
            **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
            "worst_case": report["worst_case"],
            "selected_by": selected_by(report),
            **{f"last_{name}": value for name, value in report["last"].items()},
            "curves": thinned(rows, CURVES),
            "seconds_per_epoch": rows[-1]["time/seconds"] / settings["epochs"],
            **{n: mean(row[n] for row in last) for n in kept if all(n in row for row in last)},
        }

    def found(self, runs: Runs) -> dict[str, Any]:
        """Differences are to PGD-AT."""
        return {"summary": summarise(runs, CONTROL)}

    def markdown(self, runs: Runs, about: Mapping[str, Any]) -> str:
        """The comparison in the layout of the paper's tables."""
        columns = {f"accuracy_{name}": name for name in ("clean", *self.config.attacks)}
        columns["worst_case"] = "worst case"
        first = runs[0]
        gap = f"worst − {CONTROL}, paired, 95 %"
        more = (gap, "s per epoch", "F", "paper: clean, PGD-20")
        lines = [
            f"# L2L on {self.config.dataset}: learned attackers against controls",
            "",
            f"ε = {first['eps']:.3g}, {first['epochs']} epochs, {first['n']} test images, training "
            f"images: {first['train_n'] or 'all'}; mean ± sd over seeds, in %. "
            f"{selection(runs)}. F: forwards of the defender per image and step "
            "(input-backward 1, backward with weights 2), without the attacker network's passes. "
            "Paper: CIFAR-10, WRN-34-10, ε 0.03, its own attacks.",
            "",
            *markdown_table(
                ["method", "seeds", *columns.values(), *more],
                [
                    [method, str(row["seeds"]), *_cells(method, row, columns)]
                    for method, row in about["summary"].items()
                ],
            ),
            "",
            *_more(about["summary"]),
        ]
        return "\n".join([*lines, *provenance_lines(runs, about)])

    def pictures(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        """Attackers and accuracies while they learn."""
        title = f"L2L on {self.config.dataset}: mean and range over seeds"
        save_figure(seeds_figure(drawable(runs), CURVES, title), path.with_suffix(".png"))


def _cells(method: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """A method's line."""
    several = row["seeds"] > 1  # one seed has no spread
    shown = []
    for column in columns:
        cell = f"{100 * row[column]['mean']:.1f}" if column in row else "–"
        sd = f" ± {100 * row[column]['sd']:.1f}" if several and column in row else ""
        shown.append(cell + sd)
    pair = row.get("worst_minus_control")
    gap = f"{100 * pair['mean']:+.1f}" if pair else "–"
    half = pair["half_interval"] if pair else float("nan")
    shown.append(gap + ("" if isnan(half) else f" ± {100 * half:.1f}"))
    shown.append(f"{row['seconds_per_epoch']['mean']:.2f}")
    shown.append(f"{row['attacker/forwards_per_image']['mean']:.0f}")
    shown.append("{:.2f}, {:.2f}".format(*PAPER[method]) if method in PAPER else "not in it")
    return shown


def _more(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the selected weights hide, and how strong the attacker was that the classifier met."""
    columns = {
        "last_clean": "last weights: clean",
        "last_pgd20": "PGD-20",
        "eval/own_attacker": "validation at the end: its own attacker",
        "eval/robust": "PGD-10",
        "attacker/variation": "variation of the perturbations",
    }
    rows = []
    for method, row in summary.items():
        cells = []
        for column in columns:
            scale, digits = (1, 2) if column.startswith("attacker") else (100, 1)
            found = column in row
            cells.append(f"{scale * row[column]['mean']:.{digits}f}" if found else "–")
        rows.append([method, *cells])
    return [
        "The last weights are beside those that validation selected. "
        "The end: the last eighth of the epochs. An attacker far weaker than PGD-10 on the same "
        "weights teaches little. Variation: mean "
        "difference of neighbouring pixels over ε, 1 for random signs.",
        "",
        *markdown_table(["method", *columns.values()], rows),
    ]


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    L2LStudy(config).main()

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
from pathlib import Path
from statistics import mean
from typing import Any

import train_l2l
from typing_extensions import override

from advgame.run import table
from advgame.run.options import Names
from advgame.run.selection import selected_by
from advgame.run.table import Columns, Runs
from advgame.run.training_study import (
    Finished,
    MethodsConfig,
    MethodsStudy,
    attacks_of,
    selection,
    thinned,
    training_images,
)

CONTROL = "pgd"
# name -> flags of train_l2l.py
METHODS = {
    "plain": "--attacker plain",
    "fgsm": "--attacker fgsm",
    CONTROL: "--attacker pgd",
    "naive": "--attacker naive",
    "grad": "--attacker grad",
    "two-step": "--attacker two-step",
    "grad-3": "--attacker grad --attacker-steps 3",
    "two-step-3": "--attacker two-step --attacker-steps 3",
    "grad-shared": "--attacker grad --form shared",
    "two-step-shared": "--attacker two-step --form shared",
}
# clean and PGD-20 on CIFAR-10, WRN-34-10, ε 0.03 (the paper's table 2); fgsm is its row "Kurakin
# et al. (2016)". Its 94.64 and 0.15 are of Zheng et al. (2016), another defence, not a plain net
PAPER = {
    "fgsm": "85.25, 45.89",
    CONTROL: "87.30, 47.04",
    "naive": "94.53, 0.01",
    "grad": "85.84, 51.17",
    "two-step": "85.35, 54.32",
}
CURVES = {
    "attacker/size": "mean |δ| / ε",
    "attacker/variation": "difference of neighbours / ε",
    "attacker/on_face": "share of pixels at the face",
    "game/adversarial_loss": "adversarial loss, nats",
    "eval/robust": "validation accuracy under PGD-10",
}
# what the selected weights hide, and how strong the attacker was that the classifier met
AT_THE_END: Columns = {
    "method": table.row_name,
    "last weights: clean": table.Percent("last_clean", width=""),
    "PGD-20": table.Percent("last_pgd20", width=""),
    "validation at the end: its own attacker": table.Percent("eval/own_attacker", width=""),
    "PGD-10": table.Percent("eval/robust", width=""),
    "variation of the perturbations": table.Mean("attacker/variation", 2),
}
ATTACKS = ("fgsm", "l2l:pgd20", "l2l:pgd100", "cw", "autoattack")


@dataclass(frozen=True)
class Config(MethodsConfig):
    """Compare learned attackers with controls over seeds."""

    methods: tuple[str, ...] = tuple(METHODS)
    attacks: Names = ATTACKS
    runs_dir: str = "runs/l2l"
    out: str = "results/l2l"


class L2LStudy(MethodsStudy[Config]):
    """The study of L2L and its controls, with the paper's tables 2, 3 and 8."""

    about, script, methods, curves = "L2L on {dataset}", train_l2l, METHODS, CURVES
    control = CONTROL

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        cell = Finished(folder)
        report, rows, epochs = cell.report, cell.rows, cell.trained_epochs()
        last = rows[-max(1, len(rows) // 8) :]  # the end of the training
        kept = [n for n in rows[-1] if n.startswith(("game/", "attacker/", "cost/", "eval/"))]
        return {
            **cell.facts(),
            "epochs": epochs,
            "eps": report["threat"]["eps"],
            "train_n": cell.settings["train_n"],
            **cell.accuracies(),
            "selected_by": selected_by(report),
            **{f"last_{name}": value for name, value in report["last"].items()},
            "curves": thinned(rows, CURVES),
            "seconds_per_epoch": rows[-1]["time/seconds"] / epochs,
            **{n: mean(row[n] for row in last) for n in kept if all(n in row for row in last)},
        }

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The comparison in the layout of the paper's tables."""
        first = runs[0]
        columns: Columns = {
            **{"method": table.row_name, "seeds": table.seeds},
            **table.accuracies(attacks_of(runs)),
            f"worst − {CONTROL}, paired, 95 %": table.Paired("worst_case", minus=CONTROL),
            "s per epoch": table.Mean("seconds_per_epoch", 2),
            "F": table.Mean("attacker/forwards_per_image", 0),
            "paper: clean, PGD-20": table.paper(PAPER),
        }
        return [
            f"# {self.title}: learned attackers against controls",
            f"ε = {first['eps']:.3g}, {first['epochs']:g} epochs, {first['n']} test images, "
            f"{training_images(first)}; mean ± sd over seeds, in %. "
            f"{selection(runs)}. F: forwards of the defender per image and step "
            "(input-backward 1, backward with weights 2), without the attacker network's passes. "
            "Paper: CIFAR-10, WRN-34-10, ε 0.03, its own attacks.",
            table.render(columns, table.rows(runs)),
            "The last weights are beside those that validation selected. "
            "The end: the last eighth of the epochs. An attacker far weaker than PGD-10 on the "
            "same weights teaches little. Variation: mean "
            "difference of neighbouring pixels over ε, 1 for random signs.",
            table.render(AT_THE_END, table.rows(runs)),
        ]


main = L2LStudy.main

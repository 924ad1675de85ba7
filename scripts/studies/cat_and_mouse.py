"""The cat-and-mouse game over seeds: does it settle, and what does it leave?

    python scripts/study.py cat_and_mouse --out runs/results --seeds 3
    python scripts/study.py cat_and_mouse --out runs/results --dataset mnist --data-dir DIR

A cell is a method x ε x seed. Methods: `fgsm`, the paper's game; `scratch`, each retraining from
fresh weights; `ifgsm`, ten steps of η. Pictures: the paper's figure 1, and every classifier under
every attack (`_matrix.png`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import train_cat_and_mouse

from advgame.errors import InputError
from advgame.run.cells import split_flags, whole_number
from advgame.run.curves import Rows, matrix_figure, save_figure, seeds_figure
from advgame.run.files import read_json
from advgame.run.options import Names, parse_eps
from advgame.run.study import (
    Finished,
    Run,
    Runs,
    Study,
    StudyConfig,
    markdown_table,
    provenance_lines,
)
from advgame.statistics import spread

# name -> flags of train_cat_and_mouse.py
METHODS: dict[str, tuple[str, ...]] = {
    "fgsm": (),
    "scratch": ("--restart-weights",),
    "ifgsm": ("--attack", "mvm:ifgsm"),
}
# the paper's table 3, MNIST: η (2ε) -> a row per defence of clean, attacks 1, 2, 80 and curr
PAPER = {
    "0.3": (".026 1.000 .881 .355 1.000", ".012 .004 .995 .499 .995",
            ".012 .999 .002 .505 .995", ".009 .335 .273 .009 .442"),
    "0.4": (".026 1.000 .944 .528 1.000", ".013 .003 .984 .589 .984",
            ".017 .999 .005 .549 .999", ".009 .509 .525 .024 .131"),
    "0.5": (".026 1.000 .931 .662 1.000", ".010 .002 .970 .724 .970",
            ".010 .866 .006 .604 .871", ".008 .653 .559 .023 .089"),
    "0.6": (".026 1.000 .963 .803 1.000", ".012 .003 .889 .790 .889",
            ".008 .649 .007 .687 .767", ".009 .439 .426 .020 .021"),
}  # fmt: skip
CURVES = {
    "attack": "test error: attack k on classifier k-1",
    "defence": "test error: attack k on classifier k",
    "clean": "test error: clean",
}
ATTACKS = ("mvm:fgsm", "pgd20", "autoattack")
# what the runs are asked, and how each number is defined
QUESTIONS = {
    "mean": "attack k on classifier k-1: mean",
    "swing": "mean change from round to round",
    "turns": "share of changes that turn back",
    "trend": "slope, per 10 rounds",
    "defended": "attack k on classifier k",
    "before_last": "attack k-1 on classifier k",
    "first": "attack 1 on later classifiers, mean",
    "first_worst": "attack 1, worst classifier",
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Play the cat-and-mouse game over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    eps: tuple[str, ...] = ("0.15",)
    """radii; the paper's η is twice as much"""
    methods: tuple[str, ...] = ("fgsm",)
    """fgsm, scratch or ifgsm"""
    attacks: Names = ATTACKS
    """attacks on the last classifiers"""
    jobs: int = 1
    """processes at a time, one thread each"""
    runs_dir: str = "runs/cat_and_mouse"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""


class CatAndMouseStudy(Study[Config]):
    """The paper's table 3 and figure 1."""

    script = train_cat_and_mouse
    methods = METHODS

    @property
    def stem(self) -> str:
        """The data set's."""
        return f"cat_and_mouse_{self.config.dataset}"

    def check(self) -> None:
        """Refuse what cannot work, before any work."""
        super().check()
        words = split_flags(self.config.extra)
        if "--rounds" in words and whole_number(words, "--rounds") < 4:
            raise InputError("the answers need 4 rounds or more")

    def cells(self) -> dict[str, list[str]]:
        """Folder -> flags of every cell."""
        return {
            f"{method}-{eps.replace('/', '_')}-seed{seed}": [
                *self.shared(), "--seed", str(seed), "--eps", eps, *METHODS[method]
            ]
            for seed in range(self.config.seeds)
            for method in self.config.methods
            for eps in self.config.eps
        }  # fmt: skip

    def row(self, cell: str) -> tuple[str, int]:
        """Method and radius."""
        name, seed = super().row(cell)
        method, eps = name.split("-", 1)
        return f"{method}, ε {parse_eps(eps.replace('_', '/')):.3g}", seed

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found; errors, 4 digits."""
        cell, matrix = Finished(folder), read_json(folder / "matrix.json")
        return {
            **cell.facts(),
            "method": self.row(folder.name)[0],
            "eps": matrix["eps"],
            **{name: cell.settings[name] for name in ("model", "train_n", "rounds", "round_steps")},
            "clean_rounds": cell.settings["clean_rounds"],
            "test_n": matrix["n"],
            "clean": [round(value, 4) for value in matrix["clean"]],
            "errors": [[round(value, 4) for value in row] for row in matrix["errors"]],
            "last": {name: 1 - value for name, value in cell.report["accuracy"].items()},
            "last_worst": 1 - cell.report["worst_case"],
            "seconds_per_round": cell.rows[-1]["time/seconds"] / cell.settings["epochs"],
        }

    def place(self, run: Run) -> tuple[int, float]:
        """By method, then radius."""
        return list(METHODS).index(run["method"].split(",")[0]), run["eps"]

    def found(self, runs: Runs) -> dict[str, Any]:
        """Answers, and mean matrices."""
        return {"summary": summarise(runs)}

    def markdown(self, runs: Runs, about: Mapping[str, Any]) -> str:
        """The answers, the last classifiers, and table 3 beside the paper's."""
        return as_markdown(self.config, runs, about)

    def pictures(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        """Figure 1 over seeds, and the mean matrices."""
        pictures(self.config.dataset, runs, about, path)


def answers(run: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `QUESTIONS`, over the last half of the rounds; but attack 1's, over all."""
    errors = np.array(run["errors"])  # classifier 0.., attack 1..
    last = len(errors) - 1
    attack, numbers = errors.diagonal(), np.arange(1, last + 2)  # attack k on classifier k-1
    late = numbers > (last + 1) // 2
    changes = np.diff(attack[late])
    turned = changes[1:] * changes[:-1] < 0
    rounds = [k for k in range(2, last + 1) if k > (last + 1) // 2]
    again = [float(errors[k, 0]) for k in range(2, last + 1)]
    return {
        "mean": float(attack[late].mean()),
        "swing": float(np.abs(changes).mean()),
        "turns": float(turned.mean()),
        "trend": 10 * float(np.polyfit(numbers[late], attack[late], 1)[0]),
        "defended": mean(float(errors[k, k - 1]) for k in rounds),
        "before_last": mean(float(errors[k, k - 2]) for k in rounds),
        "first": mean(again),
        "first_worst": max(again),
    }


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """Spread over seeds of every answer, and the mean matrix."""
    summary: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        found = [answers(run) for run in mine]
        summary[method] = {
            "seeds": len(mine),
            "answers": {name: spread([one[name] for one in found]) for name in QUESTIONS},
            "last": {name: spread([run["last"][name] for run in mine]) for name in mine[0]["last"]},
            "last_worst": spread([run["last_worst"] for run in mine]),
            "clean": np.mean([run["clean"] for run in mine], 0).round(4).tolist(),
            "errors": np.mean([run["errors"] for run in mine], 0).round(4).tolist(),
        }
    return summary


def _shown(value: Mapping[str, float]) -> str:
    """Mean and standard deviation, which one seed does not have."""
    sd = f" ± {value['sd']:.3f}" if value["sd"] == value["sd"] else ""
    return f"{value['mean']:.3f}{sd}"


def as_markdown(config: Config, runs: Runs, about: Mapping[str, Any]) -> str:
    """The answers, the last classifiers, and table 3 beside the paper's."""
    first, summary = runs[0], about["summary"]
    games = [
        [name, str(row["seeds"]), *(_shown(row["answers"][question]) for question in QUESTIONS)]
        for name, row in summary.items()
    ]
    attacks = ("clean", *config.attacks)
    last = [
        [name, *(_shown(row["last"][attack]) for attack in attacks), _shown(row["last_worst"])]
        for name, row in summary.items()
    ]
    lines = [
        f"# Cat and mouse on {config.dataset}",
        "",
        f"{first['model']}, training images: {first['train_n'] or 'all'}, "
        f"{first['clean_rounds']} x {first['round_steps']} steps on clean images, then "
        f"{first['rounds']} rounds of {first['round_steps']} steps; {first['test_n']} test images, "
        f"{first['n']} for the last classifiers. All numbers are **errors**, shares of all test "
        "images that are misclassified (high: the attack wins); mean ± sd over seeds.",
        "",
        "Over the last half of the rounds, but attack 1's over all:",
        "",
        *markdown_table(["game", "seeds", *QUESTIONS.values()], games),
        "",
        "Random changes turn back 2 times of 3; 1 is a step up after each step down.",
        "",
        "The last classifiers, under attacks made on them:",
        "",
        *markdown_table(["game", *attacks, "worst case"], last),
    ]
    for name, row in summary.items():
        lines += _table_3(name, row, config.dataset == "mnist" and name.startswith("fgsm"))
    return "\n".join([*lines, *provenance_lines(runs, about)])


def _table_3(name: str, row: Mapping[str, Any], compare: bool) -> list[str]:
    """Mean errors; in brackets the paper's, whose last round is the 80th."""
    errors, last = row["errors"], len(row["errors"]) - 1
    eta = f"{2 * float(name.split('ε ')[1]):.3g}"
    paper = PAPER.get(eta, ()) if compare else ()
    rows = []
    for place, number in enumerate((0, 1, 2, last)):
        values = [row["clean"][number], *(errors[number][k - 1] for k in (1, 2, last))]
        shown = [f"{value:.3f}" for value in (*values, errors[number][number])]
        if paper:
            theirs = paper[place].split()
            shown = [f"{one} [{other}]" for one, other in zip(shown, theirs, strict=True)]
        rows.append([f"Adv {number}" if number else "No defence", *shown])
    note = ["", "In brackets: the paper's, of 80 rounds with its own network."] if paper else []
    head = ["defence", "clean", "attack 1", "attack 2", f"attack {last}", "attack-curr"]
    return ["", f"Table 3, {name} (η {eta}):", "", *markdown_table(head, rows), *note]


def pictures(dataset: str, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
    """Figure 1 over seeds, and the mean matrices."""
    drawn: dict[str, list[Rows]] = {}
    for run in runs:
        errors = np.array(run["errors"])
        attack, defence = errors.diagonal(), errors.diagonal(-1)
        rows: list[dict[str, float]] = [
            {"round": k, "attack": a, "defence": d, "clean": c}
            for k, (a, d, c) in enumerate(zip(attack, defence, run["clean"][1:], strict=False), 1)
        ]
        drawn.setdefault(run["method"], []).append(rows)
    title = f"Cat and mouse on {dataset}: mean and range over seeds"
    save_figure(seeds_figure(drawn, CURVES, title, x="round"), path.with_suffix(".png"))
    figure = matrix_figure(
        {method: row["errors"] for method, row in about["summary"].items()},
        f"Cat and mouse on {dataset}: mean error over seeds",
        rows="classifier (0: no defence)",
        columns="attack",
        first=(0, 1),
    )
    save_figure(figure, path.with_name(f"{path.stem}_matrix.png"))


def main(config: Config) -> None:
    """Play what is missing, then write the results."""
    CatAndMouseStudy(config).main()

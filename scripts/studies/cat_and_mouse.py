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
from typing import Any

import numpy as np
import train_cat_and_mouse
from typing_extensions import override

from advgame.errors import InputError
from advgame.run import table
from advgame.run.curves import Rows, matrix_figure, save_figure, seeds_figure
from advgame.run.files import read_json
from advgame.run.options import Count, Names, parse_eps
from advgame.run.table import Row, Run, Runs, Value
from advgame.run.training_study import Finished, MethodsConfig, MethodsStudy, training_images

# name -> flags of cat_and_mouse.py
METHODS = {"fgsm": "", "scratch": "--restart-weights", "ifgsm": "--attack mvm:ifgsm"}
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
    "attack": "error, attack k on classifier k-1",
    "defence": "error, attack k on classifier k",
    "clean": "error, clean test images",
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
class Config(MethodsConfig):
    """Play the cat-and-mouse game over seeds."""

    eps: tuple[str, ...] = ("0.15",)
    """radii; the paper's η is twice as much"""
    methods: tuple[str, ...] = ("fgsm",)
    """fgsm, scratch or ifgsm"""
    attacks: Names = ATTACKS
    jobs: Count = 1
    runs_dir: str = "runs/cat_and_mouse"
    out: str = "results/minimax"


class CatAndMouseStudy(MethodsStudy[Config]):
    """The study of the cat-and-mouse game, with the paper's table 3 and figure 1."""

    about, script, methods = "Cat and mouse on {dataset}", train_cat_and_mouse, METHODS
    files = "cat_and_mouse_{dataset}"

    @override
    def check(self) -> None:
        super().check()
        for method in self.config.methods:
            if train_cat_and_mouse.job.parse(self.flags(method)).rounds < 4:
                raise InputError("the answers need 4 rounds or more")

    @override
    def cells(self) -> dict[str, list[str]]:
        return {
            f"{method}-{eps.replace('/', '_')}-seed{seed}": [
                *self.flags(method), "--seed", str(seed), "--eps", eps
            ]
            for seed in self.seeds()
            for method in self.config.methods
            for eps in self.config.eps
        }  # fmt: skip

    def key(self, name: str, cell: Any) -> tuple[str, int]:
        """Method and radius, and the seed."""
        method, rest = name.split("-", 1)
        eps, seed = rest.rsplit("-seed", 1)  # a radius such as 1e-1 has a hyphen, too
        return f"{method}, ε {parse_eps(eps.replace('_', '/')):.3g}", int(seed)

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found; errors, 4 digits."""
        cell, matrix = Finished(folder), read_json(folder / "matrix.json")
        return {
            **cell.facts(),
            "method": self.key(folder.name, None)[0],
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

    @override
    def place(self, run: Run) -> tuple[int, float]:
        return list(METHODS).index(run["method"].split(",")[0]), run["eps"]

    def found(self, runs: Runs) -> dict[str, Any]:
        """The summary, with what `answers` says of each run."""
        return {"summary": table.summarise([{**run, **answers(run)} for run in runs])}

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The answers, the last classifiers, and table 3 beside the paper's."""
        first, attacks = runs[0], list(runs[0]["last"])
        found: list[Run] = [{**run, **answers(run)} for run in runs]
        games = {title: table.Number(question) for question, title in QUESTIONS.items()}
        last = {attack: table.Number(_last(attack)) for attack in attacks}
        lines = [
            f"# {self.title}",
            f"{first['model']}, {training_images(first)}, "
            f"{first['clean_rounds']} x {first['round_steps']} steps on clean images, then "
            f"{first['rounds']} rounds of {first['round_steps']} steps; {first['test_n']} test "
            f"images, {first['n']} for the last classifiers. All numbers are **errors**, shares of "
            "all test images that are misclassified (high: the attack wins); mean ± sd over seeds.",
            "Over the last half of the rounds, but attack 1's over all:",
            table.render(
                {"game": table.row_name, "seeds": table.seeds, **games}, table.rows(found)
            ),
            "Random changes turn back 2 times of 3; 1 is a step up after each step down.",
            "The last classifiers, under attacks made on them:",
            table.render(
                {"game": table.row_name, **last, "worst case": table.Number("last_worst")},
                table.rows(runs),
            ),
        ]
        for row in table.rows(runs):
            compare = self.config.dataset == "mnist" and row.name.startswith("fgsm")
            lines += table_3(row, compare)
        return lines

    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """Figure 1 over seeds, and the mean matrices."""
        shown: dict[str, list[Rows]] = {}
        for run in runs:
            errors = np.array(run["errors"])
            attack, defence = errors.diagonal(), errors.diagonal(-1)
            points: list[dict[str, float]] = [
                {"round": k, "attack": a, "defence": d, "clean": c}
                for k, (a, d, c) in enumerate(
                    zip(attack, defence, run["clean"][1:], strict=False), 1
                )
            ]
            shown.setdefault(run["method"], []).append(points)
        figure = seeds_figure(shown, CURVES, f"{self.title}: mean and range over seeds", x="round")
        save_figure(figure, self.path.with_suffix(".png"), pdf=True)
        figure = matrix_figure(
            {row.name: mean_over_seeds(row, "errors") for row in table.rows(runs)},
            f"{self.title}: mean error over seeds",
            rows="classifier (0: no defence)",
            columns="attack",
            first=(0, 1),
        )
        save_figure(figure, self.path.with_name(f"{self.stem}_matrix.png"), pdf=True)


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


def _last(attack: str) -> Value:
    return lambda run: run["last"][attack]


def mean_over_seeds(row: Row, key: str) -> list[Any]:
    """Errors of a row by round, averaged over its seeds, to four digits."""
    found: list[Any] = np.mean([run[key] for run in row.runs], 0).round(4).tolist()
    return found


def table_3(row: Row, compare: bool) -> list[str]:
    """Mean errors; in brackets the paper's, whose last round is the 80th."""
    clean, errors = mean_over_seeds(row, "clean"), mean_over_seeds(row, "errors")
    last, eta = len(errors) - 1, f"{2 * float(row.name.split('ε ')[1]):.3g}"
    paper = PAPER.get(eta, ()) if compare else ()
    lines = []
    for place, number in enumerate((0, 1, 2, last)):
        values = [clean[number], *(errors[number][k - 1] for k in (1, 2, last))]
        shown = [f"{value:.3f}" for value in (*values, errors[number][number])]
        if paper:
            theirs = paper[place].split()
            shown = [f"{one} [{other}]" for one, other in zip(shown, theirs, strict=True)]
        lines.append([f"Adv {number}" if number else "No defence", *shown])
    head = ["defence", "clean", "attack 1", "attack 2", f"attack {last}", "attack-curr"]
    note = ["In brackets: the paper's, of 80 rounds with its own network."] if paper else []
    return [f"Table 3, {row.name} (η {eta}):", table.markdown(head, lines), *note]


main = CatAndMouseStudy.main

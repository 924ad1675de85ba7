"""The cat-and-mouse game over seeds: does it settle, and what does it leave?

    python scripts/study_cat_and_mouse.py --out runs/results --seeds 3
    python scripts/study_cat_and_mouse.py --out runs/results --dataset mnist --data-dir DIR

Each cell is one run of `cat_and_mouse.py` (variant x ε x seed) in its own process; finished cells
are kept and interrupted ones resumed, so that the command can be given again. Variants: `fgsm`, the
paper's game; `scratch`, each retraining from fresh weights; `ifgsm`, ten steps of η.

Writes `<out>/cat_and_mouse_<dataset>.json`, `.md`, `.png` (the paper's figure 1) and
`_matrix.png` (every classifier under every attack). Cells that the results already hold stay there.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import cat_and_mouse
import numpy as np
import tyro

from advgame.cells import (
    check_cells,
    hardware,
    run_cells,
    same_flags,
    split_flags,
    whole_number,
    with_earlier,
)
from advgame.checkpoint import read_json, write_atomically
from advgame.cli import Names, run_script
from advgame.curves import Rows, matrix_figure, save_figure, seeds_figure
from advgame.errors import InputError, unknown
from advgame.runs import Metrics, made_by
from advgame.statistics import spread

# name -> flags of cat_and_mouse.py
VARIANTS: dict[str, tuple[str, ...]] = {
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
class Config:
    """Play the cat-and-mouse game over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    eps: tuple[str, ...] = ("0.15",)
    """radii; the paper's η is twice as much"""
    variants: tuple[str, ...] = ("fgsm",)
    """fgsm, scratch or ifgsm"""
    seeds: int = 3
    """seeds 0, 1, … each"""
    attacks: Names = ATTACKS
    """attacks on the last classifiers"""
    finished_only: bool = False
    """play nothing: write the results of the cells that are finished"""
    jobs: int = 1
    """processes at a time, one thread each"""
    runs_dir: str = "runs/cat_and_mouse"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""
    extra: str = ""
    """further flags of cat_and_mouse.py for every cell, e.g. --extra="--rounds 40" """
    data_dir: str | None = None
    """data folder (all but digits)"""


def same(config: Config) -> str:
    """What the cells of one table share, beside the data set."""
    return shlex.join(["--attacks", *config.attacks, *split_flags(config.extra)])


def cells(config: Config) -> dict[str, list[str]]:
    """Folder -> flags of every cell."""
    data = ["--data-dir", config.data_dir] if config.data_dir else []
    shared = ["--dataset", config.dataset, *data, *split_flags(same(config))]
    return {
        f"{variant}-{eps.replace('/', '_')}-seed{seed}": [
            *shared, "--seed", str(seed), "--eps", eps, *VARIANTS[variant]
        ]
        for seed in range(config.seeds)
        for variant in config.variants
        for eps in config.eps
    }  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """What a finished cell found; errors, 4 digits."""
    report = read_json(folder / "report.json")
    about = read_json(folder / "config.json")
    matrix = read_json(folder / "matrix.json")
    rows, settings = Metrics.read(folder / "metrics.csv"), about["config"]
    return {
        "method": f"{folder.name.split('-')[0]}, ε {matrix['eps']:.3g}",
        "seed": settings["seed"],
        "eps": matrix["eps"],
        "model": settings["model"],
        "train_n": settings["train_n"],
        "rounds": settings["rounds"],
        "round_steps": settings["round_steps"],
        "clean_rounds": settings["clean_rounds"],
        "test_n": matrix["n"],
        "n": report["n"],
        "commit": about["commit"],
        "device": about["device"],
        "clean": [round(value, 4) for value in matrix["clean"]],
        "errors": [[round(value, 4) for value in row] for row in matrix["errors"]],
        "last": {name: 1 - value for name, value in report["accuracy"].items()},
        "last_worst": 1 - report["worst_case"],
        "flags": [flag["name"] for flag in report["flags"]],
        "seconds_per_round": rows[-1]["time/seconds"] / settings["epochs"],
    }


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


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def as_markdown(config: Config, runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The answers, the last classifiers, and table 3 beside the paper's."""
    first, summary = runs[0], about["summary"]
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
        *_table(
            ["game", "seeds", *QUESTIONS.values()],
            [
                [name, str(row["seeds"]), *(_shown(row["answers"][q]) for q in QUESTIONS)]
                for name, row in summary.items()
            ],
        ),
        "Random changes turn back 2 times of 3; 1 is a step up after each step down.",
        "",
        "The last classifiers, under attacks made on them:",
        "",
        *_table(
            ["game", "clean", *config.attacks, "worst case"],
            [
                [name, *(_shown(row["last"][a]) for a in ("clean", *config.attacks)),
                 _shown(row["last_worst"])]
                for name, row in summary.items()
            ],
        ),
    ]  # fmt: skip
    for name, row in summary.items():
        lines += _table_3(name, row, config.dataset == "mnist" and name.startswith("fgsm"))
    flags = ", ".join(sorted({f"{r['method']}: {f}" for r in runs for f in r["flags"]}))
    made = ", ".join(sorted({r["commit"][:12] for r in runs}))
    lines += [f"Flags raised: {flags or 'none'}.", ""]
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    return "\n".join([*lines, f"Command: `{about['command']}`.", ""])


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
    note = ["In brackets: the paper's, of 80 rounds with its own network.", ""] if paper else []
    head = ["defence", "clean", "attack 1", "attack 2", f"attack {last}", "attack-curr"]
    return [f"Table 3, {name} (η {eta}):", "", *_table(head, rows), *note]


def pictures(config: Config, about: Mapping[str, Any], out: Path) -> None:
    """Figure 1 over seeds, and the mean matrices."""
    runs: dict[str, list[Rows]] = {}
    for run in about["runs"]:
        errors = np.array(run["errors"])
        attack, defence = errors.diagonal(), errors.diagonal(-1)
        rows: list[dict[str, float]] = [
            {"round": k, "attack": a, "defence": d, "clean": c}
            for k, (a, d, c) in enumerate(zip(attack, defence, run["clean"][1:], strict=False), 1)
        ]
        runs.setdefault(run["method"], []).append(rows)
    title = f"Cat and mouse on {config.dataset}: mean and range over seeds"
    name = f"cat_and_mouse_{config.dataset}"
    save_figure(seeds_figure(runs, CURVES, title, x="round"), out / f"{name}.png")
    figure = matrix_figure(
        {method: row["errors"] for method, row in about["summary"].items()},
        f"Cat and mouse on {config.dataset}: mean error over seeds",
        rows="classifier (0: no defence)",
        columns="attack",
        first=(0, 1),
    )
    save_figure(figure, out / f"{name}_matrix.png")


def main(config: Config) -> None:
    """Play what is missing, then write the results."""
    if odd := [name for name in config.variants if name not in VARIANTS]:
        raise unknown("variant", odd[0], VARIANTS)
    words = split_flags(config.extra)
    if "--rounds" in config.extra and whole_number(words, "--rounds") < 4:
        raise InputError("the answers need 4 rounds or more")
    root, todo = Path(config.runs_dir) / config.dataset, cells(config)
    out = Path(config.out)
    path = out / f"cat_and_mouse_{config.dataset}.json"
    check_cells(cat_and_mouse, todo, config.jobs)
    with_earlier([], path, same(config))  # refuses before any training
    same_flags(root, same(config))
    if config.finished_only:
        todo = {name: todo[name] for name in todo if (root / name / "report.json").exists()}
    else:
        run_cells(Path(__file__).with_name("cat_and_mouse.py"), root, todo, config.jobs)
    results = [read(root / name) for name in todo]
    if not results:
        raise InputError(f"{root} holds no finished cell: leave --finished-only away")
    runs = with_earlier(results, path, same(config))
    runs.sort(key=lambda run: (list(VARIANTS).index(run["method"].split(",")[0]), run["eps"]))
    about = {
        **made_by(),
        "device": hardware(runs, config.jobs),
        "extra": same(config),
        "summary": summarise(runs),
        "runs": runs,
    }
    write_atomically(path, json.dumps(about) + "\n")
    write_atomically(path.with_suffix(".md"), as_markdown(config, runs, about))
    pictures(config, about, out)
    print(f"{len(results)} of {len(todo)} cells, {len(runs)} in all; {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

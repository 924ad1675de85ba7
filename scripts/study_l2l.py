"""The L2L comparison: does a classifier that learns from a learned attacker end more robust?

    python scripts/study_l2l.py --dataset digits --seeds 3
    python scripts/study_l2l.py --dataset mnist --data-dir DIR --seeds 3 --extra="--train-n 10000"

Each cell is one run of `train_l2l.py` (method x seed) in its own process; finished cells are kept
and interrupted ones resumed, so that the command can be given again. Methods: the paper's Naive,
Grad and 2-Step, as published (alternating) and with one forward for both players (shared); the
controls plain training, FGSM-AT and PGM-AT, on the same batches, schedule and budget of epochs;
``-3`` has three attacker steps per step of the classifier.

Writes `<out>/<dataset>.json`, `.md` and `.png`. Cells that the results already hold stay there,
also where their folders are gone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import train_l2l
import tyro

from advgame.cells import (
    check_cells,
    drawable,
    hardware,
    run_cells,
    same_flags,
    split_flags,
    summarise,
    thinned,
    usable,
    with_earlier,
)
from advgame.checkpoint import read_json, write_atomically
from advgame.cli import Names, run_script
from advgame.curves import save_figure, seeds_figure
from advgame.errors import InputError, unknown
from advgame.evaluation.comparison import selection
from advgame.runs import Metrics, made_by
from advgame.selection import selected_by

CONTROL = "pgm"
# name -> flags of train_l2l.py
METHODS: dict[str, tuple[str, ...]] = {
    "plain": ("--attacker", "plain"),
    "fgsm": ("--attacker", "fgsm"),
    CONTROL: ("--attacker", "pgm"),
    "naive": ("--attacker", "naive"),
    "grad": ("--attacker", "grad"),
    "two-step": ("--attacker", "two-step"),
    "grad-3": ("--attacker", "grad", "--attacker-steps", "3"),
    "two-step-3": ("--attacker", "two-step", "--attacker-steps", "3"),
    "grad-shared": ("--attacker", "grad", "--form", "shared"),
    "two-step-shared": ("--attacker", "two-step", "--form", "shared"),
}
# clean and PGM-20 on CIFAR-10, WRN-34-10, ε 0.03 (the paper's table 2); fgsm is its row "Kurakin
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
ATTACKS = ("fgsm", "l2l:pgm20", "l2l:pgm100", "cw", "autoattack")


@dataclass(frozen=True)
class Config:
    """Compare learned attackers with controls over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    seeds: int = 3
    """seeds 0, 1, … per method"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    attacks: Names = ATTACKS
    """attacks of the reports"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/l2l"
    """run folders, one per cell; not committed"""
    out: str = "results/l2l"
    """where the results go"""
    extra: str = ""
    """further flags of train_l2l.py for every cell, e.g. --extra="--epochs 5" """
    data_dir: str | None = None
    """data folder (all but digits)"""


def same(config: Config) -> str:
    """What the cells of one table share, beside the data set."""
    return shlex.join(["--attacks", *config.attacks, *split_flags(config.extra)])


def cells(config: Config) -> dict[str, list[str]]:
    """Folder -> flags of every cell."""
    data = ["--data-dir", config.data_dir] if config.data_dir else []
    shared = ["--dataset", config.dataset, *data, *split_flags(same(config))]
    used = {name: usable(shared, METHODS[name], train_l2l) for name in config.methods}
    return {
        f"{method}-seed{seed}": [*used[method], "--seed", str(seed), *METHODS[method]]
        for seed in range(config.seeds)
        for method in config.methods
    }


def read(folder: Path) -> dict[str, Any]:
    """What a finished cell found."""
    report = read_json(folder / "report.json")
    about = read_json(folder / "config.json")
    rows, settings = Metrics.read(folder / "metrics.csv"), about["config"]
    last = rows[-max(1, len(rows) // 8) :]  # the end of the training
    kept = [n for n in rows[-1] if n.startswith(("game/", "attacker/", "cost/", "eval/"))]
    return {
        "method": folder.name.rsplit("-seed", 1)[0],
        "seed": settings["seed"],
        "n": report["n"],
        "epochs": settings["epochs"],
        "eps": report["threat"]["eps"],
        "train_n": settings["train_n"],
        "commit": about["commit"],
        "device": about["device"],
        **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
        "worst_case": report["worst_case"],
        "selected_by": selected_by(report),
        **{f"last_{name}": value for name, value in report["last"].items()},
        "flags": [flag["name"] for flag in report["flags"]],
        "curves": thinned(rows, CURVES),
        "seconds_per_epoch": rows[-1]["time/seconds"] / settings["epochs"],
        **{name: mean(row[name] for row in last) for name in kept if all(name in r for r in last)},
    }


def as_markdown(
    config: Config, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The comparison for people, in the layout of the paper's tables 2, 3 and 8."""
    columns = {f"accuracy_{name}": name for name in ("clean", *config.attacks)}
    columns["worst_case"] = "worst case"
    first = results[0]
    lines = [
        f"# L2L on {config.dataset}: learned attackers against controls",
        "",
        f"ε = {first['eps']:.3g}, {first['epochs']} epochs, {first['n']} test images, training "
        f"images: {first['train_n'] or 'all'}; mean ± sd over seeds, in %. "
        f"{selection(results)}. F: forwards of the defender per image and step "
        "(input-backward 1, backward with weights 2), without the attacker network's passes. "
        "Paper: CIFAR-10, WRN-34-10, ε 0.03, its own attacks.",
        "",
        "| method | seeds | " + " | ".join(columns.values())
        + f" | worst − {CONTROL}, paired, 95 % | s per epoch | F | paper: clean, PGM-20 |",
        "|---" * (len(columns) + 6) + "|",
    ]  # fmt: skip
    for method, row in about["summary"].items():
        several = row["seeds"] > 1  # one seed has no spread
        shown = []
        for c in columns:
            cell = f"{100 * row[c]['mean']:.1f}" if c in row else "–"
            shown.append(cell + (f" ± {100 * row[c]['sd']:.1f}" if several and c in row else ""))
        pair = row.get("worst_minus_control")
        gap = f"{100 * pair['mean']:+.1f}" if pair else "–"
        shown.append(
            gap
            + (f" ± {100 * pair['half_interval']:.1f}" if pair and not isnan(pair["sd"]) else "")
        )
        shown.append(f"{row['seconds_per_epoch']['mean']:.2f}")
        shown.append(f"{row['attacker/forwards_per_image']['mean']:.0f}")
        shown.append("{:.2f}, {:.2f}".format(*PAPER[method]) if method in PAPER else "not in it")
        lines.append(f"| {method} | {row['seeds']} | " + " | ".join(shown) + " |")
    lines += ["", *_more(about["summary"])]
    flags = ", ".join(sorted({f"{r['method']}: {f}" for r in results for f in r["flags"]}))
    made = ", ".join(sorted({r["commit"][:12] for r in results}))
    lines += ["", f"Flags raised: {flags or 'none'}.", ""]
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    lines += [f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def _more(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the selected weights hide, and how strong the attacker was that the classifier met."""
    columns = {
        "last_clean": "last weights: clean",
        "last_pgd20": "PGD-20",
        "eval/own_attacker": "validation at the end: its own attacker",
        "eval/robust": "PGD-10",
        "attacker/variation": "variation of the perturbations",
    }
    lines = [
        "The last weights are beside those that validation selected. "
        "The end: the last eighth of the epochs. An attacker far weaker than PGD-10 on the same "
        "weights teaches little. Variation: mean "
        "difference of neighbouring pixels over ε, 1 for random signs.",
        "",
        "| method | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, row in summary.items():
        cells = []
        for column in columns:
            scale, digits = (1, 2) if column.startswith("attacker") else (100, 1)
            found = column in row
            cells.append(f"{scale * row[column]['mean']:.{digits}f}" if found else "–")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    if odd := [name for name in config.methods if name not in METHODS]:
        raise unknown("method", odd[0], METHODS)
    root, todo = Path(config.runs_dir) / config.dataset, cells(config)
    out = Path(config.out)
    check_cells(train_l2l, todo, config.jobs)
    with_earlier([], out / f"{config.dataset}.json", same(config))  # refuses before any training
    same_flags(root, same(config))
    if config.finished_only:
        todo = {name: todo[name] for name in todo if (root / name / "report.json").exists()}
    else:
        run_cells(Path(__file__).with_name("train_l2l.py"), root, todo, config.jobs)
    results = [read(root / name) for name in todo]
    if not results:
        raise InputError(f"{root} holds no finished cell: leave --finished-only away")
    runs = with_earlier(results, out / f"{config.dataset}.json", same(config))
    runs.sort(key=lambda run: list(METHODS).index(run["method"]))
    about = {
        **made_by(),
        "device": hardware(runs, config.jobs),
        "extra": same(config),
        "summary": summarise(runs, CONTROL),
        "runs": runs,
    }
    write_atomically(out / f"{config.dataset}.json", json.dumps(about) + "\n")
    write_atomically(out / f"{config.dataset}.md", as_markdown(config, runs, about))
    title = f"L2L on {config.dataset}: mean and range over seeds"
    save_figure(seeds_figure(drawable(runs), CURVES, title), out / f"{config.dataset}.png")
    print(f"{len(results)} of {len(todo)} cells, {len(runs)} in all; {out}/{config.dataset}.md")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

"""The privacy comparison: what a minimax filter keeps and gives away, against PCA and chance.

    python scripts/study.py privacy --seeds 3
    python scripts/study.py privacy --finished-only

Each cell is one run of `train_privacy_filter.py` (task x filter x dimension x seed), in this
process; finished cells are kept, an interrupted one starts again: the command can be given again.
Baselines are PCA and a random projection of equal dimension, and the raw images. Then, at one
dimension, the minimax filter for several ρ, and by plain descent and ascent (alt).

Writes `<out>/privacy.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from math import isnan
from pathlib import Path
from typing import Any

from rich.console import Console
from train_privacy_filter import Config as Cell
from train_privacy_filter import job

from advgame.errors import InputError
from advgame.privacy import FILTERS
from advgame.privacy.pictures import trade_off_figure
from advgame.run.cells import same_flags
from advgame.run.curves import save_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import cpu_name, made_by
from advgame.statistics import spread

TASKS = {
    "class": "keep the digit, hide the slant",
    "attribute": "keep the slant, hide the digit",
    "parity": "keep the parity, hide the digit",
}
COMPARED = ("linear", "mlp", "pca", "random")
RHOS = (0.3, 3.0, 10.0)  # beside the default, 1
ABLATED = "linear"


@dataclass(frozen=True)
class Config:
    """Compare privacy filters over seeds."""

    seeds: int = 3
    """seeds 0, 1, … per cell"""
    dims: tuple[int, ...] = (10, 5)
    """d, numbers per image; the first one is that of the ablations"""
    steps: int = 800
    """of each filter's training"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    runs_dir: str = "runs/privacy"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""


def cells(config: Config) -> dict[str, Cell]:
    """Folder -> settings of every cell, seed by seed."""
    found: dict[str, Cell] = {}

    def add(name: str, seed: int, **changes: Any) -> None:
        base = Cell(runs_dir=config.runs_dir, seed=seed)
        if changes["filter"] in FILTERS:  # the others do not learn
            base = replace(base, steps=config.steps)
        found[f"{name}-seed{seed}"] = replace(base, name=f"{name}-seed{seed}", **changes)

    first = config.dims[0]
    for seed in range(config.seeds):
        for dim in config.dims:
            for keep in TASKS:
                for kind in COMPARED:
                    add(f"{keep}-{kind}-d{dim}", seed, keep=keep, filter=kind, dim=dim)
        for keep in TASKS:
            add(f"{keep}-raw", seed, keep=keep, filter="raw")
            add(f"{keep}-alt", seed, keep=keep, filter=ABLATED, dim=first, solver="alt")
        for rho in RHOS:
            add(f"class-rho{rho:g}", seed, keep="class", filter=ABLATED, dim=first, rho=rho)
    return found


def read(folder: Path) -> dict[str, Any]:
    """What a finished cell found."""
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
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Spread over seeds of every cell."""
    summary: dict[str, dict[str, Any]] = {}
    for cell in dict.fromkeys(run["cell"] for run in runs):
        mine = [run for run in runs if run["cell"] == cell]
        numbers = [k for k, v in mine[0].items() if isinstance(v, float) and k != "rho"]
        first = {k: mine[0][k] for k in ("keep", "filter", "dim", "rho", "solver")}
        spreads = {k: spread([run[k] for run in mine]) for k in numbers}
        summary[cell] = {"seeds": len(mine), **first, **spreads}
    return summary


def _cell(one: Mapping[str, float]) -> str:
    spread_ = "" if isnan(one["sd"]) else f" ± {100 * one['sd']:.1f}"
    return f"{100 * one['mean']:.1f}{spread_}"


def _table(rows: Sequence[Mapping[str, Any]], first: Mapping[str, str]) -> list[str]:
    columns = {
        "useful": "useful",
        "private": "private, strongest",
        "private_linear": "linear",
        "private_mlp": "MLP",
        "private_svm": "SVM",
        "private_in_game": "in the game, validation",
    }
    lines = [
        "| " + " | ".join([*first.values(), "seeds", *columns.values()]) + " |",
        "|---" * (len(first) + 1 + len(columns)) + "|",
    ]
    for row in rows:
        told = [str(row[name]) for name in first]
        numbers = [_cell(row[name]) if name in row else "–" for name in columns]
        lines.append("| " + " | ".join([*told, str(row["seeds"]), *numbers]) + " |")
    return [*lines, ""]


def as_markdown(about: Mapping[str, Any]) -> str:
    """The comparison for people."""
    runs: list[Mapping[str, Any]] = about["runs"]
    rows: list[Mapping[str, Any]] = list(about["summary"].values())
    lines = [
        "# Privacy filters on digits",
        "",
        f"{len(runs)} of {about['cells']} cells are finished. "
        f"{runs[0]['n']} test images, {runs[0]['steps']} steps; mean ± sd over seeds, in %. Of "
        "fresh classifiers trained on what a filter gives out: linear, MLP, and a Gaussian SVM, a "
        "kind that no filter was trained against. Strongest: the one of highest validation "
        "accuracy, as for the useful label. One test accuracy has a standard error of up to 2.6 "
        "points. In the game: the adversary that the filter was trained against, on the "
        "validation split; where it says much less than the fresh ones, the filter has fooled it "
        "and nobody else.",
        "",
    ]
    for keep, title in TASKS.items():
        mine = [row for row in rows if row["keep"] == keep]
        if not mine:
            continue
        compared = [row for row in mine if row["rho"] == 1 and row["solver"] == "minimax"]
        compared.sort(key=lambda row: (row["dim"], row["filter"] not in FILTERS))
        chance, floor = mine[0]["private_guess"], mine[0]["private_floor"]
        lines += [
            f"## {title[0].upper()}{title[1:]}",
            "",
            f"Private: most frequent class {_cell(chance)}, told the useful label "
            f"{_cell(floor)}. Useful: most frequent class {_cell(mine[0]['useful_guess'])}.",
            "",
            *_table(compared, {"dim": "d", "filter": "filter"}),
        ]
    mine = [row for row in rows if row["filter"] == ABLATED and row["dim"] == runs[0]["dim"]]
    plain = [row for row in mine if row["rho"] == 1]
    plain.sort(key=lambda row: list(TASKS).index(row["keep"]))
    lines += ["## Plain descent and ascent against the sensitivity penalty", ""]
    lines += _table(plain, {"keep": "keep", "filter": "filter", "dim": "d", "solver": "solver"})
    over = [row for row in mine if row["keep"] == "class" and row["solver"] == "minimax"]
    over.sort(key=lambda row: row["rho"])
    lines += ["## The weight ρ of the useful label, " + TASKS["class"], ""]
    lines += _table(over, {"filter": "filter", "dim": "d", "rho": "ρ"})
    made = ", ".join(sorted({run["commit"][:12] for run in runs}))
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    lines += [f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def play(todo: Mapping[str, Cell], root: Path) -> None:
    """Run what is not finished."""
    console = Console(stderr=True)
    for number, (name, settings) in enumerate(todo.items(), 1):
        folder = root / name
        if (folder / "report.json").exists():
            continue
        going_on = replace(settings, resume=str(folder)) if folder.exists() else settings
        with redirect_stdout(StringIO()):
            job.run(going_on)
        console.print(f"{number}/{len(todo)} {name}")


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    if config.seeds < 1 or not config.dims:
        raise InputError("a study needs a seed and a dimension at least")
    root, todo, out = Path(config.runs_dir), cells(config), Path(config.out)
    for settings in todo.values():
        if settings.seed == 0:
            job.build(job.check(settings))  # refuses before any work
    same_flags(root, shlex.join(["--steps", str(config.steps)]))
    if config.finished_only:
        todo = {name: one for name, one in todo.items() if (root / name / "report.json").exists()}
    else:
        play(todo, root)
    if not todo:
        raise InputError(f"{root} holds no finished cell: leave --finished-only away")
    runs = [read(root / name) for name in todo]
    about: dict[str, Any] = {
        **made_by(),
        "device": f"cpu, one thread ({cpu_name()})",
        "cells": len(cells(config)),
        "summary": summarise(runs),
        "runs": runs,
    }
    write_atomically(out / "privacy.json", json.dumps(about, indent=1) + "\n")
    write_atomically(out / "privacy.md", as_markdown(about))
    save_figure(trade_off_figure(list(about["summary"].values()), TASKS), out / "privacy.png")
    print(f"{len(runs)} cells; {out}/privacy.md")

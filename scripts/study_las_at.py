"""The LAS-AT comparison: who picks the strategies, and does learning to pick them pay?

    python scripts/study_las_at.py --dataset digits --seeds 5
    python scripts/study_las_at.py --dataset mnist --data-dir DIR --seeds 3

Each cell is one run of `train_las_at.py` (player x seed) in its own process; finished cells are
kept and interrupted ones resumed, so that the command can be given again. Players: REINFORCE as
the script's default has it (mixed credit), with the other credits, with the leave-one-out
baseline, with a tenth of the entropy bonus (greedy), and with a policy that stays as it began
(frozen: what random play is paid); PPO; the published settings (repo); the controls random and
fixed (PGD-10 at ε₀: plain PGD-AT); fixed at the strategy of largest ε, the one R1 pays best. Two
controls take variety and strength apart: random-centred draws around PGD-AT's own strategy,
fixed-mean always plays the mean of random. Then random and fixed for as many forwards and
backwards as REINFORCE spent, its look-ahead counted (equal compute).

Writes `<out>/<dataset>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import tyro

from advgame.cells import hardware, run_cells, same_flags
from advgame.cli import run_script
from advgame.curves import Rows, save_figure, seeds_figure
from advgame.errors import InputError
from advgame.runs import Metrics, made_by
from advgame.statistics import spread

_COST = "attacker/forwards_per_image"

# name -> flags of train_las_at.py
PLAYERS: dict[str, tuple[str, ...]] = {
    "reinforce": (),
    "reinforce-sample": ("--credit", "sample"),
    "reinforce-batch": ("--credit", "batch"),
    "reinforce-loo": ("--baseline", "loo"),
    "reinforce-greedy": ("--entropy-coef", "0.01"),
    "reinforce-frozen": ("--policy-lr", "1e-12"),
    "ppo": ("--agent", "ppo", "--entropy-coef", "0.03"),
    "repo": ("--preset", "repo"),
    "random": ("--agent", "random"),
    "fixed": ("--agent", "fixed"),
    "fixed-largest": ("--agent", "fixed", "--fixed", "15", "10", "5"),
    "random-centred": ("--agent", "random", "--space", "centred"),
    "fixed-mean": ("--agent", "fixed", "--fixed", "9", "9", "3"),
}
# trained for as long as the compute of REINFORCE lasts
EQUAL_COMPUTE = ("random", "fixed")


@dataclass(frozen=True)
class Config:
    """Compare strategy players over seeds."""

    dataset: Literal["digits", "mnist"] = "digits"
    """data set"""
    seeds: int = 5
    """seeds 0, 1, … per player"""
    players: tuple[str, ...] = tuple(PLAYERS)
    """which players"""
    equal_compute_seeds: int = 5
    """seeds for which random and fixed are also trained at the compute of reinforce; 0 for none"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/study"
    """run folders, one per cell; not committed"""
    out: str = "results/las_at"
    """where the results go"""
    extra: str = ""
    """further flags of train_las_at.py for every cell, e.g. --extra="--epochs 5" """
    data_dir: str | None = None
    """data folder (mnist)"""


@dataclass(frozen=True)
class Cell:
    """One run."""

    player: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.player}-seed{self.seed}"


def flags_of(cell: Cell, config: Config) -> list[str]:
    """What `train_las_at.py` is given for one cell."""
    data = ["--data-dir", config.data_dir] if config.data_dir else []
    words = ["--dataset", config.dataset, *data, "--seed", str(cell.seed)]
    return [*words, *shlex.split(config.extra), *cell.flags]


def read(cell: Cell, config: Config) -> dict[str, Any]:
    """What a finished cell found."""
    folder = Path(config.runs_dir) / config.dataset / cell.name
    report = json.loads((folder / "report.json").read_text())
    about = json.loads((folder / "config.json").read_text())
    rows = Metrics.read(folder / "metrics.csv")
    last = rows[-5:]
    return {
        "player": cell.player,
        "seed": cell.seed,
        "n": report["n"],
        "epochs": about["config"]["epochs"],
        "eps0": report["threat"]["eps"],
        "train_n": about["config"]["train_n"],
        "commit": about["commit"],
        "device": about["device"],
        "validation_pgd10": max(row.get("eval/robust", 0.0) for row in rows),
        **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
        "worst_case": report["worst_case"],
        "last_pgd20": report["last"]["pgd20"],
        "flags": [flag["name"] for flag in report["flags"]],
        "forwards_per_image": mean(row[_COST] for row in rows),
        "total_forwards_per_image": sum(row[_COST] for row in rows),
        "train_seconds": rows[-1]["time/seconds"],
        **{
            name.split("/")[1]: mean(row[name] for row in last)
            for name in rows[-1]
            if name.startswith(("strategy/", "game/")) and all(name in row for row in last)
        },
    }


def cells(config: Config) -> list[Cell]:
    """Everything that does not wait for another cell's cost."""
    seeds = range(config.seeds)
    return [Cell(player, seed, PLAYERS[player]) for seed in seeds for player in config.players]


def equal_compute_cells(config: Config, results: list[dict[str, Any]]) -> Iterator[Cell]:
    """Controls with epochs stretched to what reinforce of the same seed spent."""
    by = {(r["player"], r["seed"]): r for r in results}
    for seed in range(min(config.seeds, config.equal_compute_seeds)):
        for player in EQUAL_COMPUTE:
            learned, own = by.get(("reinforce", seed)), by.get((player, seed))
            if learned is None or own is None:
                continue
            ratio = learned["total_forwards_per_image"] / own["total_forwards_per_image"]
            epochs = round(own["epochs"] * ratio)
            flags = (*PLAYERS[player], "--epochs", str(epochs), "--validate-every", "2")
            yield Cell(f"{player}-equal-compute", seed, flags)


def run_all(todo: list[Cell], config: Config) -> list[dict[str, Any]]:
    """Train the cells, a few at a time, and read them."""
    root = Path(config.runs_dir) / config.dataset
    if config.finished_only:
        return [read(c, config) for c in todo if (root / c.name / "report.json").exists()]
    script = Path(__file__).with_name("train_las_at.py")
    run_cells(script, root, {c.name: flags_of(c, config) for c in todo}, config.jobs)
    return [read(cell, config) for cell in todo]


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Spread over seeds, paired differences to random, and at equal compute to REINFORCE."""
    summary: dict[str, dict[str, Any]] = {}
    for player in dict.fromkeys(r["player"] for r in results):
        mine = [r for r in results if r["player"] == player]
        numbers = [
            k for k, v in mine[0].items() if isinstance(v, float) and all(k in r for r in mine)
        ]
        summary[player] = {"seeds": len(mine), "epochs": mine[0]["epochs"]} | {
            key: spread([r[key] for r in mine]) for key in numbers
        }
        for other in ("random", *(["reinforce"] if player.endswith("equal-compute") else [])):
            partner = {r["seed"]: r for r in results if r["player"] == other}
            pairs = [
                r["accuracy_autoattack"] - partner[r["seed"]]["accuracy_autoattack"]
                for r in mine
                if r["seed"] in partner and "accuracy_autoattack" in r
            ]
            if pairs and player != other:
                summary[player][f"autoattack_minus_{other}"] = spread(pairs)
    return summary


def as_markdown(config: Config, results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The comparison for people."""
    columns = {
        "validation_pgd10": "validation PGD-10 (best)",
        "accuracy_clean": "clean",
        "accuracy_pgd20": "PGD-20",
        "accuracy_autoattack": "AutoAttack",
        "autoattack_minus_random": "AA − random, paired, 95 % interval",
        "forwards_per_image": "F per image and step",
        "eps_ratio": "ε/ε₀",
        "entropy_eps": "entropy of ε, nats",
        "attacker_reward": "attacker reward",
    }
    percent = {name for name in columns if name.startswith(("validation", "accuracy"))}
    first = results[0]
    lines = [
        f"# LAS-AT on {config.dataset}: learned strategies against controls",
        "",
        f"ε₀ = {first['eps0']:.3g}, {first['n']} test images, up to {config.seeds} seeds, "
        f"training images: {first['train_n'] or 'all'}; mean ± sd over seeds, in %. "
        "Weights selected on the validation split. Strategy columns: mean of the last 5 epochs. "
        "F: forwards of the defender (input-backward 1, backward with weights 2).",
        "",
        "| player | seeds | epochs | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for player, row in about["summary"].items():
        entries = [
            f"{100 * row[c]['mean']:+.1f} ± {100 * row[c]['half_interval']:.1f}"
            if c in row and c == "autoattack_minus_random"
            else f"{100 * row[c]['mean']:.1f} ± {100 * row[c]['sd']:.1f}"
            if c in row and c in percent
            else f"{row[c]['mean']:.2f}"
            if c in row
            else "–"
            for c in columns
        ]
        lines.append(
            f"| {player} | {row['seeds']} | {row['epochs']} | " + " | ".join(entries) + " |"
        )
    equal = [
        f"{player} {100 * pair['mean']:+.1f} ± {100 * pair['half_interval']:.1f}"
        for player, row in about["summary"].items()
        if (pair := row.get("autoattack_minus_reinforce")) and row["seeds"] > 1
    ]
    if equal:
        lines += ["", f"AutoAttack less REINFORCE's, at its compute, paired: {', '.join(equal)}."]
    flags = ", ".join(sorted({flag for r in results for flag in r["flags"]})) or "none"
    made = ", ".join(sorted({r["commit"][:12] for r in results}))
    lines += ["", f"Flags raised: {flags}.", ""]
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    lines += [f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def picture(config: Config, results: list[dict[str, Any]], path: Path) -> None:
    """Strategy and validation accuracy over time for each player."""
    tags = {
        "strategy/eps_ratio": "mean ε / ε₀",
        "strategy/entropy_eps": "entropy of ε, nats",
        "game/attacker_reward": "attacker reward",
        "eval/robust": "validation PGD-10 accuracy",
    }
    root = Path(config.runs_dir) / config.dataset
    runs: dict[str, list[Rows]] = {}
    for cell in results:
        if cell["player"] in PLAYERS:  # the others' epochs differ from seed to seed
            folder = root / f"{cell['player']}-seed{cell['seed']}"
            runs.setdefault(cell["player"], []).append(Metrics.read(folder / "metrics.csv"))
    title = f"LAS-AT on {config.dataset}: mean and range over {config.seeds} seeds"
    save_figure(seeds_figure(runs, tags, title), path)


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    if unknown := [name for name in config.players if name not in PLAYERS]:
        raise InputError(f"unknown player {unknown[0]!r}: choose from {', '.join(PLAYERS)}")
    wanted = {"reinforce", *EQUAL_COMPUTE}
    if config.equal_compute_seeds and not wanted <= set(config.players):
        raise InputError(f"equal compute needs the players {', '.join(sorted(wanted))}")
    same_flags(Path(config.runs_dir) / config.dataset, config.extra)
    results = run_all(cells(config), config)
    if config.equal_compute_seeds:
        results += run_all(list(equal_compute_cells(config, results)), config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        **made_by(),
        "device": hardware(results, config.jobs),
        "summary": summarise(results),
        "cells": results,
    }
    (out / f"{config.dataset}.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / f"{config.dataset}.md").write_text(as_markdown(config, results, about))
    picture(config, results, out / f"{config.dataset}.png")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

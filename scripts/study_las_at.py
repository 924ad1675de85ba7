"""The LAS-AT comparison: who picks the strategies, and does learning to pick them pay?

    python scripts/study_las_at.py --out runs/results                  # digits, 5 seeds
    python scripts/study_las_at.py --players repo repo-random --missing-only
    python scripts/study_las_at.py --dataset mnist --data-dir DIR --seeds 3 --out runs/results

Each cell is one run of `train_las_at.py` (player x seed) in its own process; finished cells are
kept and interrupted ones resumed, so that the command can be given again. Players: REINFORCE as
the script's default has it (mixed credit), with the other credits, with the leave-one-out
baseline, with a tenth of the entropy bonus (greedy), with a policy that stays as it began (frozen:
what random play is paid), and paid at the published interval only; PPO; the published settings
(repo), and random strategies under them (repo-random: label smoothing, starts and schedule are
repo's); the controls random and fixed (PGD-10 at ε₀: plain PGD-AT); fixed at the strategy of
largest ε, the one R1 pays best. Two controls take variety and strength apart: random-centred draws
around PGD-AT's own strategy, fixed-mean always plays the mean of random. Then controls for as many
forwards and backwards as a learner spent, its look-ahead counted (equal compute).

Writes `<out>/<dataset>.json`, `.md` and `.png`; cells that the results already hold stay there,
also where their folders are gone. The picture is made when all cells have their curves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import train_las_at
import tyro

from advgame.cells import (
    check_cells,
    drawable,
    hardware,
    run_cells,
    same_flags,
    split_flags,
    thinned,
    with_earlier,
)
from advgame.checkpoint import read_json, write_atomically
from advgame.cli import run_script
from advgame.curves import save_figure, seeds_figure
from advgame.errors import InputError, unknown
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
    "reinforce-interval-20": ("--reward-interval", "20"),
    "ppo": ("--agent", "ppo", "--entropy-coef", "0.03"),
    "repo": ("--preset", "repo"),
    "repo-random": ("--preset", "repo", "--agent", "random"),
    "random": ("--agent", "random"),
    "fixed": ("--agent", "fixed"),
    "fixed-largest": ("--agent", "fixed", "--fixed", "15", "10", "5"),
    "random-centred": ("--agent", "random", "--space", "centred"),
    "fixed-mean": ("--agent", "fixed", "--fixed", "9", "9", "3"),
}
# name -> a control, and the learner for whose compute it is trained
EQUAL_COMPUTE = {
    "random-equal-compute": ("random", "reinforce"),
    "fixed-equal-compute": ("fixed", "reinforce"),
    "random-equal-compute-20": ("random", "reinforce-interval-20"),
    "repo-random-equal-compute": ("repo-random", "repo"),
}
# a learner, and what is subtracted from it beside random
PAIRS = (
    ("repo", "repo-random"),
    *((learner, name) for name, (_, learner) in EQUAL_COMPUTE.items()),
)
# column -> its title in the picture
CURVES = {
    "strategy/eps_ratio": "mean ε / ε₀",
    "strategy/entropy_eps": "entropy of ε, nats",
    "game/attacker_reward": "attacker reward",
    "eval/robust": "validation PGD-10 accuracy",
}
Runs = Sequence[Mapping[str, Any]]


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
    """seeds for which controls are also trained at the compute of a learner; 0 for none"""
    missing_only: bool = False
    """leave out what the results hold already, also where its folders are gone"""
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
    return [*words, *split_flags(config.extra), *cell.flags]


def read(cell: Cell, config: Config) -> dict[str, Any]:
    """What a finished cell found."""
    folder = Path(config.runs_dir) / config.dataset / cell.name
    report = read_json(folder / "report.json")
    about = read_json(folder / "config.json")
    rows = Metrics.read(folder / "metrics.csv")
    last = rows[-5:]
    return {
        "method": cell.player,
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
        "curves": thinned(rows, CURVES),
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


def equal_compute_cells(config: Config, runs: Runs) -> Iterator[Cell]:
    """Controls with epochs stretched to what a learner of the same seed spent."""
    by = {(run["method"], run["seed"]): run for run in runs}
    for seed in range(min(config.seeds, config.equal_compute_seeds)):
        for name, (control, learner) in EQUAL_COMPUTE.items():
            learned, own = by.get((learner, seed)), by.get((control, seed))
            if learned is None or own is None:
                continue
            ratio = learned["total_forwards_per_image"] / own["total_forwards_per_image"]
            epochs = round(own["epochs"] * ratio)
            flags = (*PLAYERS[control], "--epochs", str(epochs), "--validate-every", "2")
            yield Cell(name, seed, flags)


def run_all(todo: list[Cell], config: Config, known: Collection[str]) -> list[dict[str, Any]]:
    """Train the cells that are not known, a few at a time, and read them."""
    root = Path(config.runs_dir) / config.dataset
    todo = [cell for cell in todo if cell.name not in known]
    if config.finished_only:
        return [read(c, config) for c in todo if (root / c.name / "report.json").exists()]
    script = Path(__file__).with_name("train_las_at.py")
    run_cells(script, root, {c.name: flags_of(c, config) for c in todo}, config.jobs)
    return [read(cell, config) for cell in todo]


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """Spread over seeds, and AutoAttack's differences paired by seed: to random, and of `PAIRS`."""
    summary: dict[str, dict[str, Any]] = {}
    by = {(run["method"], run["seed"]): run.get("accuracy_autoattack") for run in runs}
    for player in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == player]
        numbers = [
            k for k, v in mine[0].items() if isinstance(v, float) and all(k in r for r in mine)
        ]
        summary[player] = {"seeds": len(mine), "epochs": mine[0]["epochs"]} | {
            key: spread([run[key] for run in mine]) for key in numbers
        }
        for other in ("random", *(control for learner, control in PAIRS if learner == player)):
            pairs = [
                own - by[other, run["seed"]]
                for run in mine
                if (own := run.get("accuracy_autoattack")) is not None
                and by.get((other, run["seed"])) is not None
            ]
            if pairs and player != other:
                summary[player][f"autoattack_minus_{other}"] = spread(pairs)
    return summary


def as_markdown(config: Config, results: Runs, about: Mapping[str, Any]) -> str:
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
        f"ε₀ = {first['eps0']:.3g}, {first['n']} test images, "
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
    found = [(one, two, about["summary"].get(one, {})) for one, two in PAIRS]
    pairs = [
        f"{one} less {two} {100 * pair['mean']:+.1f} ± {100 * pair['half_interval']:.1f}"
        for one, two, row in found
        if (pair := row.get(f"autoattack_minus_{two}")) and row["seeds"] > 1
    ]
    if pairs:
        lines += ["", f"AutoAttack, paired over seeds, 95 % interval: {'; '.join(pairs)}."]
    flags = ", ".join(sorted({flag for r in results for flag in r["flags"]})) or "none"
    made = ", ".join(sorted({r["commit"][:12] for r in results}))
    lines += ["", f"Flags raised: {flags}.", ""]
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    lines += [f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    if odd := [name for name in config.players if name not in PLAYERS]:
        raise unknown("player", odd[0], PLAYERS)
    todo = {cell.name: flags_of(cell, config) for cell in cells(config)}
    check_cells(train_las_at, todo, config.jobs)
    out, extra = Path(config.out) / config.dataset, config.extra
    held = with_earlier([], out.with_suffix(".json"), extra)  # refuses before any training
    there = {*config.players, *(run["method"] for run in held)}
    if config.equal_compute_seeds and not any(there.issuperset(p) for p in EQUAL_COMPUTE.values()):
        raise InputError(
            "equal compute needs a control and its learner, such as the players random and "
            "reinforce: add them, or --equal-compute-seeds 0"
        )
    known = {f"{run['method']}-seed{run['seed']}" for run in held if config.missing_only}
    same_flags(Path(config.runs_dir) / config.dataset, extra)
    made = run_all(cells(config), config, known)
    if config.equal_compute_seeds:
        so_far = with_earlier(made, out.with_suffix(".json"), extra)
        made += run_all(list(equal_compute_cells(config, so_far)), config, known)
    runs = with_earlier(made, out.with_suffix(".json"), extra)
    if not runs:
        raise InputError(f"{config.runs_dir} holds no finished cell: leave --finished-only away")
    runs.sort(key=lambda run: [*PLAYERS, *EQUAL_COMPUTE].index(run["method"]))
    about = {
        **made_by(),
        "device": hardware(runs, config.jobs),
        "extra": extra,
        "summary": summarise(runs),
        "runs": runs,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(about) + "\n")
    write_atomically(out.with_suffix(".md"), as_markdown(config, runs, about))
    shown = [run for run in runs if run["method"] in PLAYERS]  # others' epochs differ by seed
    if all("curves" in run for run in shown):
        title = f"LAS-AT on {config.dataset}: mean and range over seeds"
        save_figure(seeds_figure(drawable(shown), CURVES, title), out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

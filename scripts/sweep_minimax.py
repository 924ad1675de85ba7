"""The rates of Machine vs Machine's two players, chosen on validation images at one seed.

    python scripts/sweep_minimax.py --out runs/results                                # digits
    python scripts/sweep_minimax.py --out runs/results --dataset mnist --data-dir DIR

Each cell is one run of `train_minimax.py` (game x classifier's rate x ratio) in its own process;
finished cells are kept and interrupted ones resumed. The paper's two rates differ by ten:
classifier 1e-4, attacker 1e-3.

What is chosen was fixed before any cell was run: of the cells whose own attacker lives at the
game's end (spread above 0.05, less than half saturated), the one of the smallest mean of two
validation errors, that under a fresh AttNet and that under PGD-10. No test image counts.

Writes `<out>/sweep-<dataset>-<model>-<eps>.json` and `.md`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import train_minimax
import tyro

from advgame.cells import check_cells, run_cells, same_flags, split_flags, with_earlier
from advgame.checkpoint import read_json, write_atomically
from advgame.cli import run_script
from advgame.errors import InputError
from advgame.runs import Metrics, made_by
from agents.attnet import load_attnet

Game = Literal["minimax", "alt"]
COLUMNS = {
    "clean": "clean",
    "fresh": "fresh AttNet",
    "pgd10": "PGD-10",
    "criterion": "mean of the two",
    "own": "own attacker",
    "saturated": "own: saturated",
    "spread": "own: spread",
}


@dataclass(frozen=True)
class Config:
    """Sweep the rates of both players."""

    dataset: Literal["digits", "mnist"] = "digits"
    """data set"""
    model: str = "small_cnn"
    """classifier"""
    eps: str = "0.15"
    """ε in [0, 1] pixels, half of the paper's η"""
    games: tuple[Game, ...] = ("minimax", "alt")
    """which games"""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """of the classifier's Adam"""
    ratios: tuple[float, ...] = (1.0, 3.0, 10.0)
    """attacker's rate over classifier's"""
    gammas: tuple[float, ...] = (1.0,)
    """minimax: γ of the sensitivity penalty"""
    seed: int = 0
    """of all cells"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/minimax-sweep"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""
    extra: str = "--response-steps 1500"
    """further flags of train_minimax.py for every cell"""
    data_dir: str | None = None
    """data folder (all but digits)"""


def cells(config: Config) -> dict[str, list[str]]:
    """Folder -> flags of every cell."""
    shared = ["--dataset", config.dataset, "--model", config.model, "--eps", config.eps]
    shared += ["--data-dir", config.data_dir] if config.data_dir else []
    # the report on test images is as small as it can be, and nobody reads it
    shared += ["--attacks", "fgsm", "--eval-n", "10", "--restarts", "1"]
    shared += ["--seed", str(config.seed), *split_flags(config.extra)]
    made: dict[str, list[str]] = {}
    for game in config.games:
        for gamma in config.gammas if game == "minimax" else (1.0,):
            for rate in config.rates:
                for ratio in config.ratios:
                    name = f"{game}-gamma{gamma:g}-lr{rate:g}-ratio{ratio:g}"
                    flags = ["--defence", game, "--gamma", f"{gamma:g}", "--lr", f"{rate:g}"]
                    made[name] = [*shared, *flags, "--attacker-lr", f"{rate * ratio:g}"]
    return made


def read(folder: Path) -> dict[str, Any]:
    """What a finished cell found on validation images."""
    about = read_json(folder / "config.json")
    settings, last = about["config"], Metrics.read(folder / "metrics.csv")[-1]
    report = read_json(folder / "report.json")
    fresh = load_attnet(folder / "attnet-curr.safetensors").about["validation_accuracies"]
    errors = {"fresh": 1 - min(fresh), "pgd10": 1 - last["eval/robust"]}
    return {
        "method": folder.name,
        "seed": settings["seed"],
        "game": settings["defence"],
        "gamma": settings["gamma"],
        "lr": settings["lr"],
        "attacker_lr": settings["attacker_lr"],
        "steps": int(last["step"]),
        "clean": 1 - last["eval/clean"],
        **errors,
        "criterion": sum(errors.values()) / 2,
        "own": 1 - last["eval/own_attacker"],
        **report["life"]["own"],
        "alive": alive(report["life"]["own"]),
        "commit": about["commit"],
        "device": about["device"],
    }


def alive(signs: Mapping[str, float]) -> bool:
    """Whether a game's attacker may be chosen, by `advgame.health.network_signs`."""
    return signs["spread"] > 0.05 and signs["saturated"] < 0.5


def chosen(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Game -> its cell of the smallest criterion among those whose attacker lives."""
    living = [run for run in runs if run["alive"]]
    games = dict.fromkeys(run["game"] for run in living)
    return {
        game: min((r for r in living if r["game"] == game), key=lambda r: float(r["criterion"]))[
            "method"
        ]
        for game in games
    }


def as_markdown(config: Config, runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# Rates of both players on {config.dataset}, {config.model}, ε = {config.eps}",
        "",
        f"Validation errors of one seed after {runs[0]['steps']} steps; the fresh AttNet is "
        "trained from scratch on the finished classifier. Chosen (bold): the smallest mean of "
        "the errors under a fresh AttNet and under PGD-10, of the cells whose own attacker lives.",
        "",
        "| game | γ | classifier's rate | attacker's | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for run in runs:
        name = run["game"] + ("" if run["alive"] else " (dead)")
        if run["method"] in about["chosen"].values():
            name = f"**{name}**"
        gamma = f"{run['gamma']:g}" if run["game"] == "minimax" else "–"
        words = [name, gamma, f"{run['lr']:g}", f"{run['attacker_lr']:g}"]
        words += [f"{run[column]:.3f}" for column in COLUMNS]
        lines.append("| " + " | ".join(words) + " |")
    commits = ", ".join(sorted({run["commit"][:12] for run in runs}))
    lines += ["", f"Cells made at commit {commits}.", "", f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    name = f"sweep-{config.dataset}-{config.model}-{config.eps.replace('/', 'of')}"
    root, out, todo = Path(config.runs_dir) / name, Path(config.out), cells(config)
    if any(word.startswith("--restarts") for word in split_flags(config.extra)):
        raise InputError("one fresh attacker judges every cell: leave --restarts out of --extra")
    check_cells(train_minimax, todo, config.jobs)
    with_earlier([], out / f"{name}.json", config.extra)  # refuses before any training
    same_flags(root, config.extra)
    run_cells(Path(__file__).with_name("train_minimax.py"), root, todo, config.jobs)
    runs = with_earlier([read(root / cell) for cell in todo], out / f"{name}.json", config.extra)
    runs.sort(key=lambda run: (run["game"], run["gamma"], run["lr"], run["attacker_lr"]))
    about = {**made_by(), "extra": config.extra, "chosen": chosen(runs), "runs": runs}
    write_atomically(out / f"{name}.json", json.dumps(about) + "\n")
    write_atomically(out / f"{name}.md", as_markdown(config, runs, about))
    print(f"{len(runs)} cells; {out}/{name}.md")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

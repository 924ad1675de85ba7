"""The rates of Machine vs Machine's two players, chosen on validation images at one seed.

    python scripts/study.py minimax_rates --out runs/results                                # digits
    python scripts/study.py minimax_rates --out runs/results --dataset mnist --data-dir DIR

A cell is a game x classifier's rate x ratio. The paper's two rates differ by ten: classifier 1e-4,
attacker 1e-3.

What is chosen was fixed before any cell was run: of the cells whose own attacker lives at the
game's end (spread above 0.05, less than half saturated), the one of the smallest mean of two
validation errors, that under a fresh AttNet and that under PGD-10. No test image counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import train_minimax
from typing_extensions import override

from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run import table
from advgame.run.cells import split_flags
from advgame.run.options import Count
from advgame.run.table import Run, Runs
from advgame.run.training_study import Finished, MethodsConfig, MethodsStudy
from agents.attackers import load_network

COLUMNS = {
    "clean": "clean",
    "fresh": "fresh AttNet",
    "pgd10": "PGD-10",
    "criterion": "mean of the two",
    "own": "own attacker",
    "saturated": "own: saturated",
    "spread": "own: spread",
}
# name -> flags of train_minimax.py
METHODS = {"minimax": "--defence minimax", "alt": "--defence alt"}


@dataclass(frozen=True)
class Config(MethodsConfig):
    """Sweep the learning rates of both players."""

    model: str = "small_cnn"
    """classifier"""
    eps: str = "0.15"
    """ε in [0, 1] pixels, half of the paper's η"""
    methods: tuple[str, ...] = ("minimax", "alt")
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """of the classifier's Adam"""
    ratios: tuple[float, ...] = (1.0, 3.0, 10.0)
    """attacker's rate over classifier's"""
    gammas: tuple[float, ...] = (1.0,)
    """minimax: γ of the sensitivity penalty"""
    seeds: Count = 1
    runs_dir: str = "runs/minimax-sweep"
    out: str = "results/minimax"
    extra: str = "--response-steps 1500"


class RatesStudy(MethodsStudy[Config]):
    """The study of both players' learning rates, by their errors on validation images."""

    about, script, methods = "Rates of both players", train_minimax, METHODS
    files = "sweep-{dataset}-{model}-{eps}"
    ending = ("Cells made at commit {commits}.", "Command: `{command}`.")

    @override
    def check(self) -> None:
        super().check()
        if self.config.seeds > 1 or self.config.attacks:
            raise InputError("one seed chooses, on validation images: no --seeds, no --attacks")
        if any(word.startswith("--restarts") for word in split_flags(self.config.extra)):
            raise InputError("one fresh attacker judges every cell: no --restarts in --extra")

    def shared(self) -> list[str]:
        """Flags of every cell; the report on test images is as small as can be: nobody reads it."""
        report = ["--attacks", "fgsm", "--eval-n", "10", "--restarts", "1"]
        config = self.config
        return [*report, *super().shared(), "--model", config.model, "--eps", config.eps]

    @override
    def cells(self) -> dict[str, list[str]]:
        config, made = self.config, dict[str, list[str]]()
        seed = str(config.first_seed)
        for game in config.methods:
            gammas = config.gammas if game == "minimax" else (1.0,)
            for gamma, rate, ratio in product(gammas, config.rates, config.ratios):
                words = [*self.flags(game), "--seed", seed, "--lr", f"{rate:g}"]
                words += ["--gamma", f"{gamma:g}"] if game == "minimax" else []
                name = f"{game}-gamma{gamma:g}-lr{rate:g}-ratio{ratio:g}-seed{seed}"
                made[name] = [*words, "--attacker-lr", f"{rate * ratio:g}"]
        return made

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found on validation images."""
        cell = Finished(folder)
        settings, last = cell.settings, cell.rows[-1]
        fresh = load_network(folder / "attnet-curr.safetensors").about["validation_accuracies"]
        errors = {"fresh": 1 - min(fresh), "pgd10": 1 - last["eval/robust"]}
        return {
            **cell.facts(),
            "game": settings["defence"],
            **{name: settings[name] for name in ("gamma", "lr", "attacker_lr")},
            "steps": int(last["step"]),
            "clean": 1 - last["eval/clean"],
            **errors,
            "criterion": sum(errors.values()) / 2,
            "own": 1 - last["eval/own_attacker"],
            **cell.report["life"]["own"],
            "alive": alive(cell.report["life"]["own"]),
        }

    @override
    def place(self, run: Run) -> tuple[str, float, float, float]:
        return run["game"], run["gamma"], run["lr"], run["attacker_lr"]

    def found(self, runs: Runs) -> dict[str, Any]:
        """The cell that is chosen for each game."""
        return {"chosen": chosen(runs)}

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The table for people: a line per cell."""
        config, lines = self.config, []
        for run in runs:
            name = run["game"] + ("" if run["alive"] else " (dead)")
            if run["method"] in about["chosen"].values():
                name = f"**{name}**"
            gamma = f"{run['gamma']:g}" if run["game"] == "minimax" else "–"
            rates = f"{run['lr']:g}", f"{run['attacker_lr']:g}"
            lines.append([name, gamma, *rates, *(f"{run[column]:.3f}" for column in COLUMNS)])
        return [
            f"# {self.about} on {short_name(config.dataset)}, {config.model}, ε = {config.eps}",
            f"Validation errors of one seed after {runs[0]['steps']} steps; the fresh AttNet is "
            "trained from scratch on the finished classifier. Chosen (bold): the smallest mean of "
            "the errors under a fresh AttNet and under PGD-10, of the cells whose own attacker "
            "lives.",
            table.markdown(
                ["game", "γ", "classifier's rate", "attacker's", *COLUMNS.values()], lines
            ),
        ]


def alive(signs: Mapping[str, float]) -> bool:
    """Whether a game's attacker may be chosen, by `advgame.health.network_signs`."""
    return signs["spread"] > 0.05 and signs["saturated"] < 0.5


def chosen(runs: Runs) -> dict[str, str]:
    """Game -> its cell of the smallest criterion among those whose attacker lives."""
    living = [run for run in runs if run["alive"]]
    games = dict.fromkeys(run["game"] for run in living)
    return {
        game: min((r for r in living if r["game"] == game), key=lambda r: float(r["criterion"]))[
            "method"
        ]
        for game in games
    }


main = RatesStudy.main

"""LAS-AT: who picks the strategies, and does learning to pick them pay?

    python scripts/study.py las_at --out runs/results                  # digits, 5 seeds
    python scripts/study.py las_at --methods repo repo-random --missing-only
    python scripts/study.py las_at --dataset mnist --data-dir DIR --seeds 3 --out runs/results

Methods are players: REINFORCE as the script's default has it (mixed credit), with the other
credits, with the leave-one-out baseline, with a tenth of the entropy bonus (greedy), with a policy
that stays as it began (frozen: what random play is paid), and paid at the published interval only;
PPO; the published settings (repo), and random strategies under them (repo-random: label smoothing,
starts and schedule are repo's); the controls random and fixed (PGD-10 at ε₀: plain PGD-AT); fixed
at the strategy of largest ε, the one R1 pays best. Two controls take variety and strength apart:
random-centred draws around PGD-AT's own strategy, fixed-mean always plays the mean of random. Then
controls for as many forwards and backwards as a learner spent, its look-ahead counted (equal
compute). The picture is made when all cells have their curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import train_las_at

from advgame.errors import InputError
from advgame.run.cells import drawable, thinned
from advgame.run.cells import summarise as over_seeds
from advgame.run.curves import save_figure, seeds_figure
from advgame.run.files import read_json
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


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare strategy players over seeds."""

    dataset: Literal["digits", "mnist"] = "digits"
    """data set"""
    seeds: int = 5
    """seeds 0, 1, … per player"""
    methods: tuple[str, ...] = tuple(PLAYERS)
    """which players"""
    equal_compute_seeds: int = 5
    """seeds for which controls are also trained at the compute of a learner; 0 for none"""
    out: str = "results/las_at"
    """where the results go"""


class LasStudy(Study[Config]):
    """Players and controls, at equal epochs and at equal compute."""

    script = train_las_at
    methods = PLAYERS

    @property
    def stem(self) -> str:
        """The data set."""
        return self.config.dataset

    def check(self) -> None:
        """Refuse what cannot work, before any work."""
        super().check()
        path = Path(self.config.out) / f"{self.stem}.json"
        held = read_json(path)["runs"] if path.exists() else []
        there = {*self.config.methods, *(run["method"] for run in held)}
        pairs = EQUAL_COMPUTE.values()
        if self.config.equal_compute_seeds and not any(there.issuperset(pair) for pair in pairs):
            raise InputError(
                "equal compute needs a control and its learner, such as the players random and "
                "reinforce: add them, or --equal-compute-seeds 0"
            )

    def later_cells(self, runs: Runs) -> dict[str, list[str]]:
        """Controls with epochs stretched to what a learner of the same seed spent."""
        by = {(run["method"], run["seed"]): run for run in runs}
        found = {}
        for seed in range(min(self.config.seeds, self.config.equal_compute_seeds)):
            for name, (control, learner) in EQUAL_COMPUTE.items():
                learned, own = by.get((learner, seed)), by.get((control, seed))
                if learned is None or own is None:
                    continue
                ratio = learned["total_forwards_per_image"] / own["total_forwards_per_image"]
                length = ["--epochs", str(round(own["epochs"] * ratio)), "--validate-every", "2"]
                flags = ["--seed", str(seed), *self.shared(), *PLAYERS[control], *length]
                found[f"{name}-seed{seed}"] = flags
        return found

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found."""
        cell = Finished(folder)
        report, rows, settings = cell.report, cell.rows, cell.settings
        last = rows[-5:]
        return {
            **cell.facts(),
            "epochs": settings["epochs"],
            "eps0": report["threat"]["eps"],
            "train_n": settings["train_n"],
            "validation_pgd10": max(row.get("eval/robust", 0.0) for row in rows),
            **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
            "worst_case": report["worst_case"],
            "last_pgd20": report["last"]["pgd20"],
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

    def place(self, run: Run) -> int:
        """Players, then controls at equal compute."""
        return [*PLAYERS, *EQUAL_COMPUTE].index(run["method"])

    def found(self, runs: Runs) -> dict[str, Any]:
        """With AutoAttack's differences."""
        return {"summary": summarise(runs)}

    def markdown(self, runs: Runs, about: Mapping[str, Any]) -> str:
        """The comparison for people."""
        return as_markdown(self.config.dataset, runs, about)

    def pictures(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        """Strategies and accuracies while they learn."""
        shown = [run for run in runs if run["method"] in PLAYERS]  # others' epochs differ by seed
        if all("curves" in run for run in shown):
            title = f"LAS-AT on {self.config.dataset}: mean and range over seeds"
            save_figure(seeds_figure(drawable(shown), CURVES, title), path.with_suffix(".png"))


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """Spread over seeds, and AutoAttack's differences paired by seed: to random, and of `PAIRS`."""
    summary = over_seeds(runs)
    by = {(run["method"], run["seed"]): run.get("accuracy_autoattack") for run in runs}
    for player, row in summary.items():
        mine = [run for run in runs if run["method"] == player]
        row["epochs"] = mine[0]["epochs"]
        for other in ("random", *(control for learner, control in PAIRS if learner == player)):
            pairs = [
                own - by[other, run["seed"]]
                for run in mine
                if (own := run.get("accuracy_autoattack")) is not None
                and by.get((other, run["seed"])) is not None
            ]
            if pairs and player != other:
                row[f"autoattack_minus_{other}"] = spread(pairs)
    return summary


def as_markdown(dataset: str, runs: Runs, about: Mapping[str, Any]) -> str:
    """The table of `summarise`."""
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
    first = runs[0]
    lines = [
        f"# LAS-AT on {dataset}: learned strategies against controls",
        "",
        f"ε₀ = {first['eps0']:.3g}, {first['n']} test images, "
        f"training images: {first['train_n'] or 'all'}; mean ± sd over seeds, in %. "
        "Weights selected on the validation split. Strategy columns: mean of the last 5 epochs. "
        "F: forwards of the defender (input-backward 1, backward with weights 2).",
        "",
        *markdown_table(
            ["player", "seeds", "epochs", *columns.values()],
            [
                [player, str(row["seeds"]), str(row["epochs"]), *(_cell(row, c) for c in columns)]
                for player, row in about["summary"].items()
            ],
        ),
    ]
    found = [(one, two, about["summary"].get(one, {})) for one, two in PAIRS]
    pairs = [
        f"{one} less {two} {100 * pair['mean']:+.1f} ± {100 * pair['half_interval']:.1f}"
        for one, two, row in found
        if (pair := row.get(f"autoattack_minus_{two}")) and row["seeds"] > 1
    ]
    if pairs:
        lines += ["", f"AutoAttack, paired over seeds, 95 % interval: {'; '.join(pairs)}."]
    return "\n".join([*lines, *provenance_lines(runs, about)])


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        return "–"
    one = row[column]
    if column == "autoattack_minus_random":
        return f"{100 * one['mean']:+.1f} ± {100 * one['half_interval']:.1f}"
    if column.startswith(("validation", "accuracy")):
        return f"{100 * one['mean']:.1f} ± {100 * one['sd']:.1f}"
    return f"{one['mean']:.2f}"


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    LasStudy(config).main()

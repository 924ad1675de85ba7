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
compute). The picture shows the players whose cells have their curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import train_las_at
from typing_extensions import override

from advgame.errors import InputError
from advgame.run import table
from advgame.run.cells import split_flags, values_of
from advgame.run.options import Count, Whole
from advgame.run.table import Columns, Run, Runs
from advgame.run.training_study import (
    Finished,
    MethodsConfig,
    MethodsStudy,
    thinned,
    training_images,
)

_COST = "attacker/forwards_per_image"

# name -> flags of train_las_at.py
PLAYERS = {
    "reinforce": "",
    "reinforce-sample": "--credit sample",
    "reinforce-batch": "--credit batch",
    "reinforce-loo": "--baseline loo",
    "reinforce-greedy": "--entropy-coef 0.01",
    "reinforce-frozen": "--policy-lr 1e-12",
    "reinforce-interval-20": "--reward-interval 20",
    "ppo": "--agent ppo --entropy-coef 0.03",
    "repo": "--preset repo",
    "repo-random": "--preset repo --agent random",
    "random": "--agent random",
    "fixed": "--agent fixed",
    "fixed-largest": "--agent fixed --fixed 15 10 5",
    "random-centred": "--agent random --space centred",
    "fixed-mean": "--agent fixed --fixed 9 9 3",
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
    "game/attacker_reward": "reward, R1 + R2 + R3",
    "eval/robust": "validation accuracy under PGD-10",
}
COLUMNS: Columns = {
    "player": table.row_name,
    "seeds": table.seeds,
    "epochs": table.epochs,
    "validation PGD-10 (best)": table.Percent("validation_pgd10"),
    "clean": table.Percent("accuracy_clean"),
    "PGD-20": table.Percent("accuracy_pgd20"),
    "AutoAttack": table.Percent("accuracy_autoattack"),
    "AA − random, paired, 95 % interval": table.Paired("accuracy_autoattack", minus="random"),
    "F per image and step": table.Mean("forwards_per_image", 2),
    "ε/ε₀": table.Mean("eps_ratio", 2),
    "entropy of ε, nats": table.Mean("entropy_eps", 2),
    "attacker reward": table.Mean("attacker_reward", 2),
}


@dataclass(frozen=True)
class Config(MethodsConfig):
    """Compare LAS-AT's strategy players with controls over seeds."""

    seeds: Count = 5
    methods: tuple[str, ...] = tuple(PLAYERS)
    equal_compute_seeds: Whole = 5
    """seeds for which controls are also trained at the compute of a learner; 0 for none"""
    out: str = "results/las_at"


class LasStudy(MethodsStudy[Config]):
    """Players and controls, at equal epochs and at equal compute."""

    about, script, methods, curves = "LAS-AT on {dataset}", train_las_at, PLAYERS, CURVES
    control = "random"

    @override
    def check(self) -> None:
        super().check()
        if not self.config.equal_compute_seeds:
            return
        there = {*self.config.methods, *(run["method"] for run in self.earlier())}
        pairs = EQUAL_COMPUTE.values()
        if "budget" in values_of(split_flags(self.config.extra)):
            raise InputError(
                "controls of equal compute have epochs of their own, --budget would end them at "
                "one cost: --equal-compute-seeds 0 beside it"
            )
        if not any(there.issuperset(pair) for pair in pairs):
            raise InputError(
                "equal compute needs a control and its learner, such as the players random and "
                "reinforce: add them, or --equal-compute-seeds 0"
            )

    def later_cells(self, runs: Runs) -> dict[str, list[str]]:
        """Controls with epochs stretched to what a learner of the same seed spent."""
        by = {(run["method"], run["seed"]): run for run in runs}
        found = {}
        for seed in self.seeds()[: self.config.equal_compute_seeds]:
            for name, (control, learner) in EQUAL_COMPUTE.items():
                learned, own = by.get((learner, seed)), by.get((control, seed))
                if learned is None or own is None:
                    continue
                ratio = learned["total_forwards_per_image"] / own["total_forwards_per_image"]
                length = ["--epochs", str(round(own["epochs"] * ratio)), "--validate-every", "2"]
                found[f"{name}-seed{seed}"] = [*self.flags(control), "--seed", str(seed), *length]
        return found

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        cell = Finished(folder)
        report, rows = cell.report, cell.rows
        last = rows[-5:]
        return {
            **cell.facts(),
            "epochs": cell.trained_epochs(),
            "norm": report["threat"]["norm"],
            "eps0": report["threat"]["eps"],
            "train_n": cell.settings["train_n"],
            "validation_pgd10": max(row.get("eval/robust", 0.0) for row in rows),
            **cell.accuracies(),
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

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        first = runs[0]
        pairs = [
            f"{one} less {two} {table.Paired('accuracy_autoattack', minus=two).show(gaps)}"
            for one, two in PAIRS
            if len(gaps := table.differences(runs, "accuracy_autoattack", one, two)) > 1
        ]
        told = (
            [f"AutoAttack, paired over seeds, 95 % interval: {'; '.join(pairs)}."] if pairs else []
        )
        return [
            f"# {self.title}: learned strategies against controls",
            f"{table.radius(first, 'eps0', 'ε₀')}, {first['n']} test images, "
            f"{training_images(first)}; mean ± sd over seeds, in %. "
            "Weights selected on the validation split. Strategy columns: mean of the last 5 "
            "epochs. F: forwards of the defender (input-backward 1, backward with weights 2).",
            table.render(COLUMNS, table.rows(runs)),
            *told,
        ]


main = LasStudy.main

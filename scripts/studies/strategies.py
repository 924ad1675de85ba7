"""Does learning whom to attack how long pay, at equal compute? Learned players against controls.

    python scripts/study.py strategies --resplit 7 --first-seed 100    # digits, exploration
    python scripts/study.py strategies --resplit 11                    # digits, 5 seeds
    python scripts/study.py strategies --methods stopper random pgd-at pgd-at-2 --finished-only

All players spend the same counted forwards per training image (--forwards; `study.py compare` says
how), on the same data, network, schedule and seeds. What is compared is which test image survives
AutoAttack (where --attacks has it not: all attacks), as differences of two players with the same
seed on the same image. Intervals are over seeds and images (`advgame.statistics.crossed_interval`).

Two contrasts are primary, and their p-values are adjusted by Holm's method: --learned less random
strategies, and less the best fixed PGD-AT, whose number of steps is chosen by validation accuracy
under PGD-10, mean over seeds. All others are descriptive.

Writes `<out>/<stem>.json`, `.csv`, `.md`, `.png`, and `<stem>-differences.csv` and `.png`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from typing_extensions import override

from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.evaluation.pictures import differences_figure
from advgame.games.stopping import FEATURES
from advgame.run import table
from advgame.run.curves import save_figure
from advgame.run.files import digest, read_json, write_atomically
from advgame.run.options import Count, Names, Positive, Whole
from advgame.run.table import Runs
from advgame.run.training_study import selection, training_images
from advgame.statistics import crossed_interval, holm
from agents.stopper_file import NAME as STOPPER_FILE
from studies import compare
from studies.compare import CONTROL, GAMES, MORE

_LAS = "train_las_at.py"
_LISTS = "--space eps=4,8,12 steps=2,5,10 step_size=2,4"
# the default lists
_RADII = f"eps={','.join(map(str, range(3, 16)))}"
_STEPS = f"steps={','.join(map(str, range(3, 15)))}"
_SMOOTHED = "--true-probability 0.7"
_OF_THE_IMAGE = [name for name in FEATURES if name not in ("one", "done", "eps")]
STOPPER, FROZEN, BEST = "stopper", "stopper-frozen", "best fixed PGD-AT"
# name -> script and flags
PLAYERS = {
    **{name: MORE[name] for name in (STOPPER, "shuffled", "short", "fat")},
    "random": f"{_LAS} --agent random",
    "thompson": f"{_LAS} --agent thompson",
    "linucb": f"{_LAS} --agent linucb",
    "steady": f"{_LAS} --agent steady",
    "thompson-lists": f"{_LAS} --agent thompson {_LISTS}",
    "linucb-lists": f"{_LAS} --agent linucb {_LISTS}",
    "steady-lists": f"{_LAS} --agent steady {_LISTS}",
    # the published policy, at its interval and with its smoothing
    "policy": f"{_LAS} --reward-interval 20 {_SMOOTHED}",
    "random-smoothed": f"{_LAS} --agent random {_SMOOTHED}",
    **{name: MORE[name] for name in ("pgd-at-2", "pgd-at-4", "pgd-at-7")},
    **{name: GAMES[name] for name in (CONTROL, "n-fgsm", "trades")},
}
FIXED = ("pgd-at-2", "pgd-at-4", "pgd-at-7", CONTROL)
# asked for by name
ABLATIONS = {
    # the stopper's and short's means of ε, steps and step size, the same for every image
    "fixed-mean": f"{_LAS} --agent fixed --fixed 9 4 3",
    # one thing drawn or learned, all else as the fixed PGD-AT of as many steps has it
    "fixed-eps": f"{_LAS} --agent fixed --fixed 9 7 2",
    # the best fixed PGD-AT's radius tuned on validation, as its number of steps is
    **{f"fixed-eps-{eps}": f"{_LAS} --agent fixed --fixed {eps} 7 2" for eps in (10, 12, 14)},
    "random-eps": f"{_LAS} --agent random --space {_RADII} steps=7 step_size=2",
    "random-eps-4": f"{_LAS} --agent random --space {_RADII} steps=4 step_size=3",
    "random-steps": f"{_LAS} --agent random --space eps=8 {_STEPS} step_size=2",
    "stopper-steps": f"{MORE[STOPPER]} --space eps=8 {_STEPS} step_size=3",
    "stopper-60": MORE[STOPPER],
    # learns how many steps a radius gets, and sees nothing of an image under attack
    "stopper-eps-alone": f"{MORE[STOPPER]} --without {' '.join(_OF_THE_IMAGE)}",
    # about where the adapted one is in the middle of a training
    "stopper-threshold": f"{MORE[STOPPER]} --threshold 0.02",
    FROZEN: MORE[STOPPER],
    **{
        f"stopper-no-{name}": f"{MORE[STOPPER]} --without {name}"
        for name in FEATURES
        if name != "one"
    },
}
SHARES = {"stopper-60": 0.6}
"""Of the budget, where it is less."""
# descriptive: one less the other, where both are there
CONTRASTS = (
    *((STOPPER, other) for other in ("shuffled", "short", "fat", "n-fgsm", "trades", "policy")),
    ("thompson", "steady"),
    ("linucb", "steady"),
    ("thompson-lists", "steady-lists"),
    ("linucb-lists", "steady-lists"),
    ("thompson", "random"),
    ("policy", "random-smoothed"),
    ("random-smoothed", "random"),
    ("random", BEST),
    ("short", BEST),
    ("stopper-60", BEST),
    ("random-eps", "pgd-at-7"),
    *((f"fixed-eps{more}", "pgd-at-7") for more in ("", "-10", "-12", "-14")),
    ("random-eps", "fixed-eps"),
    ("random-eps-4", "fixed-mean"),
    ("short", "fixed-mean"),
    ("fixed-mean", "pgd-at-4"),
    ("random-steps", "pgd-at-7"),
    ("stopper-steps", "pgd-at-4"),
    ("stopper-steps", BEST),
    *((name, STOPPER) for name in ABLATIONS if name not in SHARES),
)
WIDEST = 0.2
"""Intervals of the picture; two seeds may give wider ones, beside which no other can be read."""
Contrast = dict[str, Any]


@dataclass(frozen=True)
class Config(compare.Config):
    """Compare players of the attack's strategy at one budget of counted forwards."""

    seeds: Count = 5
    methods: tuple[str, ...] = tuple(PLAYERS)
    """which players; left out by default: fixed-mean, fixed-eps, random-eps, random-eps-4,
    random-steps and stopper-steps (one thing changed, drawn or learned alone), fixed-eps-10,
    fixed-eps-12 and fixed-eps-14 (a larger radius, in eighths of the ball's), stopper-60 (at 60 %
    of the budget), stopper-eps-alone, stopper-threshold, stopper-no-FEATURE and stopper-frozen"""
    learned: str = STOPPER
    """of the primary contrasts"""
    resplit: Whole = 0
    """digits alone: cut validation and test images anew with this seed; 0 has the usual ones"""
    stopper: str | None = None
    """run folder or stopper.json that stopper-frozen plays"""
    budget: compare.Budget = "compute"
    forwards: Positive | None = 920.0
    """budget of a whole training, per training image"""
    attacks: Names = ("adt:pgd20", "autoattack")
    runs_dir: str = "runs/strategies"
    out: str = "results/strategies"


class Strategies(compare.Compare):
    """Trainings at one budget, and paired differences of who survives."""

    config: Config
    about, files = "Strategies", "{dataset}-split{resplit}-{forwards:g}"
    methods = PLAYERS | ABLATIONS

    @override
    def images(self) -> list[str]:
        if not self.config.resplit:
            return super().images()
        return ["--dataset", f"advgame.data.resplit:digits({self.config.resplit})"]

    @override
    def check(self) -> None:
        super().check()
        config = self.config
        if config.forwards is None:
            raise InputError("players are compared at one budget: give --forwards")
        if config.resplit and config.dataset != "digits":
            raise InputError(f"--resplit is for digits, not for {short_name(config.dataset)}")
        if (FROZEN in config.methods) != (config.stopper is not None):
            raise InputError(f"{FROZEN} plays what --stopper names: give both, or neither")

    @cached_property
    def frozen(self) -> str:
        """SHA-256 of the rule that `stopper-frozen` plays; "" where it is not asked for."""
        return rule_digest(self.config.stopper) if self.config.stopper else ""

    @override
    def prepare(self, cells: Mapping[str, Sequence[str]]) -> None:
        super().prepare(cells)
        held = {run.get("stopper") for run in self.earlier() if run["method"] == FROZEN}
        made = map(read_json, self.root.glob(f"{FROZEN}-seed*/config.json"))
        held |= {rule_digest(one["config"]["stopper"]) for one in made}
        if self.frozen and held - {self.frozen, "", None}:  # None: older; "": its file is gone
            raise InputError(
                f"{FROZEN} has cells of another rule than {self.config.stopper}: choose another "
                "--out and --runs-dir"
            )

    @override
    def lengths(self) -> dict[str, list[str]]:
        found = super().lengths()
        for name in found.keys() & SHARES.keys():
            found[name] = [
                *found[name],
                "--budget",
                f"{SHARES[name] * (self.config.forwards or 0):g}",
            ]
        return found

    @override
    def flags(self, method: str) -> list[str]:
        frozen = ["--stopper", str(self.config.stopper)] if method == FROZEN else []
        return [*super().flags(method), *frozen]

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        text = (self.judged / folder.name / "verdicts.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        judges = [name for name in rows[0] if name not in ("image", "label")]
        if "autoattack" in judges:
            judges = ["clean", "autoattack"]
        survives = (all(float(row[name]) for name in judges) for row in rows)
        rule = {"stopper": self.frozen} if folder.name.startswith(f"{FROZEN}-seed") else {}
        survived = "".join(str(int(one)) for one in survives)
        return {**super().read(folder), **rule, "survives": survived}

    @override
    def found(self, runs: Runs) -> dict[str, Any]:
        best = best_fixed(runs)
        contrasts = find_contrasts(runs, self.config.learned, best)
        return {**super().found(runs), "best_fixed": ", ".join(best), "contrasts": contrasts}

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        first, contrasts = runs[0], about["contrasts"]
        head, *body = self.table(runs)
        flagged = [[*line, compare.flags_of(line[0], runs)] for line in body]
        best = about["best_fixed"] or "none of them is there"
        judge = "AutoAttack" if "accuracy_autoattack" in first else "all attacks"
        split = f", split {self.config.resplit}" if self.config.resplit else ""
        return [
            f"# {self.about} on {short_name(self.config.dataset)}{split}, equal passes",
            f"{table.radius(first)}, {first['n']} test images, {training_images(first)}; "
            f"mean ± sd over seeds, in %. {selection(runs)}. F: forwards of the classifier "
            "(input-backward 1, backward with weights 2), all that a player's pay costs among "
            f"them.{compare.told_budget(about)}",
            table.markdown([*head, "flags"], flagged),
            "## Differences",
            f"Share of the test images that survive {judge}, of one player less that of another "
            "with the same seeds on the same images, in points, with 95 % intervals over seeds and "
            f"images. Best fixed PGD-AT, by validation: {best}. Holm: p-values of the primary "
            "contrasts, adjusted for their number; the intervals are not adjusted. The picture "
            f"leaves out descriptive ones whose interval is {100 * WIDEST:.0f} points wide or "
            "wider.",
            table.markdown(*_lines(contrasts)) if contrasts else "None: they need two seeds.",
        ]

    @override
    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        super().pictures(runs, about)
        contrasts = about["contrasts"]
        if not contrasts:
            return
        head, body = _lines(contrasts)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *body])
        beside = self.path.with_name(f"{self.path.stem}-differences.csv")
        write_atomically(beside, text.getvalue())
        title = f"{self.about} on {short_name(self.config.dataset)}, {first_budget(about)}"
        shown = [one for one in contrasts if one["primary"] or one["high"] - one["low"] < WIDEST]
        save_figure(differences_figure(shown, title), beside.with_suffix(".png"))


def rule_digest(words: str) -> str:
    """SHA-256 of a stopping rule's file, which a run folder may stand for; "" if it is gone."""
    path = Path(words) / STOPPER_FILE if Path(words).is_dir() else Path(words)
    return digest(path) if path.is_file() else ""


def first_budget(about: Mapping[str, Any]) -> str:
    """The budget of a results file in words."""
    return f"{about['budget']:g} forwards per training image"


def best_fixed(runs: Runs) -> list[str]:
    """The fixed PGD-AT with the best validation accuracy, mean over seeds: all where several tie.

    A tie is usual: the mean is a count of images, over few of them.
    """
    scores = {
        name: mean(found)
        for name in FIXED
        if (found := [run["validation"] for run in runs if run["method"] == name])
    }
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if isclose(score, best, abs_tol=1e-9)]


def find_contrasts(runs: Runs, learned: str, best: Sequence[str]) -> list[Contrast]:
    """All differences that two or more common seeds tell; the primary ones first.

    Args:
        runs: ``method``, ``seed``, and ``survives``, a 0 or 1 per image.
        learned: the player of the primary contrasts.
        best: the fixed PGD-ATs that stand for `BEST`, each in a contrast of its own.
    """
    primary = ((learned, "random"), *((learned, one) for one in best))
    rest = ((one, own) for one, other in CONTRASTS for own in (best if other == BEST else [other]))
    found = list[Contrast]()
    for pair in dict.fromkeys((*primary, *rest)):
        tables = survivals(runs, pair)
        if tables is None:
            continue
        interval = crossed_interval(tables[0] - tables[1])
        words = {"name": " less ".join(pair), "primary": pair in primary}
        found.append({**words, "seeds": len(tables[0]), **interval})
    first = [one for one in found if one["primary"]]
    for contrast, p in zip(first, holm([one["p"] for one in first]), strict=True):
        contrast["holm"] = p
    return found


def survivals(runs: Runs, pair: Sequence[str]) -> list[torch.Tensor] | None:
    """(seeds, images) of each of two methods, of their common seeds; None of fewer than two.

    Raises:
        InputError: cells that were judged on other images.
    """
    own = [{run["seed"]: run["survives"] for run in runs if run["method"] == one} for one in pair]
    common = sorted(own[0].keys() & own[1].keys())
    if len(common) < 2 or pair[0] == pair[1]:
        return None
    if len({len(one[seed]) for one in own for seed in common}) > 1:
        raise InputError(f"{pair[0]} and {pair[1]} were judged on different numbers of images")
    return [torch.tensor([[float(k) for k in one[seed]] for seed in common]) for one in own]


def _lines(contrasts: Sequence[Contrast]) -> tuple[list[str], list[list[str]]]:
    """The table of differences: head and body."""
    head = ["difference", "", "seeds", "points", "95 % interval", "p", "p, Holm"]
    body = [
        [
            one["name"],
            "primary" if one["primary"] else "",
            str(one["seeds"]),
            f"{100 * one['mean']:+.1f}",
            f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}",
            *(f"{one[key]:.3f}" if one["primary"] else "" for key in ("p", "holm")),
        ]
        for one in contrasts
    ]
    return head, body


main = Strategies.main

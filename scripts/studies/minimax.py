"""Machine vs Machine: defences against fresh attackers, AutoAttack among them.

    python scripts/study.py minimax --out runs/results                         # digits
    python scripts/study.py minimax --out runs/results --dataset mnist --data-dir DIR --eps 0.15

Numbers are error rates, as in the paper: higher is better for the attacker. Beside its tables 3 to
5: what AutoAttack says, the worst case over FGSM, PGD and AttNet (the mixture of section 5.1), and
lemma 1 on the measured risks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import train_minimax

from advgame.errors import InputError
from advgame.run.cells import drawable, split_flags, summarise, thinned
from advgame.run.curves import save_figure, seeds_figure
from advgame.run.folder import Metrics
from advgame.run.options import Names, parse_eps
from advgame.run.study import (
    Finished,
    Runs,
    Study,
    StudyConfig,
    markdown_table,
    provenance_lines,
)
from advgame.statistics import spread
from studies._lemma import lemma_one

# what `study.py minimax_rates` chose for Minimax and for Alt, on validation images of MNIST
RATES = ("--lr", "3e-4", "--attacker-lr", "3e-3")
# AttNet to the paper's letter, in the game and from scratch, at equal rates: it dies
LETTER = ("--no-centre", "--output-scale", "0", "--attacker-lr", "1e-3")
# name -> flags of train_minimax.py
METHODS: dict[str, tuple[str, ...]] = {
    "plain": ("--defence", "plain"),
    "lwa": ("--defence", "lwa"),
    "sens": ("--defence", "sens"),
    "pgd": ("--defence", "pgd"),
    "minimax": ("--defence", "minimax", *RATES),
    "alt": ("--defence", "alt", *RATES),
    "maximin": ("--defence", "maximin", *RATES),
    "minimax-letter": ("--defence", "minimax", *LETTER),
    "alt-letter": ("--defence", "alt", *LETTER),
    "minimax-5": ("--defence", "minimax", "--ascent-steps", "5", *RATES),
    "mixture": ("--defence", "mixture"),
    "mixture-weak": ("--defence", "mixture", "--mixture", "fgsm", "attnet"),
    "mixture-batch": ("--defence", "mixture", "--per", "batch"),
    "mixture-3": (
        "--defence",
        "mixture",
        "--mixture",
        "fgsm",
        "pgd",
        "attnet",
        "attnet2",
        "attnet3",
    ),
}
FGSM, CURR = "mvm:fgsm", "learned:attnet-curr"
# worst cases over what the mixtures play against, made for the classifier under test
WORST = {"types": (FGSM, "pgd20", CURR), "weak": (FGSM, CURR)}
ATTACKS = (FGSM, "mvm:ifgsm", "pgd20", "autoattack")
# the paper's errors on MNIST by η = 2ε: FGSM-curr, AttNet-curr (tables 3 to 5; – is not there)
PAPER: dict[float, dict[str, tuple[str, str]]] = {
    0.3: {
        "plain": ("1.000", "1.000"),
        "lwa": (".048", "–"),
        "sens": (".048", ".965"),
        "minimax": (".218", ".020"),
        "alt": (".244", ".104"),
    },
    0.4: {
        "plain": ("1.000", "1.000"),
        "lwa": (".043", "–"),
        "sens": (".038", ".902"),
        "minimax": (".238", ".552"),
        "alt": (".503", ".873"),
    },
}
CURVES = {
    "eval/clean": "validation accuracy, clean",
    "eval/own_attacker": "under the game's own attacker",
    "eval/robust": "under PGD-10",
    "game/adversarial_loss": "loss that the defender descends",
    "game/gap": "duality gap, error rate",
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare defences over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    model: str = "small_cnn"
    """classifier; minimax_cnn is the paper's on MNIST"""
    eps: str = "0.15"
    """ε in [0, 1] pixels, half of the paper's η"""
    methods: tuple[str, ...] = tuple(name for name in METHODS if not name.endswith("-letter"))
    """which methods"""
    attacks: Names = ATTACKS
    """attacks of the reports"""
    runs_dir: str = "runs/minimax"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""


class MinimaxStudy(Study[Config]):
    """The paper's tables 3 to 5."""

    script = train_minimax
    methods = METHODS

    @property
    def stem(self) -> str:
        """Data set, classifier and radius."""
        config = self.config
        return f"{config.dataset}-{config.model}-{config.eps.replace('/', 'of')}"

    def check(self) -> None:
        """Refuse what cannot work, before any work."""
        super().check()
        if missing := [name for name in (FGSM, "pgd20") if name not in self.config.attacks]:
            raise InputError(f"the tables need {missing[0]} among --attacks")
        if any(word.startswith("--judged") for word in split_flags(self.config.extra)):
            raise InputError("the tables are about the last weights: leave --judged out of --extra")

    def shared(self) -> list[str]:
        """Classifier and radius, too."""
        return [*super().shared(), "--model", self.config.model, "--eps", self.config.eps]

    def read(self, folder: Path) -> dict[str, Any]:
        """What a finished cell found."""
        cell = Finished(folder)
        report, rows, settings = cell.report, cell.rows, cell.settings
        verdicts, n = Metrics.read(folder / "verdicts.csv"), report["n"]
        worst = {
            name: 1 - sum(all(row[a] for a in ("clean", *attacks)) for row in verdicts) / n
            for name, attacks in WORST.items()
            if verdicts[0].keys() >= set(attacks)  # a run may have made no fresh AttNet
        }
        life = {
            f"{player}/{k}": v for player, signs in report["life"].items() for k, v in signs.items()
        }
        return {
            **cell.facts(),
            "steps": int(rows[-1]["step"]),
            "batch_size": settings["batch_size"],
            "rates": [settings["lr"], settings["attacker_lr"]],
            "response_steps": settings["response_steps"],
            "restarts": settings["restarts"],
            **{f"error_{name}": 1 - value for name, value in report["accuracy"].items()},
            **{f"error_{name}": value for name, value in worst.items()},
            **{f"best_{name}": 1 - value for name, value in report["best"].items()},
            **report.get("game", {}),
            **life,
            "curves": thinned(rows, CURVES),
            "seconds": rows[-1]["time/seconds"],
        }

    def found(self, runs: Runs) -> dict[str, Any]:
        """Lemma 1, too."""
        return {"summary": summarise(runs), "lemma": lemma_one(runs, f"error_{CURR}")}

    def markdown(self, runs: Runs, about: Mapping[str, Any]) -> str:
        """The tables for people."""
        config = self.config
        columns = {
            f"error_{name}": name.removeprefix("learned:") for name in ("clean", *config.attacks)
        }
        learned = [k for run in runs for k in run if k.startswith("error_learned:")]
        columns |= {k: k.removeprefix("error_learned:") for k in dict.fromkeys(learned)}
        columns |= {
            "error_types": "worst of FGSM, PGD-20, AttNet",
            "error_weak": "worst of FGSM, AttNet",
        }
        first, eta = runs[0], 2 * parse_eps(config.eps)
        paper = PAPER.get(round(eta, 6), {}) if config.dataset == "mnist" else {}
        rows = []
        for method, row in about["summary"].items():
            cells = [_cell(row.get(column), row["seeds"]) for column in columns]
            cells.append(f"{row['seconds']['mean']:.0f}")
            cells.append(", ".join(paper[method]) if method in paper else "not in it")
            rows.append([method, str(row["seeds"]), *cells])
        lines = [
            f"# Machine vs Machine on {config.dataset}, {config.model}, ε = {config.eps} "
            f"(η = {eta:g})",
            "",
            f"Error rates, mean ± sd over seeds: higher is better for the attacker. "
            f"{first['steps']} steps of {first['batch_size']} images, {first['n']} test images, "
            f"last weights. Fresh attackers: {first['response_steps']} steps, best of "
            f"{first['restarts']} on the validation split. Paper: MNIST, its own CNN, 50,000 steps "
            "at 1e-4.",
            "",
            *markdown_table(
                [
                    *("defence", "seeds", *columns.values()),
                    *("s", "paper: FGSM-curr, AttNet-curr"),
                ],
                rows,
            ),
            *pairs(runs, columns),
            *games_at_their_ends(runs, about),
        ]
        return "\n".join([*lines, *provenance_lines(runs, about)])

    def pictures(self, runs: Runs, about: Mapping[str, Any], path: Path) -> None:
        """Validation accuracies, the defender's loss and the gap over time (Figs. 2 and 3)."""
        tags = {tag: name for tag, name in CURVES.items() if any(tag in r["curves"] for r in runs)}
        title = f"Machine vs Machine on {self.stem}: mean and range over seeds"
        save_figure(seeds_figure(drawable(runs), tags, title), path.with_suffix(".png"))


def pairs(runs: Runs, columns: Mapping[str, str]) -> list[str]:
    """Every defence less Minimax, seed by seed."""
    ours = {run["seed"]: run for run in runs if run["method"] == "minimax"}
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method and run["seed"] in ours]
        if method == "minimax" or len(mine) < 2:
            continue
        cells = []
        for column in columns:
            if all(column in one for run in mine for one in (run, ours[run["seed"]])):
                found = spread([run[column] - ours[run["seed"]][column] for run in mine])
                cells.append(f"{found['mean']:+.3f} ± {found['half_interval']:.3f}")
            else:
                cells.append("–")
        rows.append([method, str(len(mine)), *cells])
    if not rows:
        return []
    return [
        "",
        "Error less that of Minimax of the same seed, mean ± half of the 95 % interval over seeds; "
        "above 0 Minimax loses less.",
        "",
        *markdown_table(["defence", "seeds", *columns.values()], rows),
    ]


def games_at_their_ends(runs: Runs, about: Mapping[str, Any]) -> list[str]:
    """Both players' best responses, whether the attackers live, and lemma 1."""
    games = {name: row for name, row in about["summary"].items() if "game/gap" in row}
    if not games:
        return []
    titles = {
        "game/error": "f(u, v)",
        "game/error_attacker_responds": "Stackelberg value f(u, v*(u))",
        "game/fresh_range": "range over responders",
        "game/error_pgd": "f(u, PGD-20)",
        "game/error_defender_responds": "f(u*(v), v)",
        "own/saturated": "v: saturated",
        "own/spread": "v: spread",
        "curr/spread": "v*(u): spread",
    }
    rows = []
    for method, row in games.items():
        mine = [run for run in runs if run["method"] == method]
        gaps = [
            f"{r['game/gap']:.2f} [{r['game/gap_low']:.2f}, {r['game/gap_high']:.2f}]" for r in mine
        ]
        rates = ", ".join(f"{rate:g}" for rate in mine[0]["rates"])
        cells = [_cell(row.get(title), row["seeds"]) for title in titles]
        rows.append([method, rates, *cells, ", ".join(gaps)])
    return [
        "",
        "The games at their ends, test error: u the classifier, v the game's own attacker, v*(u) "
        "the strongest of v and of fresh networks. The duality gap, f(u, v*(u)) − f(u*(v), v), has "
        "95 % intervals over images and responders, by seed. It is a lower bound, and no distance "
        "to a solution: a game of pure strategies need have no equilibrium. Saturated: share of "
        "outputs where tanh is flat; spread: sd of the perturbation within a class, in ε.",
        "",
        *markdown_table(
            ["defence", "rates of u, v", *titles.values(), "duality gap by seed"], rows
        ),
        "",
        "Lemma 1 on these numbers. It is about exact optima, which nobody has found here:",
        "",
        *markdown_table(
            ["inequality", "holds", "largest violation"],
            [[name, f"{n} of {count}", f"{size:.3f}"] for name, n, count, size in about["lemma"]],
        ),
    ]


def _cell(found: Mapping[str, float] | None, seeds: int) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.3f}" + (f" ± {found['sd']:.3f}" if seeds > 1 else "")


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    MinimaxStudy(config).main()

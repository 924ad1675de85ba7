"""The tables of Machine vs Machine: defences against fresh attackers, AutoAttack among them.

    python scripts/study_minimax.py --out runs/results                         # digits
    python scripts/study_minimax.py --out runs/results --dataset mnist --data-dir DIR --eps 0.15

Each cell is one run of `train_minimax.py` (defence x seed) in its own process; finished cells are
kept and interrupted ones resumed, so that the command can be given again. Numbers are error rates,
as in the paper: higher is better for the attacker. Beside its tables 3 to 5: what AutoAttack says,
the worst case over FGSM, PGD and AttNet (the mixture of section 5.1), and lemma 1 on the measured
risks.

Writes `<out>/<dataset>-<model>-<eps>.json`, `.md` and `.png`. Cells that the results already hold
stay there, also where their folders are gone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import train_minimax
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
from advgame.checks import parse_eps
from advgame.cli import Names, run_script
from advgame.curves import save_figure, seeds_figure
from advgame.errors import InputError, unknown
from advgame.evaluation.lemma import lemma_one
from advgame.runs import Metrics, made_by
from advgame.statistics import spread

# what sweep_minimax.py chose for Minimax and for Alt, on validation images of MNIST
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
class Config:
    """Compare defences over seeds."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    model: str = "small_cnn"
    """classifier; minimax_cnn is the paper's on MNIST"""
    eps: str = "0.15"
    """ε in [0, 1] pixels, half of the paper's η"""
    seeds: int = 3
    """seeds 0, 1, … per method"""
    methods: tuple[str, ...] = tuple(name for name in METHODS if not name.endswith("-letter"))
    """which methods"""
    attacks: Names = ATTACKS
    """attacks of the reports"""
    missing_only: bool = False
    """leave out what the results hold already, also where its folders are gone"""
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/minimax"
    """run folders, one per cell; not committed"""
    out: str = "results/minimax"
    """where the results go"""
    extra: str = ""
    """further flags of train_minimax.py for every cell, e.g. --extra="--epochs 5" """
    data_dir: str | None = None
    """data folder (all but digits)"""


def same(config: Config) -> str:
    """What the cells of one table share, beside data set, classifier and ε."""
    return shlex.join(["--attacks", *config.attacks, *split_flags(config.extra)])


def stem(config: Config) -> str:
    """Of the files of one table."""
    return f"{config.dataset}-{config.model}-{config.eps.replace('/', 'of')}"


def cells(config: Config) -> dict[str, list[str]]:
    """Folder -> flags of every cell."""
    data = ["--data-dir", config.data_dir] if config.data_dir else []
    shared = ["--dataset", config.dataset, *data, "--model", config.model, "--eps", config.eps]
    shared += split_flags(same(config))
    used = {name: usable(shared, METHODS[name], train_minimax) for name in config.methods}
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
    verdicts = Metrics.read(folder / "verdicts.csv")
    worst = {
        name: 1 - sum(all(row[a] for a in ("clean", *attacks)) for row in verdicts) / report["n"]
        for name, attacks in WORST.items()
        if verdicts[0].keys() >= set(attacks)  # a run may have made no fresh AttNet
    }
    return {
        "method": folder.name.rsplit("-seed", 1)[0],
        "seed": settings["seed"],
        "n": report["n"],
        "steps": int(rows[-1]["step"]),
        "batch_size": settings["batch_size"],
        "rates": [settings["lr"], settings["attacker_lr"]],
        "response_steps": settings["response_steps"],
        "restarts": settings["restarts"],
        "commit": about["commit"],
        "device": about["device"],
        **{f"error_{name}": 1 - value for name, value in report["accuracy"].items()},
        **{f"error_{name}": value for name, value in worst.items()},
        **{f"best_{name}": 1 - value for name, value in report["best"].items()},
        **report.get("game", {}),
        **{
            f"{player}/{k}": v for player, signs in report["life"].items() for k, v in signs.items()
        },
        "flags": [flag["name"] for flag in report["flags"]],
        "curves": thinned(rows, CURVES),
        "seconds": rows[-1]["time/seconds"],
    }


def as_markdown(
    config: Config, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The tables for people."""
    columns = {
        f"error_{name}": name.removeprefix("learned:") for name in ("clean", *config.attacks)
    }
    learned = [k for r in results for k in r if k.startswith("error_learned:")]
    columns |= {k: k.removeprefix("error_learned:") for k in dict.fromkeys(learned)}
    columns |= {
        "error_types": "worst of FGSM, PGD-20, AttNet",
        "error_weak": "worst of FGSM, AttNet",
    }
    first, eta = results[0], 2 * parse_eps(config.eps)
    paper = PAPER.get(round(eta, 6), {}) if config.dataset == "mnist" else {}
    lines = [
        f"# Machine vs Machine on {config.dataset}, {config.model}, ε = {config.eps} (η = {eta:g})",
        "",
        f"Error rates, mean ± sd over seeds: higher is better for the attacker. {first['steps']} "
        f"steps of {first['batch_size']} images, {first['n']} test images, last weights. Fresh "
        f"attackers: {first['response_steps']} steps, best of {first['restarts']} on the "
        "validation split. Paper: MNIST, its own CNN, 50,000 steps at 1e-4.",
        "",
        "| defence | seeds | " + " | ".join(columns.values())
        + " | s | paper: FGSM-curr, AttNet-curr |",
        "|---" * (len(columns) + 4) + "|",
    ]  # fmt: skip
    for method, row in about["summary"].items():
        cells = [_cell(row.get(column), row["seeds"]) for column in columns]
        cells.append(f"{row['seconds']['mean']:.0f}")
        cells.append(", ".join(paper[method]) if method in paper else "not in it")
        lines.append(f"| {method} | {row['seeds']} | " + " | ".join(cells) + " |")
    lines += [*pairs(results, columns), *games_at_their_ends(results, about)]
    flags = ", ".join(sorted({f"{r['method']}: {f}" for r in results for f in r["flags"]}))
    made = ", ".join(sorted({r["commit"][:12] for r in results}))
    lines += ["", f"Flags raised: {flags or 'none'}.", ""]
    lines += [f"Hardware: {about['device']}. Cells made at commit {made}.", ""]
    lines += [f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def pairs(results: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Every defence less Minimax, seed by seed."""
    ours = {run["seed"]: run for run in results if run["method"] == "minimax"}
    lines = []
    for method in dict.fromkeys(run["method"] for run in results):
        mine = [run for run in results if run["method"] == method and run["seed"] in ours]
        if method == "minimax" or len(mine) < 2:
            continue
        cells = []
        for column in columns:
            if all(column in one for run in mine for one in (run, ours[run["seed"]])):
                found = spread([run[column] - ours[run["seed"]][column] for run in mine])
                cells.append(f"{found['mean']:+.3f} ± {found['half_interval']:.3f}")
            else:
                cells.append("–")
        lines.append(f"| {method} | {len(mine)} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    return [
        "",
        "Error less that of Minimax of the same seed, mean ± half of the 95 % interval over seeds; "
        "above 0 Minimax loses less.",
        "",
        "| defence | seeds | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 2) + "|",
        *lines,
    ]


def games_at_their_ends(
    results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> list[str]:
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
    lines = [
        "",
        "The games at their ends, test error: u the classifier, v the game's own attacker, v*(u) "
        "the strongest of v and of fresh networks. The duality gap, f(u, v*(u)) − f(u*(v), v), has "
        "95 % intervals over images and responders, by seed. It is a lower bound, and no distance "
        "to a solution: a game of pure strategies need have no equilibrium. Saturated: share of "
        "outputs where tanh is flat; spread: sd of the perturbation within a class, in ε.",
        "",
        "| defence | rates of u, v | " + " | ".join(titles.values()) + " | duality gap by seed |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for method, row in games.items():
        cells = [_cell(row.get(title), row["seeds"]) for title in titles]
        mine = [run for run in results if run["method"] == method]
        gaps = [
            f"{r['game/gap']:.2f} [{r['game/gap_low']:.2f}, {r['game/gap_high']:.2f}]" for r in mine
        ]
        rates = ", ".join(f"{rate:g}" for rate in mine[0]["rates"])
        lines.append(f"| {method} | {rates} | " + " | ".join([*cells, ", ".join(gaps)]) + " |")
    lines += [
        "",
        "Lemma 1 on these numbers. It is about exact optima, which nobody has found here:",
        "",
        "| inequality | holds | largest violation |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {n} of {count} | {size:.3f} |" for name, n, count, size in about["lemma"]
    ]
    return lines


def _cell(found: Mapping[str, float] | None, seeds: int) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.3f}" + (f" ± {found['sd']:.3f}" if seeds > 1 else "")


def picture(config: Config, results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation accuracies, the defender's loss and the gap over time (Figs. 2 and 3)."""
    tags = {tag: title for tag, title in CURVES.items() if any(tag in r["curves"] for r in results)}
    title = f"Machine vs Machine on {stem(config)}: mean and range over seeds"
    save_figure(seeds_figure(drawable(results), tags, title), path)


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    if odd := [name for name in config.methods if name not in METHODS]:
        raise unknown("method", odd[0], METHODS)
    if missing := [name for name in (FGSM, "pgd20") if name not in config.attacks]:
        raise InputError(f"the tables need {missing[0]} among --attacks")
    if any(word.startswith("--judged") for word in split_flags(config.extra)):
        raise InputError("the tables are about the last weights: leave --judged out of --extra")
    name = stem(config)
    root, out, todo = Path(config.runs_dir) / name, Path(config.out), cells(config)
    check_cells(train_minimax, todo, config.jobs)
    held = with_earlier([], out / f"{name}.json", same(config))  # refuses before any training
    same_flags(root, same(config))
    if config.missing_only:
        known = {f"{run['method']}-seed{run['seed']}" for run in held}
        todo = {cell: flags for cell, flags in todo.items() if cell not in known}
    if config.finished_only:
        todo = {cell: todo[cell] for cell in todo if (root / cell / "report.json").exists()}
    else:
        run_cells(Path(__file__).with_name("train_minimax.py"), root, todo, config.jobs)
    results = [read(root / cell) for cell in todo]
    if not (results or held):
        raise InputError(f"{root} holds no finished cell: leave --finished-only away")
    runs = with_earlier(results, out / f"{name}.json", same(config))
    runs.sort(key=lambda run: list(METHODS).index(run["method"]))
    about = {
        **made_by(),
        "device": hardware(runs, config.jobs),
        "extra": same(config),
        "summary": summarise(runs),
        "lemma": lemma_one(runs, f"error_{CURR}"),
        "runs": runs,
    }
    write_atomically(out / f"{name}.json", json.dumps(about) + "\n")
    write_atomically(out / f"{name}.md", as_markdown(config, runs, about))
    picture(config, runs, out / f"{name}.png")
    print(f"{len(results)} of {len(todo)} cells, {len(runs)} in all; {out}/{name}.md")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

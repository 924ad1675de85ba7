"""Games on equal terms: the same data, network, schedule and seeds, judged by the same attacks.

    python scripts/study.py compare --out runs/results             # digits, all games, 3 seeds
    python scripts/study.py compare --out runs/results --games pgd-at trades las-trades --seeds 5
    python scripts/study.py compare --out runs/results --budget compute  # PGD-AT's passes for all
    python scripts/study.py compare --dataset mnist --data-dir DIR --extra="--train-n 10000"

A cell is a training run (game x seed) and an evaluation of its selected weights by `evaluate.py`:
the columns of the ADT poster, transfer from another PGD-AT classifier, AutoAttack, the worst case.
(FeaAttack aims at 20 images, the poster's at 200: `adt:fea`.) Finished cells are kept, interrupted
ones resumed: the command can be given again. With --budget compute a game's epochs are PGD-AT's
times the ratio of what a step costs, forwards as counted in the runs of equal epochs, which must be
there. A learned attack's cost depends on how long it has learned: the column "passes" tells what
came out, and `--counted` takes the costs from another file, e.g. a first try's.

Writes `<out>/<dataset>-<budget>.json`, `.csv`, `.md` and `.png`; earlier cells in them stay.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any, Literal

from published import poster_table

from advgame.errors import InputError, unknown
from advgame.evaluation import check_attacks
from advgame.evaluation.pictures import comparison_figure
from advgame.run.cells import (
    check_cells,
    run_cells,
    same_flags,
    split_flags,
    summarise,
    usable,
    whole_number,
    with_earlier,
)
from advgame.run.curves import save_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import Metrics, made_by
from advgame.run.options import Names
from advgame.run.selection import selected_by
from studies._comparison import PGD, as_csv, flags_of, selection, table, with_gap

CONTROL, SURROGATE_SEED = "pgd-at", 1000
_LAS, _ADT, _L2L = "train_las_at.py", "train_adt.py", "train_l2l.py"
_SCATTER = "--game feature-scatter --true-probability 0.5"
# name -> script and flags
GAMES: dict[str, tuple[str, str]] = {
    "standard": ("train.py", "--game standard"),
    "fgsm-at": ("train.py", "--game fgsm-at"),
    "fast": ("train.py", "--game fast"),
    "n-fgsm": ("train.py", "--game n-fgsm"),
    "free": ("train.py", "--game free"),
    CONTROL: ("train.py", "--game pgd-at"),
    "alp": ("train.py", "--game alp"),
    "feature-scatter": ("train.py", _SCATTER),
    "feature-scatter-repo": ("train.py", f"{_SCATTER} --transport repo"),
    "trades": ("train.py", "--game trades"),
    "mart": ("train.py", "--game mart"),
    "awp": ("train.py", "--game pgd-at --awp 0.01"),
    "trades-awp": ("train.py", "--game trades --awp 0.005"),
    "las-at": (_LAS, ""),
    "las-at-random": (_LAS, "--agent random"),
    "las-trades": (_LAS, "--objective trades --space las-trades-cifar10"),
    "las-trades-random": (_LAS, "--objective trades --space las-trades-cifar10 --agent random"),
    "las-awp": (_LAS, "--awp 0.01 --clamp --space las-awp-cifar10"),
    "las-awp-random": (_LAS, "--awp 0.01 --clamp --space las-awp-cifar10 --agent random"),
    "l2l-grad": (_L2L, "--attacker grad"),
    "l2l-two-step": (_L2L, "--attacker two-step"),
    "adt-exp": (_ADT, "--method exp"),
    "adt-exp-am": (_ADT, "--method exp-am"),
    "adt-imp-am": (_ADT, "--method imp-am"),
}
# what all games share on a data set, whatever their scripts' defaults
_SHARED = "--schedule onecycle --weight-decay 5e-4 --true-probability 1"
RECIPES = {
    "digits": f"--model small_cnn --eps 0.15 --epochs 40 --batch-size 64 --lr 0.1 {_SHARED}",
    "mnist": "--model small_cnn --eps 0.3 --eps-ramp 0.4 --epochs 10 --batch-size 128 --lr 0.1 "
    f"{_SHARED}",
    "cifar10": "--model preact_resnet18 --eps 8/255 --epochs 30 --batch-size 128 --lr 0.1 "
    f"--ema 0.999 {_SHARED}",
}
COLUMNS = (
    "adt:fgsm", "adt:pgd20", "adt:pgd100", "adt:mim20", "adt:cw30", "fea", "transfer", "spsa",
    "autoattack",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Compare games on equal terms."""

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """data set"""
    games: tuple[str, ...] = tuple(GAMES)
    """which games"""
    seeds: int = 3
    """seeds 0, 1, … per game"""
    budget: Literal["epochs", "compute"] = "epochs"
    """what is equal: passes over the training images, or passes through the classifier"""
    counted: str | None = None
    """of equal compute: results whose runs say what a step costs (<out>/<dataset>-epochs.json)"""
    attacks: Names = COLUMNS
    """of the evaluations, see evaluate.py --list"""
    eval_n: int = 360
    """test images"""
    judged: str = "judged"
    """folder of the evaluations within the runs': other attacks or images need another"""
    missing_only: bool = False
    """leave out what the results hold already, also where its folders are gone"""
    finished_only: bool = False
    """train and evaluate nothing: write the results of the cells that are finished"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/compare"
    """run folders; not committed"""
    out: str = "results/compare"
    """where the results go"""
    extra: str = ""
    """further flags of every training, e.g. --extra="--epochs 5" """
    data_dir: str | None = None
    """data folder (all but digits)"""


def judging(config: Config) -> list[str]:
    """Flags of every evaluation."""
    return ["--attacks", ",".join(config.attacks), "--n", str(config.eval_n)]


def same(config: Config) -> str:
    """What the cells of one table share."""
    return shlex.join([*judging(config), *split_flags(config.extra)])


def data(config: Config) -> list[str]:
    """The data set's flags."""
    folder = ["--data-dir", config.data_dir] if config.data_dir else []
    return ["--dataset", config.dataset, *folder]


def shared(config: Config) -> list[str]:
    """Flags of every training; of a flag that comes twice the last counts."""
    # a training's own report is not looked at
    report = ["--attacks", "fgsm", "--eval-n", "20"]
    return [*data(config), *report, *split_flags(f"{RECIPES[config.dataset]} {config.extra}")]


def epochs(config: Config) -> dict[str, int]:
    """Passes over the training images, by game.

    Raises:
        InputError: equal compute without the runs of equal epochs that say what a step costs.
    """
    whole = whole_number(shared(config), "--epochs")
    if config.budget == "epochs":  # Free teaches eight times per pass
        return {game: max(1, whole // 8) if game == "free" else whole for game in config.games}
    path = Path(config.counted or Path(config.out) / f"{config.dataset}-epochs.json")
    if not path.exists():
        raise InputError(f"{path} is missing: run --budget epochs first, it counts the passes")
    cost: dict[str, list[float]] = {}
    for run in read_json(path).get("runs", ()):
        cost.setdefault(run["method"], []).append(run["forwards_per_image"])
    if missing := [game for game in (CONTROL, *config.games) if game not in cost]:
        raise InputError(f"{path} does not hold {missing[0]}: it must be run first")
    step = mean(cost[CONTROL])
    return {game: max(1, round(whole * step / mean(cost[game]))) for game in config.games}


def same_lengths(config: Config, held: Sequence[Mapping[str, Any]], root: Path) -> None:
    """Raises InputError where a game has a cell of other epochs than it is asked for now."""
    asked, cells = epochs(config), [(run["method"], run["epochs"]) for run in held]
    for path in root.glob("*-seed*/config.json"):
        settings = read_json(path)["config"]
        cells.append((path.parent.name.rsplit("-seed", 1)[0], settings["epochs"]))
    for game, length in cells:
        if length != asked.get(game, length):
            raise InputError(
                f"{game} has cells of {length:.0f} epochs in the results or in {root}, not "
                f"{asked[game]}: the same --counted, or another --out and --runs-dir"
            )


def module(script: str) -> ModuleType:
    """A training script, imported."""
    return import_module(script.removesuffix(".py"))


def trainings(config: Config) -> dict[str, dict[str, list[str]]]:
    """Script -> folder -> flags of every training, the surrogate's first."""
    made: dict[str, dict[str, list[str]]] = {}
    equal = replace(config, budget="epochs", games=(CONTROL,))
    cells = [(CONTROL, SURROGATE_SEED, epochs(equal)[CONTROL])]
    for seed in range(config.seeds):
        cells += [(game, seed, length) for game, length in epochs(config).items()]
    for game, seed, length in cells:
        script, flags = GAMES[game]
        given = usable(shared(config), split_flags(flags), module(script))
        learns = script == _LAS and "--agent random" not in flags
        flags += " --reward-interval 10" * (learns and config.dataset == "cifar10")
        words = [*given, *split_flags(flags), "--epochs", str(length), "--seed", str(seed)]
        made.setdefault(script, {})[f"{game}-seed{seed}"] = words
    return made


def evaluations(config: Config, root: Path) -> dict[str, list[str]]:
    """Folder -> flags of every evaluation."""
    words = [*data(config), *judging(config)]
    if any("transfer" in attack for attack in config.attacks):
        words += ["--surrogate", str(root / f"{CONTROL}-seed{SURROGATE_SEED}")]
    return {
        f"{game}-seed{seed}": [str(root / f"{game}-seed{seed}"), *words]
        for seed in range(config.seeds)
        for game in config.games
    }


def read(root: Path, judged: Path, name: str) -> dict[str, Any]:
    """What a finished cell found."""
    report = read_json(judged / name / "report.json")
    about = read_json(root / name / "config.json")
    rows, settings = Metrics.read(root / name / "metrics.csv"), about["config"]
    # of the training's own report only signs of life count: it saw few images
    own = read_json(root / name / "report.json")
    return {
        "method": name.rsplit("-seed", 1)[0],
        "seed": settings["seed"],
        "n": report["n"],
        "eps": report["threat"]["eps"],
        "epochs": float(settings["epochs"]),
        "train_n": settings["train_n"],
        "commit": about["commit"],
        "device": about["device"],
        **{f"accuracy_{attack}": value for attack, value in report["accuracy"].items()},
        "worst_case": report["worst_case"],
        "selected_by": selected_by(own),
        "seconds_per_epoch": rows[-1]["time/seconds"] / settings["epochs"],
        "forwards_per_image": mean(row["attacker/forwards_per_image"] for row in rows),
        "flags": [flag["name"] for flag in report["flags"]]
        + [flag["name"] for flag in own["flags"] if flag["name"].startswith("dead_")]
        + ["catastrophic_overfitting"] * ("catastrophic_overfitting" in own),
    }


def as_markdown(
    config: Config, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The comparison for people."""
    first = results[0]
    equal = {
        "epochs": "equal epochs",
        "compute": f"epochs such that all make as many passes as {CONTROL}",
    }[config.budget]
    head, *rows = table(about["summary"], config.attacks, CONTROL)
    lines = [
        f"# Games on {config.dataset}, {equal}",
        "",
        f"ε = {first['eps']:.3g}, {first['n']} test images, training images: "
        f"{first['train_n'] or 'all'}; mean ± sd over seeds, in %. {selection(results)}. "
        "Worst case: over all attacks of the table, per image. F: forwards "
        "of the classifier (input-backward 1, backward with weights 2), without networks of the "
        f"attacker; passes: epochs × F beside {CONTROL}'s. Transfer: PGD-20 made on another PGD-AT "
        "classifier. `fea` aims at 20 images, the poster's FeaAttack at 200.",
        "",
        f"| {' | '.join(head)} | flags |",
        "|---" * (len(head) + 1) + "|",
    ]
    lines += [
        f"| {' | '.join(row)} | {flags_of(row[0], results, about['summary'], CONTROL)} |"
        for row in rows
    ]
    poster = "The ADT poster, CIFAR-10, WRN-28-10, ε 8/255; worst of its columns:"
    lines += ["", poster, "", *poster_table()]
    made = ", ".join(sorted({r["commit"][:12] for r in results}))
    device = ", ".join(sorted({r["device"] for r in results}))
    where = f"Hardware: {device}, {about['jobs']} at a time. Cells made at commit {made}."
    lines += ["", where, "", f"Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def check(config: Config) -> None:
    """Refuse what cannot work, before any work."""
    if odd := set(config.games) - set(GAMES):
        raise unknown("game", min(odd), GAMES)
    if not config.games:
        raise InputError("--games names none")
    if len(set(config.games)) < len(config.games):
        raise InputError(f"a game is asked for twice: {', '.join(config.games)}")
    for option in ("seeds", "eval_n"):
        if getattr(config, option) < 1:
            raise InputError(f"{option} must be 1 or above, not {getattr(config, option)}")
    if config.counted and config.budget == "epochs":
        raise InputError("--counted is for --budget compute")
    check_attacks(config.attacks)
    if not config.attacks:
        raise InputError("--attacks names none: a table needs one")
    if config.dataset != "digits" and not config.data_dir:
        raise InputError(f"{config.dataset} needs --data-dir, the folder with its files")


def main(config: Config) -> None:
    """Train and evaluate what is missing, then write the results."""
    check(config)
    name, scripts = f"{config.dataset}-{config.budget}", Path(__file__).parents[1]
    root, out, todo = Path(config.runs_dir) / name, Path(config.out), trainings(config)
    for script, cells in todo.items():
        check_cells(module(script), cells, config.jobs)
    held = with_earlier([], out / f"{name}.json", same(config))  # refuses before any training
    same_lengths(config, held, root)
    known = {f"{run['method']}-seed{run['seed']}" for run in held if config.missing_only}
    same_flags(root, config.extra)
    same_flags(root / config.judged, shlex.join(judging(config)))
    judged, found = evaluations(config, root), root / config.judged
    if known.issuperset(judged):
        known.add(f"{CONTROL}-seed{SURROGATE_SEED}")
    if not config.finished_only:
        for script, cells in (todo | {"evaluate.py": judged}).items():
            lacking = {cell: flags for cell, flags in cells.items() if cell not in known}
            run_cells(scripts / script, found if cells is judged else root, lacking, config.jobs)
    done = [cell for cell in judged if (found / cell / "report.json").exists()]
    if not (done or known):
        raise InputError(f"{root} holds no finished cell: leave --finished-only away")
    runs = with_earlier(
        [read(root, found, cell) for cell in done], out / f"{name}.json", same(config)
    )
    runs = [with_gap(run) for run in runs]
    runs.sort(key=lambda run: list(GAMES).index(run["method"]))
    summary = summarise(runs, CONTROL)
    about = {
        **made_by(),
        "jobs": config.jobs,
        "extra": same(config),
        "summary": summary,
        "runs": runs,
    }
    write_atomically(out / f"{name}.json", json.dumps(about) + "\n")
    write_atomically(out / f"{name}.md", as_markdown(config, runs, about))
    write_atomically(out / f"{name}.csv", as_csv(table(summary, config.attacks, CONTROL)))
    title = f"{config.dataset}, equal {config.budget}"
    save_figure(comparison_figure(summary, ("accuracy_clean", PGD), title), out / f"{name}.png")
    print(f"{len(done)} of {len(judged)} cells, {len(runs)} in all; {out}/{name}.md")

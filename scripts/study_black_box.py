"""The L2L paper's black-box tables: adversarial examples of surrogates, on other classifiers.

    python scripts/study_black_box.py runs/l2l/digits/*-seed*
    python scripts/study_black_box.py runs/A runs/B --surrogates runs/PLAIN runs/PGM --title mine

A surrogate has the target's architecture and another seed (appendix A); run folders say which seed
they had. Folders whose names differ in `-seedN` alone are one row, or one column, with mean ± sd
over all pairs. Evaluations are kept, so that the command can be given again. Writes
`<out>/black_box_<title>.json`, `.md` in the layout of the paper's tables 4 to 6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import evaluate
import torch
import tyro
from rich.console import Console
from rich.progress import track
from sweeps import group

from advgame.checkpoint import write_atomically
from advgame.checks import parse_eps
from advgame.cli import run_script
from advgame.errors import InputError
from advgame.evaluation import evaluate as attack_all
from advgame.runs import RunFolder, command, commit, device_name, versions
from advgame.statistics import spread
from advgame.threat import Linf

SURROGATES = ("plain", "fgsm", "pgm")
ATTACKS = {"l2l:transfer-fgsm": "FGSM", "l2l:transfer-pgm10": "PGM10"}
# CIFAR-10, WRN-34-10, slim attackers (table 4): row -> FGSM and PGM10 of each of SURROGATES
PAPER = {
    "plain": (40.03, 5.60, 74.42, 75.25, 67.37, 65.92),
    "fgsm": (79.20, 85.02, 89.90, 80.40, 64.28, 63.89),
    "pgm": (83.80, 84.73, 84.33, 85.29, 67.05, 65.54),
    "naive": (45.52, 25.95, 83.99, 77.94, 68.14, 67.13),
    "grad": (86.10, 86.87, 87.93, 88.01, 71.15, 69.95),
    "two-step": (85.83, 87.10, 86.51, 87.60, 70.58, 69.38),
}


@dataclass(frozen=True)
class Config:
    """Attack classifiers with the adversarial examples of others."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders of the targets"""
    surrogates: tuple[str, ...] = ()
    """run folders of the surrogates; when empty, the targets called plain, fgsm and pgm"""
    title: str = ""
    """name of the table's files; the data set's when empty"""
    n: int | None = None
    """test images; None takes all"""
    data_dir: str | None = None
    """data folder, where the classifiers' data set needs one"""
    seed: int = 0
    """of everything random"""
    runs_dir: str = "runs/black_box"
    """evaluations, a folder per pair; not committed"""
    out: str = "results/l2l"
    """where the table goes"""


def settings(path: str) -> dict[str, Any]:
    """A run's own settings."""
    found: dict[str, Any] = RunFolder.open(Path(path)).about()["config"]
    return found


def pairs(config: Config) -> list[tuple[str, str]]:
    """Target and surrogate folders: the same network, another seed.

    Raises:
        InputError: no such pair.
    """
    sources = config.surrogates or tuple(
        path for name in SURROGATES for path in config.what if group(Path(path).name) == name
    )
    found = []
    for target in config.what:
        mine = settings(target)
        for source in sources:
            theirs = settings(source)
            same = all(mine.get(key) == theirs.get(key) for key in ("model", "dataset", "eps"))
            if same and mine.get("seed") != theirs.get("seed"):
                found.append((target, source))
    if not found:
        raise InputError(
            "no pair of a target and a surrogate with the same network, data set and radius and "
            "another seed: name surrogates with --surrogates"
        )
    return found


def judged(config: Config, target: str, source: str) -> dict[str, float]:
    """Accuracy of the target, clean and on the surrogate's adversarial examples."""
    asked = evaluate.check(
        evaluate.Config(what=target, data_dir=config.data_dir, n=config.n, seed=config.seed)
    )
    _, data = evaluate.images(asked)
    folder = Path(config.runs_dir) / config.title / f"{Path(target).name}--{Path(source).name}"
    verdicts = attack_all(
        evaluate.classifier(asked, data, target),
        data,
        Linf(parse_eps(asked.eps)),
        tuple(ATTACKS),
        seed=config.seed,
        surrogate=evaluate.classifier(asked, data, source),
        folder=folder,
    )
    return {"n": len(data), **verdicts.accuracy()}


def as_markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table for people."""
    targets = list(dict.fromkeys(group(row["target"]) for row in rows))
    sources = list(dict.fromkeys(group(row["surrogate"]) for row in rows))
    columns = [(source, attack) for source in sources for attack in ATTACKS]
    lines = [
        f"# Black box on {about['dataset']}: surrogates of the same architecture, another seed",
        "",
        f"ε = {about['eps']}, {rows[0]['n']} test images; accuracy in %, mean ± sd over pairs of a "
        "target and a surrogate of different seeds. In brackets the paper's (CIFAR-10, WRN-34-10, "
        "slim attackers, table 4).",
        "",
        "| target | pairs | "
        + " | ".join(f"{source}, {ATTACKS[attack]}" for source, attack in columns)
        + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for target in targets:
        cells, counts = [], set()
        for source, attack in columns:
            key = (target, source)
            mine = [r for r in rows if (group(r["target"]), group(r["surrogate"])) == key]
            counts.add(len(mine))
            if not mine:
                cells.append("–")
                continue
            found = spread([100 * row[attack] for row in mine])
            cell = f"{found['mean']:.1f}" + (f" ± {found['sd']:.1f}" if len(mine) > 1 else "")
            if target in PAPER and source in SURROGATES:
                place = 2 * SURROGATES.index(source) + list(ATTACKS).index(attack)
                cell += f" ({PAPER[target][place]})"
            cells.append(cell)
        lines.append(f"| {target} | {max(counts)} | " + " | ".join(cells) + " |")
    lines += ["", f"Hardware: {about['device']}. Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Evaluate what is missing, then write the table."""
    if not config.what:
        raise InputError("name the run folders of the classifiers to attack")
    todo = pairs(config)
    tasks = {tuple(settings(a).get(key) for key in ("model", "dataset", "eps")) for a, _ in todo}
    if len(tasks) > 1:
        raise InputError("the targets differ in network, data set or radius: one table for each")
    config = replace(config, title=config.title or settings(todo[0][0])["dataset"])
    rows = [
        {"target": Path(a).name, "surrogate": Path(b).name, **judged(config, a, b)}
        for a, b in track(todo, console=Console(stderr=True), transient=True)
    ]
    first = settings(todo[0][0])
    about = {
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
        "dataset": first["dataset"],
        "eps": first["eps"],
        "pairs": rows,
    }
    out = Path(config.out)
    write_atomically(out / f"black_box_{config.title}.json", json.dumps(about, indent=1) + "\n")
    write_atomically(out / f"black_box_{config.title}.md", as_markdown(rows, about))
    print(f"{len(rows)} pairs; {out}/black_box_{config.title}.md")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

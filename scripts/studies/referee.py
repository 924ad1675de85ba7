"""Several classifiers in front of the same attacks: one table, the worst case beside it.

    python scripts/study.py referee runs/study/digits/fixed-seed0 runs/study/digits/reinforce-seed0

Each classifier is evaluated by `evaluate.py` into a folder of its own, finished ones are kept and
killed ones go on, so that the command can be given again. The default attacks are the columns of
the ADT poster (Dong et al. 2020) and AutoAttack. Writes `<out>/<title>.json`, `.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import evaluate
import tyro
from rich.console import Console

from advgame.errors import InputError
from advgame.run.files import write_atomically
from advgame.run.folder import made_by
from advgame.run.options import Names
from advgame.statistics import wilson

POSTER = (
    "adt:fgsm", "adt:pgd20", "adt:pgd100", "adt:mim20", "adt:cw30", "adt:fea", "autoattack",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Put classifiers in one table."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders of the classifiers"""
    title: str = "referee"
    """name of the table's files"""
    attacks: Names = POSTER
    """names, see evaluate.py --list"""
    n: int | None = None
    """test images; None takes all"""
    data_dir: str | None = None
    """data folder, where the classifiers' data set needs one"""
    seed: int = 0
    """of everything random"""
    runs_dir: str = "runs/referee"
    """evaluations, a folder per classifier; not committed"""
    out: str = "results/referee"
    """where the table goes"""


def judged(what: str, config: Config) -> dict[str, Any]:
    """The report on one classifier; evaluated first where that is not done yet."""
    name = f"{config.title}-{Path(what).name}"
    path = Path(config.runs_dir) / name
    asked = evaluate.Config(
        what=what,
        attacks=config.attacks,
        n=config.n,
        data_dir=config.data_dir,
        seed=config.seed,
        runs_dir=config.runs_dir,
        name=name,
        resume=str(path) if path.exists() else None,
    )
    run = evaluate.job.run(asked, {"what", "attacks", "n", "seed"})
    return {"classifier": Path(what).name, **run.report()}


def as_markdown(reports: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table for people."""
    columns = list(reports[0]["accuracy"])
    first = reports[0]
    lines = [
        f"# {first['dataset']}, {first['threat']['norm']} ε = {first['threat']['eps']:.3g}, "
        f"{first['n']} test images",
        "",
        "Accuracy in %, of the weights that validation chose. Worst case: images that survive "
        "every attack, with its 95 % interval (Wilson).",
        "",
        "| classifier | " + " | ".join(columns) + " | worst case | flags |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for report in reports:
        low, high = wilson(report["worst_case"], report["n"])
        shares = [f"{100 * report['accuracy'][name]:.1f}" for name in columns]
        worst = f"{100 * report['worst_case']:.1f} ({100 * low:.1f} – {100 * high:.1f})"
        flags = ", ".join(flag["name"] for flag in report["flags"]) or "none"
        lines.append(f"| {report['classifier']} | {' | '.join(shares)} | {worst} | {flags} |")
    lines += ["", f"Hardware: {first['device']}. Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Evaluate what is missing, then write the table."""
    if not config.runs:
        raise InputError("name the run folders of the classifiers to compare")
    reports = [judged(what, config) for what in config.runs]
    if len({(r["dataset"], *r["threat"].values(), r["n"]) for r in reports}) > 1:
        raise InputError("the classifiers are of different data sets or radii: one table for each")
    out = Path(config.out)
    about = made_by()
    content = {**about, "reports": reports}
    write_atomically(out / f"{config.title}.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / f"{config.title}.md", as_markdown(reports, about))
    Console().print(f"more in {out / config.title}.md")

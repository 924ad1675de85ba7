"""The L2L paper's black-box tables: adversarial examples of surrogates, on other classifiers.

    python scripts/study.py black_box runs/l2l/digits/*-seed*
    python scripts/study.py black_box runs/A runs/B --surrogates runs/PLAIN runs/PGD --title mine

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
import tyro
from rich.console import Console
from rich.progress import track
from sweeps import group
from torch import nn

from advgame.errors import InputError
from advgame.evaluation import evaluate as attack_all
from advgame.run.devices import make_fabric
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder, device_name, made_by
from advgame.run.options import parse_eps
from advgame.statistics import spread
from advgame.threat import Linf

SURROGATES = ("plain", "fgsm", "pgd")
ATTACKS = {"l2l:transfer-fgsm": "FGSM", "l2l:transfer-pgd10": "PGD10"}
# tables 4 to 6, WRN-34-10: row -> FGSM and PGD10 of each of SURROGATES
PAPER = {
    "cifar10": {
        "plain": (40.03, 5.60, 74.42, 75.25, 67.37, 65.92),
        "fgsm": (79.20, 85.02, 89.90, 80.40, 64.28, 63.89),
        "pgd": (83.80, 84.73, 84.33, 85.29, 67.05, 65.54),
        "naive": (45.52, 25.95, 83.99, 77.94, 68.14, 67.13),
        "grad": (86.10, 86.87, 87.93, 88.01, 71.15, 69.95),
        "two-step": (85.83, 87.10, 86.51, 87.60, 70.58, 69.38),
    },
    "cifar100": {
        "plain": (21.04, 9.04, 50.57, 54.06, 40.06, 41.30),
        "fgsm": (42.87, 50.73, 61.68, 44.70, 39.34, 40.08),
        "pgd": (56.63, 58.34, 56.99, 57.97, 40.19, 39.87),
        "naive": (20.97, 10.47, 50.36, 54.07, 38.63, 39.91),
        "grad": (57.63, 59.62, 59.18, 61.26, 41.71, 41.15),
        "two-step": (58.66, 59.31, 58.92, 59.46, 45.80, 45.31),
    },
    "svhn": {
        "plain": (21.72, 6.94, 41.81, 33.13, 56.77, 49.41),
        "fgsm": (57.36, 51.54, 56.25, 38.11, 55.99, 48.96),
        "pgd": (81.04, 81.52, 78.66, 80.42, 54.85, 49.21),
        "naive": (73.02, 42.14, 78.11, 59.79, 85.31, 61.08),
        "grad": (71.74, 74.31, 77.19, 80.70, 71.99, 58.71),
        "two-step": (65.78, 74.07, 76.13, 82.80, 61.69, 54.13),
    },
}


@dataclass(frozen=True)
class Config:
    """Attack classifiers with the adversarial examples of others."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders of the targets"""
    surrogates: tuple[str, ...] = ()
    """run folders of the surrogates; when empty, the targets called plain, fgsm and pgd"""
    title: str = ""
    """name of the table's files; the data set's when empty"""
    n: int | None = None
    """test images; None takes all"""
    data_dir: str | None = None
    """data folder, where the classifiers' data set needs one"""
    seed: int = 0
    """of everything random"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    runs_dir: str = "runs/black_box"
    """evaluations, a folder per pair; not committed"""
    out: str = "results/l2l"
    """where the table goes"""


def about_run(path: str) -> tuple[tuple[str, str, float], int]:
    """Network, data set and radius that a run was made for; its seed."""
    own = RunFolder.open(Path(path)).about()["config"]
    return (own["model"], own["dataset"], parse_eps(own["eps"])), own["seed"]


def pairs(config: Config) -> list[tuple[str, str]]:
    """Target and surrogate folders: the same network, another seed.

    Raises:
        InputError: no such pair, or targets of different tasks.
    """
    sources = config.surrogates or tuple(
        path for name in SURROGATES for path in config.what if group(Path(path).name) == name
    )
    about = {path: about_run(path) for path in (*config.what, *sources)}
    found = [
        (target, source)
        for target in config.what
        for source in sources
        if about[target][0] == about[source][0] and about[target][1] != about[source][1]
    ]
    if not found:
        raise InputError(
            "no pair of a target and a surrogate with the same network, data set and radius and "
            "another seed: name surrogates with --surrogates"
        )
    if len({about[target][0] for target, _ in found}) > 1:
        raise InputError("the targets differ in network, data set or radius: one table for each")
    return found


def as_markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table for people."""
    targets = list(dict.fromkeys(group(row["target"]) for row in rows))
    sources = list(dict.fromkeys(group(row["surrogate"]) for row in rows))
    paper = about["dataset"] if about["dataset"] in PAPER else "cifar10"
    columns = [(source, attack) for source in sources for attack in ATTACKS]
    lines = [
        f"# Black box on {about['dataset']}: surrogates of the same architecture, another seed",
        "",
        f"ε = {about['eps']}, {rows[0]['n']} test images; accuracy in %, mean ± sd over pairs of a "
        f"target and a surrogate of different seeds. In brackets the paper's ({paper}, WRN-34-10).",
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
            if target in PAPER[paper] and source in SURROGATES:
                place = 2 * SURROGATES.index(source) + list(ATTACKS).index(attack)
                cell += f" ({PAPER[paper][target][place]})"
            cells.append(cell)
        lines.append(f"| {target} | {max(counts)} | " + " | ".join(cells) + " |")
    lines += ["", f"Hardware: {about['device']}. Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Evaluate what is missing, then write the table."""
    if not config.what:
        raise InputError("name the run folders of the classifiers to attack")
    todo = pairs(config)
    (_, dataset, eps), _ = about_run(todo[0][0])
    config = replace(config, title=config.title or dataset)
    device = make_fabric(config.accelerator, 1, "32-true").device
    models: dict[str, nn.Module] = {}
    for path in dict.fromkeys(path for pair in todo for path in pair):
        asked = evaluate.job.check(
            evaluate.Config(path, data_dir=config.data_dir, n=config.n, seed=config.seed)
        )
        if not models:
            data = evaluate.images(asked)[1].to(device)
        models[path] = evaluate.classifier(asked, data, path).to(device)
    rows = []
    for target, source in track(todo, console=Console(stderr=True), transient=True):
        names = {"target": Path(target).name, "surrogate": Path(source).name}
        verdicts = attack_all(
            models[target],
            data,
            Linf(eps),
            tuple(ATTACKS),
            seed=config.seed,
            surrogate=models[source],
            folder=Path(config.runs_dir) / config.title / "--".join(names.values()),
        )
        rows.append({**names, "n": len(data), **verdicts.accuracy()})
    about = {
        **made_by(),
        "device": device_name(device),
        "dataset": dataset,
        "eps": eps,
        "pairs": rows,
    }
    out = Path(config.out)
    write_atomically(out / f"black_box_{config.title}.json", json.dumps(about, indent=1) + "\n")
    write_atomically(out / f"black_box_{config.title}.md", as_markdown(rows, about))
    print(f"{len(rows)} pairs; {out}/black_box_{config.title}.md")

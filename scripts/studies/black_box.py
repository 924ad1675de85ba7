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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import evaluate
import tyro
from judging import subjects
from rich.console import Console
from rich.progress import track
from typing_extensions import override

from advgame.errors import InputError
from advgame.evaluation import evaluate as attack_all
from advgame.evaluation.sweep_report import group
from advgame.run import table
from advgame.run.cells import split_flags
from advgame.run.devices import make_fabric
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import RunFolder, device_name
from advgame.run.options import Count, parse_eps
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Column, Columns, Row, Runs
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
class Config(StudyConfig):
    """Attack classifiers with the adversarial examples of others."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders of the targets"""
    surrogates: tuple[str, ...] = ()
    """run folders of the surrogates; when empty, the targets called plain, fgsm and pgd"""
    title: str = ""
    """name of the table's files; the data set's when empty"""
    n: Count | None = None
    """test images; None takes all"""
    data_dir: str | None = None
    """data folder, where the classifiers' data set needs one"""
    seeds: Count = 1
    jobs: Count = 1
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    runs_dir: str = "runs/black_box"
    """evaluations, a folder per pair; not committed"""
    out: str = "results/l2l"


class BlackBox(Study[Config]):
    """A cell is a pair of a target and a surrogate."""

    ending = ("Hardware: {device}. Command: `{command}`.",)
    about, listed, identity = "Black box", "pairs", ("target", "surrogate", "seed")
    sharing, parallel = ("n",), False

    @property
    @override
    def stem(self) -> str:
        title = self.config.title or (self.task[1] if self.config.what else "")
        if not title:
            raise InputError("name the run folders of the classifiers to attack")
        return f"black_box_{title}"

    @property
    @override
    def root(self) -> Path:
        return Path(self.config.runs_dir) / self.stem.removeprefix("black_box_")

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Target and surrogate folders: the same network, another seed.

        Raises:
            InputError: no such pair, targets of different tasks, or folders of one name, by which
                the results tell them apart.
        """
        what = self.config.what
        sources = self.config.surrogates or tuple(
            path for name in SURROGATES for path in what if group(Path(path).name) == name
        )
        about = {path: about_run(path) for path in (*what, *sources)}
        names = Counter(Path(path).name for path in about)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"two folders are called {twice[0]}: results tell them by their names")
        found = [
            (target, source)
            for target in what
            for source in sources
            if about[target][0] == about[source][0] and about[target][1] != about[source][1]
        ]
        if not found:
            raise InputError(
                "no pair of a target and a surrogate with the same network, data set and radius "
                "and another seed: name surrogates with --surrogates"
            )
        if len({about[target][0] for target, _ in found}) > 1:
            raise InputError(
                "the targets differ in network, data set or radius: one table for each"
            )
        return found

    @property
    def task(self) -> tuple[str, str, float]:
        """Network, data set and radius of all."""
        return about_run(self.pairs[0][0])[0]

    def cells(self) -> dict[str, dict[str, Any]]:
        """Folder -> paths, names and seed of every pair."""
        found = {}
        for paths, seed in product(self.pairs, self.seeds()):
            target, surrogate = (Path(path).name for path in paths)
            name = f"{target}--{surrogate}-judged{seed}".removesuffix("-judged0")
            found[name] = {"target": target, "surrogate": surrogate, "seed": seed, "paths": paths}
        return found

    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        """Evaluate pairs into folders of their own; finished attacks are kept there."""
        config = self.config
        if config.finished_only or not cells:
            done = [self.root / name / "report.json" for name in cells]
            yield [read_json(path) for path in done if path.exists()]
            return
        words = ["--n", str(config.n), *split_flags(config.extra)]
        words += ["--data-dir", config.data_dir] if config.data_dir else []
        device = make_fabric(config.accelerator, 1, "32-true").device
        paths = dict.fromkeys(path for cell in cells.values() for path in cell["paths"])
        asked = [evaluate.job.check(evaluate.job.parse([path, *words])) for path in paths]
        data = subjects.images(*asked)[0].to(device)
        models = {
            path: subjects.classifier(one, data, path).to(device)
            for path, one in zip(paths, asked, strict=True)
        }
        for name, cell in track(cells.items(), console=Console(stderr=True), transient=True):
            target, surrogate = cell["paths"]
            verdicts = attack_all(
                models[target],
                data,
                Linf(self.task[2]),
                tuple(ATTACKS),
                seed=cell["seed"],
                batch_size=asked[0].batch_size,
                surrogate=models[surrogate],
                folder=self.root / name,
            )
            about = {"n": len(data), "device": device_name(device)}
            run = {key: cell[key] for key in self.identity} | about | verdicts.accuracy()
            write_atomically(self.root / name / "report.json", json.dumps(run) + "\n")
            yield [run]

    def facts(self) -> dict[str, Any]:
        """The data set and the radius."""
        return {"dataset": self.task[1], "eps": self.task[2]}

    def found(self, runs: Runs) -> dict[str, Any]:
        """Nothing more: the table is made of the pairs."""
        return {}

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The table for people: a row per target, a column per surrogate and attack."""
        dataset = about["dataset"]
        whose = dataset if dataset in PAPER else "cifar10"
        theirs = PAPER[whose]
        shown = [{**run, "method": group(run["target"])} for run in over_seeds(runs)]
        sources = dict.fromkeys(group(run["surrogate"]) for run in runs)

        def column(source: str, attack: str) -> Column:
            def words(row: Row) -> str:
                pairs = [run for run in row.runs if group(run["surrogate"]) == source]
                cell = table.Percent(attack)(replace(row, runs=pairs))
                if not pairs or row.name not in theirs or source not in SURROGATES:
                    return cell
                place = 2 * SURROGATES.index(source) + list(ATTACKS).index(attack)
                return f"{cell} ({theirs[row.name][place]})"

            return words

        def most(row: Row) -> str:
            return str(max(Counter(group(run["surrogate"]) for run in row.runs).values()))

        columns: Columns = {
            **{"target": table.row_name, "pairs": most},
            **{f"{s}, {title}": column(s, a) for s in sources for a, title in ATTACKS.items()},
        }
        return [
            f"# {self.about} on {dataset}: surrogates of the same architecture, another seed",
            f"ε = {about['eps']}, {runs[0]['n']} test images; accuracy in %, mean ± sd over pairs "
            f"of a target and a surrogate of different seeds{told_draws(runs)}. In brackets the "
            f"paper's ({whose}, WRN-34-10).",
            table.render(columns, table.rows(shown)),
        ]


def over_seeds(runs: Runs) -> list[dict[str, Any]]:
    """A run per pair, with means over the seeds of the attacks: these are no further pairs."""
    pairs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        pairs.setdefault((run["target"], run["surrogate"]), []).append(run)
    return [
        {**same[0], **{attack: mean(run[attack] for run in same) for attack in ATTACKS}}
        for same in pairs.values()
    ]


def told_draws(runs: Runs) -> str:
    """How many seeds of the attacks a pair's numbers are means over; "" of one."""
    count = len({run.get("seed", 0) for run in runs})  # older results have one
    return f", each a mean over {count} seeds of the attacks" if count > 1 else ""


def about_run(path: str) -> tuple[tuple[str, str, float], int]:
    """Network, data set and radius that a run was made for; its seed."""
    own = RunFolder.open(Path(path)).about()["config"]
    if own.get("norm", "Linf") != "Linf":
        raise InputError(f"{path} was trained in {own['norm']}: this study's tables are of L∞")
    return (own["model"], own["dataset"], parse_eps(own["eps"])), own["seed"]


main = BlackBox.main

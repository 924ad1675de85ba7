"""Several classifiers in front of the same attacks: one table, the worst case beside it.

    python scripts/study.py referee runs/study/digits/fixed-seed0 runs/study/digits/reinforce-seed0

Each classifier is evaluated by `evaluate.py` into a folder of its own, finished ones are kept and
killed ones go on, so that the command can be given again. The default attacks are the columns of
the ADT poster (Dong et al. 2020) and AutoAttack. Writes `<out>/<title>.json`, `.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import evaluate
import tyro
from sweeps import names_of
from typing_extensions import override

from advgame.errors import InputError
from advgame.evaluation.cells import file_name
from advgame.run import table
from advgame.run.cells import check_cells, split_flags
from advgame.run.files import read_json
from advgame.run.options import Count, Names
from advgame.run.study import StudyConfig
from advgame.run.table import Columns, Row, Runs, Value
from advgame.run.training_study import Flags, TrainingStudy
from advgame.statistics import wilson

POSTER = (
    "adt:fgsm", "adt:pgd20", "adt:pgd100", "adt:mim20", "adt:cw30", "adt:fea", "autoattack",
)  # fmt: skip


@dataclass(frozen=True)
class Config(StudyConfig):
    """Evaluate several classifiers under the same attacks, in one table."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders of the classifiers"""
    title: str = "referee"
    """name of the table's files"""
    attacks: Names = POSTER
    """names, see `evaluate --list`"""
    n: Count | None = None
    """test images; None takes all"""
    data_dir: str | None = None
    """data folder, where the classifiers' data set needs one"""
    seeds: Count = 1
    runs_dir: str = "runs/referee"
    """evaluations, a folder per classifier; not committed"""
    out: str = "results/referee"


class Referee(TrainingStudy[Config]):
    """A row per classifier; its cells are evaluations."""

    about, files, script = "Referee", "{title}", evaluate
    ending = ("Hardware: {devices}. Command: `{command}`.",)
    flat, listed, identity, sharing = True, "reports", ("classifier", "seed"), ("attacks", "n")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        names = names_of(config.runs, lambda what: Path(what).name)
        self.called = dict(zip(config.runs, names, strict=True))
        self.methods = dict.fromkeys(names, "")

    def cells(self) -> dict[str, list[str]]:
        """Folder -> flags of every evaluation."""
        config = self.config
        shared = ["--attacks", *config.attacks, "--n", str(config.n)]
        shared += ["--data-dir", config.data_dir] if config.data_dir else []
        shared += split_flags(config.extra)
        if not config.runs:
            raise InputError("name the run folders of the classifiers to compare")
        return {
            f"{config.title}-{self.short(what)}-judged{seed}".removesuffix("-judged0"): [
                *(what, *shared, "--seed", str(seed))
            ]
            for what in config.runs
            for seed in self.seeds()
        }

    def short(self, what: str) -> str:
        """A classifier's name as a part of a folder's: one that is a path has a checksum."""
        name = self.called[what]
        return file_name(name) if "/" in name else name

    def key(self, name: str, cell: Any) -> tuple[str, int]:
        """The classifier, and the seed of its evaluation."""
        return self.called[cell[0]], int(cell[-1])

    def prepare(self, cells: Mapping[str, Flags]) -> None:
        """Refuse cells that cannot work, or that were evaluated otherwise before."""
        check_cells(evaluate, cells, self.root)

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        own = read_json(folder / "config.json")["config"]
        report = read_json(folder / "report.json")
        return {"classifier": self.called[own["what"]], "seed": own["seed"], **report}

    def found(self, runs: Runs) -> dict[str, Any]:
        """Refuses classifiers that cannot stand in one table."""
        if len({(run["dataset"], *run["threat"].values(), run["n"]) for run in runs}) > 1:
            raise InputError(
                "the classifiers are of different data sets or radii: one table for each"
            )
        return {}

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        first = runs[0]
        columns: Columns = {
            "classifier": table.row_name,
            **{name: table.Percent(accuracy_under(name)) for name in first["accuracy"]},
            "worst case": worst_case,
            "flags": lambda row: table.names(f["name"] for run in row.runs for f in run["flags"]),
        }
        return [
            f"# {first['dataset']}, {first['threat']['norm']} ε = {first['threat']['eps']:.3g}, "
            f"{first['n']} test images",
            "Accuracy in %, of the weights that validation chose. Worst case: images that survive "
            "every attack, with its 95 % interval (Wilson).",
            table.render(columns, table.rows(runs, "classifier")),
        ]


def accuracy_under(attack: str) -> Value:
    """What reads an attack's accuracy from a run; None where it was not made."""
    return lambda run: run["accuracy"].get(attack)


def worst_case(row: Row) -> str:
    """Column: the share of images that survive everything, with its interval over images."""
    low, high = wilson(mean(run["worst_case"] for run in row.runs), row["n"])
    return f"{table.Percent('worst_case')(row)} ({100 * low:.1f} – {100 * high:.1f})"


main = Referee.main

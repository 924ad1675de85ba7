"""Are mixtures of weights that a study has committed more robust than one classifier?

    python scripts/study.py mixtures --data-dir DIR
    python scripts/study.py mixtures --data-dir DIR --rows pgd-at-2 pgd-at-2+pgd-at-2

The members come from `study.py compare --weights`, which keeps the weights of every cell that it
judged. A row is games with + between them: a classifier of each, with equal weights. A game that
comes again gives that of its next seed. `long:GAME` is one classifier from a study with a larger
budget (`--longer`), the control that has a mixture's compute.

All are judged as mixtures, a single one with weight 1, as `study.py arena` judges its own.

Where a game comes twice, each of its classifiers is in two of the row's mixtures. These are not
independent, so that spreads and intervals are of the jackknife over classifiers, `jackknifed`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from typing_extensions import override

from advgame.arena.mixture_file import write_mixture
from advgame.errors import InputError, unknown
from advgame.run import table
from advgame.run.cells import Cell, split_flags
from advgame.run.files import read_json
from advgame.run.options import Count, Names
from advgame.run.settings import Dataset
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs
from studies.arena import gap, judged_columns, judged_how, judgement

LONG = "long:"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Judge mixtures of classifiers whose weights are there."""

    rows: tuple[str, ...] = (
        "pgd-at-2",
        "pgd-at-2+pgd-at-2",
        "pgd-at-2+stopper",
    )
    """games with + between them, or long:GAME; the first is what the others are compared with"""
    results: str = "results/cifar10/cifar10-compute.json"
    """of a study whose weights lie in weights/NAME beside it"""
    longer: str = "results/cifar10/long/cifar10-compute.json"
    """the same of long:GAME"""
    model: str = "lean_resnet-half"
    """the network of all"""
    dataset: Dataset = "cifar10"
    """of the trainings"""
    data_dir: str | None = None
    """data folder"""
    attacks: Names = ("autoattack-lite",)
    """on each member, beside the attacks on the mixture"""
    n: Count = 500
    """test images"""
    runs_dir: str = "runs/mixtures"
    out: str = "results/arena"


class Mixtures(Study[Config]):
    """Mixtures of weights, and their judgement."""

    about = "Mixtures of committed classifiers on {dataset}"
    files = "{dataset}-mixtures"
    sharing = ("n", "attacks", "model", "results", "longer")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.control = config.rows[0] if config.rows else ""

    @override
    def check(self) -> None:
        super().check()
        for cell in self.cells().values():
            for path in map(self.weights, self.members(**cell)):
                if not path.exists():
                    raise InputError(f"{path} is not there: study.py compare --weights writes it")

    def cells(self) -> dict[str, dict[str, Any]]:
        """What is judged: a row of games, once per seed of its first classifier."""
        return {
            f"{row.replace(':', '-')}-seed{seed}": {"method": row, "seed": seed}
            for seed in self.seeds()
            for row in self.config.rows
        }

    def members(self, method: str, seed: int) -> list[Run]:
        """What the results say of every member of a row, with ``path``, their file.

        Raises:
            InputError: a classifier that they do not have.
        """
        path = self.config.longer if method.startswith(LONG) else self.config.results
        found = list[Run]()
        for game in method.removeprefix(LONG).split("+"):
            of_game = {run["seed"]: run for run in self.trained[path] if run["method"] == game}
            if not of_game:
                raise unknown("game", game, {run["method"] for run in self.trained[path]})
            again = sum(one["method"] == game for one in found)
            number = self.seeds()[(self.seeds().index(seed) + again) % len(self.seeds())]
            if number not in of_game:
                raise InputError(f"{path} has {game} of the seeds {sorted(of_game)}: see --seeds")
            if again and again + 1 >= len(self.seeds()):
                raise InputError(
                    f"{method} would be one mixture of all {len(self.seeds())} seeds: ask for more"
                )
            found.append({**of_game[number], "path": path})
        return found

    @cached_property
    def trained(self) -> Mapping[str, Runs]:
        """Of each results file that a row needs: what it says of every cell."""
        paths = {self.config.results}
        if any(row.startswith(LONG) for row in self.config.rows):
            paths.add(self.config.longer)
        return {path: read_json(Path(path))["runs"] for path in paths}

    def weights(self, member: Run) -> Path:
        """Where `study.py compare --weights` put what a member learned."""
        path = Path(member["path"])
        name = f"{member['method']}-seed{member['seed']}.safetensors"
        return path.parent / "weights" / path.stem / name

    @override
    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse a folder whose mixtures were judged otherwise."""
        of = [self.config.results, self.config.longer]
        self.agree(self.root / "judged", shlex.join([*self.judging(), *of]))

    def judging(self) -> list[str]:
        """Flags of `evaluate.py` that every row is judged with."""
        config = self.config
        flags = ["--model", config.model, "--dataset", config.dataset, *split_flags(config.extra)]
        return [*flags, "--attacks", *config.attacks, "--n", str(config.n)]

    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        """Give a row's classifiers equal weights, and have `evaluate.py` attack the mixture."""
        judge, todo = Path(__file__).parents[1] / "evaluate.py", []
        for name, cell in cells.items():
            members = self.members(**cell)
            mixture = self.root / "mixtures" / f"{name}.json"
            write_mixture(mixture, [*map(self.weights, members)], [1 / len(members)] * len(members))
            words = [str(mixture), *self.judging(), "--eps", str(members[0]["eps"])]
            words += ["--norm", members[0]["norm"]]
            words += ["--data-dir", self.config.data_dir] if self.config.data_dir else []
            todo.append(Cell(judge, self.root / "judged" / name, words))
        if not self.config.finished_only:
            self.run_all(todo)
        for (name, cell), judged in zip(cells.items(), todo, strict=True):
            if judged.finished:
                members, found = self.members(**cell), judgement(self.root / "judged" / name)
                more = {
                    "forwards": sum(member["spent"] for member in members),
                    "drawn": [member["seed"] for member in members],
                }
                yield [{**cell, **found, **more}]

    @override
    def place(self, run: Mapping[str, Any]) -> Any:
        rows = self.config.rows
        return rows.index(run["method"]) if run["method"] in rows else len(rows)

    @override
    def found(self, runs: Runs) -> dict[str, Any]:
        return super().found(jackknifed(runs))

    @override
    def check_summary(self, runs: Runs, about: Mapping[str, Any]) -> None:
        super().check_summary(jackknifed(runs), about)

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        columns: table.Columns = {
            **judged_columns(self.control),
            "forwards per training image": table.Mean("forwards", 0),
        }
        rows = table.rows(jackknifed(runs))
        return [
            f"# {self.title}",
            f"{judged_how(runs[0])} GAME+GAME: one of each, or of two seeds. {LONG}GAME: one "
            "classifier with a larger budget.",
            table.render(columns, rows),
            "Differences of any two rows, paired over seeds, in points with 95 % intervals over "
            "seeds, on the same images. Mixtures of one game share classifiers: sd and intervals "
            "of such rows are by the jackknife over classifiers.",
            pairs(rows),
        ]


def jackknifed(runs: Runs) -> list[Run]:
    """The same runs; those of rows whose mixtures share classifiers as jackknife pseudo-values.

    The pseudo-value of a seed is S times the mean over all S mixtures less S − 1 times the mean
    over those without that seed's classifier (Tukey 1958). Their mean is the mixtures'. Their
    spread is that of independent classifiers where two of three are mixed; of five seeds it is
    about a quarter too wide, as a classifier's neighbours lose half their weight with it. A row
    that is not complete becomes one run: it has a mean and no spread.

    Args:
        runs: of the study, with the seeds of their members in ``drawn``.
    """
    found = list[Run]()
    for row in table.rows(runs):
        drawn = [{*run.get("drawn", [run["seed"]])} for run in row.runs]
        if all(len(seeds) == 1 for seeds in drawn):
            found += row.runs
            continue
        numbers = [key for key, value in row.runs[0].items() if isinstance(value, float)]
        count, means = len(row.runs), {key: mean(run[key] for run in row.runs) for key in numbers}
        without = {
            run["seed"]: [
                other
                for other, seeds in zip(row.runs, drawn, strict=True)
                if run["seed"] not in seeds
            ]
            for run in row.runs
        }
        if set[int]().union(*drawn) != without.keys() or not all(without.values()):
            found.append({**row.runs[0], **means})
            continue
        for run in row.runs:
            left = {key: mean(other[key] for other in without[run["seed"]]) for key in numbers}
            values = {key: count * means[key] - (count - 1) * left[key] for key in numbers}
            found.append({**run, **values})
    return found


def pairs(rows: Sequence[table.Row]) -> str:
    """A table of the differences of each row to those before it."""
    values: Mapping[str, table.Value] = {
        "worst of all": "worst_case",
        "adaptive PGD alone": "adaptive",
        "adaptive − worst": gap,
    }
    body = [
        [
            row.name,
            other.name,
            *(table.Paired(one, minus=other.name)(row) for one in values.values()),
        ]
        for number, row in enumerate(rows)
        for other in rows[:number]
    ]
    return table.markdown(["row", "less", *values], body)


main = Mixtures.main

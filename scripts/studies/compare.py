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
came out, and `--counted` takes the costs from another file, e.g. a first try's. Or `--forwards`
gives all the same budget, see `--budget` of the trainings, and `--cost` says what passes of each
kind took on this network (results/cifar10/README.md has the commands).

Writes `<out>/<dataset>-<budget>.json`, `.csv`, `.md` and `.png`; earlier cells in them stay.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean, mean
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro
from typing_extensions import override

from advgame.choices import TRANSFER
from advgame.classifiers.names import is_built_in
from advgame.data.names import DATASETS, check_dataset, is_own, recipe, short_name
from advgame.errors import InputError, unknown
from advgame.evaluation import check_attacks
from advgame.evaluation.flags import wider_gap
from advgame.evaluation.pictures import comparison_figure
from advgame.run import table
from advgame.run.cells import Cell, check_cells, size_in, split_flags, usable, without
from advgame.run.curves import Rows, save_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.options import Count, Names, Positive
from advgame.run.selection import selected_by
from advgame.run.table import Row, Runs
from advgame.run.training_study import (
    Finished,
    Flags,
    MethodsConfig,
    MethodsStudy,
    attacks_of,
    selection,
    training_images,
)

CONTROL, SURROGATE_SEED = "pgd-at", 1000
_SCATTER = "train.py --game feature-scatter --true-probability 0.5"
_LAS_TRADES = "train_las_at.py --objective trades --space las-trades-cifar10"
_LAS_AWP = "train_las_at.py --awp 0.01 --clamp --space las-awp-cifar10"
# name -> script and flags
GAMES = {
    "standard": "train.py --game standard",
    "fgsm-at": "train.py --game fgsm-at",
    "fast": "train.py --game fast",
    "n-fgsm": "train.py --game n-fgsm",
    "free": "train.py --game free",
    CONTROL: "train.py --game pgd-at",
    "alp": "train.py --game alp",
    "feature-scatter": _SCATTER,
    "feature-scatter-repo": f"{_SCATTER} --transport repo",
    "trades": "train.py --game trades",
    "mart": "train.py --game mart",
    "awp": "train.py --game pgd-at --awp 0.01",
    "trades-awp": "train.py --game trades --awp 0.005",
    "las-at": "train_las_at.py",
    "las-at-random": "train_las_at.py --agent random",
    "las-trades": _LAS_TRADES,
    "las-trades-random": f"{_LAS_TRADES} --agent random",
    "las-awp": _LAS_AWP,
    "las-awp-random": f"{_LAS_AWP} --agent random",
    "l2l-grad": "train_l2l.py --attacker grad",
    "l2l-two-step": "train_l2l.py --attacker two-step",
    "adt-exp": "train_adt.py --method exp",
    "adt-exp-am": "train_adt.py --method exp-am",
    "adt-imp-am": "train_adt.py --method imp-am",
}
# further ones, compared where they are asked for
MORE = {
    "pgd-at-2": "train.py --game pgd-at --attack-steps 2 --step-size 0.625",
    "pgd-at-4": "train.py --game pgd-at --attack-steps 4 --step-size 0.375",
    "pgd-at-7": "train.py --game pgd-at --attack-steps 7 --step-size 0.25",
    "stopper": "train_las_at.py --agent stopper",
    "shuffled": "train_las_at.py --agent shuffled",
    "fat": "train_las_at.py --agent fat",
    "short": "train_las_at.py --agent short",
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
RECIPES |= {
    "fashionmnist": f"{RECIPES['mnist']} --eps 0.1",
    "grey": f"{RECIPES['mnist']} --eps 8/255",
    "small": f"{RECIPES['cifar10']} --model small_cnn",
    "": RECIPES["digits"],
    **dict.fromkeys(("cifar100", "svhn", "tinyimagenet"), RECIPES["cifar10"]),
}
COLUMNS = (
    "adt:fgsm", "adt:pgd20", "adt:pgd100", "adt:mim20", "adt:cw30", "fea", "transfer", "spsa",
    "autoattack",
)  # fmt: skip


POSTER_IS = "The ADT poster, CIFAR-10, WRN-28-10, ε 8/255; worst of its columns:"
# accuracy in %, as Markdown
POSTER = """\
| game | clean | FGSM | PGD-20 | PGD-100 | MIM | C&W | FeaAttack | worst |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| standard | 94.81 | 12.05 | 0 | 0 | 0 | 0 | 0 | 0 |
| fgsm-at | 93.8 | 79.86 | 0.12 | 0.04 | 0.06 | 0.13 | 0.01 | 0.01 |
| pgd-at | 86.91 | 58.3 | 50.03 | 49.4 | 51.4 | 50.23 | 50.46 | 48.26 |
| alp | 86.81 | 56.83 | 48.97 | 48.6 | 50.13 | 49.1 | 48.51 | 47.9 |
| feature-scatter | 89.98 | 77.4 | 70.85 | 68.81 | 72.74 | 58.46 | 37.45 | 37.4 |
| adt-exp | 86.89 | 60.41 | 52.18 | 51.69 | 53.27 | 52.49 | 52.38 | 50.56 |
| adt-exp-am | 87.82 | 62.42 | 51.95 | 51.26 | 52.99 | 51.75 | 52.04 | 50.04 |
| adt-imp-am | 88 | 64.89 | 52.28 | 51.23 | 52.64 | 52.65 | 51.89 | 49.81 |"""
# what a reader must know of a column
TOLD = {
    "transfer": "Transfer: PGD-20 made on another PGD-AT classifier.",
    "fea": "`fea` aims at 20 images, the poster's FeaAttack at 200.",
}
PGD, AUTOATTACK = "accuracy_adt:pgd20", "accuracy_autoattack"


Budget = Literal["epochs", "compute"]


@dataclass(frozen=True)
class Config(MethodsConfig):
    """Compare games on the same data, network, schedule and seeds."""

    methods: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--games"])] = tuple(GAMES)
    """which games; pgd-at-2, -4 and -7, stopper, shuffled, fat and short are left out by default"""
    budget: Budget = "epochs"
    """what is equal: passes over the training images, or passes through the classifier"""
    counted: str | None = None
    """of equal compute: results whose runs say what a step costs (<out>/<dataset>-epochs.json)"""
    forwards: Positive | None = None
    """of equal compute: the budget of a whole training, per training image; None is as many passes
    as pgd-at's epochs make"""
    cost: str | None = None
    """of --forwards: what F, F + B_x and F + B take on this network, a file of
    `benchmark.py --only games`; None is 1, 2 and 3 forwards"""
    attacks: Names = COLUMNS
    """of the evaluations, see `evaluate --list`"""
    eval_n: Count = 360
    """test images"""
    against: str = CONTROL
    """game that the others are compared with, paired over seeds"""
    weights: str | None = None
    """a folder for the weights of every cell that were judged"""
    judged: str = "judged"
    """folder of the evaluations within the runs': other attacks or images need another"""
    runs_dir: str = "runs/compare"
    out: str = "results/compare"


class Compare(MethodsStudy[Config]):
    """Trainings by several scripts, then evaluations of all by the same attacks."""

    about, files = "Games", "{dataset}-{budget}"
    ending = (
        "Hardware: {devices}, {jobs} at a time. Cells made at commit {commits}.",
        "Command: `{command}`.",
    )
    methods = GAMES | MORE
    unsaid: Mapping[str, Any] = {"budget": None, "prices": None}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.control = config.against

    @property
    def judged(self) -> Path:
        """The folder of the cells' evaluations."""
        return self.root / self.config.judged

    def same(self) -> str:
        """What the cells of one table share."""
        return shlex.join([*self.judging(), *split_flags(self.config.extra)])

    def judging(self) -> list[str]:
        """Flags of `evaluate.py` that every evaluation has."""
        return ["--attacks", ",".join(self.config.attacks), "--n", str(self.config.eval_n)]

    def shared(self) -> list[str]:
        """Flags of every training; of a flag that comes twice the last counts."""
        # a training's own report is not looked at
        report = ["--attacks", "fgsm", "--eval-n", "20"]
        dataset, extra = self.config.dataset, self.config.extra
        shared = split_flags(f"{RECIPES[recipe(dataset, size_in(extra))]} {extra}")
        return [*self.images(), *report, *shared]

    @override
    def check(self) -> None:
        config = self.config
        super().check()
        if len(set(config.methods)) < len(config.methods):
            raise InputError(f"a game is asked for twice: {', '.join(config.methods)}")
        if config.counted and (config.budget == "epochs" or config.forwards):
            raise InputError("--counted is for --budget compute without --forwards")
        if config.forwards and config.budget == "epochs":
            raise InputError("--forwards is for --budget compute")
        if config.cost and not config.forwards:
            raise InputError("--cost is for --forwards")
        if config.against not in self.methods:
            raise unknown("method", config.against, self.methods)
        if self.surrogate_judged():
            raise InputError(
                f"{CONTROL} with seed {SURROGATE_SEED} is what transferred examples are made on, "
                "and cannot be judged by them: choose a --first-seed that leaves it out"
            )
        check_attacks(config.attacks)
        if not config.attacks:
            raise InputError("--attacks names none: a table needs one")
        check_dataset(config.dataset, config.data_dir)
        if config.dataset in DATASETS[1:] and not config.data_dir:
            raise InputError(f"{config.dataset} needs --data-dir, the folder with its files")

    def epochs(self) -> dict[str, int]:
        """Passes over the training images, by game.

        Raises:
            InputError: equal compute without the runs of equal epochs that say what a step costs.
        """
        config, control = self.config, self.script_of(CONTROL)
        if (whole := control.job.parse(self.flags(CONTROL)).epochs) < 1:
            raise InputError(f"epochs must be 1 or above, not {whole}")
        if config.budget == "epochs":  # Free teaches eight times per pass
            return {
                game: max(1, whole // 8) if game == "free" else whole for game in config.methods
            }
        path = Path(
            config.counted or Path(config.out) / f"{short_name(config.dataset)}-epochs.json"
        )
        if not path.exists():
            raise InputError(f"{path} is missing: run --budget epochs first, it counts the passes")
        cost: dict[str, list[float]] = {}
        for run in read_json(path).get("runs", ()):
            cost.setdefault(run["method"], []).append(run["forwards_per_image"])
        if missing := [game for game in (CONTROL, *config.methods) if game not in cost]:
            raise InputError(f"{path} does not hold {missing[0]}: it must be run first")
        step = mean(cost[CONTROL])
        return {game: max(1, round(whole * step / mean(cost[game]))) for game in config.methods}

    def lengths(self) -> dict[str, list[str]]:
        """Flags that say how long a training is, by game."""
        config = self.config
        if config.forwards is None:
            return {game: ["--epochs", str(length)] for game, length in self.epochs().items()}
        budget = ["--budget", f"{config.forwards:g}"]
        if config.cost is not None:
            budget += ["--prices", *(f"{price:.3f}" for price in self.prices(config.cost))]
        return dict.fromkeys(config.methods, budget)

    def prices(self, cost: str) -> tuple[float, float]:
        """What B_x and B take, in forwards.

        Raises:
            InputError: a file that does not say it of this network.
        """
        network = self.script_of(CONTROL).job.parse(self.flags(CONTROL)).model
        for case in read_json(Path(cost)).get("groups", {}).get("games", ()):
            if case["network"] == network:
                took = {name: row["median_s"] for name, row in case["contestants"].items()}
                return took["F + B_x"] / took["F"] - 1, took["F + B"] / took["F"] - 1
        raise InputError(
            f"{cost} does not hold {network}: benchmark.py --only games --network {network} writes "
            "what its passes take"
        )

    def script_of(self, cell: str) -> ModuleType:
        """The training script of a cell."""
        script, *_ = self.methods[cell.rsplit("-seed", 1)[0]].split()
        return import_module(script.removesuffix(".py"))

    @override
    def cell(self, name: str, flags: Flags) -> Cell:
        return Cell(Path(str(self.script_of(name).__file__)), self.root / name, flags)

    @override
    def flags(self, method: str) -> list[str]:
        script, *own = split_flags(self.methods[method])
        given = usable(self.shared(), own, self.script_of(method))
        learns = script == "train_las_at.py" and not {"--agent", "--reward-interval"} & {*own}
        more = ["--reward-interval", "10"] if learns and self.config.dataset == "cifar10" else []
        return [*given, *own, *more]

    def cells(self) -> dict[str, list[str]]:
        """Folder -> flags of every training."""
        lengths = self.lengths()
        idle = [] if self.config.forwards is None else ["epochs"]
        return {
            name: [*without(words, idle), *lengths[name.rsplit("-seed", 1)[0]]]
            for name, words in super().cells().items()
        }

    def surrogate(self) -> dict[str, list[str]]:
        """The training of the classifier whose adversarial examples are transferred, if any are."""
        if not set(TRANSFER) & {*self.config.attacks}:
            return {}
        alone = replace(self.config, methods=(CONTROL,), seeds=1, first_seed=SURROGATE_SEED)
        if self.config.forwards is None:
            alone = replace(alone, budget="epochs", counted=None)
        return type(self)(alone).cells()

    def surrogate_judged(self) -> bool:
        """Whether a cell would be attacked by its own adversarial examples as another's."""
        transferred = set(TRANSFER) & {*self.config.attacks}
        return bool(transferred and CONTROL in self.asked() and SURROGATE_SEED in self.seeds())

    def evaluations(self, cells: Mapping[str, Flags]) -> dict[str, list[str]]:
        """Folder -> flags of every evaluation."""
        words = [*self.images(), *self.judging()]
        for name in self.surrogate():
            words += ["--surrogate", str(self.root / name)]
        models = {
            name: self.script_of(name).job.parse(flags).model for name, flags in cells.items()
        }
        own = {name: [] if is_built_in(one) else ["--model", one] for name, one in models.items()}
        return {name: [str(self.root / name), *words, *own[name]] for name in cells}

    def prepare(self, cells: Mapping[str, Flags]) -> None:
        """Refuse cells that cannot work, or of other epochs than games are asked for now."""
        for name, words in (self.surrogate() | dict(cells)).items():
            check_cells(self.script_of(name), {name: words})
        self.check_extra(cells, heard=["epochs"])  # from which lengths follow
        asked = self.epochs() if self.config.forwards is None else {}
        lengths = [(run["method"], run["epochs"]) for run in self.earlier()]
        for path in self.root.glob("*-seed*/config.json"):
            settings = read_json(path)["config"]
            lengths.append((path.parent.name.rsplit("-seed", 1)[0], settings["epochs"]))
        for game, length in lengths:
            if length != asked.get(game, length):
                raise InputError(
                    f"{game} has cells of {length:.0f} epochs in the results or in {self.root}, "
                    f"not {asked[game]}: the same --counted, or another --out and --runs-dir"
                )
        words = split_flags(self.config.extra)
        if self.config.forwards is not None:
            prices = map(str, self.facts()["prices"])
            words += ["--forwards", f"{self.config.forwards:g}", "--prices", *prices]
        self.agree(self.root, shlex.join(words))
        self.agree(self.judged, shlex.join(self.judging()))

    def run(self, cells: Mapping[str, Flags]) -> None:
        """Train, the surrogate first, and evaluate each as soon as it is trained."""
        others, judgings = self.surrogate(), self.evaluations(cells)
        cells = self.long_ones_first(cells)
        todo = [self.cell(name, flags) for name, flags in others.items()]
        judge, needed = Path(__file__).parents[1] / "evaluate.py", [one.folder for one in todo]
        for name, flags in cells.items():
            training = self.cell(name, flags)
            after = [training.folder, *needed]
            todo += [training] if name not in others else []
            todo.append(Cell(judge, self.judged / name, judgings[name], after))
        self.run_all(todo)

    @override
    def make(self, cells: Mapping[str, Flags]) -> Iterator[Runs]:
        for found in super().make(cells):
            for run in found if self.config.weights else ():
                name = f"{run['method']}-seed{run['seed']}"
                best = self.root / name / "checkpoints" / "best.safetensors"
                kept = Path(str(self.config.weights)) / self.stem / best.with_stem(name).name
                write_atomically(kept, best.read_bytes())
            yield found

    def long_ones_first(self, cells: Mapping[str, Flags]) -> dict[str, Flags]:
        """Cells as they begin: of each seed the games first that took longest in the results.

        A long one that began last would have all but one of several jobs wait. Games that the
        results do not hold yet come before the others.
        """
        took: dict[str, list[float]] = {}
        for run in self.earlier():
            took.setdefault(run["method"], []).append(run["epochs"] * run["seconds_per_epoch"])

        def place(name: str) -> tuple[int, float]:
            game, seed = self.key(name, None)
            return seed, -mean(took.get(game, [math.inf]))

        return {name: cells[name] for name in sorted(cells, key=place)}

    @override
    def finished(self, name: str) -> bool:
        return (self.judged / name / "report.json").exists()

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        cell, report = Finished(folder), read_json(self.judged / folder.name / "report.json")
        judged = {f"accuracy_{attack}": value for attack, value in report["accuracy"].items()}
        if {PGD, AUTOATTACK} <= judged.keys():  # what AutoAttack takes from what PGD-20 leaves
            judged["gap"] = judged[PGD] - judged[AUTOATTACK]
        epochs, seconds = cell.trained_epochs(), cell.rows[-1]["time/seconds"]
        spent = {"spent": cell.rows[-1]["cost/spent"]} if "cost/spent" in cell.rows[-1] else {}
        scores = [row["eval/robust"] for row in cell.rows if "eval/robust" in row]
        chosen = {"validation": max(scores), "validation_last": scores[-1]} if scores else {}
        # of the training's own report only signs of life count: it saw few images
        dead = [name for name in cell.facts()["flags"] if name.startswith("dead_")]
        return {
            **cell.facts(),
            "n": report["n"],
            **report["threat"],
            "epochs": float(epochs),
            "train_n": cell.settings["train_n"],
            **judged,
            "worst_case": report["worst_case"],
            "selected_by": selected_by(cell.report),
            "seconds": seconds,
            "seconds_per_epoch": seconds / epochs,
            "forwards_per_image": mean_over_steps(cell.rows, "attacker/forwards_per_image"),
            **spent,
            **chosen,
            "flags": [flag["name"] for flag in report["flags"]]
            + dead
            + ["catastrophic_overfitting"] * ("catastrophic_overfitting" in cell.report),
        }

    def found(self, runs: Runs) -> dict[str, Any]:
        """How many cells shared the machine, for their seconds."""
        config = self.config
        return {"jobs": config.jobs, "against": config.against, **super().found(runs)}

    @override
    def facts(self) -> dict[str, Any]:
        """Of equal compute the budget besides, in forwards, and the prices of other passes."""
        config, found = self.config, super().facts()
        if config.budget == "epochs":
            return found
        if config.forwards is None:  # epochs follow from counts
            return {**found, "budget": None, "prices": None}
        prices = self.prices(config.cost) if config.cost else (1.0, 2.0)
        return {**found, "budget": config.forwards, "prices": list(prices)}

    @override
    def write(self, about: Mapping[str, Any]) -> None:
        if self.control == CONTROL:  # nothing else was typed: as the file was made
            self.control = about.get("against", CONTROL)
        super().write(about)

    def table(self, runs: Runs) -> list[list[str]]:
        """Header and rows, everything in % but cost; "–" where a number is missing."""
        control = [run for run in runs if run["method"] == CONTROL]
        full = _passes(control) if control else None

        def passes(row: Row) -> str:
            return f"{_passes(row.runs) / full:.2f}" if full else "–"

        columns: dict[str, table.Column] = {
            **{"game": table.row_name, "seeds": table.seeds, "epochs": table.epochs},
            **table.accuracies(attacks_of(runs)),
            "PGD-20 − AutoAttack": table.Percent("gap"),
            f"worst − {self.control}, paired, 95 %": table.Paired("worst_case", minus=self.control),
            "s per epoch": table.Mean("seconds_per_epoch", 2),
            "F per image and step": table.Mean("forwards_per_image", 1),
            f"passes, {CONTROL} = 1": passes,
        }
        if any("spent" in run for run in runs):
            columns["budget spent"] = table.Mean("spent", 1)
            columns["s in all"] = table.Mean("seconds", 0)
        return table.cells(columns, table.rows(runs))

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        first = runs[0]
        equal = {
            "epochs": "equal epochs",
            "compute": "equal passes"
            if about.get("budget")
            else f"epochs such that all make as many passes as {CONTROL}",
        }[self.config.budget]
        head, *body = self.table(runs)
        flagged = [[*line, flags_of(line[0], runs)] for line in body]
        return [
            f"# {self.about} on {short_name(self.config.dataset)}, {equal}",
            f"{table.radius(first)}, {first['n']} test images, {training_images(first)}; "
            f"mean ± sd over seeds, in %. {selection(runs)}. "
            "Worst case: over all attacks of the table, per image. F: forwards "
            "of the classifier (input-backward 1, backward with weights 2), without networks of "
            f"the attacker; passes: epochs × F beside {CONTROL}'s."
            + "".join(f" {told}" for name, told in TOLD.items() if f"accuracy_{name}" in first)
            + told_budget(about),
            table.markdown([*head, "flags"], flagged),
            *((POSTER_IS, POSTER) if self.beside_poster(runs) else ()),
        ]

    def beside_poster(self, runs: Runs) -> bool:
        """Whether the data are published and one of the games is on the poster."""
        on_poster = {row.split()[1] for row in POSTER.splitlines()[2:]}
        return not is_own(self.config.dataset) and any(run["method"] in on_poster for run in runs)

    @override
    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """Bars of the worst case; and the table for programs."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.table(runs))
        write_atomically(self.path.with_suffix(".csv"), text.getvalue())
        title = f"{self.about} on {short_name(self.config.dataset)}, equal {self.config.budget}"
        figure = comparison_figure(about["summary"], ("accuracy_clean", PGD), title)
        save_figure(figure, self.path.with_suffix(".png"), pdf=True)


def mean_over_steps(rows: Rows, tag: str) -> float:
    """Mean over all steps of what rows are means of: a budget's last epoch has fewer of them."""
    steps = [row["step"] for row in rows]
    lengths = [after - before for before, after in pairwise([0, *steps])]
    return fmean([row[tag] for row in rows], lengths)


def told_budget(about: Mapping[str, Any]) -> str:
    """What a budget is of; "" where epochs are equal, or follow from counts."""
    if not about.get("budget"):
        return ""
    to_input, with_weights = about["prices"]
    return (
        f" Budget: {about['budget']:g} forwards per training image, of which an input-backward "
        f"costs {to_input:.2f} and a backward with weights {with_weights:.2f}. S in all: seconds "
        "of the training's steps, beside other work."
    )


def _passes(runs: Runs) -> float:
    """Forwards per training image in a whole training, mean over seeds of unequal lengths."""
    each: list[float] = [run["epochs"] * run["forwards_per_image"] for run in runs]
    return mean(each)


def flags_of(game: str, runs: Runs, control: str = CONTROL) -> str:
    """The flags of a game's cells, and what shows beside the control only; "none" without.

    Args:
        game: a method of the runs.
        runs: cells with ``method``, ``n`` test images, ``flags``, and where it is known ``gap``.
        control: a method too; where it is missing, nothing is compared with it.
    """
    raised = {flag for run in runs if run["method"] == game for flag in run["flags"]}
    gaps = [
        [run["gap"] for run in runs if run["method"] == one and "gap" in run]
        for one in (game, control)
    ]
    if all(gaps) and wider_gap(mean(gaps[0]), mean(gaps[1]), runs[0]["n"]):
        raised.add(f"wider_gap_than_{control}")
    return table.names(raised)


main = Compare.main

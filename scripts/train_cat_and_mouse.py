"""Play the cat-and-mouse game: attack the classifier, retrain it on the attack, and again.

    python scripts/train_cat_and_mouse.py                        # digits, FGSM, a minute
    python scripts/train_cat_and_mouse.py --attack mvm:ifgsm     # any attack with a name
    python scripts/train_cat_and_mouse.py --restart-weights      # retraining from scratch
    python scripts/train_cat_and_mouse.py --dataset mnist --data-dir D --eps 0.15  # paper's η 0.3
    python scripts/train_cat_and_mouse.py --resume runs/NAME     # go on after a kill

A run keeps the classifier of every round (`rounds/`), and ends with the errors of each of them
under each round's attack: matrix.json, matrix.md (the cut that the paper's table 3 shows) and
matrix.png. The report judges the last classifier.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track
from typing_extensions import override

from advgame import evaluation
from advgame.choices import TRANSFER
from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run.defender_job import DefenderJob, ball, tested
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import Metrics, RunFolder
from advgame.run.options import Count, Names, Positive, Share, parse_eps
from advgame.run.progress import telling
from advgame.run.settings import RunConfig, paper_recipes

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.data import ImageSet, Splits
    from advgame.games import CatAndMouse
    from advgame.threat import Threat


@dataclass(frozen=True)
class Config(RunConfig):
    """Play the cat-and-mouse game and tabulate every round's classifier under every attack.

    The defaults shown are those of the --dataset on the same command line.
    """

    epochs: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    """of the shared loop: --clean-rounds and --rounds together"""
    eps_ramp: tyro.conf.Suppress[tyro.conf.Fixed[float]] = 0.0
    """there is none"""
    batch_size: Count = 128
    """images per step, half of them clean and half adversarial"""
    lr: Positive = 1e-3
    """of Adam (the paper: 1e-4, for many more steps)"""
    weight_decay: Share = 0.0
    """weight decay of the defender"""
    schedule: Literal["onecycle", "multistep", "constant"] = "constant"
    """learning-rate schedule, per step, over all rounds"""
    attacks: Names = ("mvm:fgsm", "pgd20", "autoattack")
    """attacks on the last classifier, for the report"""
    attack: str = "mvm:fgsm"
    """what each round attacks with and retrains on, a name as in --attacks"""
    rounds: Count = 20
    """attacks, each with its retraining (the paper: 80)"""
    round_steps: Count = 100
    """steps of each retraining"""
    clean_rounds: Count = 3
    """as many steps again train the first classifier, on clean images"""
    restart_weights: bool = False
    """each retraining starts from scratch, instead of going on from the round before"""
    test_n: Count | None = None
    """test images of the rounds' errors and of the matrix; None takes all, as the paper does"""


def matrix(config: Config, run: RunFolder, game: CatAndMouse) -> dict[str, Any]:
    """Errors of every classifier under every attack; killed, it goes on where it was.

    The last attack has no retraining: it is made on the last classifier, for its X-curr.
    """
    from advgame.games.cat_and_mouse import errors_under

    module, columns = copy.deepcopy(game.defender.module), list[list[float]]()
    numbers = range(config.rounds + 2)
    bar = track(numbers, "attacks on all classifiers", console=Console(stderr=True))
    for number in bar:
        path = run.path / "matrix" / f"attack_{number:03d}.json"
        if not path.exists():
            column = errors_under(
                number, game.folder, config.rounds, module, game.attack, game.data.test, config.seed
            )
            write_atomically(path, json.dumps(column))
        columns.append(read_json(path, "delete it and resume", list))
    return {
        "attack": config.attack,
        "eps": parse_eps(config.eps),
        "n": len(game.data.test),
        "seed": config.seed,
        "clean": columns[0],
        "errors": [list(row) for row in zip(*columns[1:], strict=True)],
        "command": run.about()["command"],
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The cut of the matrix that the paper's table 3 shows, and the middle."""
    errors: Sequence[Sequence[float]] = found["errors"]
    last = len(errors) - 1
    shown = sorted({number for number in (1, 2, (last + 1) // 2, last) if number <= last})
    columns = ["clean", *(f"attack {number}" for number in shown), "attack-curr"]
    lines = [
        f"# Error rates under {found['attack']}, ε = {found['eps']:.4g}",
        "",
        f"Shares of {found['n']} test images that are misclassified, all images counted, also "
        "those that are wrong when clean: high where the attack wins. Attack k is made on "
        "classifier k-1, attack-curr on the row's own. Adv k is retrained on attack k.",
        "",
        f"| defence | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in (0, *shown):
        values = (found["clean"][row], *(errors[row][k - 1] for k in shown), errors[row][row])
        name = f"Adv {row}" if row else "No defence"
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join([*lines, "", f"Command: `{found['command']}`", ""])


class Job(DefenderJob[Config, "CatAndMouse"]):
    """The game, its matrix, and the report on its last classifier."""

    config = Config
    algorithm = "adam"
    uncounted = "its length is --rounds and --round-steps"
    # pixels of the paper lie in [-1, 1], its η is 2ε
    recipes = paper_recipes(
        mnist={"eps": "0.15", "round_steps": 350, "eval_n": 1000},
        cifar10={"eps": "0.05", "round_steps": 1000, "eval_n": 1000},
    )

    def check(self, config: Config) -> Config:
        """Refuse what cannot work, before any work."""
        config = super().check(replace(config, epochs=config.clean_rounds + config.rounds))
        evaluation.check_attacks((config.attack,))
        if config.attack in TRANSFER:
            raise InputError(f"{config.attack} needs another classifier: a round attacks its own")
        if config.batch_size % 2:
            raise InputError(
                f"half of a batch is clean: batch_size must be even, not {config.batch_size}"
            )
        if config.processes > 1:
            raise InputError("a round's attack is made on a copy: one device")
        if config.init is not None and config.restart_weights:
            raise InputError(
                "--restart-weights starts every retraining from scratch: leave --init away"
            )
        if config.ema is not None:
            raise InputError(
                "each round's attack is made on the weights themselves: --ema is not here"
            )
        return config

    @override
    def title(self, config: Config) -> str:
        return f"Cat and mouse, {config.attack}"

    @override
    def classifier(
        self, config: Config, data: ImageSet, fabric: Fabric, drawn: str = "defender 0"
    ) -> nn.Module:
        return super().classifier(config, data, fabric, drawn)

    @override
    def game(self, config: Config, data: Splits, fabric: Fabric) -> CatAndMouse:
        from advgame.evaluation.attacks import Context, make_suite
        from advgame.games import CatAndMouse

        suite = make_suite(config.attack, Context(ball(config), data.train, config.seed))
        if len(suite) > 1:
            raise InputError(f"a round plays one attack; {config.attack} is {len(suite)} in a row")
        folder = Path(config.resume or config.runs_dir) / "rounds"  # a new run's: see `work`
        test = data.test if config.test_n is None else data.test.first(config.test_n)

        def fresh(number: int) -> nn.Module:
            return self.classifier(config, data.train, fabric, f"defender {number}")

        return CatAndMouse(
            suite[0][1],
            self.defender(config, data, fabric),
            replace(data, test=test),
            folder,
            batch_size=config.batch_size,
            round_steps=config.round_steps,
            clean_rounds=config.clean_rounds,
            seed=config.seed,
            fresh=fresh if config.restart_weights else None,
        )

    @override
    def work(
        self, config: Config, run: RunFolder, made: tuple[CatAndMouse, Splits], *, resume: bool
    ) -> None:
        """As of every training; the rounds' classifiers lie in the run's own folder.

        Which that is, is known once it is made: others may begin in the same second.
        """
        made[0].folder = run.path / "rounds"
        super().work(config, run, made, resume=resume)

    def report(
        self, config: Config, run: RunFolder, game: CatAndMouse, data: Splits, threat: Threat
    ) -> None:
        """Curves, the matrix of errors, and the last classifier's report."""
        from advgame.games.cat_and_mouse import PANELS
        from advgame.run.curves import game_figure, matrix_figure, save_figure
        from advgame.run.loop import load_best

        title = (
            f"Cat and mouse on {short_name(config.dataset)}, {config.attack}, ε = {threat.eps:.3g}"
        )
        rows = Metrics.read(run.path / "metrics.csv")[config.clean_rounds - 1 :]
        curves = game_figure(rows, title, PANELS, x=("round", "round"))
        save_figure(curves, run.path / "curves.png")
        found = matrix(config, run, game)
        run.write_json("matrix.json", found)
        run.write_text("matrix.md", as_markdown(found))
        panel = {f"{found['n']} test images": found["errors"]}
        figure = matrix_figure(
            panel, title, rows="classifier (0: no defence)", columns="attack", first=(0, 1)
        )
        save_figure(figure, run.path / "matrix.png")

        module, test = game.defender.module, tested(config, data)
        load_best(run, module, "last")
        with telling(f"{run.path}: {len(test)} test images") as tell:
            evaluation.judge_classifier(
                run,
                module,
                test,
                threat,
                config.attacks,
                dataset=short_name(config.dataset),
                weights=f"of the last round, {config.rounds}",
                tell=tell,
                seed=config.seed,
            )


job = Job()

if __name__ == "__main__":
    job.main()

"""The former `advgame.run.job`, for the cat-and-mouse script until it is a `Job`, too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning_fabric import Fabric
from torch import nn

from advgame.attacks import Attack
from advgame.data import Splits, load_data
from advgame.errors import InputError
from advgame.evaluation import as_line, check_evaluation, validator
from advgame.run.defender_job import training_plan
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder, device_name
from advgame.run.job import resume_settings
from advgame.run.loop import Game, Trainer, Validate
from advgame.run.options import parse_eps
from advgame.run.selection import SCORES, Criterion, criterion
from advgame.run.settings import RunConfig
from advgame.threat import Linf

ConfigT = TypeVar("ConfigT", bound=RunConfig)
GameT = TypeVar("GameT", bound=Game)


@dataclass(frozen=True)
class Script(Generic[ConfigT, GameT]):
    """What a training script has of its own.

    Args:
        check: refuses settings that cannot work.
        build: the game, on its data and device.
        finish: settings, run, game, data, ball -> the content of ``report.json``, written; in
            the first process only.
        own: game, ball -> the game's own attacker, where it has one, for ``eval/own_attacker``.
        watch: settings, game, data, ball -> further scores of the defender at each validation.
        purpose: settings -> what the game is for, which selects the weights of ``--select auto``.
    """

    check: Callable[[ConfigT], object]
    build: Callable[[ConfigT, Splits, Fabric], GameT]
    finish: Callable[[ConfigT, RunFolder, GameT, Splits, Linf], dict[str, Any]]
    own: Callable[[GameT, Linf], Attack | None] = lambda game, threat: None
    watch: Callable[[ConfigT, GameT, Splits, Linf], Validate] | None = None
    purpose: Callable[[ConfigT], Criterion] = lambda config: "robust"

    def run(self, config: ConfigT, typed: Collection[str] = ()) -> RunFolder:
        """Train and report; returns the run folder.

        Args:
            config: all settings.
            typed: those that a resumed run must agree with.

        Raises:
            InputError: settings or data that cannot work, found before any training.
        """
        resume = config.resume is not None
        if config.resume is not None:
            run, config = resume_settings(Path(config.resume), config, typed)
            path = run.path
        else:
            path = RunFolder.new_path(Path(config.runs_dir), config.name)
        self.check(config)
        asked: Any = self.purpose(config) if config.select == "auto" else config.select
        select = criterion(run) if resume else asked
        config = replace(config, select=select)  # config.json holds what really selects
        data = load_data(
            config.dataset, config.data_dir, download=config.download, train_n=config.train_n
        )
        fabric = make_fabric(config.accelerator, config.devices, config.precision)
        data = data.to(fabric.device)
        game, threat = self.build(config, data, fabric), Linf(parse_eps(config.eps))
        test = data.test if config.eval_n is None else data.test.first(config.eval_n)
        check_evaluation(game.learner.module, test, threat, config.attacks, seed=config.seed)
        own = self.own(game, threat)
        if select == "own" and own is None:
            raise InputError(
                "--select own: this game has no attacker of its own that validation could score: "
                "choose auto, clean or robust"
            )
        if not resume and fabric.global_rank == 0:
            RunFolder.create(path, asdict(config), device_name(fabric.device))
        run = RunFolder(Path(fabric.broadcast(str(path))))
        with run.held() if fabric.global_rank == 0 else nullcontext():
            self._play(config, run, game, data, threat, own, resume)
        return run

    def _play(
        self,
        config: ConfigT,
        run: RunFolder,
        game: GameT,
        data: Splits,
        threat: Linf,
        own: Attack | None,
        resume: bool,
    ) -> None:
        """The training and its report, while nobody else writes the folder."""
        if (run.path / "report.json").exists():
            print(f"{as_line(run.report())}; finished before; more in {run.path}/report.md")
            return
        score = validator(data.validation, threat, config.seed, own)
        watch = self.watch(config, game, data, threat) if self.watch else None

        def validate(module: nn.Module) -> dict[str, float]:
            return {**score(module), **(watch(module) if watch else {})}

        plan = training_plan(config)
        tag, _ = SCORES[criterion(run)]
        Trainer(game, run, plan, validate, select=tag).fit(resume=resume)
        if game.learner.fabric.global_rank == 0:
            content = self.finish(config, run, game, data, threat)
            print(f"{as_line(content)}; more in {run.path}/report.md")

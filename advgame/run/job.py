"""What scripts that fill a run folder share: settings, early refusals, the folder, resuming.

A script is a subclass of `Job`; one that trains a classifier is a subclass of `DefenderJob`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
import tyro
from lightning_fabric import Fabric
from torch import nn

from advgame.attacks import Attack
from advgame.classifiers import Normalise, make_classifier
from advgame.data import STATISTICS, ImageSet, Splits, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import as_line, check_evaluation, validator
from advgame.evaluation.judge import judge
from advgame.games.awp import make_defender
from advgame.games.training import PANELS, DefenderTraining, Rules
from advgame.losses import check_smoothing
from advgame.run.cli import resume_settings, run_script
from advgame.run.curves import Panels
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder, command, commit, device_name
from advgame.run.loop import Game, Trainer, Validate
from advgame.run.options import check_types, parse_eps, peek, refuse_idle, typed_options
from advgame.run.selection import SCORES, Criterion
from advgame.run.settings import PerturbedConfig, RunConfig, check_run, idle_settings, training_plan
from advgame.seeding import seeded_init
from advgame.threat import Linf


class Settings(Protocol):
    """What the settings of every job have."""

    @property
    def runs_dir(self) -> str:
        """Where run folders go."""
        ...

    @property
    def name(self) -> str:
        """Of the new folder."""
        ...

    @property
    def resume(self) -> str | None:
        """A folder to go on with."""
        ...


ConfigT = TypeVar("ConfigT", bound=Settings)
RunConfigT = TypeVar("RunConfigT", bound=RunConfig)
MadeT = TypeVar("MadeT")
GameT = TypeVar("GameT", bound=Game)


class Job(ABC, Generic[ConfigT, MadeT]):
    """A script that works in a folder of its own: it refuses early, never overwrites, goes on.

    ``job.main()`` is the script, ``job.run(Config(...))`` the same from Python.
    """

    config: type[ConfigT]
    """the settings; their docstrings are the help"""
    peeked: ClassVar[Mapping[str, str]] = {}
    """options that decide what the others' defaults are, with their own defaults"""

    def defaults(self, **peeked: str) -> ConfigT:
        """The settings where nothing else is asked for.

        Args:
            peeked: of the options named by ``peeked``; their own defaults where not given.
        """
        return self.config(**peeked)

    def idle(self, config: ConfigT) -> Mapping[str, Collection[str]]:
        """Why -> options that then change nothing, and are refused."""
        return {}

    def check(self, config: ConfigT) -> ConfigT:
        """Refuse settings that cannot work, before any work; returns them, settled.

        Raises:
            InputError: what is wrong, in one line.
        """
        check_types(self.config, vars(config), "settings")
        refuse_idle(config, self.usual(config), self.idle(config))
        return config

    def usual(self, config: ConfigT) -> ConfigT:
        """The same with nothing else asked for."""
        return self.defaults(**{name: getattr(config, name) for name in self.peeked})

    def check_resumed(self, config: ConfigT, typed: Collection[str]) -> None:
        """Refuse settings that may not come from a folder, which may be a stranger's.

        Args:
            config: the folder's.
            typed: options that were typed again.

        Raises:
            InputError: what to type.
        """

    def fabric(self, config: ConfigT) -> Fabric:
        """Device and processes; one CPU process unless a job has options for it."""
        return make_fabric("cpu", 1, "32-true")

    @abstractmethod
    def build(self, config: ConfigT, fabric: Fabric) -> MadeT:
        """Everything that the work needs.

        Raises:
            InputError: data, models or sizes that will not do; nothing is written yet.
        """

    @abstractmethod
    def work(self, config: ConfigT, run: RunFolder, made: MadeT, *, resume: bool) -> None:
        """Work until ``report.json`` is there; in every process, the first one writes."""

    @abstractmethod
    def told(self, run: RunFolder) -> str:
        """What a finished run found, for the screen."""

    def parse(self, words: Sequence[str]) -> ConfigT:
        """The settings of a command line; `check` refuses those that cannot work."""
        seen = {**self.peeked}
        for name, value in peek(words, **self.peeked).items():
            with suppress(InputError):  # tyro refuses the word, and shows the choices
                check_types(self.config, {name: value}, "")
                seen[name] = value
        return tyro.cli(self.config, default=self.defaults(**seen), args=words)

    def run(self, config: ConfigT, typed: Collection[str] = ()) -> RunFolder:
        """Do the job, or go on with it; returns its folder.

        Args:
            config: all settings.
            typed: those that a resumed run must agree with.

        Raises:
            InputError: settings or data that cannot work, found before any work.
        """
        resume = config.resume is not None
        if config.resume is not None:
            run, config = resume_settings(Path(config.resume), config, typed)
            path = run.path
            config = replace(cast(Any, config), resume=str(path))
            self.check_resumed(config, typed)
        else:
            path = RunFolder.new_path(Path(config.runs_dir), config.name)
        config = self.check(config)
        fabric = self.fabric(config)
        made = self.build(config, fabric)
        if not resume and fabric.global_rank == 0:
            RunFolder.create(path, asdict(config), device_name(fabric.device))  # type: ignore[call-overload]
        run = RunFolder(Path(fabric.broadcast(str(path))))
        with run.held() if fabric.global_rank == 0 else nullcontext():
            finished = (run.path / "report.json").exists()
            if not finished:
                self.work(config, run, made, resume=resume)
            if fabric.global_rank == 0:
                print(self.told(run) + ("; finished before" if finished else ""))
        return run

    def main(self) -> None:
        """The script: the words of the command line, and errors in one line."""
        run_script(self.from_command_line)

    def from_command_line(self) -> RunFolder | None:
        """Run what was typed."""
        return self.run(self.parse(sys.argv[1:]), typed_options(self.config))


class DefenderJob(Job[RunConfigT, tuple[GameT, Splits]], Generic[RunConfigT, GameT]):
    """A training of a classifier: what its game is, every script says itself."""

    peeked: ClassVar[Mapping[str, str]] = {"dataset": "digits"}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """data set -> what it changes in the settings"""
    repo: ClassVar[Mapping[str, Any]] = {}
    """what ``--preset repo``, the published code's settings, changes"""
    repo_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """data set -> what it changes under ``--preset repo``"""
    panels: Panels = PANELS
    """of curves.png"""
    algorithm: ClassVar[str] = "sgd"
    """of the defender: sgd or adam"""

    # what a script says

    def rules(self, config: RunConfigT, data: ImageSet, fabric: Fabric) -> Rules:
        """One step of the game; a script whose game is no `DefenderTraining` has `game` instead."""
        raise NotImplementedError

    @abstractmethod
    def title(self, config: RunConfigT) -> str:
        """The game in words, without data set and seed."""

    def purpose(self, config: RunConfigT) -> Criterion:
        """What the game is for: it selects the weights of ``--select auto``."""
        return "robust"

    def own_attacker(self, game: GameT, threat: Linf) -> Attack | None:
        """The game's own attacker, where it has one, for ``eval/own_attacker``."""
        return None

    def watch(self, config: RunConfigT, game: GameT, data: Splits, threat: Linf) -> Validate:
        """Further scores of the defender at each validation."""
        return lambda module: {}

    def judging(
        self, config: RunConfigT, run: RunFolder, game: GameT, data: Splits, threat: Linf
    ) -> Mapping[str, Any]:
        """Further arguments of `advgame.evaluation.judge.judge`; learned attackers become files."""
        return {}

    def normalised(self, config: RunConfigT) -> bool:
        """Whether the classifier of colour images begins with the data set's mean and deviation."""
        return getattr(config, "preset", None) != "repo"

    def augmentation(self, config: RunConfigT) -> dict[str, bool]:
        """Random crops and flips of colour images; digits are not flipped."""
        colour = config.dataset in STATISTICS
        return {"crop": colour, "flip": colour and config.dataset != "svhn"}

    # what all share

    def defaults(self, **peeked: str) -> RunConfigT:
        """The settings of a data set, under a preset where there are any."""
        changes: dict[str, Any] = {**self.peeked, **peeked}
        dataset = changes["dataset"]
        changes |= self.recipes.get(dataset, {})
        if changes.get("preset") == "repo":
            changes |= {**self.repo, **self.repo_recipes.get(dataset, {})}
        return self.config(**changes)

    def check(self, config: RunConfigT) -> RunConfigT:
        """Refuse what cannot work; settles what selects the weights, for config.json to hold."""
        config = super().check(config)
        refuse_idle(config, self.usual(config), idle_settings(config))
        check_run(config)
        if config.select == "auto":
            config = replace(config, select=self.purpose(config))
        return config

    def fabric(self, config: RunConfigT) -> Fabric:
        """As asked for."""
        return make_fabric(config.accelerator, config.devices, config.precision)

    def build(self, config: RunConfigT, fabric: Fabric) -> tuple[GameT, Splits]:
        """Game and data, with everything tried once that a report will need."""
        data = load_data(
            config.dataset, config.data_dir, download=config.download, train_n=config.train_n
        ).to(fabric.device)
        check_smoothing(config.true_probability, data.train.classes)
        game, threat = self.game(config, data, fabric), ball(config)
        test, module = tested(config, data), game.learner.module
        check_evaluation(module, test, threat, config.attacks, seed=config.seed)
        if config.select == "own" and self.own_attacker(game, threat) is None:
            raise InputError(
                "--select own: this game has no attacker of its own that validation could score: "
                "choose auto, clean or robust"
            )
        return game, data

    def game(self, config: RunConfigT, data: Splits, fabric: Fabric) -> GameT:
        """The defender's training by the script's rules."""
        made = DefenderTraining(
            self.rules(config, data.train, fabric),
            self.defender(config, data, fabric),
            data.train,
            config.batch_size,
            config.seed,
            **self.augmentation(config),
            ramp_steps=round(config.eps_ramp * self.steps(config, data, fabric)),
        )
        return cast(GameT, made)

    def steps(self, config: RunConfigT, data: Splits, fabric: Fabric) -> int:
        """Batches of the whole training."""
        return config.epochs * (len(data.train) // (config.batch_size * fabric.world_size))

    def descents(self, config: RunConfigT, data: Splits, fabric: Fabric) -> int:
        """Of the defender in the whole training."""
        return self.steps(config, data, fabric)

    def classifier(self, config: RunConfigT, data: ImageSet, fabric: Fabric) -> nn.Module:
        """A new classifier in the memory layout of its device; compiled if asked for."""
        known = self.normalised(config) and config.dataset in STATISTICS
        with seeded_init(config.seed, "defender"):
            layer = Normalise(*STATISTICS[config.dataset]) if known else None
            module = make_classifier(config.model, data.shape, data.classes, layer)
        if fabric.device.type == "cuda":
            module = module.to(memory_format=torch.channels_last)
        if config.compile:
            module.compile()
        return module

    def defender(self, config: RunConfigT, data: Splits, fabric: Fabric) -> Defender:
        """The classifier and its optimiser; under weight perturbation where ``awp`` is given."""
        gamma, start = None, 0.0
        if isinstance(config, PerturbedConfig):
            gamma, start = config.awp, config.awp_start
        return make_defender(
            self.classifier(config, data.train, fabric),
            gamma,
            round(start * self.descents(config, data, fabric)),
            lr=config.lr,
            weight_decay=config.weight_decay,
            true_probability=config.true_probability,
            grad_clip=config.grad_clip,
            fabric=fabric,
            algorithm=self.algorithm,
        )

    def work(
        self, config: RunConfigT, run: RunFolder, made: tuple[GameT, Splits], *, resume: bool
    ) -> None:
        """The training and its report."""
        (game, data), threat = made, ball(config)
        score = validator(data.validation, threat, config.seed, self.own_attacker(game, threat))
        watch = self.watch(config, game, data, threat)

        def validate(module: nn.Module) -> dict[str, float]:
            return {**score(module), **watch(module)}

        tag, _ = SCORES[config.select]  # type: ignore[index]  # `check` settled it
        Trainer(game, run, training_plan(config), validate, select=tag).fit(resume=resume)
        if game.learner.fabric.global_rank == 0:
            self.report(config, run, game, data, threat)

    def report(
        self, config: RunConfigT, run: RunFolder, game: GameT, data: Splits, threat: Linf
    ) -> None:
        """The classifier's report and pictures; killed, it goes on where it was."""
        judge(
            run,
            game.learner.module,
            tested(config, data),
            threat,
            dataset=config.dataset,
            attacks=config.attacks,
            seed=config.seed,
            title=f"{self.title(config)} on {config.dataset}, seed {config.seed}",
            panels=self.panels,
            **self.judging(config, run, game, data, threat),
        )

    def told(self, run: RunFolder) -> str:
        """The accuracies."""
        return f"{as_line(run.report())}; more in {run.path}/report.md"


def about(config: Any) -> dict[str, Any]:
    """What a learned attacker's file says of its making."""
    return {"command": command(), "commit": commit(), "config": asdict(config)}


def ball(config: RunConfig) -> Linf:
    """Where the classifier is judged."""
    return Linf(parse_eps(config.eps))


def tested(config: RunConfig, data: Splits) -> ImageSet:
    """The test images of the report."""
    return data.test if config.eval_n is None else data.test.first(config.eval_n)

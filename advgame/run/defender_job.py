"""The training of a classifier as a script: data, defender, game, validation, report."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from typing_extensions import override

from advgame.choices import TRANSFER
from advgame.classifiers.names import check_model, is_built_in
from advgame.data.names import SMALL, flips, recipe, short_name
from advgame.errors import InputError
from advgame.run.accelerators import on_cpu
from advgame.run.files import digest
from advgame.run.fitting import fit_attacks, fit_batch
from advgame.run.folder import RunFolder
from advgame.run.job import Job
from advgame.run.options import parse_radius, refuse_idle
from advgame.run.program import retold
from advgame.run.selection import SCORES, Criterion
from advgame.run.settings import (
    L2_EPS,
    LARGE,
    PerturbedConfig,
    RunConfig,
    idle_settings,
    odd_radius,
    on_a_cpu,
)
from advgame.zoo.entries import place

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.attacks import Attack
    from advgame.data import ImageSet, Splits
    from advgame.defender import Defender
    from advgame.games.training import DefenderTraining, Rules
    from advgame.run.curves import Panels
    from advgame.run.loop import Game, Validate
    from advgame.run.plan import TrainingPlan
    from advgame.threat import Threat

RunConfigT = TypeVar("RunConfigT", bound=RunConfig)
GameT = TypeVar("GameT", bound="Game")


class DefenderJob(Job[RunConfigT, tuple[GameT, "Splits"]], Generic[RunConfigT, GameT]):
    """A training of a classifier: what its game is, every script says itself."""

    peeked: ClassVar[Mapping[str, str | None]] = {
        "dataset": "digits",
        "image_size": None,
        "norm": "Linf",
        "accelerator": "auto",
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """data set -> what it changes in the settings"""
    repo: ClassVar[Mapping[str, Any]] = {}
    """what ``--preset repo``, the published code's settings, changes"""
    repo_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """data set -> what it changes under ``--preset repo``"""
    algorithm: ClassVar[str] = "sgd"
    """of the defender: sgd or adam"""
    uncounted: ClassVar[str] = ""
    """why --budget is not for this game, where it does not count a step's passes"""
    linf_only: ClassVar[str] = ""
    """why the game is played in L∞ balls only, where it is"""
    helped: ClassVar[bool] = False
    """whether all processes of a training share the report's attacks: only where these are those of
    ``--attacks`` and `met` on the best weights, and `judging` adds none"""

    # what a script says

    def rules(self, config: RunConfigT, data: ImageSet, fabric: Fabric) -> Rules:
        """One step of the game; a script whose game is no `DefenderTraining` has `game` instead."""
        raise NotImplementedError(f"{type(self).__name__} says neither rules nor game")

    @abstractmethod
    def title(self, config: RunConfigT) -> str:
        """The game in words, without data set and seed."""

    def panels(self) -> Panels:
        """The panels of curves.png: title -> unit and tags."""
        from advgame.games.training import PANELS

        return PANELS

    def purpose(self, config: RunConfigT) -> Criterion:
        """What the game is for: it selects the weights of ``--select auto``."""
        return "robust"

    def own_attacker(self, game: GameT, threat: Threat) -> Attack | None:
        """The game's own attacker, where it has one, for ``eval/own_attacker``."""
        return None

    def met(self, config: RunConfigT, game: GameT, threat: Threat) -> Mapping[str, Attack]:
        """Attacks by name that the report has beside ``--attacks``, as the game has left them."""
        return {}

    def watch(self, config: RunConfigT, game: GameT, data: Splits, threat: Threat) -> Validate:
        """Further scores of the defender at each validation."""
        return lambda module: {}

    def judging(
        self, config: RunConfigT, run: RunFolder, game: GameT, data: Splits, threat: Threat
    ) -> Mapping[str, Any]:
        """Further arguments of `advgame.evaluation.judge_run`; learned attackers become files."""
        return {}

    def normalised(self, config: RunConfigT) -> bool:
        """Whether the classifier of colour images begins with the data set's mean and deviation."""
        return getattr(config, "preset", None) != "repo"

    def augmentation(self, config: RunConfigT, data: ImageSet) -> dict[str, bool]:
        """Random crops of colour images; flips where they are known to change no class.

        A crop shifts by up to 4 pixels, which is half of an image of 8.
        """
        channels, *sides = data.shape
        return {"crop": channels == 3 and min(sides) >= SMALL, "flip": flips(config.dataset)}

    def on_a_cpu(self) -> Mapping[str, Any]:
        """What the large networks' recipes change where there is no GPU."""
        return on_a_cpu()

    # what all share

    def defaults(self, **peeked: Any) -> RunConfigT:
        """The settings of a data set, under a preset where there are any."""
        changes: dict[str, Any] = {**self.peeked, **peeked}
        whose = recipe(changes["dataset"], changes["image_size"])
        changes |= self.recipes.get(whose, {})
        repo = changes.get("preset") == "repo"
        if changes.get("model") == LARGE and on_cpu(changes["accelerator"]) and not repo:
            changes |= self.on_a_cpu()
        if repo:
            changes |= {**self.repo, **self.repo_recipes.get(whose, {})}
        if changes.get("norm") == "L2":
            changes["eps"] = L2_EPS.get(whose, "")
        return self.config(**changes)

    def check(self, config: RunConfigT) -> RunConfigT:
        """Refuse what cannot work; settles what selects the weights, for config.json to hold."""
        config = super().check(config)
        if config.norm != "Linf" and self.linf_only:
            raise InputError(f"--norm {config.norm} is not for this game: {self.linf_only}")
        if config.norm != "Linf" and getattr(config, "preset", None) == "repo":
            raise InputError(
                f"--preset repo is of L∞: with --norm {config.norm} give each setting yourself"
            )
        if config.budget is not None and self.uncounted:
            raise InputError(f"--budget is not for this game: {self.uncounted}")
        refuse_idle(config, self.usual(config), idle_settings(config))
        check_run(config)
        if config.init is not None and trained(config) is None:
            found = digest(start(config.init))
            if config.resume is not None and found != config.init_sha256:
                raise InputError(
                    f"{config.init} holds other weights than {config.resume} began with: say "
                    "where they are now with --init, or start a new run"
                )
            config = replace(config, init_sha256=found)
        if config.select == "auto":
            config = replace(config, select=self.purpose(config))
        return config

    def fabric(self, config: RunConfigT) -> Fabric:
        """Device, processes and precision as the settings ask for them."""
        from advgame.run.devices import make_fabric

        return make_fabric(config.accelerator, config.devices, config.precision, config.nodes)

    def build(self, config: RunConfigT, fabric: Fabric) -> tuple[GameT, Splits]:
        """Game and data, with everything tried once that a report will need."""
        data = self.data(config, fabric)
        return self.tried(config, data, fabric), data

    @override
    def settle(
        self, config: RunConfigT, fabric: Fabric, typed: Collection[str]
    ) -> tuple[RunConfigT, tuple[GameT, Splits]]:
        """The same; attacks and batch size fit the data where they were not typed."""
        data, usual = self.data(config, fabric), self.usual(config)
        tell = fabric.global_rank == 0
        config = fit_attacks(config, usual, typed, data.train.classes, tell=tell)
        processes = fabric.world_size
        config = fit_batch(config, usual, typed, len(data.train), processes, tell=tell)
        return config, (self.tried(config, data, fabric), data)

    def data(self, config: RunConfigT, fabric: Fabric) -> Splits:
        """The images, on the device.

        Raises:
            InputError: data that cannot be read.
        """
        from advgame.data import load_data

        return load_data(
            config.dataset,
            config.data_dir,
            download=config.download,
            image_size=config.image_size,
            train_n=config.train_n,
        ).to(fabric.device)

    def tried(self, config: RunConfigT, data: Splits, fabric: Fabric) -> GameT:
        """The game, with everything tried once that a report will need.

        Raises:
            InputError: sizes, settings or attacks that will not do for these images.
        """
        from advgame.evaluation import check_evaluation
        from advgame.losses import check_smoothing

        check_smoothing(config.true_probability, data.train.classes)
        threat = ball(config)
        threat.check_shape(data.train.shape)
        game = self.game(config, data, fabric)
        test, module = tested(config, data), game.learner.module
        check_evaluation(module, test, threat, config.attacks, seed=config.seed)
        if config.select == "own" and self.own_attacker(game, threat) is None:
            raise InputError(
                "--select own: this game has no attacker of its own that validation could score: "
                "choose auto, clean or robust"
            )
        return game

    @override
    def images(self, made: tuple[GameT, Splits]) -> Mapping[str, Any]:
        return made[1].about()

    def game(self, config: RunConfigT, data: Splits, fabric: Fabric) -> GameT:
        """The defender's training by the script's rules."""
        rules = self.rules(config, data.train, fabric)
        return cast(GameT, self.training(config, data, fabric, rules))

    def training(
        self, config: RunConfigT, data: Splits, fabric: Fabric, rules: Rules
    ) -> DefenderTraining:
        """The training of a new defender by any rules."""
        from advgame.games.training import DefenderTraining

        return DefenderTraining(
            rules,
            self.defender(config, data, fabric),
            data.train,
            config.batch_size,
            config.seed,
            **self.augmentation(config, data.train),
            ramp_steps=round(config.eps_ramp * self.steps(config, data, fabric)),
        )

    def steps(self, config: RunConfigT, data: Splits, fabric: Fabric) -> int:
        """How long the whole training is in the unit of its schedules: batches per process."""
        if config.budget is not None:
            from advgame.defender import TICKS

            return TICKS
        return config.epochs * (len(data.train) // (config.batch_size * fabric.world_size))

    def descents(self, config: RunConfigT, data: Splits, fabric: Fabric) -> int:
        """The same in steps of the defender, where a batch is several."""
        return self.steps(config, data, fabric)

    def classifier(
        self, config: RunConfigT, data: ImageSet, fabric: Fabric, drawn: str = "defender"
    ) -> nn.Module:
        """A new classifier in the memory layout of its device.

        Args:
            config: names the network, and where its weights begin.
            data: the training images.
            fabric: the device.
            drawn: the stream of the seed that its weights are drawn from.
        """
        import torch

        from advgame.classifiers import Normalise
        from advgame.classifiers.saved import load_classifier, new_classifier
        from advgame.data import channel_statistics
        from advgame.evaluation import check_classifier
        from advgame.seeding import seeded_init

        with seeded_init(config.seed, drawn):
            if config.init is not None:
                begun = trained(config) or start(config.init)
                module = load_classifier(begun, config.model, data.shape, data.classes).train()
            else:
                known = None
                if is_built_in(config.model) and self.normalised(config):
                    known = channel_statistics(config.dataset, data)
                layer = Normalise(*known) if known else None
                module = new_classifier(config.model, data.shape, data.classes, layer)
        if not is_built_in(config.model):
            check_classifier(module.to(fabric.device), data)
        if fabric.device.type == "cuda" or data.shape[0] > 1:  # faster on CPUs, too
            module = module.to(memory_format=torch.channels_last)
        return module

    def defender(self, config: RunConfigT, data: Splits, fabric: Fabric) -> Defender:
        """The classifier and its optimiser; under weight perturbation where ``awp`` is given."""
        from advgame.games.awp import make_defender

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
        """Train the classifier, evaluate it and write its report."""
        from advgame.evaluation import validator
        from advgame.evaluation.judge import help_judging
        from advgame.run.examples import Examples
        from advgame.run.loop import Trainer

        (game, data), threat = made, ball(config)
        fabric, own = game.learner.fabric, self.own_attacker(game, threat)
        score = validator(data.validation, threat, config.seed, own, fabric)
        watch = self.watch(config, game, data, threat)

        def validate(module: nn.Module) -> dict[str, float]:
            return {**score(module), **watch(module)}

        tag, _ = SCORES[config.select]  # type: ignore[index]  # `check` settled it
        shown = Examples(data.validation.first(8), threat, config.seed)
        trainer = Trainer(
            *(game, run, training_plan(config), validate),
            select=tag,
            callbacks=[shown],
            panels=self.panels(),
        )
        trainer.fit(resume=resume)
        if fabric.global_rank == 0:
            self.report(config, run, game, data, threat)
        elif self.helped:
            module, test = game.learner.module, tested(config, data)
            met = self.met(config, game, threat)
            help_judging(run, module, test, threat, config.attacks, config.seed, met)

    def report(
        self, config: RunConfigT, run: RunFolder, game: GameT, data: Splits, threat: Threat
    ) -> None:
        """The classifier's report and pictures; killed, it goes on where it was."""
        from advgame.evaluation.judge import judge_run

        judge_run(
            run,
            game.learner.module,
            tested(config, data),
            threat,
            dataset=short_name(config.dataset),
            attacks=config.attacks,
            seed=config.seed,
            title=f"{self.title(config)} on {short_name(config.dataset)}, seed {config.seed}",
            panels=self.panels(),
            **self.judging(config, run, game, data, threat),
        )

    def told(self, run: RunFolder) -> str:
        """The accuracies of a finished run in a line, for the screen."""
        from advgame.evaluation import as_line

        return f"{as_line(run.report())}; more in {run.path}/report.md"


def training_plan(config: RunConfig) -> TrainingPlan:
    """Length and schedule of the training."""
    from advgame.run.plan import TrainingPlan

    return TrainingPlan(
        config.epochs,
        config.schedule,
        config.milestones,
        ema=config.ema,
        validate_every=config.validate_every,
        save_every=config.save_every,
        budget=config.budget,
        prices=config.prices,
    )


def check_run(config: RunConfig) -> None:
    """Refuse what the types of the settings allow and no training can do.

    Raises:
        InputError: what is wrong, in one line.
    """
    eps = parse_radius(config.eps, config.norm)  # first: it needs no torch
    check_model(config.model)
    from advgame.evaluation import check_attacks
    from advgame.run.devices import check_devices
    from advgame.seeding import derive_seed

    if not config.attacks:
        raise InputError("--attacks names none: a report needs one, e.g. fgsm,pgd20,autoattack")
    check_attacks(config.attacks)
    if wants := [name for name in config.attacks if name in TRANSFER]:
        raise InputError(
            f"{wants[0]} needs another classifier, which a training has not: leave it away, and "
            + retold("give it to evaluate.py with --surrogate afterwards")
        )
    check_devices(config.accelerator, config.devices)
    derive_seed(config.seed, "check")
    training_plan(config)
    if odd := odd_radius(recipe(config.dataset, config.image_size), config.norm, eps):
        print(f"warning: {odd}", file=sys.stderr)


def start(init: str) -> Path:
    """The file of weights that a training begins with.

    Args:
        init: the file, or a run folder or ``zoo:NAME``, of which the best.

    Raises:
        InputError: there is none.
    """
    path = place(init)
    if path.is_dir():
        return RunFolder.open(path).weights()
    if not path.is_file():
        raise InputError(f"--init {init}: there is no such file of weights or run folder")
    return path


def trained(config: RunConfig) -> Path | None:
    """The weights of the newest checkpoint of the run that goes on, which needs no --init."""
    from advgame.run.checkpoint import step_of

    if config.resume is None:
        return None
    newest, _ = RunFolder(Path(config.resume)).checkpoints.newest()
    return newest / "defender.safetensors" if newest and step_of(newest) else None


def ball(config: RunConfig) -> Threat:
    """The ball in which the classifier is evaluated, in the norm of its settings."""
    from advgame.threat import THREATS

    return THREATS[config.norm](parse_radius(config.eps, config.norm))


def tested(config: RunConfig, data: Splits) -> ImageSet:
    """The test images of the report."""
    return data.test if config.eval_n is None else data.test.first(config.eval_n)

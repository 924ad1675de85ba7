"""Learn to attack: a policy chooses every gradient step against frozen classifiers.

    python scripts/train_attacker.py                               # digits, minutes on 2 cores
    python scripts/train_attacker.py --classifier runs/A runs/B    # classifiers of your own runs
    python scripts/train_attacker.py --agent ppo                   # SB3's PPO learns instead
    python scripts/train_attacker.py --resume runs/NAME            # go on, to the same bits

The environment is `envs.attack`, the learner `agents.reinforce.EpisodicReinforce` or
`agents.sb3.PPOAttacker`. A run leaves one folder: settings, TensorBoard events, metrics.csv,
checkpoints, curves.png, schedule.png, report.json and attacker.safetensors, which
`agents.attacker.load_attacker` turns into an attack. Its images are training images, what
validation selects by is cut from them; test images are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from judging import subjects
from typing_extensions import override

from advgame.choices import MOVES
from advgame.classifiers.names import check_model, knows
from advgame.errors import InputError
from advgame.run import job as jobs
from advgame.run.folder import Metrics, RunFolder
from advgame.run.job import about
from advgame.run.options import Count, Finite, Must, NotNegative, parse_radius, refuse_unasked
from advgame.run.settings import OptionalDataset
from advgame.zoo.entries import place
from agents.settings import EpisodeConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from advgame.attacks.gradient_steps import Menu
    from advgame.data import Splits
    from advgame.run.curves import Panels
    from advgame.targets import Target
    from agents.attack_game import AttackGame
    from agents.validation import Validation


@dataclass(frozen=True)
class Config:
    """Train an attacker on frozen classifiers."""

    classifier: tuple[str, ...] = ()
    """run folders or zoo:NAME of the classifiers to attack; the zoo's on digits when empty"""
    model: str = ""
    """network of those runs whose network is somebody's own code: package.module:factory(…)"""
    agent: Literal["reinforce", "ppo"] = "reinforce"
    """who learns"""
    queries: tuple[Annotated[int, Must("be 2 or above", lambda n: n >= 2)], ...] = (5, 10, 20)
    """query budgets; each episode draws one"""
    moves: tuple[str, ...] = MOVES
    """moves on the menu: on, best, random"""
    eps: str | None = None
    """radius, e.g. 0.15 or 8/255; each classifier's own when not given"""
    gain: Finite = 1.0
    """reward per mean clean margin gained"""
    bonus: Finite = 1.0
    """reward of success"""
    price: Finite = 0.01
    """of each query"""
    envs: Count = 256
    """images attacked side by side, per classifier"""
    epochs: Count = 20
    """validations on the way"""
    updates: Count = 20
    """updates per epoch"""
    lr: Annotated[float, Must("lie between 0 and 1", lambda lr: 0 < lr < 1)] | None = None
    """learning rate, which falls to 0; 0.01 (reinforce) or 0.002 (ppo) when not given"""
    entropy_coef: NotNegative = 0.005
    """weight of the entropy bonus"""
    hidden: Count = 64
    """units of the policy's two hidden layers"""
    validation_n: Count = 400
    """validation images per classifier"""
    dataset: OptionalDataset = None
    """whose images; the classifiers' own when not given"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout (all but digits)"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    image_size: Count | None = None
    """resize images and crop them to so many pixels square; as the classifiers' when not given"""
    seed: int = 0
    """seed of the run"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the current time when empty"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""


def panels() -> Panels:
    """Panels of curves.png: pay-off, validation and choices."""
    from advgame.attacks.gradient_steps import CHOICES

    return {
        "Pay-off": ("per query", {"game/reward_per_query": "attacker reward"}),
        "Validation success": (
            "share of images",
            {"eval/success": "learned", "eval/pgd": "PGD, equal queries"},
        ),
        "Validation margin gained": (
            "over the mean clean margin",
            {"eval/gain": "learned", "eval/pgd_gain": "PGD, equal queries"},
        ),
        "Entropy": (
            "nats",
            {f"strategy/entropy_{name}": name for name in CHOICES} | {"strategy/entropy": "all"},
        ),
    }


def targets(config: Config) -> list[Target]:
    """The classifiers to attack, at the radius that was asked for."""
    from advgame.targets import from_run, shipped

    refuse_idle_model(config)
    found = [from_run(one, config.model) for one in config.classifier] or [shipped()]
    if config.dataset is not None:
        found = [replace(one, dataset=config.dataset) for one in found]
    else:
        refuse_unasked(" ".join(config.classifier), "dataset", found[0].dataset)
    if len({one.dataset for one in found}) > 1:
        raise InputError("the classifiers are of different data sets: train on one")
    if config.eps is None:
        return found
    balls = [type(one.threat)(parse_radius(config.eps, one.threat.norm)) for one in found]
    return [replace(one, threat=b) for one, b in zip(found, balls, strict=True)]


def refuse_other_images(config: Config, data: Splits) -> None:
    """Refuse images that a classifier is not for, or that are not those that it was trained on.

    A network that averages over the image takes images of any size. Where we cut the test images
    off, a few more images in a folder are cut elsewhere: the attacker would then learn from images
    that are test images of the classifier's run, and be validated on some that it learned from.

    Raises:
        InputError: which classifier, and how they differ.
    """
    these = subjects.in_words(data.train.shape, data.train.classes)
    for what in config.classifier:
        run = RunFolder.open(place(what))
        if (its := subjects.task_of(run)) not in ("", these):
            raise InputError(f"{what} is for {its}; these are {these}")
        subjects.refuse_other_classes(what, run, data.train.names)
        asked = config.dataset or config.image_size
        if not asked and (other := subjects.changed(what, data)):
            name = run.about()["config"]["dataset"]
            raise InputError(
                f"{name} has changed since {what} was trained on it ({other}): restore it, or "
                f"attack knowingly on what is there now, with --dataset {name}"
            )


def refuse_idle_model(config: Config) -> None:
    """Refuse ``--model`` where no classifier needs it; a run of before goes on with it.

    Raises:
        InputError: all classifiers know their networks.
    """
    if not config.model or config.resume is not None:
        return
    if all(knows(RunFolder.open(place(one)).about()) for one in config.classifier):
        whose = " ".join(config.classifier) or "the zoo's classifier"
        raise InputError(f"{whose}: the network is known, leave --model away")


def make_game(
    config: Config, frozen: list[Target], data: Splits, fabric: Fabric
) -> tuple[AttackGame, Menu]:
    """The environments of the frozen classifiers with the learner, and what it can choose."""
    from advgame.attacks.gradient_steps import CHOICES, Menu
    from advgame.seeding import derive_seed, seeded_init, stream
    from agents.attack_game import AttackGame
    from agents.policies import FeaturePolicy, FeatureValue
    from agents.reinforce import EpisodicReinforce
    from agents.sb3 import PPOAttacker
    from envs.attack import AttackVectorEnv
    from envs.sb3 import SB3VecEnv

    menu = Menu(moves=config.moves)
    envs = [
        AttackVectorEnv(
            config.envs,
            classifier=one.model,
            data=data.train,
            threat=one.threat,
            menu=menu,
            queries=config.queries,
            gain=config.gain,
            bonus=config.bonus,
            price=config.price,
        )
        for one in frozen
    ]
    steps, seed = max(config.queries) - 1, config.seed
    if config.agent == "ppo":
        ppo = PPOAttacker(
            SB3VecEnv(*envs),
            menu.sizes,
            derive_seed(seed, "ppo"),
            fabric,
            steps=steps,
            lr=config.lr or 2e-3,
            entropy_coef=config.entropy_coef,
            hidden=config.hidden,
        )
        return AttackGame(ppo, envs, seed, config.updates), menu
    inputs = len(menu.feature_names)
    with seeded_init(seed, "policy"):
        policy = FeaturePolicy(inputs, menu.sizes, config.hidden).to(fabric.device)
        value = FeatureValue(inputs, config.hidden).to(fabric.device)
    settings = EpisodeConfig(steps, lr=config.lr or 1e-2, entropy_coef=config.entropy_coef)
    rng = stream(seed, "policy", fabric.device)
    learner = EpisodicReinforce(envs, policy, value, settings, rng, fabric, CHOICES)
    return AttackGame(learner, envs, seed, config.updates), menu


def picture(chosen: list[Tensor], menu: Menu, title: str) -> Figure:
    """What the attacker does at each query."""
    import torch

    from advgame.attacks.gradient_steps import CHOICES
    from advgame.run.curves import shares_figure

    options = {
        name: [one if isinstance(one, str) else f"{one:g}" for one in values]
        for name, values in zip(CHOICES, menu.lists, strict=True)
    }
    shares = {
        name: [
            torch.bincount(one[:, column], minlength=len(options[name])).div(len(one)).tolist()
            for one in chosen
        ]
        for column, name in enumerate(CHOICES)
    }
    return shares_figure(shares, options, f"{title}: what is chosen at each query")


def finish(run: RunFolder, game: AttackGame, validate: Validation, config: Config) -> None:
    """The attacker that validation chose, as a file, a report and pictures."""
    from advgame.health import deaths
    from advgame.run.curves import game_figure, save_figure
    from advgame.run.loop import load_best
    from advgame.seeding import stream

    load_best(run, game.learner.module)
    told = about(config)
    attacker = replace(validate.attacker(game.learner.module), about=told)
    attacker.save(run.path / "attacker.safetensors")
    rows = Metrics.read(run.path / "metrics.csv")
    title = f"Learning to attack, {config.agent}, seed {config.seed}"
    save_figure(game_figure(rows, title, panels()), run.path / "curves.png")
    one, x, y, _ = validate.cases[0]
    chosen: list[Tensor] = []
    watching = replace(
        attacker.attack(one.threat, max(config.queries)),
        watch=lambda state: chosen.append(state.chosen),
    )
    watching.run(one.model, x, y, rng=stream(config.seed, "schedule", x.device), check=False)
    save_figure(picture(chosen, attacker.menu, title), run.path / "schedule.png")
    scores = validate(game.learner.module)
    report = {
        **told,
        "classifiers": [c.name for c, *_ in validate.cases],
        "validation": scores,
        "flags": [one.as_dict() for one in deaths(rows)],
    }
    run.write_json("report.json", report)


class Made(NamedTuple):
    """What a run is made of."""

    game: AttackGame
    validate: Validation
    data: Splits


class Job(jobs.Job[Config, Made]):
    """The job that trains an attacker on frozen classifiers."""

    config = Config

    @override
    def check(self, config: Config) -> Config:
        from advgame.seeding import derive_seed

        config = super().check(config)
        if config.model:
            check_model(config.model)
        if not config.queries:
            raise InputError("queries names no budget")
        if config.agent == "ppo" and config.envs * (max(config.queries) - 1) < 2:
            raise InputError("ppo needs two steps to learn from: more --envs or more --queries")
        derive_seed(config.seed, "check")
        return config

    @override
    def fabric(self, config: Config) -> Fabric:
        from advgame.run.devices import make_fabric

        return make_fabric(config.accelerator, 1, "32-true")

    def build(self, config: Config, fabric: Fabric) -> Made:
        """The game, the validation of its attacker, and the images of both."""
        from advgame.data import load_data
        from agents.validation import Payoff, Validation

        frozen = targets(config)
        data = load_data(
            frozen[0].dataset,
            config.data_dir,
            download=config.download,
            image_size=config.image_size or frozen[0].image_size,
        )
        refuse_other_images(config, data)
        data = data.to(fabric.device)
        frozen = [replace(one, model=one.model.to(fabric.device)) for one in frozen]
        game, menu = make_game(config, frozen, data, fabric)
        images = data.validation.first(config.validation_n)
        payoff = Payoff(config.gain, config.bonus, config.price)
        validate = Validation(frozen, images, config.queries, menu, payoff, config.seed)
        return Made(game, validate, data)

    @override
    def images(self, made: Made) -> Mapping[str, Any]:
        return made.data.about()

    @override
    def frozen(self, made: Made) -> Mapping[str, nn.Module]:
        cases = enumerate(made.validate.cases, 1)
        return {f"classifier {number} ({one.name})": one.model for number, (one, *_) in cases}

    @override
    def work(self, config: Config, run: RunFolder, made: Made, *, resume: bool) -> None:
        from advgame.run.loop import Trainer
        from advgame.run.plan import TrainingPlan

        game, validate, _ = made
        plan = TrainingPlan(config.epochs, "onecycle")
        trainer = Trainer(
            game, run, plan, validate, select="eval/return", role="attacker", panels=panels()
        )
        trainer.fit(resume=resume)
        finish(run, game, validate, config)

    def told(self, run: RunFolder) -> str:
        """Its success beside PGD's, and the flags."""
        report = run.report()
        scores = report["validation"]
        flags = [f"\nflag {one['name']}: {one['meaning']}" for one in report.get("flags", [])]
        return (
            f"validation: success {100 * scores['eval/success']:.1f} % "
            f"(PGD {100 * scores['eval/pgd']:.1f} %), margin gained {scores['eval/gain']:.3f} "
            f"(PGD {scores['eval/pgd_gain']:.3f}); {run.path}/attacker.safetensors{''.join(flags)}"
        )


job = Job()

if __name__ == "__main__":
    job.main()

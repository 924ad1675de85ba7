"""LAS-AT: a classifier learns from PGD attacks whose ε, steps and step size a policy chooses.

    python scripts/train_las_at.py                                  # digits, about 3 minutes on 2 cores
    python scripts/train_las_at.py --agent fixed                    # the control: plain PGD-AT
    python scripts/train_las_at.py --dataset cifar10 --data-dir DIR # a GPU is used where there is one
    python scripts/train_las_at.py --resume runs/NAME               # go on after a kill, to the same bits

The game is `advgame.games.las_at`, the environment `envs.strategy_selection`, the learner
`agents.reinforce`. A run leaves one folder: settings, TensorBoard events, metrics.csv,
checkpoints, report.json and report.md (AutoAttack on test images), curves.png, examples.png.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from advgame.attacks import attacked, pgd
from advgame.checks import parse_eps
from advgame.classifiers import Normalise, make_classifier
from advgame.curves import Curves, game_figure, image_strip, save_figure
from advgame.data import STATISTICS, Splits, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import (
    ATTACKS,
    Report,
    Verdicts,
    evaluate,
    find_flags,
    predict,
    score,
    write_report,
)
from advgame.games.las_at import Credit, LasAt
from advgame.games.strategy import SPACES, StrategyPlayer, StrategySpace, strategy_space
from advgame.runs import Metrics, RunFolder, device_name
from advgame.seeding import derive_seed, seeded_init, stream
from advgame.threat import Linf
from advgame.training import Trainer, TrainingPlan, load_best
from agents.controls import FixedStrategy, RandomStrategy
from agents.policies import StrategyPolicy
from agents.reinforce import CHOICES, PRESETS, Reinforce
from agents.sb3 import PPOPlayer
from envs.strategy_selection import StrategySelectionVectorEnv

Eps = Annotated[str, tyro.conf.arg(metavar="FLOAT|A/B")]


@dataclass(frozen=True)
class Config:
    """Train a classifier by LAS-AT and report its robustness."""

    dataset: Literal["digits", "mnist", "cifar10", "cifar100", "svhn"] = "digits"
    """digits is embedded; the others need --data-dir"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    train_n: int | None = None
    """use only this many training images"""
    model: str | None = None
    """small_cnn, minimax_cnn, resnet18, preact_resnet18 or wrn-DEPTH-WIDEN (data set's default)"""
    eps: Eps | None = None
    """ε₀, e.g. 0.15 or 8/255 (data set's default: digits 0.15, MNIST 0.3, colour 8/255)"""
    agent: Literal["reinforce", "ppo", "random", "fixed"] = "reinforce"
    """who picks the strategies; random and fixed (PGD-10 at ε₀) are the controls"""
    preset: Literal["default", "repo"] = "default"
    """default: ours; repo: the published code's settings, quirks included"""
    credit: Credit | None = None
    """who is paid for R2 and R3: mixed, sample or batch (preset's)"""
    baseline: Literal["none", "loo", "running", "value"] | None = None
    """what REINFORCE takes off the reward (preset's)"""
    entropy_coef: float | None = None
    """weight of the policy's entropy bonus (preset's)"""
    reward_interval: int | None = None
    """pay the attacker every k-th step (default 1; repo and colour images 20)"""
    space: str = "las-pgd-at-cifar10"
    """lists of ε, steps and step sizes to choose from"""
    epochs: int | None = None
    """passes over the training images (data set's default)"""
    batch_size: int | None = None
    """images per step and process (data set's default)"""
    lr: float | None = None
    """peak learning rate of the defender (data set's default)"""
    weight_decay: float = 5e-4
    """weight decay of the defender"""
    true_probability: float | None = None
    """label smoothing: probability left on the true class, 1 is none (data set's default)"""
    schedule: Literal["onecycle", "multistep", "constant"] = "onecycle"
    """learning-rate schedule, per step"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: shares of the training at which the rate drops tenfold"""
    ema: float | None = None
    """decay of a moving average of the weights, which is then validated and reported"""
    grad_clip: float | None = None
    """largest gradient norm of the defender"""
    validate_every: int = 1
    """epochs between validations"""
    attacks: tuple[str, ...] = ("fgsm", "pgd20", "autoattack")
    """attacks of the final report"""
    eval_n: int | None = None
    """test images in the report (all of digits, 1000 of the others)"""
    seed: int = 0
    """seed of the run"""
    accelerator: str = "auto"
    """Fabric's: auto, cpu, cuda, mps"""
    devices: int = 1
    """processes, one device each"""
    precision: Literal["32-true", "bf16-mixed"] | None = None
    """bf16-mixed on a GPU, 32-true elsewhere, unless given"""
    compile: bool = False
    """compile the classifier with torch.compile"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder (the current time)"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""


@dataclass(frozen=True)
class Recipe:
    """What a data set needs where the command line is silent."""

    model: str
    eps: float
    epochs: int
    batch_size: int
    lr: float
    true_probability: float = 1.0
    reward_interval: int = 1
    eval_n: int | None = 1000
    crop: bool = False
    flip: bool = False


_COLOUR = Recipe("preact_resnet18", 8 / 255, 30, 128, 0.1, 0.8, 20, crop=True, flip=True)
RECIPES = {
    "digits": Recipe("small_cnn", 0.15, 60, 64, 0.1, eval_n=None),
    "mnist": Recipe("small_cnn", 0.3, 10, 128, 0.1),
    "cifar10": _COLOUR,
    "cifar100": _COLOUR,
    "svhn": replace(_COLOUR, lr=0.05, flip=False),
}


class LasAtGame:
    """The environment and its player, as the shared loop sees them."""

    def __init__(self, env: StrategySelectionVectorEnv, player: StrategyPlayer, seed: int) -> None:
        self.env, self.player, self.defender = env, player, env.defender
        self.steps_per_epoch = env.steps_per_epoch
        self.images, _ = env.reset(seed=seed)
        self._chosen: list[Tensor] = []  # this epoch's actions, for histograms

    def step(self) -> dict[str, Tensor]:
        """One decision per image, one step of the defender, one lesson for the player."""
        due = self.env.reward_due
        actions = self.player.act(self.images, learn=due)
        self.images, reward, _, _, _ = self.env.step(actions)
        lesson = self.player.learn(reward) if due else {}
        self._chosen.append(actions)
        result = self.env.result
        assert result is not None
        cost = torch.tensor(result.cost, device=reward.device)
        return {**result.stats, **lesson, "attacker/forwards_per_image": cost}

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """How far the strategies have moved from the control's; histograms of the choices."""
        space, row = self.env.space, {}
        strategies = space.decode(torch.cat(self._chosen))
        wanted = {"eps": space.eps0, "steps": 10, "step_size": space.eps0 / 4}
        for name in CHOICES:
            values = getattr(strategies, name).float()
            row[f"strategy/{name}_ratio"] = float(values.mean()) / wanted[name]
            if curves is not None:
                curves.histogram(f"strategy/{name}_chosen", values, step)
        self._chosen = []
        return row

    def state_dict(self) -> dict[str, Any]:
        """Environment and player."""
        return {
            "env": self.env.state_dict(),
            "player": self.player.state_dict(),
            "chosen": self._chosen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.env.load_state_dict(state["env"])
        self.player.load_state_dict(state["player"])
        self.images = self.env._images
        self._chosen = [one.to(self.images.device) for one in state["chosen"]]


def settle(config: Config) -> Config:
    """Fill in what the command line left open, and refuse what cannot work."""
    recipe, repo = RECIPES[config.dataset], config.preset == "repo"
    agent = PRESETS[config.preset]
    chosen: dict[str, Any] = {
        name: getattr(recipe, name) if getattr(config, name) is None else getattr(config, name)
        for name in ("model", "epochs", "batch_size", "lr", "true_probability", "eval_n")
    }
    chosen["eps"] = str(parse_eps(recipe.eps if config.eps is None else config.eps))
    defaults = {
        "credit": "batch" if repo else "mixed",
        "baseline": agent.baseline,
        "entropy_coef": agent.entropy_coef,
        "reward_interval": 20 if repo else recipe.reward_interval,
        "true_probability": 0.7 if repo else recipe.true_probability,
    }
    for name, value in defaults.items():
        if getattr(config, name) is None:
            chosen[name] = value
    if config.agent in ("random", "fixed"):
        chosen["reward_interval"] = 0  # a control never learns, so the look-ahead is not paid for
    settled = replace(config, **chosen)
    if settled.credit == "batch" and settled.baseline == "loo":
        raise InputError(
            "--credit batch gives every image the same reward, which --baseline loo cancels "
            "exactly: choose another baseline"
        )
    if settled.agent in ("reinforce", "ppo") and not (settled.reward_interval or 0) >= 1:
        raise InputError("reward_interval must be 1 or above for an agent that learns")
    if unknown := [name for name in settled.attacks if name not in ATTACKS]:
        raise InputError(f"unknown attack {unknown[0]!r}: choose from {', '.join(ATTACKS)}")
    if settled.space not in SPACES:
        raise InputError(f"unknown space {settled.space!r}: choose from {', '.join(SPACES)}")
    for name in ("lr", "batch_size", "eval_n", "devices"):
        value = getattr(settled, name)
        if value is not None and value <= 0:
            raise InputError(f"{name} must be above 0, not {value}")
    derive_seed(settled.seed, "check")
    _plan(settled)
    return settled


def _plan(config: Config) -> TrainingPlan:
    assert config.epochs is not None
    return TrainingPlan(
        config.epochs,
        config.schedule,
        config.milestones,
        ema=config.ema,
        validate_every=config.validate_every,
    )


def build(config: Config, data: Splits, fabric: Fabric) -> LasAtGame:
    """Defender, rules, environment and player of a settled config."""
    recipe, repo = RECIPES[config.dataset], config.preset == "repo"
    assert config.model and config.batch_size and config.lr and config.credit
    assert config.true_probability is not None and config.reward_interval is not None
    shape, classes = data.train.shape, data.train.classes
    normalise = Normalise(*STATISTICS[config.dataset]) if config.dataset in STATISTICS else None
    with seeded_init(config.seed, "defender"):
        module = make_classifier(config.model, shape, classes, normalise)
    if fabric.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    if config.compile:
        module.compile()
    defender = Defender(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        true_probability=config.true_probability,
        grad_clip=config.grad_clip,
        fabric=fabric,
    )
    game = LasAt(
        Linf(parse_eps(config.eps or recipe.eps)),
        start="eps0" if repo else "own",
        look_ahead_mode="train" if repo else "eval",
    )
    env = StrategySelectionVectorEnv(
        config.batch_size,
        data=data.train,
        defender=defender,
        game=game,
        space=strategy_space(config.space, float(game.threat.eps)),
        credit=config.credit,
        reward_interval=config.reward_interval,
        crop=recipe.crop,
        flip=recipe.flip,
    )
    return LasAtGame(env, _player(config, env.space, shape, fabric), config.seed)


def _player(
    config: Config, space: StrategySpace, shape: tuple[int, int, int], fabric: Fabric
) -> StrategyPlayer:
    rng = stream(config.seed, f"policy{fabric.global_rank}", fabric.device)
    if config.agent == "random":
        return RandomStrategy(space.sizes, rng)
    if config.agent == "fixed":
        return FixedStrategy(space.nearest(8, 10, 2))
    assert config.batch_size and config.baseline and config.entropy_coef is not None
    if config.agent == "ppo":
        if fabric.world_size > 1:
            raise InputError("--agent ppo runs on one device: use --agent reinforce or --devices 1")
        seed = derive_seed(config.seed, "ppo")
        device = fabric.device
        return PPOPlayer(shape, space.sizes, config.batch_size, seed, device)
    settings = replace(
        PRESETS[config.preset], baseline=config.baseline, entropy_coef=config.entropy_coef
    )
    with seeded_init(config.seed, "policy"):
        policy = StrategyPolicy(shape, space.sizes, uniform=config.preset != "repo")

    def average(one: StrategyPolicy) -> None:
        for parameter in one.parameters():
            if parameter.grad is not None:
                parameter.grad = fabric.all_reduce(parameter.grad)  # type: ignore[assignment]

    synchronise = average if fabric.world_size > 1 else None
    return Reinforce(policy.to(fabric.device), settings, rng, synchronise)


def report(config: Config, run: RunFolder, module: nn.Module, data: Splits, about: dict[str, Any]) -> dict[str, Any]:
    """Judge the weights that validation chose, and draw the pictures."""
    threat = Linf(parse_eps(config.eps or 0))
    test = data.test if config.eval_n is None else data.test.first(config.eval_n)
    test = test.to(next(module.parameters()).device)
    load_best(run, module, "last")
    rng = stream(config.seed, "last", test.images.device)
    last = dict(zip(("clean", "pgd20"), score(module, test, pgd(threat, 20), rng), strict=True))
    load_best(run, module, "best")
    with Console(stderr=True).status("") as status:
        verdicts: Verdicts = evaluate(
            module, test, threat, config.attacks, seed=config.seed, progress=status.update
        )
        status.update("looking for signs of unreliable numbers")
        flags = find_flags(module, test, threat, verdicts, config.seed)
    content = write_report(
        run,
        Report(
            config.dataset,
            threat,
            verdicts,
            flags,
            config.seed,
            about["device"],
            "best PGD-10 accuracy on the validation split",
            about["command"],
            {"last": last},
        ),
    )
    _pictures(config, run, module, data, threat)
    return content


def _pictures(config: Config, run: RunFolder, module: nn.Module, data: Splits, threat: Linf) -> None:
    rows = Metrics.read(run.path / "metrics.csv")
    sample = data.test.first(10).to(next(module.parameters()).device)
    images, rng = sample.floats(), stream(config.seed, "strip", sample.images.device)
    x_adv = pgd(threat, 20).perturb(module, images, sample.labels, rng=rng)
    with attacked(module):
        said = [
            [f"{t}→{p}" for t, p in zip(sample.labels.tolist(), predict(module, x).tolist(), strict=True)]
            for x in (images, x_adv)
        ]
    title = f"LAS-AT on {config.dataset}, {config.agent}, seed {config.seed}"
    curves = Curves(run.path, purge_step=int(rows[-1]["step"]) + 1)
    for name, figure in (
        ("curves", game_figure(rows, title)),
        ("examples", image_strip(images, x_adv, float(threat.eps), (said[0], said[1]))),
    ):
        curves.figure(name, figure, int(rows[-1]["step"]))
        save_figure(figure, run.path / f"{name}.png")
    curves.close()


def open_run(config: Config) -> tuple[Config, RunFolder | None]:
    """A run to resume with its own settings, or None and the settled settings of a new one."""
    if config.resume is None:
        return settle(config), None
    run, stored = RunFolder.open(Path(config.resume))
    try:
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        saved = Config(**lists)
    except TypeError as error:
        raise InputError(f"{run.path} holds the settings of another script or version") from error
    free = {"resume", "name", "runs_dir"}
    for field in fields(Config):
        asked = getattr(config, field.name)
        if field.name not in free and asked not in (field.default, getattr(saved, field.name)):
            raise InputError(
                f"{run.path} was started with {field.name}={getattr(saved, field.name)}, not "
                f"{asked}: leave --{field.name.replace('_', '-')} away, or start a new run"
            )
    return settle(saved), run


def main(config: Config) -> RunFolder:
    """Train and report; returns the run folder.

    Raises:
        InputError: settings or data that cannot work, found before any training.
    """
    config, run = open_run(config)
    data = load_data(
        config.dataset, config.data_dir, download=config.download, train_n=config.train_n
    )
    fabric = _fabric(config)
    game = build(config, data.to(fabric.device), fabric)
    if run is None:
        run = RunFolder.create(
            Path(config.runs_dir), config.name, asdict(config), device_name(fabric.device)
        )
        resume = False
    else:
        resume = True
    about = run.about()
    validation, threat = data.validation.to(fabric.device), game.env.game.threat

    def validate(judged: nn.Module) -> dict[str, float]:
        rng = stream(config.seed, "validate", fabric.device)
        clean, robust = score(judged, validation, pgd(threat, 10), rng)
        return {"eval/clean": clean, "eval/robust": robust}

    Trainer(game, run, _plan(config), validate).fit(resume=resume)
    if fabric.global_rank == 0 and not (run.path / "report.json").exists():
        content = report(config, run, game.defender.module, data, about)
        accuracy = ", ".join(f"{k} {100 * v:.1f} %" for k, v in content["accuracy"].items())
        print(f"{run.path}: {accuracy}; {len(content['flags'])} flag(s); see {run.path}/report.md")
    return run


def _fabric(config: Config) -> Fabric:
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices)
        cuda = fabric.device.type == "cuda"
        precision = config.precision or ("bf16-mixed" if cuda else "32-true")
        fabric = Fabric(
            accelerator=config.accelerator, devices=config.devices, precision=precision
        )
        fabric.launch()
    except Exception as error:  # Fabric raises its own kinds for devices that are not there
        raise InputError(f"cannot use accelerator {config.accelerator!r}: {error}") from error
    return fabric


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2 if isinstance(problem, InputError) else 1) from None

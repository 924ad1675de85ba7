"""Imitate an expert: GAIL with any updater of the discriminator, by hand or learned.

    python scripts/train_gail.py                                          # CartPole, ours
    python scripts/train_gail.py --preset paper --updater mlp-narrow      # near to L2L's setting
    python scripts/train_gail.py --env MountainCar-v0 --source true       # control: true reward
    python scripts/train_gail.py --env Pendulum-v1 --demonstrations my.npz
    python scripts/train_gail.py --updater "my_updaters:Signum(0.003)"    # your own
    python scripts/train_gail.py --resume runs/NAME                       # go on, to the same bits

One iteration is `agents.gail.GailTraining.step`; the discriminator's rules `advgame.games.gail`,
the environment `envs.imitation`, the policy sb3-contrib's TRPO (`agents.imitator`), the updaters
`agents.updaters`. A run leaves one folder: settings,
TensorBoard events, metrics.csv, checkpoints, curves.png, report.json, report.md. `best` weights are
those of the highest true return, which an imitator cannot know: the report is about the last ones.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd, hypot
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from typing_extensions import override

from advgame.choices import Horizon
from advgame.errors import InputError
from advgame.run import job as jobs
from advgame.run.folder import Metrics, RunFolder
from advgame.run.options import Count, Must, Positive, Whole
from agents.settings import Algorithm, PolicySettings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from stable_baselines3.common.policies import ActorCriticPolicy
    from torch import Tensor, nn

    from advgame.imitation.demonstrations import Demonstrations
    from agents.gail import GailTraining

Preset = Literal["default", "paper", "ho-ermon"]
Pay = Literal["discriminator", "constant", "random", "true", "cloning"]


# options of the discriminator's half, which the controls have not
GAMES_OWN = (
    "updater", "updater_lr", "entropy", "penalty", "penalty_target", "controller", "replay",
    "discriminator_steps",
)  # fmt: skip
NETWORKS_OWN = ("hidden", "spectral_norm")  # of the discriminator
# of a policy that plays, which cloning has not
POLICYS_OWN = (
    "algorithm", "envs", "n_steps", "stagger", "value_epochs", "gae_lambda", "max_kl", "settle",
    "iterations", "evaluate_every", "save_every",
)  # fmt: skip


Few = Annotated[int, Must("be 2 or above", lambda number: number >= 2)]
Closed = Annotated[float, Must("lie in [0, 1]", lambda value: 0 <= value <= 1)]


@dataclass(frozen=True)
class Config:
    """Imitate an expert by GAIL, and evaluate by the true return.

    The defaults shown are those of the --env and --preset on the same command line.
    """

    env: str = "CartPole-v1"
    """Gymnasium id, or module:id of yours; CartPole-v1 and MountainCar-v0 ship demonstrations"""
    preset: Preset = "default"
    """paper: near to L2L's, ho-ermon: near to their code; what differs: docs/imitation.md"""
    updater: str = "adam"
    """of the discriminator: adam, sgd, mlp, mlp-stable, mlp-narrow, coordinatewise; or your own,
    package.module:factory(1, width=8)"""
    updater_lr: Positive | None = None
    """its learning rate; the updater's own default when not given"""
    source: Pay = "discriminator"
    """what pays the policy; constant, random (never updated), true and cloning are controls"""
    expert: Literal["demonstrations", "dummy"] = "demonstrations"
    """whom to imitate; dummy, a control, always takes action 0, in a box the nearest to 0"""
    reward: Literal["survival", "cost", "neutral"] = "neutral"
    """form of the discriminator's reward: -log(1-D), log D or the logit"""
    horizon: Horizon = "fixed"
    """task: episodes end as the task's; fixed: all as long, with absorbing states"""
    demonstrations: str | None = None
    """an .npz of ours, D4RL's or imitation's; those that ship with the package when not given"""
    trajectories: Count | None = None
    """how many of them, the first ones; all that there are when not given (10 of the dummy)"""
    every: Count = 1
    """keep every so many pairs of each trajectory"""
    hidden: tuple[int, ...] = (64, 32)
    """widths of the discriminator"""
    spectral_norm: bool = False
    """keep the discriminator 1-Lipschitz"""
    penalty: float = 0.0
    """weight of the gradient penalty"""
    penalty_target: float = 1.0
    """norm of the discriminator's gradient that is not penalised"""
    entropy: float = 1e-3
    """weight of the discriminator's label entropy"""
    controller: float = 0.0
    """weight of C-GAIL's controller, which draws the discriminator to 1/2"""
    replay: float = 0.0
    """share of the discriminator's policy side that comes from earlier iterations"""
    discriminator_steps: Count = 1
    """updates of the discriminator per iteration"""
    algorithm: Algorithm = "trpo"
    """of the policy"""
    envs: Count = 32
    """episodes side by side"""
    n_steps: Count = 64
    """steps of each per iteration"""
    stagger: bool = True
    """first episodes begin at different times, so that a batch holds all parts of an episode"""
    policy_hidden: tuple[Count, ...] = (64, 32)
    """widths of policy and value network"""
    value_epochs: Count = PolicySettings.value_epochs
    """passes over the batch for the value network"""
    gae_lambda: Closed = PolicySettings.gae_lambda
    """λ of the advantage estimate"""
    max_kl: Positive = PolicySettings.max_kl
    """TRPO's trust region, nats"""
    settle: Whole = 0
    """iterations after which TRPO's steps are half as long, 1 / (1 + t/settle); 0 keeps them"""
    iterations: Count = 500
    """of policy and discriminator"""
    evaluate_every: Count = 10
    """iterations between evaluations"""
    episodes: Few = 200
    """fresh episodes per evaluation; two or more have a standard error"""
    save_every: Count = 10
    """evaluations between checkpoints"""
    seed: int = 0
    """seed of the run"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the current time when empty"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""


class Parts(NamedTuple):
    """What a run is made of."""

    training: GailTraining
    expert: Demonstrations
    """the trajectories that are imitated"""
    recorded: Demonstrations | None
    """all that there are; None of a dummy"""
    pairs: int
    """of the expert, that the discriminator sees"""
    random: Mapping[str, float]
    """`level` of random actions, score 0 of the report"""
    resumable: bool
    """whether the task's episodes can be saved"""


def make_parts(config: Config) -> Parts:
    """Environment, policy, discriminator, updater and demonstrations.

    Raises:
        InputError: settings, files or memory that will not do.
    """
    import torch

    from advgame.games.gail import Gail
    from advgame.imitation.demonstrations import Demonstrations, shipped
    from advgame.imitation.discriminator import Discriminator
    from advgame.seeding import derive_seed, stream
    from agents.gail import GailTraining, dummy_expert, random_returns
    from agents.imitator import Imitator
    from agents.updaters import make_updater, try_updater
    from envs.imitation import ImitationVectorEnv
    from envs.tasks import GymnasiumTask

    env = ImitationVectorEnv(
        config.envs,
        env_id=config.env,
        reward=config.reward,
        horizon=config.horizon,
        stagger=config.stagger,
    )
    recorded: Demonstrations | None = None
    if config.expert == "dummy":
        expert = dummy_expert(env, config.trajectories or 10, config.seed)
    else:
        if config.demonstrations is None:
            recorded = shipped(config.env)
        else:
            space = env.single_action_space
            recorded = Demonstrations.load(config.demonstrations, config.env, space)
        expert = recorded.subset(config.trajectories or len(recorded))
    pairs = env.expert_pairs(expert, stream(config.seed, "subsampling"), config.every)
    discriminator = Discriminator(env.code.pair_size, config.hidden, config.spectral_norm)
    theta = discriminator.init(stream(config.seed, "discriminator"))
    if config.source == "constant":
        theta = torch.zeros_like(theta)
    env.discriminator, env.theta = discriminator, theta
    rules = Gail(
        discriminator,
        pairs,
        entropy=config.entropy,
        penalty=config.penalty,
        penalty_target=config.penalty_target,
        controller=config.controller,
        steps=config.discriminator_steps,
    )
    make = partial(
        make_updater,
        config.updater,
        lr=config.updater_lr,
        seed=config.seed,
        blocks=discriminator.blocks,
    )
    if ":" in config.updater:
        try_updater(make(), theta)
    updater = make()
    updater.check_room(discriminator.size, Path(config.resume or config.runs_dir))
    settings = PolicySettings(
        algorithm=config.algorithm,
        hidden=config.policy_hidden,
        n_steps=config.n_steps,
        value_epochs=config.value_epochs,
        gae_lambda=config.gae_lambda,
        max_kl=config.max_kl,
        settle=config.settle,
        fisher_every=10 if config.preset == "ho-ermon" else PolicySettings.fisher_every,
    )
    player = Imitator(env, derive_seed(config.seed, "policy"), settings)
    training = GailTraining(
        env,
        player,
        rules,
        updater,
        source={"constant": "fixed", "random": "fixed"}.get(config.source, config.source),  # type: ignore[arg-type]
        replay=config.replay,
        seed=config.seed,
        iterations=config.evaluate_every,
    )
    resumable = not isinstance(env.task, GymnasiumTask)
    chance = level(random_returns(config.env, 100 if resumable else 20))  # one by one: slow
    return Parts(training, expert, recorded, len(pairs), chance, resumable)


def level(returns: Tensor) -> dict[str, float]:
    """Mean return, its standard error, and of how many episodes."""
    error = float(returns.std() / len(returns) ** 0.5) if len(returns) > 1 else 0.0
    return {"mean": float(returns.mean()), "standard_error": error, "episodes": len(returns)}


def expert_level(expert: Demonstrations) -> dict[str, Any]:
    """`level` of the demonstrations; None for what is not known."""
    if not expert.paid:
        return {"mean": None, "standard_error": None, "episodes": len(expert)}
    return level(expert.returns)


def warn_of_no_expert(random: Mapping[str, float], expert: Demonstrations) -> None:
    """Say so where the demonstrations are at the level of random actions."""
    if not expert.paid:
        print(
            "note: the demonstrations have no rewards: the report has no return of the expert, and "
            "no score",
            file=sys.stderr,
        )
        return
    reached, noise = float(expert.returns.mean()), 2 * random["standard_error"]
    if reached <= random["mean"] + noise:
        print(
            f"warning: the demonstrations' mean return, {reached:.1f}, is at the level of random "
            f"actions, {random['mean']:.1f} ± {noise:.1f}: who imitates them learns nothing of the "
            "task",
            file=sys.stderr,
        )


def worse_than_random(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A flag where the policy's return lies 3 standard errors below that of random actions."""
    chance, reached = report["random"], report["eval/return"]
    error = hypot(chance["standard_error"], report["eval/standard_error"])
    if not chance["mean"] - reached > 3 * error:
        return []
    meaning = (
        f"the policy's return, {reached:.1f}, is below that of random actions, "
        f"{chance['mean']:.1f}, by more than 3 standard errors of the difference, {error:.2g} each"
    )
    return [{"name": "worse_than_random", "meaning": meaning}]


def resembles(config: Config, parts: Parts) -> dict[str, Any]:
    """What a held-out discriminator says, where there are 4 demonstrations or more."""
    from agents.resemblance import resemblance

    training, everything = parts.training, parts.recorded
    if everything is None or len(everything) < 4:
        return {}
    found = resemblance(training.env, training.player, everything, seed=config.seed)
    return {"imitation": found}


def title(config: Config) -> str:
    """The run in a line, as the heading of its report."""
    how = {
        "discriminator": f"GAIL, its discriminator updated by {config.updater}",
        "constant": "a control that is paid a constant",
        "random": "a control that is paid by a discriminator that never learns",
        "true": "a control that is paid the task's own reward",
        "cloning": "behaviour cloning",
    }[config.source]
    whom = "an expert that always takes action 0" if config.expert == "dummy" else "an expert"
    return f"Imitation of {whom} on {config.env}: {how}, seed {config.seed}"


def in_words(config: Config, parts: Parts) -> list[str]:
    """The settings as the report puts them in words."""
    whose = config.demonstrations or "those that ship with the package"
    kept = "" if config.every == 1 else f", every {config.every}th pair of each"
    lines = [
        f"demonstrations: {len(parts.expert)} trajectories, {parts.pairs:,} pairs"
        + (f" ({whose}{kept})" if config.expert != "dummy" else " of the dummy")
    ]
    units = "-".join(map(str, config.policy_hidden))
    if config.source == "cloning":
        return [*lines, f"policy: {units} units, likelihood of the demonstrated actions"]
    ends = "all as long as the time limit, with absorbing states, "
    rows = "their beginnings staggered" if config.stagger else "all begun together"
    lines += [
        f"episodes: {ends if config.horizon == 'fixed' else 'as the task ends them, '}{rows}",
        f"policy: {config.algorithm.upper()}, {units} units, {config.envs} x {config.n_steps} "
        f"steps per iteration, {config.iterations} iterations",
    ]
    if config.source == "discriminator":
        extra = {
            "label entropy": config.entropy,
            f"gradient penalty to norm {config.penalty_target:g}": config.penalty,
            "C-GAIL's controller": config.controller,
            "replay": config.replay,
        }
        terms = "".join(f", {name} {value:g}" for name, value in extra.items() if value)
        norm = ", spectral norm" * config.spectral_norm
        units = "-".join(map(str, config.hidden))
        lines.append(
            f"discriminator: {units} units{norm}, {config.discriminator_steps} update(s) per "
            f"iteration by {config.updater}{terms}; it pays by the {config.reward} reward"
        )
    return [*lines, f"evaluation: {config.episodes} fresh episodes, seed {config.seed}"]


def imitate(config: Config, run: RunFolder, parts: Parts, *, resume: bool) -> dict[str, Any]:
    """Learn; returns what the report says."""
    from advgame.health import deaths
    from advgame.run.checkpoint import save_weights
    from advgame.run.curves import game_figure, save_figure
    from advgame.run.loop import Trainer
    from advgame.run.plan import TrainingPlan
    from advgame.seeding import stream
    from agents.cloning import clone
    from agents.gail import PANELS, judge_returns
    from agents.gail_report import steadiness

    training, expert = parts.training, parts.expert
    about: dict[str, Any] = {
        "title": title(config),
        "pairs": parts.pairs,
        "expert_return": expert_level(expert)["mean"],
        "expert": expert_level(expert),
        "random": parts.random,
        "episodes": config.episodes,
        "settings": in_words(config, parts),
        "diverged": None,
    }
    player = training.player
    last = run.path / "checkpoints" / "last.safetensors"
    validate = judge_returns(training.env, player, config.episodes, config.seed)
    if config.source == "cloning":
        policy: ActorCriticPolicy = player.policy
        thinning = stream(config.seed, "subsampling")
        seen, acted, lengths = training.env.code.expert_steps(expert, config.every, thinning)
        about |= clone(policy, seen, acted, stream(config.seed, "cloning"), lengths=lengths)
        last.parent.mkdir(exist_ok=True)
        save_weights(policy, last)
        return about | validate(policy) | resembles(config, parts)
    plan = TrainingPlan(
        config.iterations // config.evaluate_every, "constant", save_every=config.save_every
    )
    trainer = Trainer(
        training,
        run,
        plan,
        validate,
        select="eval/return",
        role="policy",
        resumable=parts.resumable,
        panels=PANELS,
    )
    try:
        trainer.fit(resume=resume)
    except FloatingPointError as problem:  # a result, and a frequent one of learned updaters
        about["diverged"] = {"iteration": trainer.step, "reason": str(problem)}
        save_weights(player.module, last)
        about |= validate(player.module)  # the evaluations so far were of other weights
        if not (run.path / "metrics.csv").exists():
            return about
    rows = Metrics.read(run.path / "metrics.csv")
    heading = f"{config.env}, {config.updater}, {config.source}, seed {config.seed}"
    figure = game_figure(rows, heading, PANELS, x=("step", "iteration"))
    save_figure(figure, run.path / "curves.png")
    if about["diverged"] is None:
        about |= {name: rows[-1][name] for name in rows[-1] if name.startswith("eval/")}
    ends = about["random"]["mean"], about["expert"]["mean"]
    about |= steadiness(rows, about["eval/return"], *ends)
    about["flags"] = [*(one.as_dict() for one in deaths(rows)), *worse_than_random(about)]
    return about | resembles(config, parts)


class Job(jobs.Job[Config, Parts]):
    """The job that imitates by GAIL or by a control, and measures the imitator."""

    config = Config
    peeked: ClassVar[Mapping[str, str]] = {"env": "CartPole-v1", "preset": "default"}

    def defaults(self, **peeked: str) -> Config:
        """The settings of a task under a preset."""
        env, preset = ({**self.peeked, **peeked}[name] for name in ("env", "preset"))
        chosen: dict[str, Any] = {"env": env}
        if env.startswith("MountainCar"):
            # 5,000 steps as Ho & Ermon; with 2,048 TRPO sticks at −110 even with the true reward
            chosen |= {"envs": 25, "n_steps": 200, "value_epochs": 10}
        if preset in ("paper", "ho-ermon"):
            # surviving is success on CartPole; elsewhere the episode ends when the task is done
            form = "survival" if env.startswith("CartPole") else "cost"
            chosen |= {"preset": preset, "reward": form, "horizon": "task", "gae_lambda": 0.97}
        if preset == "ho-ermon":
            chosen |= {
                "hidden": (100, 100),
                "policy_hidden": (100, 100),
                "envs": 25,
                "n_steps": 200,
                "every": 10 if env.startswith("CartPole") else 5,
                "iterations": 300,
            }
        return Config(**chosen)

    @override
    def check_resumed(self, config: Config, typed: Collection[str]) -> None:
        super().check_resumed(config, typed)
        finished = config.resume and (Path(config.resume) / "report.json").exists()
        if ":" in config.env and not finished:  # Gymnasium would import the module before it
            raise InputError(
                f"this run trains on {config.env}: nothing that a folder names is run, start a "
                "new run"
            )

    @override
    def check(self, config: Config) -> Config:
        from advgame.seeding import derive_seed
        from agents.updaters import check_updater

        check_updater(config.updater)
        config = super().check(config)
        if config.envs * config.n_steps < 32:
            raise InputError("envs x n_steps must be 32 or above: too few pairs to learn from")
        if config.iterations % config.evaluate_every:
            raise InputError(
                f"--iterations {config.iterations} must be a multiple of --evaluate-every "
                f"{config.evaluate_every}: --evaluate-every "
                f"{gcd(config.iterations, config.evaluate_every)} is possible"
            )
        derive_seed(config.seed, "check")
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        source = f"--source {config.source}"
        if config.source != "discriminator":
            found[source] = GAMES_OWN if config.source == "random" else (*GAMES_OWN, *NETWORKS_OWN)
        if config.source == "cloning":
            found[source] += POLICYS_OWN
        if config.source == "true":
            found[source] += ("reward",)
        if config.algorithm == "ppo":
            found["--algorithm ppo"] = ("value_epochs", "max_kl", "settle")
        if ":" in config.updater:
            found[f"--updater {config.updater}"] = ("updater_lr",)
        if not config.penalty:
            found["a game without --penalty"] = ("penalty_target",)
        if config.expert == "dummy":
            found["--expert dummy"] = ("demonstrations",)
        return found

    def build(self, config: Config, fabric: Fabric) -> Parts:
        """Everything, with the demonstrations compared with chance."""
        from advgame.seeding import stream

        parts = make_parts(config)
        if config.resume is not None and not parts.resumable:
            parts.training.env.task.load_state_dict({})  # refuses
        if config.demonstrations is not None:
            warn_of_no_expert(parts.random, parts.expert)
        if config.source == "cloning":
            thinning = stream(config.seed, "subsampling")
            parts.training.env.code.expert_steps(parts.expert, config.every, thinning)
        return parts

    @override
    def frozen(self, made: Parts) -> Mapping[str, nn.Module]:
        """All demonstrations that there are: the report also looks at those left out."""
        return {} if made.recorded is None else {"demonstrations": made.recorded.as_module()}

    def work(self, config: Config, run: RunFolder, made: Parts, *, resume: bool) -> None:
        """Imitate the expert to the end, then write the report."""
        from agents.gail_report import as_markdown

        print(in_words(config, made)[0])
        report = imitate(config, run, made, resume=resume)
        run.write_text("report.md", as_markdown(report, run.about()["command"]))
        run.write_json("report.json", report)  # last: a run that has it is finished

    def told(self, run: RunFolder) -> str:
        """The true return, and the flags."""
        report = run.report()
        died = report["diverged"]
        end = f"; diverged at iteration {died['iteration']}" if died else ""
        reached = report["expert_return"]
        expert = "unknown" if reached is None else f"{reached:.1f}"
        flags = [f"\nflag {one['name']}: {one['meaning']}" for one in report.get("flags", [])]
        return (
            f"true return {report['eval/return']:.1f} ± {report['eval/standard_error']:.1f} "
            f"(expert {expert}){end}; more in {run.path}/report.md"
            f"{''.join(flags)}"
        )


job = Job()

if __name__ == "__main__":
    job.main()

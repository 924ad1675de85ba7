"""LAS-AT: a classifier learns from PGD attacks whose ε, steps and step size a policy chooses.

    python scripts/train_las_at.py                                   # digits, minutes on 2 cores
    python scripts/train_las_at.py --agent fixed                     # the control: plain PGD-AT
    python scripts/train_las_at.py --agent stopper                   # learned: when attacks end
    python scripts/train_las_at.py --agent thompson                  # learned: which attacks pay
    python scripts/train_las_at.py --objective trades                # LAS-TRADES, β chosen too
    python scripts/train_las_at.py --awp 0.01 --clamp                # LAS-AWP
    python scripts/train_las_at.py --dataset cifar10 --data-dir DIR  # uses a GPU if there is one
    python scripts/train_las_at.py --resume runs/NAME                # go on, to the same bits

The game is `advgame.games.las_at`, the environment `envs.strategy_selection`, the learner
`agents.reinforce`. A run leaves one folder: settings, TensorBoard events, metrics.csv,
checkpoints, report.json and report.md (AutoAttack on test images), curves.png, examples.png; of
--agent stopper strategy.png and .pdf, too: which images have how many steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import override

from advgame.choices import Credit, Preset
from advgame.classifiers.names import check_model, is_built_in
from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.games.spaces import BETAS, parse_space
from advgame.own_code import own_code
from advgame.run.defender_job import DefenderJob, ball
from advgame.run.options import Count, Finite, Names, NotNegative, Positive, Words, parse_number
from advgame.run.settings import PerturbedConfig, recipes
from agents.settings import BANDITS, POLICIES, PRESETS, STOPPING, Agent, Baseline

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from advgame.data import Splits
    from advgame.games.las_at import Reward
    from advgame.run.curves import Panels
    from advgame.run.folder import RunFolder
    from advgame.threat import Threat
    from agents.las_at import StrategyGame


@dataclass(frozen=True)
class Config(PerturbedConfig):
    """Train a classifier by LAS-AT and report its robustness.

    The defaults shown are those of the --dataset and --preset on the same command line.
    """

    preset: Preset = "default"
    """default: ours; repo: the published code's settings"""
    agent: Agent = "reinforce"
    """who picks the strategies. reinforce, ppo: policies; linucb, thompson: bandits, which keep a
    strategy for all images of --reward-interval steps; stopper: ends an attack where a further
    step is predicted to gain too little. Controls: random; steady: random, kept as the bandits
    keep theirs; fixed (PGD-10 at ε₀); fat: ends an attack at the first error; shuffled: the
    stopper's numbers of steps, dealt to other images; short: random with 1 to 2m - 1 steps, m being
    --mean-steps. stopper, fat and shuffled take ε and step sizes at random, and at most the steps
    of --space"""
    objective: Literal["pgd", "trades"] = "pgd"
    """what attack and defender play for: pgd (cross-entropy), or trades with a β per image"""
    clamp: bool = False
    """the defender learns within ε₀ whatever ε was chosen, as LAS-AWP is published"""
    fixed: tuple[float, int, float] = (8, 10, 2)
    """strategy of --agent fixed: ε in units of ε₀/8, steps, step size in units of ε₀/8"""
    mean_steps: Positive = 3.5
    """mean number of steps of --agent stopper, shuffled and short"""
    threshold: Finite | None = None
    """of --agent stopper and shuffled: the gain in nats below which a step is the last, fixed;
    None follows --mean-steps"""
    without: Names = ()
    """features that --agent stopper and shuffled do not see, e.g. margin,margin_square"""
    stopper: str | None = None
    """run folder or stopper.json of another --agent stopper, which is played as it was learned"""
    fixed_beta: float = 6.0
    """β of --agent fixed in --objective trades"""
    credit: Credit = "mixed"
    """who is paid for R2 and R3: mixed, sample or batch"""
    baseline: Baseline = "value"
    """what REINFORCE takes off the reward (PPO has its own)"""
    entropy_coef: NotNegative = PRESETS["default"].entropy_coef
    """weight of the policy's entropy bonus"""
    policy_network: str | None = None
    """the policy's trunk, a name as --model has them; None is ResNet-18 for colour images of 16
    pixels or more, a narrow small CNN for others"""
    policy_lr: Positive = PRESETS["default"].lr
    """learning rate of the policy"""
    reward_interval: Count = 1
    """pay the attacker every k-th step, and let it learn then; of --agent linucb, thompson and
    steady 10 where the data set's own is less"""
    exploration: Positive = 1.0
    """α of --agent linucb and thompson: how far they try what they are unsure of"""
    held_out: Count = 64
    """validation images whose robust loss --agent linucb and thompson are paid for lowering"""
    space: Words = "las-pgd-at-cifar10"
    """lists of ε, steps and step sizes to choose from: a name, or lists such as eps=4,6,8
    steps=3,10 step_size=1,2 (and beta=1,6 with --objective trades), ε and step sizes in units of
    ε₀/8"""
    reward: str = ""
    """instead of a·R1 + b·R2 + c·R3: package.module:function of your own code, which is called with
    an advgame.games.Outcome, and returns (B,)"""


# what a data set changes in Config
RECIPES = recipes(
    # ε 5..9 eighths of ε₀: with the published 3..15 the policy goes to ε = 0.47, from which the
    # defender learns next to nothing (results/las_at/wide/mnist.md)
    mnist={"space": "las-trades-cifar10"},
    colour={"true_probability": 0.8, "reward_interval": 20},
)
# the published settings of LAS_PGD_AT. Kept quirks: one scalar reward per batch and no baseline,
# starts from the ball of ε₀, a look-ahead attacked in training mode. Not kept: drawing a second
# strategy for the defender's own step, forwards that pollute batch-norm statistics, and the drops
# of the policy's rate, which only Tiny ImageNet's steps reach.
REPO: dict[str, Any] = {
    "preset": "repo",
    "credit": "batch",
    "baseline": PRESETS["repo"].baseline,
    "entropy_coef": PRESETS["repo"].entropy_coef,
    "policy_lr": PRESETS["repo"].lr,
    "reward_interval": 20,
    "true_probability": 0.7,
}
_REPO_COLOUR: dict[str, Any] = {
    "model": "wrn-34-10",
    "epochs": 110,
    "schedule": "multistep",
    "milestones": (99 / 110, 104 / 110),
    "ema": None,
}
REPO_RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": _REPO_COLOUR,
    "tinyimagenet": {
        **_REPO_COLOUR,
        "model": "preact_resnet18-las",
        "space": "las-pgd-at-tiny",
        "reward_interval": 1,
        "true_probability": 0.8,
        "grad_clip": 10.0,
    },
    "cifar100": {**_REPO_COLOUR, "space": "las-pgd-at-cifar100", "true_probability": 0.6},
}


def radii(eps: str, units: tuple[float, ...]) -> str:
    """The smallest and the largest ε to choose from, in pixels or in the fraction that was typed.

    Args:
        eps: ε₀ as it was typed.
        units: choices, in eighths of it.
    """
    above, sign, below = eps.partition("/")
    low, high = (
        f"{parse_number(above) * unit / 8:.3g}{sign}{below}" for unit in (units[0], units[-1])
    )
    return f"from {low} to {high}"


LEARNED_STOPS = ("stopper", "shuffled")
"""Agents whose attacks end where a regression says so."""
MEAN_STEPS = (*LEARNED_STOPS, "short")
"""Agents whose mean number of steps is asked for."""
KEEPING = (*BANDITS, "steady")
"""Agents that keep a strategy for several steps."""
KEPT = 10
"""How many those are at least where nothing is said: what a payment costs is spread over them."""


def check_stopping(config: Config, most: int) -> None:
    """Refuse stopping rules in games that they cannot be played in, and impossible means.

    Args:
        config: all settings.
        most: the longest attack of the space.

    Raises:
        InputError: what is wrong, in one line.
    """
    if config.agent in STOPPING and config.objective == "trades":
        raise InputError(
            f"--agent {config.agent} needs labels, which the attack of --objective trades has not"
        )
    if config.agent in (*STOPPING, *KEEPING) and config.preset == "repo":
        raise InputError(f"--preset repo has no --agent {config.agent}: it is none of LAS-AT's")
    mean = config.mean_steps
    if config.agent in LEARNED_STOPS:  # refuses features and files that there are not
        from agents.las_at import stopping_rule

        stopping_rule(config.agent, 1.0, 2.0, without=config.without, learned=config.stopper)
    if config.agent == "short" and (mean < 1 or 2 * mean != round(2 * mean)):
        raise InputError(f"--mean-steps of --agent short are halves from 1 on, not {mean:g}")
    adapts = config.agent in LEARNED_STOPS and config.threshold is None
    if adapts and not 1 < mean < most:
        raise InputError(
            f"--mean-steps {mean:g}: it must lie between 1 and {most}, the most steps of --space"
        )


class Job(DefenderJob[Config, "StrategyGame"]):
    """The job that trains a classifier by LAS-AT and judges it."""

    config = Config
    helped = True
    peeked = {**DefenderJob.peeked, "preset": "default", "agent": "reinforce"}  # noqa: RUF012
    recipes = RECIPES
    repo = REPO
    repo_recipes = REPO_RECIPES

    @override
    def on_a_cpu(self) -> Mapping[str, Any]:
        """ResNet-18 would ask for eleven times what `lean_resnet` does, at each paid step."""
        return {**super().on_a_cpu(), "policy_network": "lean_resnet-half"}

    @override
    def defaults(self, **peeked: Any) -> Config:
        config = super().defaults(**peeked)
        least = KEPT if config.agent in KEEPING else 1
        return replace(config, reward_interval=max(least, config.reward_interval))

    @override
    def title(self, config: Config) -> str:
        return f"LAS-AT, {config.agent},"

    @override
    def panels(self) -> Panels:
        from agents.las_at import PANELS

        return PANELS

    @override
    def check(self, config: Config) -> Config:
        lists = parse_space(config.space)
        if lists.beta and config.objective != "trades":
            raise InputError("--space has a list of beta, which --objective trades alone has")
        if config.reward:
            own_code(config.reward).find()
        if config.policy_network is not None:
            check_model(config.policy_network)
            if not is_built_in(config.policy_network):
                raise InputError(
                    f"--policy-network takes a network of the package, not {config.policy_network}"
                )
        config = super().check(config)
        if config.agent == "reinforce" and (config.credit, config.baseline) == ("batch", "loo"):
            raise InputError(
                "--credit batch gives every image the same reward, which --baseline loo cancels "
                "exactly: choose another baseline"
            )
        if config.awp is not None and config.awp >= 1:
            raise InputError(f"awp must lie between 0 and 1, not {config.awp}")
        check_stopping(config, max(lists.steps))
        if config.preset == "repo" and (config.objective == "trades" or config.awp is not None):
            raise InputError(
                "--preset repo is LAS-PGD-AT's: leave it away with --objective trades or --awp"
            )
        if config.agent in ("ppo", *BANDITS) and config.processes > 1:
            raise InputError(
                f"--agent {config.agent} runs on one device: use --agent reinforce or --devices 1"
            )
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        policy = ("policy_lr", "policy_network")
        learners = ("credit", "baseline", "entropy_coef", *policy, "reward")
        unused = {"reinforce": (), "ppo": ("baseline",)}.get(config.agent, learners)
        used: dict[str, tuple[str, ...]] = {  # options -> by whom
            "fixed": ("fixed",),
            "fixed_beta": ("fixed",),
            "mean_steps": MEAN_STEPS,
            "threshold": LEARNED_STOPS,
            "without": LEARNED_STOPS,
            "stopper": LEARNED_STOPS,
            "reward_interval": (*POLICIES, *KEEPING),
            "exploration": BANDITS,
            "held_out": BANDITS,
        }
        others = [name for name, agents in used.items() if config.agent not in agents]
        found = {f"--agent {config.agent}": (*others, *unused)}
        if config.reward:
            found["--reward"] = ("credit",)
        if config.threshold is not None:
            found["--threshold"] = ("mean_steps",)
        if config.stopper is not None:
            found["--stopper"] = ("without",)
        if config.objective != "trades":
            found[f"--objective {config.objective}"] = ("fixed_beta",)
        return found

    def game(self, config: Config, data: Splits, fabric: Fabric) -> StrategyGame:
        """The environment, which owns defender and rules, and the player."""
        from advgame.data import Batches
        from advgame.games.las_at import LasAt, LasTrades
        from advgame.games.progress import LearningProgress
        from advgame.games.strategy import strategy_space
        from agents.las_at import StrategyGame, make_player, stopping_rule
        from envs.strategy_selection import StrategySelectionVectorEnv

        # refuses a batch larger than the data by the option's name, not by the environment's
        Batches(data.train, config.batch_size, config.seed, world=fabric.world_size)
        repo, trades = config.preset == "repo", config.objective == "trades"
        augmented, threat = self.augmentation(config, data.train), ball(config)
        rule = stopping_rule(
            config.agent,
            float(threat.eps),
            config.mean_steps,
            threshold=config.threshold,
            without=config.without,
            learned=config.stopper,
        )
        space = strategy_space(
            config.space,
            float(threat.eps),
            BETAS if trades else (),
            threat.whole(math.prod(data.train.shape)) / 2,
        )
        if config.agent == "short":
            space = replace(space, steps=tuple(range(1, round(2 * config.mean_steps))))
        bandit = config.agent in BANDITS
        progress = None
        if bandit:
            progress = LearningProgress(data.validation.first(config.held_out), threat)
        rules = (LasTrades if trades else LasAt)(
            threat,
            start="eps0" if repo else "own",
            look_ahead_mode="train" if repo else "eval",
            clamp=config.clamp,
            reward=cast("Reward", own_code(config.reward)) if config.reward else None,
            rule=rule,
            deal=config.agent == "shuffled",
            progress=progress,
        )
        env = StrategySelectionVectorEnv(
            config.batch_size,
            data=data.train,
            defender=self.defender(config, data, fabric),
            rules=rules,
            space=space,
            credit=config.credit,
            reward_interval=config.reward_interval
            if config.agent in POLICIES or bandit
            else 0,  # controls save the look-ahead
            crop=augmented["crop"],
            flip=augmented["flip"],
            ramp_steps=round(config.eps_ramp * self.steps(config, data, fabric)),
        )
        with_momentum = repo and config.dataset == "cifar100"
        settings = replace(
            PRESETS["repo-momentum" if with_momentum else config.preset],
            lr=config.policy_lr,
            baseline=config.baseline,
            entropy_coef=config.entropy_coef,
        )
        player = make_player(
            config.agent,
            env.space,
            data.train.shape,
            config.batch_size,
            settings,
            seed=config.seed,
            fabric=fabric,
            uniform=not repo,
            fixed=(*config.fixed, config.fixed_beta) if trades else config.fixed,
            rule=env.rules.rule,  # the environment's copy, which is the one that learns
            network=config.policy_network,
            interval=config.reward_interval,
            progress=env.rules.progress,
            exploration=config.exploration,
        )
        return StrategyGame(env, player, config.seed)

    @override
    def work(
        self, config: Config, run: RunFolder, made: tuple[StrategyGame, Splits], *, resume: bool
    ) -> None:
        """As of every training; says first how far the chosen attacks go."""
        game = made[0]
        if game.learner.fabric.global_rank == 0 and config.agent != "fixed":
            units = game.env.space.eps_units
            print(f"{run.path}: ε {radii(config.eps, units)} (ε₀ is {config.eps})", file=sys.stderr)
        super().work(config, run, made, resume=resume)

    @override
    def report(
        self, config: Config, run: RunFolder, game: StrategyGame, data: Splits, threat: Threat
    ) -> None:
        """The classifier's report; beside it what a stopper has learned, and whom it attacks."""
        if config.agent in LEARNED_STOPS:
            from advgame.games.stopping import LearnedStop
            from agents.stopper_file import NAME, write_stopper

            write_stopper(run.path / NAME, cast("LearnedStop", game.env.rules.rule))
        if config.agent == "stopper":  # before the best weights are loaded: the rule fits the last
            from agents.stopper_picture import write_picture

            title = f"The stopper on {short_name(config.dataset)}, seed {config.seed}"
            write_picture(run, game, data.train, config.seed, title)
        super().report(config, run, game, data, threat)


job = Job()

if __name__ == "__main__":
    job.main()

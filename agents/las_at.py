"""LAS-AT for the training loop: one step of defender and strategy player, players by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from lightning_fabric import Fabric
from torch import Tensor
from typing_extensions import override

from advgame.attacks.stopping import StoppingRule
from advgame.errors import InputError, unknown
from advgame.games.las_at import StepResult
from advgame.games.progress import LearningProgress
from advgame.games.stopping import LearnedStop, StopAtError
from advgame.games.strategy import CHOICES, StrategySpace
from advgame.games.training import PANELS as TRAINING_PANELS
from advgame.games.training import defender_health
from advgame.health import gradient_sign, tagged
from advgame.run.curves import Curves, Panels
from advgame.seeding import derive_seed, seeded_init, stream
from agents.bandits import BANDITS
from agents.policies import StrategyPolicy, ValueNet
from agents.reinforce import Reinforce, averaging
from agents.sb3 import PPOPlayer
from agents.settings import STOPPING, Agent, ReinforceConfig
from agents.stopper_file import read_stopper
from envs.strategy_selection import StrategySelectionVectorEnv

PANELS: Panels = {
    "Pay-offs": (
        "per image",
        {
            "game/attacker_reward": "attacker reward",
            "game/r1_loss": "R1: loss on adversarial examples",
            "game/r2_robust": "R2: robust after look-ahead",
            "game/r3_clean": "R3: clean after look-ahead",
        },
    ),
    "Strategy means": (
        "relative to the control PGD-10 at ε₀",
        {
            "strategy/eps_ratio": "ε / ε₀",
            "strategy/steps_ratio": "steps / 10",
            "strategy/step_size_ratio": "step size / (ε₀/4)",
        },
    ),
    "Stopping": (
        "share, and nats per step",
        {
            "strategy/stopped": "share stopped before the last step",
            "strategy/threshold": "threshold of the gain",
            "strategy/gain": "gain of a step",
            "strategy/prediction_error": "error of its prediction (root mean square)",
        },
    ),
    "Bandit": (
        "reward, thousandths of a nat per forward",
        {
            "strategy/expected": "expected of the strategy played",
            "strategy/uncertainty": "standard deviation of that",
            "strategy/noise": "error of expectations (root mean square)",
        },
    ),
    "Held-out images": ("nats", {"game/held_out_loss": "robust cross-entropy"}),
    "Strategy entropy": (
        "nats",
        {
            "strategy/entropy_eps": "ε",
            "strategy/entropy_steps": "steps",
            "strategy/entropy_step_size": "step size",
        },
    ),
    "Validation accuracy": TRAINING_PANELS["Validation accuracy"],
}


class StrategyGame:
    """`advgame.run.loop.Game` over the strategy environment.

    Args:
        env: the environment; reset here.
        player: who chooses the strategies.
        seed: of the reset.
    """

    def __init__(self, env: StrategySelectionVectorEnv, player: StrategyPlayer, seed: int) -> None:
        self.env, self.player = env, player
        self.defender = self.learner = env.defender
        self.steps_per_epoch = env.steps_per_epoch
        self.images, _ = env.reset(seed=seed)
        self._chosen: list[Tensor] = []  # this epoch's strategies, a column per choice

    def step(self) -> dict[str, Tensor]:
        """One decision per image, one step of the defender, one lesson for the player."""
        due = self.env.reward_due
        actions = self.player.act(self.images, learn=due)
        self.images, reward, _, _, _ = self.env.step(actions)
        lesson = self.player.learn(reward) if due else {}
        assert self.env.result is not None
        self._chosen.append(self._columns(actions, self.env.result))
        return {**self.env.result.stats, **lesson}

    def _columns(self, actions: Tensor, result: StepResult) -> Tensor:
        """What was chosen, before any ramp of ε, (B, choices); steps as they were made."""
        chosen = self.env.space.decode(actions)
        if self.env.rules.rule is not None and result.strategies is not None:
            chosen = replace(chosen, steps=result.strategies.steps)
        names = CHOICES[: len(self.env.space.sizes)]
        return torch.stack([getattr(chosen, name).float() for name in names], 1)

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """How far the strategies are from PGD-10 at ε₀ (and β = 6); histograms of the choices."""
        if not self._chosen:
            return {}
        space, row = self.env.space, {}
        chosen = torch.cat(self._chosen)
        control = {"eps": space.eps0, "steps": 10, "step_size": space.eps0 / 4, "beta": 6}
        for column, name in enumerate(CHOICES[: len(space.sizes)]):
            values = chosen[:, column]
            row[f"strategy/{name}_ratio"] = float(values.mean()) / control[name]
            if curves is not None:
                options = space.options(column)
                if name == "steps" and self.env.rules.rule is not None:
                    options = torch.arange(int(options.max()) + 1)
                curves.histogram(f"strategy/{name}_chosen", values, step, options)
        self._chosen = []
        row |= defender_health(self.defender, self.images)[1]
        if optimizer := getattr(self.player, "optimizer", None):  # controls have none
            row |= tagged("strategy", gradient_sign(optimizer))
        return row

    def state_dict(self) -> dict[str, Any]:
        """States of environment and strategy player, and the strategies already chosen."""
        states = {"env": self.env.state_dict(), "player": self.player.state_dict()}
        return {**states, "chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.env.load_state_dict(state["env"])
        self.player.load_state_dict(state["player"])
        self.images = self.env.images
        self._chosen = [one.to(self.images.device) for one in state["chosen"]]


class StrategyPlayer(Protocol):
    """Whoever chooses the strategies: a learner, or a control as it is here, which never learns."""

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Choose for each image (B, C, H, W); returns indices (B, choices) on its device.

        Args:
            images: the clean images.
            learn: whether `learn` will be called with the rewards of these choices.
        """

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Take the rewards (B,) of the last choices; returns scalars to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the player's next choice depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        return


class FixedStrategy(StrategyPlayer):
    """The same strategy for every image; PGD-10 at ε₀ makes the game plain PGD-AT.

    Args:
        action: index of each choice.
    """

    def __init__(self, action: tuple[int, ...]) -> None:
        self.action = action

    @override
    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        return torch.tensor(self.action, device=images.device).expand(len(images), -1)


class RandomStrategy(StrategyPlayer):
    """Uniform over all strategies: the control for every claim that a policy has learned.

    Args:
        sizes: number of options of each choice.
        rng: stream of the draws, on the images' device.
    """

    def __init__(self, sizes: tuple[int, ...], rng: torch.Generator) -> None:
        self.sizes, self.rng = sizes, rng

    @override
    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        columns = [
            torch.randint(size, (len(images),), generator=self.rng, device=images.device)
            for size in self.sizes
        ]
        return torch.stack(columns, 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])


class SteadyStrategy(RandomStrategy):
    """One strategy for all images of several steps, drawn uniformly: the control of the bandits.

    Args:
        sizes: number of options of each choice.
        rng: stream of the draws, on the images' device.
        interval: steps that a strategy is kept for.
    """

    def __init__(self, sizes: tuple[int, ...], rng: torch.Generator, interval: int) -> None:
        super().__init__(sizes, rng)
        self.interval, self._left = interval, 0
        self._chosen = torch.zeros(1, len(sizes), dtype=torch.int64)

    @override
    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        if not self._left:
            self._chosen, self._left = super().act(images[:1], learn=learn), self.interval
        self._left -= 1
        return self._chosen.expand(len(images), -1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": self._chosen, "left": self._left}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._chosen, self._left = state["chosen"].to(self.rng.device), state["left"]


class StoppingStrategy(RandomStrategy):
    """ε and step size are uniform, the steps as many as the space has: a rule ends them.

    Args:
        sizes: number of options of each choice.
        rng: stream of the draws, on the images' device.
        rule: of the game, ``env.rules.rule``, whose state is this player's.
    """

    def __init__(self, sizes: tuple[int, ...], rng: torch.Generator, rule: StoppingRule) -> None:
        super().__init__(sizes, rng)
        self.rule = rule

    @override
    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        actions = super().act(images, learn=learn)
        column = CHOICES.index("steps")
        actions[:, column] = self.sizes[column] - 1
        return actions

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rule": self.rule.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rule.load_state_dict(state["rule"])


def stopping_rule(
    agent: Agent,
    eps0: float,
    mean_steps: float,
    *,
    threshold: float | None = None,
    without: Sequence[str] = (),
    learned: str | None = None,
) -> StoppingRule | None:
    """What ends the attacks of an agent; None where its strategies do.

    Args:
        agent: which one.
        eps0: ε₀.
        mean_steps: of the learned rule.
        threshold: of the learned rule, see `LearnedStop`.
        without: the same.
        learned: file or run folder of another stopper, which is played as it is.

    Raises:
        InputError: no such file or feature.
    """
    if agent == "fat":
        return StopAtError()
    if agent not in STOPPING:
        return None
    regression = None if learned is None else read_stopper(Path(learned))
    return LearnedStop(
        eps0,
        mean_steps,
        regression,
        threshold=threshold,
        without=without,
        frozen=learned is not None,
    )


def _check_agent(
    agent: Agent, rule: StoppingRule | None, progress: LearningProgress | None
) -> None:
    """Refuse an agent that would be another one without what it needs: see `make_player`."""
    if agent not in get_args(Agent):
        raise unknown("agent", agent, get_args(Agent))
    if agent in STOPPING and rule is None:
        raise InputError(f"{agent} needs the rule of its game: rule=env.rules.rule")
    if agent not in STOPPING and rule is not None:
        raise InputError(f"{agent} ends no attack by a rule: leave rule out")
    if agent in BANDITS and progress is None:
        raise InputError(f"{agent} needs what its game pays: progress=env.rules.progress")


def make_player(
    agent: Agent,
    space: StrategySpace,
    shape: tuple[int, int, int],
    batch_size: int,
    settings: ReinforceConfig,
    *,
    seed: int,
    fabric: Fabric,
    uniform: bool = True,
    fixed: tuple[float, ...] = (8, 10, 2),
    rule: StoppingRule | None = None,
    network: str | None = None,
    interval: int = 1,
    progress: LearningProgress | None = None,
    exploration: float = 1.0,
) -> StrategyPlayer:
    """A learner or a control for a strategy space.

    Args:
        agent: which one.
        space: what it chooses from.
        shape: (C, H, W) of the images.
        batch_size: images per step and process.
        settings: of REINFORCE; PPO takes its learning rate and entropy bonus.
        seed: of the run.
        fabric: device and processes.
        uniform: start REINFORCE from the uniform policy.
        fixed: the strategy of ``"fixed"``: ε in units of ε₀/8, steps, step size in the same units,
            and β where the space has it.
        rule: of the game, ``env.rules.rule``, where the agent's attacks are ended by one.
        network: of the learners' policies, see `StrategyPolicy`.
        interval: steps for which ``"steady"`` keeps a strategy.
        progress: what the game pays the bandits; its level over log K is their context.
        exploration: of the bandits.

    Raises:
        InputError: an unknown agent, one without the rule or the progress that it plays by, a rule
            for another, or PPO or a bandit on several processes.
    """
    _check_agent(agent, rule, progress)
    rng = stream(seed, f"policy{fabric.global_rank}", fabric.device)
    if rule is not None:
        return StoppingStrategy(space.sizes, rng, rule)
    if agent in ("random", "short"):
        return RandomStrategy(space.sizes, rng)
    if agent == "steady":
        return SteadyStrategy(space.sizes, rng, interval)
    if agent in BANDITS and progress is not None:
        if fabric.world_size > 1:
            raise InputError("bandits play on one device: use --devices 1")
        unlearned = math.log(progress.held_out.classes)
        return BANDITS[agent](
            space, rng, lambda: progress.level / unlearned, exploration=exploration
        )
    if agent == "fixed":
        return FixedStrategy(space.index(*fixed))
    if agent == "ppo":
        if fabric.world_size > 1:
            raise InputError("PPO plays on one device: use REINFORCE, or --devices 1")
        return PPOPlayer(
            shape,
            space.sizes,
            batch_size,
            derive_seed(seed, "ppo"),
            fabric.device,
            lr=settings.lr,
            entropy_coef=settings.entropy_coef,
            network=network,
        )
    with seeded_init(seed, "policy"):
        policy = StrategyPolicy(shape, space.sizes, network=network, uniform=uniform)
        policy = policy.to(fabric.device)
        value = ValueNet(shape).to(fabric.device) if settings.baseline == "value" else None
    return Reinforce(policy, settings, rng, value, averaging(fabric))

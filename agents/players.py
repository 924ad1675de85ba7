"""Strategy players by name."""

from __future__ import annotations

from typing import Literal

from lightning_fabric import Fabric

from advgame.errors import InputError
from advgame.games.strategy import StrategyPlayer, StrategySpace
from advgame.seeding import derive_seed, seeded_init, stream
from agents.controls import FixedStrategy, RandomStrategy
from agents.policies import StrategyPolicy, ValueNet
from agents.reinforce import Reinforce, ReinforceConfig, averaging
from agents.sb3 import PPOPlayer

Agent = Literal["reinforce", "ppo", "random", "fixed"]
LEARNERS = ("reinforce", "ppo")


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

    Raises:
        InputError: PPO on several processes.
    """
    rng = stream(seed, f"policy{fabric.global_rank}", fabric.device)
    if agent == "random":
        return RandomStrategy(space.sizes, rng)
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
        )
    with seeded_init(seed, "policy"):
        policy = StrategyPolicy(shape, space.sizes, uniform=uniform).to(fabric.device)
        value = ValueNet(shape).to(fabric.device) if settings.baseline == "value" else None
    return Reinforce(policy, settings, rng, value, averaging(fabric))

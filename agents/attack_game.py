"""`AttackGame`: learning to attack frozen classifiers, for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from advgame.health import gradient_sign, tagged
from advgame.run.curves import Curves
from advgame.seeding import derive_seed
from agents.reinforce import EpisodicReinforce
from agents.sb3 import PPOAttacker
from envs.queries import QueryVectorEnv


class AttackGame:
    """`advgame.run.loop.Game` over attack environments.

    Every update begins with a reset, so that no episode is under way between two of them.

    Args:
        player: plays on the environments.
        envs: one per classifier; reset here.
        seed: of the resets.
        steps_per_epoch: updates per epoch.
    """

    def __init__(
        self,
        player: EpisodicReinforce | PPOAttacker,
        envs: Sequence[QueryVectorEnv],
        seed: int,
        steps_per_epoch: int,
    ) -> None:
        self.learner, self.envs, self.steps_per_epoch = player, tuple(envs), steps_per_epoch
        for number, env in enumerate(self.envs):
            env.reset(seed=derive_seed(seed, f"env{number}"))

    def step(self) -> dict[str, Tensor]:
        """One update of the attacker from what its environments gave; its statistics."""
        return self.learner.update()

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """The policy's gradient; its entropy is among the updates' means."""
        return tagged("strategy", gradient_sign(self.learner.optimizer))

    def state_dict(self) -> dict[str, Any]:
        """The attacker's state and the place of every environment."""
        places = [env.state_dict() for env in self.envs]
        return {"player": self.learner.state_dict(), "envs": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.learner.load_state_dict(state["player"])
        for env, place in zip(self.envs, state["envs"], strict=True):
            env.load_state_dict(place)

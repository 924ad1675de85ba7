"""Environments and their players, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from advgame.games.strategy import CHOICES, StrategyPlayer
from advgame.games.training import defender_health
from advgame.health import Learns, gradient_sign, tagged
from advgame.run.curves import Curves
from advgame.run.loop import Learner
from advgame.seeding import derive_seed
from envs.queries import QueryVectorEnv
from envs.strategy_selection import StrategySelectionVectorEnv


class StrategyGame:
    """LAS-AT: `advgame.run.loop.Game` over the strategy environment.

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
        self._chosen: list[Tensor] = []  # this epoch's actions

    def step(self) -> dict[str, Tensor]:
        """One decision per image, one step of the defender, one lesson for the player."""
        due = self.env.reward_due
        actions = self.player.act(self.images, learn=due)
        self.images, reward, _, _, _ = self.env.step(actions)
        lesson = self.player.learn(reward) if due else {}
        self._chosen.append(actions)
        assert self.env.result is not None
        return {**self.env.result.stats, **lesson}

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """How far the strategies are from PGD-10 at ε₀ (and β = 6); histograms of the choices."""
        if not self._chosen:
            return {}
        space, row = self.env.space, {}
        strategies = space.decode(torch.cat(self._chosen))
        control = {"eps": space.eps0, "steps": 10, "step_size": space.eps0 / 4, "beta": 6}
        for column, name in enumerate(CHOICES[: len(space.sizes)]):
            values = getattr(strategies, name).float()
            row[f"strategy/{name}_ratio"] = float(values.mean()) / control[name]
            if curves is not None:
                curves.histogram(f"strategy/{name}_chosen", values, step, space.options(column))
        self._chosen = []
        row |= defender_health(self.defender, self.images)[1]
        if isinstance(self.player, Learns):
            row |= tagged("strategy", gradient_sign(self.player.optimizer))
        return row

    def state_dict(self) -> dict[str, Any]:
        """Environment and player."""
        states = {"env": self.env.state_dict(), "player": self.player.state_dict()}
        return {**states, "chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.env.load_state_dict(state["env"])
        self.player.load_state_dict(state["player"])
        self.images = self.env.images
        self._chosen = [one.to(self.images.device) for one in state["chosen"]]


class AttackPlayer(Learner, Protocol):
    """Whoever learns to attack, on environments that it knows."""

    def update(self) -> dict[str, Tensor]:
        """Play and learn once; returns scalars to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights of its module."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class AttackGame:
    """Learning to attack frozen classifiers: `advgame.run.loop.Game` over attack environments.

    Every update begins with a reset, so that no episode is under way between two of them.

    Args:
        player: plays on the environments.
        envs: one per classifier; reset here.
        seed: of the resets.
        steps_per_epoch: updates per epoch.
    """

    def __init__(
        self,
        player: AttackPlayer,
        envs: Sequence[QueryVectorEnv],
        seed: int,
        steps_per_epoch: int,
    ) -> None:
        self.learner, self.envs, self.steps_per_epoch = player, tuple(envs), steps_per_epoch
        for number, env in enumerate(self.envs):
            env.reset(seed=derive_seed(seed, f"env{number}"))

    def step(self) -> dict[str, Tensor]:
        """One update."""
        return self.learner.update()

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """The policy's gradient; its entropy is among the updates' means."""
        return tagged("strategy", gradient_sign(self.learner.optimizer))

    def state_dict(self) -> dict[str, Any]:
        """Player and environments."""
        places = [env.state_dict() for env in self.envs]
        return {"player": self.learner.state_dict(), "envs": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.learner.load_state_dict(state["player"])
        for env, place in zip(self.envs, state["envs"], strict=True):
            env.load_state_dict(place)

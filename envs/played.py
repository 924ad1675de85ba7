"""An environment and its player, as the training loop sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advgame.curves import Curves
from advgame.games.strategy import CHOICES, StrategyPlayer
from envs.strategy_selection import StrategySelectionVectorEnv


class StrategyGame:
    """LAS-AT: `advgame.training.Game` over the strategy environment.

    Args:
        env: the environment; reset here.
        player: who chooses the strategies.
        seed: of the reset.
    """

    def __init__(self, env: StrategySelectionVectorEnv, player: StrategyPlayer, seed: int) -> None:
        self.env, self.player, self.defender = env, player, env.defender
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
        """How far the strategies have moved from PGD-10 at ε₀; histograms of the choices."""
        if not self._chosen:
            return {}
        space, row = self.env.space, {}
        strategies = space.decode(torch.cat(self._chosen))
        control = {"eps": space.eps0, "steps": 10, "step_size": space.eps0 / 4}
        for name in CHOICES:
            values = getattr(strategies, name).float()
            row[f"strategy/{name}_ratio"] = float(values.mean()) / control[name]
            if curves is not None:
                curves.histogram(f"strategy/{name}_chosen", values, step)
        self._chosen = []
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

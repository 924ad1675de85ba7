"""Attacker-defender environments; importing this package registers their ids.

``gymnasium.make("envs:advgame/StrategySelection-v0")`` imports and makes in one call. Torch, the
environments and Stable-Baselines3 are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from advgame.lazy import lazily

if TYPE_CHECKING:
    from envs.adapters import to_numpy
    from envs.sb3 import make_sb3

__all__ = ["make_sb3", "to_numpy"]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

# A threshold is the mean return of the best fixed attack that was tried, without arguments: steps
# of ε along the CE gradient with momentum 0.25; random squares of 35 % of the image's side. The
# budget of queries ends those episodes, and is no time limit. The others are paid by a learner.
# Imitation keeps the time limit itself: a registered one would also cut any other `env_id` off.
for _name, _module, _form, _more in (
    ("StrategySelection", "strategy_selection", "StrategySelection", {}),
    ("AdaptiveAttack", "adaptive_attack", "AdaptiveAttack", {}),
    ("Attack", "attack", "Attack", {"reward_threshold": 0.49}),
    ("BlackBoxAttack", "patches", "BlackBoxAttack", {"reward_threshold": -0.07}),
    ("GAILCartPole", "imitation", "Imitation", {"kwargs": {"env_id": "CartPole-v1"}}),
    ("GAILMountainCar", "imitation", "Imitation", {"kwargs": {"env_id": "MountainCar-v0"}}),
):
    gymnasium.register(
        id=f"advgame/{_name}-v0",
        entry_point=f"envs.{_module}:{_form}Env",
        vector_entry_point=f"envs.{_module}:{_form}VectorEnv",
        **_more,
    )

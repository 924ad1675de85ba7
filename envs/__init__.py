"""Attacker-defender environments; importing this package registers their ids.

``gymnasium.make("envs:advgame/StrategySelection-v0")`` imports and makes in one call.
"""

from gymnasium.envs.registration import register

register(
    id="advgame/StrategySelection-v0",
    entry_point="envs.strategy_selection:StrategySelectionEnv",
    vector_entry_point="envs.strategy_selection:StrategySelectionVectorEnv",
)

"""Attacker-defender environments; importing this package registers their ids.

``gymnasium.make("envs:advgame/StrategySelection-v0")`` imports and makes in one call.
"""

from gymnasium.envs.registration import register

register(
    id="advgame/StrategySelection-v0",
    entry_point="envs.strategy_selection:StrategySelectionEnv",
    vector_entry_point="envs.strategy_selection:StrategySelectionVectorEnv",
)
register(
    id="advgame/Attack-v0",
    entry_point="envs.attack:AttackEnv",
    vector_entry_point="envs.attack:AttackVectorEnv",
)
register(
    id="advgame/BlackBoxAttack-v0",
    entry_point="envs.patches:BlackBoxAttackEnv",
    vector_entry_point="envs.patches:BlackBoxAttackVectorEnv",
)
for _name, _settings in {
    "GAILCartPole": {"env_id": "CartPole-v1"},
    "GAILMountainCar": {"env_id": "MountainCar-v0"},
}.items():
    register(
        id=f"advgame/{_name}-v0",
        entry_point="envs.imitation:ImitationEnv",
        vector_entry_point="envs.imitation:ImitationVectorEnv",
        kwargs=_settings,
    )

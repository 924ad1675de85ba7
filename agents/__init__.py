"""Whoever learns: strategy policies, attacker networks, learned updaters, and what trains them.

What most people need is here by name and is imported when it is first used: ``import agents``
alone loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from agents.adt import ADTNetwork, ExplicitPlayer, ImplicitPlayer
    from agents.attack_game import AttackGame
    from agents.attacker_network import AttackerNetwork, AttackerPlayer, NetworkAttack
    from agents.attackers import load_attacker
    from agents.attnet import AttNet
    from agents.bandits import LinUCB, Thompson
    from agents.best_response import Effort
    from agents.exploitability import best_defences, duality_gap
    from agents.gail import GailTraining
    from agents.imitation_policy import ImitationPolicy, load_policy
    from agents.imitator import Imitator
    from agents.l2l import L2LNetwork
    from agents.las_at import (
        FixedStrategy,
        RandomStrategy,
        SteadyStrategy,
        StoppingStrategy,
        StrategyGame,
        make_player,
    )
    from agents.policies import FeaturePolicy, StrategyPolicy
    from agents.reinforce import EpisodicReinforce, Reinforce
    from agents.sb3 import PPOAttacker, PPOPlayer
    from agents.sb3_attack import SB3Attack
    from agents.settings import EpisodeConfig, PolicySettings, ReinforceConfig
    from agents.unroll import train_updater
    from agents.updaters import UPDATERS, make_updater

__all__ = [
    "UPDATERS",
    "ADTNetwork",
    "AttNet",
    "AttackGame",
    "AttackerNetwork",
    "AttackerPlayer",
    "Effort",
    "EpisodeConfig",
    "EpisodicReinforce",
    "ExplicitPlayer",
    "FeaturePolicy",
    "FixedStrategy",
    "GailTraining",
    "ImitationPolicy",
    "Imitator",
    "ImplicitPlayer",
    "L2LNetwork",
    "LinUCB",
    "NetworkAttack",
    "PPOAttacker",
    "PPOPlayer",
    "PolicySettings",
    "RandomStrategy",
    "Reinforce",
    "ReinforceConfig",
    "SB3Attack",
    "SteadyStrategy",
    "StoppingStrategy",
    "StrategyGame",
    "StrategyPolicy",
    "Thompson",
    "best_defences",
    "duality_gap",
    "load_attacker",
    "load_policy",
    "make_player",
    "make_updater",
    "train_updater",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

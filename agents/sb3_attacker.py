"""Stable-Baselines3's PPO as a learner of attacks: SB3 drives the environments' adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_fabric import Fabric
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env.base_vec_env import VecEnv
from torch import Tensor, nn

from advgame.health import entropy_sign
from agents.policies import FeaturePolicy
from agents.sb3 import SB3Chance, divergence_named


class PPOAttacker:
    """SB3's PPO; an update is one of its rollouts, from fresh episodes, and its training.

    Args:
        env: the adapter over the attack environments.
        sizes: number of options of each choice.
        seed: of SB3's own streams, kept apart from the rest of the run.
        fabric: where this runs; the training loop asks for it.
        steps: of every environment per update.
        lr: learning rate.
        discount: γ.
        entropy_coef: weight of the entropy bonus.
        hidden: units of each hidden layer.
    """

    def __init__(
        self,
        env: VecEnv,
        sizes: tuple[int, ...],
        seed: int,
        fabric: Fabric,
        *,
        steps: int,
        lr: float = 1e-3,
        discount: float = 1.0,
        entropy_coef: float = 0.003,
        hidden: int = 64,
    ) -> None:
        self.fabric, self.sizes = fabric, sizes
        self._chance = SB3Chance(seed, fabric.device)
        batch = steps * env.num_envs
        with self._chance:
            self.ppo = PPO(
                "MlpPolicy",
                env,
                learning_rate=lr,
                n_steps=steps,
                batch_size=max(batch // 4, 2),
                n_epochs=4,
                gamma=discount,
                gae_lambda=0.95,
                ent_coef=entropy_coef,
                policy_kwargs={"net_arch": [hidden, hidden], "activation_fn": nn.Tanh},
                device=fabric.device,
            )
        # the training loop's schedule sets the rate: SB3 leaves it as it finds it
        self.ppo.lr_schedule = lambda _: float(self.optimizer.param_groups[0]["lr"])
        self.ppo.set_logger(Logger(None, []))
        self._per_update = batch

    @property
    def module(self) -> ActorCriticPolicy:
        """SB3's policy with its value network."""
        return self.ppo.policy

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """SB3's optimiser."""
        return self.ppo.policy.optimizer

    @property
    def policy(self) -> FeaturePolicy:
        """A copy of what has been learned, as a policy of the project's own."""
        return as_feature_policy(self.module, self.sizes)

    def update(self) -> dict[str, Tensor]:
        """One rollout and its training; returns scalars to log."""
        with self._chance, divergence_named(self.module):
            self.ppo._last_obs = None  # reset: nothing is under way between two updates
            self.ppo.learn(self._per_update, reset_num_timesteps=False)
        logged = self.ppo.logger.name_to_value
        rewards = self.ppo.rollout_buffer.rewards
        entropy = torch.tensor(-float(logged["train/entropy_loss"]))  # summed over choices
        # as a share of the largest sum: a choice of equally likely options as many as all together
        return entropy_sign(entropy[None], [math.prod(self.sizes)]) | {
            "game/reward_per_query": torch.tensor(float(rewards.mean())),
            "attacker/policy_loss": torch.tensor(float(logged["train/policy_gradient_loss"])),
            "attacker/kl": torch.tensor(float(logged["train/approx_kl"])),
            "attacker/explained_variance": torch.tensor(float(logged["train/explained_variance"])),
            "strategy/entropy": entropy,
        }

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and streams; the policy is saved apart."""
        updates = (self.ppo._n_updates, self.ppo.num_timesteps)
        return {
            "optimizer": self.optimizer.state_dict(),
            "updates": updates,
            **self._chance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.ppo._n_updates, self.ppo.num_timesteps = state["updates"]
        self._chance.load_state_dict(state)


def as_feature_policy(module: ActorCriticPolicy, sizes: tuple[int, ...]) -> FeaturePolicy:
    """The same distribution over choices without SB3: its actor's weights in our layers."""
    actor, head = module.mlp_extractor.policy_net, module.action_net
    first = next(layer for layer in actor if isinstance(layer, nn.Linear))
    policy = FeaturePolicy(first.in_features, sizes, first.out_features)
    policy.trunk.load_state_dict(actor.state_dict())
    policy.heads.load_state_dict(head.state_dict())
    return policy

"""The imitating policy: sb3-contrib's TRPO, or SB3's PPO, on a vector environment of tensors.

SB3 contributes policy, rollout buffer and `train`; the environment is stepped here, in batches
of tensors, since an imitation loop changes the reward between two updates and resumes to the bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from lightning_fabric import Fabric
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from agents.imitation_policy import described
from agents.sb3 import SB3Learner, set_up
from agents.settings import PolicySettings
from envs.actions import rounded
from envs.imitation import ImitationVectorEnv


@dataclass(frozen=True)
class Rollout:
    """T steps of B environments; the first axis of every tensor is time."""

    observations: Tensor
    actions: Tensor
    """the policy's own draws, of which it knows the probabilities"""
    executed: Tensor
    """what the environment was given and paid for: the draws, brought into the action space"""
    rewards: Tensor
    true_rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    final: dict[int, Tensor]
    """step -> (B, d): what rows that ended at this step saw last"""
    last: Tensor
    """(B, d): observations after the last step"""
    true_returns: Tensor
    """(episodes,) that ended"""


class SubsampledTRPO(TRPO):
    """TRPO whose Fisher matrix is that of a part of the batch, which is most of its cost.

    sb3-contrib's own ``sub_sampling_factor`` drops the pairs from the gradient too.

    Args:
        fisher_every: use every so many pairs.
        settings: as TRPO's.

    Source: Schulman's thesis 2016, p. 40; Ho & Ermon's code takes a tenth.
    """

    def __init__(self, fisher_every: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.fisher_every = fisher_every

    def _compute_actor_grad(self, kl_div: Tensor, policy_objective: Tensor) -> Any:
        """sb3-contrib's, with the divergence of the part in place of the batch's."""
        if self.fisher_every > 1:
            seen = torch.as_tensor(self.rollout_buffer.observations[:: self.fisher_every])
            with torch.no_grad():
                old = copy.copy(self.policy.get_distribution(seen))
            kl_div = kl_divergence(self.policy.get_distribution(seen), old).mean()
        return super()._compute_actor_grad(kl_div, policy_objective)


class Imitator(SB3Learner):
    """A policy that learns from an environment's rewards, whatever they are.

    Args:
        env: whose spaces and number of rows it is made for.
        seed: of SB3's own streams.
        settings: algorithm and sizes.
    """

    def __init__(
        self, env: ImitationVectorEnv, seed: int, settings: PolicySettings | None = None
    ) -> None:
        self.settings = settings or PolicySettings()
        super().__init__(lambda: _make(env, self.settings), seed)
        # of the files of its weights, which then say all that `load_policy` must know
        self.policy.file_metadata = described(env.env_id, env.code, env.task.action_space)  # type: ignore[assignment]
        self.fabric = Fabric(accelerator="cpu", devices=1)
        self._discrete = isinstance(env.single_action_space, spaces.Discrete)
        self._entries = _entries(env.single_action_space)

    @property
    def module(self) -> ActorCriticPolicy:
        """The policy network, which the training loop saves."""
        return self.policy

    def act(self, observations: Tensor, *, deterministic: bool) -> Tensor:
        """Actions (B,) or (B, k) for encoded observations (B, d), inside the action space."""
        self.policy.set_training_mode(False)
        if deterministic and self._discrete:  # evaluation spends most of its time here
            with torch.inference_mode():
                latent = self.policy.mlp_extractor.forward_actor(observations)
                most_likely: Tensor = self.policy.action_net(latent).argmax(1)
            return most_likely
        with torch.no_grad(), self.running():
            actions = self.policy.get_distribution(observations).get_actions(deterministic)
        return self._inside(actions)

    def _sample(self, observations: Tensor) -> Tensor:
        if not self._discrete:
            sampled: Tensor = self.policy.get_distribution(observations).sample()
            return sampled
        # playing spends most of its time here: without SB3's wrapping it is half of it
        latent = self.policy.mlp_extractor.forward_actor(observations)
        chances = self.policy.action_net(latent).softmax(1)
        return torch.multinomial(chances, 1)[:, 0]

    def _inside(self, actions: Tensor) -> Tensor:
        if self._discrete:
            return actions
        space = self.algorithm.action_space
        assert isinstance(space, spaces.Box)
        return rounded(actions, space).clamp(
            torch.as_tensor(space.low), torch.as_tensor(space.high)
        )

    def collect(self, env: ImitationVectorEnv) -> Rollout:
        """Play ``n_steps`` with the policy as it is; the environment was reset before."""
        self.policy.set_training_mode(False)
        kept: list[tuple[Tensor, ...]] = []
        final: dict[int, Tensor] = {}
        returns = []
        with torch.no_grad(), self.running():
            for t in range(self.settings.n_steps):
                seen = env.observations
                actions = self._sample(seen)
                executed = self._inside(actions)
                _, reward, terminated, truncated, info = env.step(executed)
                paid = (reward, info["true_reward"])
                kept.append((seen, actions, executed, *paid, terminated, truncated))
                if "final_obs" in info:
                    final[t] = info["final_obs"]
                    returns.append(info["final_info"]["true_return"][info["_final_obs"]])
        seen, actions, executed, reward, true, terminated, truncated = (
            torch.stack(column) for column in zip(*kept, strict=True)
        )
        ended = torch.cat(returns) if returns else torch.zeros(0)
        ends = (terminated, truncated, final, env.observations, ended)
        return Rollout(seen, actions, executed, reward, true, *ends)

    def learn(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """One update of policy and values.

        Args:
            rollout: what was played with the policy as it still is.
            rewards: (T, B), those of the rollout or others. They are scaled by 1 − γ, so that
                the values to be learned are averages of rewards and not sums of hundreds;
                advantages are standardised, so that the policy sees no difference.
        """
        buffer = self.algorithm.rollout_buffer
        with torch.no_grad():
            rewards = (1 - self.settings.gamma) * rewards
            rewards = self._bootstrapped(rollout, rewards)
            flat = rollout.observations.flatten(0, 1)
            values, log_probs, entropy = self.policy.evaluate_actions(
                flat, rollout.actions.flatten(0, 1)
            )
            last_values = self.policy.predict_values(rollout.last)
        ended = (rollout.terminated | rollout.truncated).float()
        starts = torch.cat([torch.zeros_like(ended[:1]), ended[:-1]])
        buffer.reset()
        buffer.observations[:] = rollout.observations.numpy()
        # of the draws' own type: SB3's buffer has the box's, and whole numbers would make 0.7 to 0,
        # whose likelihood is not that of the draw
        buffer.actions = rollout.actions.reshape(buffer.actions.shape).numpy()
        buffer.rewards[:] = rewards.numpy()
        buffer.episode_starts[:] = starts.numpy()
        buffer.values[:] = values.view(rewards.shape).numpy()
        buffer.log_probs[:] = log_probs.view(rewards.shape).numpy()
        buffer.pos, buffer.full = buffer.buffer_size, True
        if self.settings.settle:
            shorter = 1 + self.algorithm._n_updates / self.settings.settle
            radius = self.settings.max_kl / self._entries
            self.algorithm.target_kl = radius / shorter**2  # type: ignore[attr-defined]
        with self.running():
            buffer.compute_returns_and_advantage(last_values, ended[-1].numpy())
            self.algorithm.train()
        logged = self.algorithm.logger.name_to_value
        if self.settings.algorithm == "trpo":
            kl = self._entries * logged["train/kl_divergence_loss"]
        else:
            kl = logged["train/approx_kl"]
        entropy_mean = float(entropy.mean()) if entropy is not None else float("nan")
        stats = {
            "policy/kl": float(kl),
            "policy/entropy": entropy_mean,
            "policy/value_loss": float(logged["train/value_loss"]),
        }
        explained = self.logged({"policy/explained_variance": "explained_variance"})
        return stats | {tag: float(value) for tag, value in explained.items()}

    def _bootstrapped(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        """A time limit is no end: what would have come after it is the value of the last state."""
        rewards = rewards.clone()
        for t, seen in rollout.final.items():
            values = self.policy.predict_values(seen).squeeze(1)
            rewards[t] += torch.where(rollout.truncated[t], self.settings.gamma * values, 0.0)
        return rewards


def _make(env: ImitationVectorEnv, settings: PolicySettings) -> OnPolicyAlgorithm:
    widths = list(settings.hidden)
    shared: dict[str, Any] = {
        "policy": ActorCriticPolicy,
        "env": None,
        "learning_rate": settings.value_lr,
        "n_steps": settings.n_steps,
        "batch_size": -(-settings.n_steps * env.num_envs // settings.value_batches),
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "policy_kwargs": {
            "net_arch": {"pi": widths, "vf": widths},
            "activation_fn": nn.Tanh,
            # fused: half the time; ε is torch's 1e-8 then, not SB3's 1e-5
            "optimizer_kwargs": {"fused": True},
        },
        "device": "cpu",  # networks this small are fastest there
        "_init_setup_model": False,
    }
    made: OnPolicyAlgorithm
    if settings.algorithm == "trpo":
        entries = _entries(env.single_action_space)
        made = SubsampledTRPO(
            settings.fisher_every,
            **shared,
            target_kl=settings.max_kl / entries,
            cg_max_steps=settings.cg_steps,
            cg_damping=settings.cg_damping / entries,
            n_critic_updates=settings.value_epochs,
        )
    else:
        made = PPO(**shared)
    return set_up(made, env.single_observation_space, env.single_action_space, env.num_envs)


def _entries(actions: spaces.Space[Any]) -> int:
    """By how much TRPO's divergence, and with it the Fisher matrix, is too small.

    SB3 gives a Gaussian's divergence per entry of the action, and sb3-contrib takes the mean over
    entries where the divergence is their sum.
    """
    return actions.shape[0] if isinstance(actions, spaces.Box) else 1

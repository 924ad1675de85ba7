"""Stable-Baselines3's PPO as a strategy player.

The game's loop draws the batches, checkpoints and logs; SB3 contributes its policy, rollout
buffer and `PPO.train`. To let SB3 drive instead, give PPO the adapter of `envs.sb3`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor
from torch.distributions import Categorical

from advgame.errors import InputError
from advgame.games.strategy import CHOICES
from advgame.health import entropy_sign
from advgame.seeding import PrivateRNG
from agents.policies import DIVERGED, StrategyPolicy

_BUFFER = ("observations", "actions", "rewards", "returns", "episode_starts", "values")
_BUFFER_ARRAYS = (*_BUFFER, "log_probs", "advantages")


class TrunkExtractor(BaseFeaturesExtractor):
    """The strategy policy's trunk as SB3's features extractor: (B, C, H, W) -> (B, width)."""

    def __init__(self, observation_space: spaces.Box) -> None:
        channels, height, width = observation_space.shape
        policy = StrategyPolicy((channels, height, width), ())
        super().__init__(observation_space, features_dim=policy.width)
        self.trunk = policy.trunk

    def forward(self, observations: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        features: Tensor = self.trunk(observations)
        return features


def policy_kwargs() -> dict[str, Any]:
    """SB3 policy settings that fit images in [0, 1] of any size: the project's own trunk."""
    return {
        "features_extractor_class": TrunkExtractor,
        "normalize_images": False,
        "net_arch": [],
    }


class SB3Chance:
    """SB3 draws from torch's and NumPy's global streams: inside ``with`` these are its own.

    Args:
        seed: where its streams begin.
        device: whose global stream of torch is swapped besides the CPU's.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._torch, self._numpy = PrivateRNG(seed, device), _numpy_state(seed)

    def __enter__(self) -> None:
        self._outer = np.random.get_state(legacy=True)  # noqa: NPY002
        np.random.set_state(_legacy(self._numpy))  # noqa: NPY002
        self._torch.__enter__()

    def __exit__(self, *_: object) -> None:
        self._torch.__exit__()
        self._numpy = _plain(np.random.get_state(legacy=True))  # noqa: NPY002
        np.random.set_state(self._outer)  # noqa: NPY002

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are; outside of ``with`` only."""
        return {"torch_rng": self._torch.state_dict(), "numpy_rng": self._numpy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._torch.load_state_dict(state["torch_rng"])
        self._numpy = state["numpy_rng"]


@contextlib.contextmanager
def divergence_named(policy: ActorCriticPolicy) -> Iterator[None]:
    """SB3's distributions refuse logits of NaN with a page of numbers: say what it means.

    Raises:
        InputError: the policy has diverged.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if all(bool(one.isfinite().all()) for one in policy.parameters()):
            raise
        raise InputError(DIVERGED) from error


class PPOPlayer:
    """SB3's PPO, playing and learning from one-step episodes.

    Args:
        shape: (C, H, W) of the images.
        sizes: number of options of each choice.
        num_envs: B, images per step.
        seed: of SB3's own streams, kept apart from the rest of the run.
        device: where the policy lives.
        n_steps: decisions per image slot between two updates.
        lr: learning rate.
        entropy_coef: weight of the entropy bonus.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        sizes: tuple[int, ...],
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        *,
        n_steps: int = 4,
        lr: float = 1e-3,
        entropy_coef: float = 0.01,
    ) -> None:
        self._chance = SB3Chance(seed, device)
        with self._chance:
            self.ppo = PPO(
                ActorCriticPolicy,
                None,  # type: ignore[arg-type]  # the game's loop steps the environment
                learning_rate=lr,
                n_steps=n_steps,
                batch_size=num_envs,
                n_epochs=4,
                ent_coef=entropy_coef,
                policy_kwargs=policy_kwargs(),
                device=device,
                _init_setup_model=False,
            )
            self.ppo.observation_space = spaces.Box(0, 1, shape, np.float32)
            self.ppo.action_space = spaces.MultiDiscrete(list(sizes))
            self.ppo.n_envs = num_envs
            self.ppo._setup_model()
        self.ppo.set_logger(Logger(None, []))
        self.ppo.rollout_buffer.reset()
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def policy(self) -> ActorCriticPolicy:
        """SB3's policy module."""
        return self.ppo.policy

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """SB3's optimiser."""
        return self.ppo.policy.optimizer

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Draw a strategy per image, (B, choices)."""
        self.policy.set_training_mode(False)
        with self._chance, torch.no_grad(), divergence_named(self.policy):
            actions, values, log_probs = self.policy(images)
        self._last = (images, actions, values, log_probs) if learn else None
        chosen: Tensor = actions.long()
        return chosen

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Store the rewards (B,); every ``n_steps``-th call updates the policy."""
        assert self._last is not None, "act(images, learn=True) comes first"
        images, actions, values, log_probs = self._last
        buffer = self.ppo.rollout_buffer
        starts = np.ones(len(reward), dtype=np.float32)  # every decision begins an episode
        buffer.add(
            images.cpu().numpy(),
            actions.cpu().numpy(),
            reward.cpu().numpy(),
            starts,
            values,
            log_probs,
        )
        with torch.no_grad():
            heads = cast(list[Categorical], self.policy.get_distribution(images).distribution)
        entropies = torch.stack([one.entropy().mean() for one in heads])
        stats = {
            f"strategy/entropy_{name}": value
            for name, value in zip(CHOICES, entropies, strict=False)
        }
        stats |= entropy_sign(entropies, [one.logits.shape[1] for one in heads])
        if buffer.full:
            with self._chance, divergence_named(self.policy):
                buffer.compute_returns_and_advantage(values, starts)
                self.ppo.train()
            buffer.reset()
            logged = self.ppo.logger.name_to_value
            stats["attacker/policy_loss"] = torch.tensor(
                float(logged["train/policy_gradient_loss"])
            )
            stats["attacker/kl"] = torch.tensor(float(logged["train/approx_kl"]))
        return stats

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, the half-filled buffer and both streams."""
        buffer = self.ppo.rollout_buffer
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.policy.optimizer.state_dict(),
            "buffer": {name: torch.as_tensor(getattr(buffer, name)) for name in _BUFFER_ARRAYS},
            "position": buffer.pos,
            "updates": self.ppo._n_updates,
            **self._chance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.policy.load_state_dict(state["policy"])
        self.policy.optimizer.load_state_dict(state["optimizer"])
        buffer = self.ppo.rollout_buffer
        buffer.reset()
        for name in _BUFFER_ARRAYS:
            getattr(buffer, name)[...] = state["buffer"][name].numpy()
        buffer.pos = state["position"]
        self.ppo._n_updates = state["updates"]
        self._chance.load_state_dict(state)
        self._last = None


def _numpy_state(seed: int) -> dict[str, Any]:
    return _plain(np.random.RandomState(seed % 2**32).get_state(legacy=True))


def _plain(state: Any) -> dict[str, Any]:
    """NumPy's legacy state as a tensor and numbers, which a checkpoint can hold."""
    kind, keys, position, has_gauss, cached = state
    assert kind == "MT19937"
    return {
        "keys": torch.from_numpy(keys.astype(np.int64)),
        "position": int(position),
        "gauss": (int(has_gauss), float(cached)),
    }


def _legacy(state: dict[str, Any]) -> tuple[str, Any, int, int, float]:
    has_gauss, cached = state["gauss"]
    return "MT19937", state["keys"].numpy().astype(np.uint32), state["position"], has_gauss, cached

"""Stable-Baselines3's PPO as a strategy player and as a learner of attacks.

The run's loop checkpoints and logs; SB3 contributes its policy, rollout buffer and `train`. To let
SB3 drive instead, give its algorithms `envs.make_sb3`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium import spaces
from lightning_fabric import Fabric
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env.base_vec_env import VecEnv
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from advgame.errors import InputError
from advgame.games.strategy import CHOICES
from advgame.health import entropy_sign
from advgame.optimizers import load_optimizer
from advgame.seeding import PrivateRNG
from agents.policies import DIVERGED, FeaturePolicy, StrategyPolicy, entropy_stats

_TAGS = {"attacker/policy_loss": "policy_gradient_loss", "attacker/kl": "approx_kl"}


class SB3Learner:
    """An SB3 algorithm within a run: chance of its own, divergence in words, a state to save.

    SB3 draws from torch's and NumPy's global streams, and shows a policy that has diverged as a
    page of numbers.

    Args:
        make: makes the algorithm.
        seed: where its streams begin.
        device: whose global stream of torch is swapped besides the CPU's.
    """

    def __init__(
        self, make: Callable[[], OnPolicyAlgorithm], seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self._torch = PrivateRNG(seed, device)
        self._numpy = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        with self._own_chance():
            self.algorithm = make()
        self.algorithm.set_logger(Logger(None, []))

    @property
    def policy(self) -> ActorCriticPolicy:
        """SB3's policy module, with its value network."""
        return self.algorithm.policy

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of SB3's policy and value network."""
        return self.policy.optimizer

    @contextlib.contextmanager
    def _own_chance(self) -> Iterator[None]:
        """Inside, the global streams are this learner's; outside they are as they were."""
        outer = np.random.get_state(legacy=False)  # noqa: NPY002
        np.random.set_state(self._numpy)  # noqa: NPY002
        try:
            with self._torch:
                yield
        finally:
            self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002
            np.random.set_state(outer)  # noqa: NPY002

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around every call of SB3's that draws.

        Raises:
            InputError: the policy has diverged.
        """
        try:
            with self._own_chance():
                yield
        except (RuntimeError, ValueError) as error:
            if all(bool(one.isfinite().all()) for one in self.policy.parameters()):
                raise
            raise InputError(DIVERGED) from error

    def logged(self, tags: dict[str, str]) -> dict[str, Tensor]:
        """What `train` logged: our tag -> SB3's name without ``train/``.

        The explained variance is left out where all returns are the same: there is none then, SB3
        says NaN, and a run that logs NaN counts as diverged.
        """
        found = self.algorithm.logger.name_to_value
        said = {tag: (name, float(found[f"train/{name}"])) for tag, name in tags.items()}
        return {
            tag: torch.tensor(value)
            for tag, (name, value) in said.items()
            if name != "explained_variance" or not math.isnan(value)
        }

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, number of updates, and the streams outside of `running`."""
        where = self._numpy
        keys = torch.from_numpy(where["state"]["key"].astype(np.int64))  # checkpoints: no arrays
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": (self.algorithm._n_updates, self.algorithm.num_timesteps),
            "torch_rng": self._torch.state_dict(),
            "numpy_rng": {**where, "state": {"key": keys, "pos": where["state"]["pos"]}},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.policy.load_state_dict(state["policy"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.algorithm._n_updates, self.algorithm.num_timesteps = state["updates"]
        self._torch.load_state_dict(state["torch_rng"])
        where = state["numpy_rng"]["state"]
        keys = where["key"].numpy().astype(np.uint32)
        self._numpy = {**state["numpy_rng"], "state": {"key": keys, "pos": where["pos"]}}


def set_up(
    algorithm: OnPolicyAlgorithm,
    observations: spaces.Space[Any],
    actions: spaces.Space[Any],
    num_envs: int,
) -> OnPolicyAlgorithm:
    """Make policy and buffer of an algorithm without environment, which our loop steps itself.

    Args:
        algorithm: made with ``env=None`` and ``_init_setup_model=False``.
        observations: of one environment.
        actions: of one environment.
        num_envs: how many.
    """
    algorithm.observation_space, algorithm.action_space = observations, actions
    algorithm.n_envs = num_envs
    algorithm._setup_model()
    return algorithm


def alike_in_both_modes(module: nn.Module) -> None:
    """Group norm in place of batch norm, and no dropout, throughout a network.

    SB3 plays in evaluation mode and learns in training mode. With running statistics in the one
    and a batch's in the other two policies have the same weights: PPO's ratios are far from 1
    before its first step, most pairs are clipped, and its divergence says nothing of its steps.
    """
    for name, one in module.named_children():
        if isinstance(one, _BatchNorm):
            groups = max(math.gcd(32, one.num_features) // 2, 1)
            setattr(module, name, nn.GroupNorm(groups, one.num_features))
        elif isinstance(one, nn.Dropout):
            setattr(module, name, nn.Identity())
        else:
            alike_in_both_modes(one)


class TrunkExtractor(BaseFeaturesExtractor):
    """The strategy policy's trunk as SB3's features extractor: (B, C, H, W) -> (B, width).

    What it does with an image is the same in both modes: see `alike_in_both_modes`.
    """

    def __init__(self, observation_space: spaces.Box, network: str | None = None) -> None:
        channels, height, width = observation_space.shape
        policy = StrategyPolicy((channels, height, width), (), network=network)
        super().__init__(observation_space, features_dim=policy.width)
        self.trunk = policy.trunk
        alike_in_both_modes(self.trunk)

    @override
    def forward(self, observations: Tensor) -> Tensor:
        features: Tensor = self.trunk(observations)
        return features


class NatureExtractor(NatureCNN):
    """SB3's NatureCNN on smaller images: with zeros around them it takes 36x36 pixels."""

    def __init__(self, observation_space: spaces.Box, normalized_image: bool = True) -> None:
        channels, height, width = observation_space.shape
        self._missing = max(36 - height, 0), max(36 - width, 0)
        shape = (channels, height + self._missing[0], width + self._missing[1])
        images = spaces.Box(0, 1, shape, np.float32)
        super().__init__(images, normalized_image=normalized_image)

    @override
    def forward(self, observations: Tensor) -> Tensor:
        height, width = self._missing
        edges = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(nn.functional.pad(observations, edges))


def policy_kwargs(network: Literal["trunk", "nature"] = "trunk") -> dict[str, Any]:
    """SB3 policy settings for images in [0, 1], whatever their size.

    Args:
        network: what sees the image: the project's own trunk, or SB3's small NatureCNN.
    """
    if network not in ("trunk", "nature"):
        raise InputError(f"network must be trunk or nature, not {network!r}")
    return {
        "features_extractor_class": TrunkExtractor if network == "trunk" else NatureExtractor,
        "normalize_images": False,
        "net_arch": [],
    }


class PPOPlayer(SB3Learner):
    """LAS-AT's strategy player: PPO on one-step episodes, which the game steps.

    Args:
        shape: (C, H, W) of the images.
        sizes: number of options of each choice.
        num_envs: B, images per step.
        seed: of SB3's own streams, kept apart from the rest of the run.
        device: where the policy lives.
        n_steps: decisions per image slot between two updates.
        lr: learning rate.
        entropy_coef: weight of the entropy bonus.
        network: the trunk, see `agents.StrategyPolicy`.
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
        network: str | None = None,
    ) -> None:
        def make() -> OnPolicyAlgorithm:
            ppo = PPO(
                ActorCriticPolicy,
                None,  # type: ignore[arg-type]
                learning_rate=lr,
                n_steps=n_steps,
                batch_size=max(num_envs, 2),  # SB3 takes no less
                n_epochs=4,
                ent_coef=entropy_coef,
                policy_kwargs={
                    **policy_kwargs(),
                    "features_extractor_kwargs": {"network": network},
                },
                device=device,
                _init_setup_model=False,
            )
            images = spaces.Box(0, 1, shape, np.float32)
            return set_up(ppo, images, spaces.MultiDiscrete(list(sizes)), num_envs)

        super().__init__(make, seed, device)
        self.algorithm.rollout_buffer.reset()
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def act(self, images: Tensor, *, learn: bool) -> Tensor:
        """Draw a strategy per image, (B, choices)."""
        self.policy.set_training_mode(False)
        with torch.no_grad(), self.running():
            actions, values, log_probs = self.policy(images)
        self._last = (images, actions, values, log_probs) if learn else None
        chosen: Tensor = actions.long()
        return chosen

    def learn(self, reward: Tensor) -> dict[str, Tensor]:
        """Store the rewards (B,); every ``n_steps``-th call updates the policy."""
        assert self._last is not None, "act(images, learn=True) comes first"
        images, actions, values, log_probs = self._last
        buffer = self.algorithm.rollout_buffer
        starts = np.ones(len(reward), dtype=np.float32)  # every decision begins an episode
        seen, taken, paid = (one.cpu().numpy() for one in (images, actions, reward))
        buffer.add(seen, taken, paid, starts, values, log_probs)
        with torch.no_grad():
            heads = cast(list[Categorical], self.policy.get_distribution(images).distribution)
        entropies = torch.stack([one.entropy().mean() for one in heads])
        stats = entropy_stats(CHOICES, [one.logits for one in heads], entropies)
        if buffer.full:
            with self.running():
                buffer.compute_returns_and_advantage(values, starts)
                self.algorithm.train()
            buffer.reset()
            stats |= self.logged(_TAGS)
        return stats

    @override
    def state_dict(self) -> dict[str, Any]:
        buffer = self.algorithm.rollout_buffer  # half filled, maybe
        arrays = {k: v for k, v in vars(buffer).items() if isinstance(v, np.ndarray)}
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
        return super().state_dict() | {"buffer": tensors, "position": buffer.pos}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        buffer = self.algorithm.rollout_buffer
        buffer.reset()
        for name, values in state["buffer"].items():
            getattr(buffer, name)[...] = values.numpy()
        buffer.pos = state["position"]
        self._last = None


class PPOAttacker(SB3Learner):
    """Learns to attack: an update is one of PPO's rollouts, from fresh episodes, and its training.

    Args:
        env: the adapter over the attack environments, `envs.make_sb3`.
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
        self.fabric, self.sizes, self._per_update = fabric, sizes, steps * env.num_envs
        super().__init__(
            lambda: PPO(
                "MlpPolicy",
                env,
                learning_rate=lr,
                n_steps=steps,
                batch_size=max(self._per_update // 4, 2),
                n_epochs=4,
                gamma=discount,
                gae_lambda=0.95,
                ent_coef=entropy_coef,
                policy_kwargs={"net_arch": [hidden, hidden], "activation_fn": nn.Tanh},
                device=fabric.device,
            ),
            seed,
            fabric.device,
        )
        # the training loop's schedule sets the rate: SB3 leaves it as it finds it
        self.algorithm.lr_schedule = lambda _: float(self.optimizer.param_groups[0]["lr"])

    @property
    def module(self) -> ActorCriticPolicy:
        """The policy network, which the training loop saves."""
        return self.policy

    def update(self) -> dict[str, Tensor]:
        """One rollout and its training; returns scalars to log."""
        with self.running():
            self.algorithm._last_obs = None  # reset: nothing is under way between two updates
            self.algorithm.learn(self._per_update, reset_num_timesteps=False)
        logged = self.logged(_TAGS | {"attacker/explained_variance": "explained_variance"})
        entropy = -self.logged({"entropy": "entropy_loss"})["entropy"]  # summed over choices
        # as a share of the largest sum: a choice of equally likely options as many as all together
        return logged | {
            **entropy_sign(entropy[None], [math.prod(self.sizes)]),
            "game/reward_per_query": torch.tensor(self.algorithm.rollout_buffer.rewards.mean()),
            "strategy/entropy": entropy,
        }


def as_feature_policy(module: ActorCriticPolicy, sizes: tuple[int, ...]) -> FeaturePolicy:
    """A copy of `PPOAttacker`'s policy without SB3: its actor's weights in our layers."""
    actor, head = module.mlp_extractor.policy_net, module.action_net
    first = next(layer for layer in actor if isinstance(layer, nn.Linear))
    policy = FeaturePolicy(first.in_features, sizes, first.out_features)
    policy.trunk.load_state_dict(actor.state_dict())
    policy.heads.load_state_dict(head.state_dict())
    return policy

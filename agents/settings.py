"""Settings of REINFORCE, TRPO and PPO, and names of players and updaters; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from advgame.errors import InputError

Agent = Literal[
    "reinforce", "ppo", "linucb", "thompson", "stopper",
    "random", "steady", "short", "shuffled", "fat", "fixed",
]  # fmt: skip
POLICIES = ("reinforce", "ppo")
"""Agents that are paid as LAS-AT is, image by image."""
BANDITS = ("linucb", "thompson")
"""Agents that are paid the fall of the held-out robust loss."""
STOPPING = ("stopper", "shuffled", "fat")
"""Agents whose attacks a rule ends."""
Baseline = Literal["none", "loo", "running", "value"]
Algorithm = Literal["trpo", "ppo"]
Width = Literal["wide", "wide-repo", "slim", "two-block", "small"]
Scaling = Literal["image", "paper"]
Body = Literal["small", "resnet-3blocks"]
GradientScaling = Literal["image", "raw"]
Bound = Literal["tanh", "clip"]


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of `Reinforce`.

    Args:
        optimizer: Adam, or SGD.
        lr: learning rate.
        baseline: what is taken off the reward. ``"none"`` (published); ``"loo"`` the mean reward
            of the other images in the batch, which removes every term that they share;
            ``"running"`` a moving average over batches; ``"value"`` that plus a learned V(x).
        scale_advantage: divide advantages by a moving root mean square.
        entropy_coef: weight of the entropy bonus, per choice in nats.
        grad_clip: largest gradient norm.
        momentum: of SGD.
        weight_decay: of either optimiser.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    baseline: Baseline = "value"
    scale_advantage: bool = True
    entropy_coef: float = 0.1
    grad_clip: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0


# `repo`: LAS-AT's CIFAR-10 settings (reward without baseline, no bonus, SGD at 1e-4, clip 1);
# `repo-momentum`: the policy's optimiser of its CIFAR-100 script
_REPO = ReinforceConfig("sgd", 1e-4, "none", scale_advantage=False, entropy_coef=0.0)
PRESETS = {
    "default": ReinforceConfig(),
    "repo": _REPO,
    "repo-momentum": replace(_REPO, momentum=0.9, weight_decay=5e-4),
}


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of `EpisodicReinforce`.

    Args:
        steps: of every row per update; the longest episode's.
        lr: learning rate of the policy (Adam).
        value_lr: learning rate of the baseline (Adam).
        value_steps: its steps per update.
        discount: γ.
        entropy_coef: weight of the entropy bonus, per choice in nats, relative to advantages of
            unit size.
        grad_clip: largest gradient norm.
    """

    steps: int
    lr: float = 3e-3
    value_lr: float = 3e-3
    value_steps: int = 2
    discount: float = 1.0
    entropy_coef: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.value_lr <= 0 or self.grad_clip <= 0:
            raise InputError("REINFORCE needs steps >= 1, learning rates and grad_clip above 0")
        if not 0 <= self.discount <= 1 or self.entropy_coef < 0:
            raise InputError("REINFORCE needs a discount in [0, 1] and entropy_coef >= 0")


@dataclass(frozen=True)
class PolicySettings:
    """TRPO, near to Ho & Ermon's settings (their code's classic-control pipeline).

    Not theirs: the value network learns by Adam (theirs takes natural-gradient steps) and sees
    no time; observations are scaled by constants, not by running normalisers; the output layers
    do not begin at zero; the line search is sb3-contrib's; time limits are bootstrapped. (And
    their discriminator has a logit per action, ours sees a one-hot action.) With Adam at 1e-3,
    SB3's default, and 2,048 steps the policy stuck at −130 on MountainCar even with the true
    reward. λ is theirs in the presets that follow them, 0.97.

    Args:
        algorithm: trpo, or ppo; what is not here is SB3's default.
        hidden: widths of policy and value network, tanh; (64, 32) as the L2L paper's.
        n_steps: steps per environment and iteration.
        gamma: discount, below 1: rewards are scaled by 1 − γ.
        gae_lambda: λ of the advantage estimate.
        max_kl: TRPO's trust region, in nats of the whole action.
        settle: TRPO's steps shrink as 1 / (1 + t/settle) over iterations t, the trust region with
            their square; 0 keeps them. At full length they go on at an equilibrium too, where
            advantages are noise and are standardised all the same.
        cg_steps: conjugate-gradient steps.
        cg_damping: added to the Fisher matrix of the whole action.
        fisher_every: the Fisher matrix sees every so many pairs (Ho & Ermon: 10); the gradient
            and the check of the trust region see all.
        value_lr: of Adam on the value network; PPO's learning rate.
        value_epochs: passes over the batch for the value network; PPO's own number of epochs stays.
        value_batches: minibatches of each pass.

    Raises:
        InputError: an unknown algorithm, or a number that cannot be one of these.
    """

    algorithm: Algorithm = "trpo"
    hidden: tuple[int, ...] = (64, 32)
    n_steps: int = 64
    gamma: float = 0.995
    gae_lambda: float = 0.99
    max_kl: float = 0.01
    settle: int = 0
    cg_steps: int = 10
    cg_damping: float = 0.1
    fisher_every: int = 4
    value_lr: float = 5e-3
    value_epochs: int = 5
    value_batches: int = 4

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise InputError(f"algorithm must be trpo or ppo, not {self.algorithm!r}")
        if not (0 <= self.gamma < 1 and 0 <= self.gae_lambda <= 1):
            raise InputError(
                "the policy needs gamma in [0, 1), since rewards are scaled by 1 - gamma, and "
                f"gae_lambda in [0, 1], not {self.gamma} and {self.gae_lambda}"
            )
        counts = ("n_steps", "cg_steps", "fisher_every", "value_epochs", "value_batches")
        if min(*self.hidden, *[getattr(self, name) for name in counts]) < 1:
            raise InputError(f"the policy needs hidden, {', '.join(counts)} of 1 or above")
        if not (self.max_kl > 0 and self.value_lr > 0):
            raise InputError("the policy needs max_kl and value_lr above 0")
        if not (self.settle >= 0 and self.cg_damping >= 0):
            raise InputError("the policy needs settle and cg_damping of 0 or above")
        if self.settle and self.algorithm != "trpo":
            raise InputError("settle shrinks TRPO's steps: ppo has none of these")

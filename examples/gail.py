"""GAIL with a learned updater of the discriminator, in one file: L2L's Algorithm 3 on CartPole.

Jiang et al., Learning to Defend by Learning to Attack (2021), section 4 and appendix C; it builds
on Ho & Ermon, Generative Adversarial Imitation Learning (2016). Policy π and discriminator D play

    min over π, max over D:   E_π[log(1 − D(s, a))] + E_expert[log D(s, a)]             (4), λ = 0

and D is improved by a network U that learns while it is used: θ_D ← U(θ_D, g_D; θ_U).
Where the papers leave a choice, or print two things:

- D is the probability of the expert, as in Ho & Ermon's code; L2L's D is 1 minus it.
- Appendix C has θ_U *minimise* what D maximises. Section 4 says ascent, and ascent is done here.
- L2L's U is an MLP on all of θ_D at once, 358 million weights for these 2,625 parameters. Here U is
  one small network for each coordinate alike (Andrychowicz et al. 2016), with features after Metz
  et al. (2022), bounded outputs, and Adam as what it is before it has learned anything.
- π is paid by D as it was before its step, as in Ho & Ermon's code; their Algorithm 1 differs.
- −log(1 − D) pays for every step on which the pole stands: a constant D solves CartPole. So π is
  paid log D − log(1 − D), and all episodes last 500 steps: where the pole has fallen they go on in
  an absorbing state (Kostrikov et al. 2019). Then a constant D pays the same for everything.

`python examples/gail.py` reaches a mean return of 500, the expert's, in 40 s on one core.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from advgame.imitation.demonstrations import shipped

Array = np.ndarray[Any, Any]

HORIZON = 500  # steps of every episode
ROWS, STEPS = 32, 64  # environments side by side and steps of each in an iteration
GAMMA, LAMBDA = 0.995, 0.99  # of the advantage estimate
ENTROPY = 1e-3  # weight of D's label entropy, half of Ho & Ermon's code
STEP = 0.01  # learning rate of the Adam that U begins as, Ho & Ermon's
DECAYS = (0.5, 0.9, 0.99)  # of the momenta that U sees; the second is Adam's β1
BETA2, EPS = 0.999, 1e-8  # Adam's
UPDATER_LR = 1e-3  # of the Adam that θ_U is trained by


# ---- the task: CartPole whose episodes are all as long ------------------------------------------
class Absorbing(gym.Wrapper[Array, Any, Array, Any]):
    """CartPole-v1 that rests at (0, 0, 0, 0, 1) after its fall; `first` is its first step."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(gym.make("CartPole-v1", max_episode_steps=-1))  # no limit but ours
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float32)
        self.first = first

    def reset(self, **options: Any) -> tuple[Array, dict[str, Any]]:
        """Begin a new episode; observations end with a 0: not absorbing."""
        seen, info = self.env.reset(**options)
        self.clock, self.first, self.over = self.first, 0, False
        return np.append(seen, np.float32(0)), info

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Never terminated, truncated at the horizon; the task's own reward is not paid."""
        if not self.over:
            seen, _, self.over, _, _ = self.env.step(action)
        self.clock += 1
        state = np.eye(5, dtype=np.float32)[4] if self.over else np.append(seen, np.float32(0))
        return state, 0.0, False, self.clock >= HORIZON, {}


def pairs(observations: Tensor, actions: Tensor) -> Tensor:
    """(s, a) as D sees it: (B, 5) and one-hot (B, 2), which is 0 in the absorbing state."""
    live = 1 - observations[:, 4:]
    return torch.cat([observations, live * F.one_hot(actions.long(), 2)], 1)


def demonstrations() -> Tensor:
    """The expert's pairs (5000, 7): ten episodes of 500 steps, none of which falls."""
    expert = shipped("CartPole-v1")
    return pairs(F.pad(expert.observations, (0, 1)), expert.actions)


# ---- D(s, a; θ_D), appendix C.2, θ_D one flat vector ---------------------------------------------
def first_theta() -> Tensor:
    """θ_D (2625,) to begin with, as PyTorch draws its layers."""
    layers = nn.Sequential(nn.Linear(7, 64), nn.Linear(64, 32), nn.Linear(32, 1))
    return parameters_to_vector(layers.parameters()).detach()


def logits(theta: Tensor, batch: Tensor) -> Tensor:
    """What D is the sigmoid of (B,), for pairs (B, 7): (s, a) -> 64 -> 32 -> 1."""
    w1, b1, w2, b2, w3, b3 = theta.split([64 * 7, 64, 32 * 64, 32, 32, 1])
    hidden = torch.tanh(F.linear(batch, w1.view(64, 7), b1))
    hidden = torch.tanh(F.linear(hidden, w2.view(32, 64), b2))
    return F.linear(hidden, w3.view(1, 32), b3).squeeze(1)


def discriminator_loss(theta: Tensor, policy: Tensor, expert: Tensor) -> Tensor:
    """Minus D's objective (4), less the entropy of its labels; means over pairs (B, 7)."""
    on_policy, on_expert = logits(theta, policy), logits(theta, expert)
    objective = F.logsigmoid(-on_policy).mean() + F.logsigmoid(on_expert).mean()
    both = torch.cat([on_policy, on_expert])
    entropy = F.binary_cross_entropy_with_logits(both, both.sigmoid())  # of D with itself
    return -objective - ENTROPY * entropy


# ---- U(θ_D, g_D; θ_U) ---------------------------------------------------------------------------
class Updater(nn.Module):
    """One network for every coordinate of θ_D (m,); while its last layer is 0 it is Adam."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.momenta, self.square, self.t = torch.zeros(len(DECAYS), m), torch.zeros(m), 0
        self.adam = torch.optim.Adam(self.parameters(), UPDATER_LR)

    def forward(self, theta: Tensor, g: Tensor) -> Tensor:
        """The next θ_D. θ_D and g_D are constants: what is differentiable is θ_U."""
        self.t += 1
        self.square = BETA2 * self.square + (1 - BETA2) * g**2
        root = (self.square / (1 - BETA2**self.t)).sqrt() + EPS
        b = theta.new_tensor(DECAYS)[:, None]
        self.momenta = b * self.momenta + (1 - b) * g
        directions = self.momenta / (1 - b**self.t) / root
        features = [
            g / root,
            *directions,
            root.log() - root.log().mean(),
            (g.abs() / root).clamp(min=math.exp(-8)).log(),
            theta / (theta**2).mean().sqrt().clamp(min=EPS),
        ]
        direction, magnitude = torch.tanh(self.head(self.body(torch.stack(features, 1)))).T
        step: Tensor = -STEP * torch.exp(3 * magnitude) * (directions[1] + direction)
        return theta + step


def discriminator_step(
    theta: Tensor, updater: Updater, policy: Tensor, expert: Tensor
) -> tuple[Tensor, float]:
    """One iteration of Algorithm 3 without the policy's lines.

    Args:
        theta: θ_D (m,).
        updater: U; it learns here.
        policy: pairs (B, 7) that π has just played.
        expert: pairs (B, 7) of the expert.

    Returns:
        the new θ_D, and the loss of the old one.
    """
    # g_D, of the loss: U goes down as Adam does
    theta = theta.detach().requires_grad_()
    loss = discriminator_loss(theta, policy, expert)
    (g,) = torch.autograd.grad(loss, theta)
    # θ_D' = U(θ_D, g_D; θ_U)
    new = updater(theta.detach(), g)
    # θ_U: Adam on the same loss at U(θ_D, g_D; θ_U), on the same pairs
    updater.adam.zero_grad()
    discriminator_loss(new, policy, expert).backward()
    updater.adam.step()
    return new.detach(), loss.item()


# ---- π, by sb3-contrib's TRPO -------------------------------------------------------------------
class PaidByDiscriminator(VecEnvWrapper):
    """Pays the logit of (s, a), times 1 − γ so that π's values are means and not sums."""

    def __init__(self, venv: VecEnv, theta: Tensor) -> None:
        super().__init__(venv)
        self.theta = theta

    def reset(self) -> Any:
        """Begin a new episode in every environment."""
        self.seen: Any = self.venv.reset()
        return self.seen

    def step_async(self, actions: Array) -> None:
        """Keeps the pair: the observation that is acted on, and the action."""
        self.acted = pairs(torch.as_tensor(self.seen), torch.as_tensor(actions))
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[Any, Array, Array, list[dict[str, Any]]]:
        """The reward is that of the pair that was kept."""
        self.seen, _, done, infos = self.venv.step_wait()
        with torch.no_grad():
            reward = (1 - GAMMA) * logits(self.theta, self.acted)
        return self.seen, reward.numpy(), done, infos


def mean_return(policy: TRPO) -> float:
    """Steps until the fall, mean over 50 fresh episodes of the deterministic policy."""
    rows: Any = DummyVecEnv([Absorbing] * 50)
    rows.seed(10**6)
    seen, steps = rows.reset(), 0.0
    for _ in range(HORIZON):
        steps += float(1 - seen[:, 4].mean())
        seen, *_ = rows.step(policy.predict(seen, deterministic=True)[0])
    return steps


def main(seed: int = 0, iterations: int = 80) -> float:
    """Imitate; returns `mean_return` at the end."""
    torch.manual_seed(seed)
    expert, theta = demonstrations(), first_theta()
    updater = Updater(len(theta))
    # rows that all began at 0 would stay in step: each batch one and the same window of episodes
    rows = DummyVecEnv([partial(Absorbing, row * HORIZON // ROWS) for row in range(ROWS)])
    env = PaidByDiscriminator(rows, theta)
    policy = TRPO(
        "MlpPolicy",
        env,
        learning_rate=5e-3,
        n_steps=STEPS,
        batch_size=ROWS * STEPS // 4,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        cg_max_steps=10,
        n_critic_updates=5,
        policy_kwargs={"net_arch": [64, 32], "optimizer_kwargs": {"eps": 1e-8}},  # 1e-5 is slow
        seed=seed,
        device="cpu",
    )
    policy.set_logger(Logger(None, []))  # SB3's own makes a folder in /tmp
    for t in range(1, iterations + 1):
        # sample (s, a) by π, and the TRPO step of π, paid by D as it still is
        policy.learn(ROWS * STEPS, reset_num_timesteps=False)
        played = policy.rollout_buffer
        ours = pairs(torch.tensor(played.observations), torch.tensor(played.actions[:, 0]))
        # as many expert pairs as the policy's, with replacement
        theirs = expert[torch.randint(len(expert), (len(ours),))]
        env.theta, loss = discriminator_step(env.theta, updater, ours, theirs)
        if t % 10 == 0:
            reached = mean_return(policy)
            print(f"iteration {t}: discriminator's loss {loss:.3f}, mean return {reached:.1f}")
    return mean_return(policy)


if __name__ == "__main__":
    print(f"mean return of 50 episodes {main():.1f}; the expert's is 500")

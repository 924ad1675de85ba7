"""Whether a finished imitator resembles its expert, which the true return cannot say."""

from __future__ import annotations

import torch
from torch import Tensor

from advgame.imitation.demonstrations import Demonstrations
from advgame.imitation.resemblance import held_out_discriminator
from advgame.seeding import derive_seed, stream
from agents.imitator import Imitator
from envs.imitation import ImitationVectorEnv

_THIN = 4  # a held-out discriminator sees every fourth pair: neighbours hardly differ


def resemblance(
    env: ImitationVectorEnv,
    player: Imitator,
    expert: Demonstrations,
    *,
    episodes: int = 12,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How well a fresh discriminator tells the finished policy from the expert.

    Args:
        env: whose task, scales, pairs and ends of episodes.
        player: the policy.
        expert: all trajectories that there are, 4 or more; the imitator may have learned from them.
        episodes: of the policy, fresh.
        seed: of their starts and of the discriminator.

    Returns:
        ``sampled`` and ``deterministic``, the policy's two ways to act: see
        `advgame.imitation.resemblance.held_out_discriminator`.

    Raises:
        InputError: fewer than 4 trajectories or episodes.
    """
    theirs, found = _trajectories(env, expert, seed), {}
    for name in ("sampled", "deterministic"):
        ours = _episodes(env, player, episodes, seed, name == "deterministic")
        thin = [one[::_THIN] for one in ours]
        found[name] = held_out_discriminator(thin, theirs, seed=seed)
    return found


def expert_halves(env: ImitationVectorEnv, expert: Demonstrations) -> list[float]:
    """What `resemblance` makes of the expert itself: held-out losses between two halves of it.

    Args:
        env: whose pairs and ends of episodes.
        expert: 8 trajectories or more.

    Returns:
        the loss between first and last half, and between every second trajectory and the others.

    Raises:
        InputError: fewer than 8 trajectories.
    """
    theirs, half = _trajectories(env, expert, 0), len(expert) // 2
    splits = ((theirs[:half], theirs[half:]), (theirs[::2], theirs[1::2]))
    return [held_out_discriminator(one, other)["loss"] for one, other in splits]


def _trajectories(env: ImitationVectorEnv, expert: Demonstrations, seed: int) -> list[Tensor]:
    """Encoded pairs of each of the expert's trajectories (n, inputs), thinned."""
    pairs = env.expert_pairs(expert, stream(seed, "resemblance"))
    lengths = env.code.horizons(expert, env.task.horizon)
    return [one[::_THIN] for one in pairs.split(lengths.tolist())]


def _episodes(
    env: ImitationVectorEnv, player: Imitator, episodes: int, seed: int, deterministic: bool
) -> list[Tensor]:
    """Encoded pairs of fresh episodes, one tensor (n, inputs) each."""
    fresh = ImitationVectorEnv(
        episodes,
        env_id=env.task_id,
        horizon=env.horizon,
        scale=(env.code.shift, env.code.scale),
        max_episode_steps=env.task.horizon,
    )
    seen, _ = fresh.reset(seed=derive_seed(seed, "resemblance") % 2**31)
    lengths = torch.full((episodes,), fresh.task.horizon)
    steps = []
    for t in range(fresh.task.horizon):
        actions = player.act(seen, deterministic=deterministic)
        steps.append(env.code.pairs(seen, actions))
        seen, _, terminated, truncated, _ = fresh.step(actions)
        lengths = torch.where(terminated | truncated, lengths.clamp(max=t + 1), lengths)
    rows = torch.stack(steps, 1)
    return [row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)]

"""How far a finished policy is from the expert: a fresh discriminator, judged on held-out episodes.

The true return says whether a task was solved, not whether the expert was imitated. A discriminator
that learns to convergence against the finished policy, and is judged on episodes that it has not
seen, bounds the distance between the two from below: 1 − loss / (2 log 2) is a lower bound of the
Jensen-Shannon divergence in bits, up to the noise of the held-out episodes.

Source: Goodfellow et al. 2014, theorem 1; Ho & Ermon 2016, section 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.imitation.discriminator import CHANCE_LOSS, Discriminator, imitation_loss
from advgame.seeding import stream

_EVERY, _PATIENCE = 20, 25  # steps between looks at validation; looks without a gain that end it


def held_out_discriminator(
    policy: Sequence[Tensor],
    expert: Sequence[Tensor],
    *,
    hidden: tuple[int, ...] = (64, 32),
    lr: float = 5e-3,
    steps: int = 3000,
    seed: int = 0,
) -> dict[str, float]:
    """Train discriminators on half of the episodes of both sides each, judge them on a quarter.

    The four quarters take turns: every episode is judged once, by who has not seen it.

    Args:
        policy: encoded pairs (n, inputs) of each of the policy's episodes.
        expert: of each of the expert's; 4 or more on either side. Of each side one half teaches,
            a quarter chooses the step, a quarter judges.
        hidden: widths of the fresh discriminator.
        lr: of Adam, on all pairs at once.
        steps: at most; it ends when 500 steps have brought nothing on the choosing quarter.
        seed: of its first weights.

    Returns:
        means over the four turns, of the judging episodes: ``loss`` (`CHANCE_LOSS` where the two
        cannot be told apart), ``accuracy`` (mean of both sides) and ``divergence``, bits; and
        ``steps`` until the choice.

    Raises:
        InputError: fewer than 4 episodes on a side.
    """
    if min(len(policy), len(expert)) < 4:
        raise InputError(
            f"a held-out discriminator needs 4 episodes of each side, not {len(policy)} of the "
            f"policy and {len(expert)} of the expert"
        )
    network = Discriminator(policy[0].shape[1], hidden)
    turns = []
    for turn in range(4):
        parts = zip(_parts(policy, turn), _parts(expert, turn), strict=True)
        theta = network.init(stream(seed, f"held-out discriminator {turn}"))
        turns.append(_one_turn(network, theta, *parts, lr=lr, steps=steps))
    return {name: sum(one[name] for one in turns) / len(turns) for name in turns[0]}


Sides = tuple[Tensor, Tensor]
"""Pairs of the policy and of the expert."""


def _one_turn(
    network: Discriminator,
    theta: Tensor,
    learn: Sides,
    choose: Sides,
    judge: Sides,
    *,
    lr: float,
    steps: int,
) -> dict[str, float]:
    theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr)
    best, found, kept = float("inf"), 0, theta.detach().clone()
    for step in range(steps + 1):
        if step % _EVERY == 0:
            with torch.no_grad():
                loss = float(_loss(network, theta, choose))
            if loss < best:
                best, found, kept = loss, step, theta.detach().clone()
            if step - found >= _EVERY * _PATIENCE:
                break
        optimizer.zero_grad()
        with torch.enable_grad():
            _loss(network, theta, learn).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(_loss(network, kept, judge))
        low, high = (network.logits(kept, side) for side in judge)
    right = ((low < 0).float().mean() + (high > 0).float().mean()) / 2
    return {
        "loss": loss,
        "accuracy": float(right),
        "divergence": 1 - loss / CHANCE_LOSS,
        "steps": float(found),
    }


def _parts(episodes: Sequence[Tensor], turn: int) -> list[Tensor]:
    """What teaches, chooses and judges in this turn: two quarters, the next, the one after."""
    bounds = [len(episodes) * quarter // 4 for quarter in range(5)]
    quarters = [list(episodes[low:high]) for low, high in itertools.pairwise(bounds)]
    one, two, choose, judge = (quarters[(turn + k) % 4] for k in range(4))
    return [torch.cat(part) for part in (one + two, choose, judge)]


def _loss(network: Discriminator, theta: Tensor, sides: Sides) -> Tensor:
    low, high = network.logits(theta, torch.cat(sides)).split([len(side) for side in sides])
    return imitation_loss(low, high)

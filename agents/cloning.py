"""Behaviour cloning: a policy fitted to demonstrations by maximum likelihood.

The baseline of Ho & Ermon (2016): Adam, minibatches, 70 % of the data to learn from and 30 % to
choose the snapshot by. Its policy is SB3's, so that it has the form of GAIL's and is evaluated
in the same way.
"""

from __future__ import annotations

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from advgame.errors import InputError


def clone(
    policy: ActorCriticPolicy,
    observations: Tensor,
    actions: Tensor,
    rng: torch.Generator,
    *,
    lengths: Tensor | None = None,
    iterations: int = 1001,
    batch_size: int = 128,
    lr: float = 1e-3,
    held_out: float = 0.3,
) -> dict[str, float]:
    """Fit ``policy`` in place; it ends with the weights of the best validation loss.

    Neighbours in a trajectory are almost equal, so that a held-out transition says little about
    states that were never visited. With ``lengths`` of two or more trajectories, whole ones are
    held out; a single one can only be split by transitions, and so is data without ``lengths``.

    Args:
        policy: its value function stays as it is.
        observations: float32 (N, d), scaled as the policy will see them.
        actions: int64 (N,) or float32 (N, k).
        rng: draws the split and the minibatches, on the CPU.
        lengths: int64 (T,), transitions of each trajectory.
        iterations: steps of Adam.
        batch_size: transitions per step, drawn with replacement.
        lr: of Adam.
        held_out: share that validates.

    Returns:
        ``bc/train_loss`` and ``bc/validation_loss`` of the chosen snapshot, in nats per
        transition, and ``bc/best_iteration``, the number of steps it took.

    Raises:
        InputError: data that cannot be split, do not fit together or hold NaN; wrong settings.
    """
    _check_data(observations, actions, lengths)
    if iterations < 1 or batch_size < 1:
        raise InputError(
            f"iterations and batch_size must be 1 or above, not {iterations} and {batch_size}"
        )
    if not 0 < held_out < 1 or lr <= 0:
        raise InputError(
            f"held_out must lie between 0 and 1 and lr above 0, not {held_out} and {lr}"
        )
    groups = lengths if lengths is not None and len(lengths) > 1 else None
    learn, validate = _split(len(observations), groups, held_out, rng)
    observations, actions = observations.to(policy.device), actions.to(policy.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)

    def loss(chosen: Tensor) -> Tensor:
        chosen = chosen.to(policy.device)
        log_prob: Tensor = policy.evaluate_actions(observations[chosen], actions[chosen])[1]
        return -log_prob.mean()

    def validation_loss() -> float:
        with torch.no_grad():
            return float(loss(validate))

    best, taken, snapshot = validation_loss(), 0, _weights(policy)
    for iteration in range(1, iterations + 1):
        drawn = torch.randint(len(learn), (batch_size,), generator=rng)
        optimizer.zero_grad()
        loss(learn[drawn]).backward()
        optimizer.step()
        now = validation_loss()
        if now < best:
            best, taken, snapshot = now, iteration, _weights(policy)
    policy.load_state_dict(snapshot)
    with torch.no_grad():
        learnt = float(loss(learn))
    return {"bc/train_loss": learnt, "bc/validation_loss": best, "bc/best_iteration": float(taken)}


def _weights(policy: ActorCriticPolicy) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def _split(
    count: int, groups: Tensor | None, held_out: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices to learn from and indices to validate with, at least one group of each."""
    sizes = torch.ones(count, dtype=torch.int64) if groups is None else groups.cpu()
    order = torch.randperm(len(sizes), generator=rng)
    away = min(max(round(held_out * len(sizes)), 1), len(sizes) - 1)
    validates = torch.zeros(len(sizes), dtype=torch.bool)
    validates[order[:away]] = True
    mask = validates.repeat_interleave(sizes)
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)


def _check_data(observations: Tensor, actions: Tensor, lengths: Tensor | None) -> None:
    count = len(observations)
    if count < 2 or len(actions) != count:
        raise InputError(
            f"cloning needs 2 or more observations and as many actions, not {count} and "
            f"{len(actions)}"
        )
    if not bool(torch.isfinite(observations).all() and torch.isfinite(actions).all()):
        raise InputError("demonstrations contain NaN or infinity")
    if lengths is not None and (int(lengths.min()) < 1 or int(lengths.sum()) != count):
        raise InputError(
            f"lengths must be 1 or more and sum to the {count} observations, not {lengths.tolist()}"
        )

"""State-action pairs as the discriminator sees them, of the policy and of the demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations


@dataclass(frozen=True)
class PairCode:
    """How observations and actions become numbers, the same for policy and discriminator.

    Args:
        shift: (d,), subtracted from raw observations.
        scale: (d,), by which the rest is divided.
        choices: number of discrete actions, which are one-hot; 0 for actions (B, k) of a box.
        action_size: number of an action's features: ``choices``, or k.
        absorbing: observations carry a flag, as their last entry, that says that the episode is
            over (Kostrikov et al. 2019). There the rest of the pair is zero: nothing but the
            flag can tell the policy's absorbing pairs from the expert's.
    """

    shift: Tensor
    scale: Tensor
    choices: int
    action_size: int
    absorbing: bool

    @property
    def observation_size(self) -> int:
        """How many numbers an encoded observation has."""
        return len(self.shift) + self.absorbing

    @property
    def pair_size(self) -> int:
        """How many numbers an encoded state-action pair has."""
        return self.observation_size + self.action_size

    def observe(self, raw: Tensor, over: Tensor | None = None) -> Tensor:
        """Encode observations.

        Args:
            raw: (B, d), the task's own.
            over: bool (B,), where the episode is over; only with ``absorbing``.

        Returns:
            float32 (B, observation_size).
        """
        shift, scale = self.shift.to(raw.device), self.scale.to(raw.device)
        seen = ((raw - shift) / scale).float()
        if not self.absorbing:
            return seen
        flag = torch.zeros(len(raw), 1, device=raw.device) if over is None else over[:, None]
        return torch.cat([torch.where(flag.bool(), 0.0, seen), flag.float()], 1)

    def pairs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Encode pairs.

        Args:
            observations: (B, observation_size), encoded.
            actions: (B,) integers, or (B, k).

        Returns:
            float32 (B, pair_size).
        """
        coded = F.one_hot(actions.long(), self.choices) if self.choices else actions
        coded = coded.float()
        if self.absorbing:
            coded = coded * (1 - observations[:, -1:])
        return torch.cat([observations, coded], 1)

    def expert_pairs(
        self, demonstrations: Demonstrations, horizon: int, every: int, rng: torch.Generator
    ) -> Tensor:
        """The demonstrations' pairs, in trajectories of `horizons`.

        Args:
            demonstrations: raw observations and actions.
            horizon: steps after which an episode is cut off.
            every: keep every so many pairs of each trajectory, from a random one of the first on.
            rng: draws where each trajectory begins.

        Returns:
            (E, pair_size).

        Raises:
            InputError: the demonstrations are of another task, or ``every`` leaves a trajectory
                empty.
        """
        lengths = self.horizons(demonstrations, horizon)
        parts = self._thinned(demonstrations, lengths, every, rng)
        return torch.cat([self.pairs(seen, actions) for seen, actions in parts])

    def horizons(self, demonstrations: Demonstrations, horizon: int) -> Tensor:
        """How many pairs of each trajectory an environment of this horizon would see, (T,).

        It would cut longer ones off. With ``absorbing``, those that the task ended rest in the
        absorbing state until the horizon; those that were cut off earlier stay as short.

        Args:
            demonstrations: whose lengths and ends.
            horizon: steps after which an episode is cut off.
        """
        ends = demonstrations.terminated & self.absorbing
        return torch.where(ends, horizon, demonstrations.lengths.clamp(max=horizon))

    def expert_steps(
        self, demonstrations: Demonstrations, every: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same part of the demonstrations for who learns from them without a discriminator.

        Args:
            demonstrations: raw observations and actions.
            every: as in `expert_pairs`.
            rng: as in `expert_pairs`.

        Returns:
            encoded observations (N, observation_size), actions, lengths (T,) of what was kept.

        Raises:
            InputError: of another task, or a trajectory shorter than ``every``.
        """
        parts = self._thinned(demonstrations, demonstrations.lengths, every, rng)
        seen, actions = zip(*parts, strict=True)
        return torch.cat(seen), torch.cat(actions), torch.tensor([len(one) for one in seen])

    def _thinned(
        self, demonstrations: Demonstrations, lengths: Tensor, every: int, rng: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Encoded observations and actions kept of trajectories cut or padded to lengths (T,)."""
        parts = []
        for number, length in enumerate(demonstrations.lengths.tolist()):
            raw, actions = demonstrations.trajectory(number)
            self._check(raw, actions)
            most = int(lengths[number])
            if every > most:
                raise InputError(
                    f"trajectory {number} has {length} of at most {most} steps: "
                    f"every {every}th of it cannot be kept"
                )
            first = int(torch.randint(every, (), generator=rng))
            chosen = torch.arange(first, most, every)
            last = chosen.clamp(max=length - 1)
            parts.append((self.observe(raw[last], chosen >= length), actions[last]))
        return parts

    def _check(self, raw: Tensor, actions: Tensor) -> None:
        known = (
            actions.dim() == 1
            and not actions.is_floating_point()
            and int(actions.max()) < self.choices
            if self.choices
            else actions.dim() == 2 and actions.shape[1] == self.action_size
        )
        if raw.shape[1] != len(self.shift) or not known:
            size = self.action_size
            mine = (
                f"choices from 0 to {size - 1}" if self.choices else f"actions of shape ({size},)"
            )
            fits = raw.shape[1] == len(self.shift) and actions.dim() == 1 and self.choices
            if fits and not actions.is_floating_point():
                raise InputError(
                    f"the demonstrations have actions from {int(actions.min())} to "
                    f"{int(actions.max())}: this task has {mine}"
                )
            raise InputError(
                f"the demonstrations have observations of size {raw.shape[1]} and actions of shape "
                f"{tuple(actions.shape[1:])}: they belong to another task, this one has "
                f"observations of size {len(self.shift)} and {mine}"
            )

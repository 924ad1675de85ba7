"""`TrainingVectorEnv`: an environment in which a classifier learns from what the rows play."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
from torch import Tensor

from advgame.data import Batches, ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.seeding import PrivateRNG, derive_seed, stream
from envs.pictures import PicturedVectorEnv
from envs.standard import check_fit, check_reset


class TrainingVectorEnv(PicturedVectorEnv[Tensor]):
    """The rows are images of a training batch; one defender, which it owns, learns from them all.

    A seeded reset restores the defender as it was when the environment was made, the order of the
    data and all streams; one without a seed goes on.
    """

    defender: Defender
    data: ImageSet
    _batches: Batches | None = None

    def _own(self, batch_size: int, *, crop: bool, flip: bool, setting: str = "num_envs") -> None:
        """Keep what a seeded reset restores of ``defender``.

        Args:
            batch_size: B, images per step of the defender and process.
            crop: random crops.
            flip: random flips.
            setting: which says how large B is.

        Raises:
            InputError: more than there are images.
        """
        most = len(self.data) // self.defender.fabric.world_size
        if batch_size > most:
            raise InputError(
                f"{setting} must lie in 1..{most} for {len(self.data)} training images on "
                f"{self.defender.fabric.world_size} process(es), not {batch_size}"
            )
        self.batch_size, self.crop, self.flip = batch_size, crop, flip
        self._initial = copy.deepcopy(
            (self.defender.module.state_dict(), self.defender.state_dict())
        )

    def _reset_training(self, seed: int | None, options: dict[str, Any] | None) -> None:
        """Gymnasium's part of a reset; the training from its beginning where that is due."""
        seed = check_reset(seed, options, "the environments share one defender")
        super().reset(seed=seed)
        if seed is not None or self._batches is None:
            self._begin(seed if seed is not None else int(self.np_random.integers(2**31)))

    def _begin(self, seed: int) -> None:
        fabric, device = self.defender.fabric, self.defender.device
        weights, own = copy.deepcopy(self._initial)
        self.defender.module.load_state_dict(weights)
        check_fit(self.defender, self.data)
        self.defender.load_state_dict(own)
        self._batches = Batches(
            self.data,
            self.batch_size,
            seed,
            crop=self.crop,
            flip=self.flip,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        self._rng = stream(seed, f"attack{fabric.global_rank}", device)
        dropout = derive_seed(seed, f"dropout{fabric.global_rank}")
        self._chance = PrivateRNG(dropout, device)
        self.steps = 0

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,)."""
        assert self._batches is not None
        return self._batches.next()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training images."""
        return len(self.data) // (self.batch_size * self.defender.fabric.world_size)

    def _check_begun(self, call: str) -> None:
        if self._batches is None:
            raise gym.error.ResetNeeded(f"call reset() before {call}()")

    def state_dict(self) -> dict[str, Any]:
        """A copy of the training's place: optimiser, data order and streams.

        Not the classifier's weights: they are ``defender.module.state_dict()``.
        """
        self._check_begun("state_dict")
        assert self._batches is not None
        return {
            "defender": copy.deepcopy(self.defender.state_dict()),  # its tensors are live
            "batches": self._batches.state_dict(),
            "rng": self._rng.get_state(),
            "chance": self._chance.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copy of a saved place; call ``reset(seed=…)`` first.

        Weights are loaded apart.
        """
        self._check_begun("load_state_dict")
        assert self._batches is not None
        self.defender.load_state_dict(state["defender"])
        self._batches.load_state_dict(state["batches"])
        self._rng.set_state(state["rng"])
        self._chance.load_state_dict(state["chance"])
        self.steps = state["steps"]

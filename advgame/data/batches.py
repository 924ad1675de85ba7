"""The stream of training batches, and augmentation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advgame.data.images import ImageSet
from advgame.errors import InputError
from advgame.seeding import stream


def augment(images: Tensor, rng: torch.Generator, *, flip: bool, pad: int = 4) -> Tensor:
    """Random crop after zero padding and random horizontal flip, each image by its own draw.

    Args:
        images: (B, C, H, W), any type; nothing leaves the device.
        rng: stream of the draws, on the images' device.
        flip: whether to flip (digits must not).
        pad: pixels of zero padding on every side.
    """
    batch, _, height, width = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pad + 1, (2, batch), generator=rng, device=device)
    rows = shift[0, :, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        coin = torch.rand(batch, 1, generator=rng, device=device) < 0.5
        columns = torch.where(coin, width - 1 - columns, columns)
    columns = shift[1, :, None] + columns
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(batch, device=device)[:, None, None]
    # advanced indices around a slice move to the front: (B, H, W, C)
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Batches:
    """An endless stream of training batches, epoch after epoch without replacement.

    Every epoch is a fresh permutation; the last incomplete batch of an epoch is dropped. With
    several processes each draws its own share of the same permutation. The stream's place is
    part of `state_dict`, so that a resumed run sees the same batches.

    Args:
        data: the training images, on the device.
        batch_size: B, images per batch and process.
        seed: seed of the order (equal on all processes) and of the augmentation.
        crop: pad by 4 pixels and crop.
        flip: flip half of the images horizontally (only with ``crop``).
        rank: this process' number.
        world: number of processes.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        *,
        crop: bool = False,
        flip: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 1 <= batch_size * world <= len(data):
            raise InputError(
                f"batch size must lie in 1..{len(data) // world} for {len(data)} training "
                f"images on {world} process(es), not {batch_size}"
            )
        self.data, self.batch_size, self.crop, self.flip = data, batch_size, crop, flip
        self.rank, self.world = rank, world
        self._order_rng = stream(seed, "order")
        self._crop_rng = stream(seed, f"augment{rank}", data.images.device)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def __len__(self) -> int:
        return len(self.data) // (self.batch_size * self.world)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch: float images (B, C, H, W) in [0, 1] and labels (B,)."""
        if self._position >= len(self) or not len(self._order):
            order = torch.randperm(len(self.data), generator=self._order_rng)
            # once an epoch: each copy of a batch's own part would have the host wait for the device
            self._order = order.to(self.data.images.device)
            self._position = 0
        start = (self._position * self.world + self.rank) * self.batch_size
        self._position += 1
        index = self._order[start : start + self.batch_size]
        images = self.data.images[index]
        if self.crop:
            images = augment(images, self._crop_rng, flip=self.flip)
        return images.float().div_(255), self.data.labels[index]

    def state_dict(self) -> dict[str, Tensor | int]:
        """The order, the place in it, and the states of both random streams."""
        return {
            "order": self._order,
            "position": self._position,
            "order_rng": self._order_rng.get_state(),
            "crop_rng": self._crop_rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._order = state["order"].to(self.data.images.device)
        self._position = state["position"]
        self._order_rng.set_state(state["order_rng"])
        self._crop_rng.set_state(state["crop_rng"])

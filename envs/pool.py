"""The images that an attack environment draws from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import check_classifier
from advgame.losses import margin
from advgame.seeding import stream


class Pool:
    """The images that a classifier gets right, drawn one after the other, epoch after epoch.

    Images that are misclassified as they are leave no attack to learn: they are left out.

    Args:
        model: frozen classifier.
        data: images and labels, on its device.

    Raises:
        InputError: images that the classifier cannot take, logits that cannot be attacked, or no
            image that is classified correctly.
    """

    def __init__(self, model: nn.Module, data: ImageSet) -> None:
        check_classifier(model, data)
        with torch.no_grad():
            parts = torch.arange(len(data), device=data.images.device).split(500)
            margins = torch.cat(
                [margin(model(data.floats(part)), data.labels[part]) for part in parts]
            )
        right = margins < 0
        if not bool(right.any()):
            raise InputError("the classifier gets none of these images right: nothing to attack")
        self.data = data.subset(right)
        self.scale = float(-margins[right].mean())
        """Mean clean margin of the images, in logits: the unit of the reward's gain."""
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start anew with the order of ``seed``."""
        self._rng = stream(seed, "order")
        self._order = torch.empty(0, dtype=torch.int64)

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next images (count, C, H, W) in [0, 1] and their labels (count,)."""
        while len(self._order) < count:
            more = torch.randperm(len(self.data), generator=self._rng)
            self._order = torch.cat([self._order, more])
        index, self._order = self._order[:count], self._order[count:]
        index = index.to(self.data.images.device)
        return self.data.floats(index), self.data.labels[index]

    def state_dict(self) -> dict[str, Any]:
        """The place in the order."""
        return {"order": self._order, "rng": self._rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._order = state["order"]
        self._rng.set_state(state["rng"])

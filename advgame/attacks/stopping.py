"""`StoppingRule`: decides, image by image and while an attack runs, when its steps end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from advgame.threat import Threat


class Seen(NamedTuple):
    """What a rule sees of the n images that still move, before a step.

    Attributes:
        rows: (n,) their places in the batch, which they keep for the whole attack. Where images
            have their own number of steps the batch is sorted by it, most first.
        delta: (n, C, H, W) their perturbations so far.
        threat: their balls; radii (n,) where they have their own.
        logits: (n, K) at these points.
        loss: (n,) at these points: what the attack ascends.
        y: (n,) labels.
        done: steps made so far, by each of them.
        limit: steps of the batch's longest attack.
    """

    rows: Tensor
    delta: Tensor
    threat: Threat
    logits: Tensor
    loss: Tensor
    y: Tensor
    done: int
    limit: int


class StoppingRule(ABC):
    """Ends the attack on each image of a batch; it may learn from batch to batch.

    Attacks that a rule watches ask `stop` at every iterate, after its forward and backward pass.
    """

    last_step: bool
    """whether an image that stops still takes the step whose gradient is paid for"""

    def begin(self, images: int) -> None:
        """A new batch of so many images."""
        return

    @abstractmethod
    def stop(self, seen: Seen) -> Tensor:
        """Which images end here, (n,) bool."""

    def end(self, steps: Tensor) -> None:
        """The attack on the batch is over.

        Args:
            steps: (B,) int64 that each image made, at the places that `Seen.rows` names.
        """
        return

    def stats(self) -> dict[str, Tensor]:
        """Scalars to log of the last batch, by tag."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        return

"""`Examples`: pictures of adversarial examples in TensorBoard while a classifier learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from advgame.run.callback import Callback

if TYPE_CHECKING:
    from advgame.data import ImageSet
    from advgame.run.loop import Trainer
    from advgame.threat import Threat

EVERY = 5
"""Epochs between two pictures; the last epoch has one, too."""


class Examples(Callback):
    """Clean images, PGD-10's examples and their perturbations, every few epochs.

    Args:
        images: a few, on the classifier's device.
        threat: the ball.
        seed: of the attack's start; the training's own streams are left alone.
    """

    def __init__(self, images: ImageSet, threat: Threat, seed: int) -> None:
        self.images, self.threat, self.seed = images, threat, seed

    @override
    def on_epoch_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Attack what will be judged, and show it; the process that writes the run does."""
        from advgame.attacks import pgd
        from advgame.run.curves import image_grid
        from advgame.seeding import stream

        epoch = int(metrics["epoch"])
        if trainer.curves is None or not (epoch % EVERY == 0 or trainer.over):
            return
        x, y = self.images.floats(), self.images.labels
        rng = stream(self.seed, "examples", x.device)
        x_adv = pgd(self.threat, 10).perturb(trainer.judged, x, y, rng=rng)
        trainer.curves.image("training", image_grid(x, x_adv, self.threat), trainer.step)

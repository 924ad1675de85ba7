"""How long and with what schedule a learner learns."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from advgame.errors import InputError


@dataclass(frozen=True)
class TrainingPlan:
    """How long and with what schedule the learner learns.

    Args:
        epochs: passes over the training images.
        schedule: ``"onecycle"`` (cosine warm-up over 30 %, cosine down), ``"multistep"``
            (times ``gamma`` at each of ``milestones``) or ``"constant"``; per step.
        milestones: shares of all steps.
        gamma: factor at a milestone.
        ema: decay of the exponential moving average of the weights; None keeps no average. After t
            steps it is at most (1 + t) / (10 + t), as in TensorFlow, so that a short training does
            not judge the weights that it began at. The average is what is validated, selected
            and reported.
        validate_every: epochs between validations; the last epoch is always validated.
        save_every: epochs between checkpoints; there is always one at the end and on a signal.
        budget: forwards of the defender per training image, as the game counts them
            (`advgame.games.costs.Passes`), that the training may cost. It ends at the step
            that comes nearest, ``epochs`` say nothing, and every schedule follows the share that
            is spent, so that players whose steps cost more make fewer. None goes by epochs.
        prices: of a budget: what an input-backward and a backward with weights cost, in forwards.
    """

    epochs: int
    schedule: Literal["onecycle", "multistep", "constant"] = "onecycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    ema: float | None = None
    validate_every: int = 1
    save_every: int = 1
    budget: float | None = None
    prices: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        if min(self.epochs, self.validate_every, self.save_every) < 1:
            raise InputError("epochs, validate_every and save_every must be 1 or above")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise InputError(f"budget must be a number above 0, not {self.budget}")
        if not all(0 < price < math.inf for price in self.prices):
            raise InputError(f"prices must be numbers above 0, not {self.prices}")
        if self.schedule not in ("onecycle", "multistep", "constant"):
            raise InputError(f"unknown schedule {self.schedule!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema must lie between 0 and 1, not {self.ema}")
        if not all(0 < share < 1 for share in self.milestones):
            raise InputError(f"milestones are shares between 0 and 1, not {self.milestones}")

    def fixed(self) -> dict[str, Any]:
        """What a training that goes on must have as it began, for its schedule and its average.

        A constant rate may go on for more epochs. How often it is validated and saved is free.
        """
        names = ["schedule", "milestones", "gamma", "ema", "budget", "prices"]
        if self.schedule != "constant" and self.budget is None:
            names.append("epochs")
        words = json.dumps({name: getattr(self, name) for name in names}, default=float)
        found: dict[str, Any] = json.loads(words)  # plain values, also of NumPy's numbers
        return found

    def scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> LRScheduler:
        """The learning-rate schedule over ``total`` steps."""
        if self.schedule == "onecycle":
            peak = optimizer.param_groups[0]["lr"]
            return OneCycleLR(optimizer, peak, total_steps=total + 1, cycle_momentum=False)
        milestones = [round(share * total) for share in self.milestones]
        drops = milestones if self.schedule == "multistep" else []
        return MultiStepLR(optimizer, drops, gamma=self.gamma)

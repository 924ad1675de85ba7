"""Learning progress: how far the held-out robust loss falls per forward that was spent.

    (L_held(θ) - L_held(θ')) / F

θ is the defender at the last measurement, θ' at this one, F the forwards per training image in
between. Bandits that choose what a network learns from are paid by the fall of the loss on other
examples, over the time that it took: the target prediction gain of Graves et al., Automated
Curriculum Learning for Neural Networks (ICML 2017), here under attack.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from advgame.attacks import pgd
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import Passes
from advgame.losses import cross_entropy
from advgame.seeding import stream
from advgame.threat import Threat


class LearningProgress:
    """Measures L_held, the mean loss under PGD from the same starts every time, and its fall.

    A measurement costs an attack on the held-out images, which is counted.

    Args:
        held_out: images that the defender does not learn from, and no test images either.
        threat: the ball.
        steps: of PGD at step size ε/4.
        weight: of the fall, per nat and forward; a batch's is thousandths.
    """

    def __init__(
        self, held_out: ImageSet, threat: Threat, steps: int = 10, weight: float = 1000.0
    ) -> None:
        if not isinstance(held_out, ImageSet) or not len(held_out):
            raise InputError(
                "learning progress needs held-out images, such as load_data(...).validation"
            )
        self.held_out, self.attack, self.weight = held_out, pgd(threat, steps), weight
        self._level: float | None = None
        self._spent = 0.0

    @property
    def level(self) -> float:
        """L_held when it was last measured; before that log K, of a network that knows nothing."""
        return math.log(self.held_out.classes) if self._level is None else self._level

    def measure(self, defender: Defender, batch: int, passes: Passes) -> float:
        """L_held of the defender as it is.

        Args:
            defender: the classifier; left in evaluation mode.
            batch: training images among which the cost is shared out.
            passes: what it costs is added.
        """
        held = self.held_out.to(defender.device)
        x, y = held.floats(), held.labels
        rng, module = stream(0, "held out", x.device), defender.module
        with defender.under_attack():
            made = self.attack.run(module, x, y, rng=rng, check=False)
            module.eval()
            with torch.no_grad():
                loss = cross_entropy(module(made.x_adv), y).mean()
        passes.forwards += (made.forwards + len(x)) / batch
        passes.input_backwards += made.backwards / batch
        return float(loss)

    def begin(self, defender: Defender, batch: int, passes: Passes) -> None:
        """Before a step of the defender: the first measurement, if there was none."""
        if self._level is None:
            unmeasured = passes.worth()
            self._level = self.measure(defender, batch, passes)
            self._spent = unmeasured - passes.worth()  # the measurement is not in F

    def spend(self, passes: Passes) -> None:
        """After a step of the defender: what it cost."""
        self._spent += passes.worth()

    def pay(self, defender: Defender, batch: int, passes: Passes) -> float:
        """The fall per forward since it was last paid; measurements are not in F.

        Args:
            defender: after its step.
            batch: as in `measure`.
            passes: as in `measure`.
        """
        old, forwards = self.level, self._spent
        self._level, self._spent = self.measure(defender, batch, passes), 0.0
        return self.weight * (old - self._level) / forwards

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next pay depends on."""
        return {"level": self._level, "spent": self._spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._level, self._spent = state["level"], state["spent"]

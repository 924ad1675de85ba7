"""How good a learned attacker is on images that it was not trained on, beside PGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from advgame.attacks import Attack, attacked, pgd
from advgame.attacks.gradient_steps import Menu
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.losses import margin
from advgame.seeding import stream
from advgame.targets import Target
from advgame.threat import Threat
from agents.attacker import Attacker
from agents.policies import FeaturePolicy
from agents.sb3 import as_feature_policy


@dataclass(frozen=True)
class Payoff:
    """The weights of an attack environment's reward."""

    gain: float
    bonus: float
    price: float


class Validation:
    """Success and margin on held-out training images, and PGD's with the same queries.

    Args:
        targets: classifiers to attack.
        images: the validation split, on their device.
        budgets: queries.
        menu: of the attacker.
        payoff: the reward's weights.
        seed: of PGD's starts and of random jumps.

    Raises:
        InputError: a classifier that has none of the images right.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        images: ImageSet,
        budgets: Sequence[int],
        menu: Menu,
        payoff: Payoff,
        seed: int,
    ) -> None:
        self.budgets, self.menu, self.payoff, self.seed = tuple(budgets), menu, payoff, seed
        self.cases = []
        for one in targets:
            x, y = images.floats(), images.labels
            with attacked(one.model), torch.no_grad():
                clean = margin(one.model(x), y)
            right = clean < 0
            if not bool(right.any()):
                raise InputError(
                    f"{one.name} has none of the {len(x)} validation images right, and only those "
                    "are attacked: a better classifier, its own data set, or more --validation-n"
                )
            self.cases.append((one, x[right], y[right], clean[right]))
        success, gain, _ = self._scores(
            lambda ball, queries: replace(pgd(ball, queries - 1), stop_when_fooled=True)
        )
        self.pgd = {"eval/pgd": success, "eval/pgd_gain": gain}

    def attacker(self, module: nn.Module) -> Attacker:
        """The policy of either learner, as an attack."""
        policy = (
            module
            if isinstance(module, FeaturePolicy)
            else as_feature_policy(module, self.menu.sizes)  # type: ignore[arg-type]
        )
        return Attacker(policy, self.menu, "clean", {})

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """What the training loop logs and selects by."""
        success, gain, spent = self._scores(self.attacker(module).attack)
        weights = self.payoff
        total = weights.gain * gain + weights.bonus * success - weights.price * spent
        scores = {"eval/success": success, "eval/gain": gain, "eval/return": total}
        return scores | self.pgd

    def _scores(self, make: Callable[[Threat, int], Attack]) -> tuple[float, float, float]:
        """Success, margin gained over the mean clean margin, queries: means over all."""
        found = []
        for one, x, y, clean in self.cases:
            for queries in self.budgets:
                rng = stream(self.seed, "validate", x.device)
                result = make(one.threat, queries).run(one.model, x, y, rng=rng, check=False)
                with attacked(one.model), torch.no_grad():
                    reached = margin(one.model(result.x_adv), y)
                assert result.fooled is not None
                success = result.fooled.float().mean()
                gain = (reached.clamp_max(0) - clean).mean() / -clean.mean()
                spent = result.forwards / len(x)
                found.append((float(success), float(gain), spent))
        means = [sum(values) / len(found) for values in zip(*found, strict=True)]
        return means[0], means[1], means[2]

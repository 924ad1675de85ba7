"""Attacks made on something else than the classifier: on a surrogate, or on its mean logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.errors import InputError


@dataclass(frozen=True)
class Transfer(Attack):
    """Adversarial examples of another classifier, for a black-box judgement of this one.

    The classifier itself is not asked anything.

    Args:
        attack: made with the surrogate's gradients.
        surrogate: e.g. the same network trained with another seed.
    """

    attack: Attack
    surrogate: nn.Module

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        made = self.attack.run(self.surrogate, x, y, rng=rng, check=check)
        return AttackResult(made.x_adv, None, None, made.forwards, made.backwards)


class ExpectedLogits(nn.Module):
    """The mean logits of several passes: expectation over a randomised classifier's own chance.

    Attack this in place of the model (Athalye et al. 2018, EoT), and judge the model.

    Args:
        model: a classifier whose passes differ.
        passes: how many are averaged.
    """

    def __init__(self, model: nn.Module, passes: int = 20) -> None:
        super().__init__()
        if passes < 1:
            raise InputError(f"EoT needs 1 pass or more, not {passes}")
        self.model, self.passes = model, passes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        logits: Tensor = torch.stack([self.model(x) for _ in range(self.passes)]).mean(0)
        return logits


@dataclass(frozen=True)
class EoT(Attack):
    """An attack on the mean logits of several passes.

    Args:
        attack: any.
        passes: how many passes make one.
    """

    attack: Attack
    passes: int = 20

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        made = self.attack.run(ExpectedLogits(model, self.passes), x, y, rng=rng, check=check)
        calls = (made.forwards * self.passes, made.backwards * self.passes)
        return AttackResult(made.x_adv, made.loss, made.fooled, *calls)

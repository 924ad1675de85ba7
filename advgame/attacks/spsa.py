"""SPSA: an attack along gradients estimated from the classifier's outputs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.checks import check_labels, check_logits
from advgame.errors import InputError
from advgame.losses import clipped_margin, misclassified
from advgame.threat import Threat


@dataclass(frozen=True)
class SPSA(Attack):
    """Adam along gradients estimated from pairs of random sign vectors (Uesato et al. 2018).

    The loss is the margin clipped at κ = 50, as in Dong et al. 2020 (ADT). Images go one at a
    time, and the first success ends an image.

    Args:
        threat: the ball.
        iterations: gradient estimates per image.
        samples: forwards per estimate, half of them mirrored.
        delta: distance of the samples, in pixels.
        lr: of Adam.
        batch: forwards at a time.

    Raises:
        InputError: no iteration, no pair of samples, or a distance or rate that is not above 0.
    """

    threat: Threat
    iterations: int = 100
    samples: int = 256
    delta: float = 1e-3
    lr: float = 0.01
    batch: int = 512

    def __post_init__(self) -> None:
        if self.iterations < 1 or min(self.samples, self.batch) < 2:
            raise InputError(
                "SPSA needs 1 iteration and a pair of samples in each batch, not iterations "
                f"{self.iterations}, samples {self.samples}, batch {self.batch}"
            )
        if not (0 < self.delta < math.inf and 0 < self.lr < math.inf):
            raise InputError(
                f"SPSA's delta and lr must be finite and above 0, not {self.delta} and {self.lr}"
            )

    def _draws(self) -> str:
        return "SPSA, which draws its samples,"

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        assert rng is not None
        # half precision does not see a difference of δ
        with attacked(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if check:  # one forward that is not counted
                check_labels(y, len(x), check_logits(model(x[:1]), y[:1]))
            parts = [self._one(model, x[i : i + 1], y[i : i + 1], i, rng) for i in range(len(x))]
        x_adv = torch.cat([part[0] for part in parts])
        fooled = torch.tensor([part[1] for part in parts], device=x.device)
        return AttackResult(x_adv, None, fooled, sum(part[2] for part in parts), 0)

    def _one(
        self, model: nn.Module, x: Tensor, y: Tensor, row: int, rng: torch.Generator
    ) -> tuple[Tensor, bool, int]:
        ball = self.threat.select(slice(row, row + 1))
        # one private stream per image: its samples do not depend on when the others ended
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        own = torch.Generator(x.device).manual_seed(seed)
        x_adv, forwards = x.clone(), 0
        adam = torch.optim.Adam([x_adv], lr=self.lr)
        for _ in range(self.iterations):
            fooled = bool(misclassified(model(x_adv), y))
            forwards += 1
            if fooled:
                return x_adv, True, forwards
            x_adv.grad = -self._estimate(model, x_adv, y, own)
            forwards += 2 * (self.samples // 2)
            adam.step()
            x_adv.copy_(ball.project(x_adv, x))
        return x_adv, bool(misclassified(model(x_adv), y)), forwards + 1

    def _estimate(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """(f(x + δv) - f(x - δv)) / 2δ · v, averaged over sign vectors v, (1, C, H, W)."""
        total, left = torch.zeros_like(x), self.samples // 2
        while left:
            n = min(left, self.batch // 2)
            left -= n
            shape = (n, *x.shape[1:])
            v = torch.randint(0, 2, shape, generator=rng, device=x.device).to(x) * 2 - 1
            logits = model(torch.cat([x + self.delta * v, x - self.delta * v]))
            up, down = clipped_margin(logits, y.expand(2 * n), 50.0).chunk(2)
            total += ((up - down).view(-1, 1, 1, 1) * v).sum(0, keepdim=True)
        return total / (2 * self.delta * (self.samples // 2))

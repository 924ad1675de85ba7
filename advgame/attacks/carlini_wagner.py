"""The L∞ attack of Carlini & Wagner 2017, section VI-C, with Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.attacks.input_gradients import finite, input_gradient
from advgame.checks import check_logits
from advgame.errors import InputError
from advgame.losses import margin, misclassified
from advgame.threat import Linf, per_image


@dataclass(frozen=True)
class CarliniWagnerLinf(Attack):
    """Minimise  c · max(z_y - max_(k≠y) z_k, 0) + Σ max(|δ| - τ, 0)  for ever smaller τ.

    c rises tenfold until the image is misclassified with no pixel beyond τ, then τ falls to
    ``decay`` times what was needed. An image succeeds as soon as it is misclassified within the
    ball; as in the L2L paper's evaluation one that never does is returned clean, so that its
    accuracy can exceed PGD's. Settings are those of that paper's code. Pixels that are black or
    white hardly move: in the space of arctanh they have next to no gradient.

    Args:
        threat: the L∞ ball.
        iterations: Adam steps for each c and τ.
        lr: of Adam, in the space of arctanh(2x - 1).
        first_c: the smallest c.
        largest_c: no c beyond it is tried.
        decay: of τ.
        smallest_tau: an image that is not within the ball by then has failed.
    """

    threat: Linf
    iterations: int = 50
    lr: float = 5e-3
    first_c: float = 1e-5
    largest_c: float = 100.0
    decay: float = 0.9
    smallest_tau: float = 1 / 256

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError("this attack of Carlini & Wagner is for the Linf norm only")

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        with attacked(model):
            return _Search(self, model, x, y).run(check)


class _Search:
    """Every image has its own c and τ; those that are done leave the batch."""

    def __init__(self, attack: CarliniWagnerLinf, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.attack, self.model, self.x, self.y = attack, model, x, y
        self.eps = torch.as_tensor(attack.threat.eps).to(x).expand(len(x))
        self.adv = x.clone()  # where each image's search stands
        self.tau = x.new_ones(len(x))
        self.c = x.new_full((len(x),), attack.first_c)
        self.forwards = self.backwards = 0

    def run(self, check: bool) -> AttackResult:
        attack = self.attack
        with torch.no_grad():
            logits = self.model(self.x)
        if check:
            check_logits(logits, self.y)
        self.within = misclassified(logits, self.y)
        self.forwards += len(self.x)
        rows = (~self.within).nonzero()[:, 0]
        while len(rows):
            found, adv = self._descend(rows)
            size = (adv - self.x[rows]).abs().flatten(1).amax(1)
            inside = found & (size <= self.eps[rows])
            self.adv[rows[found]] = adv[found]
            self.within[rows[inside]] = True
            self.tau[rows[found]] = attack.decay * torch.minimum(self.tau[rows], size)[found]
            self.c[rows[~found]] *= 10
            small, large = self.c[rows] <= attack.largest_c, self.tau[rows] >= attack.smallest_tau
            rows = rows[~inside & small & large]
        x_adv = torch.where(per_image(self.within, self.x), self.adv, self.x)
        return AttackResult(x_adv, None, self.within, self.forwards, self.backwards)

    def _descend(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Adam at the present c and τ: which rows (n,) are fooled, and where, (n, C, H, W)."""
        x, y = self.x[rows], self.y[rows]
        c, tau = self.c[rows], per_image(self.tau[rows], x)
        # arctanh is infinite at black and white: stay a hair inside
        w = torch.atanh((self.adv[rows] * 2 - 1) * 0.999999).requires_grad_()
        adam = torch.optim.Adam([w], lr=self.attack.lr)
        best, found = self.adv[rows].clone(), torch.zeros_like(y, dtype=torch.bool)
        for step in range(self.attack.iterations + 1):
            with torch.enable_grad():
                adv = (torch.tanh(w) + 1) / 2
                gap = margin(self.model(adv), y)
                delta = (adv - x).abs()
                beyond = (delta - tau).clamp_min(0).flatten(1).sum(1)
                loss = (c * (-gap).clamp_min(0) + beyond).sum()
            self.forwards += len(rows)
            # as in the authors' code: misclassified (NaN is), and next to nothing beyond τ
            hit = ~(gap.detach() <= 0) & (beyond.detach() < 1e-4 * c) & ~found
            best[hit] = adv.detach()[hit]
            found |= hit
            if bool(found.all()):
                break
            if step < self.attack.iterations:
                w.grad = finite(input_gradient(loss, w))
                self.backwards += len(rows)
                adam.step()
        return found, best

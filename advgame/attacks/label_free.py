"""Attacks away from the classifier's own clean outputs, which no label goes into."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.attacks.gradient import GradientAttack, near_pgd
from advgame.checks import check_images, check_logits
from advgame.choices import Transport
from advgame.losses import Loss, divergence_from, full_precision
from advgame.threat import Threat


@dataclass(frozen=True)
class LabelFree(Attack):
    """A gradient attack whose loss knows the clean logits, formed once per attack.

    Args:
        attack: its steps; its own loss is not used, and it must not need labels otherwise.
        loss_from: clean logits (B, K) -> the loss of (logits, row numbers in the batch).
    """

    attack: GradientAttack
    loss_from: Callable[[Tensor], Loss] = divergence_from

    def _draws(self) -> str | None:
        return self.attack._draws()

    def _check(self, x: Tensor, y: Tensor) -> None:
        check_images(x)  # the labels are not looked at

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        with attacked(model, self.attack.mode), torch.no_grad():
            clean = model(x)
        rows = torch.arange(len(x), device=x.device)
        if check:
            check_logits(clean, torch.zeros_like(rows))
        steps = replace(self.attack, loss=self.loss_from(clean))
        made = steps.run(model, x, rows, rng=rng, check=False)
        return replace(made, forwards=made.forwards + len(x))


def kl_pgd(threat: Threat, steps: int = 10, step_size: float | Tensor | None = None) -> LabelFree:
    """`near_pgd` on the divergence from the clean output (Zhang et al. 2019, TRADES)."""
    return LabelFree(near_pgd(threat, steps, step_size))


def feature_scatter(
    threat: Threat, step_size: float | Tensor | None = None, transport: Transport = "fixed"
) -> LabelFree:
    """One step from a uniform start that moves the batch's outputs away from the clean batch's.

    The distance is optimal transport between both sets of logits (Zhang & Wang 2019); the step is
    ε when not given. No image is pushed over a boundary in particular, which is why classifiers
    that learn from it mask their gradients.

    Args:
        threat: the ball.
        step_size: of the step.
        transport: ``"fixed"`` steps along the gradient of the entropic distance
            (`transport_from`), ``"repo"`` along the published code's
            (`published_transport_from`). On digits the signs of the two agree on 82 to 91 % of the
            pixels.
    """
    size = threat.eps if step_size is None else step_size
    loss_from = published_transport_from if transport == "repo" else transport_from
    return LabelFree(GradientAttack(threat, 1, size, start=threat), loss_from)


def _costs(here: Tensor, there: Tensor) -> Tensor:
    """One minus the cosines of logits (n, K) and (m, K), (n, m).

    It is divided by 0.01 later: half precision's third digit would be its first.
    """
    one, two = (F.normalize(full_precision(logits), dim=1) for logits in (here, there))
    with torch.autocast(one.device.type, enabled=False):
        return 1 - one @ two.T


def transport_from(clean: Tensor, regularisation: float = 0.01, iterations: int = 10) -> Loss:
    """The optimal-transport distance from known logits (B, K), as the loss of an attack, (B,).

    Image i's share is Σ_j T_ij C_ij, C being one minus the cosine of perturbed logits i and clean
    logits j. The plan T is held fixed while the gradient is formed: at the optimum that is the
    gradient of the entropic distance, and after ten iterations over 99 % of its signs are those
    after 2,000 (digits). All images of the batch must be there.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        cost = _costs(logits, clean)
        return (sinkhorn(cost.detach(), regularisation, iterations) * cost).sum(1)

    return loss


def published_transport_from(clean: Tensor) -> Loss:
    """What the published Feature Scatter ascends instead, from known logits (B, K), (B,).

    Its Sinkhorn iteration starts at the clean images' potentials and stops as soon as these move
    by less than 0.1 in sum, after the second of 100 steps on digits. The plan is then far from the
    optimal one, and the gradient goes through the steps that made it: it is that of Σ T C, without
    the entropy, and not that of a transport distance.

    Source: ot.py of Haichao-Zhang/FeatureScatter at 77e9140.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        cost = _costs(clean, logits)
        return (_published_plan(cost) * cost).sum(0)

    return loss


def _published_plan(cost: Tensor) -> Tensor:
    """The plan (n, m), with its graph; rows' marginals as far as the steps got, columns' exact."""
    n, m = cost.shape
    kernel, floor = -cost / 0.01, torch.full_like(cost[:, :1], 1e-6).log()
    rows, columns = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    for _ in range(100):
        before, plan = rows, kernel + rows[:, None] + columns
        # 1e-6 is added under the logarithm: it binds where a potential is still at its start
        rows = rows - torch.cat([plan, floor], 1).logsumexp(1) - math.log(n)
        plan = kernel + rows[:, None] + columns
        columns = columns - torch.cat([plan, floor.T], 0).logsumexp(0) - math.log(m)
        if float((rows - before).detach().abs().sum()) < 0.1 / 0.01:  # potentials in units of 0.01
            break
    return (kernel + rows[:, None] + columns).exp()


def sinkhorn(cost: Tensor, regularisation: float, iterations: int) -> Tensor:
    """The plan T (n, m) of least Σ T C - regularisation · entropy(T), with uniform marginals.

    Source: Cuturi 2013; in logarithms, since exp(-2 / 0.01) is no fp32 number. The columns'
    marginals are exact, the rows' as far as the iterations got.
    """
    n, m = cost.shape
    kernel = -cost / regularisation
    columns = torch.zeros_like(cost[0])
    for _ in range(iterations):
        rows = -(kernel + columns).logsumexp(1) - math.log(n)
        columns = -(kernel + rows[:, None]).logsumexp(0) - math.log(m)
    return (kernel + rows[:, None] + columns).exp()

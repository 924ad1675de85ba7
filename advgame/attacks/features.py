"""What a learned attacker sees: a short vector per image that no data set or network sets apart.

Every entry lies in [-1, 1]. Logits enter relative to their own spread, perturbations relative to
ε, queries relative to the budget, so that what was learned on one classifier can be used on
another. An attacker with the gradient and the label has all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advgame.attacks.menu import CHOICES, Menu
from advgame.attacks.schedule import Ascent
from advgame.losses import cross_entropy, dlr

# name -> what it is; s(v) = v / (1 + |v|); σ is the standard deviation of the logits at the start
FEATURES = {
    "queries_left": "queries left over the budget",
    "urgency": "1 / (1 + queries left)",
    "true_probability": "softmax probability of the true class",
    "margin": "s(margin / σ); the margin is the largest other logit minus the true one",
    "dlr": "the DLR loss, cut at ±1",
    "progress": "(margin - start margin) / |start margin|, cut at ±1: 1 at the boundary",
    "best_progress": "the same of the best margin so far",
    "change": "s(change of the margin in the last step / σ)",
    "behind": "s((best margin - margin) / σ)",
    "since_best": "queries since the best margin, over the budget",
    "rival_gap": "s((best other logit - logit of the class second at the start) / σ)",
    "on_face": "share of pixels on the ball's face (L2: 1 on it)",
    "promise": "s(⟨∇, displacement⟩): what the gradient promised of the last step (margins: / σ)",
    "agreement": "gain of the chosen loss over what the gradient promised, cut at ±1",
    "cosine": "cosine of the last two gradients",
    "turned": "cosine of the last two displacements",
}


def feature_names(menu: Menu) -> tuple[str, ...]:
    """Names of all entries: `FEATURES`, then one per option of the menu, 1 where chosen last."""
    options = (f"last_{c}_{i}" for c, n in zip(CHOICES, menu.sizes, strict=True) for i in range(n))
    return (*FEATURES, *options)


LOSS = CHOICES.index("loss")


def _squash(value: Tensor) -> Tensor:
    return value / (1 + value.abs())


def features(ascent: Ascent) -> Tensor:
    """The vector of each image, float32 (B, n), in the order of `feature_names`."""
    logits, y, scale = ascent.logits.detach(), ascent.y, ascent.scale
    delta = ascent.x_adv - ascent.x
    ball = ascent.threat.with_radii(ascent.eps)
    left = (ascent.budget - ascent.used).to(scale)
    budget = ascent.budget.to(scale)
    start = ascent.start_margin.abs().clamp_min(1e-12)
    rival = logits.gather(1, ascent.rivals[:, None])[:, 0].to(scale)
    true = logits.gather(1, y[:, None])[:, 0].to(scale)
    # margins are in logits; CE is in nats and DLR has no unit
    in_logits = torch.tensor([name in ("margin", "second") for name in ascent.menu.losses])
    unit = torch.where(in_logits.to(y.device)[ascent.chosen[:, LOSS]], scale, 1.0)
    entries = [
        left / budget,
        1 / (1 + left.clamp_min(0)),
        torch.exp(-cross_entropy(logits, y)),
        _squash(ascent.margin / scale),
        dlr(logits, y),
        (ascent.margin - ascent.start_margin) / start,
        (ascent.best_margin - ascent.start_margin) / start,
        _squash(ascent.change / scale),
        _squash((ascent.best_margin - ascent.margin) / scale),
        ascent.since_best / budget,
        _squash((ascent.margin + true - rival) / scale),
        ball.on_face(delta),
        _squash(ascent.promise / unit),
        ascent.agreement,
        ascent.cosine,
        ascent.turned,
    ]
    numbers = torch.stack([one.float() for one in entries], 1)
    options = [
        torch.arange(size, device=y.device) == ascent.chosen[:, column, None]
        for column, size in enumerate(ascent.menu.sizes)
    ]
    numbers = torch.nan_to_num(numbers, nan=0.0, posinf=1.0, neginf=-1.0).clamp_(-1, 1)
    return torch.cat([numbers, *(one.float() for one in options)], 1)

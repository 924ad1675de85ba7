"""What the baselines' published code was run with on CIFAR-10, where ours differs; ADT's numbers.

Game of ``scripts/train.py`` -> settings. The learning rate falls tenfold at the milestones that the
training reached; a mode is that of batch norm in the attack.
"""

from __future__ import annotations

from typing import Any

_STEPS: dict[str, Any] = {"schedule": "multistep", "ema": None}
_NEAR: dict[str, Any] = {**_STEPS, "eps": "0.031", "step_size": 7 / 31}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Rice et al. 2020, robust_overfitting: the last weights overfit, the best are near epoch 106
    "pgd-at": {**_STEPS, "epochs": 200, "attack_mode": "train"},
    # Wong et al. 2020, fast_adversarial, and Free beside it: epochs and rates. The learning rate
    # goes up and down in straight lines there, in one cycle of cosines here
    "fast": {"ema": None, "lr": 0.2, "epochs": 15, "attack_mode": "train"},
    "free": {"ema": None, "lr": 0.04, "epochs": 11},
    # Zhang et al. 2019: 76 epochs and one drop before the last are its early stopping
    "trades": {
        **_NEAR,
        "model": "wrn-34-10",
        "normalise": False,
        "weight_decay": 2e-4,
        "epochs": 76,
        "milestones": (75 / 76,),
    },
    # Wang et al. 2020, the ResNet-18
    "mart": {
        **_NEAR,
        "model": "resnet18",
        "normalise": False,
        "lr": 0.01,
        "weight_decay": 3.5e-3,
        "epochs": 120,
        "milestones": (75 / 120, 90 / 120, 100 / 120),
    },
    # Zhang & Wang 2019
    "feature-scatter": {
        **_STEPS,
        "model": "wrn-28-10",
        "batch_size": 60,
        "transport": "repo",
        "weight_decay": 2e-4,
        "epochs": 200,
        "milestones": (60 / 200, 90 / 200),
    },
}

POSTER: dict[str, tuple[float, ...]] = {
    "standard": (94.81, 12.05, 0, 0, 0, 0, 0, 0),
    "fgsm-at": (93.80, 79.86, 0.12, 0.04, 0.06, 0.13, 0.01, 0.01),
    "pgd-at": (86.91, 58.30, 50.03, 49.40, 51.40, 50.23, 50.46, 48.26),
    "alp": (86.81, 56.83, 48.97, 48.60, 50.13, 49.10, 48.51, 47.90),
    "feature-scatter": (89.98, 77.40, 70.85, 68.81, 72.74, 58.46, 37.45, 37.40),
    "adt-exp": (86.89, 60.41, 52.18, 51.69, 53.27, 52.49, 52.38, 50.56),
    "adt-exp-am": (87.82, 62.42, 51.95, 51.26, 52.99, 51.75, 52.04, 50.04),
    "adt-imp-am": (88.00, 64.89, 52.28, 51.23, 52.64, 52.65, 51.89, 49.81),
}
"""The ADT poster's table, CIFAR-10, WRN-28-10, ε 8/255, accuracy in %: clean, FGSM, PGD-20,
PGD-100, MIM, C&W, FeaAttack, worst of these."""


def poster_table() -> list[str]:
    """`POSTER` as lines of markdown."""
    head = ("game", "clean", "FGSM", "PGD-20", "PGD-100", "MIM", "C&W", "FeaAttack", "worst")
    rows = [(game, *(f"{value:g}" for value in row)) for game, row in POSTER.items()]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

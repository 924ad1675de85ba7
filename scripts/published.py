"""What the baselines' published code was run with on CIFAR-10, where ours differs.

Game of ``scripts/train.py`` -> settings. The learning rate falls tenfold at the milestones that the
training reached; a mode is that of batch norm in the attack. TRADES and MART count epochs from 1,
and drop the rate before the epoch that they name: their epoch 75 begins after 74.
"""

from __future__ import annotations

from typing import Any

_STEPS: dict[str, Any] = {"schedule": "multistep", "ema": None}
_WONG: dict[str, Any] = {"model": "preact_resnet18-fast", "ema": None}
_NEAR: dict[str, Any] = {**_STEPS, "eps": "0.031", "step_size": 7 / 31}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Rice et al. 2020, robust_overfitting: the last weights overfit, the best are near epoch 106
    "pgd-at": {**_STEPS, "epochs": 200, "attack_mode": "train"},
    # Wong et al. 2020, fast_adversarial, and Free beside it: network, epochs and rates. The rate
    # goes up and down in straight lines there, in one cycle of cosines here
    "fast": {**_WONG, "lr": 0.2, "epochs": 15, "attack_mode": "train"},
    "free": {**_WONG, "lr": 0.04, "epochs": 11},
    # Zhang et al. 2019: 76 epochs, the last two of them after a drop, are its early stopping
    "trades": {
        **_NEAR,
        "model": "wrn-34-10",
        "normalise": False,
        "weight_decay": 2e-4,
        "epochs": 76,
        "milestones": (74 / 76,),
    },
    # Wang et al. 2020, the ResNet-18
    "mart": {
        **_NEAR,
        "model": "resnet18",
        "normalise": False,
        "lr": 0.01,
        "weight_decay": 3.5e-3,
        "epochs": 120,
        "milestones": (74 / 120, 89 / 120, 99 / 120),
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

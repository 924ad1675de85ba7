"""AutoAttack (Croce & Hein 2020) through pyautoattack."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.threat import Threat


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, batch_size: int = 500
) -> Tensor:
    """AutoAttack standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square.

    Args:
        model: logits of images in [0, 1], in evaluation mode.
        x: (N, C, H, W).
        y: (N,).
        threat: L∞ or L2 with one radius.
        seed: passed on; the process's own random streams are left as they were.
        batch_size: images per batch; verdicts can depend on it, since each attack regroups the
            images that survived the one before.

    Returns:
        (N, C, H, W): an adversarial example where one was found, else the clean image.

    Raises:
        InputError: too few classes for the targeted attacks, or a radius per image.
    """
    from pyautoattack import AutoAttack

    if isinstance(threat.eps, Tensor):
        raise InputError("AutoAttack judges at one eps: give the threat a float")
    with torch.no_grad():
        classes = model(x[:2]).shape[1]
    if classes < 4:
        raise InputError(
            f"AutoAttack standard needs at least 4 classes, this classifier has {classes}: "
            "use --attacks fgsm pgd100 instead"
        )
    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        judge = AutoAttack(
            model, norm=threat.norm, eps=float(threat.eps), seed=seed, device=x.device
        )
        judge.verbose = False
        # nine targets in AutoAttack standard; fewer classes have fewer wrong ones
        judge.apgd_targeted.n_target_classes = min(9, classes - 1)
        judge.fab.n_target_classes = min(9, classes - 1)
        x_adv: Tensor = judge.run_standard_evaluation(x, y, batch_size=batch_size)[0]
    return x_adv

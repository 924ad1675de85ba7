"""The gradient attacks of the papers by name: settings of `GradientAttack`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from advgame.attacks.gradient import GradientAttack
from advgame.threat import GaussianStart, Threat


def fgsm(threat: Threat) -> GradientAttack:
    """One step of length ε from the clean image (Goodfellow et al. 2015)."""
    return GradientAttack(threat, steps=1, step_size=threat.eps)


def ifgsm(threat: Threat, steps: int, step_size: float | Tensor) -> GradientAttack:
    """Several steps from the clean image (Kurakin et al. 2017)."""
    return GradientAttack(threat, steps=steps, step_size=step_size)


def mim(
    threat: Threat, steps: int, step_size: float | Tensor | None = None, momentum: float = 1.0
) -> GradientAttack:
    """I-FGSM with momentum (Dong et al. 2018); the step is ε/steps when not given."""
    size = threat.eps / steps if step_size is None else step_size
    return GradientAttack(threat, steps, size, momentum=momentum)


def fast(threat: Threat, step_size: float | Tensor | None = None) -> GradientAttack:
    """One step from a uniform start, pulled back into the ball (Wong et al. 2020).

    ``step_size`` is 1.25 ε when not given: 10/255 at ε = 8/255.
    """
    size = threat.eps * 1.25 if step_size is None else step_size
    return GradientAttack(threat, 1, size, start=threat)


def n_fgsm(threat: Threat, noise: float = 2.0) -> GradientAttack:
    """One step of length ε from noise in the ball of ``noise``·ε (de Jorge et al. 2022).

    As the paper has it for training, the result is not pulled back to the ε-ball: it lies in
    that of (``noise`` + 1)·ε.
    """
    whole = threat.scaled(noise + 1)
    return GradientAttack(whole, 1, threat.eps, start=threat.scaled(noise))


def pgd(
    threat: Threat, steps: int, step_size: float | Tensor | None = None, restarts: int = 1
) -> GradientAttack:
    """Several steps from a random start in the ball (Madry et al. 2018).

    ``step_size`` is ε/4 when not given: 2/255 at ε = 8/255.
    """
    if step_size is None:
        step_size = threat.eps / 4
    return GradientAttack(threat, steps, step_size, start=threat, restarts=restarts)


def near_pgd(
    threat: Threat, steps: int = 10, step_size: float | Tensor | None = None
) -> GradientAttack:
    """PGD from Gaussian noise of 0.001 about the image, as TRADES and MART begin.

    ``step_size`` is ε/4 when not given.
    """
    return replace(pgd(threat, steps, step_size), start=GaussianStart())

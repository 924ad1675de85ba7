"""Signs that a robustness number cannot be trusted; they always run and travel with the report.

Sources: AutoAttack's checks (Croce & Hein 2020), Carlini et al. 2019, Athalye et al. 2018.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from advgame.attacks import attacked, pgd
from advgame.checks import looks_like_probabilities
from advgame.data import ImageSet
from advgame.evaluation.verdicts import Verdicts, predict
from advgame.losses import cross_entropy
from advgame.seeding import stream
from advgame.threat import Threat

_SLACK = 1e-5  # rounding of x + δ in fp32, with room for AutoAttack's own


@dataclass(frozen=True)
class Flag:
    """One sign.

    Args:
        name: a fixed word to search for.
        meaning: what was seen and what it suggests, one sentence.
    """

    name: str
    meaning: str

    def as_dict(self) -> dict[str, str]:
        """For ``report.json``."""
        return asdict(self)


def find_flags(
    model: nn.Module, data: ImageSet, threat: Threat, verdicts: Verdicts, seed: int = 0
) -> list[Flag]:
    """Look for every sign, on up to 200 images.

    Args:
        model: the classifier that was evaluated.
        data: the images that it was evaluated on.
        threat: the ball of the evaluation.
        verdicts: what the evaluation found.
        seed: of the flags' own attacks.
    """
    probe = data.subset(slice(200))
    with attacked(model):
        return [
            *_outputs(model, probe),
            *_gradients(model, probe),
            *_growth(model, probe, threat, seed),
            *_range(verdicts, threat),
            *_gap(verdicts),
        ]


def _outputs(model: nn.Module, data: ImageSet) -> list[Flag]:
    images = data.floats()
    flags = []
    with torch.no_grad():
        passes = [model(images) for _ in range(5)]
    if any(float((one - passes[0]).abs().max()) > 1e-4 for one in passes[1:]):
        flags.append(
            Flag("randomised_output", "repeated passes differ: use attacks with EoT (version rand)")
        )
    if looks_like_probabilities(passes[0]):
        flags.append(Flag("softmax_output", "outputs are probabilities, not logits"))
    return flags


def _gradients(model: nn.Module, data: ImageSet) -> list[Flag]:
    images = data.floats().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(model(images), data.labels)
        grad = (
            torch.autograd.grad(loss.sum(), images, allow_unused=True)[0] if loss.grad_fn else None
        )
    zero = 1.0 if grad is None else float((grad.flatten(1).abs().amax(1) == 0).float().mean())
    if zero <= 0.05:
        return []
    return [
        Flag("zero_gradients", f"{zero:.0%} of the images have an input gradient of exactly zero")
    ]


def _growth(model: nn.Module, data: ImageSet, threat: Threat, seed: int) -> list[Flag]:
    """The loss must rise with ε, and a ball that holds every grey must fool everything."""
    images, labels = data.floats(), data.labels

    def reach(ball: Threat, steps: int) -> tuple[float, Tensor]:
        rng = stream(seed, "flags", images.device)
        x_adv = pgd(ball, steps).run(model, images, labels, rng=rng, check=False).x_adv
        with torch.no_grad():
            logits = model(x_adv)
        return float(cross_entropy(logits, labels).mean()), logits.argmax(1) == labels

    flags = []
    small, _ = reach(threat.scaled(0.5), 10)
    full, _ = reach(threat, 10)
    if full < small - 1e-3:
        flags.append(Flag("loss_falls_with_eps", "PGD-10 reaches less loss at ε than at ε/2"))
    whole = type(threat)(1.0 if threat.norm == "Linf" else float(images[0].numel()) ** 0.5)
    _, right = reach(whole, 100)
    clean = predict(model, images) == labels
    if int((right & clean).sum()) > 0.1 * int(clean.sum()):
        flags.append(
            Flag(
                "unbounded_attack_fails",
                f"{float((right & clean).float().mean()):.0%} survive PGD-100 without a bound: "
                "the gradients do not lead anywhere",
            )
        )
    return flags


def _range(verdicts: Verdicts, threat: Threat) -> list[Flag]:
    eps = float(threat.eps)
    return [
        Flag("ball_violated", f"{name} left the ball or [0, 1]: its number is not comparable")
        for name, largest in verdicts.largest.items()
        if largest > eps + _SLACK
    ]


def _gap(verdicts: Verdicts) -> list[Flag]:
    """PGD-20 far above AutoAttack: 10 points more than chance explains."""
    if not {"pgd20", "autoattack"} <= set(verdicts.correct):
        return []
    weak, strong = verdicts.correct["pgd20"], verdicts.correct["autoattack"]
    n = len(weak)
    gap = float((weak & ~strong).float().mean())
    noise = 2 * (gap * (1 - gap) / n) ** 0.5
    if gap - noise <= 0.10:
        return []
    return [
        Flag(
            "pgd_far_above_autoattack",
            f"AutoAttack breaks {gap:.0%} of the images that PGD-20 leaves: gradients are masked",
        )
    ]

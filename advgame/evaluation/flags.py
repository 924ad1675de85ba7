"""Flags: signs of gradient masking and of other reasons not to trust a robust accuracy.

All of them run in every evaluation, and stand in its report.

Sources: AutoAttack's checks (Croce & Hein 2020), Carlini et al. 2019, Athalye et al. 2018,
Pintor et al. 2022 (indicators of attack failure).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from advgame.attacks import attacked
from advgame.choices import TRANSFER
from advgame.data import ImageSet
from advgame.evaluation import cheats, probes
from advgame.evaluation.verdicts import Verdicts, out_of_memory
from advgame.seeding import as_seed
from advgame.statistics import beats
from advgame.threat import Threat

_PROBED = 200  # images
_SLACK = 1e-5  # rounding of x + δ in fp32, with room for AutoAttack's own
_PGD = (
    "pgd20", "pgd50", "pgd100", "adt:pgd20", "adt:pgd100", "l2l:pgd20", "l2l:pgd40", "l2l:pgd100",
    "las:pgd20", "las:pgd50", "madry:pgd40", "madry:pgd100",
)  # fmt: skip
_BLACK = (*TRANSFER, "spsa", "adt:spsa", "aa:square")


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
        """The flag as ``report.json`` holds it."""
        return asdict(self)


@torch.inference_mode(False)
def find_flags(
    model: nn.Module,
    data: ImageSet,
    threat: Threat,
    verdicts: Verdicts,
    seed: int = 0,
    held_out: ImageSet | None = None,
) -> list[Flag]:
    """Look for every sign: in the model on up to 200 images, and in the verdicts.

    Args:
        model: the classifier that was evaluated, as it was handed in.
        data: the images that it was evaluated on.
        threat: the ball of the evaluation.
        verdicts: what the evaluation found.
        seed: of the probes' own attacks.
        held_out: other images of the same data set, such as its validation split: a classifier
            that knows the test images does better on those than on these.
    """
    seed = as_seed(seed)
    few = _few(data.labels)
    clean = Verdicts({"clean": verdicts.correct["clean"][few.cpu()]}, {}, {})
    with attacked(model):
        found = _probed(model, data.subset(few), threat, clean, seed, held_out)
    found |= no_answer(verdicts) | _below_chance(verdicts, data.classes)
    found |= left_ball(verdicts, threat) | _gap(verdicts) | _black_box(verdicts)
    return [Flag(name, meaning) for name, meaning in found.items()]


def _few(labels: Tensor) -> Tensor:
    """Which images are looked at, (200,) or all: the first ones.

    Where images lie class after class, as somebody's own may, the first ones are of one or two
    classes, on which a classifier may be far better than on all: then some of all classes are.
    """
    n = min(_PROBED, len(labels))
    changes = int((labels[1:] != labels[:-1]).sum())
    if n == len(labels) or changes >= len(labels.unique()):
        return torch.arange(n, device=labels.device)
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return (mixed * len(labels) // n).to(labels.device)


def _probed(
    model: nn.Module,
    data: ImageSet,
    threat: Threat,
    verdicts: Verdicts,
    seed: int,
    held_out: ImageSet | None,
) -> dict[str, str]:
    """Every probe of the classifier, on half as many images where the memory is too small."""
    try:
        return (
            probes.outputs(model, data)
            | probes.gradients(model, data, seed)
            | probes.loss_growth(model, data, threat, seed)
            | probes.stronger_attacks(model, data, threat, seed)
            | cheats.one_function(model, data, threat, seed)
            | cheats.unchanged(model, data, verdicts)
            | cheats.knows_images(model, data, threat, seed, held_out)
        )
    except RuntimeError as error:
        if not out_of_memory(error) or len(data) == 1:
            raise
    return _probed(model, data.subset(slice(len(data) // 2)), threat, verdicts, seed, held_out)


def no_answer(verdicts: Verdicts, where: str = "on images") -> dict[str, str]:
    """How often the classifier did not answer, by attack: name of the flag -> meaning.

    Args:
        verdicts: what an evaluation found.
        where: what is counted, in words.
    """
    told = [f"{count} under {name}" for name, count in verdicts.no_answer.items() if count]
    if not told:
        return {}
    return {
        "non_finite": f"largest logit NaN or infinite {where}: {', '.join(told)}; they count as "
        "misclassified"
    }


def _below_chance(verdicts: Verdicts, classes: int) -> dict[str, str]:
    """Fewer clean images right than guessing would get: a one-sided binomial test, p < 0.001."""
    if (clean := verdicts.correct.get("clean")) is None:
        return {}
    right, n = int(clean.sum()), len(clean)
    if float(binomtest(right, n, 1 / classes, alternative="less").pvalue) >= 0.001:
        return {}
    return {
        "below_chance": f"{right} of {n} clean images are right, fewer than by guessing among "
        f"{classes} classes: the classifier numbers them in another order, was trained on images "
        "normalised otherwise, or is of another data set"
    }


def left_ball(verdicts: Verdicts, threat: Threat) -> dict[str, str]:
    """Which attacks left the ball or [0, 1]: name of the flag -> meaning."""
    eps = float(threat.eps)
    left = [name for name, largest in verdicts.largest.items() if not largest <= eps + _SLACK]
    if not left:
        return {}
    names = ", ".join(left)
    return {"ball_violated": f"{names} left the ball or [0, 1]: the numbers are not comparable"}


def _gap(verdicts: Verdicts) -> dict[str, str]:
    """PGD, all that was run, far above another column: 10 points more than chance explains."""
    weak = _after_pgd(verdicts)
    if weak is None:
        return {}
    gaps = {
        name: float((weak & ~survive).float().mean())
        for name, survive in verdicts.correct.items()
        if name not in ("clean", *_PGD, *_BLACK)  # those without gradients have a flag of theirs
    }
    name = max(gaps, key=lambda one: gaps[one], default="")
    noise = 2 * (gaps[name] * (1 - gaps[name]) / len(weak)) ** 0.5 if name else 0.0
    if not name or gaps[name] - noise <= 0.10:
        return {}
    flag = "autoattack" if name.startswith(("autoattack", "aa:")) else "another"
    meaning = (
        f"{name} breaks {gaps[name]:.0%} of all images beyond those that PGD breaks: "
        "gradients are masked, or PGD is too weak"
    )
    return {f"pgd_far_above_{flag}": meaning}


def _black_box(verdicts: Verdicts) -> dict[str, str]:
    """An attack that sees no gradient of this classifier must not beat those that do."""
    best = _after_pgd(verdicts)
    if best is None:
        return {}
    found = {}
    for name in _BLACK:
        if name in verdicts.correct and beats(verdicts.correct[name], best):
            kind = "transfer" if name in TRANSFER else "black_box"
            found[f"{kind}_beats_white_box"] = (
                f"{name} breaks more images than PGD with the gradients: they are masked"
            )
    return found


def wider_gap(gap: float, control: float, n: int) -> bool:
    """Whether AutoAttack takes more from what PGD-20 leaves than from a control's: masking.

    Every classifier has a gap between the two. A comparison with an honest control says how wide it
    is there, and need not leave the 10 points that `find_flags` does: 5 points are, here.

    Args:
        gap: accuracy under PGD-20 less that under AutoAttack; a little below 0 is possible, since
            AutoAttack does not run PGD-20.
        control: the same of PGD-AT.
        n: different images that both were measured on; the same ones for several seeds count once.

    Returns:
        whether the difference is 0.05 or more, and more than two standard errors.
    """
    variance = sum(share * (1 - share) / n for share in (max(gap, 0.0), max(control, 0.0)))
    # accuracies are in fp32: 5 points of them may lack a hundred-millionth
    return bool(gap - control >= max(0.05, 2 * variance**0.5) - 1e-6)


def _after_pgd(verdicts: Verdicts) -> Tensor | None:
    """The images that survive PGD in every form that was run; None where none was."""
    pgd = [verdicts.correct[name] for name in _PGD if name in verdicts.correct]
    return torch.stack(pgd).all(0) if pgd else None

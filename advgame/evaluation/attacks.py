"""Attacks by name: ours, AutoAttack's, and each paper's with its own settings.

Steps that a paper states in pixels for its ε are scaled with ε, so that at the paper's ε they are
the paper's own and other data sets are attacked alike. Names are ``attack`` or ``paper:attack``:
``adt`` Dong et al. 2020, ``l2l`` Jiang et al. 2021, ``las`` Jia et al. 2022, ``mvm`` Hamm & Mehra
2017, ``madry`` Madry et al. 2018, ``aa`` AutoAttack's single attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import nn

from advgame.attacks import (
    SPSA,
    Attack,
    CarliniWagnerLinf,
    DistributionalAttack,
    EoT,
    FeatureAttack,
    GradientAttack,
    Transfer,
    fgsm,
    ifgsm,
    mim,
    pgd,
)
from advgame.data import ImageSet
from advgame.errors import InputError, unknown
from advgame.evaluation.autoattack import VERSIONS, AutoAttackPart, Version
from advgame.losses import clipped_margin
from advgame.threat import Linf, Threat


@dataclass(frozen=True)
class Context:
    """What an attack may need to be made.

    Args:
        threat: the ball of the evaluation.
        data: the images that are attacked; FeaAttack draws its targets from them.
        seed: of AutoAttack.
        surrogate: another classifier, for transfer.
    """

    threat: Threat
    data: ImageSet | None = None
    seed: int = 0
    surrogate: nn.Module | None = None


Suite = list[tuple[str, Attack]]
"""Named attacks in order, each on the images that the ones before it left."""


@dataclass(frozen=True)
class Entry:
    """An attack that can be asked for.

    Args:
        about: one line.
        make: the attack at a threat model.
    """

    about: str
    make: Callable[[Context], Attack | Suite]


def _steepest(make: Callable[[Threat], GradientAttack]) -> Callable[[Context], Attack]:
    return lambda context: make(context.threat)


def _started(attack: GradientAttack) -> GradientAttack:
    """From a uniform start in the ball."""
    return replace(attack, start=attack.threat)


def _margin(threat: Threat, steps: int, kappa: float) -> GradientAttack:
    loss = partial(clipped_margin, kappa=kappa)
    return replace(pgd(threat, steps), loss=loss)


def _pgd(steps: int, share: float = 1 / 4) -> Callable[[Context], Attack]:
    """PGD with a step of ``share`` of ε."""
    return lambda c: pgd(c.threat, steps, c.threat.eps * share)


def _features(targets: int) -> Callable[[Context], Attack]:
    def build(context: Context) -> Attack:
        if context.data is None:
            raise InputError("FeaAttack needs images to aim at: use advgame.attacks.FeatureAttack")
        return FeatureAttack(context.threat, context.data.floats(), context.data.labels, targets)

    return build


def _carlini_wagner(context: Context) -> Attack:
    return CarliniWagnerLinf(cast(Linf, context.threat))


def _transfer(make: Callable[[Threat], Attack]) -> Callable[[Context], Attack]:
    def build(context: Context) -> Attack:
        if context.surrogate is None:
            raise InputError("a transfer attack needs --surrogate, another classifier to attack")
        return Transfer(make(context.threat), context.surrogate)

    return build


def _autoattack(version: Version) -> Callable[[Context], Suite]:
    return lambda c: [
        (part, AutoAttackPart(c.threat, part, version, c.seed)) for part in VERSIONS[version]
    ]


def _part(name: str) -> Callable[[Context], Attack]:
    return lambda c: AutoAttackPart(c.threat, name, "standard", c.seed)


L2L_STEP = 0.003 / 0.031
"""L2L's step size over its ε."""
_ADT_MIM = _steepest(lambda t: _started(mim(t, 20, t.eps / 4)))
_ADT_CW = _steepest(lambda t: _margin(t, 30, kappa=50.0))

ATTACKS: dict[str, Entry] = {
    "fgsm": Entry("one step of ε from the clean image", _steepest(fgsm)),
    "n-fgsm": Entry(
        "one step of ε from noise of 2ε, pulled back into the ball",
        _steepest(lambda t: GradientAttack(t, 1, t.eps, start=t.scaled(2.0))),
    ),
    "pgd10": Entry("PGD, 10 steps of ε/4 from a random start", _pgd(10)),
    "pgd20": Entry("PGD, 20 steps of ε/4", _pgd(20)),
    "pgd50": Entry("PGD, 50 steps of ε/4", _pgd(50)),
    "pgd100": Entry("PGD, 100 steps of ε/4", _pgd(100)),
    "mim": Entry("MIM, 20 steps of ε/4, decay 1, random start", _ADT_MIM),
    "cw": Entry("PGD on the margin clipped at 50, 30 steps of ε/4", _ADT_CW),
    "cw-adam": Entry("the L∞ attack of Carlini & Wagner with Adam", _carlini_wagner),
    "fea": Entry("FeaAttack, 20 target images, 50 steps of ε/8 each", _features(20)),
    "spsa": Entry("SPSA, no gradients, 100 steps of 256 samples", lambda c: SPSA(c.threat)),
    "transfer": Entry("PGD-20 made on the surrogate", _transfer(lambda t: pgd(t, 20, t.eps / 4))),
    "transfer-mim": Entry(
        "MIM-20 made on the surrogate", _transfer(lambda t: _started(mim(t, 20, t.eps / 4)))
    ),
    "eot-pgd20": Entry(
        "PGD-20 on the mean logits of 20 passes, for randomised classifiers",
        lambda c: EoT(pgd(c.threat, 20)),
    ),
    "autoattack": Entry("AutoAttack standard", _autoattack("standard")),
    "autoattack-plus": Entry("AutoAttack plus", _autoattack("plus")),
    "autoattack-rand": Entry("AutoAttack rand, for randomised classifiers", _autoattack("rand")),
    **{
        f"aa:{part}": Entry(f"{part} with the settings of AutoAttack standard", _part(part))
        for part in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
    },
    "adt:fgsm": Entry("ADT's table: FGSM", _steepest(fgsm)),
    "adt:pgd20": Entry("ADT's table: 20 steps of ε/4", _pgd(20)),
    "adt:pgd100": Entry("ADT's table: 100 steps of ε/4", _pgd(100)),
    "adt:mim20": Entry("ADT's table: MIM", _ADT_MIM),
    "adt:cw30": Entry("ADT's table: C&W's margin by PGD", _ADT_CW),
    "adt:fea": Entry("ADT's table: FeaAttack, 200 target images", _features(200)),
    "adt:exp-worst-of-10": Entry(
        "ADT-EXP: a distribution fitted to each image in 35 passes, its 10 samples",
        lambda c: DistributionalAttack(c.threat),
    ),
    "adt:spsa": Entry("ADT: SPSA with 2,048 samples", lambda c: SPSA(c.threat, samples=2048)),
    "l2l:pgd10": Entry("L2L's table: 10 steps of 0.003 at ε 0.031", _pgd(10, L2L_STEP)),
    "l2l:pgd20": Entry("L2L's table: 20 steps of 0.003 at ε 0.031", _pgd(20, L2L_STEP)),
    "l2l:pgd40": Entry("L2L's table: 40 steps of 0.003 at ε 0.031", _pgd(40, L2L_STEP)),
    "l2l:pgd100": Entry("L2L's table: 100 steps of 0.003 at ε 0.031", _pgd(100, L2L_STEP)),
    "l2l:cw-adam": Entry("L2L's code: C&W with Adam, clean where it fails", _carlini_wagner),
    "l2l:transfer-fgsm": Entry(
        "L2L's black-box tables: FGSM made on the surrogate", _transfer(fgsm)
    ),
    "l2l:transfer-pgd10": Entry(
        "L2L's black-box tables: l2l:pgd10 made on the surrogate",
        _transfer(lambda t: pgd(t, 10, t.eps * L2L_STEP)),
    ),
    "las:pgd10": Entry("LAS-AT's table: 10 steps of ε/4", _pgd(10)),
    "las:pgd20": Entry("LAS-AT's table: 20 steps of ε/4", _pgd(20)),
    "las:pgd50": Entry("LAS-AT's table: 50 steps of ε/4", _pgd(50)),
    "las:cw20": Entry(
        "LAS-AT's table: the margin by PGD, 20 steps of ε/4",
        _steepest(lambda t: _margin(t, 20, kappa=float("inf"))),
    ),
    "mvm:fgsm": Entry("Machine vs Machine: one step of η; ε is η/2", _steepest(fgsm)),
    "mvm:ifgsm": Entry(
        "Machine vs Machine: 10 steps of η each from the clean image; ε is η/2",
        _steepest(lambda t: ifgsm(t, 10, t.eps)),
    ),
    "madry:pgd40": Entry("MNIST challenge: 40 steps of ε/30", _pgd(40, 1 / 30)),
    "madry:pgd100": Entry("MNIST challenge: 100 steps of ε/30", _pgd(100, 1 / 30)),
}
"""Name -> attack. Machine vs Machine has pixels in [-1, 1]: its η is twice our ε."""


def check_attacks(names: tuple[str, ...]) -> None:
    """Refuse names that are not in `ATTACKS`, and the same one twice.

    Raises:
        InputError: which one.
    """
    if odd := [name for name in names if name not in ATTACKS]:
        raise unknown("attack", odd[0], ATTACKS)
    if len(set(names)) < len(names):
        raise InputError(f"an attack is asked for twice: {', '.join(names)}")


def make_suite(name: str, context: Context) -> Suite:
    """The attack ``name`` as named attacks in order; most have one only.

    Raises:
        InputError: the attack needs something that is not there.
    """
    made = ATTACKS[name].make(context)
    return made if isinstance(made, list) else [(name, made)]

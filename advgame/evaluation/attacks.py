"""The registry of attacks by name (``--attacks``): ours, AutoAttack's, each paper's own settings.

Steps that a paper states in pixels for its ε are scaled with ε, so that at the paper's ε they are
the paper's own and other data sets are attacked alike. Names are ``attack`` or ``paper:attack``:
``adt`` Dong et al. 2020, ``l2l`` Jiang et al. 2021, ``las`` Jia et al. 2022, ``mvm`` Hamm & Mehra
2017, ``madry`` Madry et al. 2018, ``aa`` AutoAttack's single attacks.

Any other name ``package.module:factory(1, size=0.5)`` is somebody's own attack: what the factory
returns for the ball and the typed arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
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
from advgame.choices import PAPERS
from advgame.data import ImageSet
from advgame.errors import InputError, unknown
from advgame.evaluation.autoattack import VERSIONS, AutoAttackPart, Version
from advgame.losses import clipped_margin
from advgame.own_code import own_code
from advgame.threat import Linf, Threat

L2L_STEP = 0.003 / 0.031
"""L2L's step size over its ε."""

Suite = list[tuple[str, Attack]]
"""Named attacks in order, each on the images that the ones before it left."""


@dataclass(frozen=True)
class Context:
    """What an attack may need to be made, and makers for those that several names share.

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

    def pgd(self, steps: int, share: float = 1 / 4) -> GradientAttack:
        """PGD with a step of ``share`` of ε."""
        return pgd(self.threat, steps, self.threat.eps * share)

    def margin(self, steps: int, kappa: float) -> GradientAttack:
        """PGD with steps of ε/4 on the margin, clipped at κ."""
        return replace(self.pgd(steps), loss=partial(clipped_margin, kappa=kappa))

    def mim20(self) -> GradientAttack:
        """MIM with steps of ε/4 from a random start."""
        return replace(mim(self.threat, 20, self.threat.eps / 4), start=self.threat)

    def features(self, targets: int) -> Attack:
        """FeaAttack towards the features of so many images."""
        if self.data is None:
            raise InputError("FeaAttack needs images to aim at: use advgame.attacks.FeatureAttack")
        return FeatureAttack(self.threat, self.data.floats(), self.data.labels, targets)

    def transfer(self, attack: Attack) -> Attack:
        """The attack, made on the surrogate."""
        if self.surrogate is None:
            raise InputError("a transfer attack needs --surrogate, another classifier to attack")
        return Transfer(attack, self.surrogate)

    def autoattack(self, version: Version) -> Suite:
        """The attacks of a version of AutoAttack, by name, in their order."""
        settings: Version = "standard" if version == "lite" else version
        return [
            (part, AutoAttackPart(self.threat, part, settings, self.seed))
            for part in VERSIONS[version]
        ]


@dataclass(frozen=True)
class Entry:
    """An attack that can be asked for.

    Args:
        about: one line.
        make: the attack at a threat model.
    """

    about: str
    make: Callable[[Context], Attack | Suite]


def _part(name: str) -> Callable[[Context], Attack]:
    return lambda c: AutoAttackPart(c.threat, name, "standard", c.seed)


def _carlini_wagner(context: Context) -> Attack:
    return CarliniWagnerLinf(cast(Linf, context.threat))


ATTACKS: dict[str, Entry] = {
    "fgsm": Entry("one step of ε from the clean image", lambda c: fgsm(c.threat)),
    "n-fgsm": Entry(
        "one step of ε from noise of 2ε, pulled back into the ball",
        lambda c: GradientAttack(c.threat, 1, c.threat.eps, start=c.threat.scaled(2.0)),
    ),
    "pgd10": Entry("PGD, 10 steps of ε/4 from a random start", lambda c: c.pgd(10)),
    "pgd20": Entry("PGD, 20 steps of ε/4", lambda c: c.pgd(20)),
    "pgd50": Entry("PGD, 50 steps of ε/4", lambda c: c.pgd(50)),
    "pgd100": Entry("PGD, 100 steps of ε/4", lambda c: c.pgd(100)),
    "mim": Entry("MIM, 20 steps of ε/4, decay 1, random start", lambda c: c.mim20()),
    "cw": Entry(
        "PGD on the margin clipped at 50, 30 steps of ε/4", lambda c: c.margin(30, kappa=50.0)
    ),
    "cw-adam": Entry("the L∞ attack of Carlini & Wagner with Adam", _carlini_wagner),
    "fea": Entry("FeaAttack, 20 target images, 50 steps of ε/8 each", lambda c: c.features(20)),
    "spsa": Entry("SPSA, no gradients, 100 steps of 256 samples", lambda c: SPSA(c.threat)),
    "transfer": Entry("PGD-20 made on the surrogate", lambda c: c.transfer(c.pgd(20))),
    "transfer-mim": Entry("MIM-20 made on the surrogate", lambda c: c.transfer(c.mim20())),
    "eot-pgd20": Entry(
        "PGD-20 on the mean logits of 20 passes, for randomised classifiers",
        lambda c: EoT(pgd(c.threat, 20)),
    ),
    "autoattack": Entry("AutoAttack standard", lambda c: c.autoattack("standard")),
    "autoattack-plus": Entry("AutoAttack plus", lambda c: c.autoattack("plus")),
    "autoattack-lite": Entry(
        "the first two of AutoAttack standard, for sweeps: no headline",
        lambda c: c.autoattack("lite"),
    ),
    "autoattack-rand": Entry(
        "AutoAttack rand, for randomised classifiers", lambda c: c.autoattack("rand")
    ),
    **{
        f"aa:{part}": Entry(f"{part} with the settings of AutoAttack standard", _part(part))
        for part in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
    },
    "adt:fgsm": Entry("ADT's table: FGSM", lambda c: fgsm(c.threat)),
    "adt:pgd20": Entry("ADT's table: 20 steps of ε/4", lambda c: c.pgd(20)),
    "adt:pgd100": Entry("ADT's table: 100 steps of ε/4", lambda c: c.pgd(100)),
    "adt:mim20": Entry("ADT's table: MIM", lambda c: c.mim20()),
    "adt:cw30": Entry("ADT's table: C&W's margin by PGD", lambda c: c.margin(30, kappa=50.0)),
    "adt:fea": Entry("ADT's table: FeaAttack, 200 target images", lambda c: c.features(200)),
    "adt:exp-worst-of-10": Entry(
        "ADT-EXP: a distribution fitted to each image in 35 passes, its 10 samples",
        lambda c: DistributionalAttack(c.threat),
    ),
    "adt:spsa": Entry("ADT: SPSA with 2,048 samples", lambda c: SPSA(c.threat, samples=2048)),
    "l2l:pgd10": Entry("L2L's table: 10 steps of 0.003 at ε 0.031", lambda c: c.pgd(10, L2L_STEP)),
    "l2l:pgd20": Entry("L2L's table: 20 steps of 0.003 at ε 0.031", lambda c: c.pgd(20, L2L_STEP)),
    "l2l:pgd40": Entry("L2L's table: 40 steps of 0.003 at ε 0.031", lambda c: c.pgd(40, L2L_STEP)),
    "l2l:pgd100": Entry(
        "L2L's table: 100 steps of 0.003 at ε 0.031", lambda c: c.pgd(100, L2L_STEP)
    ),
    "l2l:cw-adam": Entry("L2L's code: C&W with Adam, clean where it fails", _carlini_wagner),
    "l2l:transfer-fgsm": Entry(
        "L2L's black-box tables: FGSM made on the surrogate", lambda c: c.transfer(fgsm(c.threat))
    ),
    "l2l:transfer-pgd10": Entry(
        "L2L's black-box tables: l2l:pgd10 made on the surrogate",
        lambda c: c.transfer(c.pgd(10, L2L_STEP)),
    ),
    "las:pgd10": Entry("LAS-AT's table: 10 steps of ε/4", lambda c: c.pgd(10)),
    "las:pgd20": Entry("LAS-AT's table: 20 steps of ε/4", lambda c: c.pgd(20)),
    "las:pgd50": Entry("LAS-AT's table: 50 steps of ε/4", lambda c: c.pgd(50)),
    "las:cw20": Entry(
        "LAS-AT's table: the margin by PGD, 20 steps of ε/4",
        lambda c: c.margin(20, kappa=float("inf")),
    ),
    "mvm:fgsm": Entry("Machine vs Machine: one step of η; ε is η/2", lambda c: fgsm(c.threat)),
    "mvm:ifgsm": Entry(
        "Machine vs Machine: 10 steps of η each from the clean image; ε is η/2",
        lambda c: ifgsm(c.threat, 10, c.threat.eps),
    ),
    "madry:pgd40": Entry("MNIST challenge: 40 steps of ε/30", lambda c: c.pgd(40, 1 / 30)),
    "madry:pgd100": Entry("MNIST challenge: 100 steps of ε/30", lambda c: c.pgd(100, 1 / 30)),
}
"""Name -> attack. Machine vs Machine has pixels in [-1, 1]: its η is twice our ε."""


def is_own_attack(name: str) -> bool:
    """Whether a name is of somebody's own code, not of `ATTACKS` or a slip in one of those."""
    return any(sign in name for sign in ".:(") and re.split("[:(]", name)[0] not in PAPERS


def check_attacks(names: tuple[str, ...]) -> None:
    """Refuse names that are neither in `ATTACKS` nor of somebody's own code, and one twice.

    Own code is looked for, and not yet run.

    Raises:
        InputError: which one.
    """
    for name in names:
        if name in ATTACKS:
            continue
        slip = bool(get_close_matches(name, ATTACKS, cutoff=0.8))
        if not is_own_attack(name) or (slip and not own_code(name).there()):
            raise unknown("attack", name, ATTACKS)
        own_code(name).find()
    if len(set(names)) < len(names):
        raise InputError(f"an attack is asked for twice: {', '.join(names)}")


def make_suite(name: str, context: Context) -> Suite:
    """The attack ``name`` as named attacks in order; most have one only.

    Raises:
        InputError: the attack needs something that is not there, or somebody's own factory fails
            or returns something else.
    """
    if name not in ATTACKS:
        own: Attack = own_code(name).make(Attack, "an advgame.attacks.Attack", context.threat)
        return [(name, own)]
    made = ATTACKS[name].make(context)
    return made if isinstance(made, list) else [(name, made)]

"""AutoAttack (Croce & Hein 2020), one of its attacks at a time.

The four attacks of the standard version in L∞, and Auto-PGD in L2, are ours, with the same
mathematics and the same draws, and give the same verdicts sooner; the others are pyautoattack's.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advgame.attacks import APGD, FAB, Attack, AttackResult, Square, attacked
from advgame.checks import check_labels, check_logits
from advgame.choices import FEW_CLASSES, LEAST_CLASSES
from advgame.errors import InputError
from advgame.threat import Linf, Threat

Version = Literal["standard", "plus", "rand", "lite"]

VERSIONS: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "lite": ("apgd-ce", "apgd-t"),
}
"""Their attacks in order; each sees the images that the ones before it left.

``"lite"`` is not AutoAttack's: the first half of the standard version.
"""

_SQUARE_SIDE = 5  # five windows stand side by side at the start
# DLR looks at the third and fourth logit
_LEAST_CLASSES = {"apgd-t": LEAST_CLASSES, "fab-t": 2, "apgd-dlr": 3}


class _Contiguous(torch.autograd.Function):
    """The identity; the gradient that comes back is contiguous, whatever layout the model has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


@contextlib.contextmanager
def _usual_dtype() -> Iterator[None]:
    """What pyautoattack makes without saying of which type is fp32, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _AsAutoAttackWants(nn.Module):
    """fp32 logits and contiguous gradients, which pyautoattack's buffers and views take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(_Contiguous.apply(x)).float()
        return logits.contiguous()


@dataclass(frozen=True)
class AutoAttackPart(Attack):
    """One attack of AutoAttack on one batch.

    pyautoattack seeds each attack anew for each batch, so that its attacks run one by one on the
    survivors give to the bit what they give in one go. Those of ``"rand"`` are for classifiers that
    answer at random: whoever asks for the verdict draws it, once per attack as AutoAttack does, at
    the point that the attack ended with. (AutoAttack's own loop hands back the clean image where
    its draw was right.)

    Args:
        threat: L∞ or L2 with one radius.
        part: e.g. ``"apgd-ce"``.
        version: whose settings, e.g. the number of restarts, apply.
        seed: of pyautoattack.
        square_queries: of Square.
    """

    threat: Threat
    part: str
    version: Version = "standard"
    seed: int = 0
    square_queries: int = 5000

    def check_task(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Refuse a classifier of too few classes, and images (C, H, W) too small for Square.

        Raises:
            InputError: what to use instead.
        """
        if self.part == "square" and self.threat.norm == "L2" and min(shape[1:]) < _SQUARE_SIDE:
            raise InputError(
                f"AutoAttack's square needs images of {_SQUARE_SIDE} pixels or more in L2, not "
                f"{shape}: --attacks pgd100,cw,aa:apgd-t does without it"
            )
        if classes < (least := _LEAST_CLASSES.get(self.part, 2)):
            raise InputError(
                f"AutoAttack's {self.part} needs at least {least} classes, this classifier has "
                f"{classes}: --attacks fgsm,pgd20,{','.join(FEW_CLASSES)} does without it"
            )

    def own(self, classes: int) -> Attack | None:
        """The same attack by our own code, where there is one.

        Args:
            classes: of the classifier; nine targets, and where there are fewer all wrong ones.
        """
        targets = min(9, classes - 1)
        if self.version == "standard" and self.part in ("apgd-ce", "apgd-t"):
            return APGD(self.threat, targets=targets if self.part == "apgd-t" else 0)
        if not isinstance(self.threat, Linf):
            return None
        if self.version == "standard" and self.part == "fab-t":
            return FAB(self.threat, targets=targets)
        return Square(self.threat, self.square_queries) if self.part == "square" else None

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("AutoAttack judges at one eps: give the threat a float")
        with attacked(model):
            with torch.enable_grad():
                logits = model(x[:2].clone().requires_grad_())
            if check:
                check_labels(y, len(x), check_logits(logits, y[:2]))
            classes = logits.shape[1]
            self.check_task(classes, (x.shape[1], x.shape[2], x.shape[3]))
            if self.part != "square" and not logits.requires_grad:
                # no gradient to follow: it finds nothing, and the flags say why
                return AttackResult(x, None, None, 0, 0)
            if (own := self.own(classes)) is not None:
                draws = torch.Generator().manual_seed(self.seed)
                return own.run(model, x, y.long(), rng=draws, check=False)
            return self._by_pyautoattack(model, x, y, classes)

    def _by_pyautoattack(
        self, model: nn.Module, x: Tensor, y: Tensor, classes: int
    ) -> AttackResult:
        # the process's own random streams are left as they were
        from pyautoattack import AutoAttack

        cuda = [x.device] if x.device.type == "cuda" else []
        quiet, private = warnings.catch_warnings(), torch.random.fork_rng(devices=cuda)
        with private, quiet, _usual_dtype():
            warnings.simplefilter("ignore")  # its checks are among our flags
            model = _AsAutoAttackWants(model)
            logging.getLogger("auto-attack").setLevel(logging.ERROR)
            judge = AutoAttack(
                model,
                norm=self.threat.norm,
                eps=float(self.threat.eps),
                seed=self.seed,
                device=x.device,
                version=self.version,
            )
            judge.verbose = False
            judge.attacks_to_run = [self.part]
            judge.square.n_queries = self.square_queries
            # nine targets in AutoAttack standard; fewer classes have fewer wrong ones
            judge.apgd_targeted.n_target_classes = min(9, classes - 1)
            judge.fab.n_target_classes = min(9, classes - 1)
            if self.version == "rand":
                judge.apgd.loss, judge.apgd.seed = self.part.removeprefix("apgd-"), judge.get_seed()
                with torch.no_grad():
                    return AttackResult(judge.apgd.perturb(x, y.long()), None, None, 0, 0)
            x_adv, said = judge.run_standard_evaluation(x, y.long(), batch_size=len(x))
        return AttackResult(x_adv, None, said != y, 0, 0)

"""FGSM, I-FGSM, PGD, MIM and their kin: projected gradient ascent, with settings per image.

One loop serves the family:  x ← Π( x + α · steepest(∇ₓ loss) ),  Π the projection on the threat
model's ball. The papers differ in its settings only:

- FGSM (Goodfellow et al. 2015): one step of size ε from the clean image;
- I-FGSM / BIM (Kurakin et al. 2017): several steps from the clean image;
- PGD (Madry et al. 2018): several steps from a random start, with restarts;
- MIM (Dong et al. 2018): I-FGSM along a decaying sum of the gradients, each over its L1 norm;
- LAS-AT's attacker (Jia et al. 2022): PGD with ε, steps and step size chosen per image.

An image whose steps are done leaves the batch: images are sorted by their number of steps, and
each step works on the prefix that still moves. A `StoppingRule` takes images out earlier. Nothing
is computed only to be masked.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.attacks.input_gradients import finite, input_gradient
from advgame.attacks.stopping import Seen, StoppingRule
from advgame.checks import check_labels, check_logits
from advgame.choices import BatchNormMode
from advgame.errors import InputError
from advgame.losses import Loss, cross_entropy, full_precision, misclassified
from advgame.run.options import parse_number
from advgame.threat import GaussianStart, Index, Threat, per_image


@dataclass(frozen=True)
class GradientAttack(Attack):
    """Projected gradient ascent in a threat model.

    Args:
        threat: the ball; its radius may be per image, (B,).
        steps: number of steps, int or integer tensor (B,); 0 leaves an image at its start.
        step_size: α in pixel units (L2: the length of a step), float or tensor (B,).
        start: ball, or noise, from which the random start is drawn; None starts at the clean
            image. One wider than ``threat`` is pulled in by the first step only, as LAS-AT's
            code does.
        restarts: independent runs; the one of higher loss is kept, image by image.
        keep: ``"last"`` returns the last iterate, ``"best"`` the iterate of highest loss, which
            costs one more forward.
        loss: per-image loss of (logits, labels), from `advgame.losses`.
        momentum: decay μ of MIM's sum of gradients; None follows the present gradient alone.
        targeted: descend the loss towards the labels given, instead of ascending away from them.
        stop_when_fooled: an image that is misclassified (targeted: classified as the target)
            leaves the batch at once, for good: for verdicts. Costs a host synchronisation per
            step; the result holds ``fooled`` instead of ``loss``.
        rule: ends the attack on each image, after ``steps`` steps at the latest: for trainings.
            Costs a host synchronisation per step; the result holds ``steps``.
        mode: batch norm and dropout while attacking, `advgame.attacks.boundary`.

    Raises:
        InputError: settings that no attack can use.
    """

    threat: Threat
    steps: int | Tensor
    step_size: float | Tensor
    start: Threat | GaussianStart | None = None
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    loss: Loss = cross_entropy
    momentum: float | None = None
    targeted: bool = False
    stop_when_fooled: bool = False
    rule: StoppingRule | None = None
    mode: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if isinstance(self.step_size, Tensor):
            if self.step_size.dim() != 1 or not self.step_size.is_floating_point():
                raise InputError("step sizes per image must be a float tensor (B,)")
        elif parse_number(self.step_size, "step_size") <= 0:
            raise InputError(f"step_size must be above 0, not {self.step_size}")
        if self.restarts < 1:
            raise InputError(f"restarts must be 1 or above, not {self.restarts}")
        if self.momentum is not None and parse_number(self.momentum, "momentum") < 0:
            raise InputError(f"momentum must be 0 or above, not {self.momentum}")
        if self.keep not in ("last", "best"):
            raise InputError(f"keep must be 'last' or 'best', not {self.keep!r}")
        if self.keep == "best" and self.stop_when_fooled:
            raise InputError("stop_when_fooled keeps the image that fooled: use keep='last'")
        if self.rule and (self.stop_when_fooled or self.restarts > 1 or self.keep == "best"):
            raise InputError(
                "a rule ends one run at its last iterate: leave stop_when_fooled, restarts and "
                "keep='best' away"
            )

    def _draws(self) -> str | None:
        return "a random start" if self.start is not None else None

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        for name in ("steps", "step_size"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.shape[0] != x.shape[0]:
                raise InputError(f"{name} has {value.shape[0]} entries for {len(x)} images")
            if isinstance(value, Tensor) and not bool((value >= 0).all()):
                raise InputError(f"{name} must not be negative or NaN")

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        if isinstance(self.threat.eps, Tensor) and self.threat.eps.shape[0] != x.shape[0]:
            raise InputError(f"eps has {self.threat.eps.shape[0]} entries for {len(x)} images")
        with attacked(model, self.mode):
            return _Ascent(self, model, x, y, check).run(rng)


def _check_steps(steps: int | Tensor) -> None:
    """Refuse what is no number of steps.

    Signs of steps per image are checked in `run`, where a training loop can leave the checks out.
    """
    if isinstance(steps, Tensor):
        if steps.dim() != 1 or steps.is_floating_point():
            raise InputError("steps per image must be an integer tensor (B,)")
        return
    try:
        whole = operator.index(steps)  # which whole numbers alone have, NumPy's among them
    except TypeError:
        whole = -1
    if whole < 0:
        raise InputError(f"steps must be a whole number, 0 or above, not {steps}")


class _Ascent:
    """One attack on one batch; images stand sorted by their number of steps, most first.

    ``rows`` names the images that still move: a prefix, or a list of positions in it when
    images also leave because they are fooled, or by a rule.
    """

    def __init__(
        self, attack: GradientAttack, model: nn.Module, x: Tensor, y: Tensor, check: bool
    ) -> None:
        self.attack, self.model, self.stops = attack, model, attack.stop_when_fooled
        self.unchecked = check  # the first logits are looked at, which costs no further forward
        self.dtype = x.dtype
        self.x_unsorted = full_precision(x.detach())
        self.order: Tensor | None = None
        if isinstance(attack.steps, Tensor):
            self.order = attack.steps.to(x.device).argsort(descending=True, stable=True)
            # waits for the device, once: how many images move at each step
            steps = sorted(attack.steps.tolist(), reverse=True)
            self.moving = [sum(own > tick for own in steps) for tick in range(steps[0])]
        else:
            self.moving = [len(x)] * attack.steps
        self.x, self.y = self._sorted(self.x_unsorted), self._sorted(y.long())
        self.threat = attack.threat
        if isinstance(attack.threat.eps, Tensor):
            self.threat = attack.threat.with_radii(self._sorted(attack.threat.eps.to(self.x)))
        self.project = self.threat.projector(self.x)
        size = attack.step_size
        self.step_size = self._sorted(size.to(self.x)) if isinstance(size, Tensor) else size
        # positions that neither were fooled nor were stopped yet
        self.standing = torch.arange(len(x), device=x.device)
        self.early = self.stops or attack.rule is not None
        self.forwards = self.backwards = 0

    def _sorted(self, values: Tensor) -> Tensor:
        return values if self.order is None else values[self.order]

    def _as_given(self, values: Tensor) -> Tensor:
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def run(self, rng: torch.Generator | None) -> AttackResult:
        if self.attack.rule is not None:
            self.attack.rule.begin(len(self.x))
            self.steps = torch.zeros_like(self.standing)
        x_adv, objective = self._restart(rng)
        for _ in range(1, self.attack.restarts):
            candidate, reached = self._restart(rng)
            better = self._more(reached, objective)
            x_adv = torch.where(per_image(better, x_adv), candidate, x_adv)
            objective = torch.where(better, reached, objective)
        fooled = loss = steps = None
        if self.attack.rule is not None:
            self.attack.rule.end(self.steps)
            steps = self._as_given(self.steps)
        elif self.stops:
            fooled = self._as_given(torch.isinf(objective))
        elif self.attack.restarts > 1 or self.attack.keep == "best":
            loss = self._as_given(-objective if self.attack.targeted else objective)
        made = self._as_given(x_adv)
        return AttackResult(made, loss, fooled, self.forwards, self.backwards, steps)

    def _restart(self, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """One run from one start: its candidates, and what they reach (+inf where they fool)."""
        if rng is None or self.attack.start is None:
            x_adv = self.x.clone()
        else:  # in the caller's order: an image's noise does not depend on the others' steps
            x_adv = self._sorted(self.attack.start.random_start(self.x_unsorted, rng))
        objective = torch.full((len(x_adv),), -torch.inf, device=x_adv.device)
        best = x_adv.clone() if self.attack.keep == "best" else x_adv
        self.gathered = torch.zeros_like(x_adv) if self.attack.momentum is not None else None
        for done, n in enumerate(self.moving):
            rows: Index = self._standing_below(n) if self.early else slice(n)
            leaf = x_adv[rows].detach().requires_grad_()
            if not len(leaf):
                break
            with torch.enable_grad():
                logits = self._logits(leaf)
                reached = self._objective(logits, rows)
                grad = input_gradient(reached.sum(), leaf)
            self.backwards += len(leaf)
            leaf = leaf.detach()
            if self.stops:
                kept = self._drop_fooled(logits, rows, objective)
                rows, leaf, grad = rows[kept], leaf[kept], grad[kept]  # type: ignore[index]
            elif self.attack.rule is not None:
                moved = self._ask(self.attack.rule, rows, (leaf, logits, reached), done)
                rows, leaf, grad = rows[moved], leaf[moved], grad[moved]  # type: ignore[index]
                self.steps[rows] += 1
            elif best is not x_adv:
                self._keep_better(best, objective, leaf, reached.detach(), rows)
            x_adv[rows] = self._step(leaf, grad, rows)
        if self.stops or best is not x_adv or self.attack.restarts > 1:
            self._score_last(x_adv, best, objective)
        return best, objective

    def _standing_below(self, n: int) -> Tensor:
        """The first n positions without those that were fooled or stopped."""
        if n == len(self.x):  # else the host waits for the device
            return self.standing
        return self.standing[: int((self.standing < n).sum())]  # they ascend

    def _logits(self, x_adv: Tensor) -> Tensor:
        self.forwards += len(x_adv)
        logits: Tensor = self.model(x_adv.to(self.dtype))
        if self.unchecked:
            check_logits(logits, self.y[: len(x_adv)])
            check_labels(self.y, len(self.y), logits.shape[1])
            self.unchecked = False
        return logits

    def _objective(self, logits: Tensor, rows: Index) -> Tensor:
        """What the attack maximises, one number per row."""
        loss = self.attack.loss(logits, self.y[rows])
        return -loss if self.attack.targeted else loss

    def _step(self, x_adv: Tensor, grad: Tensor, rows: Index) -> Tensor:
        size = self.step_size[rows] if isinstance(self.step_size, Tensor) else self.step_size
        if self.gathered is not None:
            assert self.attack.momentum is not None
            grad = finite(grad)
            length = grad.abs().flatten(1).sum(1).clamp_min(torch.finfo(grad.dtype).tiny)
            grad = self.gathered[rows] * self.attack.momentum + grad / per_image(length, grad)
            self.gathered[rows] = grad
        direction = self.threat.steepest(grad)
        return self.project(direction.mul_(per_image(size, grad)).add_(x_adv), rows)

    def _ask(
        self, rule: StoppingRule, rows: Index, at: tuple[Tensor, Tensor, Tensor], done: int
    ) -> Index:
        """Retire the rows that a rule ends; returns which of ``rows`` take this step."""
        assert isinstance(rows, Tensor)
        leaf, logits, reached = (one.detach() for one in at)
        delta, ball, y = leaf - self.x[rows], self.threat.select(rows), self.y[rows]
        limit = len(self.moving)
        stopped = rule.stop(Seen(rows, delta, ball, logits, reached, y, done, limit))
        kept = self._retire(rows, stopped)
        return slice(None) if rule.last_step else kept

    def _retire(self, rows: Tensor, leaving: Tensor) -> Tensor:
        """Take rows out for good; returns which of ``rows`` stay, as places in it.

        ``rows`` are the first of those that stand. Integers in place of masks: each mask that
        picks rows makes the host wait for the device.
        """
        kept = (~leaving).nonzero()[:, 0]
        self.standing = torch.cat([rows[kept], self.standing[len(rows) :]])
        return kept

    def _drop_fooled(self, logits: Tensor, rows: Index, objective: Tensor) -> Tensor:
        """Retire the rows that are fooled; returns which of ``rows`` stay, as places in it."""
        assert isinstance(rows, Tensor)
        wrong = misclassified(logits.detach(), self.y[rows])
        fooled = ~wrong if self.attack.targeted else wrong
        objective[rows] = objective[rows].masked_fill(fooled, torch.inf)
        return self._retire(rows, fooled)

    def _score_last(self, x_adv: Tensor, best: Tensor, objective: Tensor) -> None:
        """One more forward, at the last iterates."""
        rows: Index = self.standing if self.stops else slice(None)
        if not len(x_adv[rows]):
            return
        with torch.no_grad():
            logits = self._logits(x_adv[rows])
            reached = self._objective(logits, rows)
        if self.stops:
            objective[rows] = reached.to(objective.dtype)
            self._drop_fooled(logits, rows, objective)
        else:
            self._keep_better(best, objective, x_adv, reached, rows)

    def _keep_better(
        self, best: Tensor, objective: Tensor, x: Tensor, reached: Tensor, rows: Index
    ) -> None:
        """Where ``x`` reaches more than ``best`` did, write it there."""
        better = self._more(reached, objective[rows])
        best[rows] = torch.where(per_image(better, x), x, best[rows])
        objective[rows] = torch.where(better, reached, objective[rows])

    def _more(self, reached: Tensor, than: Tensor) -> Tensor:
        """Which objectives are larger; NaN is no answer, an error that is larger than any number.

        It is no answer of the target's class either, and smaller than any number there.
        """
        one, other = (than, reached) if self.attack.targeted else (reached, than)
        return (reached > than) | (one.isnan() & ~other.isnan())


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
    size = threat.eps / 4 if step_size is None else step_size
    return GradientAttack(threat, steps, size, start=threat, restarts=restarts)


def near_pgd(
    threat: Threat, steps: int = 10, step_size: float | Tensor | None = None
) -> GradientAttack:
    """PGD from Gaussian noise of 0.001 about the image, as TRADES and MART begin.

    ``step_size`` is ε/4 when not given.
    """
    return replace(pgd(threat, steps, step_size), start=GaussianStart())

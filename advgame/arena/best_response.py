"""Attacks on a mixture of classifiers by an attacker that knows members and weights.

Each makes one adversarial example per image that all members are asked about. None alone is a
verdict: gradient ascent on the expected loss finds the joint weakness of several members least of
all (Dbouk & Shanbhag 2022, section 4), and so overstates mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.arena.mixture import ClassifierMixture
from advgame.attacks.apgd import Ascent, on_the_face
from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.attacks.input_gradients import finite, input_gradient
from advgame.attacks.shards import ShardedAttack, Shards
from advgame.checks import check_logits
from advgame.errors import InputError
from advgame.evaluation.attacks import Suite
from advgame.evaluation.verdicts import predict
from advgame.losses import Loss, cross_entropy, full_precision, margin, misclassified
from advgame.threat import Threat, per_image

Expected = Literal["ce", "margin", "zero-one"]

_NEVER = 1e-9  # probabilities below are rounding
_RHO = 0.05  # of ε: ARC goes so far beyond a boundary


def zero_one(logits: Tensor, y: Tensor) -> Tensor:
    """A smooth error of 0 or 1, (B,): the sigmoid of the margin, flat where the matter is decided.

    A member that is fooled already pulls no more, and leaves the way to the others.
    """
    return margin(logits, y).sigmoid()


LOSSES: dict[Expected, Loss] = {"ce": cross_entropy, "margin": margin, "zero-one": zero_one}


@dataclass(frozen=True)
class ExpectedLoss(ShardedAttack):
    """Auto-PGD on Σ_d p_d loss(f_d(x), y): what the literature calls adaptive PGD.

    Of all points that it visits the one that is most often misclassified is returned, of equal ones
    that of the largest loss. Images that no member classifies correctly leave the batch.

    Args:
        threat: the ball, with one radius.
        loss: of each member: cross-entropy, margin, or `zero_one`.
        steps: gradient steps, from one random start.

    Raises:
        InputError: a radius per image, or no step.
    """

    threat: Threat
    loss: Expected = "ce"
    steps: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("mixtures are attacked at one eps: give the threat a float")
        if self.steps < 1:
            raise InputError(f"steps must be 1 or above, not {self.steps}")

    def _draws(self) -> str:
        return "a random start"

    @override
    def _on_shards(
        self, shards: Shards, x: Tensor, y: Tensor, logits: Tensor, rng: torch.Generator | None
    ) -> AttackResult:
        assert rng is not None
        as_mixture(shards.models[0])
        start = on_the_face(self.threat, x, rng)
        found, passes = shards.run(self._ascend, x, y, start)
        asked = int(passes.sum())
        return AttackResult(found, None, None, len(x) + asked, asked)

    def _ascend(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        settings = (as_mixture(model), self.threat, LOSSES[self.loss], self.steps)
        found, _, passes = _Ascent(*settings, x, y, start).run()
        return found, passes


class _Ascent(Ascent):
    """An ascent that keeps the point of the largest expected error."""

    def __init__(
        self,
        mixture: ClassifierMixture,
        threat: Threat,
        loss: Loss,
        steps: int,
        x: Tensor,
        y: Tensor,
        start: Tensor,
    ) -> None:
        self.mixture = mixture
        self.most = torch.full((len(x),), -1.0, dtype=torch.float64, device=x.device)
        self.at_most = torch.full((len(x),), -torch.inf, device=x.device)
        super().__init__(
            _All(mixture), threat, partial(self._expected, loss), steps, (x, y, y, start)
        )

    def _expected(self, loss: Loss, answers: Tensor, y: Tensor, aim: Tensor) -> Tensor:
        return self.mixture.expected_loss(answers, y, loss)

    def _fell(self, logits: Tensor) -> Tensor:
        """Where all members err; what is the worst so far is noted."""
        error = self.mixture.expected(misclassified(logits, self.y[:, None]))
        most, reached = self.most[self.rows], self.at_most[self.rows]
        same = (error - most).abs() < _NEVER
        better = ((error > most + _NEVER) | (same & (self.loss > reached))).nonzero()[:, 0]
        rows = self.rows[better]
        self.most[rows], self.at_most[rows] = error[better], self.loss[better]
        self.found[rows] = self.x_adv[better]
        return error > 1 - _NEVER


class _All(nn.Module):
    """A mixture as what maps images to the logits of all members."""

    def __init__(self, mixture: ClassifierMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture.answers(x)


@dataclass(frozen=True)
class ARC(Attack):
    """Attacking Randomised ensembles of Classifiers (Dbouk & Shanbhag 2022, algorithm 2).

    Several times, one member after the other, heaviest first, a local step δ of length η is bent
    towards fooling it. The member's boundary is linearised where the step leads so far, as in the
    authors' code, and the step is bent by as much as the boundary at distance ζ asks for:

        δ' = η (δ + β g) / ‖δ + β g‖,   β = η / (η - ζ) · |wᵀδ / ‖w‖_q + ζ| + ρ,

    where w is the gradient of the margin, g = -steepest(w) its unit direction, and β = η for the
    first member and where ζ ≥ η. A bent step is kept where the expected accuracy does not rise.
    Their algorithm 1, for linear classifiers, measures ζ at the step's start: it is not this.

    Args:
        threat: the ball, with one radius.
        steps: K.
        share: η over ε.
        classes: so many of a member's likeliest wrong classes are looked at for its nearest
            boundary, a backward pass each.
        start: an attack on the mixture from whose points the steps go on; the paper begins at the
            clean image. The expected accuracy never rises from there.

    Raises:
        InputError: a radius per image, or settings out of range.
    """

    threat: Threat
    steps: int = 20
    share: float = 0.25
    classes: int = 4
    start: Attack | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("mixtures are attacked at one eps: give the threat a float")
        if min(self.steps, self.classes) < 1 or not 0 < self.share <= 1:
            raise InputError(
                f"ARC takes 1 step and class or above, and a share in (0, 1], not {self.steps}, "
                f"{self.classes} and {self.share}"
            )

    def _draws(self) -> str | None:
        return None if self.start is None else self.start._draws()

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        mixture = as_mixture(model)
        order = mixture.weights.argsort(descending=True, stable=True).tolist()
        members = [mixture.members[one] for one in order]
        asked, formed = len(x), 0
        with attacked(mixture):
            with torch.no_grad():
                logits = mixture(x[:2])
            if check:
                check_logits(logits, y[:2])
            x_adv = x.clone()
            if self.start is not None:
                begun = self.start.run(mixture, x, y, rng=rng, check=False)
                x_adv, asked, formed = begun.x_adv, asked + begun.forwards, begun.backwards
            robust = mixture.expected(mixture.right(x_adv, y))
            for _ in range(self.steps):
                rows = (robust > _NEVER).nonzero()[:, 0]
                if not len(rows):
                    break
                x_adv[rows], robust[rows] = self._step(
                    mixture, members, x[rows], y[rows], x_adv[rows], robust[rows]
                )
                asked += len(rows) * (1 + len(members))
                formed += len(rows) * min(self.classes, logits.shape[1] - 1)
        return AttackResult(x_adv, None, None, asked, formed)

    def _step(
        self,
        mixture: ClassifierMixture,
        members: Sequence[nn.Module],
        x: Tensor,
        y: Tensor,
        here: Tensor,
        robust: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The points after one step from ``here``, and the expected accuracy there."""
        threat, eps = self.threat, float(cast(float, self.threat.eps))
        eta, rho = self.share * eps, _RHO * eps
        tiny = torch.finfo(x.dtype).tiny
        local, point = torch.zeros_like(x), here
        for number, member in enumerate(members):
            w, dual, distance = _nearest(member, point, y, self.classes, threat)
            along = (w * local).flatten(1).sum(1) / dual
            bend = eta / (eta - distance).clamp_min(tiny) * (along + distance).abs() + rho
            beta = torch.where((distance >= eta) | (number == 0), eta, bend)
            bent = local - per_image(beta, w) * threat.steepest(w)
            bent = bent * per_image(eta / threat.size(bent).clamp_min(tiny), bent)
            candidate = threat.project(here + bent, x)
            reached = mixture.expected(mixture.right(candidate, y))
            kept = reached <= robust + _NEVER
            robust = torch.where(kept, reached, robust)
            local = torch.where(per_image(kept, x), bent, local)
            point = torch.where(per_image(kept, x), candidate, point)
        return point, robust


_Boundary: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Gradient w of the margin (B, C, H, W), its dual norm (B,), distance |margin| / ‖w‖_q (B,)."""


def _nearest(member: nn.Module, x: Tensor, y: Tensor, classes: int, threat: Threat) -> _Boundary:
    """A member's nearest boundary to one of its likeliest wrong classes, linearised at x."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = full_precision(member(leaf))
        wrong = logits.detach().scatter(1, y[:, None], -torch.inf)
        targets = wrong.topk(min(classes, wrong.shape[1] - 1), dim=1).indices
        margins = logits.gather(1, y[:, None]) - logits.gather(1, targets)
        found = [
            finite(input_gradient(one.sum(), leaf, retain_graph=True)) for one in margins.unbind(1)
        ]
    tiny = torch.finfo(x.dtype).tiny
    # the gradient's dual norm is what the steepest direction of unit norm gains
    dual = torch.stack([(w * threat.steepest(w)).flatten(1).sum(1).clamp_min(tiny) for w in found])
    distances = margins.detach().abs().T / dual
    least, rows = distances.argmin(0), torch.arange(len(x), device=x.device)
    return torch.stack(found)[least, rows], dual[least, rows], distances[least, rows]


@dataclass(frozen=True)
class OnMember(Attack):
    """An attack, or several in turn, on one member of a mixture.

    Args:
        suite: each attack is made on the images that the ones before it left.
        member: its number.
    """

    suite: Suite
    member: int

    def _draws(self) -> str | None:
        return next((drawn for _, one in self.suite if (drawn := one._draws())), None)

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        member = as_mixture(model).members[self.member]
        x_adv, asked, formed = x.clone(), 0, 0
        with attacked(member):
            standing = predict(member, x, len(x)) == y
            for _, attack in self.suite:
                rows = standing.nonzero()[:, 0]
                if not len(rows):
                    break
                made = attack.run(member, x[rows], y[rows], rng=rng, check=check)
                x_adv[rows] = made.x_adv
                standing[rows] = predict(member, made.x_adv, len(rows)) == y[rows]
                asked, formed = asked + made.forwards, formed + made.backwards
        return AttackResult(x_adv, None, None, asked, formed)


@dataclass(frozen=True)
class WorstOf(Attack):
    """Of several attacks on a mixture, image by image, the example that is misclassified most.

    In expectation over members; of equal ones that of the largest expected cross-entropy, the clean
    image among them.

    Args:
        suite: attacks by name; each is made on the images that some member still has right.
    """

    suite: Suite

    def _draws(self) -> str | None:
        return next((drawn for _, one in self.suite if (drawn := one._draws())), None)

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        mixture = as_mixture(model)
        x_adv, asked, formed = x.clone(), len(x), 0
        with attacked(mixture):
            error, loss = _badness(mixture, x, y)
            for _, attack in self.suite:
                rows = (error < 1 - _NEVER).nonzero()[:, 0]
                if not len(rows):
                    break
                made = attack.run(mixture, x[rows], y[rows], rng=rng, check=check)
                reached, at = _badness(mixture, made.x_adv, y[rows])
                same = (reached - error[rows]).abs() < _NEVER
                better = (reached > error[rows] + _NEVER) | (same & (at > loss[rows]))
                kept = rows[better]
                x_adv[kept] = made.x_adv[better]
                error[kept], loss[kept] = reached[better], at[better]
                asked, formed = asked + made.forwards + len(rows), formed + made.backwards
        return AttackResult(x_adv, None, None, asked, formed)


def _badness(mixture: ClassifierMixture, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Expected error and expected cross-entropy, (B,) each, without a graph."""
    with torch.no_grad():
        answers = mixture.answers(x)
    wrong = misclassified(answers, y[:, None])
    return mixture.expected(wrong), mixture.expected_loss(answers, y, cross_entropy)


@dataclass(frozen=True)
class OnMixture(Attack):
    """An attack on a mixture that stays as it is, whose examples meet any classifier.

    It knows the mixture and not the draw: a pure strategy of PSRO's attacker. Passes are counted
    by member.

    Args:
        attack: on the mixture.
        mixture: for which the examples are made.
    """

    attack: Attack
    mixture: ClassifierMixture

    def _draws(self) -> str | None:
        return self.attack._draws()

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        made = self.attack.run(self.mixture, x, y, rng=rng, check=check)
        members = len(self.mixture.members)
        return AttackResult(
            made.x_adv, None, None, made.forwards * members, made.backwards * members
        )


ADAPTIVE: dict[str, Callable[[Threat], Attack]] = {
    "adaptive:ce": lambda threat: ExpectedLoss(threat, "ce"),
    "adaptive:margin": lambda threat: ExpectedLoss(threat, "margin"),
    "adaptive:zero-one": lambda threat: ExpectedLoss(threat, "zero-one"),
}
"""Gradient ascent on the expectation of a loss, by name."""
JOINT: dict[str, Callable[[Threat], Attack]] = {
    "arc": ARC,
    "arc:warm": lambda threat: ARC(threat, start=ExpectedLoss(threat, "zero-one")),
}
"""Attacks that look for a joint weakness of the members, by name."""


def as_mixture(model: nn.Module) -> ClassifierMixture:
    """The model, if it is a mixture.

    Raises:
        InputError: it is not.
    """
    if not isinstance(model, ClassifierMixture):
        raise InputError(
            f"this attack is on a ClassifierMixture, not on a {type(model).__name__}: for one "
            "classifier take another"
        )
    return model

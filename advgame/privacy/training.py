"""The minimax filter: filter and task classifier on one side, an inference adversary on the other.

    min_(u,w) max_v  ρ f_util(u, w) − f_priv(u, v)

f_util and f_priv are mean cross-entropies of the useful and of the private label given z = T(x; u).
That is min_u [ρ min_w f_util − min_v f_priv], Hamm's minimax filter, as a game of two players.

Source: Hamm 2016, Minimax filter; Hamm & Mehra 2018, Machine vs Machine, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from advgame.errors import InputError, unknown
from advgame.privacy.filters import Filter, mlp
from advgame.privacy.tasks import Part, PrivacyTask
from advgame.seeding import seeded_init, stream
from advgame.solvers import Functional, KBeam, Params, Risk, Solver, sensitivity, simultaneous

SOLVERS = ("alt", "minimax", "k-beam")


class Publisher(nn.Module):
    """The player u: filter and task classifier.

    Args:
        filter_: (n, D) -> z (n, d).
        head: z -> logits of the useful label (n, K).
    """

    def __init__(self, filter_: Filter, head: nn.Module) -> None:
        super().__init__()
        self.filter, self.head = filter_, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Filtered representation z (n, d) and the task's logits (n, K)."""
        z = self.filter(x)
        return z, self.head(z)


class FilterTraining:
    """The game on random batches of the training split: a step is one step of each player.

    Args:
        task: its training split is played on.
        filter_: learns.
        rho: ρ, the weight of the useful label.
        solver: ``"alt"`` and ``"minimax"`` as in `advgame.solvers`; ``"k-beam"`` descends at each
            image's worst of several adversaries.
        gamma: γ of ``"minimax"``.
        ascent_steps: of the adversary per step of the filter, on the same batch.
        beams: adversaries of ``"k-beam"``.
        adversary: ``"linear"`` or ``"mlp"``, the adversary's kind; the task classifier's too.
        hidden: width of the MLPs.
        lr: of Adam on filter and task classifier.
        adversary_lr: of Adam on the adversary.
        weight_decay: of all; without it the adversary learns the training images by heart.
        batch_size: images per step.
        seed: of the first weights of the classifiers and of the batches.

    Raises:
        InputError: settings outside of their range.
    """

    def __init__(
        self,
        task: PrivacyTask,
        filter_: Filter,
        *,
        rho: float = 1.0,
        solver: str = "minimax",
        gamma: float = 1.0,
        ascent_steps: int = 5,
        beams: int = 3,
        adversary: str = "mlp",
        hidden: int = 32,
        lr: float = 1e-3,
        adversary_lr: float = 2e-2,
        weight_decay: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        check_game(rho, solver, adversary, lr, adversary_lr, weight_decay, beams)
        size = len(task.train.x)
        if not 2 <= batch_size <= size:
            raise InputError(f"batch size must lie in 2..{size}, not {batch_size}")
        self.task, self.rho, self.batch_size = task, rho, batch_size
        self.rng = stream(seed, "batches")

        def classifier(classes: int, name: str) -> nn.Module:
            with seeded_init(seed, name):
                if adversary == "linear":
                    return nn.Linear(filter_.dim, classes).to(task.train.x)
                return mlp(filter_.dim, hidden, classes).to(task.train.x)

        self.publisher = Publisher(filter_, classifier(task.useful_classes, "task"))
        count = beams if solver == "k-beam" else 1
        self.adversaries = [
            classifier(task.private_classes, f"adversary{number}") for number in range(count)
        ]
        self._u, self._v = Functional(self.publisher), Functional(self.adversaries[0])
        descend = Adam(self._u.params, lr, weight_decay=weight_decay, fused=True)
        groups = [{"params": list(one.parameters())} for one in self.adversaries]
        ascend = Adam(groups, adversary_lr, weight_decay=weight_decay, fused=True)
        self.solver: Solver | KBeam
        if solver == "k-beam":
            self.solver = KBeam(descend, ascend, ascent_steps)
        else:
            direction = sensitivity(gamma) if solver == "minimax" else simultaneous
            self.solver = Solver(direction, descend, ascend, ascent_steps)

    def risk(self, part: Part) -> Risk:
        """ρ f_util − f_priv of each image of ``part``, (n,), as a function of u and v."""
        return lambda u, v: self._scored(self._u(u, part.x), part, v)

    def _scored(self, published: tuple[Tensor, Tensor], part: Part, v: Params) -> Tensor:
        z, logits = published
        useful = cross_entropy(logits, part.useful, reduction="none")
        private = cross_entropy(self._v(v, z), part.private, reduction="none")
        return self.rho * useful - private

    def step(self) -> dict[str, Tensor]:
        """One step of both players on a batch; see the solver's.

        Raises:
            InputError: training diverged: the filter gives out what is not finite or a constant.
        """
        train = self.task.train
        drawn = torch.randperm(len(train.x), generator=self.rng)[: self.batch_size].to(
            train.x.device
        )
        self.publisher.train()
        batch = Part(train.x[drawn], train.useful[drawn], train.private[drawn])
        if isinstance(self.solver, KBeam):
            return self.solver.step(self.risk(batch))
        # u stands still until the step ends, so that all ascents see the same z
        published = self._u(self._u.params, batch.x)
        return self.solver.step(lambda u, v: self._scored(published, batch, v))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Where the game is, by the classifiers that play it.

        Returns:
            ``game/useful_risk`` and ``game/private_risk``: mean cross-entropies on the training
            split, in nats, the private one of the adversary that knows most;
            ``game/risk``: ρ times the one less the other; ``eval/useful`` and ``eval/private``:
            accuracies on the validation split, the private one of the best adversary.
        """
        self.filter()
        train, held_out = self.task.train, self.task.validation

        def each(
            part: Part, score: Callable[[Tensor, Tensor], Tensor]
        ) -> tuple[float, list[float]]:
            z, logits = self.publisher(part.x)
            private = [float(score(one(z), part.private)) for one in self.adversaries]
            return float(score(logits, part.useful)), private

        useful, private = each(train, cross_entropy)
        right, found = each(held_out, lambda logits, y: (logits.argmax(1) == y).double().mean())
        return {
            "game/useful_risk": useful,
            "game/private_risk": min(private),
            "game/risk": self.rho * useful - min(private),
            "eval/useful": right,
            "eval/private": max(found),
        }

    def filter(self) -> Filter:
        """The filter as it is now, ready for use."""
        return self.publisher.eval().filter.fit_scale(self.task.train.x)


def check_game(
    rho: float,
    solver: str,
    adversary: str,
    lr: float,
    adversary_lr: float,
    weight_decay: float,
    beams: int,
) -> None:
    """Refuse settings that cannot work.

    Raises:
        InputError: which one.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if adversary not in ("linear", "mlp"):
        raise InputError(f"adversary must be linear or mlp, not {adversary!r}")
    if not (0 <= rho < math.inf and 0 <= weight_decay < math.inf):
        raise InputError(
            f"rho and weight_decay must be finite and 0 or above, not {rho} and {weight_decay}"
        )
    if not (0 < lr < math.inf and 0 < adversary_lr < math.inf):
        raise InputError(
            f"lr and adversary_lr must be finite and above 0, not {lr} and {adversary_lr}"
        )
    if beams < 1:
        raise InputError(f"beams must be 1 or above, not {beams}")

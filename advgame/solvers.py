"""Two players and one differentiable risk f(u, v): u lowers it, v raises it.

Nothing here knows of images. A risk is any function of two tuples of tensors; `Functional` makes
one of a module. A `Direction` says where the players go from (u, v), and `Solver` takes the steps
with two optimisers of torch.optim, so that the rates λ of u and σ of v, schedules and momenta are
theirs.

    defender, attacker = Functional(f), Functional(g)
    solver = Solver(sensitivity(1.0), Adam(defender.params), Adam(attacker.params))
    for x, y in batches:
        solver.step(lambda u, v: cross_entropy(defender(u, x + attacker(v, x, y)), y))

Source: Hamm & Mehra 2018, Machine vs Machine, algorithm 1 and equations 11 to 19; Metz et al. 2017
(unrolled); Korpelevich 1976 (extragradient); Popov 1980 and Daskalakis et al. 2018 (optimistic);
Hamm & Noh 2018 (K-beam).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from advgame.errors import InputError
from advgame.optimizers import load_optimizer

Params = tuple[Tensor, ...]
Risk = Callable[[Params, Params], Tensor]
"""f(u, v): a scalar, or (B,) for one value per sample, of which the mean counts."""
Direction = Callable[[Risk, Params, Params], tuple[Params, Params]]
"""f, u and v -> what u descends and what v ascends, like u and v, which are leaves."""


class Functional:
    """A module as a function of its trainable parameters; buffers stay the module's own.

    Args:
        module: whose parameters that require gradients are ``params``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = tuple(named)
        self.params: Params = tuple(named.values())

    def __call__(self, params: Params, *inputs: Any) -> Any:
        """The module's output with ``params`` in place of its own."""
        return functional_call(self.module, dict(zip(self.names, params, strict=True)), inputs)


def simultaneous(risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
    """Alt, the reference: both gradients at the same point (Machine vs Machine, eq. 19)."""
    return _both(risk(u, v).mean(), u, v)


def sensitivity(gamma: float) -> Direction:
    """Minimax by sensitivity penalty: u descends f + γ/2 ‖∂f/∂v‖² (algorithm 1, eq. 16).

    With one plain ascent of size σ the total derivative (eq. 15), whose first term is at the new
    v, is that of γ = σ; with both terms at the old v, as algorithm 1 has them, it is that of
    γ = 2σ, to first order in σ. The paper leaves γ free. Where v's optimiser rescales gradients
    (Adam), no γ is exact.

    Args:
        gamma: γ, 0 for `simultaneous`.

    Raises:
        InputError: a negative γ.
    """
    if not gamma >= 0:
        raise InputError(f"gamma must be 0 or above, not {gamma}")

    def direction(risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
        value = risk(u, v).mean()
        ascend = _grad(value, v, create_graph=True)
        penalised = value + gamma / 2 * _squared(ascend)
        return _grad(penalised, u), tuple(one.detach() for one in ascend)

    return direction


def maximin(direction: Direction) -> Direction:
    """The same solver with the roles swapped and the sign of f flipped (section 4.3).

    Raises:
        InputError: a direction that treats both players alike.
    """
    if direction is simultaneous or isinstance(direction, Optimistic):
        raise InputError("this direction treats both players alike: it has no maximin form")

    def swapped(risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
        down, up = direction(lambda a, b: -risk(b, a), v, u)
        return tuple(-one for one in up), tuple(-one for one in down)

    return swapped


def unrolled(steps: int, sigma: float) -> Direction:
    """The player u sees through ``steps`` plain ascents of v, to second order; v makes one.

    Args:
        steps: k; 0 is `simultaneous`.
        sigma: rate of the ascents.

    Raises:
        InputError: a negative number.
    """
    if steps < 0 or not sigma >= 0:
        raise InputError(f"steps and sigma must be 0 or above, not {steps} and {sigma}")

    def direction(risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
        ahead = v
        for _ in range(steps):
            ascend = _grad(risk(u, ahead).mean(), ahead, create_graph=True)
            ahead = tuple(p + sigma * g for p, g in zip(ahead, ascend, strict=True))
        down = _grad(risk(u, ahead).mean(), u)
        return down, _grad(risk(u, v).mean(), v)

    return direction


def extragradient(rate_u: float, rate_v: float) -> Direction:
    """Both gradients at the point that a plain step of both players leads to.

    Args:
        rate_u: λ of that step.
        rate_v: its σ.

    Raises:
        InputError: a negative rate.
    """
    if not (rate_u >= 0 and rate_v >= 0):
        raise InputError(f"rates must be 0 or above, not {rate_u} and {rate_v}")

    def direction(risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
        down, up = simultaneous(risk, u, v)
        # leaves: the step itself is a constant
        return simultaneous(risk, _leaves(u, down, -rate_u), _leaves(v, up, rate_v))

    return direction


class Optimistic:
    """2 g − (g of the step before), of both players; the first step is a plain one.

    For the bilinear f(u, v) = uv with one rate it converges where `simultaneous` spirals out.
    """

    def __init__(self) -> None:
        self.last: tuple[Params, Params] | None = None

    def __call__(self, risk: Risk, u: Params, v: Params) -> tuple[Params, Params]:
        """Both players' gradients here, doubled, less those of the last step."""
        now = simultaneous(risk, u, v)
        before = self.last or now
        self.last = now
        down, up = (
            tuple(2 * new - old.to(new) for new, old in zip(a, b, strict=True))
            for a, b in zip(now, before, strict=True)
        )
        return down, up

    def state_dict(self) -> dict[str, Any]:
        """The gradients of the last step."""
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.last = state["last"]


class Solver:
    """Takes steps in a direction.

    Args:
        direction: of both players.
        descend: optimiser whose parameters are u.
        ascend: optimiser whose parameters are v; its steps go up.
        ascent_steps: of v per step of u; in all but the last v moves alone, by the plain gradient.

    Raises:
        InputError: a number of ascent steps below 1.
    """

    def __init__(
        self, direction: Direction, descend: Optimizer, ascend: Optimizer, ascent_steps: int = 1
    ) -> None:
        if ascent_steps < 1:
            raise InputError(f"ascent_steps must be 1 or above, not {ascent_steps}")
        self.direction, self.ascent_steps = direction, ascent_steps
        self.descend, self.ascend = descend, ascend
        self.u, self.v = _params(descend), _params(ascend)

    def step(self, risk: Risk) -> dict[str, Tensor]:
        """One step of both players; they move together, from the same point.

        Returns:
            ``game/descent`` and ``game/ascent``: norms of what the two follow.
        """
        for _ in range(self.ascent_steps - 1):
            _apply(self.ascend, self.v, _grad(risk(self.u, self.v).mean(), self.v), up=True)
        down, up = self.direction(risk, self.u, self.v)
        _apply(self.descend, self.u, down)
        _apply(self.ascend, self.v, up, up=True)
        return {"game/descent": _squared(down).sqrt(), "game/ascent": _squared(up).sqrt()}

    def state_dict(self) -> dict[str, Any]:
        """Optimisers and direction; parameters are the caller's."""
        inner = self.direction.state_dict() if isinstance(self.direction, Optimistic) else {}
        return {
            "descend": self.descend.state_dict(),
            "ascend": self.ascend.state_dict(),
            "direction": inner,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        load_optimizer(self.descend, state["descend"])
        load_optimizer(self.ascend, state["ascend"])
        if isinstance(self.direction, Optimistic):
            self.direction.load_state_dict(state["direction"])


class KBeam:
    """The player u descends at the worst of K maximisers, then each of them ascends, at the new u.

    Where the risk has a value per sample, the worst is each sample's own, as in the mixture of
    attacks of Machine vs Machine (eqs. 20, 21).

    Args:
        descend: optimiser whose parameters are u.
        ascend: optimiser with a parameter group for each maximiser v_k.
        ascent_steps: J, of the maximisers per step of u.

    Raises:
        InputError: a number of ascent steps below 1.

    Source: Hamm & Noh 2018, K-beam minimax, algorithm 1 with ε = 0.
    """

    def __init__(self, descend: Optimizer, ascend: Optimizer, ascent_steps: int = 1) -> None:
        if ascent_steps < 1:
            raise InputError(f"ascent_steps must be 1 or above, not {ascent_steps}")
        self.descend, self.ascend, self.ascent_steps = descend, ascend, ascent_steps
        self.u = _params(descend)
        self.beams: list[Params] = [tuple(group["params"]) for group in ascend.param_groups]

    def step(self, risk: Risk | Sequence[Risk]) -> dict[str, Tensor]:
        """One step of u, then J of every maximiser.

        Args:
            risk: f, or one for each maximiser: a fixed attack's group of ``ascend`` is empty.

        Returns:
            ``game/worst``: mean of the worst risk before the step; ``game/lead0``, ...: share of
            the samples for which that maximiser is the worst.
        """
        risks = [risk] * len(self.beams) if callable(risk) else list(risk)
        values = torch.stack([f(self.u, v) for f, v in zip(risks, self.beams, strict=True)])
        worst, leader = values.max(0)
        worst = worst.mean()
        _apply(self.descend, self.u, _grad(worst, self.u))
        everyone = tuple(p for v in self.beams for p in v)
        for _ in range(self.ascent_steps if everyone else 0):
            after = [f(self.u, v).mean() for f, v in zip(risks, self.beams, strict=True) if v]
            _apply(self.ascend, everyone, _grad(torch.stack(after).sum(), everyone), up=True)
        leads = {f"game/lead{k}": (leader == k).float().mean() for k in range(len(risks))}
        return {"game/worst": worst.detach(), **leads}


def _params(optimizer: Optimizer) -> Params:
    return tuple(p for g in optimizer.param_groups for p in g["params"] if p.requires_grad)


def _apply(optimizer: Optimizer, params: Params, grads: Params, up: bool = False) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = -g if up else g
    optimizer.step()
    optimizer.zero_grad()


def _grad(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """Gradients; zero where a parameter does not take part."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(p) for p in params)
    found: Params = torch.autograd.grad(
        value, params, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return found


def _both(value: Tensor, u: Params, v: Params) -> tuple[Params, Params]:
    grads = _grad(value, (*u, *v))
    return grads[: len(u)], grads[len(u) :]


def _leaves(params: Params, grads: Params, rate: float) -> Params:
    moved = (p.detach() + rate * g for p, g in zip(params, grads, strict=True))
    return tuple(p.requires_grad_() for p in moved)


def _squared(tensors: Params) -> Tensor:
    """Squared norm of all of them together."""
    return torch.stack([one.square().sum() for one in tensors]).sum()

"""`Updater`, the interface of optimisers of one flat parameter vector, by hand or learned.

A discriminator's parameters are such a vector. Hand-made and learned updaters share the interface,
so that whatever trains with a learned one has a baseline with a known answer (`agents.updaters`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.optimizers import load_optimizer

Objective = Callable[[Tensor], Tensor]  # parameters (m,) -> scalar loss to be minimised


@dataclass(frozen=True)
class Update:
    """What one update gives; nothing here carries a graph.

    Args:
        params: the new parameters (m,).
        loss: objective at the old parameters, scalar.
        grad: its gradient there (m,).
        stats: scalars of the updater's own, by name.
    """

    params: Tensor
    loss: Tensor
    grad: Tensor
    stats: dict[str, Tensor]


class Updater(ABC):
    """Moves parameters (m,) downhill; `update` draws no chance.

    Your own: write `step`, and where it remembers something `begin`, `saved` and `restore`. The
    rest is what a training calls. A loss that is not finite is passed on, not hidden: look at
    `Update.loss`.
    """

    _size = 0
    """m of the parameters that `init` or a saved state has seen"""

    def __init_subclass__(cls) -> None:
        if (cls.saved is Updater.saved) != (cls.restore is Updater.restore):
            raise TypeError(f"{cls.__name__} has one of saved and restore: resuming takes both")

    # what an updater says

    @abstractmethod
    def step(
        self, params: Tensor, grad: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The new parameters (m,), and scalars to log.

        Args:
            params: (m,), constants, its own copy.
            grad: (m,) of the objective there.
            objective: for updaters that look at other points too.
        """

    def begin(self, params: Tensor) -> None:  # noqa: B027
        """Forget everything; parameters (m,) of this size, type and device come next."""

    def saved(self) -> dict[str, Any]:
        """What later steps depend on: tensors, numbers and containers of them; no copies needed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what `saved` returned; copy its tensors.

        Without `begin` before it they say the device.
        """

    def check_room(self, size: int, folder: Path) -> None:  # noqa: B027
        """Refuse what will not fit, before a run begins.

        Args:
            size: m, number of parameters to update.
            folder: of the run, which keeps two checkpoints while the next is written; it need not
                exist yet.

        Raises:
            InputError: how much memory or disk is missing.
        """

    # what a training calls

    def init(self, params: Tensor) -> None:
        """Begin anew for parameters (m,).

        Raises:
            InputError: not a flat vector of floats.
        """
        check_vector(params)
        self._size = 0
        self.begin(params.detach())
        self._size = len(params)

    def update(self, params: Tensor, objective: Objective) -> Update:
        """One step from ``params`` (m,), to be minimised; `init` or `load_state_dict` comes first.

        Raises:
            InputError: no `init`, another number of parameters, no scalar objective, or a `step`
                that returns something else than it should.
        """
        if params.shape != (self._size,):
            raise InputError(f"call init with parameters of shape {tuple(params.shape)} first")
        loss, grad = loss_and_gradient(params, objective)
        new, stats = self._checked(self.step(params.detach().clone(), grad, objective))
        return Update(new, loss, grad, stats)

    def _checked(self, made: object) -> tuple[Tensor, dict[str, Tensor]]:
        """What `step` returned, without graph; a stranger's may return anything."""
        match made:
            case (Tensor() as new, dict() as stats) if new.shape == (self._size,):
                try:
                    scalars = {name: _scalar(value) for name, value in stats.items()}
                except (TypeError, ValueError, RuntimeError) as error:
                    raise InputError(
                        f"{type(self).__name__}.step must return scalars to log, e.g. "
                        f'{{"updater/step": step.norm()}}, not {stats}'
                    ) from error
                return new.detach().clone(), scalars
            case (Tensor() as new, _) | (Tensor() as new):
                what = f"parameters of shape {tuple(new.shape)}"
            case _:
                what = repr(made)
        raise InputError(
            f"{type(self).__name__}.step must return the new parameters, a tensor ({self._size},), "
            f"and a dict of scalars to log, {{}} for none, not {what}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors; the tensors are the live ones, not copies.

        Raises:
            InputError: no `init`.
        """
        if not self._size:
            raise InputError("nothing to save: call init first")
        return {"size": self._size, "state": self.saved()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, which is copied; the next updates are equal to the bit.

        Without `init` it is on the state's device.
        """
        self.restore(state["state"])
        self._size = state["size"]


def _scalar(value: Any) -> Tensor:
    """A number, or a tensor of one entry, as a scalar of its own."""
    made = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    return made.reshape(())


def loss_and_gradient(params: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The objective at ``params`` (m,), scalar, and its gradient (m,); both without graph.

    Raises:
        InputError: the objective is no differentiable scalar function of its argument.
    """
    with torch.enable_grad():
        leaf = params.detach().requires_grad_()
        loss = objective(leaf)
        if loss.ndim or not loss.requires_grad:
            raise InputError(
                f"an objective must return a differentiable scalar, not shape {tuple(loss.shape)} "
                f"with requires_grad={loss.requires_grad}"
            )
        (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def check_vector(params: Tensor) -> Tensor:
    """Refuse anything but a flat vector of floats that is not empty; returns it.

    Raises:
        InputError: what it is instead.
    """
    if params.ndim != 1 or not len(params) or not params.is_floating_point():
        raise InputError(
            f"an updater takes a flat float vector, not {tuple(params.shape)} {params.dtype}: "
            "flatten it first"
        )
    return params


def check_positive(**values: float) -> None:
    """Refuse settings that are not finite and above 0.

    Raises:
        InputError: which one.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be finite and above 0, not {value}")


def load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Any]) -> None:
    """Give an optimiser a copy of a saved ``state_dict()["state"]``; its settings stay its own."""
    groups = optimizer.state_dict()["param_groups"]
    load_optimizer(optimizer, {"state": moments, "param_groups": groups})

"""`Updater`, the interface of optimisers of one flat parameter vector, by hand or learned.

A discriminator's parameters are such a vector. Hand-made and learned updaters share the interface,
so that whatever trains with a learned one has a baseline with a known answer (`agents.updaters`).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advgame.errors import InputError

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

    A loss that is not finite is passed on, not hidden: look at `Update.loss`.
    """

    _size = 0
    """m of the parameters that `init` or a saved state has seen"""

    def check_room(self, size: int, folder: Path) -> None:  # noqa: B027
        """Refuse what will not fit, before a run begins.

        Args:
            size: m, number of parameters to update.
            folder: of the run, which keeps two checkpoints while the next is written; it need not
                exist yet.

        Raises:
            InputError: how much memory or disk is missing.
        """

    def init(self, params: Tensor) -> None:
        """Begin anew for parameters (m,).

        Raises:
            InputError: not a flat vector of floats.
        """
        check_vector(params)
        self._size = 0
        self._begin(params.detach())
        self._size = len(params)

    def update(self, params: Tensor, objective: Objective) -> Update:
        """One step from ``params`` (m,), to be minimised; `init` or `load_state_dict` comes first.

        Raises:
            InputError: no `init`, another number of parameters, or no scalar objective.
        """
        if params.shape != (self._size,):
            raise InputError(f"call init with parameters of shape {tuple(params.shape)} first")
        loss, grad = loss_and_gradient(params, objective)
        new, stats = self._step(params.detach(), grad, objective)
        return Update(new, loss, grad, stats)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors; the tensors are the live ones, not copies.

        Raises:
            InputError: no `init`.
        """
        if not self._size:
            raise InputError("nothing to save: call init first")
        return self._state()

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, which is copied; the next updates are equal to the bit.

        Without `init` it is on the state's device.
        """

    @abstractmethod
    def _begin(self, params: Tensor) -> None:
        """`init`, of parameters that have been checked."""

    @abstractmethod
    def _step(
        self, params: Tensor, grad: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The new parameters (m,) without graph, and scalars to log.

        Args:
            params: (m,), constants.
            grad: (m,) of the objective there.
            objective: for updaters that look at other points too.
        """

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What `state_dict` returns once `init` was called."""


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
    """Give an optimiser a copy of a saved ``state_dict()["state"]``; its settings stay its own.

    Torch keeps the tensors that it is given: without the copy two updaters would share them.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": copy.deepcopy(moments), "param_groups": groups})

"""Updaters of a flat parameter vector: the interface, and the hand-made ones beside learned ones.

An updater is handed parameters (m,) and an objective to be MINIMISED, and returns the next
parameters. Hand-made and learned updaters share the interface, so that whatever trains with a
learned one has a baseline with a known answer.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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


class Updater(Protocol):
    """Moves parameters (m,) downhill; `update` draws no chance.

    A loss that is not finite is passed on, not hidden: look at `Update.loss`.
    """

    def init(self, params: Tensor) -> None:
        """Begin anew for parameters (m,)."""

    def update(self, params: Tensor, objective: Objective) -> Update:
        """One step from ``params`` (m,); `init` or `load_state_dict` comes first."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, numbers and tensors; the tensors are the live ones, not copies."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, which is copied; the next updates are equal to the bit."""


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


class TorchUpdater(ABC):
    """A `torch.optim` optimiser over one flat vector."""

    def __init__(self) -> None:
        self._leaf: Tensor | None = None

    @abstractmethod
    def _optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        """The optimiser of this leaf."""

    def init(self, params: Tensor) -> None:
        """Begin anew for parameters (m,).

        Raises:
            InputError: not a flat vector of floats.
        """
        self._leaf = check_vector(params).detach().clone()
        self._torch = self._optimizer(self._leaf)

    def update(self, params: Tensor, objective: Objective) -> Update:
        """One optimiser step from ``params`` (m,).

        Raises:
            InputError: no `init`, another number of parameters, or no scalar objective.
        """
        if self._leaf is None or params.shape != self._leaf.shape:
            raise InputError(f"call init with parameters of shape {tuple(params.shape)} first")
        loss, grad = loss_and_gradient(params, objective)
        self._leaf.copy_(params.detach())
        self._leaf.grad = grad
        self._torch.step()
        self._leaf.grad = None
        return Update(self._leaf.clone(), loss, grad, {})

    def state_dict(self) -> dict[str, Any]:
        """The parameters' last value, and the optimiser's moments and step count.

        Raises:
            InputError: no `init`.
        """
        if self._leaf is None:
            raise InputError("nothing to save: call init first")
        return {"params": self._leaf, "optimizer": self._torch.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the settings stay this updater's."""
        # the state may come from the CPU: parameters that init has seen say where to go on
        device = state["params"].device if self._leaf is None else self._leaf.device
        self.init(state["params"].to(device))
        # torch keeps the tensors that it is given: without the copy two updaters would share them
        groups = self._torch.state_dict()["param_groups"]
        moments = copy.deepcopy(state["optimizer"])
        self._torch.load_state_dict({"state": moments, "param_groups": groups})


class AdamUpdater(TorchUpdater):
    """Adam (Kingma & Ba 2015), as the original GAIL trains its discriminator (Ho & Ermon 2016).

    Args:
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second.

    Raises:
        InputError: lr or eps not above 0, or a beta outside [0, 1).
    """

    def __init__(
        self, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        check_positive(lr=lr, eps=eps)
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas must lie in [0, 1), not {betas}")
        super().__init__()
        self.lr, self.betas, self.eps = lr, betas, eps

    def _optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([leaf], lr=self.lr, betas=self.betas, eps=self.eps)


class SGDUpdater(TorchUpdater):
    """Gradient descent, with heavy-ball momentum if asked.

    Args:
        lr: learning rate.
        momentum: share of the last step that is kept.

    Raises:
        InputError: lr not above 0, or momentum outside [0, 1).
    """

    def __init__(self, lr: float, momentum: float = 0.0) -> None:
        check_positive(lr=lr)
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), not {momentum}")
        super().__init__()
        self.lr, self.momentum = lr, momentum

    def _optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], lr=self.lr, momentum=self.momentum)

"""Updaters by name, by hand or learned: what moves GAIL's discriminator, or any flat vector."""

from __future__ import annotations

import inspect
import io
import pickle
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError, unknown
from advgame.imitation.updater import Objective, Updater, check_positive, load_moments
from advgame.own_code import in_words, own_code
from agents.coordinatewise import CoordinatewiseUpdater
from agents.learned_updaters import MLPUpdater


class TorchUpdater(Updater):
    """A `torch.optim` optimiser over one flat vector."""

    _leaf: Tensor | None = None

    @abstractmethod
    def _optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        """The optimiser of the parameters ``leaf`` (m,)."""

    @override
    def begin(self, params: Tensor) -> None:
        self._leaf = params.clone()
        self._torch = self._optimizer(self._leaf)

    @override
    def step(
        self, params: Tensor, grad: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._leaf is not None
        self._leaf.copy_(params)
        self._leaf.grad = grad
        self._torch.step()
        self._leaf.grad = None
        return self._leaf.clone(), {}

    @override
    def saved(self) -> dict[str, Any]:
        return {"params": self._leaf, "optimizer": self._torch.state_dict()["state"]}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        device = state["params"].device if self._leaf is None else self._leaf.device
        self.begin(state["params"].to(device))
        load_moments(self._torch, state["optimizer"])


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
        self.lr, self.betas, self.eps = lr, betas, eps

    @override
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
        self.lr, self.momentum = lr, momentum

    @override
    def _optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], lr=self.lr, momentum=self.momentum)


# what keeps a learning U from swinging up (docs/updaters.md)
_stable = partial(MLPUpdater, zero_last=True, scaling="rms", leak=0.1)

UPDATERS: dict[str, tuple[str, Callable[..., Updater]]] = {
    "adam": ("Adam, lr 0.01 as Ho & Ermon's GAIL", AdamUpdater),
    "sgd": ("gradient descent, lr 0.1", partial(SGDUpdater, lr=0.1)),
    "mlp": (
        "L2L's U as the paper prints it, layers 2m-8m-4m-m, our initialisation: can diverge",
        MLPUpdater,
    ),
    "mlp-stable": (
        "L2L's U of the same size with our stabilisers: zero last layer, inputs divided by their "
        "rms, leak 0.1",
        partial(_stable, lr=3e-7),
    ),
    "mlp-narrow": (
        "U with 512 and 256 hidden units and the same stabilisers; not the paper's",
        partial(_stable, lr=1e-5, hidden=(512, 256)),
    ),
    "coordinatewise": (
        "one small network for all coordinates, Adam when untrained",
        CoordinatewiseUpdater,
    ),
}


def make_updater(
    name: str,
    *,
    lr: float | None,
    seed: int,
    blocks: tuple[int, ...] | None = None,
    **options: Any,
) -> Updater:
    """An updater of `UPDATERS`, or of your own code.

    Args:
        name: which, or ``package.module:factory(1, width=8)``, which is imported and called; it
            returns an `Updater`.
        lr: learning rate; of the updater's own Adam where it learns. None takes the name's.
        seed: of a learned updater's weights.
        blocks: sizes of the parameter blocks, for those that scale block by block.
        options: further arguments of the class.

    A factory of your own is given ``seed`` and ``blocks`` if it takes them, and what is typed.

    Raises:
        InputError: unknown name or option, a setting out of range, or own code that fails or
            returns no `Updater`.
    """
    check_updater(name)
    if name not in UPDATERS:
        if lr is not None or options:
            raise InputError(f"{name}: type its settings within its brackets")
        words = "an advgame.imitation.Updater"
        updater: Updater = own_code(name).make(Updater, words, seed=seed, blocks=blocks)
        return updater
    factory = UPDATERS[name][1]
    takes = inspect.signature(factory).parameters
    known = set(takes) - {"lr", "seed", "blocks"}
    if odd := sorted(set(options) - known):
        raise InputError(
            f"updater {name} has no option {odd[0]!r}: choose from {', '.join(sorted(known))}"
        )
    given = {"lr": lr, "seed": seed, "blocks": blocks}
    shared = {key: value for key, value in given.items() if key in takes and value is not None}
    return factory(**shared, **options)


def check_updater(name: str) -> None:
    """Refuse a name that is no updater's; nothing is imported.

    Raises:
        InputError: neither one of `UPDATERS` nor ``module:factory``, or no such module.
    """
    if ":" in name:
        own_code(name).find()
    elif name not in UPDATERS:
        raise unknown("updater", name, UPDATERS)


def try_updater(updater: Updater, params: Tensor) -> None:
    """Two steps of an updater of own code, and its memory out and in; it is not of use afterwards.

    Args:
        updater: a fresh one.
        params: (m,) as it will be given.

    Raises:
        InputError: it fails, returns something else than it should, or remembers what no
            checkpoint can hold.
    """
    name, memory = type(updater).__name__, io.BytesIO()
    try:
        updater.init(params)
        new = updater.update(params, lambda theta: theta.square().sum()).params
        torch.save(updater.state_dict(), memory)
        memory.seek(0)
        updater.load_state_dict(torch.load(memory, map_location="cpu", weights_only=True))
        updater.update(new, lambda theta: theta.square().sum())
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name}.saved must return tensors, numbers, and containers of them: a checkpoint "
            "holds nothing else"
        ) from error
    except Exception as error:  # a stranger's code may raise anything
        raise InputError(f"{name} failed: {in_words(error)}") from error

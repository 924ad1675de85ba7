"""Attacks on all cores: rows of a batch shared out among threads, each with a classifier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.checks import check_logits
from advgame.classifiers.foreign import frozen_copy
from advgame.errors import InputError

OnRows = Callable[..., tuple[Tensor, ...]]
"""(classifier, rows of each tensor) -> tensors of as many rows."""

_LEAST_ROWS = 8  # of a thread: fewer do not pay for the hand-over


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """fp32 logits (B, K) without a graph."""
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits.float()


class Shards:
    """Runs attacks whose images do not depend on each other on all cores.

    Threads of one attack scale better than the threads within each small layer. Every thread has
    a classifier of its own, so that what a forward keeps on the module is nobody else's.
    A classifier that cannot be copied, and one on a GPU, has one thread.

    Args:
        model: the classifier, in the mode that it is attacked in; it stays so meanwhile.
        threads: how many.
    """

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.models = [model]
        try:
            self.models += [
                frozen_copy(model, "every thread attacks a copy") for _ in range(threads - 1)
            ]
        except InputError:  # it cannot be copied: the attack goes on with the original
            self.models = [model]

    def run(self, attack: OnRows, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call ``attack`` on consecutive rows in each thread; returns all rows in their order.

        Args:
            attack: called with a classifier and the same rows of each tensor.
            tensors: each (B, ...).
        """
        count = max(1, min(len(self.models), len(tensors[0]) // _LEAST_ROWS))
        if count == 1:
            return attack(self.models[0], *tensors)
        parts = zip(*(one.tensor_split(count) for one in tensors), strict=True)
        before = torch.get_num_threads()

        def one(model: nn.Module, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            torch.set_num_threads(1)
            return attack(model, *rows)

        try:
            with ThreadPoolExecutor(count) as pool:
                found = list(pool.map(one, self.models, parts))
        finally:
            torch.set_num_threads(before)
        return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


class ShardedAttack(Attack):
    """An attack whose images do not depend on each other; a subclass brings `_on_shards`.

    A classifier that draws from torch's global stream has one thread: in several its draws would
    come in another order each time.
    """

    @override
    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        with attacked(model):
            before = torch.get_rng_state()
            logits = logits_of(model, x)
            draws = not torch.equal(before, torch.get_rng_state())
            if check:
                check_logits(logits, y)
            alone = draws or x.device.type != "cpu"
            shards = Shards(model, 1 if alone else torch.get_num_threads())
            return self._on_shards(shards, x, y, logits, rng)

    @abstractmethod
    def _on_shards(
        self, shards: Shards, x: Tensor, y: Tensor, logits: Tensor, rng: torch.Generator | None
    ) -> AttackResult:
        """The attack; ``logits`` (B, K) are those of the clean images, a forward each."""

"""The rows of a batch shared out among threads, each of which has a copy of the classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

Attacked = Callable[..., tuple[Tensor, ...]]
"""(classifier, rows of each tensor) -> tensors of as many rows."""

_LEAST_ROWS = 8  # of a thread: fewer do not pay for the hand-over


class Shards:
    """Runs attacks whose images do not depend on each other on all cores.

    Threads of one attack scale better than the threads within each small layer. Every thread has
    a classifier of its own, so that what a forward keeps on the module is nobody else's.
    A classifier that cannot be copied, and one on a GPU, has one thread.

    Args:
        model: the classifier, in the mode that it is attacked in; it stays so meanwhile.
        device: of the images.
        threads: how many; those that torch has when None.
    """

    def __init__(self, model: nn.Module, device: torch.device, threads: int | None = None) -> None:
        self.threads = torch.get_num_threads() if threads is None else threads
        self.models = [model]
        if device.type != "cpu":
            return
        try:
            self.models += [copy.deepcopy(model) for _ in range(self.threads - 1)]
        except Exception:  # a stranger's attribute may raise anything
            self.models = [model]

    def run(self, attack: Attacked, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call ``attack`` on consecutive rows in each thread; returns all rows in their order.

        Args:
            attack: called with a classifier and the same rows of each tensor.
            tensors: each (B, ...).
        """
        count = max(1, min(len(self.models), len(tensors[0]) // _LEAST_ROWS))
        if count == 1:
            return attack(self.models[0], *tensors)
        parts = zip(*(one.tensor_split(count) for one in tensors), strict=True)

        def one(model: nn.Module, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            torch.set_num_threads(1)
            return attack(model, *rows)

        try:
            with ThreadPoolExecutor(count) as pool:
                found = list(pool.map(one, self.models, parts))
        finally:
            torch.set_num_threads(self.threads)
        return tuple(torch.cat(rows) for rows in zip(*found, strict=True))

"""Saved states of optimisers, which torch shares with whoever saved them."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser from a copy of what its ``state_dict`` returned.

    Torch keeps the tensors that it is given and writes into them at the next step: without the
    copy a state could be loaded once only, and two optimisers would share their momenta.

    Args:
        optimizer: of the same parameters.
        state: left as it is.
    """
    optimizer.load_state_dict(copy.deepcopy(state))

"""What a privacy filter gives away: fresh classifiers infer a label from its output.

Each kind has settings to choose from; the validation split chooses, the test split is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advgame.errors import InputError
from advgame.privacy.filters import mlp
from advgame.seeding import seeded_init

INFERENCES = ("linear", "mlp", "svm")
PENALTIES = (1e-4, 1e-3, 1e-2)
"""l of l‖W‖², for linear and mlp."""
SVM_COSTS = (1.0, 10.0, 100.0)

Labelled = tuple[Tensor, Tensor]
"""z (n, d) and labels (n,)."""
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inference:
    """One kind of classifier, its settings chosen on the validation split.

    Args:
        validation: accuracy there.
        test: accuracy there.
    """

    validation: float
    test: float


def try_all(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    classes: int,
    *,
    seed: int,
    restarts: int = 3,
    hidden: int = 32,
) -> dict[str, Inference]:
    """Train every kind of classifier from scratch.

    Args:
        train: what they learn from.
        validation: what chooses the settings of each kind.
        test: what is reported.
        classes: number of classes K.
        seed: of the MLPs' first weights.
        restarts: MLPs per setting.
        hidden: their width.

    Returns:
        One entry for each of `INFERENCES`: softmax regression and an MLP by L-BFGS, and a support
        vector machine with a Gaussian kernel, which no game here trains against.

    Raises:
        InputError: no restarts or no width.
    """
    if restarts < 1 or hidden < 1:
        raise InputError(f"restarts and hidden must be 1 or above, not {restarts} and {hidden}")
    found: dict[str, Inference] = {}
    for kind in INFERENCES:
        for predict in _candidates(kind, train, classes, seed, restarts, hidden):
            one = Inference(_accuracy(predict, validation), _accuracy(predict, test))
            if kind not in found or one.validation > found[kind].validation:
                found[kind] = one
    return found


def strongest(found: Mapping[str, Inference]) -> str:
    """The kind with the highest validation accuracy; the first of equals."""
    return max(found, key=lambda kind: found[kind].validation)


def _accuracy(predict: Predict, data: Labelled) -> float:
    z, y = data
    return float((predict(z).cpu() == y.cpu()).double().mean())


def _candidates(
    kind: str, train: Labelled, classes: int, seed: int, restarts: int, hidden: int
) -> Iterable[Predict]:
    dim = train[0].shape[1]
    if kind == "linear":
        for penalty in PENALTIES:
            with seeded_init(seed):  # convex: where it starts does not matter
                network: nn.Module = nn.Linear(dim, classes)
            yield _fit(network, train, penalty)
    elif kind == "mlp":
        for restart in range(restarts):
            for penalty in PENALTIES:
                with seeded_init(seed, f"fresh{restart}"):
                    network = mlp(dim, hidden, classes)
                yield _fit(network, train, penalty)
    else:
        for cost in SVM_COSTS:
            yield _svm(train, cost)


def _fit(network: nn.Module, data: Labelled, penalty: float, steps: int = 60) -> Predict:
    """Mean cross-entropy + l‖W‖², by L-BFGS on all data, as Hamm trains his."""
    z, y = data
    network = network.to(z)
    weights = [p for p in network.parameters() if p.dim() > 1]
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=steps, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(network(z), y)
        value = value + penalty * torch.stack([w.square().sum() for w in weights]).sum()
        value.backward()
        return value

    optimizer.step(loss)
    network.requires_grad_(False)
    return lambda inputs: network(inputs).argmax(1)


def _svm(data: Labelled, cost: float) -> Predict:
    from sklearn.svm import SVC

    z, y = data
    machine = SVC(C=cost).fit(z.cpu().numpy(), y.cpu().numpy())
    return lambda inputs: torch.from_numpy(np.asarray(machine.predict(inputs.cpu().numpy())))

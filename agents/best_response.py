"""A fresh attacker against a classifier that stands still: what Machine vs Machine calls "-curr".

A network that grew up together with a classifier says little about that classifier; only an
attacker that was made for it does (section 4.1, table 4: AttNet-curr is trained from scratch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, Slope, attacked
from advgame.data import Batches, ImageSet, Splits
from advgame.errors import InputError
from advgame.evaluation import predict, score
from advgame.evaluation.verdicts import adversarial
from advgame.losses import cross_entropy
from advgame.seeding import OwnChance, derive_seed, seeded_init, stream
from advgame.threat import Threat
from agents.attnet import AttNet, AttNetAttack, AttNetAttacker
from agents.l2l import L2LAttack, L2LAttacker, L2LNetwork

Count = Literal["survivors", "errors"]


class Family(Protocol):
    """A class of attacker networks, as large as the claim "no attacker of this class" is."""

    def fresh(self) -> Any:
        """A network that knows nothing yet."""
        ...

    def perturb(
        self, network: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Threat
    ) -> Tensor:
        """Adversarial examples (B, C, H, W), differentiable in the network's weights."""
        ...

    def attack(self, network: Any, threat: Threat) -> Attack:
        """The network as an attack."""
        ...

    def save(self, network: Any, about: dict[str, Any], path: Path) -> None:
        """Write the network as an attacker file."""
        ...


@dataclass(frozen=True)
class AttNets:
    """AttNet, which sees image and label.

    Args:
        make: a network.
    """

    make: Callable[[], AttNet]

    def fresh(self) -> AttNet:
        """See `Family`."""
        return self.make()

    def perturb(
        self, network: AttNet, model: nn.Module, x: Tensor, y: Tensor, threat: Threat
    ) -> Tensor:
        """See `Family`."""
        return network.perturb(x, y, threat)

    def attack(self, network: AttNet, threat: Threat) -> Attack:
        """See `Family`."""
        return AttNetAttack(network, threat)

    def save(self, network: AttNet, about: dict[str, Any], path: Path) -> None:
        """See `Family`."""
        AttNetAttacker(network, about).save(path)


@dataclass(frozen=True)
class L2Ls:
    """L2L's attacker, which sees image and input gradients.

    Args:
        make: a network.
    """

    make: Callable[[], L2LNetwork]

    def fresh(self) -> L2LNetwork:
        """See `Family`."""
        return self.make()

    def perturb(
        self, network: L2LNetwork, model: nn.Module, x: Tensor, y: Tensor, threat: Threat
    ) -> Tensor:
        """See `Family`."""
        return network.perturb(x, threat, Slope(model, x, y, check=False))

    def attack(self, network: L2LNetwork, threat: Threat) -> Attack:
        """See `Family`."""
        return L2LAttack(network, threat)

    def save(self, network: L2LNetwork, about: dict[str, Any], path: Path) -> None:
        """See `Family`."""
        L2LAttacker(network, about).save(path)


@dataclass(frozen=True)
class Effort:
    """How hard a best response is looked for.

    Args:
        steps: of Adam each; 30,000 in the paper.
        restarts: attackers.
        batch_size: images per step; 128 in the paper.
        lr: of Adam; 1e-3 in the paper.

    Raises:
        InputError: no step or no restart.
    """

    steps: int
    restarts: int = 2
    batch_size: int = 128
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts) < 1:
            raise InputError(
                f"steps and restarts must be 1 or above, not {self.steps} and {self.restarts}"
            )


@dataclass(frozen=True)
class BestResponse:
    """The best of several attackers, by what it does to images that none of them learned from.

    Args:
        network: the attacker.
        restarts: accuracy of the classifier on the held-out images under each, as counted; those
            from scratch come first.
    """

    network: Any
    restarts: tuple[float, ...]


def errors(model: nn.Module, attack: Attack, data: ImageSet, seed: int = 0) -> Tensor:
    """1 where the classifier is wrong on the attacked image, else 0: fp64 (N,) on the CPU.

    Args:
        model: in evaluation mode meanwhile.
        attack: v.
        data: on the model's device.
        seed: of the attack's chance.
    """
    rng = stream(seed, "errors", data.images.device)
    with attacked(model):
        x_adv = adversarial(model, data.floats(), data.labels, attack, rng)
        return (predict(model, x_adv) != data.labels).double().cpu()


def best_response(
    model: nn.Module,
    train: ImageSet,
    held_out: ImageSet,
    threat: Threat,
    effort: Effort,
    *,
    seed: int = 0,
    family: Family | None = None,
    known: nn.Module | None = None,
    count: Count = "survivors",
) -> BestResponse:
    """Train attackers on a frozen classifier, and keep the strongest.

    Args:
        model: in evaluation mode while it is attacked; left as it was.
        train: images that the attackers learn from, on the model's device.
        held_out: images that choose among them; not those that a result is reported on.
        threat: an L∞ ball.
        effort: steps, restarts, rate.
        seed: of initial weights, dropout and batches.
        family: of the attackers; the paper's AttNet when None.
        known: an attacker that competes as it is, and as a copy that learns on; the other
            attackers are trained from scratch.
        count: what the choice goes by, as what is reported of it: ``"survivors"`` are right on the
            clean image and on the attacked one, as in an evaluation; ``"errors"`` are wrong on the
            attacked one, f of `errors`. They differ where an attack puts an image right.

    Source: Machine vs Machine, eq. 9.
    """
    family = family or cast(Family, AttNets(lambda: AttNet(train.shape, train.classes)))
    device, networks = train.images.device, list[nn.Module]()
    for restart in range(effort.restarts):
        with seeded_init(seed, f"best response {restart}"):
            networks.append(family.fresh().to(device))
    if known is not None:
        networks.append(copy.deepcopy(known))
    for number, network in enumerate(networks):
        name = f"best response {number}"
        _climb(model, train, threat, family, network, effort, derive_seed(seed, name))
    if known is not None:
        networks.append(copy.deepcopy(known))
    accuracies = []
    for network in networks:
        attack = family.attack(network, threat)
        if count == "errors":
            accuracies.append(1 - float(errors(model, attack, held_out, seed).mean()))
        else:
            rng = stream(seed, "best response", device)
            accuracies.append(score(model, held_out, attack, rng)[1])
    strongest = networks[accuracies.index(min(accuracies))]
    return BestResponse(strongest.eval(), tuple(accuracies))


def kept_response(
    path: Path,
    about: dict[str, Any],
    model: nn.Module,
    data: Splits,
    threat: Threat,
    effort: Effort,
    *,
    seed: int,
    family: Family,
) -> None:
    """Write a best response as an attacker file, unless an interrupted evaluation has left it.

    Args:
        path: of the file.
        about: how it came about; accuracies on the validation split are added.
        model: the classifier that stands still.
        data: the training split teaches, the validation split chooses.
        threat: an L∞ ball.
        effort: steps, restarts, rate.
        seed: see `best_response`.
        family: of the attackers.
    """
    if path.exists():
        return
    found = best_response(
        model, data.train, data.validation, threat, effort, seed=seed, family=family
    )
    family.save(found.network, about | {"validation_accuracies": found.restarts}, path)


def _climb(
    model: nn.Module,
    train: ImageSet,
    threat: Threat,
    family: Family,
    network: nn.Module,
    effort: Effort,
    seed: int,
) -> None:
    """V ← v + σ ∂f(u, v)/∂v with u fixed."""
    batches = Batches(train, min(effort.batch_size, len(train)), seed)
    optimizer = torch.optim.Adam(network.parameters(), effort.lr, maximize=True)
    network.train()
    with OwnChance(derive_seed(seed, "dropout"), train.images.device), attacked(model):
        for _ in range(effort.steps):
            x, y = batches.next()
            x_adv = family.perturb(network, model, x, y, threat)
            optimizer.zero_grad()
            cross_entropy(model(x_adv), y).mean().backward()
            optimizer.step()

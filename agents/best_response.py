"""A fresh attacker against a classifier that stands still: what Machine vs Machine calls "-curr".

A network that grew up together with a classifier says little about that classifier; only an
attacker that was made for it does (section 4.1, table 4: AttNet-curr is trained from scratch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, InputGradient, attacked
from advgame.data import Batches, ImageSet
from advgame.errors import InputError
from advgame.evaluation import predict, score
from advgame.evaluation.verdicts import adversarial
from advgame.losses import cross_entropy
from advgame.seeding import PrivateRNG, derive_seed, seeded_init, stream
from advgame.threat import Threat
from agents.attacker_network import AttackerNetwork
from agents.attackers import load_network
from agents.attnet import AttNet

Count = Literal["survivors", "errors"]


AttackerClass = Callable[[], AttackerNetwork]
"""Makes a network that knows nothing yet, of a class as large as the claim "no attacker of this
class" is: ``lambda: AttNet(shape, classes)``."""


@dataclass(frozen=True)
class Effort:
    """How hard a best response is looked for.

    Args:
        steps: of Adam each; 30,000 in the paper.
        restarts: responders, each from scratch and with a chance of its own.
        batch_size: images per step; 128 in the paper.
        lr: of Adam; 1e-3 in the paper.

    Raises:
        InputError: no step or no restart.
    """

    steps: int = 3000
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
        networks: all of them, in that order.
    """

    network: AttackerNetwork
    restarts: tuple[float, ...]
    networks: tuple[AttackerNetwork, ...]


@dataclass(frozen=True)
class Kept:
    """Files of a best response; those that an interrupted evaluation has left are not made anew.

    Args:
        folder: gets ``NAME.safetensors``, the strongest, and ``NAME-0.safetensors``, ... of all
            restarts.
        name: of the files.
        about: how they came about; accuracies on the held-out images are added to the strongest's.
    """

    folder: Path
    name: str
    about: dict[str, Any]

    def file(self, which: str = "") -> Path:
        """Of the strongest, or of a restart: ``"-0"``, ..."""
        return self.folder / f"{self.name}{which}.safetensors"


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
    attackers: AttackerClass | None = None,
    known: AttackerNetwork | None = None,
    count: Count = "survivors",
    keep: Kept | None = None,
) -> BestResponse:
    """Train attackers on a frozen classifier, and keep the strongest.

    Args:
        model: in evaluation mode while it is attacked; left as it was.
        train: images that the attackers learn from, on the model's device.
        held_out: images that choose among them; not those that a result is reported on.
        threat: an L∞ ball.
        effort: steps, restarts, rate.
        seed: of initial weights, dropout and batches.
        attackers: their class; the paper's AttNet when None.
        known: an attacker that competes as it is, and as a copy that learns on; the other
            attackers are trained from scratch.
        count: what the choice goes by, as what is reported of it: ``"survivors"`` are right on the
            clean image and on the attacked one, as in an evaluation; ``"errors"`` are wrong on the
            attacked one, f of `errors`. They differ where an attack puts an image right.
        keep: files that hold the attackers, and from which they come if they are there.

    Source: Machine vs Machine, eq. 9.
    """
    begun = [attackers or (lambda: AttNet(train.shape, train.classes))] * effort.restarts
    if known is not None:
        # from a file it comes frozen
        begun.append(lambda: copy.deepcopy(known).requires_grad_(True))
    networks = []
    for restart, begin in enumerate(begun):
        path = None if keep is None else keep.file(f"-{restart}")
        if path is None or not path.exists():
            ascent = Ascent(model, train, threat, begin, effort, seed=seed, restart=restart)
            network = ascent.run(effort.steps)
            if keep is not None and path is not None:
                network.save(path, keep.about)
        networks.append(network if path is None else load_network(path))
    if known is not None:
        networks.append(copy.deepcopy(known))
    accuracies = [_accuracy(model, one.attack(threat), held_out, count, seed) for one in networks]
    strongest = networks[accuracies.index(min(accuracies))]
    if keep is not None and not keep.file().exists():
        strongest.save(keep.file(), keep.about | {"validation_accuracies": accuracies})
    return BestResponse(strongest.eval(), tuple(accuracies), tuple(networks))


class Ascent:
    """v ← v + σ ∂f(u, v)/∂v with u fixed: one attacker on its way to a best response.

    Args:
        model: u; in evaluation mode and frozen while it is attacked, left as it was.
        train: images to learn from, on the model's device.
        threat: an L∞ ball.
        begin: makes the attacker.
        effort: batch size and rate.
        seed: of all restarts.
        restart: its number; it has its own first weights, dropout and batches.
    """

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet,
        threat: Threat,
        begin: AttackerClass,
        effort: Effort,
        *,
        seed: int = 0,
        restart: int = 0,
    ) -> None:
        device, name = train.images.device, f"best response {restart}"
        self.model, self.threat = model, threat
        with seeded_init(seed, name):
            self.network = begin().to(device)
        own = derive_seed(seed, name)
        self._batches = Batches(train, min(effort.batch_size, len(train)), own)
        self._optimizer = torch.optim.Adam(
            self.network.parameters(), effort.lr, maximize=True, fused=True
        )
        self._chance = PrivateRNG(derive_seed(own, "dropout"), device)
        self._rng = stream(own, "draws", device)

    def run(self, steps: int) -> AttackerNetwork:
        """Go on for so many steps; returns the network, in evaluation mode."""
        self.network.train()
        with self._chance, attacked(self.model):
            for _ in range(steps):
                x, y = self._batches.next()
                gradient = InputGradient(self.model, x, y)
                x_adv = self.network.examples(gradient, self.threat, self._rng)
                self._optimizer.zero_grad()
                cross_entropy(self.model(x_adv), y).mean().backward()
                self._optimizer.step()
        return self.network.eval()


def _accuracy(
    model: nn.Module, attack: Attack, held_out: ImageSet, count: Count, seed: int
) -> float:
    if count == "errors":
        return 1 - float(errors(model, attack, held_out, seed).mean())
    rng = stream(seed, "best response", held_out.images.device)
    return score(model, held_out, attack, rng)[1]

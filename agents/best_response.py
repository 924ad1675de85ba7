"""A fresh attacker against a classifier that stands still: what Machine vs Machine calls "-curr".

A network that grew up together with a classifier says little about that classifier; only an
attacker that was made for it does (section 4.1, table 4: AttNet-curr is trained from scratch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from advgame.attacks import attacked
from advgame.data import Batches, ImageSet
from advgame.errors import InputError
from advgame.evaluation import score
from advgame.losses import cross_entropy
from advgame.seeding import OwnChance, derive_seed, seeded_init, stream
from advgame.threat import Threat, per_image
from agents.attnet import AttNet, AttNetAttack, AttNetPlayer


@dataclass(frozen=True)
class BestResponse:
    """The best of several attackers, by what it does to images that none of them learned from.

    Args:
        network: the attacker.
        restarts: accuracy of the classifier on the held-out images under each.
    """

    network: AttNet
    restarts: tuple[float, ...]


def best_response(
    model: nn.Module,
    train: ImageSet,
    held_out: ImageSet,
    threat: Threat,
    *,
    steps: int,
    restarts: int = 2,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    make: Callable[[], AttNet] | None = None,
) -> BestResponse:
    """Train AttNets from scratch on a frozen classifier, and keep the strongest.

    Args:
        model: in evaluation mode while it is attacked; left as it was.
        train: images that the attackers learn from, on the model's device.
        held_out: images that choose among them; not those that a result is reported on.
        threat: an L∞ ball.
        steps: of Adam each; 30,000 in the paper.
        restarts: attackers.
        batch_size: images per step; 128 in the paper.
        lr: of Adam; 1e-3 in the paper.
        seed: of initial weights, dropout and batches.
        make: a fresh network; the paper's when None.

    Raises:
        InputError: no step or no restart.

    Source: Machine vs Machine, eq. 9.
    """
    if min(steps, restarts) < 1:
        raise InputError(f"steps and restarts must be 1 or above, not {steps} and {restarts}")
    make = make or (lambda: AttNet(train.shape, train.classes))
    found: list[tuple[float, AttNet]] = []
    for restart in range(restarts):
        with seeded_init(seed, f"best response {restart}"):
            network = make().to(train.images.device)
        _climb(
            model, train, threat, AttNetPlayer(network, lr), steps, batch_size,
            derive_seed(seed, f"best response {restart}"),
        )  # fmt: skip
        rng = stream(seed, "best response", train.images.device)
        found.append((score(model, held_out, AttNetAttack(network, threat), rng)[1], network))
    network = min(found, key=lambda one: one[0])[1]
    return BestResponse(network.eval(), tuple(accuracy for accuracy, _ in found))


def _climb(
    model: nn.Module,
    train: ImageSet,
    threat: Threat,
    player: AttNetPlayer,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """V ← v + σ ∂f(u, v)/∂v with u fixed."""
    batches = Batches(train, min(batch_size, len(train)), seed)
    network = player.module.train()
    with OwnChance(derive_seed(seed, "dropout"), train.images.device), attacked(model):
        for _ in range(steps):
            x, y = batches.next()
            x_adv = threat.project(x + network(x, y) * per_image(threat.eps, x), x)
            player.optimizer.zero_grad()
            (-cross_entropy(model(x_adv), y).mean()).backward()
            player.optimizer.step()

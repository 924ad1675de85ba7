"""A network that learns to attack: as an attack on any classifier, in a file, as a game's player.

`agents.l2l.L2LNetwork`, `agents.adt.ADTNetwork` and `agents.attnet.AttNet` say how a perturbation
is made of image, label and input gradients. The rest is here.

    network = AttNet((1, 28, 28), 10)
    player = AttackerPlayer(network)                     # learns, in a game of advgame.games
    network.attack(Linf(0.3)).run(model, x, y)           # attacks whatever classifier it is given
    network.save(path)                                   # agents.load_attacker(path) reads it
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from advgame.attacks import InputGradient, Sampler, attacked
from advgame.checks import check_known_shape
from advgame.choices import BatchNormMode
from advgame.errors import InputError
from advgame.games.attacker import Sampled
from advgame.games.training import Rules
from advgame.health import gradient_sign, note_gradient, output_signs
from advgame.losses import Loss, cross_entropy, full_precision
from advgame.optimizers import load_optimizer
from advgame.threat import Linf, Threat, per_image
from agents.attacker_file import write_file

FORMAT = "advgame attacker network 1"
DeltaSampler = Callable[[torch.Generator], Tensor]
"""Makes perturbations δ/ε (B, C, H, W) in [-1, 1] of one batch; again, others, if it draws them."""


def placed(value: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Adversarial examples in the ball and in [0, 1], in full precision, of perturbations δ/ε.

    Args:
        value: δ/ε, (B, C, H, W).
        x: clean images (B, C, H, W).
        threat: an L∞ ball; its radius may be per image.
    """
    x = full_precision(x)
    return threat.project(x + value * per_image(threat.radii(x), x), x)


class AttackerNetwork(nn.Module, ABC):
    """One network φ for all images, whose perturbations lie in any L∞ ball: L2L, ADT, AttNet.

    A subclass brings `sampler`, and says in the class attributes what it needs.

    Args:
        shape: (C, H, W) of the images.
        settings: the subclass's other arguments by name, as a file keeps them.
    """

    file_kind: ClassVar[str]
    """The subclass's name in files."""
    adam: ClassVar[Mapping[str, Any]] = {}
    """The paper's settings of Adam, beside those of `AttackerPlayer`."""
    stochastic: ClassVar[bool] = False
    """Whether its perturbations are drawn."""
    gradients: int = 0
    """Input gradients of the classifier that it asks for, per image."""
    cells: int = 1
    """Forwards of the network per image."""
    classes: int | None = None
    """Labels that it knows; None of one that is not told them."""

    def __init__(self, shape: tuple[int, int, int], **settings: Any) -> None:
        super().__init__()
        self.shape, self.settings = shape, {"shape": shape, **settings}
        self.about: dict[str, Any] = {}
        """How it came about, of one from a file."""

    @abstractmethod
    def sampler(self, gradient: InputGradient, threat: Threat) -> DeltaSampler:
        """What makes perturbations of a batch, differentiable in φ; gradients are asked for once.

        Args:
            gradient: the images and labels, and the classifier's input gradients there, which are
                constants to φ.
            threat: an L∞ ball; its radius may be per image.
        """

    def examples(self, gradient: InputGradient, threat: Threat, rng: torch.Generator) -> Tensor:
        """One adversarial example of each image, (B, C, H, W); arguments as those of `sampler`."""
        return placed(self.sampler(gradient, threat)(rng), gradient.x, threat)

    def attack(self, threat: Threat, queries: int | None = None) -> NetworkAttack:
        """The attack within a threat model and a budget of forwards per image.

        What the input gradients leave of the budget are samples of a network that draws.

        Args:
            threat: an L∞ ball.
            queries: None allows what one sample needs.

        Raises:
            InputError: a budget below the number of input gradients, or another ball.
        """
        if queries is None:
            return NetworkAttack(self, threat)
        if queries < self.gradients:
            raise InputError(
                f"this attacker makes {self.gradients} queries per image: "
                f"allow as many, not {queries}"
            )
        draws = max(queries - self.gradients, 1) if self.stochastic else 1
        return NetworkAttack(self, threat, draws)

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: `agents.load_attacker` reads it.
            about: how the network came about: command, settings.
        """
        metadata = {"network": json.dumps(self.settings), "about": json.dumps(dict(about or {}))}
        write_file(path, self, {"format": FORMAT, "kind": self.file_kind, **metadata})

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, then as it was."""
        training = self.training
        try:
            with torch.no_grad():
                self.eval()
                yield
        finally:
            self.train(training)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return next(self.parameters()).dtype


@dataclass(frozen=True)
class NetworkAttack(Sampler):
    """A trained network attacks whatever classifier it is given.

    Args:
        network: in evaluation mode while it attacks.
        threat: an L∞ ball; its radius may be per image, (B,).
        draws: k: the worst of so many is returned; 1 needs no forward to tell.
        loss: whose input gradient the network is told.
        mode: batch norm of the classifier while it is attacked.

    Raises:
        InputError: a ball that is not L∞, or no sample.
    """

    network: AttackerNetwork
    threat: Threat
    draws: int = 1
    loss: Loss = cross_entropy
    mode: BatchNormMode = "eval"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise InputError(f"attacker networks attack in L∞ balls, not in {self.threat.norm}")
        if self.draws < 1:
            raise InputError(f"draws must be 1 or above, not {self.draws}")

    @override
    def _draws(self) -> str | None:
        return super()._draws() if self.network.stochastic else None

    @override
    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_known_shape(x, self.network.shape)
        classes = self.network.classes
        if classes is not None and int(y.max()) >= classes:
            raise InputError(f"this attacker knows {classes} classes only")

    @override
    def _prepare(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, check: bool
    ) -> tuple[Callable[[], Tensor], int]:
        gradient = InputGradient(model, x, y, loss=self.loss, mode=self.mode, check=check)
        network = self.network.to(x.device)
        with network.evaluating():
            sample = network.sampler(gradient, self.threat)

        def one() -> Tensor:
            with network.evaluating():
                return placed(sample(rng), gradient.x, self.threat)

        return one, gradient.calls


class AttackerPlayer:
    """`advgame.games.attacker.AttackerPlayer`: a network while it learns, by Adam.

    It ascends the loss that the defender descends; a subclass may add a bonus of its own.

    Args:
        network: on its device.
        synchronise: called before each step, to average a module's gradients over processes.
        adam: settings of torch.optim.Adam, ``lr`` and so on, in place of the network's own.

    Raises:
        InputError: a network that cannot learn, such as one that comes from a file.
    """

    module: AttackerNetwork
    optimizer: Optimizer

    def __init__(
        self,
        network: AttackerNetwork,
        *,
        synchronise: Callable[[nn.Module], None] | None = None,
        **adam: Any,
    ) -> None:
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise InputError(
                "this attacker network is frozen, as networks from files are, and would not learn: "
                "call requires_grad_(True) on it"
            )
        self.module, self.synchronise = network, synchronise
        # fused: a small network's step takes a third of the time
        settings = {"lr": 1e-3, "maximize": True, "fused": True, **network.adam, **adam}
        self.optimizer = torch.optim.Adam(network.parameters(), **settings)
        self.gradients, self.cells = network.gradients, network.cells

    @property
    def learners(self) -> list[tuple[nn.Module, Optimizer]]:
        """Everything that learns, each with its optimiser."""
        return [(self.module, self.optimizer)]

    def sample(self, gradient: InputGradient, threat: Threat, rng: torch.Generator) -> Sampled:
        """One adversarial example of each image, in the mode that the network is in."""
        return Sampled(self.module.examples(gradient, threat, rng))

    def step(self) -> None:
        """Up along the gradients that a backward pass left, which are then cleared."""
        for module, optimizer in self.learners:
            if self.synchronise is not None:
                self.synchronise(module)
            note_gradient(optimizer)
            optimizer.step()
            optimizer.zero_grad()

    def signs(self, gradient: InputGradient, threat: Threat) -> dict[str, float]:
        """Signs of life, of its perturbations before the pixel range cuts them."""
        with torch.no_grad(), attacked(self.module):
            # a stream of its own: looking at a player draws nothing from the game's
            rng = torch.Generator(gradient.x.device).manual_seed(0)
            value = self.module.sampler(gradient, threat)(rng)
        return output_signs(value, gradient.y) | gradient_sign(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Weights of all networks that learn, and the states of their optimisers."""
        return {
            "networks": [network.state_dict() for network, _ in self.learners],
            "optimizers": [optimizer.state_dict() for _, optimizer in self.learners],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        saved = zip(self.learners, state["networks"], state["optimizers"], strict=True)
        for (network, optimizer), weights, moments in saved:
            network.load_state_dict(weights)
            load_optimizer(optimizer, moments)


def network_of(rules: Rules) -> AttackerNetwork | None:
    """The network that learns to attack under a game's rules; None where none does."""
    player = getattr(rules, "attacker", None)
    return player.module if isinstance(player, AttackerPlayer) else None

"""A learned updater that is one small network, shared by all coordinates of the parameters.

The standard form of a learned optimiser (Andrychowicz et al. 2016, Learning to Learn by Gradient
Descent by Gradient Descent; Metz et al. 2022, Practical Tradeoffs between Memory, Compute, and
Performance in Learned Optimizers, whose small MLP on momenta at several time scales this follows).
Its size does not depend on m, and what it learned on small problems can be carried to large ones.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.errors import InputError
from advgame.imitation.updater import Objective, Updater, check_positive, load_moments
from advgame.seeding import seeded_init

_DECAYS = (0.5, 0.9, 0.99)  # time scales of the momenta: 2, 10 and 100 steps
_ADAM = 1  # which of them is Adam's
_SQUARE_DECAY = 0.999
_EPS = 1e-8
FEATURES = {
    "gradient": "gradient over the root of the second moment",
    "momenta": f"momenta with decays {_DECAYS} over the same root",
    "size": "log of that root, less its mean over the coordinates",
    "now": "log of |gradient| over that root, at least -8",
    "parameter": "parameter over the root mean square of all",
}
_WIDTH = len(FEATURES) - 1 + len(_DECAYS)


@dataclass(frozen=True)
class Averages:
    """Moving averages of one problem's gradients.

    Args:
        momenta: (time scales, m), biased towards 0 as Adam's.
        square: second moment (m,).
        steps: how many gradients they have seen.
    """

    momenta: Tensor
    square: Tensor
    steps: int

    @staticmethod
    def zeros(params: Tensor) -> Averages:
        """The averages before any gradient was seen; ``params`` (m,) gives their size."""
        return Averages(params.new_zeros(len(_DECAYS), len(params)), torch.zeros_like(params), 0)

    def seen(self, grad: Tensor) -> Averages:
        """The averages after one more gradient ``grad`` (m,)."""
        decays = grad.new_tensor(_DECAYS)[:, None]
        momenta = decays * self.momenta + (1 - decays) * grad
        square = _SQUARE_DECAY * self.square + (1 - _SQUARE_DECAY) * grad.square()
        return Averages(momenta, square, self.steps + 1)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """Momenta without bias over the root of the second moment (scales, m); that root (m,)."""
        corrections = self.momenta.new_tensor([1 - decay**self.steps for decay in _DECAYS])
        root = (self.square / (1 - _SQUARE_DECAY**self.steps)).sqrt() + _EPS
        return self.momenta / corrections[:, None] / root, root


class StepNetwork(nn.Module):
    """Features of a coordinate to its step; untrained it is Adam.

    The step is ``-size·exp(3·tanh(a))·(Adam's direction + tanh(d))``: the learned magnitude a and
    direction d enter Metz et al.'s direction·exp(magnitude) bounded, so that a network that has
    gone wrong cannot take the parameters far in one step. The last layer is 0, so that learning
    starts from Adam and not from noise.

    Args:
        size: Adam's learning rate.
        width: of the two hidden layers.
    """

    def __init__(self, size: float, width: int) -> None:
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            nn.Linear(_WIDTH, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, params: Tensor, grad: Tensor, averages: Averages) -> Tensor:
        """The step (m,) from parameters and gradient (m,), which are constants here.

        Args:
            params: (m,).
            grad: (m,).
            averages: this gradient included.
        """
        momenta, root = averages.normalised()
        size = root.log()
        features = torch.stack(
            [
                grad / root,
                *momenta,
                size - size.mean(),
                (grad.abs() / root).clamp_min(math.exp(-8)).log(),
                params / params.square().mean().sqrt().clamp_min(_EPS),
            ],
            dim=1,
        )
        direction, magnitude = self.head(self.body(features.detach())).tanh().unbind(1)
        step: Tensor = -self.size * (3 * magnitude).exp() * (momenta[_ADAM] + direction)
        return step


class CoordinatewiseUpdater(Updater):
    """θ' = θ + step of a `StepNetwork`, which goes on learning as it is used, or does not.

    It learns as the paper's U does: after each update the objective at θ' is backpropagated into
    the network's weights alone, and one Adam step lowers it. `agents.unroll.train_updater` trains
    it beforehand. `init` begins anew with the weights that it was made with, loaded or trained to.

    Args:
        lr: learning rate of the network's own Adam, for learning in use.
        seed: of the initial weights.
        step: learning rate of the Adam that the untrained network is.
        width: of the two hidden layers.
        learn: whether to learn in use.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        seed: int,
        step: float = 0.01,
        width: int = 32,
        learn: bool = True,
    ) -> None:
        check_positive(lr=lr, step=step, width=width)
        self.lr, self.learn = lr, learn
        with seeded_init(seed, "updater"):
            self.network = StepNetwork(step, width)
        self._origin = copy.deepcopy(self.network.state_dict())

    @property
    def description(self) -> str:
        """What the updater is, in a line, for reports."""
        return f"one network for all coordinates, {'learning' if self.learn else 'frozen'}"

    def load_network(self, weights: dict[str, Tensor]) -> None:
        """Take weights trained elsewhere (``updater.network.state_dict()``); `init` comes next.

        Raises:
            InputError: weights of another network.
        """
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"these are not this updater's weights ({reason})") from error
        self._origin = copy.deepcopy(self.network.state_dict())
        self._size = 0

    @override
    def begin(self, params: Tensor) -> None:
        """No averages, and nothing learned in use."""
        self.network.to(params.device, params.dtype).load_state_dict(self._origin)
        self._adam = torch.optim.Adam(self.network.parameters(), lr=self.lr)
        self._averages = Averages.zeros(params)

    @override
    def step(
        self, params: Tensor, grad: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """θ' = θ + step, then one step of the network down the objective at θ' if it learns."""
        self._averages = self._averages.seen(grad)
        with torch.set_grad_enabled(self.learn):
            step = self.network(params, grad, self._averages)
            stats = {"updater/step": step.detach().norm()}
            if self.learn:
                new_loss = objective(params + step)
                self._adam.zero_grad()
                new_loss.backward(inputs=list(self.network.parameters()))
                gradients = [weight.grad for weight in self.network.parameters()]
                norm = torch.nn.utils.get_total_norm(one for one in gradients if one is not None)
                self._adam.step()
                stats |= {"updater/loss": new_loss.detach(), "updater/gradient_norm": norm}
        return params + step.detach(), stats

    @override
    def saved(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "origin": self._origin,
            "adam": self._adam.state_dict()["state"],
            "momenta": self._averages.momenta,
            "square": self._averages.square,
            "steps": self._averages.steps,
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        square = state["square"]
        device = next(self.network.parameters()).device if self._size else square.device
        self.load_network(state["origin"])
        self.begin(square.to(device))
        self.network.load_state_dict(state["network"])
        load_moments(self._adam, state["adam"])
        momenta, square = state["momenta"].to(device).clone(), square.to(device).clone()
        self._averages = Averages(momenta, square, state["steps"])

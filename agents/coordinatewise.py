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

from advgame.errors import InputError
from advgame.seeding import seeded_init
from agents.plain_updaters import (
    Objective,
    Update,
    check_positive,
    check_vector,
    loss_and_gradient,
)

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
        """Before the first gradient."""
        return Averages(params.new_zeros(len(_DECAYS), len(params)), torch.zeros_like(params), 0)

    def seen(self, grad: Tensor) -> Averages:
        """After one more gradient (m,)."""
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


class CoordinatewiseUpdater:
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
        self._averages: Averages | None = None

    @property
    def description(self) -> str:
        """What this is, in a line."""
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
        self._averages = None

    def init(self, params: Tensor) -> None:
        """Begin anew for parameters (m,): no averages, and nothing learned in use.

        Raises:
            InputError: not a flat vector of floats.
        """
        check_vector(params)
        self.network.to(params.device, params.dtype).load_state_dict(self._origin)
        self._adam = torch.optim.Adam(self.network.parameters(), lr=self.lr)
        self._averages = Averages.zeros(params)

    def update(self, params: Tensor, objective: Objective) -> Update:
        """θ' = θ + step, then one step of the network if it learns.

        Args:
            params: θ (m,).
            objective: called at θ, and at θ' if it learns.

        Returns:
            θ' from the network of before its step. Stats if it learns: ``updater/loss`` the
            objective at θ', ``updater/gradient_norm`` of the network's weights; always
            ``updater/step`` the length |θ' - θ|.

        Raises:
            InputError: no `init`, another number of parameters, or no scalar objective.
        """
        if self._averages is None or len(self._averages.square) != len(params):
            raise InputError(f"call init with parameters of shape {tuple(params.shape)} first")
        params = params.detach()
        loss, grad = loss_and_gradient(params, objective)
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
        return Update(params + step.detach(), loss, grad, stats)

    def state_dict(self) -> dict[str, Any]:
        """Network, its origin and Adam, and the averages.

        Raises:
            InputError: no `init`.
        """
        if self._averages is None:
            raise InputError("nothing to save: call init first")
        return {
            "network": self.network.state_dict(),
            "origin": self._origin,
            "adam": self._adam.state_dict()["state"],
            "momenta": self._averages.momenta,
            "square": self._averages.square,
            "steps": self._averages.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, which is copied.

        Raises:
            InputError: the state of another network.
        """
        own = next(self.network.parameters())
        device = own.device if self._averages is not None else state["square"].device
        self.load_network(state["origin"])
        self.init(state["square"].to(device))
        self.network.load_state_dict(state["network"])
        groups = self._adam.state_dict()["param_groups"]
        # torch keeps the tensors that it is given: without the copy two updaters would share them
        self._adam.load_state_dict({"state": copy.deepcopy(state["adam"]), "param_groups": groups})
        momenta, square = state["momenta"].to(device), state["square"].to(device)
        self._averages = Averages(momenta.clone(), square.clone(), state["steps"])

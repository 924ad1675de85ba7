"""Training a coordinatewise updater on a family of problems, before it is used.

Truncated backpropagation through unrolled updates, with gradients as constants (the second-order
term is dropped), after Andrychowicz et al. 2016, section 2 and figure 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.imitation.updater import Objective, check_positive, check_vector
from agents.coordinatewise import Averages, CoordinatewiseUpdater, StepNetwork

Task = tuple[Tensor, Objective]  # where to start (m,), and what to lower


def unroll(
    network: StepNetwork, params: Tensor, averages: Averages, objective: Objective, steps: int
) -> tuple[Tensor, Averages, Tensor]:
    """Make ``steps`` updates and keep the graph from their losses to the network's weights.

    Args:
        network: makes the steps.
        params: where to start (m,); taken as a constant, which cuts the graph here.
        averages: of the gradients so far.
        objective: what to lower.
        steps: how many updates, K.

    Returns:
        The last parameters (m,) and averages, without graph; and the mean over the updates of the
        objective after them, over its absolute value at the start (the objective's scale, and how
        far it has come down already, have no weight then).
    """
    params = params.detach().requires_grad_()
    value = objective(params)
    scale = value.detach().abs().clamp_min(torch.finfo(value.dtype).tiny)
    total = torch.zeros_like(scale)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(value, params, retain_graph=True)
        averages = averages.seen(grad)
        params = params + network(params, grad, averages)
        value = objective(params)
        total = total + value / scale
    return params.detach(), averages, total / steps


def train_updater(
    updater: CoordinatewiseUpdater,
    tasks: Callable[[torch.Generator], Task],
    *,
    rng: torch.Generator,
    episodes: int = 100,
    batch: int = 4,
    steps: int = 60,
    truncation: int = 20,
    lr: float = 3e-3,
) -> list[float]:
    """Train the updater's network to lower a family of objectives within ``steps`` updates.

    The graph is cut after every ``truncation`` updates, where Adam takes a step on the network:
    memory does not grow with ``steps``.

    Args:
        updater: its network is trained in place; call `init` before it is used.
        tasks: draws a problem from the family; its objective should stay above 0, since it is
            judged by its ratio to what it was.
        rng: stream of the draws.
        episodes: how many batches of problems.
        batch: problems per episode.
        steps: updates per problem.
        truncation: updates that are backpropagated through at a time, K.
        lr: learning rate of the network's Adam.

    Returns:
        Mean over the batch of the objective at the end over that at the start, per episode.

    Raises:
        InputError: a setting below 1, or objectives that are not finite.
    """
    check_positive(lr=lr)
    if min(episodes, batch, steps, truncation) < 1:
        raise InputError("train_updater needs episodes, batch, steps and truncation of at least 1")
    network, ratios = updater.network, []
    weights = list(network.parameters())
    adam = torch.optim.Adam(weights, lr=lr)
    for _ in range(episodes):
        drawn = [tasks(rng) for _ in range(batch)]
        network.to(drawn[0][0].device, drawn[0][0].dtype)
        places = [check_vector(params).detach() for params, _ in drawn]
        averages = [Averages.zeros(params) for params in places]
        for done in range(0, steps, truncation):
            adam.zero_grad()
            for k, (_, objective) in enumerate(drawn):
                length = min(truncation, steps - done)
                places[k], averages[k], loss = unroll(
                    network, places[k], averages[k], objective, length
                )
                if not torch.isfinite(loss):
                    raise InputError("an objective left the finite: take a smaller step")
                (loss / batch).backward(inputs=weights)
            nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
        with torch.no_grad():
            ends = [
                float(objective(place) / objective(start))
                for place, (start, objective) in zip(places, drawn, strict=True)
            ]
        ratios.append(sum(ends) / batch)
    updater.load_network(network.state_dict())
    return ratios


def flatten(module: nn.Module) -> Tensor:
    """A module's parameters as one vector (m,), a copy; `block_sizes` are its blocks.

    ``torch.nn.utils.vector_to_parameters(vector, module.parameters())`` is the way back.
    """
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def block_sizes(module: nn.Module) -> tuple[int, ...]:
    """Sizes of a module's parameter tensors, in the order of `flatten`."""
    return tuple(parameter.numel() for parameter in module.parameters())


def objective_of(module: nn.Module, loss: Callable[[Callable[..., Tensor]], Tensor]) -> Objective:
    """A loss of a module as a function of its flattened parameters; the module is not changed.

    Args:
        module: whose parameters are replaced.
        loss: takes the module with the parameters of the moment, called as the module is, to the
            scalar to be minimised, such as ``lambda net: F.mse_loss(net(x), y)``.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    sizes = block_sizes(module)

    def objective(params: Tensor) -> Tensor:
        parts = params.split(sizes)
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return loss(lambda *inputs: torch.func.functional_call(module, named, inputs))

    return objective

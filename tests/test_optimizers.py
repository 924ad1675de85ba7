"""Whoever restores an optimiser copies its state: torch would keep the caller's tensors."""

import copy

import pytest
import torch
from torch import nn

from advgame.defender import Defender
from advgame.games.mixture import Mixture
from advgame.seeding import stream
from advgame.solvers import Solver, simultaneous
from advgame.threat import Linf
from agents.attacker_network import AttackerPlayer
from agents.attnet import AttNet
from agents.reinforce import PolicyGradient
from agents.sb3 import PPOPlayer


def adam(module):
    return torch.optim.Adam(module.parameters())


def solver():
    return Solver(simultaneous, adam(nn.Linear(2, 2)), adam(nn.Linear(2, 2)))


def policy_gradient():
    policy, value = nn.Linear(2, 2), nn.Linear(2, 1)
    return PolicyGradient(policy, adam(policy), value, 0.1, 1.0, stream(0, "policy"))


OWNERS = {
    "defender": (lambda: Defender(nn.Linear(2, 2)), ["optimizer"]),
    "solver": (solver, ["descend", "ascend"]),
    "policy gradient": (policy_gradient, ["optimizer", "value_optimizer"]),
    "attacker": (lambda: AttackerPlayer(AttNet((1, 8, 8), 10, hidden=4)), ["optimizer"]),
    "mixture": (lambda: Mixture(Linf(0.1), ["fgsm"], {"attnet": nn.Linear(2, 2)}), ["optimizer"]),
    "sb3": (lambda: PPOPlayer((1, 8, 8), (2, 2), 4, 0, lr=1e-3, entropy_coef=0.0), ["optimizer"]),
}


def move(owner, names):
    """A step of every optimiser, whatever the gradient."""
    for optimizer in (getattr(owner, name) for name in names):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", OWNERS)
def test_a_state_that_was_loaded_is_not_moved_by_the_next_step(name):
    make, names = OWNERS[name]
    owner, twin = make(), make()
    move(owner, names)
    state = copy.deepcopy(owner.state_dict())
    kept = copy.deepcopy(state)
    twin.load_state_dict(state)
    move(twin, names)
    for one in (state, kept):  # has words, which are not compared
        one.pop("numpy_rng", None)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)

"""examples/las_at.py and the library's LAS-AT, with the same start and the same draws."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import load_example, seeded
from torch import nn
from torch.optim import SGD

from advgame.defender import Defender
from advgame.games.las_at import LasAt
from advgame.games.strategy import StrategySpace
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.reinforce import Reinforce
from agents.settings import PRESETS

example = load_example("las_at")


def classifier(x, y):
    """With batch norm, in fp64; it has learned a little, so that some images are robust."""
    layers = nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 10)
    net = nn.Sequential(nn.Flatten(), *layers).double()
    optimizer = SGD(net.parameters(), 0.5)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def test_three_steps_of_both_players_are_the_librarys(digits):
    eps0 = example.EPS0
    x, y = digits.train.floats().double(), digits.train.labels
    with seeded_init(0):
        f = classifier(x[:256], y[:256])
        policy = example.StrategyNet(digits.train.shape).double()
    start = copy.deepcopy([f, policy])

    theta, w = SGD(f.parameters(), 0.1, 0.9, weight_decay=5e-4), SGD(policy.parameters(), 0.3)
    rng, space = seeded(), StrategySpace(eps0)
    game = LasAt(Linf(eps0), start="eps0")
    defender = Defender(copy.deepcopy(start[0]), lr=0.1, weight_decay=5e-4, true_probability=0.7)
    player = Reinforce(copy.deepcopy(start[1]), replace(PRESETS["repo"], lr=0.3), seeded())
    for step in range(3):
        part = slice(32 * step, 32 * step + 32)
        told = example.las_at_step(f, theta, policy, w, x[part], y[part], rng)
        strategies = space.decode(player.act(x[part], learn=True))
        made = game.step(defender, x[part], y[part], strategies, player.rng, credit="batch")
        player.learn(made.payoffs.reward)
        assert told["ε"] == strategies.eps.mean()
        for name, terms in zip(("R1", "R2", "R3"), vars(made.payoffs).values(), strict=False):
            torch.testing.assert_close(told[name].double(), terms.double().mean())
        assert 0 < told["R2"] < 4, "a step in which all are robust, or none, shows little"
    for ours, theirs, old in zip((f, policy), (defender.module, player.policy), start, strict=True):
        states = (one.state_dict().values() for one in (ours, theirs, old))
        for one, two, before in zip(*states, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
            assert float((one - before).abs().max()) > 1e-4


def test_the_mean_loss_of_a_batch_is_clamped_not_each_images(digits):
    """As published: images with a loss above 10 count in full while their mean lies below it."""
    x, y = digits.train.floats(slice(32)).double(), digits.train.labels[:32]
    with seeded_init(1):
        f = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        policy = example.StrategyNet(digits.train.shape).double()
    f[1].weight.data *= 6
    ours, player = Defender(copy.deepcopy(f)), Reinforce(policy, PRESETS["repo"], seeded())
    chosen = StrategySpace(example.EPS0).decode(player.act(x, learn=False))
    rules = LasAt(Linf(example.EPS0), start="eps0")
    made = rules.step(ours, x, y, chosen, player.rng, credit="batch")
    told = example.las_at_step(
        f, SGD(f.parameters(), 0.1), policy, SGD(policy.parameters(), 0.1), x, y, seeded()
    )
    assert bool((made.losses > 10).any())
    assert bool((made.losses < 10).any())
    assert 0 < told["R1"] < 10
    torch.testing.assert_close(made.payoffs.r1, told["R1"].expand(32))


@pytest.mark.slow
def test_the_example_trains_to_the_number_that_it_states():
    clean, pgd20 = example.main()
    assert clean > 0.95
    assert pgd20 > 0.7

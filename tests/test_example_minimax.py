"""examples/minimax.py and the library's Minimax, with the same start and the same dropout."""

import copy

import pytest
import torch
from conftest import load_example
from torch.optim import SGD, Adam

from advgame.classifiers import MinimaxCNN
from advgame.defender import Defender
from advgame.games.minimax import Minimax
from advgame.seeding import seeded_init
from advgame.solvers import sensitivity
from advgame.threat import Linf
from agents.attacker_network import AttackerPlayer
from agents.attnet import AttNet

example = load_example("minimax")


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "lam", "sigma"),
    [("sgd", SGD, 0.05, 0.5), ("adam", Adam, 1e-3, 0.01)],
)
def test_three_steps_of_both_players_are_the_librarys(digits, algorithm, optimizer, lam, sigma):
    x, y = digits.train.floats(slice(48)).double(), digits.train.labels[:48]
    with seeded_init(0):
        g, attnet = MinimaxCNN((1, 8, 8)).double(), example.AttNet(64, hidden=50).double()
    start = copy.deepcopy([g, attnet])
    descent, ascent = optimizer(g.parameters(), lam), optimizer(attnet.parameters(), sigma)
    defender = Defender(
        copy.deepcopy(g), algorithm=algorithm, lr=lam, momentum=0.0, weight_decay=0.0
    )
    player = AttackerPlayer(AttNet((1, 8, 8), 10, hidden=50).double())
    player.module.load_state_dict(attnet.state_dict())
    player.optimizer = optimizer(player.module.parameters(), sigma)
    game = Minimax(Linf(example.EPS), player, sensitivity(example.GAMMA))
    for step, part in enumerate(torch.arange(48).split(16)):
        with seeded_init(step):
            f, norm = example.minimax_step(g, descent, attnet, ascent, x[part], y[part])
        with seeded_init(step):
            result = game.step(defender, x[part], y[part], torch.Generator())
        torch.testing.assert_close(result.losses.mean(), f)
        torch.testing.assert_close(result.stats["game/ascent"], norm.sqrt())
    for ours, theirs, old in zip((g, attnet), (defender.module, player.module), start, strict=True):
        states = (one.state_dict().values() for one in (ours, theirs, old))
        for one, two, before in zip(*states, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
            assert float((one - before).abs().max()) > 1e-5


@pytest.mark.slow
def test_the_example_trains_to_the_numbers_that_it_states():
    clean, under_attnet, under_pgd20 = example.main()
    assert clean > 0.95
    assert under_attnet > 0.8
    assert 0.35 < under_pgd20 < under_attnet

"""`examples/l2l.py`, written from the paper, against the library's game; and its numbers."""

import copy

import pytest
import torch
from conftest import BatchNormNet, load_example, renamed

from advgame.defender import Defender
from advgame.games.l2l import L2L, Modes
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker_bodies import PlainBody
from agents.attacker_network import AttackerPlayer
from agents.l2l import L2LNetwork

EPS = 0.15
# parts of the library's names of weights -> the example's
NAMES = {"trunk.": "", "last.": "7.", ".shortcut.": ".shortcut.0."} | {
    f".{part}.": f".residual.{place}."
    for place, part in enumerate(("bn1", "act1", "conv1", "bn2", "act2", "conv2"))
}


@pytest.fixture(scope="module")
def example():
    return load_example("l2l")


def test_its_attacker_is_table_1s(example):
    wide = L2LNetwork((1, 8, 8), 1, "wide").body
    example.Attacker(colours=1).load_state_dict(renamed(wide.state_dict(), NAMES))


def test_three_steps_are_the_librarys(example, digits):
    with seeded_init(0):
        f = BatchNormNet().double()
        network = L2LNetwork((1, 8, 8), gradients=1, scaling="image")
        network.body = PlainBody(2, 1, (8, 8, 16))
    twin, g = copy.deepcopy(f), example.Attacker(colours=1, blocks=(8, 8, 16)).double()
    g.load_state_dict(renamed(network.double().body.state_dict(), NAMES))

    defender = Defender(f, lr=0.1, momentum=0.9, weight_decay=2e-4)
    player = AttackerPlayer(network, lr=1e-3, weight_decay=2e-4)
    rules = L2L(Linf(EPS), player, modes=Modes("train", keep_buffers=False))
    f_optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    g_optimizer = torch.optim.Adam(g.parameters(), 1e-3, weight_decay=2e-4, maximize=True)
    for step in range(3):
        rows = slice(8 * step, 8 * step + 8)
        x, y = digits.train.floats(rows).double(), digits.train.labels[rows]
        torch.manual_seed(step)  # of f's dropout
        stats = rules.step(defender, x, y, torch.Generator()).stats
        torch.manual_seed(step)
        losses = example.l2l_step(twin, g, f_optimizer, g_optimizer, x, y, EPS)
        wanted = (stats["game/adversarial_loss"], stats["game/attacker_loss"])
        torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-9)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(dict(twin.state_dict()), dict(f.state_dict()), **close)
    torch.testing.assert_close(
        dict(g.state_dict()), renamed(network.body.state_dict(), NAMES), **close
    )


@pytest.mark.slow
def test_its_numbers(example):
    clean, robust = example.main()
    assert clean > 0.95
    assert robust > 0.65

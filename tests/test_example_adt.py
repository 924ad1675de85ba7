"""`examples/adt.py`, written from the paper, against the library's game; and its numbers."""

import copy

import pytest
import torch
from conftest import BatchNormNet, load_example, renamed

from advgame.defender import Defender
from advgame.games.adt import AdtAmortised
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.adt import ADTNetwork, ExplicitPlayer

EPS = 0.15
# parts of the library's names of weights -> the example's
NAMES = {
    f".{part}.": f".residual.{place}."
    for place, part in {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2"}.items()
}


@pytest.fixture(scope="module")
def example():
    return load_example("adt")


def test_three_steps_are_the_librarys(example, digits):
    with seeded_init(0):
        f = BatchNormNet().double()
        network = ADTNetwork((1, 8, 8), "exp-am", "resnet-3blocks", ngf=4).double()
    twin, g = copy.deepcopy(f), example.Generator(colours=1, ngf=4).double()
    g.load_state_dict(renamed(network.body.state_dict(), NAMES))

    defender = Defender(f, lr=0.1, momentum=0.9, weight_decay=2e-4)
    rules = AdtAmortised(Linf(EPS), ExplicitPlayer(network, lam=0.5, lr=2e-3))
    f_optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    g_optimizer = torch.optim.Adam(g.parameters(), 2e-3, (0.5, 0.999), maximize=True)
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    close = {"rtol": 0, "atol": 1e-9}
    for step in range(3):
        rows = slice(8 * step, 8 * step + 8)
        x, y = digits.train.floats(rows).double(), digits.train.labels[rows]
        torch.manual_seed(step)  # of f's dropout
        stats = rules.step(defender, x, y, ours).stats
        torch.manual_seed(step)
        loss, _ = example.adt_step(twin, g, f_optimizer, g_optimizer, x, y, EPS, 0.5, theirs)
        torch.testing.assert_close(loss, stats["game/adversarial_loss"], **close)
    torch.testing.assert_close(dict(twin.state_dict()), dict(f.state_dict()), **close)
    torch.testing.assert_close(
        dict(g.state_dict()), renamed(network.body.state_dict(), NAMES), **close
    )


@pytest.mark.slow
def test_its_numbers(example):
    clean, robust = example.main()
    assert clean > 0.95
    assert robust > 0.74

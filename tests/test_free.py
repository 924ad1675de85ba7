"""Free: its loop written down, one replay, its state."""

import copy

import pytest
import torch
from conftest import seeded
from smooth_parts import BALL, SHAPE, batch, flat, plain, smooth
from torch.nn.functional import cross_entropy

from advgame.errors import InputError
from advgame.games.free import Free
from advgame.threat import L2


def test_free_is_its_loop_written_down():
    model, game = smooth(), Free(BALL, replays=3)
    defender, delta = plain(model=copy.deepcopy(model)), torch.zeros(8, *SHAPE).double()
    outside = 0
    for seed in (1, 2):
        x, y = batch(seed=seed)
        result = game.step(defender, x, y, seeded())
        for _ in range(3):
            leaf = (x + delta).clamp(0, 1).requires_grad_()
            weights = list(model.parameters())
            loss = cross_entropy(model(leaf), y)
            slope, *slopes = torch.autograd.grad(loss, [leaf, *weights])
            with torch.no_grad():
                for weight, one in zip(weights, slopes, strict=True):
                    weight -= 0.1 * one
            delta = (delta + 0.1 * slope.sign()).clamp(-0.1, 0.1)
            outside += int(((x + delta).clamp(0, 1) != x + delta).sum())
        torch.testing.assert_close(result.x_adv, leaf.detach())
        torch.testing.assert_close(flat(defender.module.parameters()), flat(model.parameters()))
    assert torch.equal(game.state_dict()["delta"], delta)
    assert outside > 0, "some x + δ are no pixels, and their δ moves all the same"


def test_free_with_one_replay_begins_as_plain_training_and_goes_on_from_its_state():
    x, y = batch()
    one, two = plain(), plain()
    game = Free(BALL, replays=1)
    game.step(one, x, y, seeded())
    two.backward(x, y)
    two.step()
    assert torch.equal(flat(one.module.parameters()), flat(two.module.parameters()))
    again = Free(BALL, replays=1)
    again.load_state_dict(copy.deepcopy(game.state_dict()))
    assert torch.equal(game.step(one, x, y, seeded()).x_adv, again.step(two, x, y, seeded()).x_adv)
    with pytest.raises(InputError, match="one eps"):
        Free(L2(torch.ones(2)))
    with pytest.raises(InputError, match="replays"):
        Free(BALL, replays=0)

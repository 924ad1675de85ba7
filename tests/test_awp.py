"""AWP: the worst weights nearby, put back; what it counts and leaves alone."""

import copy

import pytest
import torch
from conftest import BatchNormNet, seeded
from smooth_parts import BALL, batch, flat, plain, smooth, trades_loss
from torch.nn.functional import cross_entropy

from advgame.attacks import kl_pgd
from advgame.errors import InputError
from advgame.games.awp import AWPDefender
from advgame.games.pairing import Trades


def test_awp_descends_at_the_worst_weights_nearby_and_puts_them_back():
    (x, y), model, gamma = batch(), smooth(), 0.05
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=gamma)
    losses = defender.backward(x, y)
    assert torch.equal(flat(defender.module.parameters()), flat(model.parameters()))
    here = cross_entropy(model(x), y)
    slopes = torch.autograd.grad(here, list(model.parameters()))
    with torch.no_grad():
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            if weight.dim() > 1:
                weight += gamma * weight.norm() * slope / slope.norm()
    there = cross_entropy(model(x), y)
    assert float(there.detach()) > float(here.detach())
    torch.testing.assert_close(losses.mean(), there.detach())
    wanted = torch.autograd.grad(there, list(model.parameters()))
    torch.testing.assert_close(flat(p.grad for p in defender.module.parameters()), flat(wanted))
    before = flat(defender.module.parameters())
    defender.step()
    torch.testing.assert_close(flat(defender.module.parameters()), before - 0.1 * flat(wanted))


def test_awp_perturbs_by_the_loss_that_the_game_descends():
    (x, y), model = batch(), smooth()
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=0.05)
    result = Trades(BALL, 3.0).step(defender, x, y, seeded())
    x_adv = kl_pgd(BALL).run(model, x, y, rng=seeded()).x_adv
    assert torch.equal(result.x_adv, x_adv), "the attack meets the weights as they are"
    weights = list(model.parameters())
    slopes = torch.autograd.grad(trades_loss(model(x), model(x_adv), y, 3.0).mean(), weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight += 0.05 * weight.norm() * slope / slope.norm() * (weight.dim() > 1)
    torch.testing.assert_close(result.losses, trades_loss(model(x), model(x_adv), y, 3.0).detach())


def test_awp_counts_one_pass_in_batch_norms_statistics():
    torch.manual_seed(0)
    model, x, y = BatchNormNet(), torch.rand(8, 1, 8, 8), torch.arange(8)
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=1e-9)
    defender.backward(x, y)
    model.train()(x)
    for (name, ours), theirs in zip(defender.module.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with pytest.raises(InputError, match="gamma"):
        AWPDefender(BatchNormNet(), gamma=0.0)


def test_awp_begins_after_its_warm_up_also_when_it_is_resumed():
    x, y = batch()
    plainly, late = plain(), plain(AWPDefender, gamma=0.05, warm_up=1)
    assert torch.equal(plainly.backward(x, y), late.backward(x, y))
    assert late.descents == 1
    resumed = plain(AWPDefender, gamma=0.05, warm_up=1)
    resumed.load_state_dict(late.state_dict())
    for one in (late, resumed):
        assert float(one.backward(x, y).mean()) > float(plainly.backward(x, y).mean())
        assert one.descents == 2
    with pytest.raises(InputError, match="warm_up"):
        AWPDefender(smooth(), 0.1, -1)


def test_awp_leaves_a_layer_alone_that_has_no_gradient():
    model = smooth()
    with torch.no_grad():
        model[3].weight.zero_()  # nothing reaches the first layer
    (x, y), before = batch(), copy.deepcopy(model)
    defender = plain(AWPDefender, model, gamma=0.1)
    assert torch.isfinite(defender.backward(x, y)).all()
    assert torch.equal(flat(model.parameters()), flat(before.parameters()))

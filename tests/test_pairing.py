"""Losses and games of pairs, TRADES, MART and ALP: slow formulas, autograd, steps by hand."""

import copy

import pytest
import torch
from conftest import seeded
from smooth_parts import BALL, batch, flat, plain, probabilities, smooth, trades_loss
from torch.nn.functional import cross_entropy

from advgame.errors import InputError
from advgame.games.pairing import LogitPairing, Mart, Trades
from advgame.losses import boosted_cross_entropy, divergence


def test_divergence_by_hand_and_by_finite_differences():
    p, q = torch.randn(2, 5, 3, dtype=torch.float64, generator=seeded())
    slow = [
        sum(a * (torch.tensor(a).log() - torch.tensor(b).log()) for a, b in zip(r, s, strict=True))
        for r, s in zip(probabilities(p), probabilities(q), strict=True)
    ]
    torch.testing.assert_close(divergence(p, q), torch.stack(slow).double())
    p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(divergence, (p, q))


def test_divergence_of_underflowed_outputs_has_finite_gradients():
    p = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 1.0, -300.0]], requires_grad=True)
    divergence(p, q).sum().backward()
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


def test_boosted_cross_entropy_by_hand():
    logits, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 4
    slow = []
    for row, label in zip(probabilities(logits), y.tolist(), strict=True):
        other = max(p for k, p in enumerate(row) if k != label)
        slow.append(-torch.tensor(row[label]).log() - torch.tensor(1.0001 - other + 1e-12).log())
    torch.testing.assert_close(boosted_cross_entropy(logits, y), torch.stack(slow).double())


def mart_loss(clean, adversarial, y, beta):
    p, q, own = clean.softmax(1), adversarial.softmax(1), torch.eye(3, dtype=torch.bool)[y]
    kl = (p * (p / q).log()).sum(1)
    boosted = -q[own].log() - (1.0001 - q.masked_fill(own, 0).amax(1) + 1e-12).log()
    return boosted + beta * kl * (1.0000001 - p[own])


def alp_loss(clean, adversarial, y, beta):
    both = torch.cat([clean, adversarial])
    ce = cross_entropy(both, torch.cat([y, y]), reduction="none").view(2, -1)
    return ce.mean(0) + beta * ((clean - adversarial) ** 2).mean(1)


PAIRED = {
    "trades": (Trades, trades_loss),
    "mart": (Mart, mart_loss),
    "alp": (LogitPairing, alp_loss),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize(
    "beta", [2.5, torch.linspace(0, 3, 8, dtype=torch.float64)], ids=["one", "B"]
)
def test_a_step_of_the_games_of_pairs(name, beta):
    """Weights, losses and examples are those of the formula, written down another way."""
    kind, formula = PAIRED[name]
    (x, y), model, game = batch(), smooth(), kind(BALL, beta)
    defender = plain(model=copy.deepcopy(model))
    result = game.step(defender, x, y, seeded())
    x_adv = game.attack(BALL).run(model, x, y, rng=seeded()).x_adv
    assert torch.equal(result.x_adv, x_adv)
    losses = formula(model(x), model(x_adv), y, beta)
    torch.testing.assert_close(result.losses, losses.detach())
    weights = list(model.parameters())
    slopes = torch.autograd.grad(losses.mean(), weights)
    wanted = flat(w - 0.1 * s for w, s in zip(weights, slopes, strict=True))
    torch.testing.assert_close(flat(defender.module.parameters()), wanted)
    held = formula(model(x).detach(), model(x_adv), y, beta)  # what a one-sided game would do
    one_sided = torch.autograd.grad(held.mean(), weights)
    assert not torch.allclose(flat(one_sided), flat(slopes), atol=1e-3)
    assert float(result.stats["game/clean_loss"]) == pytest.approx(
        float(cross_entropy(model(x), y).detach()), rel=1e-6
    )
    with pytest.raises(InputError, match="beta"):
        kind(BALL, -1.0)

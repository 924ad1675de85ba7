"""GAIL's discriminator: closed forms of its loss, rewards and penalties; equal seeds."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advgame.errors import InputError
from advgame.imitation.discriminator import (
    CHANCE_LOSS,
    REWARDS,
    Discriminator,
    gradient_penalty,
    imitation_loss,
    label_entropy,
)


def as_module(discriminator, theta):
    """The same network out of torch's modules."""
    widths = [discriminator.inputs, *discriminator.hidden, 1]
    layers = []
    for low, high in itertools.pairwise(widths):
        layers += [nn.Linear(low, high), nn.Tanh()]
    module = nn.Sequential(*layers[:-1])
    nn.utils.vector_to_parameters(theta, module.parameters())
    return module


def test_logits_are_those_of_linear_layers_and_tanh(rng):
    one = Discriminator(6)
    theta, pairs = one.init(rng), torch.randn(7, 6, generator=rng)
    assert one.size == 2561  # reference 2a: m of CartPole
    assert torch.allclose(one.logits(theta, pairs), as_module(one, theta)(pairs)[:, 0], atol=1e-6)


def test_rewards_by_their_closed_forms():
    logit = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    d = logit.sigmoid()  # the probability of the expert
    assert torch.allclose(REWARDS["survival"](logit), -(1 - d).log())
    assert torch.allclose(REWARDS["cost"](logit), d.log())
    assert torch.allclose(REWARDS["neutral"](logit), d.log() - (1 - d).log())
    # every form pays more for what looks more like the expert
    assert all((form(logit).diff() > 0).all() for form in REWARDS.values())


def test_loss_and_entropy_by_their_closed_forms(rng):
    low, high = torch.randn(9, generator=rng), torch.randn(4, generator=rng)
    expected = F.binary_cross_entropy_with_logits(low, torch.zeros(9))
    expected = expected + F.binary_cross_entropy_with_logits(high, torch.ones(4))
    assert torch.allclose(imitation_loss(low, high), expected)
    assert float(imitation_loss(torch.zeros(3), torch.zeros(5))) == pytest.approx(CHANCE_LOSS)
    entropy = torch.distributions.Bernoulli(logits=low).entropy().mean()
    assert torch.allclose(label_entropy(low), entropy)
    assert float(label_entropy(torch.zeros(2))) == pytest.approx(math.log(2))


def test_gradient_penalty_of_a_linear_discriminator(rng):
    one = Discriminator(3, hidden=())
    theta = torch.tensor([3.0, 0.0, 4.0, 0.5])  # slope 5 everywhere
    pairs = torch.randn(8, 3, generator=rng)
    assert float(gradient_penalty(one, theta, pairs, 1.0)) == pytest.approx(16.0, rel=1e-5)
    assert float(gradient_penalty(one, theta, pairs, 0.0)) == pytest.approx(25.0, rel=1e-5)


def test_spectral_norm_bounds_the_slope(rng):
    theta = 20 * Discriminator(4).init(rng)
    free, kept = Discriminator(4), Discriminator(4, spectral_norm=True)
    a, b = torch.randn(200, 4, generator=rng), torch.randn(200, 4, generator=rng)
    distance = (a - b).norm(dim=1)

    def steepest(one):
        return float(((one.logits(theta, a) - one.logits(theta, b)).abs() / distance).max())

    assert steepest(kept) <= 1 + 1e-5
    assert steepest(free) > 2
    # what is 1-Lipschitz already stays as it is
    small = 0.01 * theta
    assert torch.equal(free.logits(small, a), kept.logits(small, a))


def test_equal_generators_equal_parameters():
    one = Discriminator(5)
    first, second = (one.init(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, one.init(torch.Generator().manual_seed(4)))


def test_refusals(rng):
    with pytest.raises(InputError, match="1 or above"):
        Discriminator(0)
    one = Discriminator(4)
    with pytest.raises(InputError, match="pairs"):
        one.logits(one.init(rng), torch.zeros(2, 5))

"""What tests of losses and games share: a small network without kinks, in fp64, and its data."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from advgame.defender import Defender
from advgame.threat import Linf

SHAPE = (1, 2, 2)
BALL = Linf(0.1)


def smooth(seed=0):
    """A small network without kinks, in fp64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n=8, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=rng)


def inner(n=8, seed=1):
    """Images away from black and white, where clipping would cut the gradient."""
    x, y = batch(n, seed)
    return 0.4 * x + 0.3, y


def flat(tensors):
    return torch.cat([one.detach().flatten() for one in tensors])


def plain(kind=Defender, model=None, **settings):
    """A defender whose step is lr times the gradient."""
    return kind(model or smooth(), lr=0.1, momentum=0.0, weight_decay=0.0, **settings)


def probabilities(logits):
    return [[float(v) for v in row.exp() / row.exp().sum()] for row in logits.detach()]


def trades_loss(clean, adversarial, y, beta):
    p, q = clean.softmax(1), adversarial.softmax(1)
    return cross_entropy(clean, y, reduction="none") + beta * (p * (p / q).log()).sum(1)

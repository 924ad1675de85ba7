"""L2L's attacks: unrolling by hand, scaling, balls, precisions."""

import copy
import itertools

import pytest
import torch
from conftest import Linear, normed
from l2l_parts import EPS, network
from torch import nn

from advgame.attacks import InputGradient
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.l2l import L2LAttack, scaled

WEIGHT = torch.tensor([[2.0, 0.5, 0, -1], [0, 1.0, 3, 2]])


class Simple(nn.Module):
    """tanh(a·x + b·gradient), so that everything has a closed form."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))

    def forward(self, information):
        return torch.tanh((information * self.factors.view(1, -1, 1, 1)).sum(1, keepdim=True))


def by_hand(x, y):
    """Each image's ∇ₓ cross-entropy on the linear classifier, over its largest entry."""
    p = (x.flatten(1) @ WEIGHT.T).softmax(1)
    gradient = ((p - torch.eye(2)[y]) @ WEIGHT).view_as(x)
    return gradient / gradient.abs().flatten(1).amax(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("gradients", [0, 1, 2, 3])
def test_attacks_equal_a_computation_by_hand(gradients):
    x = torch.tensor([[0.05, 0.5, 0.4, 0.95], [0.3, 0.6, 0.5, 0.2]]).view(2, 1, 2, 2)
    y, factors = torch.tensor([0, 1]), (0.3, 1.7) if gradients else (-0.8,)
    net = network(gradients, (1, 2, 2))
    net.body = Simple(*factors)
    got = L2LAttack(net, Linf(EPS)).run(Linear(WEIGHT), x, y)
    delta, point = torch.zeros_like(x), x
    for _ in range(max(gradients, 1)):
        inner = factors[0] * point + (factors[1] * by_hand(point, y) if gradients else 0)
        delta = delta + EPS * torch.tanh(inner)
        delta = delta.sign() * torch.minimum(delta.abs(), torch.tensor(EPS))
        point = (x + delta).clamp(0, 1)
    torch.testing.assert_close(got.x_adv, point)
    assert (got.forwards, got.backwards) == (2 * gradients, 2 * gradients)


def test_every_cell_starts_in_the_ball():
    """Moves of 0.8, 0.8 and -0.5 end at 0.5: the sum is cut at ε before the last one."""
    moves = iter((0.8, 0.8, -0.5))

    class Scripted(Simple):
        def forward(self, information):
            return torch.full_like(information[:, :1], next(moves))

    net = network(3, (1, 2, 2))
    net.body = Scripted(0.0)
    x = torch.full((1, 1, 2, 2), 0.5)
    x_adv = L2LAttack(net, Linf(EPS)).run(Linear(WEIGHT), x, torch.tensor([0])).x_adv
    torch.testing.assert_close(x_adv - x, torch.full_like(x, 0.5 * EPS))


def test_the_gradient_reaches_phi_through_the_first_point(rng):
    """2-Step against finite differences in fp64, the gradient channels held as they are."""
    net = network(2).double()
    with seeded_init(0):
        smooth = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 5)
        ).double()
    with torch.no_grad():  # away from the faces of both boxes, where nothing would flow
        net.body.factor.fill_(0.3)
    x = 0.3 + 0.4 * torch.rand(4, 1, 8, 8, generator=rng, dtype=torch.float64)
    y, threat, seen = torch.tensor([0, 1, 2, 3]), Linf(EPS), []

    class Recorded(InputGradient):
        def _form(self, points):
            seen.append(super()._form(points))
            return seen[-1]

    class Replayed(InputGradient):
        def __init__(self, detach=False):
            super().__init__(smooth, x, y)
            self.left = iter(seen)

        def _form(self, points):
            return next(self.left)

    def loss(slope):
        return cross_entropy(smooth(net.perturb(x, threat, slope)), y).mean()

    weights = list(net.parameters())
    gradient = torch.autograd.grad(loss(Recorded(smooth, x, y)), weights)
    assert len(seen) == 2
    directions = [
        [torch.randn(w.shape, generator=rng, dtype=w.dtype) for w in weights] for _ in "ab"
    ]
    for direction in directions:
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for weight, way in zip(weights, direction, strict=True):
                    weight += step * way
                ends.append(loss(Replayed()))
                for weight, way in zip(weights, direction, strict=True):
                    weight -= step * way
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        torch.testing.assert_close(along, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-9)

    project = Linf.project
    with pytest.MonkeyPatch.context() as patch:  # the first point as a constant, delta attached
        calls = itertools.count()

        def cut(self, x_adv, x):
            point = project(self, x_adv, x)
            return point.detach() if next(calls) == 0 else point

        patch.setattr(Linf, "project", cut)
        severed = torch.autograd.grad(loss(Replayed()), weights)
    change = sum((a - b).norm() for a, b in zip(gradient, severed, strict=True))
    assert change > 0.01 * sum(a.norm() for a in gradient)


def test_the_slope_is_the_input_gradient_and_a_constant(batch):
    x, y = batch[0].double(), batch[1]
    model = normed().double().eval()
    slope = InputGradient(model, x, y)
    first = slope.at_clean()
    assert first is slope.at_clean()
    assert slope.calls == 1
    assert not x.requires_grad
    leaf = x.clone().requires_grad_()
    losses = cross_entropy(model(leaf), y)
    (want,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(first, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope.clean_losses, losses.detach())
    moved = x + torch.full_like(x, 0.1).requires_grad_()
    assert not slope(moved).requires_grad
    assert slope.calls == 2
    cut = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Threshold(1e9, 0.5)).double()
    assert not InputGradient(cut, x, y).at_clean().any()


def test_scaling_by_image_or_by_batch():
    gradient = torch.tensor([[4.0, -2], [1e-30, 0], [0, 0]]).view(3, 1, 1, 2)
    assert scaled(gradient, "image").flatten().tolist() == [1, -0.5, 1, 0, 0, 0]
    paper = scaled(gradient, "paper").flatten()
    torch.testing.assert_close(paper, torch.tensor([1, -0.5, 2.5e-31, 0, 0, 0]))


@pytest.mark.parametrize("gradients", [0, 1, 2])
def test_examples_are_in_each_images_own_ball(gradients, batch, rng):
    x, y = batch
    eps = torch.linspace(0.01, 0.4, 16)
    net = network(gradients)
    with torch.no_grad():
        net.body.factor.fill_(500.0)  # at the face
    x_adv = L2LAttack(net, Linf(eps)).run(normed(), x, y).x_adv
    size = (x_adv - x).abs().flatten(1).amax(1)
    assert (size <= eps + 1e-7).all()
    assert (size > 0.9 * eps).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("scaling", ["image", "paper"])
def test_by_image_an_images_perturbation_is_its_own(scaling, batch):
    x, y = batch
    attack = L2LAttack(network(2, scaling=scaling), Linf(EPS))
    model = normed().eval()
    with torch.no_grad():
        model.net[5].weight.mul_(20)  # gradients of very different size
    whole = attack.run(model, x, y).x_adv
    alone = torch.cat([attack.run(model, x[i : i + 1], y[i : i + 1]).x_adv for i in range(16)])
    same = torch.allclose(whole, alone, rtol=0, atol=1e-5)
    assert same == (scaling == "image")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attacking_leaves_both_networks_as_they_were(mode, batch):
    model, net = normed().train(), network(2).train()
    model.net[1].eval()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before = copy.deepcopy((model.state_dict(), net.state_dict()))
    L2LAttack(net, Linf(EPS), mode=mode).run(model, *batch)
    for old, module in zip(before, (model, net), strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, old[name])
    assert (net.training, net.body.training, model.training) == (True, True, True)
    assert not model.net[1].training
    assert torch.equal(model.net[0].weight.grad, torch.ones_like(model.net[0].weight))
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_attacked_in_fp32_at_least(dtype, batch):
    x, y = batch
    model = normed().to(dtype)
    result = L2LAttack(network(1), Linf(EPS)).run(model, x.to(dtype), y)
    assert result.x_adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((result.x_adv - x.to(dtype)).abs() <= EPS + 1e-6).all()

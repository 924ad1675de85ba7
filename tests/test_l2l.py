"""L2L's networks: unrolling by hand, gradients through it, scaling, sizes and blocks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attacker_parts import BALL, EPS, network
from conftest import Linear, multiplications, normed, seeded
from torch import nn

from advgame.attacks import InputGradient
from advgame.classifiers import SmallCNN
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker_bodies import WIDTHS, GeneratorBlock, make_body
from agents.l2l import scaled

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
    got = net.attack(BALL).run(Linear(WEIGHT), x, y)
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
    x_adv = net.attack(BALL).run(Linear(WEIGHT), x, torch.tensor([0])).x_adv
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
    y, seen = torch.tensor([0, 1, 2, 3]), []

    class Recorded(InputGradient):
        def and_losses(self, points):
            seen.append(super().and_losses(points))
            return seen[-1]

    class Replayed(InputGradient):
        def __init__(self):
            super().__init__(smooth, x, y)
            self.left = iter(seen)

        def and_losses(self, points):
            return next(self.left)

    def loss(slope):
        return cross_entropy(smooth(net.examples(slope, BALL, seeded())), y).mean()

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


@pytest.mark.parametrize("scaling", ["image", "paper"])
def test_by_image_an_images_perturbation_is_its_own(scaling, batch):
    x, y = batch
    attack = network(2, scaling=scaling).attack(BALL)
    model = normed().eval()
    with torch.no_grad():
        model.net[5].weight.mul_(20)  # gradients of very different size
    whole = attack.run(model, x, y).x_adv
    alone = torch.cat([attack.run(model, x[i : i + 1], y[i : i + 1]).x_adv for i in range(16)])
    same = torch.allclose(whole, alone, rtol=0, atol=1e-5)
    assert same == (scaling == "image")


def conv(size, channels_in, channels_out, bias=True):
    return size * size * channels_in * channels_out + bias * channels_out


def block(channels_in, channels_out):
    """Two 3x3 convolutions, two slopes of PReLU, a shortcut; its batch norms have no weights."""
    shortcut = conv(1, channels_in, channels_out) if channels_in != channels_out else 0
    return conv(3, channels_in, channels_out) + conv(3, channels_out, channels_out) + 2 + shortcut


STEM = conv(3, 6, 64, bias=False) + 2 * 64
COUNTS = {  # and as the reference has them, in millions
    "wide": (STEM + block(64, 128) + block(128, 256) + block(256, 128) + conv(3, 128, 3), 1.63),
    "wide-repo": (
        STEM + block(64, 128) + block(128, 256) + block(256, 128) + block(128, 64) + conv(3, 64, 3),
        1.75,
    ),
    "slim": (
        conv(3, 6, 128, False) + 2 * 128 + block(128, 256) + block(256, 128)
        + conv(4, 128, 16, False) + 2 * 16 + conv(3, 16 + 6, 3, False) + 1,
        1.43,
    ),
    "two-block": (STEM + block(64, 128) + block(128, 64) + conv(3, 64, 3), 0.354),
}  # fmt: skip


@pytest.mark.parametrize("width", COUNTS)
def test_parameters_number_what_the_architecture_says(width):
    count = sum(p.numel() for p in make_body(width, 6, (3, 32, 32)).parameters())
    assert count == COUNTS[width][0]
    assert round(count / 1e6, 3 if width == "two-block" else 2) == COUNTS[width][1]
    assert f"{count:,}" in make_body.__globals__["__doc__"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("gradients", [0, 1])
def test_the_small_width_costs_less_than_the_small_classifier(shape, gradients, rng):
    x = torch.rand(1, *shape, generator=rng)
    own = multiplications(
        make_body("small", 1 + gradients, shape), x.repeat(1, 1 + gradients, 1, 1)
    )
    assert own < 0.5 * multiplications(SmallCNN(shape, 10), x)


def test_slim_works_at_half_the_resolution_and_wide_at_full(rng):
    seen = {}
    for width in ("slim", "wide"):
        body = make_body(width, 6, (3, 32, 32)).eval()
        body.trunk.register_forward_hook(lambda m, i, out, w=width: seen.update({w: out.shape[2:]}))
        body(torch.rand(1, 6, 32, 32, generator=rng))
    assert seen == {"slim": (16, 16), "wide": (32, 32)}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_body_keeps_the_shape_and_stays_in_the_unit_ball(width, rng):
    shape = (3, 12, 16) if width == "small" else (3, 7, 9)
    out = make_body(width, 6, shape)(torch.randn(2, 6, *shape[1:], generator=rng) * 50)
    assert out.shape == (2, *shape)
    assert out.abs().max() <= 1


@pytest.mark.parametrize("out", [4, 6])
def test_a_block_is_two_convolutions_after_norm_and_slope_plus_a_shortcut(out, rng):
    with seeded_init(0):
        one = GeneratorBlock(4, out)
    x = torch.randn(3, 4, 5, 5, generator=rng)
    for norm in (one.bn1, one.bn2):
        norm.running_mean.uniform_(-1, 1, generator=rng)
        norm.running_var.uniform_(0.5, 2, generator=rng)
    bent = x
    for norm, conv_ in ((one.bn1, one.conv1), (one.bn2, one.conv2)):
        mean, var = (s.view(1, -1, 1, 1) for s in (norm.running_mean, norm.running_var))
        bent = (bent - mean) / (var + 1e-5).sqrt()
        bent = F.conv2d(torch.where(bent > 0, bent, bent / 4), conv_.weight, conv_.bias, padding=1)
    kept = x if out == 4 else F.conv2d(x, one.shortcut.weight, one.shortcut.bias)
    torch.testing.assert_close(one.eval()(x), bent + kept, rtol=1e-4, atol=1e-5)
    limit = math.sqrt(2) * math.sqrt(6 / (9 * (4 + out)))  # Xavier-uniform, gain √2
    assert 0.9 * limit < float(one.conv1.weight.detach().abs().max()) <= limit

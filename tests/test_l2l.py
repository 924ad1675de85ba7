"""L2L: networks, unrolling by hand, gradients of both players, modes, counts, strength."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import BatchNormNet, Linear
from safetensors.torch import load_file, save_file
from torch import nn

from advgame.attacks import Slope, attacked, fgsm, pgd
from advgame.classifiers import SmallCNN
from advgame.data import Batches
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import AWPDefender
from advgame.games.l2l import L2L, Modes
from advgame.games.passes import perturbation_stats
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.threat import L2, Linf
from agents.attacker import load_attacker
from agents.attacker_networks import WIDTHS, GeneratorBlock, make_body
from agents.attackers import load_any_attacker
from agents.l2l import L2LAttack, L2LAttacker, L2LNetwork, L2LPlayer, load_l2l, scaled

DIGIT, EPS = (1, 8, 8), 0.1


def network(gradients=1, shape=DIGIT, seed=0, **settings):
    with seeded_init(seed):
        return L2LNetwork(shape, gradients, **settings)


def normed():
    """A classifier with batch norm, without dropout's chance."""
    with seeded_init(0):
        model = BatchNormNet()
    model.net[3].p = 0.0
    return model


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


def multiplications(model, x):
    """Of one image's forward."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        weights = module.weight.numel()
        transposed = isinstance(module, nn.ConvTranspose2d)
        maps = inputs[0] if transposed else output
        total += weights * (maps[0, 0].numel() if maps.dim() == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(x)
    return total


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
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    with torch.no_grad():  # away from the faces of both boxes, where nothing would flow
        net.body.factor.fill_(0.3)
    x = 0.3 + 0.4 * torch.rand(4, 1, 8, 8, generator=rng, dtype=torch.float64)
    y, threat, seen = torch.tensor([0, 1, 2, 3]), Linf(EPS), []

    class Recorded(Slope):
        def _form(self, points):
            seen.append(super()._form(points))
            return seen[-1]

    class Replayed(Slope):
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
    slope = Slope(model, x, y)
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
    assert not Slope(cut, x, y).at_clean().any()


def test_scaling_by_image_or_by_batch():
    gradient = torch.tensor([[4.0, -2], [1e-30, 0], [0, 0]]).view(3, 1, 1, 2)
    assert scaled(gradient, "image").flatten().tolist() == [1, -0.5, 1, 0, 0, 0]
    paper = scaled(gradient, "paper").flatten()
    torch.testing.assert_close(paper, torch.tensor([1, -0.5, 2.5e-31, 0, 0, 0]))


def player(gradients=1, keep=None, **settings):
    """A player; ``keep`` collects φ's gradients at each of its steps."""

    def note(module):
        if keep is not None:
            keep.append([p.grad.clone() for p in module.parameters()])

    return L2LPlayer(network(gradients), synchronise=note, **settings)


def start(gradients, keep=None, lr=0.1, **rules):
    """A defender, the game, and the same two networks once more."""
    defender = Defender(normed(), lr=lr, weight_decay=0.0)
    own = player(gradients, keep, weight_decay=0.0)
    game = L2L(Linf(EPS), own, **rules)
    return defender, game, copy.deepcopy(defender.module), copy.deepcopy(own.module)


@pytest.fixture
def batch(digits):
    return digits.train.floats(slice(16)), digits.train.labels[:16]


@pytest.mark.parametrize("gradients", [0, 1, 2])
def test_shared_gradients_equal_separate_ones(gradients, batch, rng):
    x, y = batch
    keep = []
    defender, game, model, net = start(gradients, keep, form="shared")
    result = game.step(defender, x, y, rng)
    model.train(), net.train()
    before = copy.deepcopy(model)
    x_adv = net.perturb(x, Linf(EPS), Slope(model, x, y))
    assert torch.equal(result.x_adv, x_adv)
    theta = torch.autograd.grad(
        cross_entropy(model(x_adv.detach()), y).mean(), list(model.parameters())
    )
    for parameter in before.parameters():
        parameter.requires_grad_(False)
    phi = torch.autograd.grad(cross_entropy(before(x_adv), y).mean(), list(net.parameters()))
    for own, want, old in zip(defender.module.parameters(), theta, model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, want)
        torch.testing.assert_close(own, old - 0.1 * want)  # down
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    moved = [
        (a - b) * g.sign()
        for a, b, g in zip(game.attacker.module.parameters(), net.parameters(), phi, strict=True)
    ]
    largest = max(range(len(phi)), key=lambda i: phi[i].abs().max())
    clear = phi[largest].abs() > 1e-4
    torch.testing.assert_close(  # up: Adam's first step is the learning rate along the sign
        moved[largest][clear], torch.full_like(moved[largest][clear], 1e-3), rtol=1e-2, atol=1e-6
    )
    assert float(result.stats["game/attacker_loss"]) == float(result.losses.mean())


def test_a_shared_step_under_awp_follows_the_gradient_at_the_perturbed_weights(batch, rng):
    found = {}
    for name, kind in (("plain", Defender), ("awp", partial(AWPDefender, gamma=1e-6))):
        found[name] = []
        game = L2L(Linf(EPS), player(1, found[name]), "shared")
        result = game.step(kind(normed(), lr=0.1), *batch, rng)
        assert float(result.stats["cost/backwards"]) == 1 + (name == "awp")
    for got, want in zip(found["awp"][0], found["plain"][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("learning", ["eval", "train"])
def test_the_alternating_attacker_meets_the_updated_defender(learning, batch, rng):
    x, y = batch
    keep = []
    defender, game, model, net = start(1, keep, modes=Modes(learning=learning))
    result = game.step(defender, x, y, rng)
    with torch.no_grad():
        first = net.eval().perturb(x, Linf(EPS), Slope(model, x, y))
    assert torch.equal(result.x_adv, first), "g in evaluation mode, the gradient before the step"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    cross_entropy(model.train()(first), y).mean().backward()
    optimizer.step()
    slope = Slope(model, x, y, mode=learning)
    x_adv = net.train().perturb(x, Linf(EPS), slope)
    with attacked(model, learning):
        reached = cross_entropy(model(x_adv), y).mean()
        phi = torch.autograd.grad(reached, list(net.parameters()))
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.stats["game/attacker_loss"], reached.detach())


@pytest.mark.parametrize(
    ("gradients", "rules", "defender_forwards", "attacker_forwards"),
    [
        (1, {}, 1, 1),
        (1, {"modes": Modes(gradient="train", learning="train")}, 1, 1),
        (1, {"modes": Modes(gradient="train", keep_buffers=False)}, 2, 1),  # the published quirk
        (2, {"modes": Modes(gradient="train", keep_buffers=False)}, 3, 2),
        (1, {"modes": Modes(attacker="train")}, 1, 2),
        (0, {"modes": Modes(attacker="train")}, 1, 1),
        (2, {"form": "shared"}, 1, 2),
    ],
)
def test_only_the_forwards_that_should_move_running_statistics(
    gradients, rules, defender_forwards, attacker_forwards, batch, rng
):
    defender, game, *_ = start(gradients, **rules)
    game.step(defender, *batch, rng)
    assert defender.module.net[1].num_batches_tracked == defender_forwards
    counters = {
        int(m.num_batches_tracked)
        for m in game.attacker.module.modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    assert counters == {attacker_forwards}


def test_the_mode_of_the_gradient_matters(batch, rng):
    made = []
    for mode in ("eval", "train"):
        defender, game, *_ = start(1, modes=Modes(gradient=mode))
        defender.module.net[1].running_var.fill_(0.01)
        made.append(game.step(defender, *batch, rng).x_adv)
    assert not torch.equal(*made)


COSTS = [  # gradients, rules, (F, B, B_x, forwards and backwards of the attacker)
    (0, {}, (2, 1, 1, 2, 1)),
    (1, {}, (4, 1, 3, 2, 1)),
    (2, {}, (6, 1, 5, 4, 2)),
    (0, {"modes": Modes(attacker="train")}, (2, 1, 1, 1, 1)),
    (0, {"form": "shared"}, (1, 1, 0, 1, 1)),
    (1, {"form": "shared"}, (2, 1, 1, 1, 1)),
    (2, {"form": "shared"}, (3, 1, 2, 2, 2)),
    (1, {"attacker_steps": 2}, (5, 1, 4, 3, 2)),  # the clean gradient serves both
    (2, {"attacker_steps": 2}, (8, 1, 7, 6, 4)),
]


@pytest.mark.parametrize(("gradients", "rules", "cost"), COSTS)
def test_costs_are_what_hooks_count(gradients, rules, cost, batch, rng):
    """On a classifier of one layer, so that a backward shows in its weight, its input, or both."""
    seen = dict.fromkeys(("F", "B", "Bx", "f", "b"), 0)

    def bump(name):
        seen[name] += 1

    class Counted(torch.autograd.Function):
        """Identity: its backward runs where an input gradient is formed."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            bump("Bx")
            return grad

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            bump("F")
            return self.head(Counted.apply(x).flatten(1))

    def watched(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda grad: bump("b"))

    with seeded_init(0):
        model = Probe()
    model.head.weight.register_hook(lambda grad: bump("B"))
    own = player(gradients)
    own.module.body.register_forward_hook(lambda *_: bump("f"))
    own.module.body.register_forward_hook(watched)
    game = L2L(Linf(EPS), own, **rules)
    stats = game.step(Defender(model), *batch, rng).stats
    names = ("forwards", "backwards", "input_backwards", "attacker_forwards", "attacker_backwards")
    assert tuple(int(stats[f"cost/{name}"]) for name in names) == cost
    # shared: the one backward with weight gradients also forms the input gradient, on its way to φ
    together = int(rules.get("form") == "shared")
    assert (seen["F"], seen["B"], seen["Bx"] - together, seen["f"], seen["b"]) == cost
    worth = cost[0] + 2 * cost[1] + cost[2]
    assert int(stats["attacker/forwards_per_image"]) == worth


@pytest.mark.parametrize("form", ["alternating", "shared"])
def test_the_same_seeds_give_the_same_bits(form, digits):
    ends = []
    for seed in (0, 0, 1):
        own = L2LPlayer(network(2, seed=seed))
        with seeded_init(0):
            defender = Defender(SmallCNN(DIGIT, 10, width=8))
        game, batches = L2L(Linf(EPS), own, form), Batches(digits.train, 16, 0)
        for _ in range(3):
            game.step(defender, *batches.next(), torch.Generator())
        state = [*own.module.state_dict().values(), *defender.module.state_dict().values()]
        ends.append(torch.cat([one.flatten().double() for one in state]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_part_of_epsilon_is_a_smaller_ball(batch, rng):
    for scale in (0.25, 1.0):
        defender, game, *_ = start(1)
        result = game.step(defender, *batch, rng, scale=scale)
        largest = float((result.x_adv - batch[0]).abs().max())
        assert 0.5 * scale * EPS < largest <= scale * EPS + 1e-7
        assert 0 < float(result.stats["attacker/size"]) <= 1


@pytest.fixture(scope="module")
def frozen(digits):
    """A classifier that knows nothing of attacks."""
    with seeded_init(0):
        model = SmallCNN(DIGIT, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = digits.train.floats(), digits.train.labels
    for part in torch.arange(len(y)).repeat(8).split(64):
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).mean().backward()
        optimizer.step()
    return model.eval()


def taught(gradients, model, data, steps=60):
    """A network after ``steps`` against a frozen classifier."""
    own, batches, threat = L2LPlayer(network(gradients), lr=5e-3), Batches(data, 64, 0), Linf(EPS)
    own.module.train()
    for _ in range(steps):
        x, y = batches.next()
        with attacked(model):
            x_adv = own.perturb(x, threat, Slope(model, x, y))
            cross_entropy(model(x_adv), y).mean().backward()
        own.step()
    return own.module


def test_a_taught_network_is_an_attack(frozen, digits, rng):
    """Measured: clean 97, Naive 82, Grad 56, FGSM 55, PGD-20 51 %."""
    x, y = digits.test.floats(), digits.test.labels

    def left(attack):
        return float(
            (frozen(attack.run(frozen, x, y, rng=rng).x_adv).argmax(1) == y).float().mean()
        )

    clean = float((frozen(x).argmax(1) == y).float().mean())
    naive, grad = (left(L2LAttack(taught(k, frozen, digits.train), Linf(EPS))) for k in (0, 1))
    assert clean > 0.94
    assert naive < clean - 0.05
    assert grad < naive - 0.1
    assert grad < left(pgd(Linf(EPS), 20)) + 0.12
    untaught = left(L2LAttack(network(1), Linf(EPS)))
    assert grad < untaught - 0.1


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


@pytest.mark.parametrize("width", ["small", "slim"])
def test_a_saved_attacker_attacks_to_the_same_bits(width, tmp_path, batch):
    net = network(2, scaling="paper", width=width)
    if width == "small":
        with torch.no_grad():
            net.body.mix.copy_(torch.tensor([[-0.3, 0.7]]))  # it begins at 0
    L2LAttacker(net, {"seed": 3}).save(tmp_path / "attacker.safetensors")
    loaded = load_l2l(tmp_path)
    assert loaded.about == {"seed": 3}
    assert (loaded.network.gradients, loaded.network.scaling) == (2, "paper")
    assert loaded.network.width == width
    one, two = (
        attacker(Linf(EPS), 10).run(normed(), *batch).x_adv
        for attacker in (L2LAttacker(net, {}), load_any_attacker(tmp_path))
    )
    assert torch.equal(one, two)


def test_files_that_hold_no_l2l_attacker_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    L2LAttacker(network(), {}).save(good)
    with pytest.raises(InputError, match="no attacker"):
        load_attacker(good)
    for about, said in (
        ({}, "no L2L attacker"),
        ({"format": "advgame l2l attacker 1", "shape": "[1, 8, 8]"}, "damaged or of another"),
        (
            {"format": "advgame l2l attacker 1", "shape": "[1, 8, 8]", "gradients": "0",
             "width": "small", "scaling": "image", "about": "{}"},
            "damaged or of another",  # weights of Grad
        ),
    ):  # fmt: skip
        save_file(load_file(good), tmp_path / "odd.safetensors", about)
        with pytest.raises(InputError, match=said):
            load_l2l(tmp_path / "odd.safetensors")
        if not about:
            with pytest.raises(InputError, match="is no attacker"):
                load_any_attacker(tmp_path / "odd.safetensors")


def test_misuse_is_refused(batch):
    x, y = batch
    with pytest.raises(InputError, match="not in L2"):
        L2LAttacker(network(), {})(L2(1.0), 10)
    with pytest.raises(InputError, match="2 queries"):
        L2LAttacker(network(2), {})(Linf(0.1), 1)
    attack = L2LAttack(network(), Linf(0.1))
    with pytest.raises(InputError, match=r"images of \(1, 8, 8\)"):
        attack.run(normed(), x.expand(-1, 3, -1, -1), y)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attack.run(normed(), x * 255, y)
    with pytest.raises(InputError, match="softmax"):
        attack.run(nn.Sequential(normed(), nn.Softmax(1)), x, y)
    for bad in ({"gradients": -1}, {"width": "huge"}, {"scaling": "none"}, {"shape": (1, 7, 8)}):
        with pytest.raises(InputError):
            L2LNetwork(**{"shape": DIGIT, **bad})
    for bad in (
        {"threat": L2(0.1)},
        {"threat": Linf(torch.tensor([0.1, 0.2]))},
        {"form": "both"},
        {"attacker_steps": 0},
        {"form": "shared", "attacker_steps": 2},
    ):
        with pytest.raises(InputError):
            L2L(**{"threat": Linf(0.1), "attacker": player(), **bad})


def test_smoothness_and_size_of_perturbations(rng):
    board = (torch.arange(64).view(8, 8) + torch.arange(8).view(8, 1)) % 2 * 2.0 - 1
    noise = torch.randn(50, 1, 8, 8, generator=rng).sign()
    for delta, size, variation, on_face in (
        (torch.full((3, 1, 8, 8), 0.05), 0.5, 0, 0),
        (board.expand(3, 1, 8, 8) * 0.1, 1, 2, 1),
        (noise * 0.1, 1, 1, 1),
    ):
        stats = perturbation_stats(delta, Linf(0.1))
        assert float(stats["attacker/size"]) == pytest.approx(size)
        assert float(stats["attacker/variation"]) == pytest.approx(variation, abs=0.05)
        assert float(stats["attacker/on_face"]) == pytest.approx(on_face)


def test_controls_are_plain_and_adversarial_training(batch, rng):
    x, y = batch
    for make, cost in ((None, (1, 1, 0)), (fgsm, (2, 1, 1)), (lambda t: pgd(t, 10), (11, 1, 10))):
        defender, model = Defender(normed(), lr=0.1, weight_decay=0.0), normed()
        result = AdversarialTraining(Linf(EPS), make).step(defender, x, y, rng, scale=0.5)
        if make is None:
            assert torch.equal(result.x_adv, x)
        if make is fgsm:
            torch.testing.assert_close(result.x_adv, fgsm(Linf(EPS / 2)).perturb(model, x, y))
        names = ("forwards", "backwards", "input_backwards")
        assert tuple(int(result.stats[f"cost/{name}"]) for name in names) == cost
        cross_entropy(model.train()(result.x_adv), y).mean().backward()
        for own, old in zip(defender.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(own, old - 0.1 * old.grad)

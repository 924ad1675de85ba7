"""ADT: attacks, both players' gradients, counts."""

import copy
import math

import pytest
import torch
from adt_parts import DIGIT, EPS, KINDS, known, network, player
from conftest import BatchNormNet, normed, seeded
from torch import nn

from advgame.attacks import InputGradient, attacked
from advgame.attacks.distributional import DistributionalAttack, worst_of
from advgame.classifiers import SmallCNN
from advgame.data import Batches
from advgame.defender import Defender
from advgame.distributions import LOG_2
from advgame.evaluation.measure import counted
from advgame.evaluation.sweeps import differences
from advgame.games.adt import Amortised, Explicit
from advgame.games.awp import AWPDefender
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.targets import shipped
from advgame.threat import Linf


@pytest.fixture(scope="module")
def victim():
    return shipped().model


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["exp", *KINDS])
def test_attacks_count_their_passes_and_repeat_their_bits(name, draws, victim, digits):
    x, y = digits.test.floats(slice(6)), digits.test.labels[:6]
    attack = known(name, draws=draws)
    with counted(victim) as calls, attacked(victim):
        result = attack.run(victim, x, y, rng=seeded())
    gradients = 4 if name == "exp" else 2
    assert result.backwards == calls.backwards == 6 * gradients
    assert result.forwards == calls.forwards == 6 * (gradients + (draws if draws > 1 else 0))
    again, other = (attack.run(victim, x, y, rng=seeded(s)).x_adv for s in (0, 1))
    assert torch.equal(result.x_adv, again)
    assert not torch.equal(result.x_adv, other)
    many = list(attack.draw(victim, x, y, 3, seeded()))
    wanted = many[0] if draws == 1 else worst_of(victim, many, y)[0]
    assert torch.equal(result.x_adv, wanted)
    spread = differences(victim, x, y, many, Linf(EPS))
    assert 0 < spread["distance"] < 1


@pytest.mark.parametrize("name", ["exp", *KINDS])
def test_samples_are_in_each_images_own_ball_and_nothing_is_changed(name, digits):
    x, y = digits.test.floats(slice(8)), digits.test.labels[:8]
    with seeded_init(0):
        model = BatchNormNet().train()
    model.net[1].eval()
    eps = torch.linspace(0.02, 0.3, 8)
    attack = known(name)
    attack = type(attack)(**{**vars(attack), "threat": Linf(eps), "draws": 2})
    net = getattr(attack, "network", None)
    before = copy.deepcopy(model.state_dict())
    old = None if net is None else copy.deepcopy(net.train().state_dict())
    x_adv = attack.run(model, x, y, rng=seeded()).x_adv
    size = (x_adv - x).abs().flatten(1).amax(1)
    assert (size <= eps + 1e-7).all()
    assert (size > 0.2 * eps).all()
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.net[1].training) == (True, False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    if net is not None:
        assert net.training
        assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())


def test_a_generator_is_told_two_gradients(digits, victim):
    x, y = digits.test.floats(slice(8)), digits.test.labels[:8]
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cross_entropy(victim(leaf), y).sum(), leaf)
    leaf = (x + EPS * first.sign()).clamp(0, 1).requires_grad_()
    (second,) = torch.autograd.grad(cross_entropy(victim(leaf), y).sum(), leaf)
    largest = [g.abs().flatten(1).amax(1).view(-1, 1, 1, 1) for g in (first, second)]
    for scaling, by in (("image", largest), ("raw", [32, 32])):  # as in training, not 8
        told = network(scaling=scaling, batch=32)
        wanted = torch.cat([x, first / by[0], second / by[1]], 1)
        got = told.information(x, Linf(EPS), InputGradient(victim, x, y))
        torch.testing.assert_close(got, wanted)
        alone = told.information(x[:1], Linf(EPS), InputGradient(victim, x[:1], y[:1]))
        torch.testing.assert_close(alone, got[:1], rtol=1e-4, atol=1e-5)


CASES = {
    "exp-am": {"lam": 0.7},
    "imp-am, pushed": {"lam": 0.7, "threshold": -math.inf},
    "imp-am, at rest": {"lam": 0.7, "threshold": 9.0},
    "imp-am, lazy": {"lam": 0.7, "threshold": 9.0, "lazy": True},
}


@pytest.mark.parametrize("case", CASES)
def test_one_backward_holds_both_players_gradients(case, digits):
    """θ: the loss at fixed samples. φ: the loss through frozen f, plus λ entropy."""
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    keep, kind, settings = [], case.split(",")[0], CASES[case]
    defender = Defender(normed(), lr=0.1, weight_decay=0.0)
    own = player(kind, keep, **settings)
    model, twin = copy.deepcopy(defender.module), copy.deepcopy(own.module).train()
    encoder = copy.deepcopy(own.encoder) if kind == "imp-am" else None
    result = Amortised(Linf(EPS), own).step(defender, x, y, seeded())
    information = twin.information(x, Linf(EPS), InputGradient(model, x, y))
    rng = seeded()
    if encoder is None:
        found = twin.distribution(information)
        draw = found.sample(rng)
        value, entropy = draw.value, -found.log_density(draw).flatten(1).mean(1).mean()
    else:
        z = twin.noise(information, rng)
        value = twin.perturbation(information, z)
        entropy = -encoder.train().nll(value, z)
    x_adv = (x + EPS * value).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, x_adv.detach())
    theta = torch.autograd.grad(
        cross_entropy(model.train()(x_adv.detach()), y).mean(), list(model.parameters())
    )
    for got, want, old in zip(defender.module.parameters(), theta, model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want)
        torch.testing.assert_close(got, old - 0.1 * want)  # down
    reaches_g = case in ("exp-am", "imp-am, pushed")
    with attacked(model, "train"):
        reached = cross_entropy(model(x_adv), y).mean()
        payoff = reached + 0.7 * entropy if reaches_g else reached
        phi = torch.autograd.grad(payoff, list(twin.parameters()), retain_graph=True)
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    if encoder is not None:
        psi = torch.autograd.grad(entropy, list(encoder.parameters()))  # without λ: it is G's
        for got, want in zip(keep[1], psi, strict=True):
            want = want * (case != "imp-am, lazy")
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        assert float(result.stats["game/entropy"]) == pytest.approx(
            LOG_2 + float(entropy.detach()), 1e-4
        )
        assert float(result.stats["attacker/pushed"]) == reaches_g
    moved = [
        ((new - old) * g.sign())[g.abs() > 1e-3].detach()
        for new, old, g in zip(own.module.parameters(), twin.parameters(), phi, strict=True)
    ]
    moved = torch.cat([one.flatten() for one in moved])
    assert len(moved) > 20
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-4), rtol=1e-2, atol=1e-6)  # up
    assert defender.module.net[1].num_batches_tracked == 1
    norms = [m for m in own.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.num_batches_tracked == 1 for m in norms)


def test_under_awp_the_generator_follows_the_gradient_at_the_perturbed_weights(digits):
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    kept, defender = [], AWPDefender(normed(), gamma=0.05, lr=0.1)
    model, own = copy.deepcopy(defender.module), player("exp-am", kept)
    twin = copy.deepcopy(own)
    result = Amortised(Linf(EPS), own).step(defender, x, y, seeded())
    assert float(result.stats["cost/forwards"]) == 4
    assert float(result.stats["cost/backwards"]) == 2
    sampled = twin.sample(x, Linf(EPS), InputGradient(model, x, y), seeded())
    leaf = sampled.x_adv.detach().requires_grad_()
    weights, slopes = [p for p in model.parameters() if p.dim() > 1], []
    for _ in range(2):  # at θ, and at θ + v
        loss = cross_entropy(model.train()(leaf), y).mean()
        at_leaf, *at_weights = torch.autograd.grad(loss, [leaf, *weights])
        slopes.append(at_leaf)
        with torch.no_grad():
            for weight, g in zip(weights, at_weights, strict=True):
                weight += 0.05 * weight.norm() * g / g.norm()
    by_hand = [
        torch.autograd.grad(
            (sampled.x_adv, sampled.bonus), list(twin.module.parameters()), (slope, None),
            retain_graph=True,
        )
        for slope in slopes
    ]  # fmt: skip
    for got, want in zip(kept[0], by_hand[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*by_hand, strict=True)]
    assert max(apart) > 0.05, "the weights' perturbation is to be seen"


def test_a_step_of_exp_trains_on_a_fresh_sample(digits):
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    attack = DistributionalAttack(Linf(EPS), steps=3, samples=2)
    defender = Defender(normed(), lr=0.1, weight_decay=0.0)
    model = copy.deepcopy(defender.module)
    result = Explicit(attack).step(defender, x, y, rng := seeded(), scale=0.5)
    again = seeded()
    half = DistributionalAttack(Linf(EPS / 2), steps=3, samples=2)
    found = half.fit(model, x, y, again).distribution
    draw = found.sample(again)
    x_adv = (x + EPS / 2 * draw.value).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, x_adv)
    assert torch.equal(rng.get_state(), again.get_state())
    losses = cross_entropy(model.train()(x_adv), y)
    torch.testing.assert_close(result.losses, losses.detach())
    for got, old in zip(defender.module.parameters(), model.parameters(), strict=True):
        (grad,) = torch.autograd.grad(losses.mean(), old, retain_graph=True)
        torch.testing.assert_close(got, old - 0.1 * grad)
    entropy = -found.log_density(draw).mean()
    assert float(result.stats["game/entropy"]) == pytest.approx(float(entropy), abs=0.1)
    assert result.stats["attacker/size"] <= 1


@pytest.mark.parametrize(
    ("method", "cost", "published"),
    [
        ("exp", (36, 1, 35, 0, 0), (36, 36)),
        ("exp-am", (3, 1, 2, 1, 1), (3, 3)),
        ("imp-am", (3, 1, 2, 1, 1), (3, 3)),
    ],
)
def test_costs_are_what_hooks_count_and_no_more_than_published(method, cost, published, digits):
    """F, B, B_x, forwards and backwards of the generator; published: F and B of the classifier."""
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
        bump("f")
        output.register_hook(lambda grad: bump("b"))

    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    model = Probe()
    model.head.weight.register_hook(lambda grad: bump("B"))
    if method == "exp":
        game = Explicit(DistributionalAttack(Linf(EPS)))
    else:
        own = player(method)
        own.module.body.register_forward_hook(watched)
        game = Amortised(Linf(EPS), own)
    stats = game.step(Defender(model), x, y, seeded()).stats
    names = ("forwards", "backwards", "input_backwards", "attacker_forwards", "attacker_backwards")
    assert tuple(int(stats[f"cost/{name}"]) for name in names) == cost
    # the backward with weight gradients also forms the input gradient, on its way to φ
    together = int(method != "exp")
    assert (seen["F"], seen["B"], seen["Bx"] - together, seen["f"], seen["b"]) == cost
    assert (cost[0], cost[1] + cost[2]) <= published
    assert ("cost/encoder_passes" in stats) == (method == "imp-am")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seeds_give_the_same_bits(kind, digits):
    ends = []
    for seed in (0, 0, 1):
        own, rng, batches = player(kind), seeded(seed), Batches(digits.train, 16, 0)
        with seeded_init(0):
            defender = Defender(SmallCNN(DIGIT, 10, width=8))
        game = Amortised(Linf(EPS), own)
        for _ in range(3):
            game.step(defender, *batches.next(), rng)
        state = [*own.module.state_dict().values(), *defender.module.state_dict().values()]
        ends.append(torch.cat([one.flatten().double() for one in state]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])

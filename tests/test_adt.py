"""ADT: distributions, fits, generators, both players' gradients, counts, strength."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import BatchNormNet, Linear
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from advgame.attacks import Slope, attacked, pgd
from advgame.attacks.distributional import DistributionalAttack, worst_of
from advgame.classifiers import SmallCNN, make_classifier
from advgame.data import Batches
from advgame.defender import Defender
from advgame.distributions import LOG_2, TanhNormal, log_slope
from advgame.errors import InputError
from advgame.evaluation.measure import counted
from advgame.evaluation.sweeps import differences
from advgame.frozen import shipped
from advgame.games.adt import Amortised, Explicit
from advgame.games.awp import AWPDefender
from advgame.losses import cross_entropy, margin
from advgame.seeding import seeded_init
from advgame.threat import L2, Linf
from agents.adt import ADTAttack, ADTAttacker, ADTNetwork, load_adt
from agents.adt_networks import PRIOR_NLL, Encoder, make_generator
from agents.adt_players import ExplicitPlayer, ImplicitPlayer
from agents.attacker import load_attacker
from agents.attackers import learned_name, load_any_attacker

DIGIT, EPS = (1, 8, 8), 0.1
KINDS = ("exp-am", "imp-am")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(mean, spread, shape=()):
    """σ = softplus(ρ) solved for ρ, in fp64."""
    raw = math.log(math.expm1(spread))
    return TanhNormal(*(torch.full(shape, v, dtype=torch.float64) for v in (mean, raw)))


@pytest.mark.parametrize(
    ("mean", "spread"), [(0, 0.3), (0, 0.693), (0.8, 0.5), (-2.5, 1.5), (4, 2)]
)
def test_the_entropy_is_that_of_numerical_integration(mean, spread):
    """Over u: H(a) = -∫ N(u) log p(tanh u) du, with p(a) = N(u) / (1 - a²)."""

    def integrand(u):
        gauss = -((u - mean) ** 2) / (2 * spread**2) - math.log(spread * math.sqrt(2 * math.pi))
        return math.exp(gauss) * (2 * math.log(2 / (math.exp(u) + math.exp(-u))) - gauss)

    exact = quad(integrand, mean - 12 * spread, mean + 12 * spread, limit=200)[0]
    assert exact < LOG_2, "U(-1, 1) has the most"
    found, count = normal(mean, spread, (4,)), 100_000
    draw = found.sample(seeded(), count)
    assert draw.value.shape == (count, 4)
    errors = []
    for estimate in (found.entropy(draw), -found.log_density(draw)):
        error = float(estimate.std()) / math.sqrt(4 * count)
        assert float(estimate.mean()) == pytest.approx(exact, abs=5 * error)
        errors.append(error)
    assert errors[0] < 0.02


def test_the_density_is_torchs():
    found = TanhNormal(
        torch.randn(3, 5, generator=seeded()), torch.randn(3, 5, generator=seeded(1))
    )
    draw = found.sample(seeded(2), 7)
    peer = TransformedDistribution(
        Normal(found.mean, found.spread), TanhTransform(cache_size=1)
    )  # fmt: skip
    wanted = peer.log_prob(draw.value)
    torch.testing.assert_close(found.log_density(draw), wanted, rtol=1e-3, atol=1e-3)
    whole = Independent(Normal(found.mean, found.spread), 1).log_prob(draw.latent)
    ours = (found.log_density(draw) + log_slope(draw.latent)).sum(-1)
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_logarithms_are_finite_where_tanh_and_softplus_round():
    u = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(log_slope(u), (1 - u.tanh() ** 2).log())
    (grad,) = torch.autograd.grad(log_slope(u).sum(), u)
    torch.testing.assert_close(grad, -2 * u.detach().tanh())
    far = torch.tensor([-300.0, -40, 40, 300])
    torch.testing.assert_close(log_slope(far), 2 * (LOG_2 - far.abs()))
    raw = torch.tensor([-200.0, -20, -14, 0, 30], requires_grad=True)
    found = TanhNormal(torch.zeros(5), raw)
    draw = found.sample(seeded())
    value = found.entropy(draw)
    (grad,) = torch.autograd.grad(value.sum(), raw)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()
    wanted = raw.detach().double().exp().log1p().log()
    wanted[0] = -200.0
    ours = value.detach() - log_slope(draw.latent.detach()) - 0.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)
    assert float(grad[0]) == pytest.approx(1, abs=1e-3)


def smooth(seed=0, classes=3):
    """A small network without kinks, in fp64, for images of 4 pixels."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def batch(n=5, classes=3, seed=1):
    """Images away from black and white, where a clipped gradient would be 0."""
    rng = seeded(seed)
    x = torch.rand(n, 1, 2, 2, generator=rng, dtype=torch.float64) * 0.4 + 0.3
    return x, torch.randint(classes, (n,), generator=rng)


def objective(model, x, y, mean, raw, rng, lam=0.3, count=2):
    """Sum over images and draws of loss + λ mean entropy, straight through the model."""
    found = TanhNormal(mean, raw)
    draw = found.sample(rng, count)
    points = (x + EPS * draw.value).clamp(0, 1)
    losses = sum(cross_entropy(model(one), y).sum() for one in points)
    return losses + lam * found.entropy(draw).flatten(2).mean(2).sum()


def test_the_reparameterised_gradient_is_that_of_finite_differences():
    (x, y), model = batch(2), smooth()
    leaves = [
        torch.randn(x.shape, generator=seeded(s), dtype=x.dtype).requires_grad_() for s in (3, 4)
    ]
    assert torch.autograd.gradcheck(
        lambda mean, raw: objective(model, x, y, mean, raw, seeded(5)), leaves, eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("batch_mean", [False, True])
def test_a_fit_is_adam_by_hand(accumulate, batch_mean):
    """With betas (0, 0) a step is lr·g / (|g| + 1e-8); accumulated, g is the sum so far."""
    (x, y), model = batch(), smooth()
    model[3].weight.data *= 1e-4  # gradients near Adam's 1e-8: the division by B shows
    attack = DistributionalAttack(
        Linf(EPS), steps=3, samples=2, lr=0.2, lam=1e-8, accumulate=accumulate,
        batch_mean=batch_mean,
    )  # fmt: skip
    found = attack.fit(model, x, y, seeded())
    rng, total = seeded(), [torch.zeros_like(x)] * 2
    leaves = [torch.zeros_like(x) for _ in "μρ"]
    for _ in range(3):
        leaves = [one.detach().requires_grad_() for one in leaves]
        value = objective(model, x, y, *leaves, rng, lam=1e-8)
        grads = torch.autograd.grad(value / (len(x) if batch_mean else 1), leaves)
        total = [t * accumulate + g for t, g in zip(total, grads, strict=True)]
        leaves = [p + 0.2 * g / (g.abs() + 1e-8) for p, g in zip(leaves, total, strict=True)]
    torch.testing.assert_close(found.distribution.mean, leaves[0].detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.distribution.raw, leaves[1].detach(), rtol=1e-6, atol=1e-9)


def test_adams_betas_reach_the_fit():
    (x, y), model = batch(), smooth()
    plain, moment = (
        DistributionalAttack(Linf(EPS), betas=betas).fit(model, x, y, seeded()).distribution.mean
        for betas in ((0.0, 0.0), (0.9, 0.999))
    )
    assert not torch.equal(plain, moment)


def two_classes(seed=0):
    """A linear classifier: the best δ is -ε·sign(w) for label 1, ε·sign(w) for label 0."""
    w = torch.randn(4, generator=seeded(seed))
    x = torch.full((6, 1, 2, 2), 0.5)
    return Linear(torch.stack([-w, w])), w, x, torch.tensor([0, 1] * 3)


def test_a_fit_finds_the_best_direction_and_lambda_keeps_it_wide():
    model, w, x, y = two_classes()
    best = (w.sign() * (1 - 2 * y)[:, None]).view(x.shape)
    entropies, reached = [], []
    for lam in (0.0, 0.3, 3.0, 30.0):
        found = DistributionalAttack(Linf(0.3), lam=lam, samples=3).fit(model, x, y, seeded())
        draw = found.distribution.sample(seeded(1), 200)
        entropies.append(float(found.distribution.entropy(draw).mean()))
        reached.append(float((draw.value * best).mean()))
    assert reached[0] > 0.95
    assert entropies == sorted(entropies)
    assert entropies[0] < -1
    assert LOG_2 > entropies[-1] > 0.5
    assert reached[-1] < 0.2


def test_the_worst_of_several_is_wrong_if_any_is():
    model = Linear(torch.eye(3)[:, :3] * 1.0)
    y = torch.tensor([0, 0, 1])

    def logits(*rows):
        return torch.tensor(rows).view(3, 1, 1, 3)

    # first image: right in both, by less in the second; second: wrong in the first alone, where
    # cross-entropy is lower than in the second
    first = logits([1.0, 0.0, 0.0], [0.45, 0.5, -5.0], [0.0, 1.0, 0.0])
    second = logits([1.0, 0.9, 0.0], [0.1, 0.05, 0.05], [0.0, 0.5, 0.8])
    x_adv, margins = worst_of(model, iter([first, second]), y)
    assert torch.equal(x_adv, torch.stack([second[0], first[1], second[2]]))
    torch.testing.assert_close(margins, torch.tensor([-0.1, 0.05, 0.3]))
    ce = cross_entropy(model(torch.cat([first[1:2], second[1:2]])), y[:2] * 0)
    assert ce[1] > ce[0]


@pytest.fixture(scope="module")
def victim():
    return shipped().model


def known(name, **settings):
    """An attack of each method, generators as they were born."""
    if name == "exp":
        return DistributionalAttack(Linf(EPS), steps=2, samples=2, **settings)
    return ADTAttack(network(name), Linf(EPS), **settings)


def network(kind="exp-am", shape=DIGIT, seed=0, **settings):
    with seeded_init(seed):
        return ADTNetwork(shape, kind, **{"latent": 4, **settings})


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
    for scaling, by in (("image", largest), ("raw", [8, 8])):
        wanted = torch.cat([x, first / by[0], second / by[1]], 1)
        got = network(scaling=scaling).information(x, Linf(EPS), Slope(victim, x, y))
        torch.testing.assert_close(got, wanted)
    alone = network().information(x[:1], Linf(EPS), Slope(victim, x[:1], y[:1]))
    whole = network().information(x, Linf(EPS), Slope(victim, x, y))
    torch.testing.assert_close(alone, whole[:1], rtol=1e-4, atol=1e-5)


def normed():
    """A classifier with batch norm, without dropout's chance."""
    with seeded_init(0):
        model = BatchNormNet()
    model.net[3].p = 0.0
    return model


def player(kind, keep=None, **settings):
    """A player; ``keep`` collects the gradients at each of its steps."""

    def note(module):
        if keep is not None:
            keep.append([p.grad.clone() for p in module.parameters()])

    if kind == "exp-am":
        return ExplicitPlayer(network(kind), synchronise=note, **settings)
    with seeded_init(1):
        encoder = Encoder(DIGIT, 4)
    return ImplicitPlayer(network(kind), encoder, synchronise=note, **settings)


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
    information = twin.information(x, Linf(EPS), Slope(model, x, y))
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
        assert float(result.stats["game/entropy"]) == pytest.approx(LOG_2 + float(entropy), 1e-4)
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
    found = {}
    for name, kind in (("plain", Defender), ("awp", partial(AWPDefender, gamma=1e-6))):
        found[name], defender = [], kind(normed(), lr=0.1)
        result = Amortised(Linf(EPS), player("exp-am", found[name])).step(defender, x, y, seeded())
        descents = 1 + (name == "awp")
        assert float(result.stats["cost/forwards"]) == 2 + descents
        assert float(result.stats["cost/backwards"]) == descents
    for got, want in zip(found["awp"][0], found["plain"][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)


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


def multiplications(model, *given):
    """Of one image's forward; shapes alone are computed."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += module.weight.numel() * (output[0, 0].numel() if output.dim() == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(*(one.to("meta") for one in given))
    return total


def test_the_published_sizes():
    """Reference: 10.3 M weights and 10.57 billion multiplications, twice WRN-28-10's 5.24."""
    with torch.device("meta"):
        body = make_generator("resnet-3blocks", 9, 6, (3, 32, 32))
        encoder = Encoder((3, 32, 32), 64, "resnet-3blocks")
        wide = make_classifier("wrn-28-10", (3, 32, 32), 10)
    x = torch.empty(1, 3, 32, 32)
    assert round(sum(p.numel() for p in body.parameters()) / 1e6, 1) == 10.3
    assert round(multiplications(body, torch.empty(1, 9, 32, 32)) / 1e9, 2) == 10.57
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 0.72
    assert multiplications(encoder, x) < 0.01 * multiplications(wide, x)
    with seeded_init(0):
        small = make_generator("resnet-3blocks", 9, 6, (3, 32, 32), ngf=16)
    assert float(small[3].conv1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_small_generator_costs_less_than_the_small_classifier(kind, shape):
    with torch.device("meta"):
        net = ADTNetwork(shape, kind, latent=16)
        encoder, classifier = Encoder(shape, 16), SmallCNN(shape, 10)
    inputs = 3 + (kind == "imp-am")
    own = multiplications(net.body, torch.empty(1, inputs, *shape[1:]))
    if kind == "imp-am":
        own += multiplications(net.latent_map, torch.empty(1, 16))
        own += multiplications(encoder, torch.empty(1, *shape))
    else:
        x = torch.randn(4, 3, *shape[1:], generator=seeded())
        begun = network(kind, shape).distribution(x)
        assert float(begun.mean.abs().mean()) < 0.5, "EXP begins at 0"
        assert float((begun.spread - LOG_2).abs().mean()) < 0.3
    assert own < 0.8 * multiplications(classifier, torch.empty(1, *shape))


def test_the_published_hinge_pushes_nothing():
    """An encoder that ignores δ and answers N(0, 1/3) has NLL 0.8696 < 0.9; no constant less."""
    encoder = Encoder(DIGIT, 4)
    z = 2 * torch.rand(20_000, 4, generator=seeded()) - 1
    a = torch.zeros(len(z), *DIGIT)

    def said(variance):
        with torch.no_grad():
            encoder.head.weight.zero_()
            encoder.head.bias[:4] = 0
            encoder.head.bias[4:] = math.log(math.expm1(variance))
            return float(encoder.nll(a, z))

    assert round(PRIOR_NLL, 4) == 0.8696
    assert said(1 / 3) == pytest.approx(PRIOR_NLL, abs=6e-3)
    assert min(said(0.25), said(0.45)) > PRIOR_NLL + 0.006
    said(1 / 3)
    for threshold, pushed in ((0.9, 0.0), (0.5, 1.0)):
        own = ImplicitPlayer(network("imp-am"), copy.deepcopy(encoder), threshold=threshold)
        x, y = torch.rand(256, *DIGIT, generator=seeded()), torch.zeros(256, dtype=torch.int64)
        sampled = own.sample(x, Linf(EPS), Slope(shipped().model, x, y), seeded())
        assert float(sampled.stats["attacker/pushed"]) == pushed


def test_the_bound_rises_where_the_perturbation_tells_z_and_only_there():
    ends = []
    for tells in (True, False):
        with seeded_init(0):
            encoder = Encoder(DIGIT, 4)
        adam, rng = torch.optim.Adam(encoder.parameters(), 1e-2), seeded()
        for _ in range(100):
            z = 2 * torch.rand(128, 4, generator=rng) - 1
            a = torch.rand(128, 64, generator=rng) * 0.1
            if tells:
                a[:, :4] += z
            nll = encoder.nll(a.view(128, *DIGIT), z)
            adam.zero_grad()
            nll.backward()
            adam.step()
        ends.append(LOG_2 - float(nll.detach()))
    assert ends[0] > 0.5
    assert ends[1] < LOG_2 - PRIOR_NLL + 0.03


@pytest.fixture(scope="module")
def frozen(digits):
    """A classifier that knows nothing of attacks."""
    with seeded_init(0):
        model = SmallCNN(DIGIT, 10, width=12)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = digits.train.floats(), digits.train.labels
    for part in torch.arange(len(y)).repeat(8).split(64):
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).mean().backward()
        optimizer.step()
    return model.eval()


def taught(kind, model, data, steps=50, **settings):
    """A generator after ``steps`` against a classifier that does not learn."""
    own, batches, rng = player(kind, lr=5e-3, **settings), Batches(data, 64, 0), seeded()
    defender = Defender(copy.deepcopy(model), lr=0.0, momentum=0.0, weight_decay=0.0)
    game, entropies = Amortised(Linf(EPS), own), []
    for _ in range(steps):
        stats = game.step(defender, *batches.next(), rng).stats
        entropies.append(float(stats["game/entropy"]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), defender.module.parameters(), strict=True)
    )
    return own.module, sum(entropies[-10:]) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_generator_is_an_attack(kind, frozen, digits):
    x, y = digits.test.floats(), digits.test.labels
    net = taught(kind, frozen, digits.train, lam=0.01)[0]

    def left(attack):
        x_adv = attack.run(frozen, x, y, rng=seeded()).x_adv
        return float((frozen(x_adv).argmax(1) == y).float().mean())

    clean = float((frozen(x).argmax(1) == y).float().mean())
    one, ten = (left(ADTAttack(net, Linf(EPS), draws)) for draws in (1, 10))
    assert clean > 0.94
    assert one < clean - 0.25
    assert ten <= one
    assert ten < left(ADTAttack(network(kind), Linf(EPS), 10)) - 0.2
    assert ten < left(pgd(Linf(EPS), 20)) + 0.2
    assert left(DistributionalAttack(Linf(EPS), samples=2)) < clean - 0.25


def test_a_larger_lambda_leaves_a_generator_more_entropy(frozen, digits):
    ends = [taught("exp-am", frozen, digits.train, lam=lam)[1] for lam in (0.01, 3.0)]
    assert ends[1] > ends[0] + 0.2
    implicit = [
        taught("imp-am", frozen, digits.train, lam=lam, encoder_lr=1e-2, steps=40)[1]
        for lam in (0.001, 3.0)
    ]
    assert implicit[1] > implicit[0] + 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", ["small", "resnet-3blocks"])
def test_a_saved_generator_attacks_to_the_same_bits(kind, body, tmp_path, victim, digits):
    x, y = digits.test.floats(slice(8)), digits.test.labels[:8]
    net = network(kind, body=body, ngf=4, scaling="raw")
    ADTAttacker(net, {"seed": 3}).save(tmp_path / "attacker.safetensors")
    loaded = load_adt(tmp_path)
    assert loaded.about == {"seed": 3}
    assert (loaded.network.kind, loaded.network.scaling) == (kind, "raw")
    one = ADTAttack(net, Linf(EPS), 8).run(victim, x, y, rng=seeded())
    two = load_any_attacker(tmp_path)(Linf(EPS), 10).run(victim, x, y, rng=seeded())
    assert torch.equal(one.x_adv, two.x_adv)
    assert two.forwards == 8 * 10, "the budget"
    torch.testing.assert_close(two.loss, margin(victim(two.x_adv), y))
    attack = loaded(Linf(EPS), 5)
    assert learned_name(tmp_path / "good.safetensors", attack) == "learned:good-worst-of-3"
    assert learned_name(tmp_path / "good", loaded(Linf(EPS), 3)) == "learned:good"


def test_files_that_hold_no_generator_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    ADTAttacker(network(), {}).save(good)
    with pytest.raises(InputError, match="no attacker"):
        load_attacker(good)
    wrong = {"format": "advgame adt generator 1", "about": "{}"}
    for about, said in (
        ({}, "no ADT generator"),
        ({"format": "advgame adt generator 1"}, "damaged or of another"),
        ({**wrong, "network": "[[1, 8, 8], \"imp-am\", \"small\", 256, 4, \"image\"]"}, "damaged"),
    ):  # fmt: skip
        save_file(load_file(good), tmp_path / "odd.safetensors", about)
        with pytest.raises(InputError, match=said):
            load_adt(tmp_path / "odd.safetensors")


def test_misuse_is_refused(victim, digits):
    x, y = digits.test.floats(slice(4)), digits.test.labels[:4]
    for make in (
        DistributionalAttack,
        lambda t: ADTAttack(network(), t),
        ADTAttacker(network(), {}),
    ):
        with pytest.raises(InputError, match="L2"):
            make(L2(1.0)) if not isinstance(make, ADTAttacker) else make(L2(1.0), 10)
    with pytest.raises(InputError, match="2 queries"):
        ADTAttacker(network(), {})(Linf(0.1), 1)
    for attack in (known("exp"), known("exp-am")):
        with pytest.raises(InputError, match="needs rng"):
            attack.run(victim, x, y)
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            attack.run(victim, x * 255, y, rng=seeded())
        with pytest.raises(InputError, match="softmax"):
            attack.run(nn.Sequential(victim, nn.Softmax(1)), x, y, rng=seeded())
    with pytest.raises(InputError, match=r"images of \(1, 8, 8\)"):
        known("imp-am").run(victim, x.expand(-1, 3, -1, -1), y, rng=seeded())
    for bad in (
        {"steps": 0}, {"samples": 0}, {"draws": 0}, {"lr": 0.0}, {"betas": (1.0, 0.0)},
        {"lam": -1.0}, {"lam": math.nan},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(bad))):
            DistributionalAttack(Linf(0.1), **bad)
    for bad in (
        {"kind": "exp"}, {"body": "huge"}, {"ngf": 0}, {"latent": 0}, {"scaling": "sign"},
        {"shape": (1, 7, 8)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            ADTNetwork(**{"shape": DIGIT, **bad})
    with pytest.raises(InputError, match="20 pixels"):
        Encoder(DIGIT, 4, "resnet-3blocks")
    with pytest.raises(InputError, match="lam"):
        player("exp-am", lam=-1.0)
    with pytest.raises(InputError, match="threshold"):
        player("imp-am", threshold=math.nan)
    with pytest.raises(InputError, match="draws"):
        ADTAttack(network(), Linf(0.1), 0)
    many = Linf(torch.tensor([0.1, 0.2]))
    for make in (
        lambda t: Explicit(DistributionalAttack(t)),
        lambda t: Amortised(t, player("exp-am")),
    ):
        with pytest.raises(InputError, match="one eps"):
            make(many)

"""Distributions of perturbations: entropies, densities, gradients, fits, the worst of several."""

import math

import pytest
import torch
from conftest import Linear, seeded
from scipy.integrate import quad
from smooth_parts import BALL, inner, smooth
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from advgame.attacks.distributional import DistributionalAttack, worst_of
from advgame.distributions import LOG_2, TanhNormal, log_slope
from advgame.losses import cross_entropy
from advgame.threat import Linf

EPS = 0.1


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


def objective(model, x, y, mean, raw, rng, lam=0.3, count=2):
    """Sum over images and draws of loss + λ mean entropy, straight through the model."""
    found = TanhNormal(mean, raw)
    draw = found.sample(rng, count)
    points = (x + EPS * draw.value).clamp(0, 1)
    losses = sum(cross_entropy(model(one), y).sum() for one in points)
    return losses + lam * found.entropy(draw).flatten(2).mean(2).sum()


def test_the_reparameterised_gradient_is_that_of_finite_differences():
    (x, y), model = inner(2), smooth()
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
    (x, y), model = inner(5), smooth()
    model[3].weight.data *= 1e-4  # gradients near Adam's 1e-8: the division by B shows
    attack = DistributionalAttack(
        BALL, steps=3, samples=2, lr=0.2, lam=1e-8, accumulate=accumulate,
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
    (x, y), model = inner(5), smooth()
    plain, moment = (
        DistributionalAttack(BALL, betas=betas).fit(model, x, y, seeded()).distribution.mean
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

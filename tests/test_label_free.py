"""Attacks of the baselines: TRADES's, Fast's, Feature Scatter's and its transport plans."""

from dataclasses import replace

import pytest
import torch
from conftest import Linear, seeded
from scipy.optimize import linear_sum_assignment
from smooth_parts import BALL, SHAPE, batch, smooth

from advgame.attacks import GradientAttack, fast, feature_scatter, kl_pgd
from advgame.attacks.label_free import (
    _published_plan,
    published_transport_from,
    sinkhorn,
    transport_from,
)
from advgame.data import load_data
from advgame.errors import InputError
from advgame.losses import divergence
from advgame.targets import shipped
from advgame.threat import GaussianStart, Linf


def test_kl_pgd_is_trades_attack_with_clean_outputs_computed_once():
    (x, y), model = batch(), smooth()
    start = GaussianStart().random_start(x, seeded())
    assert float((start - x).abs().max()) < 0.01
    assert not torch.equal(start, x)
    x_adv = start
    for _ in range(10):
        leaf = x_adv.clone().requires_grad_()
        p, q = model(x).softmax(1), model(leaf).softmax(1)
        (slope,) = torch.autograd.grad((p * (p / q).log()).sum(), leaf)
        x_adv = torch.min(torch.max(x_adv + 0.025 * slope.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    made = kl_pgd(BALL).run(model, x, y, rng=seeded())
    torch.testing.assert_close(made.x_adv, x_adv)
    assert (made.forwards, made.backwards) == (11 * 8, 10 * 8)
    other = kl_pgd(BALL).run(model, x, (y + 1) % 3, rng=seeded())
    assert torch.equal(other.x_adv, made.x_adv), "labels do not matter"
    with pytest.raises(InputError, match="NaN"):
        kl_pgd(BALL).run(model, x * torch.nan, y, rng=seeded())


def test_kl_pgd_with_sizes_per_image():
    """Images that leave early keep their own clean output: each is as it is alone."""
    (x, y), model = batch(), smooth()
    steps, eps = torch.tensor([3, 0, 5, 1, 2, 4, 5, 1]), torch.linspace(0.02, 0.2, 8).double()
    together = replace(
        kl_pgd(BALL), attack=GradientAttack(Linf(eps), steps, eps / 3, start=GaussianStart())
    ).run(model, x, y, rng=seeded())
    start = GaussianStart().random_start(x, seeded())
    for i in range(8):
        one = slice(i, i + 1)
        clean, x_adv = model(x[one]).detach(), start[one]
        for _ in range(int(steps[i])):
            leaf = x_adv.clone().requires_grad_()
            (slope,) = torch.autograd.grad(divergence(clean, model(leaf)).sum(), leaf)
            x_adv = Linf(float(eps[i])).project(leaf.detach() + eps[i] / 3 * slope.sign(), x[one])
        torch.testing.assert_close(together.x_adv[one], x_adv)
    assert together.backwards == int(steps.sum())


def test_fast_in_closed_form():
    w = torch.tensor([[0.5, -1.0, 2.0, -0.1], [0.0, 0.0, 0.0, 0.0]])
    x, y = batch()[0].float(), torch.zeros(8, dtype=torch.int64)
    made = fast(BALL).run(Linear(w), x, y, rng=seeded()).x_adv
    moved = BALL.random_start(x, seeded()) - 0.125 * w[0].sign().view(1, *SHAPE)
    torch.testing.assert_close(made, BALL.project(moved, x))


def test_sinkhorn_nears_the_linear_programme():
    cost = torch.rand(12, 12, generator=seeded(), dtype=torch.float64) * 2
    plan = sinkhorn(cost, 0.002, 3000)
    torch.testing.assert_close(plan.sum(0), torch.full((12,), 1 / 12).double())
    torch.testing.assert_close(
        plan.sum(1), torch.full((12,), 1 / 12).double(), rtol=1e-3, atol=1e-6
    )
    exact = float(cost[linear_sum_assignment(cost.numpy())].mean())
    assert exact <= float((plan * cost).sum()) < exact + 0.005
    rectangle = sinkhorn(cost[:, :5], 0.1, 200)
    torch.testing.assert_close(rectangle.sum(1), torch.full((12,), 1 / 12).double())


def test_the_fixed_plan_is_the_gradient_of_the_entropic_distance():
    def distance(cost):
        plan = sinkhorn(cost, 0.1, 400)
        return float((plan * cost).sum() + 0.1 * (plan * plan.log()).sum())

    cost, h = torch.rand(4, 4, generator=seeded(), dtype=torch.float64), 1e-5
    plan = sinkhorn(cost, 0.1, 400)
    for i, j in ((0, 0), (1, 3), (2, 1)):
        bump = torch.zeros_like(cost)
        bump[i, j] = h
        slope = (distance(cost + bump) - distance(cost - bump)) / (2 * h)
        assert slope == pytest.approx(float(plan[i, j]), rel=1e-3)


def test_feature_scatter_moves_the_outputs_away_and_sees_no_label():
    (x, y), model = batch(32), smooth()
    made = feature_scatter(BALL).run(model, x, y, rng=seeded())
    other = feature_scatter(BALL).run(model, x, (y + 1) % 3, rng=seeded())
    assert torch.equal(made.x_adv, other.x_adv)
    assert (made.forwards, made.backwards) == (64, 32)
    far = transport_from(model(x).detach())
    start = BALL.random_start(x, seeded())
    with torch.no_grad():
        assert far(model(made.x_adv), y).sum() > 1.5 * far(model(start), y).sum()
    assert float((made.x_adv - x).abs().max()) <= 0.1 + 1e-9


def test_the_published_gradient_goes_through_the_plan_and_the_fixed_one_does_not():
    def slope(loss, h=1e-6):
        bumped = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[1, 2] += sign * h
            bumped.append(float(loss(moved, rows).sum()))
        return (bumped[0] - bumped[1]) / (2 * h)

    there, noise = torch.randn(2, 4, 3, generator=seeded(), dtype=torch.float64)
    clean = 1 + 0.1 * there  # near each other: otherwise the plan is a permutation that stays
    logits, rows = (clean + 0.1 * noise).requires_grad_(), torch.arange(4)
    agree = {}
    for made in (transport_from, published_transport_from):
        loss = made(clean)
        (formed,) = torch.autograd.grad(loss(logits, rows).sum(), logits)
        with torch.no_grad():
            agree[made] = float(formed[1, 2]) == pytest.approx(slope(loss), rel=1e-4)
    assert agree == {transport_from: False, published_transport_from: True}


def test_the_published_plan_by_hand():
    """In probabilities: of 16 images it stops after two steps, of 2 after the first."""
    for n, steps in ((16, 2), (2, 1)):
        cost = 0.05 * torch.rand(n, n, generator=seeded(), dtype=torch.float64)
        kernel, u, v = (-cost / 0.01).exp(), torch.ones(n).double(), torch.ones(n).double()
        for _ in range(steps):
            u = u / n / (u * (kernel @ v) + 1e-6)
            v = v / n / (v * (kernel.T @ u) + 1e-6)
        torch.testing.assert_close(_published_plan(cost), u[:, None] * kernel * v)


def test_how_far_the_two_gradients_of_feature_scatter_agree():
    """The signs that --transport repo takes are not those of the distance's gradient."""
    model, data = shipped().model, load_data("digits").train
    x = data.floats(slice(60))
    start, clean = BALL.random_start(x, seeded()).requires_grad_(), model(x).detach()
    one, two = (
        torch.autograd.grad(made(clean)(model(start), torch.arange(60)).sum(), start)[0].sign()
        for made in (transport_from, published_transport_from)
    )
    assert 0.8 < float((one == two).float().mean()) < 0.95
    steps = [feature_scatter(Linf(0.15), transport=name) for name in ("fixed", "repo")]
    moved = [step.run(model, x, torch.arange(60), rng=seeded()).x_adv for step in steps]
    assert 0.02 < float((moved[0] != moved[1]).float().mean()) < 0.25

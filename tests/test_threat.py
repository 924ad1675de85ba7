"""Balls: norms against NumPy, projections inside and idempotent, starts inside, bad radii."""

import numpy as np
import pytest
import torch

from advgame.errors import InputError
from advgame.run.options import parse_eps
from advgame.threat import L2, THREATS, Linf

BALLS = [Linf(0.1), L2(0.7), Linf(torch.linspace(0.01, 0.3, 6)), L2(torch.linspace(0.1, 1, 6))]
ORDER = {"Linf": np.inf, "L2": 2}


def batch(rng, dtype=torch.float32):
    return torch.rand(6, 3, 5, 4, generator=rng, dtype=dtype)


@pytest.mark.parametrize("ball", BALLS)
def test_size_is_numpys_norm(ball, rng):
    delta = batch(rng) - 0.5
    want = [np.linalg.norm(one.numpy().ravel(), ORDER[ball.norm]) for one in delta]
    np.testing.assert_allclose(ball.size(delta).numpy(), want, rtol=1e-6)  # fp32 rounding


@pytest.mark.parametrize("ball", BALLS)
def test_projection_is_inside_idempotent_and_never_farther(ball, rng):
    x, wild = batch(rng), 4 * batch(rng) - 1.5
    once = ball.project(wild, x)
    assert (ball.size(wild - x) > ball.eps).all(), "the input must lie outside to test anything"
    assert (ball.size(once - x) <= ball.eps + 1e-6).all()
    assert once.min() >= 0
    assert once.max() <= 1
    torch.testing.assert_close(ball.project(once, x), once, rtol=0, atol=1e-6)
    inside = ball.random_start(x, rng)
    torch.testing.assert_close(ball.project(inside, x), inside, rtol=0, atol=1e-6)
    other = 4 * batch(rng) - 1.5
    apart = L2(1).size(ball.project(other, x) - once)
    assert (apart <= L2(1).size(other - wild) + 1e-6).all(), "projections do not expand distances"


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_fills_the_ball(ball, rng):
    x = torch.full((6, 3, 5, 4), 0.5)
    starts = torch.stack([ball.random_start(x, rng) for _ in range(200)])
    sizes = torch.stack([ball.size(one - x) for one in starts]) / ball.eps
    assert sizes.max() <= 1 + 1e-5
    assert sizes.max() > 0.97
    if ball.norm == "L2":  # radius ~ U^(1/d) with d = 60: its mean is 60/61
        assert abs(float(sizes.mean()) - 60 / 61) < 0.003
    else:
        assert abs(float((starts - 0.5).mean())) < 0.003


@pytest.mark.parametrize("ball", BALLS)
def test_steepest_is_the_unit_direction_of_largest_gain(ball, rng):
    grad = torch.randn(6, 3, 5, 4, generator=rng)
    best = ball.steepest(grad)
    torch.testing.assert_close(ball.size(best), torch.ones(6), rtol=1e-5, atol=0)
    gain = (best * grad).flatten(1).sum(1)
    dual = {"Linf": 1, "L2": 2}[ball.norm]
    want = torch.tensor([np.linalg.norm(one.numpy().ravel(), dual) for one in grad])
    torch.testing.assert_close(gain, want.to(gain), rtol=1e-5, atol=0)


def test_l2_direction_survives_gradients_whose_squares_underflow():
    grad = torch.full((2, 1, 2, 2), 1e-30)
    grad[1] = 0
    direction = L2(1.0).steepest(grad)
    torch.testing.assert_close(direction[0], torch.full((1, 2, 2), 0.5))
    assert not direction[1].any(), "no gradient, no direction, no NaN"


@pytest.mark.parametrize("kind", THREATS.values())
def test_a_radius_per_image_equals_a_loop(kind, rng):
    x, wild = batch(rng), 4 * batch(rng) - 1.5
    eps = torch.linspace(0.05, 0.6, 6)
    together = kind(eps).project(wild, x)
    alone = [kind(float(eps[i])).project(wild[i : i + 1], x[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", THREATS.values())
def test_radii_from_numpy_leave_images_in_their_own_precision(kind, rng):
    eps, x, wild = torch.linspace(0.05, 0.6, 6), batch(rng), 4 * batch(rng) - 1.5
    for made in (lambda ball: ball.project(wild, x), lambda ball: ball.shrink(wild - x)):
        assert torch.equal(made(kind(eps.double())), made(kind(eps)))
    with pytest.raises(InputError, match="eps has 6 entries for 5 images"):
        kind(eps).project(wild[:5], x[:5])


@pytest.mark.parametrize(
    "bad", [0, -0.1, float("nan"), "8/0", "a", "1/2/3", "", "inf", torch.tensor([0.1, -1.0])]
)
def test_bad_radii_are_refused(bad):
    with pytest.raises(InputError):
        Linf(bad)


def test_a_radius_in_levels_is_refused_where_it_cannot_be_meant():
    with pytest.raises(InputError, match="did you mean 8/255"):
        Linf(8)
    with pytest.raises(InputError, match="did you mean 8/255"):
        Linf(torch.tensor([0.1, 8.0]))
    assert Linf(1.0).scaled(2.0).eps == 2, "a sweep may go farther"
    assert L2(8).eps == 8
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="factor above 0"):
            Linf(0.1).scaled(factor)


def test_eps_is_typed_as_a_fraction():
    assert parse_eps("8/255") == 8 / 255
    assert parse_eps(" 0.3 ") == 0.3

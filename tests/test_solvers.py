"""Solvers of two-player games: known answers, autograd, equal bits, the K-beam paper's surfaces."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from advgame.errors import InputError
from advgame.solvers import (
    Functional,
    KBeam,
    Optimistic,
    Solver,
    extragradient,
    maximin,
    sensitivity,
    simultaneous,
    unrolled,
)

F64 = {"dtype": torch.float64}


def leaf(*values):
    return torch.tensor(values, **F64).requires_grad_()


def bilinear(u, v):
    return (u[0] * v[0]).sum()


def played(direction, risk, steps, rate=0.1, start=(1.0, 0.5), ascent_steps=1):
    """All points of a run from one u and one v."""
    u, v = (leaf(one) for one in start)
    solver = Solver(direction, SGD([u], rate), SGD([v], rate), ascent_steps)
    points = [(u.item(), v.item())]
    for _ in range(steps):
        solver.step(risk)
        points.append((u.item(), v.item()))
    return torch.tensor(points, **F64)


# one step of each solver on f = uv from (u, v), rate 0.1, written out by hand
BY_HAND = {
    "simultaneous": (simultaneous, lambda u, v: (u - 0.1 * v, v + 0.1 * u)),
    "sensitivity": (sensitivity(0.5), lambda u, v: (u - 0.1 * (v + 0.5 * u), v + 0.1 * u)),
    "maximin": (maximin(sensitivity(0.5)), lambda u, v: (u - 0.1 * v, v + 0.1 * (u - 0.5 * v))),
    "unrolled": (unrolled(3, 0.2), lambda u, v: (u - 0.1 * (v + 2 * 0.6 * u), v + 0.1 * u)),
    "extragradient": (
        extragradient(0.1, 0.1),
        lambda u, v: (u - 0.1 * (v + 0.1 * u), v + 0.1 * (u - 0.1 * v)),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_steps_are_those_by_hand(name):
    direction, by_hand = BY_HAND[name]
    points = played(direction, bilinear, 20)
    for before, after in pairwise(points):
        torch.testing.assert_close(after, torch.stack(by_hand(*before)), rtol=1e-12, atol=1e-12)


def test_optimistic_steps_are_those_by_hand():
    points = played(Optimistic(), bilinear, 20)
    (u, v), (u1, v1) = points[0], points[0]
    for after in points[1:]:
        nxt = torch.stack([u - 0.1 * (2 * v - v1), v + 0.1 * (2 * u - u1)])
        torch.testing.assert_close(after, nxt, rtol=1e-12, atol=1e-12)
        (u1, v1), (u, v) = (u, v), after


def test_who_converges_on_the_bilinear_game():
    """Alt spirals out by 1 + λσ per step in the square of the distance; the others come in."""
    far = played(simultaneous, bilinear, 200).norm(dim=1)
    torch.testing.assert_close(far[1:] / far[:-1], torch.full((200,), math.sqrt(1.01), **F64))
    for direction in (sensitivity(0.5), maximin(sensitivity(0.5)), unrolled(2, 0.2), Optimistic()):
        assert played(direction, bilinear, 400, rate=0.3).norm(dim=1)[-1] < 1e-3
    assert played(extragradient(0.3, 0.3), bilinear, 400, rate=0.3).norm(dim=1)[-1] < 1e-3


def test_a_quadratic_game_ends_at_its_saddle():
    """f = u²/2 + 2uv − v² + u − v: ∂f = 0 at u = 0, v = −1/2."""

    def risk(u, v):
        return (u[0] ** 2 / 2 + 2 * u[0] * v[0] - v[0] ** 2 + u[0] - v[0]).sum()

    for direction in (simultaneous, sensitivity(0.3), unrolled(2, 0.1), extragradient(0.1, 0.1)):
        end = played(direction, risk, 800)[-1]
        torch.testing.assert_close(end, torch.tensor([0.0, -0.5], **F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["old v", "new v"])
def test_the_penalty_is_the_total_derivative_to_first_order(name):
    """Error of eq. 16 against autograd through one ascent (eq. 15) falls as σ², on tanh networks.

    Both terms at the old v: γ = 2σ. The first at the new v, as eq. 15 has it: γ = σ.
    """
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, **F64), torch.randn(8, 1, **F64)
    first = nn.Sequential(nn.Linear(3, 5, **F64), nn.Tanh(), nn.Linear(5, 1, **F64))
    second = nn.Sequential(nn.Linear(3, 4, **F64), nn.Tanh(), nn.Linear(4, 3, **F64))
    f, g = Functional(first), Functional(second)

    def risk(u, v):
        return (f(u, x + g(v, x)) - y).square().mean()

    errors = []
    for sigma in (0.1, 0.05, 0.025):
        total, _ = unrolled(1, sigma)(risk, f.params, g.params)
        if name == "old v":
            ours, _ = sensitivity(2 * sigma)(risk, f.params, g.params)
        else:
            down, up = simultaneous(risk, f.params, g.params)
            new = tuple(p + sigma * d for p, d in zip(g.params, up, strict=True))
            at_new = torch.autograd.grad(risk(f.params, new), f.params)
            penalised, _ = sensitivity(sigma)(risk, f.params, g.params)
            ours = tuple(a + b - c for a, b, c in zip(at_new, penalised, down, strict=True))
        errors.append(
            math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(ours, total, strict=True)))
        )
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_several_ascents_and_adam_are_torchs_own():
    u, v = leaf(1.0), leaf(0.5)
    solver = Solver(simultaneous, Adam([u], 0.01), Adam([v], 0.02), ascent_steps=3)
    mine, other = leaf(1.0), leaf(0.5)
    down, up = Adam([mine], 0.01), Adam([other], 0.02, maximize=True)
    for _ in range(5):
        solver.step(bilinear)
        for alone in (True, True, False):
            grads = torch.autograd.grad((mine * other).sum(), (mine, other))
            mine.grad, other.grad = (None if alone else grads[0]), grads[1]
            up.step()
            if not alone:
                down.step()
        assert torch.equal(u, mine)
        assert torch.equal(v, other)


@pytest.mark.parametrize("make", [lambda: sensitivity(0.5), Optimistic])
def test_equal_bits_and_resuming_too(make):
    def fresh(u=1.0, v=0.5):
        return Solver(make(), Adam([leaf(u)], 0.01), Adam([leaf(v)], 0.01))

    solver, twin = fresh(), fresh()
    for one in (solver, twin):
        for _ in range(5):
            one.step(bilinear)
    assert torch.equal(solver.u[0], twin.u[0])
    resumed = fresh(solver.u[0].item(), solver.v[0].item())
    resumed.load_state_dict(copy.deepcopy(solver.state_dict()))
    for one in (solver, resumed):
        one.step(bilinear)
    assert torch.equal(solver.u[0], resumed.u[0])
    assert torch.equal(solver.v[0], resumed.v[0])


def test_a_functional_module_is_the_module_and_keeps_its_buffers():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train()
    module[0].bias.requires_grad_(False)
    f, x = Functional(module), torch.randn(6, 2)
    assert f.names == ("0.weight", "1.weight", "1.bias")
    before = module[1].running_mean.clone()
    doubled = f(tuple(2 * p for p in f.params), x)
    assert not torch.equal(before, module[1].running_mean)
    with torch.no_grad():
        for p in f.params:
            p *= 2
    torch.testing.assert_close(doubled, module(x))


# surface -> f(u, v) and its minimax solutions
SURFACES = {
    "a": (lambda u, v: 5 * (u**2 - v**2), (0.0,)),
    "b": (lambda u, v: u**2 - v**2 + 2 * u * v, (0.0,)),
    "c": (lambda u, v: -v * torch.sin(math.pi * u), (0.0,)),
    "d": (lambda u, v: v**3 - 3 * v * u**2, (-0.25, 0.25)),
    "e": (lambda u, v: 2 * v**2 - (u - v) ** 2, (0.0,)),
    "f": (
        lambda u, v: (
            -(
                2
                - torch.exp(-10 * (u + 0.5) * torch.exp(-(v + 0.5)))
                - torch.exp(-10 * (0.5 - u) * torch.exp(v - 0.5))
            )
        ),
        (0.0,),
    ),
}
# mean and sd of |u_T − u*| over the authors' 100 trials, by K; 0 is plain simultaneous descent
PUBLISHED = {
    "a": {0: (0, 0), 1: (0, 0), 5: (0, 0)},
    "b": {0: (0, 0), 1: (0, 0), 5: (0, 0)},
    "c": {0: (0.235, 0.127), 1: (0.208, 0.113), 2: (0.016, 0.060), 5: (0.002, 0.001)},
    "d": {0: (0.242, 0.012), 1: (0.242, 0.012), 2: (0.113, 0.117), 5: (0.038, 0.083)},
    "e": {0: (0.5, 0), 1: (0.5, 0), 2: (0.301, 0.244), 10: (0.006, 0.050)},
    "f": {0: (0.138, 0.041), 1: (0.137, 0.043), 2: (0.027, 0.055), 5: (0.001, 0)},
}
TRIALS = 400


def surface_errors(name, beams, trials=TRIALS, seed=0):
    """|u_T − u*| of all trials at once: they share nothing but the arithmetic."""
    f, solutions = SURFACES[name]
    rng = torch.Generator().manual_seed(seed)
    start = torch.rand(max(beams, 1) + 1, trials, generator=rng, **F64) * 0.9 - 0.45
    u, *vs = (one.clone().requires_grad_() for one in start)
    # the mean over trials divides each one's gradient by their number
    descend, ascend = (SGD([{"params": [p]} for p in ps], 0.1 * trials) for ps in ([u], vs))
    for optimizer in (descend, ascend):
        optimizer.register_step_post_hook(
            lambda done, *_: [
                p.data.clamp_(-0.5, 0.5) for g in done.param_groups for p in g["params"]
            ]
        )
    slower = [LambdaLR(o, lambda t: 1 / math.sqrt(t + 1)) for o in (descend, ascend)]
    solver = KBeam(descend, ascend) if beams else Solver(simultaneous, descend, ascend)
    for _ in range(1000):
        solver.step(lambda a, b: f(a[0], b[0]))
        for schedule in slower:
            schedule.step()
    return torch.stack([(u.detach() - one).abs() for one in solutions]).amin(0)


QUICK = {("a", 1), ("c", 2), ("d", 1), ("e", 2), ("f", 0), ("f", 2)}


@pytest.mark.parametrize(
    ("name", "beams"),
    [
        pytest.param(s, k, marks=[] if (s, k) in QUICK else pytest.mark.slow)
        for s, row in PUBLISHED.items()
        for k in row
    ],
)
def test_the_surfaces_of_the_k_beam_paper(name, beams):
    """Means within the 99.9 % interval of the difference to the authors' 100 trials."""
    found = surface_errors(name, beams)
    mean, sd = PUBLISHED[name][beams]
    spread = math.sqrt(sd**2 / 100 + float(found.var()) / TRIALS)
    assert abs(float(found.mean()) - mean) < 3.3 * spread + 0.002


def test_the_worst_is_each_samples_own_and_everyone_ascends():
    u, v1, v2 = leaf(0.5, 0.5), leaf(1.0, -1.0), leaf(-1.0, 1.0)
    beam = KBeam(SGD([u], 0.2), SGD([{"params": [v1]}, {"params": [v2]}], 0.2))
    stats = beam.step(lambda a, b: a[0] * b[0])  # v1 leads in the first, v2 in the other
    assert float(stats["game/worst"]) == 0.5
    assert u.tolist() == pytest.approx([0.4, 0.4])
    assert v1.tolist() == pytest.approx([1.04, -0.96])
    assert v2.tolist() == pytest.approx([-0.96, 1.04])


def test_fixed_attacks_stand_beside_learned_ones():
    """min over u of max(u², (u − 2)², learned ≤ 0): the two fixed ones meet at u = 1."""
    u, v = leaf(3.0), leaf(0.3)
    beam = KBeam(SGD([u], 0.02), SGD([{"params": [v]}, {"params": []}, {"params": []}], 0.1))
    risks = [
        lambda a, b: (-b[0].square()).sum(),
        lambda a, _: a[0].square().sum(),
        lambda a, _: (a[0] - 2).square().sum(),
    ]
    for _ in range(500):
        beam.step(risks)
    assert u.item() == pytest.approx(1, abs=0.05)
    assert v.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sensitivity(-1.0),
        lambda: sensitivity(float("nan")),
        lambda: unrolled(-1, 0.1),
        lambda: extragradient(0.1, -0.1),
        lambda: maximin(Optimistic()),
        lambda: maximin(simultaneous),
        lambda: Solver(simultaneous, SGD([leaf(1.0)], 0.1), SGD([leaf(1.0)], 0.1), 0),
        lambda: KBeam(SGD([leaf(1.0)], 0.1), SGD([leaf(1.0)], 0.1), 0),
    ],
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()

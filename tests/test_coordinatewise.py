"""The coordinatewise learned updater, and its training by unrolling."""

import gc

import pytest
import torch
from quadratic_parts import CURVATURES, START, quadratic
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from advgame.errors import InputError
from advgame.seeding import seeded_init
from agents.coordinatewise import _WIDTH, Averages
from agents.unroll import block_sizes, flatten, objective_of, train_updater, unroll
from agents.updaters import AdamUpdater, CoordinatewiseUpdater, SGDUpdater, make_updater


def rotated(rng, m=10):
    """A quadratic with random axes and curvatures of 0.1 to 10, minimum 0."""
    axes, _ = torch.linalg.qr(torch.randn(m, m, generator=rng))
    curvatures = 10 ** (2 * torch.rand(m, generator=rng) - 1)
    start = torch.randn(m, generator=rng)
    return start, lambda params: (curvatures * (axes @ params).square()).sum() / 2


def test_the_untrained_coordinatewise_updater_is_adam():
    updater, adam = CoordinatewiseUpdater(seed=0, step=0.03, learn=False), AdamUpdater(0.03)
    updater.init(START)
    adam.init(START)
    params = START
    for _ in range(30):
        update = updater.update(params, quadratic)
        # the same formula in another order of operations
        torch.testing.assert_close(
            update.params, adam.update(params, quadratic).params, rtol=1e-5, atol=1e-6
        )
        params = update.params
    assert set(update.stats) == {"updater/step"}


def test_the_features_are_as_many_as_the_network_takes():
    network = CoordinatewiseUpdater(seed=0).network
    seen = []
    network.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grad = torch.tensor([0.0, 1e-12, 1.0, -1e6, 3.0, 2.0])
    averages = Averages.zeros(START).seen(grad)
    step = network(START.clone().requires_grad_(), grad, averages)
    assert not seen[0].requires_grad, "constants, when updates are unrolled too"
    assert seen[0].shape == (6, _WIDTH)
    assert torch.isfinite(seen[0]).all()
    torch.testing.assert_close(step[2:], 0.01 * -grad[2:].sign())


def test_coordinatewise_updates_do_not_know_the_order_of_the_coordinates():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    ends = []
    for chosen in (torch.arange(6), order):
        updater = CoordinatewiseUpdater(1e-2, seed=0)
        params = START[chosen]
        updater.init(params)
        curvatures = CURVATURES[chosen]
        for _ in range(30):
            params = updater.update(params, lambda p, c=curvatures: (c * p.square()).sum()).params
        ends.append(params)
    # sums over the coordinates round differently in another order, and Adam carries it on
    torch.testing.assert_close(ends[1], ends[0][order], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ends[1], ends[0], atol=0.01)


def test_learning_in_use_beats_the_adam_it_starts_from():
    losses = []
    for learn in (False, True):
        updater = CoordinatewiseUpdater(seed=0, learn=learn)
        updater.init(START)
        params = START
        for _ in range(60):
            params = updater.update(params, quadratic).params
        losses.append(float(quadratic(params)))
    assert losses[1] < losses[0] / 2


def final_ratio(updater, tasks=rotated, count=16, steps=60):
    """Geometric mean over held-out problems of the objective at the end over that at the start."""
    rng, logs = torch.Generator().manual_seed(99), []
    for _ in range(count):
        start, objective = tasks(rng)
        updater.init(start)
        params = start
        for _ in range(steps):
            params = updater.update(params, objective).params
        logs.append((objective(params) / objective(start)).log())
    return float(torch.stack(logs).mean().exp())


@pytest.fixture(scope="module")
def trained():
    updater = CoordinatewiseUpdater(seed=0, step=0.1, learn=False)
    ratios = train_updater(updater, rotated, rng=torch.Generator().manual_seed(1), episodes=30)
    return updater, ratios


@pytest.mark.slow
def test_a_trained_updater_beats_adam_and_sgd_tuned_on_held_out_quadratics(trained):
    updater, ratios = trained
    reached = final_ratio(updater)
    rates = (0.05, 0.1, 0.15, 0.19)  # above 0.2 descent diverges at curvature 10
    sgd = min(final_ratio(SGDUpdater(lr, momentum)) for lr in rates for momentum in (0.0, 0.9))
    adam = min(final_ratio(AdamUpdater(lr)) for lr in (0.03, 0.1, 0.2, 0.3, 0.5))
    untrained = final_ratio(CoordinatewiseUpdater(seed=0, step=0.1, learn=False))
    assert untrained > adam > 1e-5
    assert reached < sgd / 3
    assert reached < adam / 3
    assert sum(ratios[-5:]) < sum(ratios[:5]) / 3  # 1/5, more or less by how MKL rounds
    wide = final_ratio(updater, lambda rng: rotated(rng, 60), count=4)
    assert wide < sgd, "what it learned on 10 coordinates holds on 60"


def test_trained_weights_travel_and_survive_init(trained):
    updater, _ = trained
    other = make_updater("coordinatewise", lr=None, seed=7, step=0.1)
    other.load_network(updater.network.state_dict())
    other.init(START)
    updater.init(START)
    update = other.update(START, quadratic)
    assert torch.equal(update.params, updater.update(START, quadratic).params)
    other.update(update.params, quadratic)  # learns, and init takes it back
    other.init(START)
    assert torch.equal(other.update(START, quadratic).params, update.params)
    resumed = make_updater("coordinatewise", lr=None, seed=8, step=0.1)
    resumed.load_state_dict(other.state_dict())  # another seed, and after learning in use
    resumed.init(START)
    assert torch.equal(resumed.update(START, quadratic).params, update.params)


def test_training_is_equal_to_the_bit_for_equal_seeds():
    ends = []
    for _ in range(2):
        updater = CoordinatewiseUpdater(seed=0, width=4)
        train_updater(
            updater,
            rotated,
            rng=torch.Generator().manual_seed(1),
            episodes=2,
            steps=6,
            truncation=4,
        )
        ends.append(updater.network.head.weight.clone())
    assert torch.equal(*ends)
    assert ends[0].any()


def test_training_is_adam_on_the_mean_gradient_of_each_truncation():
    settings = {"episodes": 1, "batch": 2, "steps": 5, "truncation": 2, "lr": 0.01}
    updater, by_hand = (CoordinatewiseUpdater(seed=0, width=4) for _ in range(2))
    train_updater(updater, rotated, rng=torch.Generator().manual_seed(1), **settings)
    network, rng = by_hand.network, torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    tasks = [rotated(rng) for _ in range(2)]
    places = [(start, Averages.zeros(start)) for start, _ in tasks]
    for length in (2, 2, 1):
        made = [
            unroll(network, *place, objective, length)
            for place, (_, objective) in zip(places, tasks, strict=True)
        ]
        places = [(params, averages) for params, averages, _ in made]
        assert not any(params.requires_grad for params, _ in places)
        adam.zero_grad()
        torch.stack([loss for _, _, loss in made]).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
    for own, other in zip(updater.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(own, other)  # the batch's gradients are summed another way


def test_the_gradient_of_an_unroll_is_that_of_its_loss_with_gradients_as_constants():
    """By finite differences on an objective whose gradient is constant: nothing is dropped then."""
    updater = CoordinatewiseUpdater(seed=0, step=0.1, width=4)
    network = updater.network.double()
    start, slope = START.double(), CURVATURES.double()
    with torch.no_grad():
        network.head.weight.normal_(generator=torch.Generator().manual_seed(0))

    def loss(bias):
        network.head.bias.data.copy_(bias)
        # parameters far away: their feature, a constant in the graph, does not move
        objective = lambda params: slope @ params  # noqa: E731
        return unroll(network, 1e6 + start, Averages.zeros(start), objective, 5)[2]

    bias = torch.tensor([0.2, -0.1], dtype=torch.float64)
    loss(bias).backward()
    for k in range(2):
        moved = torch.zeros(2, dtype=torch.float64)
        moved[k] = 1e-2
        slope_k = float((loss(bias + moved) - loss(bias - moved)).detach()) / 2e-2
        assert abs(slope_k) > 1e-8
        assert abs(float(network.head.bias.grad[k]) - slope_k) < 2e-3 * abs(slope_k)


class Held:
    """A tensor that a graph holds for its backward pass; counts those alive."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # a node that holds its own output would hold itself
        Held.alive += 1
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self):
        Held.alive -= 1


def peak_held(steps, truncation):
    updater = CoordinatewiseUpdater(seed=0, width=4)
    rng = torch.Generator().manual_seed(0)
    gc.collect()
    Held.alive = Held.peak = 0
    with saved_tensors_hooks(Held, lambda held: held.tensor):
        train_updater(
            updater, rotated, rng=rng, episodes=1, batch=2, steps=steps, truncation=truncation
        )
    return Held.peak


def test_memory_does_not_grow_with_the_number_of_updates():
    few, many, longer = peak_held(10, 5), peak_held(60, 5), peak_held(60, 20)
    assert many == few
    assert longer > 3 * few, "it is the truncation that it grows with"


def test_what_training_refuses():
    updater, rng = CoordinatewiseUpdater(seed=0), torch.Generator()
    with pytest.raises(InputError, match="of at least 1"):
        train_updater(updater, rotated, rng=rng, truncation=0)
    with pytest.raises(InputError, match="left the finite"):
        train_updater(updater, lambda rng: (START, lambda p: p.sum() / 0), rng=rng)


def test_a_module_is_a_flat_vector_with_an_objective():
    with seeded_init(0):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    objective = objective_of(net, lambda f: (f(x) - y[:, :1]).square().mean())
    vector = flatten(net)
    assert block_sizes(net) == (12, 4, 4, 1)
    expected = (net(x) - y[:, :1]).square().mean()
    assert torch.equal(objective(vector), expected)
    expected.backward()
    leaf = vector.clone().requires_grad_()
    objective(leaf).backward()
    assert torch.equal(leaf.grad, torch.cat([w.grad.flatten() for w in net.parameters()]))
    vector.zero_()
    assert net[0].weight.any(), "a copy"

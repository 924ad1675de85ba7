"""The chosen gradient ascent: equal to PGD and MIM, one F and one B_x per step, in the ball."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import Counting, Linear
from schedule_parts import ascent, the_same_for_all

from advgame.attacks import attacked, mim, pgd
from advgame.attacks.gradient_steps import MOVES, Menu
from advgame.classifiers import SmallCNN
from advgame.errors import InputError
from advgame.losses import margin
from advgame.seeding import seeded_init, stream
from advgame.threat import L2, Linf

SHAPE = (1, 8, 8)
BALLS = {"Linf": Linf(0.1), "L2": L2(0.7)}


@pytest.fixture(scope="module")
def cnn():
    with seeded_init(0):
        return SmallCNN(SHAPE, 10).eval().requires_grad_(False)


@pytest.fixture
def batch(cnn, rng):
    x = torch.rand(12, *SHAPE, generator=rng)
    return x, cnn(x).argmax(1)


def at_random(menu, count, rng):
    columns = [torch.randint(size, (count,), generator=rng) for size in menu.sizes]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
def test_constant_moves_are_pgd_to_the_bit(cnn, batch, ball, start):
    state = ascent(cnn, ball, *batch, start=start, rng=stream(3, "start"))
    for _ in range(7):
        state.step(the_same_for_all(state.menu, 12, 1 / 4, 0, "ce", "steepest", "on"))
    want = replace(pgd(ball, 7), start=ball if start == "random" else None)
    assert torch.equal(state.x_adv, want.perturb(cnn, *batch, rng=stream(3, "start")))
    assert (state.x_adv != batch[0]).any()


def test_accumulated_directions_are_mim(cnn, batch):
    state = ascent(cnn, Linf(0.1), *batch)
    for _ in range(8):
        state.step(the_same_for_all(state.menu, 12, 1 / 8, 0, "ce", "accumulated", "on"))
    want = mim(Linf(0.1), 8, 0.1 / 8).perturb(cnn, *batch)
    # Σ g/mean|g| and Σ g/‖g‖₁ differ by a factor, whose rounding may flip a sign near zero
    assert (state.x_adv - want).abs().gt(1e-6).float().mean() < 0.005
    plain = pgd(Linf(0.1), 8, 0.1 / 8).perturb(cnn, *batch, rng=stream(0, "start"))
    assert (state.x_adv - plain).abs().gt(1e-6).float().mean() > 0.02


def test_momentum_is_a_heavy_ball():
    """Linear classifier, three steps by hand: x + (1-m)·α·sign(g) + m·(last step)."""
    model = Linear(torch.tensor([[1.0, 0, 0, -1], [0, 1, -1, 0]])).requires_grad_(False)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    menu = Menu(step_sizes=(1 / 4, 1 / 2), momenta=(0, 0.5))
    state = ascent(model, Linf(0.4), x, y, menu)
    way = torch.tensor([[-1.0, 1], [-1, 1]]).view(1, 1, 2, 2)
    state.step(the_same_for_all(menu, 1, 1 / 2, 0, "margin", "steepest", "on"))
    torch.testing.assert_close(state.x_adv, x + 0.2 * way)
    state.step(the_same_for_all(menu, 1, 1 / 4, 0.5, "margin", "steepest", "on"))
    torch.testing.assert_close(state.x_adv, x + (0.2 + 0.5 * 0.1 + 0.5 * 0.2) * way)


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
def test_any_moves_stay_in_the_ball_and_in_range(cnn, batch, ball, rng):
    state = ascent(cnn, ball, *batch, start="random")
    for _ in range(25):
        state.step(at_random(state.menu, 12, rng))
        for point in (state.x_adv, state.best_x):
            assert (ball.size(point - batch[0]) <= ball.eps + 1e-6).all()
            assert point.min() >= 0
            assert point.max() <= 1
        seen = state.features()
        assert seen.shape == (12, len(state.menu.feature_names))
        assert seen.abs().max() <= 1


def test_a_step_costs_one_forward_and_one_backward(cnn, batch, rng):
    model = Counting(cnn)
    state = ascent(model, Linf(0.1), *batch)
    assert (model.forwards, model.backwards) == (12, 0)
    for step in range(1, 6):
        state.step(at_random(state.menu, 12, rng))
        state.features()
        assert (model.forwards, model.backwards) == (12 * (step + 1), 12 * step)
        assert (state.forwards, state.backwards) == (model.forwards, model.backwards)


def test_the_best_point_is_where_the_margin_was_highest(cnn, batch, rng):
    state = ascent(cnn, Linf(0.1), *batch)
    seen = [(state.margin.clone(), state.x_adv.clone())]
    for _ in range(12):
        state.step(at_random(state.menu, 12, rng))
        seen.append((state.margin.clone(), state.x_adv.clone()))
    margins = torch.stack([one for one, _ in seen])
    torch.testing.assert_close(margins[-1], margin(cnn(state.x_adv), batch[1]))
    assert torch.equal(state.best_margin, margins.amax(0))
    for row, when in enumerate(margins.argmax(0)):
        assert torch.equal(state.best_x[row], seen[when][1][row])
        assert state.since_best[row] == 12 - when
    assert len(margins.argmax(0).unique()) > 2, "the best must not be trivially the last"


def test_steps_from_the_best_point_use_its_own_gradient():
    """A hill at 0.54: a step from 0.5 to 0.6 overshoots; back at 0.5 the way is still up."""

    class Hill(torch.nn.Module):
        def forward(self, x):
            height = -(x - 0.54).square().flatten(1).sum(1)
            return torch.stack([torch.ones_like(height), height], 1)

    menu = Menu()
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = ascent(Hill(), Linf(0.2), x, y, menu)
    state.step(the_same_for_all(menu, 1, 1 / 2, 0, "margin", "steepest", "on"))
    torch.testing.assert_close(state.x_adv, x + 0.1)
    assert torch.equal(state.best_x, x)
    state.step(the_same_for_all(menu, 1, 1 / 8, 0.5, "margin", "steepest", "best"))
    # half of α·sign(g), and nothing of the last displacement
    torch.testing.assert_close(state.x_adv, x + 0.0125)
    assert torch.equal(state.best_x, state.x_adv)


def test_images_that_arrive_are_as_if_they_had_been_alone(cnn, batch, rng):
    x, y = batch
    menu = Menu(moves=("on", "best"))
    state = ascent(cnn, Linf(0.1), x[:6], y[:6], menu)
    alone = None
    rows = torch.tensor([1, 4])
    for step in range(8):
        moves = at_random(menu, 6, rng)
        if step == 3:
            state.step(moves, rows, (x[6:8], y[6:8], torch.tensor([10, 10])))
            alone = ascent(cnn, Linf(0.1), x[6:8], y[6:8], menu)
        else:
            state.step(moves)
            if alone is not None:
                alone.step(moves[rows])
        if alone is not None:
            torch.testing.assert_close(state.x_adv[rows], alone.x_adv, rtol=0, atol=1e-6)
            torch.testing.assert_close(state.features()[rows], alone.features(), rtol=0, atol=1e-4)
            assert torch.equal(state.used[rows], alone.used)


def test_restart_is_an_arrival_at_once_and_costs_its_forwards_more(cnn, batch, rng):
    x, y = batch
    menu = Menu(moves=("on", "best"))
    model = Counting(cnn)
    state = ascent(model, Linf(0.1), x[:6], y[:6], menu)
    state.step(at_random(menu, 6, rng))
    before = state.features().clone()
    rows = torch.tensor([0, 5])
    spent = model.forwards
    state.restart(rows, x[6:8], y[6:8], torch.tensor([10, 10]))
    assert model.forwards == spent + 2
    alone = ascent(cnn, Linf(0.1), x[6:8], y[6:8], menu)
    assert torch.equal(state.features()[1:5], before[1:5])
    for _ in range(3):
        torch.testing.assert_close(state.features()[rows], alone.features(), rtol=0, atol=1e-4)
        moves = at_random(menu, 6, rng)
        state.step(moves)
        alone.step(moves[rows])
        torch.testing.assert_close(state.x_adv[rows], alone.x_adv, rtol=0, atol=1e-6)
    assert state.backwards == model.backwards == 6 + (6 + 2) + 6 + 6


def test_images_that_are_left_out_change_nothing_for_the_others(cnn, batch, rng):
    menu = Menu(moves=("on", "best"))
    whole, part = (ascent(cnn, Linf(0.1), *batch, menu) for _ in range(2))
    stay = torch.arange(12) % 3 != 0
    first = at_random(menu, 12, rng)
    whole.step(first)
    part.step(first)
    part.keep(stay)
    for _ in range(3):
        moves = at_random(menu, 12, rng)
        whole.step(moves)
        part.step(moves[stay])
        torch.testing.assert_close(whole.x_adv[stay], part.x_adv, rtol=0, atol=1e-6)
    assert part.forwards == 12 * 2 + 8 * 3


def test_what_was_fooled_once_stays_fooled():
    """A step into the other class, and a step back out of it."""
    model = Linear(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([-1.95, 0.0]))
    model.requires_grad_(False)
    menu = Menu(step_sizes=(1 / 2,))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = ascent(model, Linf(0.2), x, y, menu)
    assert not state.fooled
    state.step(the_same_for_all(menu, 1, 1 / 2, 0, "margin", "steepest", "on"))
    assert state.fooled
    found = state.x_adv.clone()
    state.rng = stream(1, "upwards")
    for _ in range(20):
        state.step(the_same_for_all(menu, 1, 1 / 2, 0, "margin", "steepest", "random"))
        assert state.fooled
        if state.margin < 0:
            break
    assert state.margin < 0, "one of the random points must be outside again"
    assert (model(state.best_x).argmax(1) != y).all()
    assert state.best_margin >= model(found)[0, 1] - model(found)[0, 0]


def test_second_keeps_its_target_from_the_start():
    """Class 2 is second among the wrong ones at the start, and first after one step."""
    weight = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2]])
    model = Linear(weight, torch.tensor([4.0, 1.5, 0.0])).requires_grad_(False)
    menu = Menu()
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = ascent(model, Linf(0.4), x, y, menu)
    assert state.rivals.tolist() == [2]
    for steps in (1, 2):
        state.step(the_same_for_all(menu, 1, 1 / 2, 0, "second", "steepest", "on"))
        moved = (state.x_adv - x).flatten()
        torch.testing.assert_close(moved, 0.2 * steps * torch.tensor([0.0, 0, 1, 1]))
    assert model(state.x_adv)[0, 2] > model(state.x_adv)[0, 1], "the order has changed"


def test_jumps_go_to_fresh_random_points(cnn, batch):
    menu = Menu()
    state = ascent(cnn, Linf(0.1), *batch)
    state.step(the_same_for_all(menu, 12, 1 / 4, 0, "ce", "steepest", "on"))
    points = []
    for _ in range(2):
        state.step(the_same_for_all(menu, 12, 1, 0, "ce", "steepest", "random"))
        points.append(state.x_adv)
    share = (points[0] - points[1]).abs().gt(1e-3).float().mean()
    assert share > 0.9, "two uniform draws differ nearly everywhere"
    for forgotten in (state.total, state.last, state.promise, state.turned, state.agreement):
        assert not forgotten.any(), "what led there is no way to go on"
    assert (state.x_adv - batch[0]).abs().max() <= 0.1 + 1e-6


def test_features_do_not_change_with_the_scale_of_the_logits(cnn, batch, rng):
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return 4 * cnn(x) + 3

    menu = Menu(losses=("dlr", "margin", "second"))  # cross-entropy feels the scale
    cnn, (x, y) = copy.deepcopy(cnn).double(), batch  # in fp32 rounding flips signs near zero
    one, four = (ascent(model, Linf(0.1), x.double(), y, menu) for model in (cnn, Scaled()))
    names = menu.feature_names
    keep = [i for i, name in enumerate(names) if name != "true_probability"]
    for _ in range(4):
        moves = at_random(menu, 12, rng)
        one.rng, four.rng = stream(1, "same"), stream(1, "same")
        one.step(moves)
        four.step(moves)
        torch.testing.assert_close(
            one.features()[:, keep], four.features()[:, keep], rtol=0, atol=1e-5
        )


def test_attacking_leaves_the_model_as_it_was(batch, rng):
    with seeded_init(1):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
        )
        model.append(torch.nn.Linear(4 * 36, 10))
    before = copy.deepcopy(model.state_dict())
    with attacked(model):
        state = ascent(model, Linf(0.1), *batch)
        for _ in range(3):
            state.step(at_random(state.menu, 12, rng))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_classifier_that_cuts_the_graph_is_not_moved(cnn, batch):
    class Cut(torch.nn.Module):
        def forward(self, x):
            return cnn(x).detach()

    state = ascent(Cut(), Linf(0.1), *batch)
    state.step(the_same_for_all(state.menu, 12, 1, 0, "ce", "steepest", "on"))
    assert torch.equal(state.x_adv, batch[0])


def test_pickled_ascent_goes_on_to_the_same_bits(cnn, batch, rng):
    state = ascent(cnn, Linf(0.1), *batch)
    state.step(at_random(state.menu, 12, rng))
    twin = pickle.loads(pickle.dumps(state))
    for _ in range(3):
        moves = at_random(state.menu, 12, rng)
        state.step(moves)
        twin.step(moves)
        assert torch.equal(state.x_adv, twin.x_adv)
        assert torch.equal(state.features(), twin.features())


@pytest.mark.parametrize(
    "bad",
    [
        {"step_sizes": ()},
        {"step_sizes": (1, 0)},
        {"momenta": (1,)},
        {"losses": ("hinge",)},
        {"directions": ()},
        {"moves": ("on", "back")},
    ],
)
def test_bad_menus_are_refused(bad):
    with pytest.raises(InputError):
        Menu(**bad)


def test_bad_moves_and_missing_streams_are_refused(cnn, batch):
    menu = Menu()
    for actions in (
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(3, 5),
        torch.full((3, 5), -1),
        torch.full((3, 5), 6),
    ):
        with pytest.raises(InputError, match="actions"):
            menu.check(actions)
    with pytest.raises(InputError, match="no loss 'hinge'"):
        menu.index(2, 0, "hinge", "steepest", "on")
    with pytest.raises(InputError, match="rng"):
        ascent(cnn, Linf(0.1), *batch, rng=None)
    assert "random" in MOVES

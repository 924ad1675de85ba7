"""The learned gradient-step attack: PGD and MIM to the bit, its costs, what it shows."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import Counting, Linear
from gradient_steps_parts import all_step, begun

from advgame.attacks import mim, pgd
from advgame.attacks.gradient_steps import LOSSES, Menu
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
    state = begun(cnn, ball, *batch, start=start, rng=stream(3, "start"))
    for _ in range(7):
        all_step(state, 1 / 4, "ce")
    want = replace(pgd(ball, 7), start=ball if start == "random" else None)
    assert torch.equal(state.x_adv, want.perturb(cnn, *batch, rng=stream(3, "start")))
    assert (state.x_adv != batch[0]).any()


def test_accumulated_directions_are_mim(cnn, batch):
    state = begun(cnn, Linf(0.1), *batch)
    for _ in range(8):
        all_step(state, 1 / 8, "ce", direction="accumulated")
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
    state = begun(model, Linf(0.4), x, y, menu)
    way = torch.tensor([[-1.0, 1], [-1, 1]]).view(1, 1, 2, 2)
    all_step(state, 1 / 2)
    torch.testing.assert_close(state.x_adv, x + 0.2 * way)
    all_step(state, 1 / 4, momentum=0.5)
    torch.testing.assert_close(state.x_adv, x + (0.2 + 0.5 * 0.1 + 0.5 * 0.2) * way)


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
def test_any_moves_stay_in_the_ball_and_in_range(cnn, batch, ball, rng):
    state = begun(cnn, ball, *batch, start="random")
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
    state = begun(model, Linf(0.1), *batch)
    assert (model.forwards, model.backwards) == (12, 0)
    for step in range(1, 6):
        state.step(at_random(state.menu, 12, rng))
        state.features()
        assert (model.forwards, model.backwards) == (12 * (step + 1), 12 * step)
        assert (state.forwards, state.backwards) == (model.forwards, model.backwards)


def test_the_best_point_is_where_the_margin_was_highest(cnn, batch, rng):
    state = begun(cnn, Linf(0.1), *batch)
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

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = begun(Hill(), Linf(0.2), x, y)
    all_step(state, 1 / 2)
    torch.testing.assert_close(state.x_adv, x + 0.1)
    assert torch.equal(state.best_x, x)
    all_step(state, 1 / 8, move="best", momentum=0.5)
    # half of α·sign(g), and nothing of the last displacement
    torch.testing.assert_close(state.x_adv, x + 0.0125)
    assert torch.equal(state.best_x, state.x_adv)


@pytest.mark.parametrize("at_once", [False, True])
def test_images_that_arrive_are_as_if_they_had_been_alone(at_once, cnn, batch, rng):
    """Within a step they cost nothing more, at once a forward each, and a backward later."""
    (x, y), menu, model = batch, Menu(moves=("on", "best")), Counting(cnn)
    state = begun(model, Linf(0.1), x[:6], y[:6], menu)
    for _ in range(3):
        state.step(at_random(menu, 6, rng))
    rows, new = torch.tensor([1, 4]), (x[6:8], y[6:8], torch.tensor([10, 10]))
    if at_once:
        before, stay = state.features(), [0, 2, 3, 5]
        state.restart(rows, *new)
        assert model.forwards == 4 * 6 + 2
        assert torch.equal(state.features()[stay], before[stay])
    else:
        state.step(at_random(menu, 6, rng), rows, new)
    alone = begun(cnn, Linf(0.1), x[6:8], y[6:8], menu)
    for _ in range(4):
        torch.testing.assert_close(state.features()[rows], alone.features(), rtol=0, atol=1e-4)
        assert torch.equal(state.used[rows], alone.used)
        actions = at_random(menu, 6, rng)
        state.step(actions)
        alone.step(actions[rows])
        torch.testing.assert_close(state.x_adv[rows], alone.x_adv, rtol=0, atol=1e-6)
    assert state.backwards == model.backwards == 7 * 6 + (2 if at_once else 6)


def test_images_that_are_left_out_change_nothing_for_the_others(cnn, batch, rng):
    menu = Menu(moves=("on", "best"))
    whole, part = (begun(cnn, Linf(0.1), *batch, menu) for _ in range(2))
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
    state = begun(model, Linf(0.2), x, y, menu)
    assert not state.fooled
    all_step(state, 1 / 2)
    assert state.fooled
    found = state.x_adv.clone()
    state.rng = stream(1, "upwards")
    for _ in range(20):
        all_step(state, 1 / 2, move="random")
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
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = begun(model, Linf(0.4), x, y)
    assert state.rivals.tolist() == [2]
    for steps in (1, 2):
        all_step(state, 1 / 2, "second")
        moved = (state.x_adv - x).flatten()
        torch.testing.assert_close(moved, 0.2 * steps * torch.tensor([0.0, 0, 1, 1]))
    assert model(state.x_adv)[0, 2] > model(state.x_adv)[0, 1], "the order has changed"


def test_jumps_go_to_fresh_random_points(cnn, batch):
    state = begun(cnn, Linf(0.1), *batch)
    all_step(state, 1 / 4, "ce")
    points = []
    for _ in range(2):
        all_step(state, 1, "ce", move="random")
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
    one, four = (begun(model, Linf(0.1), x.double(), y, menu) for model in (cnn, Scaled()))
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


def test_a_classifier_that_cuts_the_graph_is_not_moved(cnn, batch):
    class Cut(torch.nn.Module):
        def forward(self, x):
            return cnn(x).detach()

    state = begun(Cut(), Linf(0.1), *batch)
    all_step(state, 1, "ce")
    assert torch.equal(state.x_adv, batch[0])


def test_a_pickled_attack_goes_on_to_the_same_bits(cnn, batch, rng):
    state = begun(cnn, Linf(0.1), *batch)
    state.step(at_random(state.menu, 12, rng))
    twin = pickle.loads(pickle.dumps(state))
    for _ in range(3):
        moves = at_random(state.menu, 12, rng)
        state.step(moves)
        twin.step(moves)
        assert torch.equal(state.x_adv, twin.x_adv)
        assert torch.equal(state.features(), twin.features())


def test_a_copy_after_a_restart_has_the_same_gradients(cnn, batch, monkeypatch):
    """Its graph is of several forwards, whose batch sizes tell in the last bits."""
    state, sizes, forward = begun(cnn, Linf(0.1), *batch), [], SmallCNN.forward
    rows = torch.tensor([2, 5, 7])
    state.restart(rows, batch[0][:3], batch[1][:3], state.budget[:3])
    state.keep(torch.arange(12) != 5)
    monkeypatch.setattr(
        SmallCNN, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x)
    )
    twins = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state)]
    assert sizes == [12, 3] * 2
    each = torch.arange(11) % len(state.menu.losses)
    gradient = state._gradient(each)
    for twin in twins:
        assert torch.equal(twin.losses, state.losses)
        assert torch.equal(twin._gradient(each), gradient)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("step_sizes", bad) for bad in ((), (1, 0))),
        *(("momenta", (1,)), ("losses", ("hinge",)), ("directions", ()), ("moves", ("on", "back"))),
    ],
)
def test_bad_menus_are_refused(name, bad):
    with pytest.raises(InputError, match=name):
        Menu(**{name: bad})


@pytest.mark.parametrize(
    "actions",
    [torch.zeros(3, 4).long(), torch.zeros(3, 5), *(torch.full((3, 5), n) for n in (-1, 6))],
)
def test_bad_actions_are_refused(actions):
    with pytest.raises(InputError, match="actions"):
        Menu().check(actions)


def test_unknown_steps_and_missing_streams_are_refused(cnn, batch):
    with pytest.raises(InputError, match="no loss 'hinge'"):
        Menu().index(2, 0, "hinge", "steepest", "on")
    with pytest.raises(InputError, match="rng"):
        begun(cnn, Linf(0.1), *batch, rng=None)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_loss_works_for_any_number_of_classes(classes, rng):
    with seeded_init(0):
        model = SmallCNN((3, 6, 5), classes).eval().requires_grad_(False)
    x = torch.rand(4, 3, 6, 5, generator=rng)
    y = model(x).argmax(1)
    for loss in LOSSES:
        menu = Menu(losses=(loss,))
        state = begun(model, Linf(0.2), x, y, menu)
        start = state.losses.detach().clone()
        for _ in range(5):
            all_step(state, 1 / 4, loss)
        assert (state.losses.detach() > start).all()
        assert torch.isfinite(state.features()).all()


def test_features_by_hand_on_a_linear_classifier():
    """Two classes, w = ±(1, -2, 3, -4): every entry has a closed form."""
    weight = torch.tensor([1.0, -2, 3, -4])
    model = Linear(torch.stack([weight, -weight]), torch.tensor([5.0, 0.0])).requires_grad_(False)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    logits = model(x)[0]
    menu = Menu(step_sizes=(1 / 2, 2), losses=("ce", "margin"))
    state = begun(model, Linf(0.1), x, y, menu, queries=5)
    spread, start = float(logits.std(correction=0)), float(logits[1] - logits[0])

    def now():
        return dict(zip(menu.feature_names, state.features()[0].tolist(), strict=True))

    def squash(value):
        return value / (1 + abs(value))

    first = now()
    assert first["queries_left"] == pytest.approx(4 / 5)
    assert first["urgency"] == pytest.approx(1 / 5)
    assert first["true_probability"] == pytest.approx(float(logits.softmax(0)[0]))
    assert first["margin"] == pytest.approx(squash(start / spread))
    nothing_yet = ("progress", "best_progress", "change", "behind", "since_best", "on_face")
    for name in (*nothing_yet, "promise", "agreement", "cosine", "turned"):
        assert first[name] == 0
    assert not any(first[name] for name in first if name.startswith("last_"))

    # a step of ε/2 along the margin's sign gradient: margin + 0.05·‖2w‖₁ = + 1
    all_step(state, 1 / 2)
    second = now()
    assert second["progress"] == pytest.approx(1 / -start, rel=1e-4)
    assert second["best_progress"] == second["progress"]
    assert second["change"] == pytest.approx(squash(1 / spread), rel=1e-4)
    assert second["promise"] == pytest.approx(squash(1 / spread), rel=1e-4)
    assert second["agreement"] == pytest.approx(1, rel=1e-3)
    assert (second["on_face"], second["cosine"], second["turned"]) == (0, 0, 0)
    assert second["last_step_size_0"] == second["last_loss_1"] == second["last_move_0"] == 1
    assert second["last_step_size_1"] == second["last_loss_0"] == 0

    # to the corner and no further: half of what 2ε promise is cut off by the ball
    all_step(state, 2)
    third = now()
    assert third["progress"] == pytest.approx(2 / -start, rel=1e-4)
    assert (third["on_face"], third["since_best"]) == (1, 0)
    assert third["cosine"] == pytest.approx(1)
    assert third["turned"] == pytest.approx(1)
    assert third["queries_left"] == pytest.approx(2 / 5)

    # at a random point the margin is lower than at the corner, the optimum
    all_step(state, 2, move="random")
    fourth = now()
    assert fourth["best_progress"] == third["progress"] > fourth["progress"]
    lost = float(state.best_margin - state.margin) / spread
    assert fourth["behind"] == pytest.approx(squash(lost), rel=1e-4)
    assert fourth["change"] == pytest.approx(-squash(lost), rel=1e-4)
    assert fourth["since_best"] == pytest.approx(1 / 5)
    assert (fourth["promise"], fourth["agreement"], fourth["turned"]) == (0, 0, 0)

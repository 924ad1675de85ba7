"""Losses that a schedule ascends, and the features that it shows: by hand."""

import pytest
import torch
from conftest import Linear
from schedule_parts import ascent, the_same_for_all

from advgame.attacks.gradient_steps import LOSSES, Menu
from advgame.classifiers import SmallCNN
from advgame.losses import dlr, margin
from advgame.seeding import seeded_init
from advgame.threat import Linf


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_loss_works_for_any_number_of_classes(classes, rng):
    with seeded_init(0):
        model = SmallCNN((3, 6, 5), classes).eval().requires_grad_(False)
    x = torch.rand(4, 3, 6, 5, generator=rng)
    y = model(x).argmax(1)
    for loss in LOSSES:
        menu = Menu(losses=(loss,))
        state = ascent(model, Linf(0.2), x, y, menu)
        start = state.losses.detach().clone()
        for _ in range(5):
            state.step(the_same_for_all(menu, 4, 1 / 4, 0, loss, "steepest", "on"))
        assert (state.losses.detach() > start).all()
        assert torch.isfinite(state.features()).all()


def test_dlr_is_autoattacks_and_falls_back_for_two_classes(rng):
    logits = torch.randn(20, 10, generator=rng)
    y = torch.randint(10, (20,), generator=rng)
    ordered, place = logits.sort(1)
    right = (place[:, -1] == y).float()
    # pyautoattack's formula, written out
    rows = torch.arange(20)
    other = ordered[:, -2] * right + ordered[:, -1] * (1 - right)
    want = -(logits[rows, y] - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
    torch.testing.assert_close(dlr(logits, y), want)
    torch.testing.assert_close(dlr(3 * logits + 7, y), want)
    two = logits[:, :2]
    assert torch.equal(dlr(two, y % 2), margin(two, y % 2))


def test_features_by_hand_on_a_linear_classifier():
    """Two classes, w = ±(1, -2, 3, -4): every entry has a closed form."""
    weight = torch.tensor([1.0, -2, 3, -4])
    model = Linear(torch.stack([weight, -weight]), torch.tensor([5.0, 0.0])).requires_grad_(False)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    logits = model(x)[0]
    menu = Menu(step_sizes=(1 / 2, 2), losses=("ce", "margin"))
    state = ascent(model, Linf(0.1), x, y, menu, queries=5)
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
    state.step(the_same_for_all(menu, 1, 1 / 2, 0, "margin", "steepest", "on"))
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
    state.step(the_same_for_all(menu, 1, 2, 0, "margin", "steepest", "on"))
    third = now()
    assert third["progress"] == pytest.approx(2 / -start, rel=1e-4)
    assert (third["on_face"], third["since_best"]) == (1, 0)
    assert third["cosine"] == pytest.approx(1)
    assert third["turned"] == pytest.approx(1)
    assert third["queries_left"] == pytest.approx(2 / 5)

    # at a random point the margin is lower than at the corner, the optimum
    state.step(the_same_for_all(menu, 1, 2, 0, "margin", "steepest", "random"))
    fourth = now()
    assert fourth["best_progress"] == third["progress"] > fourth["progress"]
    lost = float(state.best_margin - state.margin) / spread
    assert fourth["behind"] == pytest.approx(squash(lost), rel=1e-4)
    assert fourth["change"] == pytest.approx(-squash(lost), rel=1e-4)
    assert fourth["since_best"] == pytest.approx(1 / 5)
    assert (fourth["promise"], fourth["agreement"], fourth["turned"]) == (0, 0, 0)

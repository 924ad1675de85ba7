"""Every updater by name: torch.optim, equal seeds, resuming, minima; and what is refused."""

import io

import pytest
import torch
from conftest import ROOT

from advgame.errors import InputError
from agents.updaters import UPDATERS, AdamUpdater, SGDUpdater, make_updater

M = 16
# learning rates for 16 parameters: the defaults of U are for 2561 (a U so wide moves farther)
RATES = {"mlp": 1e-3, "mlp-stable": 3e-4, "mlp-narrow": 1e-4}
START = torch.randn(M, generator=torch.Generator().manual_seed(0))
CURVATURES = torch.logspace(-1, 0, M)


def quadratic(params):
    """Minimum 0 at 0, curvatures 0.1 to 1."""
    return (CURVATURES * params.square()).sum() / 2


def made(name, seed=0, **options):
    return make_updater(name, lr=RATES.get(name), seed=seed, blocks=(10, 6), **options)


def run(updater, steps, params=START, objective=quadratic):
    updates = []
    for _ in range(steps):
        updates.append(updater.update(params, objective))
        params = updates[-1].params
    return updates


@pytest.mark.parametrize(
    ("updater", "optimizer"),
    [
        (AdamUpdater(0.03), lambda p: torch.optim.Adam([p], lr=0.03)),
        (
            AdamUpdater(0.1, (0.5, 0.9), 1e-3),
            lambda p: torch.optim.Adam([p], 0.1, (0.5, 0.9), 1e-3),
        ),
        (SGDUpdater(0.2), lambda p: torch.optim.SGD([p], lr=0.2)),
        (SGDUpdater(0.2, 0.9), lambda p: torch.optim.SGD([p], lr=0.2, momentum=0.9)),
    ],
)
def test_hand_made_updaters_are_torchs(updater, optimizer):
    updater.init(START)
    params = START.clone().requires_grad_()
    reference = optimizer(params)
    for update in run(updater, 20):
        reference.zero_grad()
        loss = quadratic(params)
        loss.backward()
        assert torch.equal(update.loss, loss.detach())
        assert torch.equal(update.grad, params.grad)
        reference.step()
        assert torch.equal(update.params, params.detach())


@pytest.mark.parametrize("name", UPDATERS)
def test_every_updater_goes_down_and_never_up(name):
    """The best of the last tenth: the paper's U swings about the minimum.

    U of a maximiser would climb: the paper's appendix has the sign the other way round.
    """
    updater = made(name)
    updater.init(START)
    losses = [float(update.loss) for update in run(updater, 500)]
    assert losses[0] == float(quadratic(START)) > 1
    assert min(losses[-50:]) < 0.01 * losses[0]
    assert losses[199] < losses[0] / 2
    updater.init(START)
    up = run(updater, 200, objective=lambda params: -quadratic(params))
    assert any(-update.loss > 2 * quadratic(START) for update in up)


@pytest.mark.parametrize("name", UPDATERS)
def test_equal_seeds_are_equal_to_the_bit_and_init_begins_anew(name):
    updater, twin = made(name, seed=3), made(name, seed=3)
    before = torch.get_rng_state()
    updater.init(START)
    twin.init(START)
    ends = [run(one, 8)[-1].params for one in (updater, twin)]
    updater.init(START)
    ends.append(run(updater, 8)[-1].params)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(before, torch.get_rng_state())
    other = made(name, seed=4)
    other.init(START)
    learned = name not in ("adam", "sgd")
    assert torch.equal(run(other, 8)[-1].params, ends[0]) != learned


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", UPDATERS)
def test_a_saved_updater_goes_on_to_the_bit(name, fresh):
    updater, other = made(name), made(name, seed=1)
    updater.init(START)
    place = run(updater, 5)[-1].params
    file = io.BytesIO()
    torch.save(updater.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if not fresh:  # with its own history, which must not shine through
        other.init(START + 1)
        run(other, 3, START + 1)
    other.load_state_dict(saved)
    expected = run(updater, 5, place)
    for update, again in zip(expected, run(other, 5, place), strict=True):
        assert torch.equal(update.params, again.params)
        assert torch.equal(update.loss, again.loss)
        for key, value in update.stats.items():
            assert torch.equal(value, again.stats[key])
    # what was loaded is a copy: a second one goes on from the same place
    updater.load_state_dict(saved)
    assert torch.equal(run(updater, 5, place)[-1].params, expected[-1].params)


@pytest.mark.parametrize("name", UPDATERS)
def test_the_parameters_are_those_handed_in(name):
    """Not the ones the updater returned last: somebody may have clipped or replaced them."""
    for shift in (0.0, 5.0):
        updater = made(name)
        updater.init(START)
        updater.update(START, quadratic)
        again = updater.update(START + shift, quadratic)
        assert torch.equal(again.loss, quadratic(START + shift))
        assert (again.params - START - shift).norm() < 2


@pytest.mark.parametrize("name", UPDATERS)
def test_nothing_returned_carries_a_graph_or_changes_later(name):
    updater = made(name)
    updater.init(START)
    kept = START.clone()
    update = updater.update(START, quadratic)
    tensors = [update.params, update.loss, update.grad, *update.stats.values()]
    copies = [tensor.clone() for tensor in tensors]
    run(updater, 3, update.params)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    assert torch.equal(START, kept)
    with torch.no_grad():  # as inside a training loop's evaluation
        updater.update(update.params, quadratic)


@pytest.mark.parametrize("name", UPDATERS)
def test_what_an_updater_refuses(name):
    updater = made(name)
    with pytest.raises(InputError, match="call init with parameters of shape"):
        updater.update(START, quadratic)
    with pytest.raises(InputError, match="call init first"):
        updater.state_dict()
    for wrong in (START.view(4, 4), START.long(), START[:0]):
        with pytest.raises(InputError, match="flat float vector"):
            updater.init(wrong)
    updater.init(START)
    with pytest.raises(InputError, match="call init with parameters of shape"):
        updater.update(START[:4], lambda params: params.sum())
    for wrong in (lambda p: p, lambda p: p.sum().detach()):
        with pytest.raises(InputError, match="differentiable scalar"):
            updater.update(START, wrong)
    with pytest.raises(InputError, match="lr must be"):
        make_updater(name, lr=0.0, seed=0)


def test_names_and_options():
    with pytest.raises(InputError, match=r"unknown updater 'lion': choose from adam, sgd, mlp"):
        make_updater("lion", lr=None, seed=0)
    with pytest.raises(InputError, match="updater adam has no option 'leak': choose from betas"):
        make_updater("adam", lr=None, seed=0, leak=0.1)
    with pytest.raises(InputError, match="seed must lie in"):
        make_updater("mlp", lr=None, seed=-1)
    rates = {name: make_updater(name, lr=None, seed=0).lr for name in UPDATERS}
    assert rates["adam"] == rates["mlp"] == 0.01  # Ho & Ermon's, and so the paper's
    assert (rates["mlp-stable"], rates["mlp-narrow"]) == (3e-7, 1e-5)
    for name, hidden in (("mlp-stable", None), ("mlp-narrow", (512, 256))):
        stable = make_updater(name, lr=None, seed=0, blocks=(10, 6))
        options = (stable.hidden, stable.zero_last, stable.scaling, stable.blocks, stable.leak)
        assert options == (hidden, True, "rms", (10, 6), 0.1)
    assert make_updater("mlp-stable", lr=None, seed=0, leak=0.5).leak == 0.5
    assert make_updater("sgd", lr=0.3, seed=0, momentum=0.9).momentum == 0.9


def test_the_page_has_every_updater_in_its_words():
    page = (ROOT / "docs" / "updaters.md").read_text()
    for name, (words, _) in UPDATERS.items():
        rate = make_updater(name, lr=None, seed=0).lr
        shown = f"{rate:.0e}".replace("e-0", "e-") if rate < 0.01 else f"{rate:g}"
        assert f"| `{name}` | {words} | {shown}" in page


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adam", {"betas": (0.9, 1.0)}, "betas"),
        ("adam", {"eps": 0.0}, "eps"),
        ("sgd", {"momentum": -0.1}, "momentum"),
        ("mlp", {"hidden": (4, 0)}, "hidden"),
        ("mlp", {"scaling": "max"}, "scaling"),
        ("mlp", {"bound": 0.0}, "bound"),
        ("mlp", {"leak": 1.0}, "leak"),
        ("coordinatewise", {"step": -1.0}, "step"),
        ("coordinatewise", {"width": 0}, "width"),
    ],
)
def test_settings_out_of_range_are_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        make_updater(name, lr=None, seed=0, **options)

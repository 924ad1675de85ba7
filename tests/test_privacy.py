"""Privacy filters: planted labels, known answers, equal bits, what a filter must hide."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import nn

from advgame.errors import InputError
from advgame.privacy import (
    ATTRIBUTES,
    FilterTraining,
    Inference,
    Part,
    PrivacyTask,
    make_filter,
    make_task,
    plant,
    strongest,
    try_all,
)
from advgame.privacy.filters import Whiten, principal


def toy(seed=0, n=600):
    """Six numbers: the private label in the one of largest variance, the useful one in another."""
    rng = torch.Generator().manual_seed(seed)

    def part():
        useful, private = torch.randint(2, (2, n), generator=rng)
        x = torch.randn(n, 6, generator=rng)
        x[:, 0] += 8 * private
        x[:, 1] = x[:, 1] / 2 + 2.0 * useful
        return Part(x, useful, private)

    return PrivacyTask("toy", part(), part(), part(), 2, 2)


def judged(task, filter_, label="private"):
    with torch.no_grad():
        near, mid, far = (
            (filter_(part.x), getattr(part, label))
            for part in (task.train, task.validation, task.test)
        )
    return try_all(near, mid, far, 2, seed=0, restarts=1, hidden=8)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_the_attribute_is_there_and_says_nothing_of_the_class(attribute, digits):
    task = make_task(digits, "class", attribute, seed=3)
    for part in (task.train, task.validation, task.test):
        counts = np.zeros((10, 2))
        np.add.at(counts, (part.useful.numpy(), part.private.numpy()), 1)
        assert chi2_contingency(counts).pvalue > 0.01
        assert 0.4 < part.private.double().mean() < 0.6
        assert (part.x.min() >= 0) & (part.x.max() <= 1)
    finder = LogisticRegression(max_iter=500).fit(task.train.x, task.train.private)
    assert finder.score(task.test.x, task.test.private) > 0.95
    swapped = make_task(digits, "attribute", attribute, seed=3)
    assert torch.equal(swapped.test.x, task.test.x)
    assert torch.equal(swapped.test.useful, task.test.private)
    assert (swapped.useful_classes, swapped.private_classes) == (2, 10)
    other = make_task(digits, "class", attribute, seed=4)
    assert not torch.equal(other.train.private, task.train.private)
    agree = (task.train.private[:360] == task.test.private[:360]).double().mean()
    assert 0.4 < agree < 0.6, "the splits have coins of their own"


def test_what_is_planted_is_what_it_says():
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, :, 4] = 0.5
    coin = torch.tensor([0, 1])
    inverted, stroke, slant = (plant(x, one, coin) for one in ("inversion", "stroke", "slant"))
    assert torch.equal(inverted[0], x[0])
    assert torch.equal(inverted[1], 1 - x[1])
    assert torch.equal(stroke[0], x[0])
    torch.testing.assert_close(stroke[1] - x[1], 0.3 * torch.eye(8)[None])
    columns = torch.arange(8.0)
    top, bottom = ((slant[:, 0, row] * columns).sum(1) / slant[:, 0, row].sum(1) for row in (1, 6))
    assert (top - bottom).sign().abs().sum() == 2
    assert (top - bottom)[0] * (top - bottom)[1] < 0, "one leans left, the other right"


def test_parity_has_no_attribute_and_a_floor_of_a_fifth(digits):
    task = make_task(digits, "parity", "slant", seed=0)
    assert torch.equal(task.test.x, digits.test.floats().flatten(1))
    assert torch.equal(task.test.useful, digits.test.labels % 2)
    assert task.floor() == pytest.approx(0.2, abs=0.01)
    assert task.guess("private") == pytest.approx(0.1, abs=0.01)


def test_floor_and_guess_by_hand():
    x = torch.zeros(4, 1)
    train = Part(x, torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 1, 2]))
    test = Part(x, torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 1]))
    task = PrivacyTask("", train, train, test, 2, 3)
    assert task.floor() == 0.75
    assert task.guess("private") == 0.25
    assert task.guess("useful") == 0.5


def test_pca_is_sklearns_and_the_projection_orthonormal(digits):
    x = digits.train.floats().flatten(1)
    ours, theirs = principal(x, 7), PCA(7, svd_solver="full", whiten=True).fit(x.double())
    signs = (ours.double() @ torch.from_numpy(theirs.components_).T).diagonal().sign()
    torch.testing.assert_close(
        ours.double() * signs[:, None], torch.from_numpy(theirs.components_), atol=1e-5, rtol=0
    )
    z = make_filter("pca", x, 7, 0)(x).double()
    white = torch.from_numpy(theirs.transform(x.double()))
    # whitened up to a rotation, and by n where sklearn divides by n - 1
    scaled = white @ white.T * len(x) / (len(x) - 1)
    torch.testing.assert_close(z @ z.T, scaled, atol=1e-2, rtol=0)
    weight = make_filter("random", x, 7, 0).body.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(7), atol=1e-5, rtol=0)
    assert not torch.equal(weight, make_filter("random", x, 7, 1).body.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp", "random", "pca"])
def test_what_a_filter_gives_out_is_white(kind, digits):
    x = digits.train.floats().flatten(1)
    filter_ = make_filter(kind, x, 5, 0)
    with torch.no_grad():
        z = filter_(x)
        torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.T @ z / len(z), torch.eye(5), atol=1e-3, rtol=0)
        # in evaluation an image does not depend on its company
        torch.testing.assert_close(filter_(x[:3]), z[:3], atol=1e-4, rtol=0)


def test_whitening_undoes_every_scaling(rng):
    z, mix = torch.randn(50, 4, generator=rng), torch.diag(torch.tensor([1.0, 0.3, 3.0, 1.0]))
    first, second = Whiten(4)(z), Whiten(4)(z @ mix + 3)
    torch.testing.assert_close(first @ first.T, second @ second.T, atol=2e-2, rtol=0)


def test_raw_gives_out_every_pixel(digits):
    x = digits.train.floats().flatten(1)
    z = make_filter("raw", x, 3, 0)(x)
    assert z.shape == x.shape
    changing = x.var(0) > 1e-3
    torch.testing.assert_close(
        z.var(0)[changing], torch.ones(int(changing.sum())), atol=2e-2, rtol=0
    )


def test_the_risk_is_the_formula():
    task = toy()
    filter_ = make_filter("linear", task.train.x, 2, 0)
    game = FilterTraining(task, filter_, rho=3.0, adversary="linear")
    part = Part(task.train.x[:20], task.train.useful[:20], task.train.private[:20])
    game.publisher.eval()
    found = game.risk(part)(game.solver.u, game.solver.v).detach().numpy()
    body, scale, head, adversary = (
        {name: value.detach().double().numpy() for name, value in one.state_dict().items()}
        for one in (filter_.body, filter_.scale, game.publisher.head, game.adversaries[0])
    )
    z = part.x.double().numpy() @ body["weight"].T + body["bias"]
    z = (z - scale["mean"]) @ np.linalg.inv(scale["root"]).T

    def loss(one, labels):
        logits = z @ one["weight"].T + one["bias"]
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels.numpy()]

    wanted = 3.0 * loss(head, part.useful) - loss(adversary, part.private)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_step_is_the_solvers_on_the_risk():
    """z is computed once per step: the same numbers as computing it for every ascent."""
    task = toy()
    whole, spelled = (
        FilterTraining(task, make_filter("mlp", task.train.x, 2, 0), batch_size=600, ascent_steps=3)
        for _ in range(2)
    )
    for _ in range(4):
        order = torch.randperm(600, generator=spelled.rng)
        part = Part(*(one[order] for one in (task.train.x, task.train.useful, task.train.private)))
        spelled.publisher.train()
        spelled.solver.step(spelled.risk(part))
        whole.step()
    for one, other in zip(whole.solver.u, spelled.solver.u, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["alt", "minimax", "k-beam"])
def test_a_filter_hides_what_pca_leaks(solver):
    task = toy()
    leaking = make_filter("pca", task.train.x, 2, 0)
    assert judged(task, leaking)["linear"].test > 0.98
    game = FilterTraining(
        task, make_filter("linear", task.train.x, 2, 0), solver=solver, hidden=8, lr=1e-2, beams=2
    )
    start = game.measure()
    for _ in range(100):
        game.step()
    end, filter_ = game.measure(), game.filter()
    assert end["game/useful_risk"] < start["game/useful_risk"]
    assert end["game/risk"] == pytest.approx(end["game/useful_risk"] - end["game/private_risk"])
    private, useful = judged(task, filter_), judged(task, filter_, "useful")
    assert private[strongest(private)].test < 0.6
    assert useful[strongest(useful)].test > 0.95, "not hidden by a constant"


def test_rho_decides():
    """Where both labels are one number, ρ says whether it is kept or hidden."""
    task = toy()
    task = replace(
        task,
        **{
            name: replace(part, private=part.useful)
            for name in ("train", "validation", "test")
            for part in [getattr(task, name)]
        },
    )

    def private(rho):
        filter_ = make_filter("linear", task.train.x, 2, 0)
        game = FilterTraining(task, filter_, rho=rho, hidden=8, lr=1e-2)
        for _ in range(60):
            game.step()
        return judged(task, game.filter())["mlp"].test

    assert private(10.0) > 0.95
    assert private(0.0) < 0.7


@pytest.mark.parametrize("solver", ["minimax", "k-beam"])
def test_equal_bits(solver):
    task = toy()

    def weights():
        game = FilterTraining(task, make_filter("mlp", task.train.x, 3, 1), solver=solver, seed=1)
        for _ in range(5):
            game.step()
        return game.filter()

    before = torch.get_rng_state()
    first, second = weights(), weights()
    assert all(torch.equal(first.state_dict()[k], v) for k, v in second.state_dict().items())
    assert judged(task, first) == judged(task, second)
    assert torch.equal(before, torch.get_rng_state())


def test_fresh_inferences_know_nothing_of_the_players():
    task = toy()
    game = FilterTraining(task, make_filter("linear", task.train.x, 2, 0))
    for _ in range(3):
        game.step()
    before = judged(task, game.filter())
    with torch.no_grad():
        for module in (game.publisher.head, *game.adversaries):
            for p in module.parameters():
                p.fill_(float("nan"))
    assert judged(task, game.filter()) == before


def test_softmax_regression_is_sklearns(rng):
    """l‖W‖² and a mean are sklearn's C = 1 / (2 l n)."""
    from advgame.privacy.fresh import _fit

    x, y = torch.randn(150, 4, generator=rng), torch.randint(3, (150,), generator=rng)
    network = nn.Linear(4, 3)
    _fit(network, (x, y), 1e-2, steps=500)
    theirs = LogisticRegression(C=1 / (2 * 1e-2 * 150), max_iter=2000, tol=1e-8).fit(x, y)
    ours = network(x).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x), atol=2e-3)


def test_inferences_find_what_is_there_and_only_that(rng):
    """A ring: nothing for a line, everything for a curve; then labels of nothing."""
    z = torch.randn(3, 300, 2, generator=rng)
    ring = (z.norm(dim=2) > 1.18).long()
    near, mid, far = ((z[i], ring[i]) for i in range(3))
    found = try_all(near, mid, far, 2, seed=0, restarts=1, hidden=16)
    assert found["linear"].test < 0.65
    assert min(found["mlp"].test, found["svm"].test) > 0.93
    coin = torch.randint(2, (3, 300), generator=rng)
    near, mid, far = ((z[i], coin[i]) for i in range(3))
    nothing = try_all(near, mid, far, 2, seed=0, restarts=1, hidden=16)
    assert all(abs(one.test - 0.5) < 0.1 for one in nothing.values())


def test_validation_chooses_and_never_test(rng):
    found = {"linear": Inference(0.6, 0.9), "mlp": Inference(0.8, 0.5), "svm": Inference(0.8, 0.7)}
    assert strongest(found) == "mlp"
    z, y = torch.randn(90, 2, generator=rng), torch.randint(3, (90,), generator=rng)
    one, two = (
        try_all((z, y), (z.flip(0), y), (z, labels), 3, seed=0, restarts=1, hidden=4)
        for labels in (y, (y + 1) % 3)
    )
    assert {k: v.validation for k, v in one.items()} == {k: v.validation for k, v in two.items()}
    # with the labels of a test split moved on, another answer to the same question
    assert all(one[kind].test + two[kind].test <= 1 for kind in one)


def test_measures_are_cross_entropies_of_the_best_adversary():
    task = toy()
    filter_ = make_filter("linear", task.train.x, 2, 0)
    game = FilterTraining(task, filter_, solver="k-beam", beams=2, rho=2.0, adversary="linear")
    with torch.no_grad():
        for module in (game.publisher.head, game.adversaries[1]):
            for p in module.parameters():
                p.zero_()
        game.adversaries[0].bias.copy_(torch.tensor([50.0, 0.0]))  # knows less than nothing
    found = game.measure()
    assert found["game/private_risk"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["game/risk"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["eval/useful"] == pytest.approx(
        float((task.validation.useful == 0).double().mean())
    )


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"rho": -1.0}, "rho and weight_decay"),
        ({"solver": "best"}, "unknown solver"),
        ({"adversary": "human"}, "linear or mlp"),
        ({"lr": 0.0}, "lr and adversary_lr"),
        ({"lr": math.inf}, "lr and adversary_lr"),
        ({"rho": math.inf}, "rho and weight_decay"),
        ({"beams": 0}, "beams must be 1"),
        ({"batch_size": 601}, "batch size must lie in 2..600"),
        ({"ascent_steps": 0}, "ascent_steps must be 1"),
        ({"gamma": -1.0}, "gamma must be 0"),
    ],
)
def test_wrong_games_are_refused(changes, answer):
    task = toy()
    with pytest.raises(InputError, match=answer):
        FilterTraining(task, make_filter("linear", task.train.x, 2, 0), **changes)


def test_a_game_that_diverges_says_so():
    task = toy()
    game = FilterTraining(task, make_filter("mlp", task.train.x, 2, 0), solver="alt", lr=1e12)
    with pytest.raises(InputError, match="training diverged"):
        all(game.step() for _ in range(50))


def test_wrong_words_are_refused(digits):
    x = digits.train.floats().flatten(1)
    with pytest.raises(InputError, match="unknown label to keep"):
        make_task(digits, "digit", "slant", 0)
    with pytest.raises(InputError, match="unknown attribute"):
        make_task(digits, "class", "colour", 0)
    with pytest.raises(InputError, match="grey"):
        plant(torch.zeros(1, 3, 8, 8), "slant", torch.zeros(1))
    with pytest.raises(InputError, match="unknown filter"):
        make_filter("best", x, 2, 0)
    with pytest.raises(InputError, match=r"dim must lie in 1\.\.64"):
        make_filter("pca", x, 65, 0)
    with pytest.raises(InputError, match="hidden must be 1"):
        make_filter("mlp", x, 2, 0, hidden=0)
    labelled = (x[:9], digits.train.labels[:9])
    with pytest.raises(InputError, match="restarts and hidden"):
        try_all(labelled, labelled, labelled, 10, seed=0, restarts=0)

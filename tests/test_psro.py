"""PSRO and OSP on games whose solution is known by arithmetic; the attacks and rules they need."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import seeded, undefended
from test_classifier_mixtures import CENTRE, EPS, half_plane, pair

from advgame.arena import (
    ARC,
    ClassifierMixture,
    ExpectedLoss,
    OnMixture,
    WorstOf,
    optimal_sampling,
    psro,
    solve,
    solve_per_image,
)
from advgame.arena.matrix_games import best_replies
from advgame.arena.oracles import restricted, support
from advgame.arena.sampling import on_simplex
from advgame.attacks import fgsm, pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.measure import Nothing
from advgame.games import AdversarialTraining, Boosting, DrawnAttacks
from advgame.losses import cross_entropy
from advgame.threat import L2, Linf


class Exact:
    """Both players know a whole game (N, D, A), and answer by their best pure strategy.

    One of the attacker's is an attack for each image where it sees the image, else one for all.
    """

    def __init__(self, errors, row=0, column=0, per_image=False):
        self.game = np.asarray(errors, dtype=float)
        self.every = np.arange(len(self.game))
        self.rows, self.columns, self.per_image = [row], [np.full(len(errors), column)], per_image

    def errors(self, row, column):
        return self.game[self.every, self.rows[row], self.columns[column]]

    def attack(self, column, defender):
        assert column == len(self.columns)
        paid = np.einsum("d,nda->na", defender, self.game[:, self.rows])
        best = paid.argmax(1) if self.per_image else np.full(len(paid), paid.sum(0).argmax())
        self.columns.append(best)

    def defend(self, row, attacker):
        assert row == len(self.rows)
        known = self.columns[: attacker.shape[1]]
        seen = np.stack([self.game[self.every, :, one] for one in known], 2)  # (N, D, A)
        shares = np.broadcast_to(attacker, (len(seen), attacker.shape[1]))
        self.rows.append(int(np.einsum("na,nda->d", shares, seen).argmin()))


SCISSORS = np.array([[[0, 1, -1], [-1, 0, 1], [1, -1, 0]]])  # what the row pays


def test_rock_paper_scissors_ends_at_the_uniform_mixture():
    players = Exact(SCISSORS)
    rounds = list(islice(psro(players), 5))
    assert rounds[0].equilibrium.value == 0
    assert rounds[0].gap == 2, "paper against rock, and the other way round"
    last = rounds[-1]
    assert last.gap == pytest.approx(0, abs=1e-9)
    played = np.zeros(3)
    np.add.at(played, players.rows[: len(last.equilibrium.defender)], last.equilibrium.defender)
    assert played == pytest.approx([1 / 3] * 3)
    assert support(last.equilibrium.defender) == 3


def test_random_games_end_at_their_value_and_the_gap_bounds_the_distance():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.random((1, 4, 6))
        found = solve(costs[0])
        rounds = list(islice(psro(Exact(costs)), 8))
        assert rounds[-1].equilibrium.value == pytest.approx(found.value)
        assert rounds[-1].gap == pytest.approx(0, abs=1e-9)
        for one in rounds:  # exact answers: the value lies within what they gain
            assert one.equilibrium.value - one.defender_gain <= found.value + 1e-9
            assert found.value <= one.equilibrium.value + one.attacker_gain + 1e-9
            assert one.errors.shape == (1, one.number + 1, one.number + 1)


def test_a_planted_pair_of_classifiers_is_mixed_as_arithmetic_says():
    """Attack a breaks classifier 0 alone, b classifier 1 on three of ten images, c both on one."""
    errors = np.zeros((10, 3, 3))
    errors[:, 0, 0] = 1
    errors[:3, 1, 1] = 1
    errors[9, :2, 2] = 1
    errors[:, 2] = 1  # a bad classifier
    for per_image in (True, False):
        players = Exact(errors, 2, 0, per_image)
        last = list(islice(psro(players, per_image=per_image), 5))[-1]
        whole = solve_per_image(errors) if per_image else solve(errors.mean(0))
        assert last.equilibrium.value == pytest.approx(whole.value)
        assert last.gap == pytest.approx(0, abs=1e-9)
        assert {players.rows[k] for k in np.nonzero(last.equilibrium.defender)[0]} <= {0, 1}
    # p on 0 and 1 - p on 1: a takes p and b 0.3 (1 - p), equal at 3/13
    assert whole.value == pytest.approx(3 / 13)
    assert whole.defender[:2] == pytest.approx([3 / 13, 10 / 13])


def test_an_answer_that_is_none_gains_nothing_and_is_no_proof():
    class Lazy(Exact):
        def attack(self, column, defender):
            self.columns.append(self.columns[0])

        def defend(self, row, attacker):
            self.rows.append(self.rows[0])

    one = next(psro(Lazy([[[0.2, 0.9], [0.1, 0.0]]])))
    assert (one.attacker_gain, one.defender_gain) == (0, 0)
    assert one.equilibrium.value == 0.2


def test_the_attacker_that_sees_the_image_is_paid_more():
    errors = np.zeros((2, 1, 2))
    errors[0, 0, 0] = errors[1, 0, 1] = 1
    assert restricted(errors).value == 1
    assert restricted(errors).attacker.tolist() == [[1, 0], [0, 1]]
    assert restricted(errors, per_image=False).value == 0.5
    assert support(restricted(errors).attacker) == 2


def test_where_its_choice_changes_nothing_the_attacker_mixes_as_elsewhere():
    """On image 2 no attack works, image 3 is always wrong: no attack at all would do there."""
    errors = np.zeros((4, 2, 3))
    errors[0, :, 1] = errors[1, :, 2] = errors[3] = 1
    found = restricted(errors)
    assert found.value == 0.75
    assert found.attacker.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    worst, best = best_replies(errors, found.defender, found.attacker)
    assert worst == best == 0.75, "still an equilibrium"
    assert restricted(errors[2:]).attacker.tolist() == [[pytest.approx(1 / 3)] * 3] * 2


def test_a_player_without_a_strategy_is_refused():
    with pytest.raises(InputError, match="a strategy to begin with"):
        next(psro(Exact(SCISSORS), columns=0))


def test_the_projection_on_the_simplex_is_the_nearest_point():
    rng = np.random.default_rng(0)
    assert on_simplex(np.array([0.2, 0.8])) == pytest.approx([0.2, 0.8])
    assert on_simplex(np.array([5.0, 0.0, 0.0])) == pytest.approx([1, 0, 0])
    for _ in range(50):
        point = rng.normal(size=4)
        found = on_simplex(point)
        assert found.sum() == pytest.approx(1)
        assert found.min() >= 0
        others = rng.dirichlet(np.ones(4), 200)
        nearest = np.linalg.norm(others - point, axis=1).min()
        assert np.linalg.norm(found - point) <= nearest + 1e-9


def test_optimal_sampling_finds_the_mixture_that_the_programme_finds():
    """An attacker that knows all ways to err: the worst of finitely many, image by image."""
    rng = np.random.default_rng(1)
    errors = (rng.random((50, 3, 3)) < 0.3).astype(float)
    errors[:, 2] = 1
    asked = []

    def worst(weights):
        asked.append(weights)
        best = np.einsum("d,nda->na", weights, errors).argmax(1)
        return errors[np.arange(50), :, best]

    weights, error = optimal_sampling(worst, 3, steps=300)
    assert asked[0].tolist() == [1 / 3] * 3
    assert weights.sum() == pytest.approx(1)
    found = solve_per_image(errors).value
    assert found <= error + 1e-9
    assert error == pytest.approx(found, abs=0.005)
    assert error < float((asked[0] @ worst(asked[0]).T).mean()) - 0.005
    first, _ = optimal_sampling(worst, 3, steps=1)
    assert first.tolist() == [1 / 3] * 3
    for wrong in ({"members": 0}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(InputError, match="must be 1 or above"):
            optimal_sampling(worst, **{"members": 3, **wrong})


def test_the_worst_of_several_attacks_is_taken_image_by_image():
    """Where adaptive ascent leaves a member standing, ARC finds the joint direction."""
    mixture, ball = pair(), L2(EPS)
    x, y = CENTRE[0].expand(8, 1, 1, 2).contiguous(), CENTRE[1].expand(8)
    suite = [("ce", ExpectedLoss(ball, "ce")), ("arc", ARC(ball)), ("ce again", ExpectedLoss(ball))]
    x_adv = WorstOf(suite).run(mixture, x, y, rng=seeded()).x_adv
    assert not mixture.right(x_adv, y).any()
    alone = WorstOf(suite[:1]).run(mixture, x, y, rng=seeded()).x_adv
    stood = mixture.right(alone, y).any(1)
    assert stood.any()
    assert torch.equal(x_adv[stood], ARC(ball).run(mixture, x, y).x_adv[stood])
    assert torch.equal(x_adv[~stood], alone[~stood])
    tame = WorstOf([("none", Nothing())]).run(mixture, x, y).x_adv
    assert torch.equal(tame, x)


def test_of_equally_bad_examples_the_larger_loss_is_kept():
    far = ClassifierMixture([half_plane([3.0, 0.0], 5 * EPS)], [1.0])
    x_adv = WorstOf([("fgsm", ExpectedLoss(L2(EPS), steps=3))]).run(far, *CENTRE, rng=seeded())
    moved = float((x_adv.x_adv - CENTRE[0]).norm())
    assert far.right(x_adv.x_adv, CENTRE[1]).all()
    assert moved == pytest.approx(EPS, rel=1e-4)


def test_expected_losses_are_exact_where_a_training_computes_in_bf16(digits, victim):
    """They are compared with those of the steps before."""
    mixture = ClassifierMixture([victim, undefended(digits)], [0.5, 0.5])
    x, y = digits.test.floats(slice(6)), digits.test.labels[:6]
    with torch.autocast("cpu", torch.bfloat16):
        made = ExpectedLoss(Linf(0.1), steps=3).run(mixture, x, y, rng=seeded())
        loss = mixture.expected_loss(mixture.answers(x), y, cross_entropy)
    assert not torch.equal(made.x_adv, x)
    assert loss.dtype == torch.float32


def test_examples_of_a_mixture_do_not_depend_on_whom_they_meet(digits, victim):
    mixture = ClassifierMixture([victim, undefended(digits)], [0.5, 0.5])
    x, y, ball = digits.test.floats(slice(6)), digits.test.labels[:6], Linf(0.1)
    attack = OnMixture(ExpectedLoss(ball, steps=3), mixture)
    one = attack.run(victim, x, y, rng=seeded())
    other = attack.run(torch.nn.Flatten(), x, y, rng=seeded(), check=False)
    assert torch.equal(one.x_adv, other.x_adv)
    direct = ExpectedLoss(ball, steps=3).run(mixture, x, y, rng=seeded())
    assert torch.equal(one.x_adv, direct.x_adv)
    assert (one.forwards, one.backwards) == (2 * direct.forwards, 2 * direct.backwards)


BALL = Linf(0.1)


def stepped(rules, digits, seed=0):
    torch.manual_seed(0)
    defender = Defender(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), lr=0.1)
    x, y = digits.train.floats(slice(32)), digits.train.labels[:32]
    made = rules.step(defender, x, y, seeded(seed))
    return made, defender, x, y


def test_one_drawn_attack_is_adversarial_training_with_it(digits):
    made, one, *_ = stepped(DrawnAttacks(BALL, [fgsm], [1.0]), digits)
    usual, other, *_ = stepped(AdversarialTraining(BALL, fgsm), digits)
    assert torch.equal(made.x_adv, usual.x_adv)
    assert torch.equal(one.module[1].weight, other.module[1].weight)
    assert made.stats["cost/forwards"] == usual.stats["cost/forwards"]
    assert made.stats["cost/input_backwards"] == usual.stats["cost/input_backwards"]


def test_attacks_are_drawn_image_by_image_with_their_weights(digits):
    kept = lambda threat: Nothing()  # noqa: E731
    made, _, x, _ = stepped(DrawnAttacks(BALL, [kept, fgsm], [0.25, 0.75]), digits)
    moved = (made.x_adv != x).flatten(1).any(1)
    assert 0.5 < moved.float().mean() < 0.95
    none, _, x, _ = stepped(DrawnAttacks(BALL, [kept, fgsm], [1.0, 0.0]), digits)
    assert torch.equal(none.x_adv, x)
    with pytest.raises(InputError, match="sum of 1"):
        DrawnAttacks(BALL, [kept, fgsm], [0.5, 0.6])
    with pytest.raises(InputError, match="needs a member"):
        DrawnAttacks(BALL, [], [])


def test_the_boosted_member_alone_learns_from_the_attack_on_all(digits, victim):
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    made, defender, x, y = stepped(
        Boosting(BALL, [victim], lambda ball: ExpectedLoss(ball, steps=2)), digits
    )
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    torch.manual_seed(0)
    fresh = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert not torch.equal(fresh[1].weight, defender.module[1].weight)
    mixture = ClassifierMixture([victim, fresh], [0.5, 0.5])
    attack = ExpectedLoss(BALL, steps=2).run(mixture, x, y, rng=seeded())
    assert torch.equal(made.x_adv, attack.x_adv)
    spent = 2 * attack.forwards / 32
    assert float(made.stats["cost/forwards"]) == pytest.approx(spent + 1)
    alone, *_ = stepped(Boosting(BALL, [], lambda ball: pgd_on_one(ball)), digits)
    assert alone.x_adv.shape == x.shape


def pgd_on_one(ball):
    return pgd(ball, 2)

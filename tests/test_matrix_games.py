"""Matrix games against arithmetic, nashpy and OpenSpiel; the game that is played per image."""

import numpy as np
import pytest

from advgame.arena import (
    exploitability,
    exploitability_per_image,
    solve,
    solve_per_image,
)
from advgame.errors import InputError

ROUND = 1e-9  # costs are of order 1, the programme's tolerance is 1e-10


def random_games(count):
    """Sizes from 2x2 to 20x30; costs of several kinds, some with many equal ones."""
    rng = np.random.default_rng(0)
    for number in range(count):
        size = int(rng.integers(2, 21)), int(rng.integers(2, 31))
        drawn = rng.normal(size=size) * 10.0 ** rng.integers(-2, 3)
        yield drawn if number % 3 else np.round(rng.random(size), 1)


CLOSED = {
    "rock, paper, scissors": ([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], 0, [1 / 3] * 3, [1 / 3] * 3),
    "2x2 without a saddle": ([[3, 1], [0, 4]], 2, [2 / 3, 1 / 3], [1 / 2, 1 / 2]),
    "a saddle": ([[2, 3], [1, 2]], 2, [0, 1], [0, 1]),
    # row and column d with probability (1 / c_d) / Σ (1 / c)
    "a diagonal": (np.diag([1.0, 2, 4]), 4 / 7, [4 / 7, 2 / 7, 1 / 7], [4 / 7, 2 / 7, 1 / 7]),
    "one row": ([[0.25, 0.5]], 0.5, [1], [0, 1]),
    "one column": ([[0.5], [0.25]], 0.25, [0, 1], [1]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_small_games_are_solved_as_by_hand(name):
    costs, value, defender, attacker = CLOSED[name]
    found = solve(costs)
    assert found.value == pytest.approx(value, abs=ROUND)
    assert found.defender == pytest.approx(defender, abs=ROUND)
    assert found.attacker == pytest.approx(attacker, abs=ROUND)
    assert exploitability(costs, found.defender, found.attacker) == pytest.approx(0, abs=ROUND)


def test_a_game_without_any_difference_is_worth_what_it_costs():
    found = solve(np.full((3, 2), 0.7))
    assert found.value == pytest.approx(0.7, abs=ROUND)
    assert found.defender.sum() == pytest.approx(1)


def test_values_move_with_the_costs_and_the_players_can_be_swapped():
    for costs in random_games(30):
        value = solve(costs).value
        assert solve(5 * costs - 2).value == pytest.approx(5 * value - 2, rel=1e-7, abs=1e-7)
        assert solve(-costs.T).value == pytest.approx(-value, rel=1e-7, abs=1e-7)


COUNTS = [40, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_values_are_those_of_nashpy(count):
    nashpy = pytest.importorskip("nashpy")
    for costs in random_games(count):
        p, q = nashpy.Game(-costs).linear_program()
        scale = np.ptp(costs)
        found = solve(costs)
        assert abs(found.value - p @ costs @ q) < ROUND * scale
        gap = exploitability(costs, p, q)
        assert gap < ROUND * scale, "nashpy's equilibrium is one by our measure, too"


@pytest.mark.parametrize("count", COUNTS)
def test_open_spiel_finds_nothing_to_exploit(count):
    """Its NashConv comes from best responses in its own game tree, without a programme."""
    pyspiel = pytest.importorskip("pyspiel")
    from open_spiel.python.algorithms.exploitability import nash_conv
    from open_spiel.python.policy import TabularPolicy

    for costs in random_games(count):
        game = pyspiel.create_matrix_game((-costs).tolist(), costs.tolist())
        policy = TabularPolicy(pyspiel.convert_to_turn_based(game))
        rng, sizes = np.random.default_rng(1), costs.shape
        found = solve(costs)
        drawn = [rng.dirichlet(np.ones(size)) for size in sizes]
        for mixed, least in (((found.defender, found.attacker), 0), (drawn, 1e-3)):
            policy.action_probability_array[:] = 0
            for player in (0, 1):
                policy.action_probability_array[player, : sizes[player]] = mixed[player]
            theirs = nash_conv(pyspiel.convert_to_turn_based(game), policy)
            ours, scale = exploitability(costs, *mixed), np.ptp(costs)
            assert abs(theirs - ours) < ROUND * scale
            assert (theirs < ROUND * scale) if least == 0 else (theirs > least * scale)


def test_what_can_be_exploited_is_what_best_responses_gain():
    """Rock against rock: paper gains 1 for either player."""
    costs = CLOSED["rock, paper, scissors"][0]
    assert exploitability(costs, [1, 0, 0], [1, 0, 0]) == pytest.approx(2)
    assert exploitability(costs, [1, 0, 0], [1 / 3] * 3) == pytest.approx(1)


def specialists(alone=0.0):
    """Errors (N, 2, 2): attack d beats classifier d only; a share always the first."""
    errors = np.zeros((100, 2, 2))
    errors[:, [0, 1], [0, 1]] = 1
    errors[: int(100 * alone)] = [[1, 1], [0, 0]]
    return errors


@pytest.mark.parametrize("alone", [0.0, 0.2, 0.4])
def test_a_planted_pair_of_classifiers_has_the_mixture_of_arithmetic(alone):
    """(1 - s) max(p, 1 - p) + s p with s below 1/2 is least at p = 1/2, where it is 1/2."""
    found = solve_per_image(specialists(alone))
    assert found.defender == pytest.approx([0.5, 0.5], abs=ROUND)
    assert found.value == pytest.approx(0.5, abs=ROUND)


def test_a_classifier_that_errs_on_most_images_is_left_out():
    found = solve_per_image(specialists(0.6))
    assert found.defender == pytest.approx([0, 1], abs=ROUND)
    assert found.value == pytest.approx(0.4, abs=ROUND)


def test_an_attacker_that_sees_the_image_is_paid_more():
    """Each attack breaks both classifiers on half of the images, and nothing on the others."""
    errors = np.zeros((10, 2, 2))
    errors[:5, :, 0] = errors[5:, :, 1] = 1
    assert solve(errors.mean(0)).value == pytest.approx(0.5, abs=ROUND)
    found = solve_per_image(errors)
    assert found.value == pytest.approx(1, abs=ROUND)
    assert found.attacker == pytest.approx(np.repeat([[1, 0], [0, 1]], 5, axis=0), abs=ROUND)


@pytest.mark.parametrize("seed", range(5))
def test_games_per_image_leave_nothing_to_gain(seed):
    rng = np.random.default_rng(seed)
    errors = (rng.random((50, 4, 3)) < 0.5).astype(float)
    found = solve_per_image(errors)
    assert found.attacker.shape == (50, 3)
    gap = exploitability_per_image(errors, found.defender, found.attacker)
    assert gap == pytest.approx(0, abs=ROUND)
    assert found.value >= solve(errors.mean(0)).value - ROUND
    shuffled = solve_per_image(errors[rng.permutation(50)])
    assert shuffled.value == pytest.approx(found.value, abs=ROUND)
    alone = exploitability_per_image(errors, [1, 0, 0, 0], found.attacker)
    assert alone > 0.1, "one classifier alone errs under one of three attacks on 7 of 8 images"


def test_the_same_game_is_solved_to_the_same_bits():
    (costs,) = random_games(1)
    one, two = solve(costs), solve(costs.copy())
    assert one.value == two.value
    assert np.array_equal(one.defender, two.defender)
    assert np.array_equal(one.attacker, two.attacker)


@pytest.mark.parametrize(
    "costs", [[], [1.0, 2.0], [[]], [[np.nan]], [[np.inf, 0]], [["a"]], [[1], [1, 2]], None]
)
def test_what_is_no_game_is_refused(costs):
    with pytest.raises(InputError, match="a game is"):
        solve(costs)


@pytest.mark.parametrize(
    "mixed", [[1.0], [0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], ["a", "b"], [[1.0], [0.5, 0.5]], None]
)
def test_what_is_no_mixture_is_refused(mixed):
    with pytest.raises(InputError, match="defender's mixture must be probabilities"):
        exploitability(np.eye(2), mixed, [0.5, 0.5])
    with pytest.raises(InputError, match="attacker's mixture must be probabilities"):
        exploitability(np.eye(2), [0.5, 0.5], mixed)
    with pytest.raises(InputError, match=r"attacker's mixture must be .* shape \(3, 2\)"):
        exploitability_per_image(np.zeros((3, 2, 2)), [0.5, 0.5], [[0.5, 0.5]] * 2)

"""LinUCB and Thompson sampling over strategies, learning progress, and the game that pays it."""

import copy
import itertools

import pytest
import torch
from conftest import Linear

from advgame.attacks import pgd
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import Passes
from advgame.games.las_at import LasAt
from advgame.games.progress import LearningProgress
from advgame.games.strategy import StrategySpace
from advgame.health import deaths
from advgame.losses import cross_entropy
from advgame.seeding import stream
from advgame.threat import Linf
from agents.bandits import BANDITS, arm_features
from agents.las_at import SteadyStrategy, StrategyGame
from envs.strategy_selection import StrategySelectionVectorEnv

SPACE = StrategySpace(0.1, (2, 6, 10), (1, 5, 9), (1, 4))
IMAGES = torch.zeros(4, 1, 2, 2)
NAMES = sorted(BANDITS)


def bandit(name, seed=0, space=SPACE, context=None, **settings):
    return BANDITS[name](space, stream(seed, "policy"), context, **settings)


def chosen(player):
    arm = player.act(IMAGES, learn=True)
    assert (arm == arm[0]).all(), "all images have one strategy"
    return arm[0]


def play(player, pay, rounds, noise=0.3, seed=5):
    """Rounds in which ``pay(ε, steps, step size)`` is paid with noise; the strategies played."""
    rng, played = torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        arm = chosen(player)
        values = [values[i] for values, i in zip(player.space.lists, arm, strict=True)]
        played.append(values)
        paid = pay(*values) + noise * torch.randn((), generator=rng)
        stats = player.learn(paid.expand(4))
    return played, stats


def test_features_of_strategies_are_what_their_words_say():
    arms = torch.tensor(list(itertools.product(*map(range, SPACE.sizes))))
    found = arm_features(SPACE.lists, arms)
    assert found.shape == (18, 1 + 3 + 2 + 3)
    z = [torch.tensor(values).double()[arms[:, k]] for k, values in enumerate(SPACE.lists)]
    z = [(one - one.mean()) / one.std(correction=0) for one in z]  # all arms: as their lists
    squares = [z[k] ** 2 for k in (0, 1)]
    squares = [(one - one.mean()) / one.std(correction=0) for one in squares]
    want = [10 * torch.ones(18), *z, *squares, z[0] * z[1], z[0] * z[2], z[1] * z[2]]
    torch.testing.assert_close(found, torch.stack([one.double() for one in want], 1))
    alone = StrategySpace(0.1, (8,), (10,), (1, 2))
    assert arm_features(alone.lists, torch.tensor([[0, 0, 0], [0, 0, 1]])).tolist() == [
        [10, -1],
        [10, 1],
    ]


def test_linucb_plays_the_largest_upper_bound_of_its_formula():
    player = bandit("linucb", exploration=0.7, memory=1.0, penalty=2.0)
    x, r, errors = [], [], []
    for number in range(14):
        rows = torch.stack(x) if x else torch.zeros(0, 9).double()
        inverse = (rows.T @ rows + 2 * torch.eye(9)).inverse()
        weights = inverse @ rows.T @ torch.tensor(r, dtype=torch.float64)
        sigma = (sum(errors) / len(errors)) ** 0.5 if errors else 1.0
        phi = player.features()
        bonus = torch.stack([(one @ inverse @ one).sqrt() for one in phi])
        scores = phi @ weights + 0.7 * sigma * bonus
        torch.testing.assert_close(player.scores(phi), scores)
        arm = chosen(player)
        played = int((player.arms == arm).all(1).nonzero())
        # the first 9, as many as there are weights, are drawn
        assert number < 9 or played == int(scores.argmax())
        paid = 0.3 * (number % 4) + float(phi[played, 2])
        errors.append(float(paid - phi[played] @ weights) ** 2)
        x.append(phi[played])
        r.append(paid)
        stats = player.learn(torch.full((4,), paid))
        assert float(stats["strategy/expected"]) == pytest.approx(
            float(phi[played] @ weights), abs=1e-6
        )
        assert float(stats["strategy/uncertainty"]) == pytest.approx(float(sigma * bonus[played]))


def test_thompsons_weights_are_drawn_from_their_distribution():
    player = bandit("thompson", exploration=0.5, memory=0.9, penalty=3.0)
    play(player, lambda eps, steps, size: eps / 5, 12)
    phi = player.features()
    drawn = torch.stack([player.scores(phi) for _ in range(3000)])
    fit = player.regression
    torch.testing.assert_close(drawn.mean(0), phi @ fit.weights, atol=0.03, rtol=0)
    want = (0.5 * player.noise) ** 2 * phi @ fit.precision().inverse() @ phi.T
    torch.testing.assert_close(drawn.T.cov(), want, atol=float(want.max()) * 0.1, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_arm_is_learned(name):
    """Of 18 arms, in one whose ε and steps lie amidst their lists."""
    played, stats = play(
        bandit(name),
        lambda eps, steps, size: 2 - ((eps - 6) / 4) ** 2 - ((steps - 5) / 4) ** 2 + size / 4,
        120,
    )
    assert played[-40:].count([6, 5, 4]) > 30
    assert played[:20].count([6, 5, 4]) < 15, "it had to be found"
    assert float(stats["health/strategy/unexplained"]) < 1


@pytest.mark.parametrize("name", NAMES)
def test_the_right_arm_of_each_context_is_learned(name):
    """Early many steps pay, later few: the level tells which."""
    context = [0.0]
    player = bandit(name, context=lambda: context[0], memory=1.0)

    def pay(eps, steps, size):
        return torch.tensor((0.5 - context[0]) * (steps - 5))

    rng = torch.Generator().manual_seed(2)
    late = {0.0: [], 1.0: []}
    for number in range(160):
        context[0] = float(torch.randint(0, 2, (), generator=rng))
        (values,), _ = play(player, pay, 1, seed=number)
        if number > 120:
            late[context[0]].append(values[1])
    assert late[0.0].count(9) > 0.8 * len(late[0.0])
    assert late[1.0].count(1) > 0.8 * len(late[1.0])


@pytest.mark.parametrize("name", NAMES)
def test_what_was_best_is_forgotten(name):
    player = bandit(name, memory=0.95)
    play(player, lambda eps, steps, size: -eps / 4, 60)
    played, _ = play(player, lambda eps, steps, size: eps / 4, 150)
    assert [eps for eps, _, _ in played[-30:]].count(10) > 20


def test_a_strategy_is_kept_until_it_is_paid():
    player = bandit("thompson")
    first = chosen(player)
    assert all(torch.equal(chosen(player), first) for _ in range(3))
    player.learn(torch.zeros(4))
    with pytest.raises(InputError, match="call act"):
        player.learn(torch.zeros(4))
    assert len({tuple(p) for p in play(player, lambda *_: 0.0, 8)[0]}) > 3
    with pytest.raises(InputError, match="exploration must be above 0"):
        bandit("linucb", exploration=0.0)


def test_the_steady_control_keeps_a_strategy_for_its_interval_and_draws_uniformly():
    player = SteadyStrategy((3, 3, 2), stream(0, "policy"), 4)
    drawn = torch.stack([player.act(IMAGES, learn=False)[0] for _ in range(4 * 200)])
    kept = drawn.reshape(200, 4, 3)
    assert (kept == kept[:, :1]).all()
    assert all(40 < count < 95 for count in kept[:, 0, 0].bincount().tolist())
    first = SteadyStrategy((3, 3, 2), stream(1, "policy"), 4)
    for _ in range(6):
        first.act(IMAGES, learn=False)
    second = SteadyStrategy((3, 3, 2), stream(2, "policy"), 4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(9):
        assert torch.equal(first.act(IMAGES, learn=False), second.act(IMAGES, learn=False))


def test_a_dead_bandit_is_flagged():
    always = [{"epoch": 1, "health/strategy/entropy": 0.0, "health/strategy/step": 0.0}]
    assert {death.sign for death in deaths(always)} == {"entropy", "step"}
    player = bandit("linucb", exploration=1e-9, memory=0.5)
    _, stats = play(player, lambda *_: 1.0, 40, noise=0)
    assert float(stats["health/strategy/entropy"]) < 0.01
    _, alive = play(bandit("thompson"), lambda *_: 1.0, 40)
    assert float(alive["health/strategy/entropy"]) > 0.5


def planted(seed=0, n=256):
    """Two classes that one strong pixel tells apart, and eight weak ones that an attack turns."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=rng)
    x = 0.5 + 0.1 * (torch.rand(n, 1, 3, 3, generator=rng) - 0.5)
    x += 0.03 * (2 * y - 1)[:, None, None, None]
    x[:, 0, 1, 1] += 0.2 * (2 * y - 1)
    return ImageSet.from_floats(x.clamp(0, 1), y, 2)


def game(name="thompson", seed=0, interval=4):
    progress = LearningProgress(planted(1, 40), Linf(0.08), steps=3)
    env = StrategySelectionVectorEnv(
        32,
        data=planted(),
        defender=Defender(Linear(torch.zeros(2, 9), torch.zeros(2)), lr=0.2, momentum=0.0),
        rules=LasAt(Linf(0.08), progress=progress),
        space=StrategySpace(0.08, (2, 8), (1, 4), (2, 4)),
        reward_interval=interval,
    )
    level = env.rules.progress
    player = BANDITS[name](env.space, stream(seed, "policy"), lambda: level.level)
    return StrategyGame(env, player, seed)


def held_out_loss(one):
    x, y = one.held_out.floats(), one.held_out.labels
    return lambda model: (
        cross_entropy(
            model(pgd(Linf(0.08), 3).run(model, x, y, rng=stream(0, "held out")).x_adv), y
        )
        .mean()
        .detach()
    )


def test_a_bandit_is_paid_the_fall_of_the_held_out_loss_per_forward_of_its_steps():
    made = game()
    progress = made.env.rules.progress
    assert progress.level == pytest.approx(0.6931, abs=1e-4), "log 2 before it was measured"
    loss, model = held_out_loss(progress), made.defender.module
    before, measured = float(loss(copy.deepcopy(model))), 40 / 32 * (2 * 3 + 1)
    for turn in range(2):
        rows = [made.step() for _ in range(4)]
        spent = sum(float(row["attacker/forwards_per_image"]) for row in rows) - measured
        spent -= measured if turn == 0 else 0
        after = float(loss(copy.deepcopy(model)))
        assert "game/attacker_reward" not in rows[0], "paid every fourth step"
        paid = float(rows[-1]["game/attacker_reward"])
        assert paid == pytest.approx(1000 * (before - after) / spent, rel=1e-3)
        assert float(rows[-1]["game/held_out_loss"]) == pytest.approx(after, rel=1e-5)
        assert all(row["strategy/steps"] == rows[0]["strategy/steps"] for row in rows)
        assert paid > 0 or turn, "the network learns"
        before = after
    # a linear classifier's step: the attack's passes, and its own 3; the rest is the measurement
    steps = float(rows[0]["strategy/steps"])
    costs = [float(row["attacker/forwards_per_image"]) for row in rows]
    assert costs == pytest.approx([2 * steps + 3] * 3 + [2 * steps + 3 + measured])
    assert not any(name.startswith("game/r") for name in rows[-1]), "no look-ahead"


def test_the_first_measurement_is_counted_too():
    progress, passes = LearningProgress(planted(1, 40), Linf(0.08), steps=3), Passes()
    defender = Defender(Linear(torch.zeros(2, 9), torch.zeros(2)))
    progress.begin(defender, 32, passes)
    assert passes.worth() == pytest.approx(40 / 32 * 7)
    progress.begin(defender, 32, passes)
    assert passes.worth() == pytest.approx(40 / 32 * 7)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_resumable(name):
    whole = game(name)
    for _ in range(14):
        whole.step()
    first, second = game(name), game(name, seed=1)
    for _ in range(9):
        first.step()
    for _ in range(5):
        second.step()
    second.defender.module.load_state_dict(first.defender.module.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(5):
        second.step()
    assert torch.equal(second.defender.module.weight, whole.defender.module.weight)
    assert torch.equal(second.player.regression.weights, whole.player.regression.weights)
    images, _ = whole.env.reset(seed=0)
    assert torch.equal(images, game(name).images)
    assert whole.env.rules.progress.state_dict() == {"level": None, "spent": 0.0}


def test_misuse_is_refused():
    progress = LearningProgress(planted(1, 8), Linf(0.08))
    with pytest.raises(InputError, match="cannot both be paid"):
        LasAt(Linf(0.08), progress=progress, reward=lambda seen: seen.loss)
    with pytest.raises(InputError, match="needs held-out images"):
        LearningProgress(None, Linf(0.08))

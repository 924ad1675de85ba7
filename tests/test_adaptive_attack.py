"""`advgame/AdaptiveAttack-v0`: the attack as a sequence, its rewards, its costs, its learners."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import Counting, Linear
from lightning_fabric import Fabric
from stable_baselines3 import PPO
from test_stopping import planted_defender, planted_images

from advgame.attacks import GradientAttack, pgd
from advgame.classifiers import SmallCNN
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adaptive import (
    FEATURES,
    AdaptiveAttack,
    Gain,
    LasReward,
    Progress,
    Regret,
    Reward,
    _From,
)
from advgame.games.awp import AWPDefender
from advgame.games.costs import Passes
from advgame.games.las_at import LasAt
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init, stream
from advgame.threat import L2, Linf
from agents.policies import FeaturePolicy, FeatureValue
from agents.reinforce import EpisodicReinforce
from agents.settings import EpisodeConfig
from envs import make_sb3
from envs.adaptive_attack import AdaptiveAttackVectorEnv

ON, RESTART, STOP = 1, 3, 4  # with ε/4; of the default step sizes


def cnn(lr=0.05):
    with seeded_init(0):
        return Defender(SmallCNN((1, 8, 8), 10, width=4), lr=lr)


def make(rows=8, reward=None, defender=None, **settings):
    rules = AdaptiveAttack(Linf(0.15), reward=reward or Gain(), **settings.pop("rules", {}))
    env = AdaptiveAttackVectorEnv(rows, defender=defender or cnn(), rules=rules, **settings)
    env.reset(seed=0)
    return env


def play(env, counts, action=ON):
    """Each row goes on for so many steps and stops; the rewards of every step, (T, n)."""
    counts, paid, over, step = torch.tensor(counts), [], False, 0
    while not over:
        chosen = torch.where(counts > step, action, env.rules.stop)[:, None]
        _, reward, ended, _, info = env.step(chosen)
        paid.append(reward)
        over, step = bool(ended.all()), step + 1
    return torch.stack(paid), info


COUNTS = [3, 0, 9, 1, 5, 9, 2, 4]


@pytest.mark.parametrize("ball", [Linf(0.15), L2(0.8)])
def test_an_episode_is_pgd_with_those_steps_and_the_defenders_step(ball, digits):
    weight = 0.3 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    defender = Defender(Linear(weight), lr=0.1)
    env = AdaptiveAttackVectorEnv(8, defender=defender, rules=AdaptiveAttack(ball))
    env.reset(seed=0)
    x, y, start = env._x, env._y, env._start
    model = copy.deepcopy(defender.module)
    play(env, COUNTS)
    attack = GradientAttack(ball, torch.tensor(COUNTS), float(ball.eps) / 4, start=_From(start))
    want = attack.run(model, x, y, rng=stream(0, "none")).x_adv
    torch.testing.assert_close(env.result.x_adv, want, rtol=0, atol=1e-6)
    peer = Defender(model, lr=0.1)
    peer.backward(want, y)
    peer.step()
    torch.testing.assert_close(defender.module.weight, peer.module.weight)
    assert float(env.result.stats["strategy/steps"]) == sum(COUNTS) / 8


def test_the_gain_of_an_episode_is_that_of_its_last_point_less_the_price():
    env = make()
    first = env._loss.clone()
    paid, info = play(env, COUNTS)
    want = info["loss"] - first - 0.05 * torch.tensor(COUNTS)
    torch.testing.assert_close(paid.sum(0), want)
    assert info["queries"].tolist() == [one + 1 for one in COUNTS]
    total = env.result.stats["game/attacker_reward"]
    torch.testing.assert_close(total, paid.sum(0).mean())


def test_images_that_have_stopped_cost_nothing_more():
    env = make()
    env.state.model = counting = Counting(env._model)  # the first query was made before
    play(env, COUNTS)
    # a first query each, one per step; gradients also of those that stop at a query
    moved = [sum(one > t for one in COUNTS) for t in range(10)]
    asked = [sum(one >= t for one in COUNTS) for t in range(10)]
    backwards = sum(a for a, m in zip(asked, moved, strict=True) if m)
    assert counting.forwards == sum(moved)
    assert counting.backwards + 8 == backwards
    stats = env.result.stats
    assert float(stats["cost/forwards"]) == pytest.approx((8 + sum(moved)) / 8 + 1)
    assert float(stats["cost/input_backwards"]) == pytest.approx(backwards / 8)


def test_a_restart_goes_to_another_point_and_is_a_query():
    env = make()
    before = env._points.clone()
    env.step(torch.full((8, 1), RESTART))
    moved = env._points - before
    assert (moved.abs() > 0).float().mean() > 0.5
    assert (Linf(0.15).size(env._points - env._x) <= 0.15 + 1e-6).all()
    assert env._info()["queries"].tolist() == [2] * 8
    losses = cross_entropy(env._model(env._points), env._y)
    torch.testing.assert_close(env._info()["loss"], losses)  # also where the loss has fallen


def test_the_features_are_of_the_points_and_waiting_rows_keep_theirs():
    env = make()
    seen, _ = env.reset()
    names = list(FEATURES)
    assert (seen[:, names.index("done")] == 0).all()
    actions = torch.full((8, 1), ON)
    actions[0] = STOP
    following, *_, info = env.step(actions)
    assert info["waiting"].tolist() == [True] + [False] * 7
    changed = names.index("waiting")
    assert following[0, changed] == 1
    kept = [i for i in range(len(names)) if i != changed]
    assert torch.equal(following[0, kept], seen[0, kept])
    p = env._logits.softmax(1)[torch.arange(8), env._y]
    torch.testing.assert_close(following[:, 0], p)
    fall = p - seen[:, 0]
    torch.testing.assert_close(following[1:, names.index("fall")], fall[1:])
    assert (following[1:, names.index("done")] == 1 / 9).all()
    later = env.step(torch.full((8, 1), STOP))
    assert later[2].all()
    seen, *_ = env.step(actions)  # the reset
    probability = (-env.result.losses).exp().mean()
    torch.testing.assert_close(seen[:, names.index("defender")], probability.expand(8))
    assert (seen[:, names.index("age")] == 1 / 101).all()


def test_the_other_images_follow_their_policy():
    told = []

    def never_on(seen):
        told.append(seen.shape)
        return torch.full((len(seen),), STOP)

    env = make(2, batch_size=8, others=never_on)
    play(env, [2, 3])
    assert env._used.tolist() == [3, 4, 1, 1, 1, 1, 1, 1]
    assert set(told) == {(6, len(FEATURES))}

    env = make(1, batch_size=8, others=lambda seen: torch.full((len(seen),), ON))
    _, _, ended, *_ = env.step(torch.full((1, 1), STOP))
    assert ended.all(), "the others' attacks end within the step"
    assert env._used.tolist() == [1] + [10] * 7
    wrong = make(1, batch_size=8, others=lambda seen: torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="others must return 7 actions"):
        wrong.step(torch.full((1, 1), ON))


def test_the_end_is_drawn_also_where_the_next_episode_has_begun():
    env = make(2, rules={"queries": 2}, render_mode="rgb_array")
    assert env.step(torch.full((2, 1), ON))[2].all()
    last = env.render()
    env.restart()
    assert all(np.array_equal(*pair) for pair in zip(env.render(), last, strict=True))
    env.step(torch.full((2, 1), RESTART))
    assert not any(np.array_equal(*pair) for pair in zip(env.render(), last, strict=True))


def weights(env):
    return torch.cat([one.detach().flatten() for one in env.defender.module.parameters()])


@pytest.mark.parametrize("network", ["batch norm", "plain"])
def test_regret_is_nothing_for_who_plays_the_baseline(network, monkeypatch):
    rules, places, real = LasAt(Linf(0.15)), [], LasAt.robust

    def robust(self, model, x, y, rng, passes):
        places.append(rng.get_state())
        return real(self, model, x, y, rng, passes)

    monkeypatch.setattr(LasAt, "robust", robust)

    def learned(reward, counts):
        if network == "plain":
            defender = cnn(lr=1.0)
        else:
            with seeded_init(0):
                layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
                head = torch.nn.Linear(144, 10)
                module = torch.nn.Sequential(*layers, torch.nn.Flatten(), head)
            defender = Defender(module, lr=0.5)
        env = make(16, reward, defender)
        paid, _ = play(env, counts)
        return env, paid

    env, paid = learned(Regret(rules, steps=9), [9] * 16)
    assert torch.equal(*places), "both looks ahead draw the same starts"
    torch.testing.assert_close(paid.sum(0), learned(Gain(0), [9] * 16)[1].sum(0))
    other, _ = learned(Reward(), [9] * 16)
    assert torch.equal(weights(env), weights(other)), "the baseline leaves no trace"
    buffers = [dict(one.defender.module.named_buffers()) for one in (env, other)]
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    lazy, paid = learned(Regret(rules, steps=9, step_size=1.0), [0] * 16)
    shared = paid[-1]
    assert (shared == shared[0]).all()
    counts = float(shared[0]) * 16 / 4
    assert counts == round(counts) < 0, "a difference of counts: PGD had taught more"
    assert lazy.result.stats["cost/backwards"] == 2


def test_progress_is_the_fall_of_the_held_out_loss_per_forward(digits):
    held, ball = digits.validation.first(40), Linf(0.15)
    env = make(8, Progress(held, ball, steps=2, weight=10.0))

    def level():
        x, y = held.floats(), held.labels
        model = copy.deepcopy(env.defender.module).eval()
        x_adv = pgd(ball, 2).run(model, x, y, rng=stream(0, "held out")).x_adv
        return float(cross_entropy(model(x_adv), y).mean().detach())

    for turn in range(2):
        before = level()
        paid, _ = play(env, COUNTS)
        own = torch.tensor(COUNTS) * -0.05
        shared = paid.sum(0) - own
        measured = 40 / 8 * (2 * 2 + 1) * (2 if turn == 0 else 1)
        spent = float(env.result.stats["attacker/forwards_per_image"]) - measured
        assert shared.tolist() == pytest.approx([10 * (before - level()) / spent] * 8, abs=1e-5)
        env.step(torch.zeros(8, 1, dtype=torch.int64))
        assert turn == 0 or env.rules.reward.state_dict()["level"] == pytest.approx(level())


@pytest.mark.parametrize("credit", ["mixed", "sample"])
def test_las_ats_own_reward_is_the_published_one(credit):
    rules = LasAt(Linf(0.15), a=0.5)
    env = make(8, LasReward(rules, credit))
    twin = copy.deepcopy(env)
    paid, info = play(env, COUNTS)
    defender, x, y = twin.defender, env._x, env._y
    defender.backward(env.result.x_adv, y)
    ahead = defender.look_ahead()
    robust = rules.robust(ahead, x, y, twin._rng, Passes())
    clean = (ahead(x).argmax(1) == y).float()
    want = rules.pay(info["loss"], robust, clean, credit).reward
    torch.testing.assert_close(paid.sum(0) + 0.05 * torch.tensor(COUNTS), want)


def test_a_copy_goes_on_in_the_trainings_precision():
    with seeded_init(0):
        module = SmallCNN((1, 8, 8), 10, width=4)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    env = make(8, defender=Defender(module, lr=0.05, fabric=fabric))
    env.step(torch.full((8, 1), ON))
    twin = copy.deepcopy(env)
    assert torch.equal(twin.state.loss, env.state.loss)
    for action in (ON, STOP):
        (seen, paid, *_), other = (one.step(torch.full((8, 1), action)) for one in (env, twin))
        assert torch.equal(seen, other[0])
        assert torch.equal(paid, other[1])


def planted():
    """In a ball of 0.01 no query gains what it costs; in one of 0.16 two to four do."""
    rules = AdaptiveAttack(
        Linf(0.16), step_sizes=(1 / 2,), radii=(1 / 16, 1.0), queries=6, price=0.12
    )
    env = AdaptiveAttackVectorEnv(
        64, data=planted_images(0.1), defender=planted_defender(0.005), rules=rules
    )
    env.reset(seed=0)
    return env


def by_radius(env, policy):
    """Mean number of queries after the first in the small and in the large balls, and the pay."""
    total, queries = 0.0, [[], []]
    seen, _ = env.reset()
    for _ in range(6 * 8):
        seen, reward, ended, _, info = env.step(policy(seen))
        total += float(reward.mean())
        if ended.all():
            for large in (0, 1):
                queries[large].append(info["queries"][(env._eps > 0.1) == large].float() - 1)
    return [float(torch.cat(one).mean()) for one in queries], total


def reinforce():
    env = planted()
    with seeded_init(0):
        policy, value = FeaturePolicy(len(FEATURES), (3,)), FeatureValue(len(FEATURES))
    config, fabric = EpisodeConfig(5, lr=1e-2, value_lr=1e-2), Fabric(accelerator="cpu", devices=1)
    player = EpisodicReinforce([env], policy, value, config, stream(0, "p"), fabric, ("query",))
    for _ in range(100):
        player.update()
    return env, lambda seen: policy(seen)[0].argmax(1, keepdim=True)


def ppo():
    env = planted()
    learner = PPO(
        "MlpPolicy", make_sb3(env), n_steps=25, batch_size=400, n_epochs=4, gamma=1.0, seed=0,
        learning_rate=3e-3,
    )  # fmt: skip
    learner.learn(40_000)
    return env, lambda seen: learner.predict(seen.numpy(), deterministic=True)[0]


@pytest.mark.parametrize("learned", [reinforce, pytest.param(ppo, marks=pytest.mark.slow)])
def test_on_planted_data_a_policy_learns_when_to_stop(learned):
    env, policy = learned()
    (small, large), paid = by_radius(env, policy)
    assert small < 0.3, "no query is worth its price there"
    assert 1 < large < 4.5
    for always in (0, 2):  # go on, stop
        assert paid > by_radius(env, lambda seen, a=always: torch.full((64, 1), a))[1] + 0.2


def test_misuse_is_refused(digits):
    ball = Linf(0.15)
    for wrong, words in (
        ({"queries": 1}, "queries must be"),
        ({"radii": ()}, "radii must be"),
        ({"radii": (0.0,)}, "radii must be"),
        ({"step_sizes": (0.0,)}, "step_sizes must be"),
        ({"step_sizes": (0.5, math.nan)}, "step_sizes must be"),
        ({"reward": "gain"}, "a Reward such as"),
    ):
        with pytest.raises(InputError, match=words):
            AdaptiveAttack(ball, **wrong)
    with pytest.raises(InputError, match="judged at one eps"):
        AdaptiveAttack(Linf(torch.tensor([0.1])))
    for wrong, words in (
        ({"batch_size": 4}, "smaller than num_envs"),
        ({"rules": LasAt(ball)}, "AdaptiveAttack"),
        ({"others": 3}, "others is a policy"),
        ({"defender": digits}, "defender is a classifier"),
    ):
        with pytest.raises(InputError, match=words):
            AdaptiveAttackVectorEnv(8, **wrong)
    with seeded_init(0):
        awp = AWPDefender(SmallCNN((1, 8, 8), 10, width=4), 0.01)
    with pytest.raises(InputError, match="second gradient"):
        make(reward=Regret(LasAt(ball)), defender=awp)
    with pytest.raises(InputError, match="held-out images"):
        Progress(None, ball)

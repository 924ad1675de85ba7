"""The imitation environments: who pays, where episodes begin and end, staggered rows."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from box_tasks import FINE, HIGH, WHOLE

import envs
from advgame.errors import InputError
from advgame.imitation import Demonstrations
from advgame.imitation.discriminator import REWARDS, Discriminator
from agents.gail import GailTraining
from envs.imitation import ImitationVectorEnv

IDS = ("advgame/GAILCartPole-v0", "advgame/GAILMountainCar-v0")
LEFT = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_reward_is_the_discriminators_and_nothing_else(reward):
    env = ImitationVectorEnv(4, reward=reward, horizon="task")
    seen, _ = env.reset(seed=0)
    for t in range(30):
        actions = torch.full((4,), t % 2)
        logit = env.discriminator.logits(env.theta, env.code.pairs(seen, actions))
        seen, paid, _, _, info = env.step(actions)
        assert torch.equal(info["logit"], logit)
        assert torch.equal(paid, REWARDS[reward](logit))
        assert info["true_reward"].tolist() == [1] * 4


def test_staggered_rows_begin_at_different_times():
    env = ImitationVectorEnv(5, stagger=True)
    for _ in range(2):  # every reset
        env.reset(seed=0)
        ends = []
        for t in range(700):
            _, _, terminated, truncated, _ = env.step(torch.full((5,), t % 2))
            assert not terminated.any()
            ends += [(row, t + 1) for row in truncated.nonzero()[:, 0].tolist()]
        # row i is cut off i/5 of 500 steps early once, and then as late as all
        assert sorted(ends) == [
            (0, 500),
            (1, 400),
            (2, 300),
            (3, 200),
            (3, 700),
            (4, 100),
            (4, 600),
        ]


def test_zeros_pay_the_same_for_all():
    zeros = torch.zeros(Discriminator(7).size)
    env = ImitationVectorEnv(4, theta=zeros)
    env.reset(seed=0)
    for _ in range(40):
        assert env.step(LEFT)[1].tolist() == [0.0] * 4


def test_every_form_is_paid_by_the_theta_that_was_set():
    single = gym.make("advgame/GAILCartPole-v0")
    arrays = envs.to_numpy(gym.make_vec("advgame/GAILCartPole-v0", num_envs=2))
    for env, action in ((single, 0), (arrays, np.zeros(2, dtype=np.int64))):
        env.reset(seed=0)
        before = env.step(action)[1]
        env.unwrapped.theta = torch.zeros_like(env.unwrapped.theta)
        env.reset(seed=0)
        after = env.step(action)[1]
        assert np.all(before != after)
        assert np.all(env.step(action)[1] == after), "zeros pay the same for all"


def test_the_task_ends_its_episodes():
    env = ImitationVectorEnv(4, horizon="task")
    env.reset(seed=0)
    t, terminated = 0, LEFT.bool()
    while not terminated.any():
        _, _, terminated, truncated, info = env.step(LEFT)
        assert not truncated.any()
        t += 1
    assert 8 <= t <= 11
    last, at = info["final_info"], info["_final_obs"]
    assert torch.equal(at, terminated)
    assert last["true_return"][at].tolist() == [t] * int(at.sum())
    # SAME_STEP: the row has begun again, what it saw last stands apart
    assert (info["final_obs"][at][:, 2].abs() > 0.2).all()
    assert (env.observations[at].abs() <= 0.05).all()


def test_the_state_of_another_number_of_environments_is_refused():
    three, two = (gym.make_vec("advgame/GAILCartPole-v0", num_envs=n) for n in (3, 2))
    for env in (three, two):
        env.reset(seed=0)
    with pytest.raises(InputError, match="the state is of 3 environments, these are 2"):
        two.unwrapped.load_state_dict(three.unwrapped.state_dict())


def test_a_time_limit_truncates():
    env = ImitationVectorEnv(3, env_id="MountainCar-v0", horizon="task")
    env.reset(seed=0)
    for t in range(1, 201):
        _, _, terminated, truncated, info = env.step(torch.ones(3, dtype=torch.int64))
        assert not terminated.any()
        assert bool(truncated.all()) == (t == 200)
    assert info["final_info"]["true_return"].tolist() == [-200.0] * 3


def test_fixed_horizon_rests_in_the_absorbing_state():
    env = ImitationVectorEnv(4, horizon="fixed")
    env.reset(seed=0)
    fell = torch.full((4,), 501)
    for t in range(1, 501):
        seen, paid, terminated, truncated, info = env.step(LEFT)
        assert not terminated.any()
        assert bool(truncated.all()) == (t == 500)
        fell = torch.minimum(fell, torch.where(info["over"] & (fell == 501), t, fell))
        if t == 100:
            assert seen.tolist() == [[0, 0, 0, 0, 1]] * 4
            assert paid.unique().numel() == 1
            assert info["true_reward"].tolist() == [0.0] * 4
    assert 8 <= int(fell.min()) <= int(fell.max()) <= 11
    assert torch.equal(info["final_info"]["true_return"].long(), fell)
    assert torch.equal(info["final_info"]["length"].long(), fell)
    assert info["final_obs"].tolist() == [[0, 0, 0, 0, 1]] * 4
    assert not env.observations[:, -1].any()


def test_an_end_at_the_time_limit_is_an_end():
    env = ImitationVectorEnv(1, horizon="task")
    env.reset(seed=0)
    env.task.state[0] = torch.tensor([0.0, 0.0, 0.2, 3.0])  # falls in the next step
    env._clock[:] = 499
    _, _, terminated, truncated, _ = env.step(LEFT[:1])
    assert (bool(terminated), bool(truncated)) == (True, False)


def test_demonstrations_come_with_the_ids():
    env = gym.make(IDS[1]).unwrapped.core
    pairs = env.expert_pairs(env.demonstrations, torch.Generator())
    assert pairs.shape == (2000, env.code.pair_size)
    assert 0.4 < float(pairs[:, 2].mean()) < 0.6  # the expert is on the hill half of the time


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": "negative"}, "survival, cost, neutral"),
        ({"horizon": "long"}, "task or fixed"),
        ({"num_envs": 0}, "1 or above"),
        ({"discriminator": Discriminator(3)}, "pairs of this environment have 7"),
        ({"theta": torch.zeros(3)}, "theta must have shape"),
        ({"scale": (0.0, 1.0)}, r"a shift and a scale, 4 finite numbers each.*not \(0.0, 1.0\)"),
        ({"scale": torch.ones(4)}, "a shift and a scale, 4 finite numbers each"),
        ({"scale": (torch.zeros(3), torch.ones(3))}, "a shift and a scale, 4 finite numbers each"),
        ({"scale": ([0.0] * 4, ["a"] * 4)}, "a shift and a scale, 4 finite numbers each"),
        ({"scale": (torch.zeros(4), torch.zeros(4))}, "scale above 0"),
        ({"scale": (torch.zeros(4), -torch.ones(4))}, "scale above 0"),
        ({"scale": (torch.zeros(4), torch.full((4,), torch.nan))}, "scale above 0"),
        ({"scale": (torch.full((4,), torch.inf), torch.ones(4))}, "4 finite numbers"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        ImitationVectorEnv(**settings)


def test_scales_may_be_arrays_and_are_copied():
    shift, scale = np.ones(4), np.full(4, 2.0)
    env = ImitationVectorEnv(2, scale=(shift, scale))
    scale[:] = 0
    seen, _ = env.reset(seed=0)
    plain, _ = ImitationVectorEnv(2).reset(seed=0)
    assert seen.dtype == torch.float32
    assert torch.equal(seen[:, :4], (plain[:, :4] - 1) / 2)
    assert env.observation_space.contains(seen.numpy())


@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_actions_outside_a_box_are_refused_and_its_ends_are_not(end):
    env = ImitationVectorEnv(2, env_id="Pendulum-v1")
    env.reset(seed=0)
    env.step(np.full((2, 1), 2 * end))
    with pytest.raises(InputError, match=r"actions must lie in Box\(-2.0, 2.0"):
        env.step(np.full((2, 1), 2.001 * end))


@pytest.mark.parametrize("env_id", [FINE, WHOLE, HIGH])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_ends_of_a_box_of_another_type_are_inside(env_id, dtype):
    """The task is given them in its own type; it insists on that."""
    env = ImitationVectorEnv(2, env_id=env_id)
    env.reset(seed=0)
    space = env.single_action_space
    for end in (space.low, space.high):
        env.step(np.stack([end] * 2).astype(dtype))
    for outside in (1.01 * space.high, space.low - 0.01):
        with pytest.raises(InputError, match="actions must lie in Box"):
            env.step(np.stack([outside] * 2).astype(dtype))


def test_parameters_of_the_discriminator_are_finite_floats():
    """Of another type they ended in a traceback at the first step, and NaN paid NaN."""
    theta = ImitationVectorEnv(1).theta
    rewards = []
    for given in (theta, theta.double()):
        env = ImitationVectorEnv(2, theta=given)
        env.reset(seed=0)
        rewards.append(env.step(torch.zeros(2, dtype=torch.int64))[1])
    assert torch.equal(*rewards)
    for wrong in (theta[1:], theta.long(), theta * torch.nan):
        with pytest.raises(InputError, match=r"theta must have shape \(2625,\), of finite floats"):
            ImitationVectorEnv(2, theta=wrong)


def test_a_box_of_integers_pays_for_the_action_that_the_task_is_given():
    """An agent's 0.7 and the 1 that is made of it: the discriminator knows whole numbers only."""
    logits = []
    for action in (0.7, 1.0):
        env = ImitationVectorEnv(2, env_id=WHOLE)
        env.reset(seed=0)
        logits.append(env.step(np.full((2, 2), action, np.float32))[4]["logit"])
    assert torch.equal(*logits)


def test_whole_numbers_are_compared_with_a_box_as_they_are():
    env = ImitationVectorEnv(2, env_id=HIGH)
    env.reset(seed=0)
    env.step(np.ones((2, 2), np.int64))
    with pytest.raises(InputError, match="actions must lie in Box"):
        env.step(np.zeros((2, 2), np.int64))


def test_demonstrations_with_actions_outside_a_box_are_refused(tmp_path):
    """Read without the action space, they are compared with the task when they are first used."""
    env, path = ImitationVectorEnv(1, env_id="Pendulum-v1"), tmp_path / "d.npz"
    ends = np.array([False, False, True])
    for reach in (2.0, 2.5):
        actions = reach * np.array([[1.0], [-1.0], [0.0]])
        np.savez(path, observations=np.zeros((3, 3)), actions=actions, terminals=ends)
        found = Demonstrations.load(path, "Pendulum-v1")
        if reach == 2:
            assert len(env.expert_pairs(found, torch.Generator())) > 2
            continue
        with pytest.raises(InputError, match=r"actions go from -2.5 to 2.5, the task takes Box"):
            env.expert_pairs(found, torch.Generator())


def test_a_lower_time_limit_holds_for_demonstrations_too():
    env = gym.make_vec("advgame/GAILCartPole-v0", 2, max_episode_steps=200)
    pairs = env.expert_pairs(env.demonstrations.subset(2), torch.Generator())  # of 500 steps
    assert pairs.shape == (400, 7)


@pytest.mark.parametrize("horizon", ["task", "fixed"])
def test_demonstrations_beyond_the_tasks_time_limit_are_refused(horizon):
    env = ImitationVectorEnv(2, horizon=horizon)
    seen, actions = torch.zeros(600, 4), torch.zeros(600, dtype=torch.int64)
    paid = torch.full((1,), 600.0, dtype=torch.float64)
    long = Demonstrations(
        seen, actions, torch.tensor([600]), paid, torch.tensor([False]), "CartPole-v1"
    )
    with pytest.raises(InputError, match="600 steps: CartPole-v1 has a time limit of 500"):
        env.expert_pairs(long, torch.Generator())


def test_pairs_are_encoded_where_the_observations_lie():
    """The constants lie on the CPU; `meta` stands for a GPU here."""
    env = ImitationVectorEnv(2)
    assert env.code.observe(torch.zeros(3, 4, device="meta")).device.type == "meta"
    env.device = torch.device("meta")
    with pytest.raises(InputError, match="learn on the CPU"):
        GailTraining(env, None, None, None)

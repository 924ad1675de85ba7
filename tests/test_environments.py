"""Every registered environment: the checker, seeds, single equals vector, SB3, pickling."""

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.vec_env import VecMonitor

import envs
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.seeding import seeded_init
from agents.sb3 import policy_kwargs
from envs.strategy_selection import StrategySelectionEnv, StrategySelectionVectorEnv

IDS = sorted(name for name in gym.registry if name.startswith("advgame/"))
STRATEGY = "advgame/StrategySelection-v0"


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_importing_envs_registers_the_ids():
    assert STRATEGY in IDS
    assert envs.__doc__
    gym.make(f"envs:{STRATEGY}").close()


@pytest.mark.parametrize("name", IDS)
def test_checker_finds_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # CartPole's velocities have no bound, in Gymnasium's own space too
        warnings.filterwarnings("ignore", message=".*space m(in|ax)imum value is -?infinity.*")
        check_env(gym.make(name).unwrapped, skip_render_check=True)


def test_sb3_checker_finds_nothing():
    with warnings.catch_warnings():
        # it would like uint8 images or a flat action; both are as the environment documents
        warnings.filterwarnings(
            "ignore", message=".*(image|CnnPolicy|normaliz|minimal resolution).*"
        )
        check_env_sb3(gym.make(STRATEGY).unwrapped)


def test_vector_form_declares_its_autoreset():
    env = gym.make_vec(STRATEGY, num_envs=8, vectorization_mode="vector_entry_point")
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation.numpy())
    for _ in range(3):
        observation, _, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation.numpy())
        assert terminated.all()
        assert not truncated.any()
        assert info["_final_obs"].all()
    env.close()
    env.close()


def trajectory(env, seed, steps=4):
    """Everything that a seeded run returns."""
    space = env.action_space
    space.seed(5)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, reward, *_, info = env.step(space.sample())
        seen += [observation, reward, info["loss"]]
    return seen


@pytest.mark.parametrize("make", [StrategySelectionEnv, lambda: StrategySelectionVectorEnv(16)])
def test_same_seed_same_bits_in_the_same_and_in_another_environment(make):
    env = make()
    first = trajectory(env, 3)
    same(first, trajectory(env, 3))  # the defender's learning is undone
    same(first, trajectory(make(), 3))
    other = trajectory(env, 4)
    assert not all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, other, strict=True)
    )


def test_reset_without_a_seed_goes_on():
    env = StrategySelectionVectorEnv(8)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    weights = [p.clone() for p in env.defender.module.parameters()]
    shown = env.images.clone()
    assert torch.equal(env.reset()[0], shown), "no image is skipped"
    same(weights, env.defender.module.parameters())
    env.reset(seed=0)
    assert not torch.equal(weights[0], next(iter(env.defender.module.parameters())))


def test_single_environment_equals_a_vector_of_one():
    single, vector = StrategySelectionEnv(), StrategySelectionVectorEnv(1)
    first, _ = single.reset(seed=1)
    same([first], vector.reset(seed=1)[0].numpy())
    for _ in range(5):
        action = single.action_space.sample()
        _, reward, terminated, truncated, info = single.step(action)
        image, rewards, ended, cut, infos = vector.step(action[None])
        assert reward == float(rewards[0])
        assert (terminated, truncated) == (bool(ended[0]), bool(cut[0])) == (True, False)
        assert info["r1"] == float(infos["r1"][0])
        following, _ = single.reset()
        vector_next = vector.reset()[0]
        same([following], vector_next.numpy())
        del image


def test_sb3_adapter_equals_the_core():
    core, inner = StrategySelectionVectorEnv(8), StrategySelectionVectorEnv(8)
    adapter = envs.make_sb3(inner)
    adapter.seed(2)
    same([adapter.reset()], [core.reset(seed=2)[0]])
    for _ in range(4):
        played = core.images
        actions = core.action_space.sample()
        observation, reward, _, _, info = core.step(actions)
        got, rewards, dones, infos = adapter.step(actions)
        same([got, rewards], [observation, reward])
        assert dones.all()
        for i in range(8):
            assert infos[i]["r1"] == float(info["r1"][i])
            assert np.array_equal(infos[i]["terminal_observation"], played[i].numpy())
            assert infos[i]["TimeLimit.truncated"] is False


def test_sb3_learns_on_the_adapter():
    env = VecMonitor(envs.make_sb3(StrategySelectionVectorEnv(16)))
    ppo = PPO(
        "MlpPolicy",
        env,
        n_steps=2,
        batch_size=32,
        n_epochs=1,
        policy_kwargs=policy_kwargs(),
        seed=0,
    )
    ppo.learn(64)
    assert len(ppo.ep_info_buffer) > 0
    assert {ep["l"] for ep in ppo.ep_info_buffer} == {1}


def test_gymnasiums_vector_wrappers_work_on_the_numpy_form():
    env = envs.to_numpy(gym.make_vec(STRATEGY, num_envs=8))
    env = RecordEpisodeStatistics(env)
    env.reset(seed=0)
    total = np.zeros(8)
    for _ in range(3):
        observation, reward, *_, info = env.step(env.action_space.sample())
        assert isinstance(observation, np.ndarray)
        assert env.observation_space.contains(observation)
        assert (info["episode"]["l"] == 1).all()
        assert info["_r1"].all()
        total += reward
    assert sum(env.return_queue) == pytest.approx(total.sum(), rel=1e-5)


def test_a_classifier_that_does_not_fit_the_data_is_refused_at_reset(digits):
    for module, words in (
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)), r"0\.\.4"),
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Softmax(1)),
            "softmax",
        ),
    ):
        env = StrategySelectionVectorEnv(4, data=digits.train, defender=Defender(module))
        with pytest.raises(InputError, match=words):
            env.reset(seed=0)


def test_dropout_is_reproducible_and_leaves_the_global_stream_alone(digits):
    def losses():
        with seeded_init(0):
            module = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)
            )
        env = StrategySelectionVectorEnv(4, data=digits.train, defender=Defender(module))
        return trajectory(env, 0)

    torch.manual_seed(1)
    first, after = losses(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    same(first, losses())


def test_the_single_environment_shows_every_image_once():
    env = StrategySelectionEnv()
    twin = StrategySelectionVectorEnv(1)
    shown = [env.reset(seed=0)[0]]
    twin.reset(seed=0)
    for _ in range(5):
        env.step(np.zeros(3, dtype=int))
        shown.append(env.reset()[0])
    for image in shown:
        same([image], twin.images.numpy())
        twin.step(np.zeros((1, 3), dtype=int))


def test_observations_are_not_reused_buffers():
    env = StrategySelectionVectorEnv(4)
    first, _ = env.reset(seed=0)
    kept = first.clone()
    second, *_, info = env.step(env.action_space.sample())
    assert torch.equal(first, kept)
    assert torch.equal(info["final_obs"], kept)
    assert not torch.equal(second, kept)
    second.mul_(2)  # whoever writes into an observation does not write into the game
    _, *_, info = env.step(env.action_space.sample())
    assert float(info["final_obs"].max()) <= 1


def test_reward_interval_pays_every_kth_step():
    env = StrategySelectionVectorEnv(4, reward_interval=3)
    env.reset(seed=0)
    paid = []
    for _ in range(7):
        due = env.reward_due
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert due == bool(info["reward_valid"].all()) == bool(info["reward_valid"].any())
        assert due == ("r1" in info) == bool(reward.any())
        paid.append(due)
    assert paid == [False, False, True, False, False, True, False]


def test_terms_add_up_to_the_reward():
    env = StrategySelectionVectorEnv(8, credit="sample")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(env.action_space.sample())
    torch.testing.assert_close(reward, info["r1"] + info["r2"] + info["r3"])


def test_pickled_environment_goes_on_to_the_same_bits():
    env = StrategySelectionVectorEnv(8)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(4)]
    env.step(actions[0])
    twin = pickle.loads(pickle.dumps(env))
    for action in actions[1:]:
        same(env.step(action)[:2], twin.step(action)[:2])


@pytest.mark.parametrize(
    "action",
    [
        np.zeros((8, 2), int),
        np.zeros((7, 3), int),
        np.full((8, 3), 99),
        -np.ones((8, 3), int),
        np.zeros((8, 3), float),
    ],
)
def test_wrong_actions_are_refused_and_change_nothing(action):
    env = StrategySelectionVectorEnv(8)
    env.reset(seed=0)
    before = env.images.clone()
    with pytest.raises(InputError):
        env.step(action)
    assert torch.equal(env.images, before)
    assert env.steps == 0


def test_other_misuse_is_refused():
    with pytest.raises(InputError, match=r"Defender\(module, lr=0.1\), not a Linear"):
        StrategySelectionVectorEnv(8, defender=torch.nn.Linear(1, 1))
    with pytest.raises(gym.error.ResetNeeded):
        StrategySelectionVectorEnv(4).step(np.zeros((4, 3), int))
    single = StrategySelectionEnv()
    single.reset(seed=0)
    with pytest.raises(InputError):
        single.step(np.array([0, 0, 77]))
    with pytest.raises(InputError, match="one integer seed"):
        StrategySelectionVectorEnv(2).reset(seed=[1, 2])
    for bad in ({"num_envs": 0}, {"reward_interval": -1}, {"credit": "mine"}):
        with pytest.raises(InputError):
            StrategySelectionVectorEnv(**bad)
    with pytest.raises(InputError, match="SB3"):
        envs.make_sb3(StrategySelectionVectorEnv(4, reward_interval=5))


def test_state_goes_on_to_the_same_bits():
    env = StrategySelectionVectorEnv(8)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(6)]
    for action in actions[:3]:
        env.step(action)
    weights = {k: v.clone() for k, v in env.defender.module.state_dict().items()}
    state = pickle.loads(pickle.dumps(env.state_dict()))
    want = [env.step(action)[1] for action in actions[3:]]
    twin = StrategySelectionVectorEnv(8)
    twin.reset(seed=9)
    twin.defender.module.load_state_dict(weights)
    twin.load_state_dict(state)
    same(want, [twin.step(action)[1] for action in actions[3:]])

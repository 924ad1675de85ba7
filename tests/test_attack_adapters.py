"""The attack environments in SB3 and in Gymnasium's wrappers, and the shipped classifier."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from attack_environment_parts import BOTH_ENDS, EASY, IDS, VECTORS, same
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.vec_env import VecMonitor

from advgame.attacks.gradient_steps import Menu
from advgame.errors import InputError
from advgame.targets import shipped
from envs import make_sb3, to_numpy
from envs.attack import AttackVectorEnv


@pytest.mark.parametrize("name", IDS)
def test_sb3_checker_finds_nothing(name):
    with warnings.catch_warnings():
        # it would like a flat action; the environment's is as documented
        warnings.filterwarnings("ignore", message=".*(normaliz|MultiDiscrete).*")
        check_env_sb3(gym.make(name).unwrapped)


@pytest.mark.parametrize("kind", VECTORS)
def test_sb3_adapter_shows_new_images_at_once_and_old_ones_as_terminal(kind):
    core, inner = (kind(16, **BOTH_ENDS[kind]) for _ in range(2))
    core.action_space.seed(0)
    adapter = make_sb3([inner])
    adapter.seed(2)
    same([adapter.reset()], [core.reset(seed=2)[0]])
    ends = [0, 0]
    for _ in range(12):
        actions = core.action_space.sample()
        last, reward, terminated, truncated, info = core.step(actions)
        margins = info["margin"]
        seen, rewards, dones, infos = adapter.step(actions)
        same([rewards, dones], [reward, terminated | truncated])
        fresh = core.restart()  # the core's own way to the adapter's
        same([seen], [fresh])
        for i in range(16):
            assert infos[i]["margin"] == float(margins[i])
            assert infos[i]["TimeLimit.truncated"] is False, "SB3 would add what it expects beyond"
            assert ("terminal_observation" in infos[i]) == bool(dones[i])
            if dones[i]:
                assert np.array_equal(infos[i]["terminal_observation"], last[i].numpy())
                assert not np.array_equal(seen[i], last[i].numpy())
        ends[0] += int((terminated & info["fooled"]).sum())
        ends[1] += int((terminated & ~info["fooled"]).sum())
    assert min(ends) > 3


def test_sb3_adapter_joins_several_classifiers():
    cores = [AttackVectorEnv(4, queries=3), AttackVectorEnv(6, queries=3, threat=EASY)]
    adapter = make_sb3(cores)
    adapter.seed(0)
    assert adapter.reset().shape == (10, cores[0].single_observation_space.shape[0])
    for _ in range(4):
        actions = np.stack([adapter.action_space.sample() for _ in range(10)])
        seen, rewards, dones, infos = adapter.step(actions)
        assert len(seen) == len(rewards) == len(dones) == len(infos) == 10
    assert [t.eps for t in adapter.get_attr("threat")] == [0.15] * 4 + [0.3] * 6
    adapter.set_attr("price", 0.5, indices=[9])
    assert [core.price for core in cores] == [0.01, 0.5]
    with pytest.raises(InputError, match="equal spaces"):
        make_sb3([cores[0], AttackVectorEnv(4, menu=Menu(losses=("ce",)))])


def test_sb3_learns_on_the_adapter():
    env = VecMonitor(make_sb3([AttackVectorEnv(16, queries=3)]))
    ppo = PPO("MlpPolicy", env, n_steps=4, batch_size=32, n_epochs=1, seed=0)
    ppo.learn(128)
    assert len(ppo.ep_info_buffer) > 0
    assert max(ep["l"] for ep in ppo.ep_info_buffer) == 2


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("integer", [np.uint8, np.int16, np.int32])
def test_actions_are_integers_of_any_type(kind, integer):
    core, adapter = kind(4, queries=np.int64(5)), make_sb3([kind(4, queries=5)])
    core.reset(seed=0)
    adapter.seed(0)
    adapter.reset()
    actions = np.zeros((4, len(core.sizes)), integer)
    for _ in range(3):
        _, reward, *_ = core.step(actions)
        assert np.array_equal(adapter.step(actions)[1], reward.numpy())
        core.restart()


def test_sb3_adapter_takes_images_too():
    adapter = make_sb3([AttackVectorEnv(n, queries=3, images=True) for n in (2, 3)])
    seen = adapter.reset()
    for _ in range(3):
        assert seen["clean"].shape == seen["adversarial"].shape == (5, 1, 8, 8)
        assert len(seen["features"]) == 5
        seen, _, dones, infos = adapter.step(np.zeros((5, 5), int))
        for i in np.flatnonzero(dones):
            assert infos[i]["terminal_observation"]["clean"].shape == (1, 8, 8)


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_vector_wrappers_work_on_the_numpy_form(name):
    env = RecordEpisodeStatistics(to_numpy(gym.make_vec(name, num_envs=8, queries=4)))
    env.reset(seed=0)
    for _ in range(9):
        observation, *_ = env.step(env.action_space.sample())
        assert isinstance(observation, np.ndarray)
        assert env.observation_space.contains(observation)
    assert len(env.length_queue) >= 8
    assert max(env.length_queue) == 3


def test_the_shipped_classifier_is_what_its_story_says(digits):
    frozen = shipped()
    right = frozen.model(digits.test.floats()).argmax(1) == digits.test.labels
    assert float(right.float().mean()) == pytest.approx(0.992, abs=0.003)
    assert replace(frozen.threat, eps=0.15) == frozen.threat

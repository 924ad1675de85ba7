"""What Gymnasium and Stable-Baselines3 hand to the ids themselves, and their wrappers."""

import itertools
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers
from stable_baselines3.common.env_util import make_vec_env

import envs
from advgame.attacks.gradient_steps import Menu
from advgame.errors import InputError
from advgame.imitation.recording import record
from envs.imitation import ImitationVectorEnv
from envs.strategy_selection import StrategySelectionEnv

IDS = sorted(name for name in gym.registry if name.startswith("advgame/"))
MAKERS = {"make": gym.make, "make_vec": lambda name, **more: gym.make_vec(name, 2, **more)}
LATER = AutoresetMode.NEXT_STEP


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_own_arguments(name, maker):
    env = maker(name, render_mode=None, max_episode_steps=None)
    assert env.render_mode is None
    env.reset(seed=3, options={})
    with pytest.raises(InputError, match=r"no options here.*reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium says so, too
        for mode in ("ansi", "human"):
            if (maker, mode) != (gym.make, "human"):  # of which Gymnasium makes a window
                with pytest.raises(InputError, match='must be "rgb_array" or left out'):
                    maker(name, render_mode=mode)


@pytest.mark.parametrize("name", IDS)
def test_a_time_limit_of_gymnasiums_and_stable_baselines_own_maker(name):
    if "GAIL" in name:
        env = gym.make_vec(name, 2, max_episode_steps=3)
        env.reset(seed=0)
        ends = [env.step(env.action_space.sample())[3].tolist() for _ in range(6)]
        assert ends == [[False] * 2, [False] * 2, [True] * 2] * 2
        assert gym.make_vec(name, 2, max_episode_steps=999).task.horizon < 999
        for wrong in (0, "10"):
            with pytest.raises(InputError, match="max_episode_steps must be a whole number"):
                gym.make_vec(name, 2, max_episode_steps=wrong)
    else:
        words = "max_episode_steps=3 has no effect on the vector form"
        with pytest.raises(InputError, match=words):
            gym.make_vec(name, 2, max_episode_steps=3)
    env = gym.make(name, max_episode_steps=1)
    env.reset(seed=0)
    *_, terminated, truncated, _ = env.step(env.action_space.sample())
    assert terminated or truncated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = make_vec_env(name, 1, seed=0)
    env.reset()
    env.step(np.array([env.action_space.sample()]))
    env.close()


@pytest.mark.parametrize("name", [name for name in IDS if "GAIL" in name])
def test_another_task_through_an_id_has_its_own_time_limit(name):
    settings = {"env_id": "MountainCarContinuous-v0", "horizon": "task"}
    assert gym.make_vec(name, 2, **settings).task.horizon == 999
    env = gym.make(name, **settings)
    env.reset(seed=0)
    lengths = itertools.takewhile(lambda _: not env.step(np.zeros(1, np.float32))[3], range(2000))
    assert len(list(lengths)) + 1 == 999


def test_single_strategy_environments_side_by_side_are_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the one before is closed
            env = StrategySelectionEnv()
            env.reset()
            env.reset()
            env.close()
    kinds = {
        "Stable-Baselines3": lambda: make_vec_env(IDS[-1], 2),
        "Gymnasium": lambda: gym.make_vec(IDS[-1], 2, vectorization_mode="sync"),
    }
    assert IDS[-1] == "advgame/StrategySelection-v0"
    for make in kinds.values():
        env = make()
        with pytest.warns(UserWarning, match=r"a classifier of its own, on batches of one image"):
            env.reset()
        env.close()


def test_a_tasks_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "a_strangers_tasks.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('theirs/Swing-v3', max_episode_steps=40,\n"
        "    entry_point='gymnasium.envs.classic_control.acrobot:AcrobotEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "a_strangers_tasks:theirs/Swing-v3"
    try:
        env = ImitationVectorEnv(2, env_id=name)
        assert env.task.horizon == 40
        found = record(lambda seen: 1, name, seed=0, episodes=1)
        assert env.expert_pairs(found, None).shape[0] == 40
    finally:
        sys.modules.pop("a_strangers_tasks", None)
        gym.registry.pop("theirs/Swing-v3", None)
    assert ImitationVectorEnv(2, env_id="gymnasium:CartPole-v1").demonstrations is not None
    for bad in ("no_such_module:Swing-v3", "gymnasium:Swing-v3", "a:b:Swing-v3"):
        with pytest.raises(InputError, match="cannot make"):
            ImitationVectorEnv(2, env_id=bad)


def halved(array):
    return array * np.float32(0.5)


# how each of Gymnasium's vector wrappers is made; what is not here does not fit a Box or draws
WRAPPERS = {
    "ClipReward": {"max_reward": 0.1},
    "DictInfoToList": {},
    "DtypeObservation": {"dtype": np.float64},
    "FlattenObservation": {},
    "NormalizeObservation": {},
    "NormalizeReward": {},
    "RecordEpisodeStatistics": {},
    "RescaleObservation": {"min_obs": 0.0, "max_obs": 2.0},
    "ReshapeObservation": {"shape": (1, -1)},
    "TransformAction": {"func": lambda actions: actions},
    "TransformObservation": {"func": halved},
    "TransformReward": {"func": halved},
    "VectorizeTransformReward": {
        "wrapper": gym.wrappers.TransformReward,
        "func": lambda reward: 0.5 * reward,
    },
    "VectorizeTransformObservation": {
        "wrapper": gym.wrappers.TransformObservation,
        "func": halved,
        "observation_space": None,
    },
}
# those that ask for something of an environment, and the settings that give it
ON_REQUEST = {
    "ClipAction": ({}, {"continuous": True}),
    "RescaleAction": ({"min_action": 0.0, "max_action": 1.0}, {"continuous": True}),
    "VectorizeTransformAction": ({"wrapper": gym.wrappers.ClipAction}, {"continuous": True}),
    "FilterObservation": ({"filter_keys": ["features", "clean"]}, {"images": True}),
}
NOT_HERE = {
    "GrayscaleObservation": "colour pictures",
    "ResizeObservation": "pictures of bytes",
    "RecordVideo": "tests/test_pictures.py",
    "HumanRendering": "tests/test_pictures.py",
    "ArrayConversion": "other libraries",
    "JaxToNumpy": "other libraries",
    "JaxToTorch": "other libraries",
    "NumpyToTorch": "other libraries",
}


def test_every_wrapper_of_gymnasiums_is_known():
    assert {*WRAPPERS, *ON_REQUEST, *NOT_HERE} == set(wrappers.__all__)
    assert {*SINGLE, *SINGLE_ON_REQUEST, *SINGLE_NOT_HERE} == set(gym.wrappers.__all__)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_vector_wrappers_work_on_arrays(name, wrapper):
    env = envs.to_numpy(gym.make_vec(name, 3), autoreset_mode=LATER)
    settings = dict(WRAPPERS[wrapper])
    if wrapper == "ReshapeObservation":
        settings["shape"] = (1, int(np.prod(env.single_observation_space.shape)))
    if wrapper == "RescaleObservation" and not env.single_observation_space.is_bounded():
        pytest.skip("CartPole's velocities have no bound")
    wrapped = getattr(wrappers, wrapper)(env, **settings)
    seen, _ = wrapped.reset(seed=0)
    for _ in range(6):
        assert isinstance(seen, np.ndarray)
        assert seen.shape == wrapped.observation_space.shape
        seen, rewards, terminated, truncated, _ = wrapped.step(wrapped.action_space.sample())
        for one in (rewards, terminated, truncated):
            assert isinstance(one, np.ndarray)
            assert one.shape == (3,)
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("wrapper", ON_REQUEST)
def test_vector_wrappers_that_ask_for_more(wrapper):
    settings, form = ON_REQUEST[wrapper]
    env = envs.to_numpy(gym.make_vec("advgame/Attack-v0", 3, **form))
    wrapped = getattr(wrappers, wrapper)(env, **settings)
    seen, _ = wrapped.reset(seed=0)
    assert wrapped.observation_space.contains(seen)
    for _ in range(3):
        seen, rewards, *_ = wrapped.step(wrapped.action_space.sample())
        assert wrapped.observation_space.contains(seen)
        assert rewards.shape == (3,)


# the same of its wrappers of single environments
SINGLE = {
    "Autoreset": {},
    "ClipReward": {"max_reward": 0.1},
    "DelayObservation": {"delay": 1},
    "DtypeObservation": {"dtype": np.float64},
    "FlattenObservation": {},
    "FrameStackObservation": {"stack_size": 2},
    "NormalizeObservation": {},
    "NormalizeReward": {},
    "OrderEnforcing": {},
    "PassiveEnvChecker": {},
    "RecordEpisodeStatistics": {},
    "RepeatAction": {"num_repeats": 2},
    "ReshapeObservation": {"shape": (1, -1)},
    "StickyAction": {"repeat_action_probability": 0.5},
    "TimeAwareObservation": {},
    "TimeLimit": {"max_episode_steps": 2},
    "TransformAction": {"func": lambda action: action, "action_space": None},
    "TransformObservation": {"func": halved, "observation_space": None},
    "TransformReward": {"func": halved},
}
SINGLE_ON_REQUEST = {
    **ON_REQUEST,
    "DiscretizeAction": ({"bins": 3}, {"continuous": True, "menu": Menu(losses=("ce",))}),
    "RescaleObservation": ({"min_obs": np.float32(0), "max_obs": np.float32(1)}, {}),
    "AddRenderObservation": ({}, {"render_mode": "rgb_array"}),
    "RenderCollection": ({}, {"render_mode": "rgb_array"}),
}
del SINGLE_ON_REQUEST["VectorizeTransformAction"]
SINGLE_NOT_HERE = {
    **NOT_HERE,
    "AddWhiteNoise": "observations that are pictures",
    "AtariPreprocessing": "Atari",
    "DiscretizeObservation": "few entries",
    "MaxAndSkipObservation": "pictures that flicker",
    "ObstructView": "observations that are pictures",
    "vector": "the wrappers above",
}


@pytest.mark.filterwarnings("ignore:.*several single")
@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_wrappers_work_on_the_single_form(name):
    made = gym.make(name)
    for wrapper, given in SINGLE.items():
        settings = dict(given)
        if wrapper == "ReshapeObservation":
            settings["shape"] = (1, int(np.prod(made.observation_space.shape)))
        env = made
        if wrapper == "TimeAwareObservation" and made.spec.max_episode_steps is None:
            env = gym.make(name, max_episode_steps=5)  # it asks for a time limit
        play_single(getattr(gym.wrappers, wrapper)(env, **settings))


@pytest.mark.parametrize("wrapper", SINGLE_ON_REQUEST)
def test_wrappers_that_ask_for_more(wrapper):
    settings, form = SINGLE_ON_REQUEST[wrapper]
    play_single(getattr(gym.wrappers, wrapper)(gym.make("advgame/Attack-v0", **form), **settings))


def play_single(env):
    seen, _ = env.reset(seed=0)
    for _ in range(3):
        assert env.observation_space.contains(seen)
        seen, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isscalar(reward)
        if terminated or truncated:
            seen, _ = env.reset()


def episodes(env, steps, later):
    """What each row went through: observations, actions and rewards, an episode after the other."""
    rows = [[[]] for _ in range(env.num_envs)]
    seen, _ = env.reset(seed=0)
    ended = np.zeros(env.num_envs, dtype=bool)
    for _ in range(steps):
        played = ~ended if later else np.ones_like(ended)
        actions = np.ones(env.num_envs, dtype=int)
        following, rewards, terminated, truncated, info = env.step(actions)
        ended = terminated | truncated
        for i in played.nonzero()[0]:
            last = info["final_obs"][i] if ended[i] and not later else following[i]
            rows[i][-1].append((*seen[i], int(actions[i]), float(rewards[i]), *last))
            if ended[i]:
                rows[i].append([])
        assert later or not ended.any() or "final_info" in info
        if later:
            assert not rewards[~played].any()
            assert not ended[~played].any()
        seen = following
    return rows


@pytest.mark.parametrize("stagger", [False, True])
def test_a_postponed_autoreset_keeps_the_rules_of_an_episode(stagger):
    """Rows end at different steps; no step is lost to the reset, and none is paid for it."""
    core = ImitationVectorEnv(3, horizon="task", stagger=stagger)
    env = envs.to_numpy(core, autoreset_mode=LATER)
    rows = episodes(env, 60, later=True)
    lengths = {len(one) for row in rows for one in row[:-1]}
    assert len(lengths) > 1
    for row in rows:
        assert len(row) > 2
        for one in row[:-1]:
            for step, following in itertools.pairwise(one):
                assert step[-4:] == following[:4], "each begins where the last one ended"
            assert max(abs(value) for value in one[0][:4]) <= 0.05, "an episode's first state"
            assert abs(one[-1][-2]) > 12 * 2 * np.pi / 360 or abs(one[-1][-4]) > 2.4


def test_the_first_episode_is_the_same_under_either_autoreset():
    firsts = []
    for mode in (None, LATER):
        env = envs.to_numpy(ImitationVectorEnv(3, horizon="task"), autoreset_mode=mode)
        assert env.metadata["autoreset_mode"] == (mode or AutoresetMode.SAME_STEP)
        firsts.append([row[0] for row in episodes(env, 60, later=mode is not None)])
    assert firsts[0] == firsts[1]


def test_an_autoreset_that_an_environment_has_not_is_refused():
    with pytest.raises(InputError, match=r"must be AutoresetMode.NEXT_STEP here, not"):
        envs.to_numpy(gym.make_vec("advgame/Attack-v0", 2), autoreset_mode=AutoresetMode.SAME_STEP)

"""A trained imitator loads back: the same actions, SB3's form, nothing unpickled."""

import json
from math import inf

import gymnasium
import numpy as np
import pytest
import torch
import train_gail
from box_tasks import FINE, HIGH, WHOLE
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from advgame.errors import InputError
from advgame.imitation import Demonstrations, record
from advgame.run.checkpoint import save_weights
from agents import Imitator, load_policy
from agents.gail import dummy_expert, random_policy
from agents.settings import PolicySettings
from envs.imitation import ImitationVectorEnv

TINY = {"iterations": 2, "evaluate_every": 2, "episodes": 4, "envs": 4, "n_steps": 16}


@pytest.fixture(autouse=True)
def _no_resemblance(monkeypatch):
    monkeypatch.setattr(train_gail, "resembles", lambda *_: {})


def made(tmp_path, env_id, horizon="fixed", hidden=(8, 8)):
    """An untrained imitator and the file of its weights."""
    env = ImitationVectorEnv(3, env_id=env_id, horizon=horizon)
    imitator = Imitator(env, 0, PolicySettings(n_steps=16, hidden=hidden))
    save_weights(imitator.module, tmp_path / "w.safetensors")
    return env, imitator


def test_equal_weights_are_equal_bytes(tmp_path):
    _, imitator = made(tmp_path, "CartPole-v1")
    written = set()
    for _ in range(8):  # safetensors has a file's words in another order each time
        save_weights(imitator.module, tmp_path / "w.safetensors")
        written.add((tmp_path / "w.safetensors").read_bytes())
    assert len(written) == 1
    held = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(held[name], one) for name, one in imitator.policy.state_dict().items())


@pytest.mark.parametrize(
    ("env_id", "horizon", "hidden"),
    [
        ("CartPole-v1", "fixed", (8, 8)),
        ("MountainCar-v0", "task", (8,)),
        ("Pendulum-v1", "fixed", (4, 5, 6)),
        ("Pendulum-v1", "task", ()),
    ],
)
def test_it_acts_as_the_imitator_did(env_id, horizon, hidden, tmp_path):
    env, imitator = made(tmp_path, env_id, horizon, hidden)
    policy = load_policy(tmp_path / "w.safetensors")
    env.reset(seed=0)
    raw = env.task.observe() * 3
    expected = imitator.act(env.code.observe(raw), deterministic=True)
    assert torch.equal(policy.act(raw), expected)
    assert np.array_equal(policy.act(raw.numpy()), expected.numpy())
    assert np.array_equal(policy.act(raw[0].double().numpy()), expected[0].numpy())
    drawn, mean = [], []
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        drawn.append(policy.act(raw, deterministic=False, rng=rng))
        mean.append(imitator.act(env.code.observe(raw), deterministic=False))
    drawn, mean = (torch.stack(one).double() for one in (drawn, mean))
    torch.testing.assert_close(drawn.mean(0), mean.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(drawn.std(0), mean.std(0), atol=0.25, rtol=0)
    rng = torch.Generator().manual_seed(seed)
    assert torch.equal(policy.act(raw, deterministic=False, rng=rng).double(), drawn[-1])


@pytest.mark.slow
def test_a_run_loads_back_and_sb3s_evaluation_finds_the_reported_return(tmp_path):
    words = {"source": "cloning", "episodes": 8, "runs_dir": str(tmp_path), "name": "run"}
    run = train_gail.job.run(train_gail.Config(**words))
    policy = load_policy(run.path)
    assert run.report()["eval/return"] == 500
    found = evaluate_policy(policy, gymnasium.make("CartPole-v1"), 3, warn=False)
    assert found == (500, 0)
    envs = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    assert evaluate_policy(policy, envs, 2, warn=False) == (500, 0)
    assert record(policy.act, "CartPole-v1", seed=0, episodes=1).returns.tolist() == [500]


def test_last_and_best_and_every_control(tmp_path):
    settings = {**TINY, "runs_dir": str(tmp_path), "name": "run", "iterations": 6}
    folder = train_gail.job.run(train_gail.Config(**settings, source="true")).path
    seen = np.zeros(4)
    for which in ("last", "best"):
        policy = load_policy(str(folder), which)
        again = load_policy(folder / "checkpoints" / f"{which}.safetensors")
        assert torch.equal(policy(torch.zeros(1, 4)), again(torch.zeros(1, 4)))
        assert policy.predict(seen)[0].shape == ()
    path = tmp_path / "pendulum.npz"
    dummy_expert(ImitationVectorEnv(1, env_id="Pendulum-v1"), 1, seed=0).save(path)
    words = {**TINY, "env": "Pendulum-v1", "demonstrations": str(path), "trajectories": 1}
    folder = train_gail.job.run(train_gail.Config(**words, runs_dir=str(tmp_path), name="p")).path
    pendulum = gymnasium.make("Pendulum-v1")
    mean, _ = evaluate_policy(load_policy(folder), pendulum, 2, warn=False)
    assert -2000 < mean < 0


@pytest.mark.parametrize("env_id", [FINE, WHOLE, HIGH])
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_are_of_the_tasks_box_and_type(env_id, deterministic, tmp_path):
    env, imitator = made(tmp_path, env_id)
    policy, space = load_policy(tmp_path / "w.safetensors"), env.single_action_space
    assert policy.action_space == space

    def act(seen):
        return policy.act(50 * seen, deterministic=deterministic)

    for action in act(np.random.default_rng(0).normal(size=(40, 3))):
        assert space.contains(action)
        assert action.dtype == space.dtype
    expert = record(act, env_id, 0, 2)  # the task insists on it, too
    assert expert.lengths.tolist() == [6, 6]
    expert.save(tmp_path / "d.npz")
    assert len(Demonstrations.load(tmp_path / "d.npz", env_id, space)) == 2
    env.reset(seed=0)
    env.step(imitator.act(50 * env.observations, deterministic=deterministic))


def test_a_policy_saved_without_its_type_has_float32(tmp_path):
    made(tmp_path, FINE)
    metadata = _metadata(tmp_path / "w.safetensors")
    task = json.loads(metadata["task"])
    for dtype in (None, "object", "no type"):
        about = {**task, "dtype": dtype}
        if dtype is None:
            del about["dtype"]
        words = {**metadata, "task": json.dumps(about)}
        save_file(load_file(tmp_path / "w.safetensors"), tmp_path / "old", words)
        if dtype:
            with pytest.raises(InputError, match="damaged or of another version"):
                load_policy(tmp_path / "old")
        else:
            assert load_policy(tmp_path / "old").act(np.zeros(3)).dtype == np.float32


def test_reversed_observations_are_taken(tmp_path):
    made(tmp_path, "CartPole-v1")
    policy = load_policy(tmp_path / "w.safetensors")
    seen = np.random.default_rng(0).normal(size=(30, 4))
    assert np.array_equal(policy.act(seen[::-1]), policy.act(seen)[::-1])


def test_the_dummy_expert_takes_the_nearest_to_0_that_a_box_holds():
    env = ImitationVectorEnv(2, env_id=HIGH)
    expert = dummy_expert(env, 2, seed=0)
    assert expert.actions.unique().tolist() == [0.5]
    assert len(env.expert_pairs(expert, torch.Generator())) == 12


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (np.zeros(5), r"CartPole-v1 gives finite observations \(4,\), or \(B, 4\)"),
        (np.zeros((2, 3, 4)), r"not \(2, 3, 4\)"),
        (np.full(4, np.nan), "values such as nan"),
        (np.zeros(()), r"not \(\)"),
    ],
)
def test_other_observations_are_refused(seen, words, tmp_path):
    made(tmp_path, "CartPole-v1")
    with pytest.raises(InputError, match=words):
        load_policy(tmp_path / "w.safetensors").act(seen)


def test_what_is_no_policy_is_refused_in_words(tmp_path):
    path = tmp_path / "w.safetensors"
    made(tmp_path, "CartPole-v1")
    weights, metadata = load_file(path), load_policy(path) and _metadata(path)
    for name, content, words, answer in (
        ("a", weights, None, "holds no policy of train_gail.py: it says None"),
        ("b", weights, {**metadata, "task": "{"}, "damaged or of another version"),
        ("c", {"x": torch.zeros(1)}, metadata, "damaged or of another version"),
        ("d", {**weights, "action_net.bias": torch.full((2,), torch.nan)}, metadata, "NaN or inf"),
        ("e", {**weights, "action_net.bias": torch.zeros(3)}, metadata, "damaged"),
    ):
        save_file(content, tmp_path / name, words)
        with pytest.raises(InputError, match=answer):
            load_policy(tmp_path / name)
    torch.save({}, tmp_path / "f")
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_policy(tmp_path / "f")
    with pytest.raises(InputError, match="no weights file"):
        load_policy(tmp_path / "g")
    with pytest.raises(InputError, match=r"has no last weights yet: is it a run of train_gail"):
        load_policy(tmp_path)
    with pytest.raises(InputError, match="last or best"):
        load_policy(tmp_path, "first")


def _metadata(path):
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("ends", "low", "high"),
    [((0, inf), 0, 1), ((-inf, 0), -1, 0), ((-inf, inf), -1, 1), ((2, 5), 2, 5)],
)
def test_a_box_without_an_end_is_sampled_near_the_other(ends, low, high):
    drawn = random_policy(spaces.Box(*ends, (1,), np.float32))(torch.zeros(2000, 1))
    assert low <= drawn.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < drawn.max() <= high


def test_a_box_of_integers_is_sampled_evenly():
    """Its ends as often as the others, also where their distance is none of its numbers."""
    drawn = random_policy(spaces.Box(-1, 1, (1,), np.int64))(torch.zeros(3000, 1))
    assert [int((drawn == one).sum()) for one in (-1, 0, 1)] == pytest.approx([1000] * 3, abs=100)
    wide = random_policy(spaces.Box(-128, 127, (1,), np.int8))(torch.zeros(3000, 1))
    assert wide.min() == -128
    assert wide.max() == 127
    assert abs(wide.mean()) < 5

"""Tasks under imitation: dynamics, starts and ends are Gymnasium's."""

import sys

import gymnasium as gym
import pytest
import torch

from advgame.errors import InputError
from envs.tasks import NATIVE, GymnasiumTask, make_task, play


@pytest.mark.parametrize("env_id", NATIVE)
def test_dynamics_are_gymnasiums(env_id, rng):
    """100 steps of random actions from 20 starts, through ends and walls, to the last digits."""
    rows = 20
    task = make_task(env_id, rows)
    live = torch.ones(rows, dtype=torch.bool)
    task.reset(live, rng)
    peers = [gym.make(env_id, max_episode_steps=-1).unwrapped for _ in range(rows)]
    for row, peer in enumerate(peers):
        peer.reset(seed=0)
        peer.state = task.state[row].numpy().copy()
    actions = task.action_space.n
    ended = 0
    for t in range(100):
        # long pushes to one side reach the left wall, too
        chosen = torch.randint(actions, (rows,), generator=rng) if t % 50 > 20 else live.long() * 0
        rewards, over, _ = task.step(chosen, live)
        for row, peer in enumerate(peers):
            if not live[row]:
                continue
            seen, reward, terminated, _, _ = peer.step(int(chosen[row]))
            assert torch.allclose(task.observe()[row], torch.as_tensor(seen), atol=1e-6)
            assert (float(rewards[row]), bool(over[row])) == (reward, terminated)
        ended += int(over.sum())
        live = live & ~over
    assert ended == (20 if env_id == "CartPole-v1" else 0)


def test_the_car_reaches_the_hill_as_gymnasiums():
    task, peer = make_task("MountainCar-v0", 1), gym.make("MountainCar-v0").unwrapped
    peer.reset(seed=0)
    task.state = torch.as_tensor(peer.state)[None]
    t, terminated = 0, False
    while not terminated and t < 200:
        t += 1
        push = 2 if peer.state[1] >= 0 else 0  # with the motion: gathers energy
        _, over, _ = task.step(torch.tensor([push]), torch.tensor([True]))
        _, _, terminated, _, _ = peer.step(push)
        assert bool(over[0]) == terminated
    assert 80 < t < 199


def test_the_left_wall_stops_the_car_as_gymnasiums():
    task, peer = make_task("MountainCar-v0", 1), gym.make("MountainCar-v0").unwrapped
    peer.reset(seed=0)
    peer.state = (-1.19, -0.05)
    task.state = torch.tensor([[-1.19, -0.05]], dtype=torch.float64)
    for _ in range(3):
        task.step(torch.tensor([0]), torch.tensor([True]))
        seen = peer.step(0)[0]
        assert torch.allclose(task.observe()[0], torch.as_tensor(seen), atol=1e-7)
        assert seen[0] == pytest.approx(-1.2, abs=0.01)


@pytest.mark.parametrize("env_id", NATIVE)
def test_starts_are_gymnasiums(env_id, rng):
    task = make_task(env_id, 4000)
    task.reset(torch.ones(4000, dtype=torch.bool), rng)
    peer = gym.make(env_id)
    starts = torch.stack([torch.as_tensor(peer.reset(seed=s)[0]) for s in range(400)])
    for extreme in (torch.amin, torch.amax):
        assert torch.allclose(extreme(task.observe(), 0), extreme(starts, 0), atol=2e-3)
    assert torch.allclose(task.observe().mean(0), starts.mean(0), atol=1e-2)


def test_a_module_that_is_named_is_imported():
    with pytest.raises(InputError, match="cannot make 'no_such_module:CartPole-v1'"):
        make_task("no_such_module:CartPole-v1", 1)
    assert isinstance(make_task("gymnasium:CartPole-v1", 1), GymnasiumTask)


def test_rows_that_are_over_stay_where_they_are(rng):
    task = make_task("CartPole-v1", 2)
    task.reset(torch.tensor([True, True]), rng)
    before = task.observe()
    rewards, _, _ = task.step(torch.tensor([1, 1]), torch.tensor([True, False]))
    assert rewards.tolist() == [1, 0]
    assert torch.equal(task.observe()[1], before[1])
    assert not torch.equal(task.observe()[0], before[0])
    task.reset(torch.tensor([False, True]), rng)
    assert not torch.equal(task.observe()[1], before[1])


def test_play_counts_until_each_episode_ends(rng):
    found = play("CartPole-v1", lambda raw: torch.zeros(len(raw)).long(), 50, torch.Generator())
    assert torch.equal(found["returns"], found["lengths"])
    assert 8 <= found["returns"].min() <= found["returns"].max() <= 11
    for limit, steps in ((None, 200), (7, 7)):
        found = play("MountainCar-v0", lambda raw: torch.ones(len(raw)).long(), 5, rng, limit)
        assert found["returns"].tolist() == [-steps] * 5


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "Pendulum-v1"])
def test_any_gymnasium_environment_plays(env_id, rng):
    task = make_task(env_id, 3)
    assert isinstance(task, GymnasiumTask)
    task.reset(torch.ones(3, dtype=torch.bool), rng)
    box = not hasattr(task.action_space, "n")
    actions = torch.full((3, 1), 0.5) if box else torch.tensor([0, 1, 2])
    before = task.observe()
    rewards, over, _ = task.step(actions, torch.tensor([True, True, False]))
    assert rewards[2] == 0
    assert rewards[0] < 0
    assert not over.any()
    assert torch.equal(task.observe()[2], before[2])
    peer = gym.make(env_id, max_episode_steps=-1)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(before[0], torch.as_tensor(peer.reset(seed=seed)[0]).float())


def test_a_task_of_ones_own_may_lie_in_the_present_folder(tmp_path, monkeypatch):
    """As what is named by ``--model``: a command does not search that folder otherwise."""
    (tmp_path / "own_task.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('Own-v0', CartPoleEnv, max_episode_steps=9)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert make_task("own_task:Own-v0", 1).horizon == 9
    assert sys.path == before


def test_tasks_that_cannot_be_imitated():
    with pytest.raises(InputError, match="cannot make 'Nowhere-v0'"):
        make_task("Nowhere-v0", 1)
    with pytest.raises(InputError, match="observations"):
        make_task("FrozenLake-v1", 1)

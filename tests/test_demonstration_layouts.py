"""Demonstrations in the layouts of D4RL, `imitation` and Minari: the same episodes, or refused."""

import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_demonstrations import Bomb, assert_same

from advgame.errors import InputError
from advgame.imitation import Demonstrations

TASK, CHOICES = "Some/Task-v3", spaces.Discrete(3)
FORCES = spaces.Box(-2, 2, (1,))
LENGTHS = np.array([2, 1, 3])
SEEN = np.random.default_rng(0).normal(size=(6, 4))
ACTED = np.array([0, 1, 1, 0, 2, 1])
PAID = np.array([1.0, 1, 1, 0.5, 1, 2])
OVER, CUT = np.array([0, 1, 0, 0, 0, 1]), np.array([0, 0, 1, 0, 0, 0])


def episodes(actions=None):
    """Three episodes of 2, 1 and 3 transitions; the second reaches its time limit."""
    return Demonstrations(
        torch.from_numpy(SEEN).float(),
        torch.from_numpy(ACTED) if actions is None else actions,
        torch.from_numpy(LENGTHS),
        torch.tensor([2.0, 1.0, 3.5], dtype=torch.float64),
        torch.tensor([True, False, True]),
        TASK,
    )


def d4rl(**changes):
    usual = {"observations": SEEN, "actions": ACTED[:, None].astype(np.float32), "rewards": PAID}
    return {**usual, "terminals": OVER.astype(bool), "timeouts": CUT.astype(bool), **changes}


def imitations(**changes):
    """As `imitation` saved trajectories until its version 0.4: with an object per transition."""
    last = np.full((1, 4), 9.0)
    seen = np.concatenate([SEEN[:2], last, SEEN[2:3], last, SEEN[3:], last])
    usual = {"obs": seen, "acts": ACTED.astype(np.int32), "rews": PAID.astype(np.float32)}
    usual |= {"terminal": np.ones(3, bool), "indices": np.cumsum(LENGTHS[:-1])}
    return {**usual, "infos": np.array([Bomb()] * 6, dtype=object), **changes}


def transitions(**changes):
    usual = {"obs": SEEN, "acts": ACTED, "rews": PAID, "next_obs": SEEN, "dones": OVER | CUT}
    return {**usual, "infos": np.array([Bomb()] * 6, dtype=object), **changes}


def loaded(tmp_path, arrays, space=CHOICES):
    np.savez(tmp_path / "a.npz", **arrays)
    return Demonstrations.load(tmp_path / "a.npz", TASK, space)


def test_d4rls_keys_give_the_same_episodes(tmp_path):
    assert_same(loaded(tmp_path, d4rl()), episodes())


@pytest.mark.parametrize("arrays", [imitations(), transitions()], ids=["whole", "flat"])
def test_imitations_keys_give_the_same_episodes_and_no_pickle_is_opened(arrays, tmp_path):
    found = loaded(tmp_path, arrays)
    # a time limit is an end for `imitation`, too
    assert found.terminated.tolist() == [True, True, True]
    found.terminated[1] = False
    assert_same(found, episodes())


def without(name, arrays):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    "arrays",
    [without("rewards", d4rl()), without("rews", imitations()), without("rews", transitions())],
    ids=["d4rl", "whole", "flat"],
)
def test_an_expert_need_not_have_been_paid(arrays, tmp_path):
    found = loaded(tmp_path, arrays)
    assert not found.paid
    assert found.returns.isnan().all()
    assert found.lengths.tolist() == LENGTHS.tolist()
    found.save(str(tmp_path / "b.npz"))  # a path may be a string
    again = Demonstrations.load(tmp_path / "b.npz", action_space=CHOICES)
    assert not again.subset(2).paid
    assert torch.equal(again.actions, found.actions)


def test_one_trajectory_of_imitation_needs_no_indices(tmp_path):
    arrays = imitations(indices=np.zeros(0), obs=np.zeros((7, 4)), terminal=np.array(True))
    assert loaded(tmp_path, arrays).lengths.tolist() == [6]
    arrays.pop("indices")
    assert loaded(tmp_path, arrays).lengths.tolist() == [6]


@pytest.mark.parametrize(
    ("arrays", "left", "lengths"),
    [
        (d4rl(terminals=OVER * (np.arange(6) < 3)), 3, [2, 1]),
        (imitations(terminal=np.array([True, False, True])), 1, [2, 3]),
        (transitions(dones=CUT), 3, [3]),
    ],
    ids=["d4rl", "whole", "flat"],
)
def test_what_does_not_end_in_the_file_is_left_out_and_told(
    arrays, left, lengths, tmp_path, capsys
):
    assert loaded(tmp_path, arrays).lengths.tolist() == lengths
    assert (
        f"note: {tmp_path}/a.npz: {left} of 6 transitions are left out" in capsys.readouterr().err
    )


def test_actions_of_a_box_may_be_flat_and_are_brought_into_it(tmp_path):
    acted = np.array([-2.00001, 0.5, 1, 2, 0, -1])
    found = loaded(tmp_path, d4rl(actions=acted), FORCES)
    assert found.actions.shape == (6, 1)
    assert float(found.actions.min()) == -2
    whole = loaded(tmp_path, d4rl(actions=np.array([1, 0, -1, 2, 1, 1])), FORCES)
    assert whole.actions.dtype == torch.float32, "whole numbers are forces where the task says so"


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
def test_a_box_of_another_type_has_its_demonstrations_as_float32(dtype, tmp_path):
    end = 2 if dtype is np.int64 else 0.1
    acted = end * np.array([-1.00001, 0.5, 1, 1, 0, -1])
    found = loaded(tmp_path, d4rl(actions=acted), spaces.Box(-end, end, (1,), dtype))
    assert found.actions.dtype == torch.float32
    assert float(found.actions.abs().max()) == np.float32(end)


@pytest.mark.parametrize(
    ("arrays", "space", "words"),
    [
        ({"states": SEEN, "acts": ACTED}, CHOICES, r"its keys are acts, states\. Wanted are ours"),
        ({}, CHOICES, "its keys are none"),
        (without("terminals", d4rl()), CHOICES, "for D4RL's terminals is missing"),
        (without("acts", imitations()), CHOICES, "for imitation's acts is missing"),
        (d4rl(rewards=np.array([np.nan, *PAID[1:]])), CHOICES, "returns contain NaN"),
        (d4rl(terminals=0 * OVER, timeouts=0 * CUT), CHOICES, "no episode ends in it"),
        (d4rl(actions=ACTED[1:]), CHOICES, "6 observations and 5 actions do not fit"),
        (d4rl(rewards=PAID[:4]), CHOICES, "6 observations and 4 rewards"),
        (d4rl(actions=ACTED + 0.5), CHOICES, "whole numbers .* found some such as 0.5"),
        (d4rl(actions=ACTED * np.nan), CHOICES, "found some such as nan"),
        (d4rl(actions=np.zeros((6, 3))), CHOICES, "found some of size 3"),
        (d4rl(actions=ACTED + 1), CHOICES, "actions go from 1 to 3, the task has 0 to 2"),
        (d4rl(actions=ACTED + 1), FORCES, r"go from 1 to 3, the task takes Box.*numpy\.clip"),
        (d4rl(actions=np.zeros((6, 2))), FORCES, "actions have size 2, the task's have 1"),
        (d4rl(observations=SEEN * np.nan), CHOICES, "NaN or infinity"),
        (d4rl(observations=np.zeros((6, 2, 2))), CHOICES, r"observations must be numbers"),
        (
            d4rl(observations=np.array([Bomb()] * 6)),
            CHOICES,
            "holds Python objects, a pickle: save",
        ),
        (d4rl(rewards=np.array(["x"] * 6)), CHOICES, "a.npz"),
        (imitations(obs=SEEN), CHOICES, "a trajectory of n acts has n . 1 obs"),
        (imitations(indices=np.array([3, 2])), CHOICES, "do not fit"),
        (imitations(indices=np.array([2, 9])), CHOICES, "do not fit"),
        (
            imitations(terminal=np.zeros(3, bool)),
            CHOICES,
            "terminal is False for all.*also by its time limit",
        ),
        (transitions(dones=OVER[:4]), CHOICES, "6 observations and 4 ends"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arrays, space, words, tmp_path):
    with pytest.raises(InputError, match=words) as refusal:
        loaded(tmp_path, arrays, space)
    assert "\n" not in str(refusal.value)
    assert "a.npz" in str(refusal.value)


def test_their_files_do_not_name_the_task(tmp_path):
    np.savez(tmp_path / "a.npz", **d4rl())
    with pytest.raises(InputError, match="does not name its task: give env_id"):
        Demonstrations.load(tmp_path / "a.npz")


def test_our_own_files_are_held_to_the_task_too(tmp_path):
    episodes().save(tmp_path / "a.npz")
    assert_same(Demonstrations.load(tmp_path / "a.npz", action_space=CHOICES), episodes())
    with pytest.raises(InputError, match="the task has 0 to 1"):
        Demonstrations.load(tmp_path / "a.npz", action_space=spaces.Discrete(2))
    assert_same(Demonstrations.load(tmp_path / "a.npz", f"its.module:{TASK}"), episodes())
    with pytest.raises(InputError, match=f"holds demonstrations of {TASK}, not of CartPole-v1"):
        Demonstrations.load(tmp_path / "a.npz", "CartPole-v1")


def test_hdf5_without_h5py_says_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.hdf5").touch()
    with pytest.raises(InputError, match=r"pip install h5py, or .*numpy\.savez\('a\.npz'"):
        Demonstrations.load(tmp_path / "a.hdf5", TASK, CHOICES)
    with pytest.raises(InputError, match="no demonstrations file"):
        Demonstrations.load(tmp_path / "b.hdf5", TASK, CHOICES)


def test_hdf5_of_d4rl_and_minari(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, values in d4rl().items():
            file[name] = values
        file["infos/qpos"] = SEEN
    assert_same(Demonstrations.load(tmp_path / "a.hdf5", TASK, CHOICES), episodes())
    bounds = np.cumsum([0, *LENGTHS])
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        for number in (2, 0, 1):
            rows = slice(bounds[number], bounds[number + 1])
            group = file.create_group(f"episode_{number}")
            group["observations"] = np.concatenate([SEEN[rows], np.zeros((1, 4))])
            group["actions"], group["rewards"] = ACTED[rows], PAID[rows]
            group["terminations"], group["truncations"] = OVER[rows], CUT[rows]
    assert_same(Demonstrations.load(tmp_path / "b.hdf5", TASK, CHOICES), episodes())
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file["states"] = SEEN
    (tmp_path / "d.hdf5").write_text("no HDF5")
    for name, words in (("c", "its keys are states"), ("d", "cannot be read as HDF5")):
        with pytest.raises(InputError, match=words):
            Demonstrations.load(tmp_path / f"{name}.hdf5", TASK, CHOICES)

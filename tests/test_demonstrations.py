"""Demonstrations: files, refusals, those that ship, and the script that records them."""

import io
import json
import signal
import sys
import zipfile
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import train_experts
from sb3_contrib import TRPO

from advgame.errors import InputError
from advgame.imitation import demonstrations as module
from advgame.imitation.demonstrations import Demonstrations, shipped, slug
from advgame.imitation.recording import record
from advgame.run.cli import run_script

SHIPPED = ("CartPole-v1", "MountainCar-v0")


def three(*, continuous=False):
    """Three trajectories of 2, 1 and 3 transitions."""
    rng = torch.Generator().manual_seed(0)
    actions = torch.randn(6, 2, generator=rng) if continuous else torch.tensor([0, 1, 1, 0, 2, 1])
    return Demonstrations(
        torch.randn(6, 4, generator=rng),
        actions,
        torch.tensor([2, 1, 3]),
        torch.tensor([2.0, 1.0, 3.5], dtype=torch.float64),
        torch.tensor([True, False, True]),
        "Some/Task-v3",
    )


def assert_same(one, other):
    for field in fields(Demonstrations):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("continuous", [False, True])
def test_a_file_gives_back_what_was_saved(continuous, tmp_path):
    made = three(continuous=continuous)
    made.save(tmp_path / "a.npz")
    made.save(tmp_path / "b.npz")
    assert_same(Demonstrations.load(tmp_path / "a.npz"), made)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    three().save(tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        three(continuous=True).save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_trajectories_and_subsets_cut_at_the_right_places():
    made = three()
    parts = [made.trajectory(i) for i in range(3)]
    assert [len(o) for o, _ in parts] == [2, 1, 3]
    assert torch.equal(torch.cat([o for o, _ in parts]), made.observations)
    assert torch.equal(torch.cat([a for _, a in parts]), made.actions)
    two = made.subset(2)
    assert len(two) == 2
    assert torch.equal(two.observations, made.observations[:3])
    assert torch.equal(two.trajectory(1)[1], made.actions[2:3])
    assert two.returns.tolist() == [2.0, 1.0]
    assert two.terminated.tolist() == [True, False]
    assert_same(made.subset(3), made)
    for wrong in (0, 4, -1):
        with pytest.raises(InputError, match=r"ask for 1\.\.3"):
            made.subset(wrong)
    for wrong in (3, -1):
        with pytest.raises(InputError, match=r"trajectory must lie in 0\.\.2"):
            made.trajectory(wrong)


BROKEN = {
    "flat observations": (lambda d: {"observations": d.observations.flatten()}, "observations"),
    "double observations": (lambda d: {"observations": d.observations.double()}, "observations"),
    "none": (lambda d: {"observations": d.observations[:0]}, "observations"),
    "NaN": (lambda d: {"observations": d.observations * torch.nan}, "NaN or infinity"),
    "infinite return": (lambda d: {"returns": d.returns / 0}, "returns contain NaN or infinity"),
    "an action short": (lambda d: {"actions": d.actions[1:]}, "as many actions"),
    "negative action": (lambda d: {"actions": d.actions - 1}, "actions count from 0"),
    "int32 actions": (lambda d: {"actions": d.actions.int()}, "actions"),
    "flat float actions": (lambda d: {"actions": d.actions.float()}, "actions"),
    "lengths that do not sum": (lambda d: {"lengths": d.lengths + 1}, "lengths must"),
    "empty trajectory": (lambda d: {"lengths": torch.tensor([6, 0, 0])}, "lengths must"),
    "a return short": (lambda d: {"returns": d.returns[1:]}, "one entry per trajectory"),
    "an end too many": (lambda d: {"terminated": torch.ones(4) > 0}, "one entry per trajectory"),
    "lengths that wrap around": (
        lambda d: {"lengths": torch.tensor([2**63 - 1, 2**63 - 1, 8])},
        "lengths must be 1 or more and sum to the 6 observations",
    ),
    "ends as numbers": (lambda d: {"terminated": d.lengths}, "terminated must"),
    "no task": (lambda d: {"env_id": ""}, "env_id"),
}


def arrays(made):
    return {f.name: np.asarray(getattr(made, f.name)) for f in fields(Demonstrations)}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_in_memory_and_in_files(case, tmp_path):
    change, answer = BROKEN[case]
    made = three()
    with pytest.raises(InputError, match=answer):
        replace(made, **change(made))
    changed = {name: np.asarray(value) for name, value in change(made).items()}
    np.savez(tmp_path / "a.npz", **{**arrays(made), **changed})
    with pytest.raises(InputError, match=rf"a\.npz: .*{answer}"):
        Demonstrations.load(tmp_path / "a.npz")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def written(save, *values, **arrays):
    file = io.BytesIO()
    save(file, *values, **arrays)
    return file.getvalue()


def archive(**changes):
    return written(np.savez, **{**arrays(three()), **changes})


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (None, "no demonstrations file"),
        (b"", "cannot be read"),
        (b"text", "cannot be read"),
        (archive()[:-200], "cannot be read"),
        (archive(observations=np.array([Bomb()], dtype=object)), "cannot be read"),
        (archive(env_id=np.array(["a", "b"])), "env_id must be one string"),
        (archive(env_id=np.array(3)), "env_id must be one string"),
        (archive(actions=np.array(["left"] * 6)), "a.npz"),
        (archive(actions=np.zeros((6, 1), dtype=">f4")), "a.npz"),
        (written(np.savez, weights=np.zeros(3)), "holds no demonstrations"),
        (written(np.save, np.zeros(3)), "cannot be read"),
    ],
)
def test_what_is_no_archive_of_demonstrations_is_refused(content, answer, tmp_path):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=answer) as refusal:
        Demonstrations.load(path)
    assert "\n" not in str(refusal.value)


def says(shape, content=b""):
    """A file of one array whose header says another shape than it has."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def packed(**members):
    """An archive with some arrays replaced by these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, value in arrays(three()).items():
            array = io.BytesIO()
            np.save(array, value)
            made.writestr(f"{name}.npy", members.get(name, array.getvalue()))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (packed(observations=says((10**13, 4))), "does not hold"),
        (packed(observations=says((10**13, 4), b"0" * 96)), "does not hold"),
        (packed(observations=says((6, 3), b"0" * 96)), "does not hold"),
        (packed(lengths=says((-3,))), "does not hold"),
        (packed(returns=says((2**22,), b"0" * 2**24)), "would unpack to 16,"),
        (packed(returns=b""), "expected 8 bytes"),
        (packed(returns=b"\x93NUMPY\x03\x00" + b"0" * 20), "no plain array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_a_file_only_says_take_no_memory(content, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UNPACKED", 2**20)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_: pytest.fail("it was unpacked"))
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.npz cannot be read .*{answer}"):
        Demonstrations.load(tmp_path / "a.npz")


def test_demonstrations_that_pack_well_are_read(tmp_path):
    """Constant observations pack to a thousandth: small files may unpack to what memory has."""
    many = replace(
        three(),
        observations=torch.zeros(10**5, 4),
        actions=torch.zeros(10**5).long(),
        lengths=torch.tensor([10**5 - 2, 1, 1]),
    )
    many.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_size < 10**4
    assert_same(Demonstrations.load(tmp_path / "a.npz"), many)


def test_folders_and_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Demonstrations.load(tmp_path)
    with pytest.raises(InputError, match=r"into \.npz files"):
        three().save(tmp_path / "a.npy")


def test_unknown_tasks_are_told_which_ship():
    assert slug("ALE/Pong-v5") == "ale_pong_v5"
    for name in ("Pong-v5", "../imitation/CartPole-v1", ""):
        with pytest.raises(InputError, match="CartPole-v1, MountainCar-v0"):
            shipped(name)


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_trajectories_are_the_tasks_own(env_id):
    """Every transition from its recorded state, and whole episodes from their reset seeds.

    From a float32 first state alone CartPole's cannot be replayed: rounding grows by e per 0.2 s.
    """
    made = shipped(env_id)
    first = about(env_id)["reset_seeds"]["trajectories"][0]
    env, inner = gymnasium.make(env_id), gymnasium.make(env_id).unwrapped
    inner.reset(seed=0)
    for i in range(len(made)):
        observations, actions = made.trajectory(i)
        total, over, cut = 0.0, False, False
        seen, _ = env.reset(seed=first + i)
        for step, action in enumerate(actions.tolist()):
            assert not over
            assert not cut
            np.testing.assert_array_equal(seen, observations[step].numpy())
            seen, reward, over, cut, _ = env.step(action)
            total += reward
            inner.state = tuple(observations[step].double().tolist())
            alone, _, done, _, _ = inner.step(action)
            inner.reset() if done else None
            if step + 1 < len(actions):
                np.testing.assert_allclose(alone, observations[step + 1].numpy(), atol=1e-5)
            assert done == over
        assert over or cut
        assert bool(made.terminated[i]) == over
        assert float(made.returns[i]) == total


def about(env_id):
    return json.loads((Path(module.__file__).parent / f"{slug(env_id)}.json").read_text())


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_demonstrations_say_how_they_were_made(env_id):
    made, said = shipped(env_id), about(env_id)
    assert len(made) == 10
    assert said["trajectories"] == {
        "returns": made.returns.tolist(),
        "lengths": made.lengths.tolist(),
        "terminated": made.terminated.tolist(),
    }
    needed = {"CartPole-v1": 500, "MountainCar-v0": -105}[env_id]
    assert said["expert"]["returns"]["episodes"] == 100
    assert said["expert"]["returns"]["mean"] >= needed
    assert said["expert"]["threshold"] >= needed
    assert "+changes" not in said["commit"]
    assert "train_experts.py" in said["command"]
    ranges = list(said["reset_seeds"].values())
    assert all(a[1] < b[0] for a, b in pairwise(ranges)), "seeds overlap"
    assert said["attempts"][-1]["evaluation"] == said["expert"]["returns"]


def test_recording_tells_ends_from_time_limits():
    stuck = record(lambda _: 1, "MountainCar-v0", 5, 2)
    assert stuck.lengths.tolist() == [200, 200]
    assert stuck.returns.tolist() == [-200, -200]
    assert not stuck.terminated.any()
    fallen = record(lambda _: 0, "CartPole-v1", 5, 3)
    assert fallen.terminated.all()
    assert fallen.returns.tolist() == fallen.lengths.tolist()
    first, _ = gymnasium.make("CartPole-v1").reset(seed=6)
    np.testing.assert_array_equal(fallen.trajectory(1)[0][0].numpy(), first)
    swing = record(lambda _: np.array([0.5]), "Pendulum-v1", 5, 1)
    assert swing.actions.shape == (200, 1)
    assert swing.actions.dtype == torch.float32


def test_recording_takes_what_sb3s_predict_returns():
    fallen = record(lambda _: (np.array(0), None), "CartPole-v1", 5, 1)
    assert fallen.actions.tolist() == [0] * len(fallen.actions)


FLAT = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
CHOICE = gymnasium.spaces.Discrete(2)


class Odd(gymnasium.Env):
    """Of any spaces and reward, three steps long."""

    def __init__(self, seen, acted, reward):
        self.observation_space, self.action_space, self.reward = seen, acted, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), self.reward, self.steps == 3, False, {}


@pytest.mark.parametrize(
    ("seen", "acted", "reward", "words"),
    [
        (gymnasium.spaces.Dict({"a": FLAT}), CHOICE, 1.0, "observations Dict.*flat boxes only"),
        (gymnasium.spaces.Tuple((FLAT, CHOICE)), CHOICE, 1.0, "observations Tuple"),
        (gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8), CHOICE, 1.0, "observations Box"),
        (CHOICE, CHOICE, 1.0, "observations Discrete"),
        (FLAT, gymnasium.spaces.Discrete(2, start=1), 1.0, "Discrete from 0 or flat boxes"),
        (FLAT, gymnasium.spaces.MultiDiscrete([2, 3]), 1.0, "actions MultiDiscrete"),
        (FLAT, gymnasium.spaces.MultiBinary(3), 1.0, "actions MultiBinary"),
        (FLAT, gymnasium.spaces.Box(-1, 1, (2, 2), np.float32), 1.0, "actions Box"),
        (FLAT, CHOICE, float("nan"), "Odd-v0 returned a reward that is no finite number: nan"),
    ],
)
def test_a_task_that_cannot_be_imitated_is_refused_before_it_is_played(
    seen, acted, reward, words, monkeypatch
):
    """Not after the last episode, nor with a traceback; NaN is no recording without rewards."""
    spec = gymnasium.envs.registration.EnvSpec(
        "Odd-v0", entry_point=partial(Odd, seen, acted, reward), max_episode_steps=5
    )
    monkeypatch.setitem(gymnasium.registry, "Odd-v0", spec)
    asked = []
    with pytest.raises(InputError, match=words):
        record(lambda now: asked.append(now) or acted.sample(), "Odd-v0", 0, 2)
    assert len(asked) == (reward != 1)


@pytest.mark.parametrize(
    ("task", "answer", "words"),
    [
        ("CartPole-v7", 0, "cannot make 'CartPole-v7'"),
        ("no such task", 0, "cannot make"),
        ("CartPole-v1", (0, "state"), "returned a tuple"),
        ("CartPole-v1", 2, "no action of Discrete"),
        ("CartPole-v1", np.array([0]), "no action of Discrete"),
        ("Pendulum-v1", 0.5, "no action of Box"),
        ("Pendulum-v1", "left", "no action of Box"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_words(task, answer, words):
    with pytest.raises(InputError, match=words):
        record(lambda _: answer, task, 5, 1)
    with pytest.raises(InputError, match="episodes must be 1"):
        record(lambda _: 0, "CartPole-v1", 5, 0)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["CartPole-v7"], "there are settings for CartPole-v1"),
        (["CartPole-v1", "Pong-v5"], "not for Pong-v5"),
        (["--trajectories", "0"], "trajectories must be 1 or above"),
        (["--episodes", "0"], "episodes must be 1 or above"),
        (["--attempts", "-1"], "attempts must be 1 or above"),
        (["--steps", "0"], "steps must be 1 or above"),
        (["--seed", "-1"], "seed"),
        (["MountainCar-v0"], "exists: choose another --out, or give --overwrite"),
    ],
)
def test_the_script_refuses_before_any_work(words, answer, tmp_path, monkeypatch, capsys):
    (tmp_path / "mountaincar_v0.json").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path), *words])
    monkeypatch.setattr(train_experts, "train", lambda *_: pytest.fail("it worked"))
    with pytest.raises(SystemExit) as stop:
        run_script(train_experts._from_command_line)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert answer in said
    assert said.count("\n") == 1
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [
        ("mountaincar_v0.json", "mine")
    ]


TINY = {"tasks": ("CartPole-v1",), "steps": 128, "episodes": 3, "trajectories": 2, "attempts": 2}


@pytest.fixture
def quick(monkeypatch):
    """CartPole's expert after one short rollout."""
    expert = train_experts.EXPERTS["CartPole-v1"]
    settings = {**expert.settings, "n_steps": 64, "batch_size": 64}
    monkeypatch.setitem(train_experts.EXPERTS, "CartPole-v1", replace(expert, settings=settings))


@pytest.mark.parametrize(("target", "threshold"), [(500, 5), (5, 500)])
def test_an_expert_below_target_or_threshold_writes_nothing(
    target, threshold, quick, tmp_path, monkeypatch
):
    expert = train_experts.EXPERTS["CartPole-v1"]
    asked = replace(expert, target=target, threshold=threshold)
    monkeypatch.setitem(train_experts.EXPERTS, "CartPole-v1", asked)
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "sb3"))  # nor does SB3 write
    config = train_experts.Config(**TINY, out=str(tmp_path))
    with pytest.raises(InputError, match=r"in 2 attempts of 128 steps: try"):
        train_experts.main(config)
    assert not list(tmp_path.iterdir())


def test_an_attempt_ends_at_the_first_snapshot_that_reaches_the_target():
    expert = replace(train_experts.EXPERTS["CartPole-v1"], snapshots=3, threshold=0)
    for target, judged in ((0, [512]), (501, [512, 640, 768])):
        model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, device="cpu", seed=0)
        judge = train_experts.Judge("CartPole-v1", replace(expert, target=target), 768, 2)
        model.learn(768, callback=judge)
        assert [one["steps"] for one in judge.judged] == judged
        assert judge.reached == (target == 0)


@pytest.fixture
def easy(quick, monkeypatch):
    """CartPole's expert passes at once."""
    expert = replace(train_experts.EXPERTS["CartPole-v1"], target=5, threshold=5)
    monkeypatch.setitem(train_experts.EXPERTS, "CartPole-v1", expert)


def test_the_script_writes_what_loads_and_equal_seeds_write_equal_bytes(
    easy, tmp_path, monkeypatch
):
    for name in ("a", "b"):
        train_experts.main(train_experts.Config(**TINY, out=str(tmp_path / name)))
    one, other = (tmp_path / name / "cartpole_v1.npz" for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    monkeypatch.setattr(module, "_SHIPPED", tmp_path / "a")
    made = shipped("CartPole-v1")
    said = json.loads((tmp_path / "a" / "cartpole_v1.json").read_text())
    assert said["trajectories"]["returns"] == made.returns.tolist()
    assert said["reset_seeds"]["trajectories"] == [2_000_003, 2_000_004]
    first, _ = gymnasium.make("CartPole-v1").reset(seed=2_000_003)
    np.testing.assert_array_equal(made.observations[0].numpy(), first)
    again = train_experts.Config(**TINY, out=str(tmp_path / "a"))
    with pytest.raises(InputError, match="overwrite"):
        train_experts.main(again)
    train_experts.main(replace(again, overwrite=True, trajectories=1))
    assert len(shipped("CartPole-v1")) == 1


def test_ctrl_c_between_the_files_leaves_both(easy, tmp_path, monkeypatch, capsys):
    save = Demonstrations.save

    def pressed(self, path):
        save(self, path)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Demonstrations, "save", pressed)
    words = ["--out", str(tmp_path), "--steps", "128", "--episodes", "3"]
    monkeypatch.setattr(sys, "argv", ["x.py", "CartPole-v1", *words])
    with pytest.raises(SystemExit) as stop:
        run_script(train_experts._from_command_line, "said so")
    assert stop.value.code == 130
    assert "interrupted; said so" in capsys.readouterr().err
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["cartpole_v1.json", "cartpole_v1.npz"]

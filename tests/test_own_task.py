"""A task of one's own with demonstrations of one's own: the example of docs/imitation.md."""

import json
import re
import sys

import gymnasium
import numpy as np
import pytest
import train_gail
from conftest import ROOT
from studies import gail as study
from test_own_updater import EXAMPLE as UPDATER
from test_own_updater import run

from advgame.imitation import record
from agents import load_policy

PAGE = (ROOT / "docs" / "imitation.md").read_text()
TASK = re.search(r"`my_task\.py`:\n\n```python\n(.*?)^```", PAGE, re.S | re.M).group(1)
QUICK = ["--iterations", "4", "--evaluate-every", "2", "--episodes", "4", "--envs", "4"]
QUICK += ["--n-steps", "16", "--runs-dir", "runs"]
REACH = ["--env", "my_task:Reach-v0", "--demonstrations", "reach.npz"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A stranger's folder with the task, an updater and D4RL's keys of an expert."""
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "my_updaters.py").write_text(UPDATER)
    for name in ("my_task", "my_updaters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        expert = record(lambda s: np.clip(-2 * s[:1] - s[1:], -1, 1), "my_task:Reach-v0", 0, 10)
    ends = np.arange(1, 501) % 50 == 0
    keys = {"observations": expert.observations.numpy(), "actions": expert.actions.numpy()}
    keys |= {"rewards": np.full(500, float(expert.returns.mean()) / 50), "terminals": 0 * ends}
    np.savez("reach.npz", **keys, timeouts=ends)
    np.savez("far.npz", **{**keys, "actions": 2 * keys["actions"]}, timeouts=ends)
    np.savez("wide.npz", **{**keys, "observations": np.zeros((500, 3))}, timeouts=ends)
    unpaid = {name: array for name, array in keys.items() if name != "rewards"}
    np.savez("unpaid.npz", **unpaid, timeouts=ends)
    np.savez("poor.npz", **{**keys, "rewards": np.full(500, -100.0)}, timeouts=ends)
    yield tmp_path
    gymnasium.registry.pop("Reach-v0", None)
    for name in ("my_task", "my_updaters"):
        sys.modules.pop(name, None)


def test_an_own_task_is_imitated_and_the_policy_loads_without_it(here, monkeypatch):
    monkeypatch.setattr(train_gail, "resembles", lambda *_: {})
    run([*REACH, *QUICK, "--updater", "my_updaters:Signum", "--name", "a"], monkeypatch)
    text = (here / "runs/a/report.md").read_text()
    assert "# Imitation of an expert on my_task:Reach-v0" in text
    assert "demonstrations: 10 trajectories, 500 pairs (reach.npz)" in text
    sys.modules.pop("my_task")
    (here / "my_task.py").unlink()
    assert load_policy("runs/a").act(np.zeros(2)).shape == (1,)


def test_an_expert_without_rewards_is_imitated_without_a_score(here, monkeypatch, capsys):
    monkeypatch.setattr(train_gail, "resembles", lambda *_: {})
    words = [*REACH[:2], "--demonstrations", "unpaid.npz", *QUICK, "--name", "a"]
    run(words, monkeypatch)
    told = capsys.readouterr()
    assert "note: the demonstrations have no rewards" in told.err
    assert "(expert unknown)" in told.out
    text = (here / "runs/a/report.md").read_text()
    assert "| the expert, as demonstrated | unknown | 10 |" in text
    assert "there is no score" in text
    report = json.loads((here / "runs/a/report.json").read_text())
    assert report["expert_return"] is None
    assert "score" not in report


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([*REACH[:2], "--demonstrations", "far.npz"], "the task takes Box(-1.0, 1.0, (1,)"),
        (
            [*REACH[:2], "--demonstrations", "wide.npz"],
            "this one has observations of size 2 and",
        ),
        ([*REACH[:2], "--demonstrations", "none.npz"], "no demonstrations file none.npz"),
        (["--env", "my_task:Reach-v9", *REACH[2:]], "cannot make 'my_task:Reach-v9'"),
        (["--env", "my_tusk:Reach-v0", *REACH[2:]], "No module named 'my_tusk'"),
        (["--env", "Bridge-v0", *REACH[2:]], "is named with its module: my_task:Bridge-v0"),
        (["--env", "my_task.py:Reach-v0", *REACH[2:]], "without .py: my_task:Reach-v0"),
        (["--env", "my_task:Reach", *REACH[2:]], "name has a version: my_task:Reach-v0"),
        (["--env", "Acrobot", *REACH[2:]], "name has a version: Acrobot-v1"),
        (REACH[:2], "no demonstrations of 'my_task:Reach-v0' come with the package"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(words, answer, here, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run([*words, *QUICK, "--name", "a"], monkeypatch)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert answer in line
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"trajectories": 11}, r"ask for 1\.\.10"),
        ({"updaters": ("lion",)}, "unknown updater 'lion'"),
        ({"updaters": ("nowhere:Signum",)}, "there is no module 'nowhere'"),
        ({"updaters": ("my_updaters:Signam",)}, "has no attribute 'Signam'"),
        ({"demonstrations": "unpaid.npz"}, "unpaid.npz has no rewards: the study measures by"),
        ({"demonstrations": "poor.npz"}, "is not above the random policy's"),
        ({"demonstrations": None}, "no demonstrations of"),
        ({"env": "Pendulum-v1"}, "they belong to another task|actions go from|of size"),
    ],
)
def test_the_study_refuses_what_cannot_work_before_any_cell(settings, answer, here):
    asked = {"env": REACH[1], "demonstrations": "reach.npz", "updaters": ("my_updaters:Signum",)}
    asked |= {"iterations": 10, "control_iterations": 10, "out": "out", "runs_dir": "runs"}
    with pytest.raises(ValueError, match=answer):
        study.main(study.Config(**{**asked, **settings}))
    assert not (here / "out").exists()


def test_an_interrupted_cell_of_an_own_task_says_what_to_do(here):
    config = study.Config(env=REACH[1], demonstrations="reach.npz", controls=(), runs_dir="runs")
    made = study.Gail(config)
    folder = made.root / "adam-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    with pytest.raises(ValueError, match="delete that folder, the study makes it again"):
        made.prepare(made.cells())


@pytest.mark.long
def test_the_study_compares_own_updaters_on_an_own_task(here):
    config = study.Config(
        env=REACH[1],
        demonstrations="reach.npz",
        setting="fixed",
        updaters=("adam", "my_updaters:Signum(0.01, decay=0.5)"),
        controls=("cloning", "dummy"),
        seeds=1,
        iterations=10,
        control_iterations=10,
        extra="--episodes 4 --envs 4 --n-steps 16",
        runs_dir="runs",
        out="out",
    )
    study.main(config)
    folder = here / "out/my_task_reach_v0-fixed"
    about = json.loads((folder / "stability.json").read_text())
    names = {run["method"] for run in about["runs"]}
    assert names == {"adam", "cloning", "dummy", "my_updaters-Signum-0.01-decay-0.5"}
    text = (folder / "stability.md").read_text()
    assert "| my_updaters:Signum(0.01, decay=0.5) |" in text
    assert "10 episodes); 10 demonstrated" in text
    study.main(study.Config(**{**vars(config), "from_json": True}))
    assert (folder / "stability.md").read_text() == text

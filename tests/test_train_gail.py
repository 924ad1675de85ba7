"""Imitation as a stranger runs it: small jobs, wrong words, interrupts, controls."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
import train_gail
from conftest import ROOT
from equal_runs import assert_equal_metrics
from studies import gail as gail_stability
from test_scripts import run

from advgame.errors import InputError
from advgame.games.gail import Gail
from advgame.imitation import resemblance
from advgame.imitation.stability import score
from advgame.run.folder import Metrics
from advgame.run.loop import Trainer
from advgame.seeding import stream
from agents import load_policy
from agents.gail import GailTraining, dummy_expert, judge_returns, random_returns
from agents.imitator import Imitator
from agents.resemblance import _episodes
from envs.imitation import ImitationVectorEnv
from envs.tasks import play

GAIL = [sys.executable, "scripts/train_gail.py"]
TINY = {"iterations": 4, "evaluate_every": 2, "episodes": 8, "envs": 4, "n_steps": 16}


@pytest.fixture(autouse=True)
def _quick_and_rough_resemblance(monkeypatch, request):
    """The held-out discriminators of the report take a minute otherwise; one test asks for them."""
    monkeypatch.setattr(resemblance, "_PATIENCE", 3)
    if "how_far" not in request.node.name:
        monkeypatch.setattr(train_gail, "resembles", lambda *_: {})


def config(tmp_path, name="run", **settings):
    return train_gail.Config(**{**TINY, "runs_dir": str(tmp_path), "name": name, **settings})


def test_what_a_study_gives_to_all_does_not_reach_controls_that_refuse_it():
    config = gail_stability.Config(seeds=1, extra="--entropy 0 --gae-lambda 0.9")
    for name, words in gail_stability.Gail(config).cells().items():
        learns = "--source" not in words
        assert ("--entropy" in words) == learns, name
        assert ("--gae-lambda" in words) == ("cloning" not in words), name


@pytest.mark.drawn
def test_a_run_explains_itself_and_is_not_overwritten(tmp_path):
    folder = train_gail.job.run(config(tmp_path)).path
    report = json.loads((folder / "report.json").read_text())
    assert report["expert_return"] == 500
    assert report["pairs"] == 5000
    assert (folder / "curves.png").stat().st_size > 10_000
    rows = Metrics.read(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4]
    for tag in (
        "eval/return",
        "discriminator/loss",
        "discriminator/norm",
        "discriminator/step",
        "discriminator/accuracy_policy",
        "discriminator/accuracy_expert",
        "policy/kl",
        "policy/entropy",
    ):
        assert all(tag in row for row in rows), tag
    with pytest.raises(InputError, match="never overwritten"):
        train_gail.job.run(config(tmp_path))


def test_checkpoints_can_be_seldom(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda trainer: saved.append(trainer.step))
    train_gail.job.run(config(tmp_path, iterations=10, save_every=3))
    assert saved == [6, 10]


def test_controls_pay_what_they_say(tmp_path):
    found = {}
    for source in ("constant", "random", "true", "discriminator"):
        training, *_ = train_gail.make_parts(config(tmp_path, source=source, horizon="task"))
        first = training.env.theta.clone()
        stats = [training.step() for _ in range(2)]
        found[source] = (first, training.env.theta, stats)
    assert not found["constant"][0].any()
    assert torch.equal(*found["constant"][:2])
    assert found["random"][0].any()
    assert torch.equal(*found["random"][:2])
    assert not torch.equal(*found["discriminator"][:2])
    assert all(float(one["policy/reward"]) == 1 for one in found["true"][2])
    assert all(float(one["policy/reward"]) == 0 for one in found["constant"][2])


def test_u_in_full_is_refused_where_it_does_not_fit(tmp_path, monkeypatch):
    full = config(tmp_path, updater="mlp", horizon="task")
    with monkeypatch.context() as patch:
        patch.setattr("agents.learned_updaters.available_memory", lambda device: 3 * 10**9)
        with pytest.raises(InputError, match=r"2561 parameters needs 4\.1 GB and 3\.0 GB"):
            train_gail.job.run(full)
    monkeypatch.setattr("agents.learned_updaters.available_disk", lambda path: 10 * 10**9)
    with pytest.raises(InputError, match=r"3 checkpoints of the updater need 12\.3 GB"):
        train_gail.job.run(full)
    assert not list(tmp_path.iterdir())


def test_replay_mixes_earlier_pairs_in(tmp_path):
    training, *_ = train_gail.make_parts(config(tmp_path, replay=0.5))
    first, second = torch.zeros(64, 7), torch.ones(64, 7)
    assert torch.equal(training._remembered(first), first)
    assert float(training._remembered(second).mean()) == 0.5
    # both iterations are remembered alike from now on
    third = training._remembered(torch.full((64, 7), 2.0))[:, 0]
    assert int((third == 2).sum()) == 32
    assert {0.0, 1.0} < set(third.tolist())


def blind_batches(config, iterations=9):
    """Whether each of the first batches held next to no live pair."""
    training, *_ = train_gail.make_parts(config)
    return [float(training.step()["health/batch/blind"]) for _ in range(iterations)]


def test_batches_of_the_default_setting_hold_live_states():
    usual = train_gail.job.defaults()
    assert usual.horizon == "fixed"
    assert usual.n_steps < 500
    assert sum(blind_batches(usual)) == 0
    # where all rows begin at once, every window after the first falls is of fallen poles
    assert blind_batches(replace(usual, stagger=False))[1:7] == [1.0] * 6


@pytest.mark.slow
def test_the_report_says_how_far_the_policy_is_from_the_expert(tmp_path):
    found = {}
    for source in ("random", "cloning"):
        usual = train_gail.job.defaults(env="MountainCar-v0")  # whose episodes are short
        sizes = {"episodes": 8} | (TINY if source == "random" else {})
        settings = {"source": source, "runs_dir": str(tmp_path), "name": source}
        folder = train_gail.job.run(replace(usual, **settings, **sizes)).path
        found[source] = json.loads((folder / "report.json").read_text())["imitation"]
    for way in ("sampled", "deterministic"):
        far, near = (found[source][way]["divergence"] for source in ("random", "cloning"))
        assert near < 0.5 < far


def test_expert_and_evaluation_have_the_environments_time_limit():
    env = ImitationVectorEnv(1, max_episode_steps=5)
    expert = dummy_expert(env, 3, seed=0)
    assert expert.lengths.tolist() == [5, 5, 5]
    assert not expert.terminated.any()
    scores = judge_returns(env, Imitator(env, 0), 4, seed=0)(torch.nn.Identity())
    assert scores["eval/return"] == 5


def test_a_known_id_that_a_module_registers_anew_is_that_modules_task(tmp_path, monkeypatch):
    """It was trained on, and CartPole was what the policy was evaluated on."""
    (tmp_path / "heavier.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Heavier(CartPoleEnv):\n"
        "    def step(self, action):\n"
        "        seen, *_, info = super().step(action)\n"
        "        return seen, 7.0, False, False, info\n"
        "gymnasium.register('CartPole-v1', Heavier, max_episode_steps=500)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gymnasium.registry, "CartPole-v1", gymnasium.registry["CartPole-v1"])
    with pytest.warns(UserWarning, match="Overriding environment CartPole-v1"):
        env = ImitationVectorEnv(1, env_id="heavier:CartPole-v1", max_episode_steps=5)
    imitator = Imitator(env, 0)
    with pytest.raises(InputError, match="another task than Gymnasium's CartPole-v1"):
        _ = env.demonstrations
    assert judge_returns(env, imitator, 2, seed=0)(torch.nn.Identity())["eval/return"] == 35
    assert dummy_expert(env, 2, seed=0).returns.tolist() == [35, 35]
    assert [len(one) for one in _episodes(env, imitator, 2, 0, True)] == [5, 5]
    sys.modules.pop("heavier")


def test_what_the_task_itself_cuts_off_is_no_end_of_the_dummys():
    """No absorbing states follow: the environment has none there either."""

    class Cut(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.zeros(2, np.float32), 1.0, False, self.steps == 3, {}

    gymnasium.register("Cut-v0", Cut, max_episode_steps=9)
    try:
        env = ImitationVectorEnv(2, env_id="Cut-v0")
        expert = dummy_expert(env, 2, seed=0)
    finally:
        del gymnasium.registry["Cut-v0"]
    assert expert.lengths.tolist() == [3, 3]
    assert not expert.terminated.any()
    assert len(env.expert_pairs(expert, torch.Generator())) == 6


def test_the_dummy_expert_always_takes_action_0():
    env = ImitationVectorEnv(1)
    expert = dummy_expert(env, 3, seed=0)
    assert not expert.actions.any()
    assert expert.terminated.all()
    assert expert.returns.tolist() == expert.lengths.tolist()
    first, _ = expert.trajectory(1)
    assert len(first) == int(expert.lengths[1])
    assert (first[:, 0].diff().abs() < 0.1).all()  # one trajectory, not rows of several


@pytest.mark.parametrize(("reached", "flagged"), [(10.0, True), (21.0, False), (500.0, False)])
def test_a_policy_far_worse_than_random_actions_is_flagged(reached, flagged):
    report = {
        "random": {"mean": 22.0, "standard_error": 0.6},
        "eval/return": reached,
        "eval/standard_error": 0.8,
    }
    names = [flag["name"] for flag in train_gail.worse_than_random(report)]
    assert names == ["worse_than_random"] * flagged


def test_the_table_says_how_its_runs_were_evaluated():
    runs = [
        {"iterations": 20, "diverged": None, "every": 5, "evaluated": 8},
        {"iterations": 0, "diverged": None, "every": 0, "evaluated": 200},
    ]
    assert gail_stability.evaluations(runs).startswith("8 fresh")
    assert gail_stability.evaluations(runs).endswith("every 5 iterations")


def test_cloning_reports_the_same_numbers(tmp_path):
    words = {"source": "cloning", "trajectories": 2, "episodes": 8, "runs_dir": str(tmp_path)}
    folder = train_gail.job.run(train_gail.Config(**words)).path
    report = json.loads((folder / "report.json").read_text())
    assert report["eval/return"] > 40  # chance is 22; two trajectories do not make an expert
    assert report["bc/best_iteration"] > 0


def test_divergence_is_a_result(tmp_path):
    words = {"updater": "mlp-narrow", "updater_lr": 1e30, "iterations": 8}
    folder = train_gail.job.run(config(tmp_path, **words)).path
    assert json.loads((folder / "report.json").read_text())["diverged"]["iteration"] < 8


def test_a_diverged_run_reports_the_weights_that_it_saves(tmp_path, monkeypatch):
    part, calls = Gail.step, []

    def diverging(*given):
        calls.append(given)
        if len(calls) == 4:  # the policy has learned once more since the evaluation
            raise FloatingPointError("it diverged")
        return part(*given)

    monkeypatch.setattr(Gail, "step", diverging)
    folder = train_gail.job.run(config(tmp_path, horizon="task", n_steps=64, max_kl=0.5)).path
    report = json.loads((folder / "report.json").read_text())
    assert report["diverged"]["iteration"] == 3
    policy, starts = load_policy(folder), stream(0, "evaluation")
    returns = play("CartPole-v1", lambda seen: policy.act(seen, deterministic=True), 8, starts)
    reached = float(returns["returns"].mean())
    assert report["eval/return"] == reached
    assert reached != Metrics.read(folder / "metrics.csv")[-1]["eval/return"]
    assert report["score"] == score(reached, report["random"]["mean"], report["expert"]["mean"])


@pytest.mark.parametrize("names", [("my:S(0.1)", "my:S(-0.1)"), ("adam:sn",)])
def test_updaters_that_would_share_a_name_are_refused(names, tmp_path, monkeypatch):
    for module in ("my", "adam"):
        (tmp_path / f"{module}.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"would call both .*another name"):
        gail_stability.Gail(gail_stability.Config(updaters=names)).check()


@pytest.mark.slow
def test_any_task_with_its_own_demonstrations(tmp_path, monkeypatch, capsys):
    path = tmp_path / "acrobot.npz"
    env = ImitationVectorEnv(1, env_id="Acrobot-v1", horizon="task")
    dummy_expert(env, 2, seed=0).save(path)
    words = {"env": "Acrobot-v1", "demonstrations": str(path)}
    folder = train_gail.job.run(config(tmp_path, **words, iterations=2)).path
    said = f"demonstrations: 2 trajectories, 1,000 pairs ({path})"
    assert said in capsys.readouterr().out, "all of the file"
    assert json.loads((folder / "report.json").read_text())["eval/return"] == -500
    part = GailTraining.step

    def stopped(self):
        signal.raise_signal(signal.SIGTERM)
        return part(self)

    monkeypatch.setattr(GailTraining, "step", stopped)
    with pytest.raises(SystemExit):
        train_gail.job.run(config(tmp_path, "stopped", **words, iterations=2))
    assert "it cannot go on" in capsys.readouterr().err, "what --resume would refuse"


def test_a_run_goes_on_with_the_demonstrations_that_it_began_with(tmp_path, monkeypatch):
    path = tmp_path / "demo.npz"
    env = ImitationVectorEnv(1, env_id="CartPole-v1")
    recorded = env.demonstrations.subset(4)
    recorded.save(path)
    asked = config(tmp_path, demonstrations=str(path))
    with monkeypatch.context() as stopped:
        stopped.setattr(train_gail, "imitate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_gail.job.run(asked)
    again = replace(asked, resume=str(tmp_path / "run"))
    recorded.subset(2).save(path)
    with pytest.raises(InputError, match="run began with other contents of its demonstrations"):
        train_gail.job.run(again)
    recorded.save(path)
    assert train_gail.job.run(again).report()["diverged"] is None


def test_a_study_goes_on_with_the_demonstrations_that_it_began_with(tmp_path):
    path = tmp_path / "demo.npz"
    recorded = ImitationVectorEnv(1, env_id="CartPole-v1").demonstrations
    recorded.save(path)
    asked = gail_stability.Config(
        demonstrations=str(path), trajectories=4, out=str(tmp_path / "out"),
        runs_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    study = gail_stability.Gail(asked)
    results = {"extra": study.same(), **study.facts(), "runs": []}
    study.agree(study.root, study.same())
    study.path.parent.mkdir(parents=True)
    (study.root / "adam-seed0").mkdir(parents=True)
    (study.root / "adam-seed0" / "config.json").touch()
    study._note_flags()
    study.path.write_text(json.dumps(results))
    assert gail_stability.Gail(asked).earlier() == []
    recorded.subset(4).save(path)
    later = gail_stability.Gail(asked)
    with pytest.raises(InputError, match=r"is about demonstrations .* choose another name"):
        later.earlier()
    with pytest.raises(InputError, match="cells made with other flags"):
        later.agree(later.root, later.same())
    del results["demonstrations"]  # as files of before have it
    study.path.write_text(json.dumps(results))
    assert later.earlier() == []


@pytest.mark.long
def test_the_study_reuses_its_cells_and_judges_them(tmp_path):
    flags = "--episodes 8 --envs 4 --n-steps 16"
    study = gail_stability.Config(
        updaters=("adam",),
        controls=("true", "constant", "random", "cloning"),
        seeds=2,
        random_seeds=1,
        iterations=20,
        control_iterations=10,
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path / "out"),
        extra=flags,
    )
    gail_stability.main(study)
    out = tmp_path / "out" / "cartpole_v1-paper"
    about = json.loads((out / "stability.json").read_text())
    assert len(about["runs"]) == 2 + 2 + 2 + 1 + 2
    assert about["references"]["expert"] == 500
    assert 20 < about["references"]["random"] < 25
    assert about["summary"]["random"]["seeds"] == 1
    assert {"adam", "random"} <= about["summary"].keys()
    assert (out / "stability.md").stat().st_size
    assert (out / "stability.png").stat().st_size > 10_000
    began = time.monotonic()
    gail_stability.main(study)
    assert time.monotonic() - began < 20  # nothing was run again
    elsewhere = replace(
        study, updaters=(), controls=("constant",), runs_dir=str(tmp_path / "b"), iterations=10
    )
    gail_stability.main(elsewhere)  # as in a later session, which has no folder of the first's
    again = json.loads((out / "stability.json").read_text())
    assert [(r["method"], r["seed"]) for r in again["runs"]] == [
        (r["method"], r["seed"]) for r in about["runs"]
    ]
    assert again["summary"]["adam"] == about["summary"]["adam"]
    with pytest.raises(InputError, match="choose another --out"):
        gail_stability.main(replace(study, extra="--episodes 9"))
    with pytest.raises(InputError, match="unknown updater"):
        gail_stability.main(replace(study, updaters=("lion",)))


def test_controls_alone_have_no_picture(tmp_path):
    run = {"method": "constant", "iterations": 10, "every": 10, "scores": [0.0]}
    study = gail_stability.Gail(gail_stability.Config(out=str(tmp_path)))
    study.pictures([run], {})
    assert not list(tmp_path.iterdir())
    study.pictures([{**run, "method": "adam"}], {})
    assert study.path.with_suffix(".png").exists()


@pytest.mark.long
def test_a_kill_leaves_a_resumable_run(tmp_path):
    words = [*GAIL, "--runs-dir", str(tmp_path), "--iterations", "200", "--evaluate-every", "10"]
    words += ["--episodes", "20", "--save-every", "1"]
    whole = run(*words, "--name", "whole")
    assert whole.returncode == 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `run`'s: the order of sums depends on it
    process = subprocess.Popen(
        [*words, "--name", "half"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
    )
    table = tmp_path / "half" / "metrics.csv"
    while not table.exists() or len(table.read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert not (tmp_path / "half" / "report.json").exists()
    done = run(*GAIL, "--resume", str(tmp_path / "half"))
    assert done.returncode == 0, done.stderr
    assert_equal_metrics(tmp_path / "whole", tmp_path / "half")


def test_demonstrations_at_the_level_of_random_actions_are_warned_of(tmp_path, capsys):
    env = ImitationVectorEnv(2, env_id="CartPole-v1")
    chance = train_gail.level(random_returns("CartPole-v1", 20))
    train_gail.warn_of_no_expert(chance, env.demonstrations)
    assert not capsys.readouterr().err
    train_gail.warn_of_no_expert(chance, dummy_expert(env, 5, seed=0))
    assert "at the level of random actions" in capsys.readouterr().err

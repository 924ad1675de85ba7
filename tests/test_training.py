"""The shared loop: schedules, averaging, interrupts, resumption to the bit, flat memory."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equal_runs import SMALL, assert_equal_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_callbacks import trainer
from torch import nn
from train_las_at import Config, job, radii

from advgame import Callback
from advgame.classifiers import SmallCNN
from advgame.errors import InputError
from advgame.run.checkpoint import load_weights
from advgame.run.folder import Metrics
from advgame.run.job import resume_settings
from advgame.run.plan import TrainingPlan
from advgame.run.progress import telling
from advgame.seeding import derive_seed, stream
from agents.las_at import StrategyGame


def small(folder: Path, name: str, **changes) -> Config:
    return replace(Config(), **{**SMALL, "runs_dir": str(folder), "name": name, **changes})


@pytest.fixture
def stop_at(monkeypatch):
    """Make the game do something at a given step: raise a signal, or an error."""

    def at(step, action):
        played, real = iter(range(1, 1000)), StrategyGame.step

        def counted(self):
            stats = real(self)
            if next(played) == step:
                action()
            return stats

        monkeypatch.setattr(StrategyGame, "step", counted)

    return at


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_run_goes_on_afterwards(tmp_path, monkeypatch):
    whole = job.run(small(tmp_path, "whole"))
    real, calls = os.fsync, iter(range(10_000))

    def fsync(descriptor):
        if next(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        job.run(small(tmp_path, "full"))
    monkeypatch.undo()
    assert_equal_runs(whole.path, job.run(Config(resume=str(tmp_path / "full"))).path)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_an_epoch_not_the_run(
    tmp_path, stop_at, monkeypatch, capsys
):
    whole = job.run(small(tmp_path, "whole"))
    stop_at(13, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        job.run(small(tmp_path, "cut"))
    monkeypatch.undo()
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step_*"))[-1]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])
    resumed = job.run(Config(resume=str(tmp_path / "cut")))
    assert "damaged" in capsys.readouterr().err
    assert_equal_runs(whole.path, resumed.path)


def test_resuming_with_other_settings_is_refused(tmp_path):
    run = job.run(small(tmp_path, "one", agent="random"))
    with pytest.raises(InputError, match="epochs=3, not 7"):
        job.run(Config(resume=str(run.path), epochs=7), {"resume", "epochs"})
    with pytest.raises(InputError, match="dataset=digits, not mnist"):
        job.run(Config(resume=str(run.path), dataset="mnist"), {"resume", "dataset"})
    # the same may be said again
    job.run(Config(resume=str(run.path), epochs=3), {"resume", "epochs"})
    run.write_json("config.json", {**run.about(), "config": {"colour": "red"}})
    with pytest.raises(InputError, match="another script or version"):
        job.run(Config(resume=str(run.path)))


def test_data_that_moved_is_found_again(tmp_path):
    run = job.run(small(tmp_path, "one", agent="random", epochs=1))
    (run.path / "report.json").unlink()
    config = Config(resume=str(run.path), data_dir="/new")
    _, settings = resume_settings(run.path, config, {"resume", "data_dir"})
    assert settings.data_dir == "/new"
    assert settings.agent == "random"


def test_a_run_that_is_being_written_is_left_alone(tmp_path, stop_at):
    """A second process, here a second holder of the lock, must not write the same files."""
    said = []

    def resume_too():
        with pytest.raises(InputError, match="another process") as refused:
            job.run(Config(resume=str(tmp_path / "a")))
        said.append(refused)

    stop_at(3, resume_too)
    whole = job.run(small(tmp_path, "a", epochs=1))
    assert len(said) == 1
    assert len(Metrics.read(whole.path / "metrics.csv")) == 1


def test_without_a_terminal_a_run_says_a_line_per_epoch(tmp_path, capsys):
    job.run(small(tmp_path, "a", epochs=2))
    attacks, folder, first, second, *report = capsys.readouterr().err.splitlines()
    assert radii("0.15", (3, 15)) in attacks
    assert folder == f"{tmp_path / 'a'}: step 0 of 12"
    assert [line.split(": epoch")[0] for line in (first, second)] == [
        "step 6 of 12",
        "step 12 of 12",
    ]
    assert "loss " in first
    assert "robust 0." in first
    assert report[0] == f"{tmp_path / 'a'}: 20 test images"
    assert [line.split(" on images")[0] for line in report[1:3]] == ["clean", "fgsm"]


def test_on_a_terminal_an_evaluation_keeps_one_line_that_changes(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich
    with telling("runs/a: 20 images") as tell:
        tell("fgsm on images 0 to 19")
    said = capsys.readouterr().err
    assert said.startswith("runs/a: 20 images\n")
    assert "\x1b[2K" in said, "the line is taken back"


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    run = job.run(small(tmp_path, "one", agent="random", epochs=1))
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    job.run(Config(resume=str(run.path)))
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before
    assert "finished before" in capsys.readouterr().out


def test_resuming_keeps_every_point_of_the_curves(tmp_path, stop_at, monkeypatch):
    stop_at(9, lambda: signal.raise_signal(signal.SIGTERM))  # 6 steps an epoch
    with pytest.raises(SystemExit):
        job.run(small(tmp_path, "cut", agent="random"))
    monkeypatch.undo()
    job.run(Config(resume=str(tmp_path / "cut")))
    events = EventAccumulator(str(tmp_path / "cut"))
    events.Reload()
    assert [point.step for point in events.Scalars("eval/robust")] == [6, 12, 18]
    assert {"curves", "examples", "training"} <= set(events.Tags()["images"])
    steps = [point.step for point in events.Scalars("step/game/adversarial_loss")]
    assert steps == list(range(1, 19))
    assert len(list((tmp_path / "cut").glob("events.*"))) == 1
    report = job.run(Config(resume=str(tmp_path / "cut"))).report()
    for name, share in {**report["accuracy"], "worst_case": report["worst_case"]}.items():
        (point,) = events.Scalars(f"final/{name}")
        assert point.value == pytest.approx(share)
    (told,) = events.Tensors("config/text_summary")
    assert "| `agent` | random |" in told.tensor_proto.string_val[0].decode()
    plugins = events.SummaryMetadata
    assert plugins("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


def test_divergence_is_named(tmp_path):
    with pytest.raises(InputError, match=r"diverged.*lower --lr"):
        job.run(small(tmp_path, "one", agent="fixed", lr=1e30, schedule="constant"))


@pytest.mark.slow
def test_different_seeds_differ(tmp_path):
    one, two = (job.run(small(tmp_path, f"s{s}", seed=s, epochs=1)) for s in (0, 1))
    with pytest.raises(AssertionError):
        assert_equal_runs(one.path, two.path)


def test_best_weights_are_those_of_the_best_validation_epoch(tmp_path):
    run = job.run(small(tmp_path, "one", epochs=4, lr=0.3))
    rows = Metrics.read(run.path / "metrics.csv")
    robust = [row["eval/robust"] for row in rows]
    best = SmallCNN((1, 8, 8), 10)
    load_weights(best, run.path / "checkpoints" / "best.safetensors")
    last = SmallCNN((1, 8, 8), 10)
    load_weights(last, run.path / "checkpoints" / "last.safetensors")
    same = torch.equal(best.head.weight, last.head.weight)
    assert same == (robust.index(max(robust)) == len(robust) - 1)


def test_schedules_follow_their_definitions():
    parameter = torch.nn.Parameter(torch.zeros(1))

    def rates(plan, total):
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scheduler = plan.scheduler(optimizer, total)
        seen = []
        for _ in range(total):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    drops = rates(TrainingPlan(1, "multistep", (0.5, 0.75)), 100)
    assert drops[0] == drops[49] == 0.1
    assert drops[50] == pytest.approx(0.01)
    assert drops[75] == pytest.approx(0.001)
    cycle = rates(TrainingPlan(1), 100)
    assert max(cycle) == pytest.approx(0.1, rel=1e-3)
    assert 28 <= cycle.index(max(cycle)) <= 32
    assert cycle[-1] < 1e-3
    assert set(rates(TrainingPlan(1, "constant"), 10)) == {0.1}


def test_averaged_weights_are_the_moving_average(tmp_path, digits):
    """The first weights; then the decay is (1 + t) / (10 + t) until that exceeds 0.3, at t = 2."""
    seen = []

    class Watch(Callback):
        def on_step(self, trainer, stats):
            seen.append(trainer.module.head.weight.detach().clone())

    made = trainer(tmp_path / "run", digits, Watch(), plan=TrainingPlan(2, ema=0.3))
    made.fit(resume=False)
    expected = seen[0]
    for t, weights in enumerate(seen[1:], 1):
        decay = 2 / 11 if t == 1 else 3 / 12 if t == 2 else 0.3
        expected = decay * expected + (1 - decay) * weights
    judged = SmallCNN((1, 8, 8), 10, width=2)
    load_weights(judged, tmp_path / "run" / "checkpoints" / "last.safetensors")
    torch.testing.assert_close(judged.head.weight.detach(), expected)
    assert not torch.equal(expected, seen[-1])


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_an_average_has_its_own_spectral_norm(norm, tmp_path, digits):
    """Averages of unit vectors are shorter: by them σ was too small, and the layer too large."""

    def network():
        return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))

    class Elsewhere(Callback):
        def on_step(self, trainer, stats):
            for weight in trainer.module[1].parameters():
                torch.nn.init.normal_(weight)  # with other singular vectors

    plan = TrainingPlan(3, ema=0.9)
    made = trainer(tmp_path / "run", digits, Elsewhere(), plan=plan, network=network)
    made.fit(resume=False)
    made.judged.eval()(digits.test.floats(slice(2)))  # the older form has no weight before
    largest = torch.linalg.matrix_norm(made.judged[1].weight.detach(), 2)
    assert largest == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": 1, "ema": 1.0},
        {"epochs": 1, "milestones": (1.5,)},
        {"epochs": 1, "validate_every": 0},
    ],
)
def test_impossible_plans_are_refused(bad):
    with pytest.raises(InputError):
        TrainingPlan(**bad)


def test_streams_are_independent_and_named():
    draws = {name: float(torch.rand(1, generator=stream(0, name))) for name in ("a", "b", "order")}
    assert len(set(draws.values())) == 3
    assert draws["a"] == float(torch.rand(1, generator=stream(0, "a")))
    assert derive_seed(0, "a") != derive_seed(1, "a")
    with pytest.raises(InputError):
        derive_seed(-1, "a")


def test_every_data_set_has_settings_that_pass_their_own_check(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        for preset in ("default", "repo"):
            config = job.defaults(dataset=name, preset=preset)
            assert config.dataset == name
            if name != "digits":
                with pytest.raises(InputError, match="--data-dir"):
                    job.run(replace(config, runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir()), "nothing is left behind by a refused run"


@pytest.mark.long
@pytest.mark.parametrize("agent", ["reinforce", "ppo"])
def test_memory_is_flat_over_a_thousand_steps(agent, tmp_path, monkeypatch):
    resident = []
    real = StrategyGame.step

    def measured(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        return real(self)

    monkeypatch.setattr(StrategyGame, "step", measured)
    # 37 steps an epoch: the growth of one epoch's histogram must not be counted
    job.run(small(tmp_path, "one", train_n=300, batch_size=8, epochs=28, agent=agent))
    assert len(resident) > 1000
    growth = max(resident[-100:]) - max(resident[200:300])
    assert growth < 15, f"{growth:.1f} MiB more after 1,000 steps than after 300"

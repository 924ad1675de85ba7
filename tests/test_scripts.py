"""Scripts as a stranger runs them: tiny jobs, wrong words, kills at random moments."""

import os
import random
import runpy
import signal
import subprocess
import sys
import time

import pytest
import train_las_at
import tyro
from conftest import ROOT
from equal_runs import assert_equal_runs
from study import STUDIES

from advgame.run.options import typed_options

TRAIN = [sys.executable, "scripts/train_las_at.py"]
TINY = ["--train-n", "200", "--batch-size", "32", "--eval-n", "30", "--attacks", "fgsm"]


def run(*words, **settings):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **settings
    )


SCRIPTS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.py")
    if path.name != "study.py" and "__main__" in path.read_text()
)


@pytest.mark.parametrize("words", [[one] for one in SCRIPTS] + [["study.py", s] for s in STUDIES])
def test_help_explains_every_field(words, monkeypatch, capsys):
    script, *name = words
    assert "--" in shown(ROOT / "scripts" / script, monkeypatch, capsys, *name)


def shown(script, monkeypatch, capsys, *words):
    """What --help prints; in this process, since each import of PyTorch takes seconds."""
    monkeypatch.setattr(sys, "argv", [str(script), *words, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code in (None, 0)
    return capsys.readouterr().out


def test_help_shows_the_data_sets_own_defaults(monkeypatch, capsys):
    script = ROOT / "scripts" / "train_las_at.py"
    assert "(default: 8/255)" in shown(script, monkeypatch, capsys, "--dataset", "cifar10")
    assert "(default: 8/255)" in shown(script, monkeypatch, capsys, "--data=cifar10")
    assert "(default: 8/255)" not in shown(script, monkeypatch, capsys)


def test_an_error_is_one_line_and_exit_code_2():
    done = run(*TRAIN, "--eps", "8/0")
    assert done.returncode == 2
    assert done.stderr == "error: eps must be a number such as 0.15 or 8/255, not '8/0'\n"


@pytest.mark.slow
def test_a_run_is_not_overwritten(tmp_path):
    first = ["--runs-dir", str(tmp_path), "--name", "one", "--epochs", "1", *TINY]
    done = run(*TRAIN, *first)
    assert done.returncode == 0, done.stderr
    assert "report.md" in done.stdout
    again = run(*TRAIN, *first)
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


@pytest.mark.slow
def test_two_processes_learn_the_same_weights(tmp_path):
    """Fabric's launcher, one shared folder, gradients and policy averaged over processes."""
    words = ["--runs-dir", str(tmp_path), "--name", "two", "--accelerator", "cpu", "--devices", "2"]
    done = run(*TRAIN, *words, "--epochs", "2", *TINY)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "report.json").exists()
    saved = sorted(p.name for p in (tmp_path / "two" / "checkpoints").glob("step_*"))
    assert len(saved) == 4, saved  # two steps of two ranks
    from safetensors.torch import load_file

    states = [
        load_file(tmp_path / "two" / "checkpoints" / name / "defender.safetensors")
        for name in saved[-2:]
    ]
    for name, value in states[0].items():
        assert (value == states[1][name]).all()


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_the_same_to_the_bit(tmp_path):
    words = ["--runs-dir", str(tmp_path), "--epochs", "14", *TINY]
    assert run(*TRAIN, *words, "--name", "whole").returncode == 0
    folder, chance = tmp_path / "killed", random.Random(0)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def epochs():
        table = folder / "metrics.csv"
        return len(table.read_text().splitlines()) - 1 if table.exists() else 0

    # wait for so many epochs, then for a random moment: within a step, a checkpoint, the report
    for wanted in (0, 1, 3, 5, 8, 11, 14):
        going_on = ["--resume", str(folder)] if folder.exists() else [*words, "--name", "killed"]
        process = subprocess.Popen(
            [*TRAIN, *going_on],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while epochs() < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.4 if wanted else 4))
        assert process.poll() is None, "it finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(*TRAIN, "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "whole", folder)


@pytest.mark.parametrize("words", [["fgsm", "pgd20"], ["fgsm,pgd20"], ["fgsm,", "pgd20"]])
def test_names_stand_with_spaces_or_commas_between(words):
    config = tyro.cli(train_las_at.Config, args=["--attacks", *words, "--eval-n", "30"])
    assert (config.attacks, config.eval_n) == (("fgsm", "pgd20"), 30)


def test_a_flag_that_is_switched_off_counts_as_typed(monkeypatch):
    words = ["--no-clamp", "--lr=0.1", "--eps-ramp", "0.2"]
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    assert typed_options(train_las_at.Config) == {"clamp", "lr", "eps_ramp"}

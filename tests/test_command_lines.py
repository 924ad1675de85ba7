"""Command lines that cannot work are refused in one line, before anything is written."""

import io
import subprocess
import sys

import evaluate
import psro
import pytest
import torch
import train
import train_adt
import train_attacker
import train_cat_and_mouse
import train_duel
import train_gail
import train_l2l
import train_las_at
import train_minimax
import train_privacy_filter
import tyro
from conftest import ROOT, seeded
from studies import cat_and_mouse as study_cat_and_mouse
from studies import compare
from studies import gail as gail_stability
from studies import l2l as study_l2l
from studies import las_at as study_las_at
from studies import minimax as study_minimax

from advgame.attacks import GradientAttack
from advgame.errors import InputError
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.run.job import resume_settings
from advgame.threat import Linf
from agents.attackers import load_attacker
from agents.attnet import AttNet

TRAININGS = (
    train, train_las_at, train_l2l, train_adt, train_minimax, train_gail, train_attacker,
    train_cat_and_mouse, train_privacy_filter, train_duel, psro,
)  # fmt: skip
STUDIES = {
    study_l2l: {"methods": ("grad",)},
    study_minimax: {"methods": ("alt",)},
    study_cat_and_mouse: {"methods": ("fgsm",)},
    study_las_at: {"methods": ("random",), "equal_compute_seeds": 0},
    gail_stability: {"updaters": ("adam",), "controls": ("cloning",)},
    compare: {"methods": ("pgd-at",)},
}
BAD = {gail_stability: "--episodes 1", study_cat_and_mouse: "--batch-size 1"}


def name(value):
    return value.__name__ if hasattr(value, "__name__") else None


@pytest.mark.parametrize("study", STUDIES, ids=name)
@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"seeds": 0}, "seed"),
        ({"jobs": 0}, "jobs"),
        ({"extra": "'"}, "cannot be read"),
        ({"extra": "bad"}, ""),
    ],
    ids=str,
)
def test_a_study_is_refused_before_it_writes(study, settings, answer, tmp_path):
    folders = {"runs_dir": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    if settings == {"extra": "bad"}:  # what the training refuses
        settings, answer = {"extra": BAD.get(study, "--batch-size 0")}, "must be"
    with pytest.raises(InputError, match=answer):
        study.main(study.Config(**{**STUDIES[study], **folders, **settings}))
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_names_each_game_once(tmp_path):
    for games, answer in ((("pgd-at", "pgd-at"), "twice"), ((), "nothing to run")):
        with pytest.raises(InputError, match=answer):
            compare.main(compare.Config(methods=games, runs_dir=str(tmp_path), out=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_an_attacker_of_broken_weights_is_no_attacker(tmp_path):
    network = AttNet((1, 8, 8), 10, hidden=4)
    with torch.no_grad():
        network.layers[0].bias[0] = torch.nan
    network.save(tmp_path / "attacker.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.bias are NaN"):
        load_attacker(tmp_path)


def test_radii_and_steps_are_numbers():
    with pytest.raises(InputError, match="B 1 or above"):
        Linf(torch.tensor([]))
    x, y = torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    attack = GradientAttack(Linf(0.1), 1, torch.tensor([torch.nan]))
    with pytest.raises(InputError, match="negative or NaN"):
        attack.run(torch.nn.Flatten(), x, y, rng=seeded())


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"agent": "nobody"}, "agent cannot be 'nobody'"),
        ({"epochs": "4"}, "epochs cannot be '4'"),
        ({"attacks": ["fgsm", 3]}, "attacks cannot be"),
        ({"eps": None}, "eps cannot be None"),
        ({"stranger": 1}, "another script or version"),
        ({"lr": ...}, "another script or version"),  # not there
    ],
    ids=str,
)
def test_the_values_of_a_folder_are_of_their_types(change, answer, tmp_path):
    settings = {**vars(train_las_at.Config()), **change}
    settings = {key: value for key, value in settings.items() if value is not ...}
    run = RunFolder.create(tmp_path / "run", settings, "cpu")
    with pytest.raises(InputError, match=answer):
        resume_settings(run.path, train_las_at.Config(resume=str(run.path)), {"resume"})


def test_a_screen_that_knows_only_ascii_shows_the_help(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: tyro.cli(train.Config, args=["--help"]))
    assert stop.value.code == 0
    screen.flush()
    assert b"\\u03b5" in screen.buffer.getvalue()


def test_a_builder_that_exits_is_an_error(tmp_path, monkeypatch, refused):
    (tmp_path / "exits.py").write_text("import sys\ndef build():\n    sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    words = ["--model", "exits:build", "--dataset", "digits", "--eps", "0.1"]
    refused(evaluate, words, "exits:build failed: SystemExit")


def test_full_memory_is_told_in_a_line(capsys):
    def job():
        torch.empty(2**60)

    with pytest.raises(SystemExit) as stop:
        run_script(job)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: too little memory: ")


@pytest.mark.parametrize("script", [*TRAININGS, evaluate], ids=name)
def test_a_typo_is_answered_before_torch_is_imported(script):
    """Importing torch takes seconds; who mistypes an option need not wait for it."""
    code = f"""
import sys, {script.__name__} as script
try:
    script.job.parse(["--no-such-option", "1"])
except SystemExit as stop:
    assert stop.code == 2
assert script.job.parse([]).seed == 0
assert "torch" not in sys.modules
"""
    folder = ROOT / "scripts"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Unrecognized" in done.stdout + done.stderr

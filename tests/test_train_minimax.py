"""scripts/train_minimax.py as a stranger runs it: small runs, interrupts, wrong words, files."""

import json
import signal
import sys
from dataclasses import replace

import pytest
import train_minimax
from equal_runs import SMALL, assert_equal_runs
from safetensors.torch import load_file
from train_minimax import Config, defaults, main

import agents.best_response
from advgame.cli import make_fabric, run_script
from advgame.errors import InputError
from advgame.games.minimax import Minimax, SensitivityTraining
from advgame.games.training import DefenderTraining
from advgame.runs import Metrics
from advgame.solvers import Optimistic


def small(folder, name, **changes):
    settings = {**SMALL, "epochs": 2, "response_steps": 5, "hidden": 20, "model": "small_cnn"}
    return replace(Config(), **{**settings, "runs_dir": str(folder), "name": name, **changes})


VARIANTS = {
    "minimax": {"ascent_steps": 2, "eps_ramp": 0.5, "model": "minimax_cnn"},
    "optimistic": {"restarts": 1},
    "sens": {},
}


@pytest.mark.parametrize("defence", VARIANTS)
def test_interrupted_and_resumed_is_the_same_to_the_bit(defence, tmp_path):
    changes = {"defence": defence, **VARIANTS[defence]}
    whole = main(small(tmp_path, "whole", **changes))
    real, played = DefenderTraining.step, []

    def stopped(self):
        played.append(0)
        if len(played) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefenderTraining, "step", stopped)
        with pytest.raises(SystemExit) as stop:
            main(small(tmp_path, "cut", **changes))
    assert stop.value.code == 128 + signal.SIGTERM
    resumed = main(Config(resume=str(tmp_path / "cut")))
    assert_equal_runs(whole.path, resumed.path)
    names = ["attnet-curr.safetensors"] + ["attacker.safetensors"] * (defence != "sens")
    for name in names:
        one, two = (load_file(run.path / name) for run in (whole, resumed))
        assert all((one[key] == two[key]).all() for key in one)
    report = json.loads((whole.path / "report.json").read_text())
    assert list(report["accuracy"]) == ["clean", "fgsm", "learned:attnet-curr"]
    row = Metrics.read(whole.path / "metrics.csv")[-1]
    assert ("eval/own_attacker" in row) == ("game/ascent" in row) == (defence != "sens")


def test_an_interrupted_report_keeps_its_fresh_attacker(tmp_path, monkeypatch):
    """Its verdicts belong to that network, which must not be trained anew."""
    run = main(small(tmp_path, "run", defence="plain"))
    before = (run.path / "attnet-curr.safetensors").read_bytes()
    report = json.loads((run.path / "report.json").read_text())
    (run.path / "report.json").unlink()
    monkeypatch.setattr(agents.best_response, "best_response", None)
    again = main(Config(resume=str(run.path)))
    assert (again.path / "attnet-curr.safetensors").read_bytes() == before
    assert json.loads((run.path / "report.json").read_text())["accuracy"] == report["accuracy"]


def test_settings_reach_the_game():
    fabric = make_fabric("cpu", 1, "32-true")
    shape = (1, 8, 8)

    def made(**changes):
        return train_minimax.rules(replace(Config(), **changes), shape, 10, fabric.device)

    game = made(ascent_steps=3, attacker_lr=5e-3, hidden=7, dropout=0.25, bound="clip")
    assert isinstance(game, Minimax)
    network = game.attacker.module
    assert (network.hidden, network.dropout, network.bound) == (7, 0.25, "clip")
    assert (game.ascent_steps, game.attacker.optimizer.defaults["lr"]) == (3, 5e-3)
    assert isinstance(made(defence="optimistic").direction, Optimistic)
    for defence, penalty in (("lwa", 0.0), ("sens", 0.25)):
        game = made(defence=defence, penalty=0.25)
        assert isinstance(game, SensitivityTraining)
        assert game.penalty == penalty


def test_every_data_set_has_settings_of_its_own(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        config = train_minimax.check(defaults(name))
        assert config.dataset == name
        if name != "digits":
            with pytest.raises(InputError, match="--data-dir"):
                main(replace(config, runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--defence", "strong"], "invalid choice"),
        (["--gamma", "-1"], "gamma must be 0 or above"),
        (["--defence", "sens", "--penalty", "-1"], "penalty must be 0 or above"),
        (["--ascent-steps", "0"], "ascent_steps must be above 0"),
        (["--restarts", "0"], "restarts must be above 0"),
        (["--response-steps", "-1"], "response_steps must be 0"),
        (["--hidden", "0"], "hidden must be 1"),
        (["--hidden", "0", "--defence", "sens"], "hidden must be 1"),
        (["--precision", "bf16-mixed"], "full precision only"),
        (["--compile"], "which --compile cannot"),
        (["--dropout", "1"], "dropout in [0, 1)"),
        (["--eps-ramp", "1"], "eps_ramp must lie in"),
        (["--devices", "2"], "one device only"),
        (["--grad-clip", "1"], "not for them"),
        (["--eps", "8"], "did you mean 8/255"),
        (["--dataset", "mnist"], "--data-dir"),
        (["--resume", "/nowhere"], "not a run folder"),
    ],
)
def test_wrong_words_get_one_clear_error_before_any_work(
    words, answer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["x.py", "--runs-dir", str(tmp_path / "runs"), *words])
    with pytest.raises(SystemExit) as stop:
        run_script(train_minimax._from_command_line)
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

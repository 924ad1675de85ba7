"""The learned game of a stranger, `stranger_game.py`: it trains, resumes, is judged, is studied."""

import json
import signal
from pathlib import Path

import pytest
import stranger_game
import torch
from equal_runs import SMALL, assert_equal_runs

from advgame import Linf, load_data
from advgame.classifiers import make_classifier
from advgame.defender import Defender
from advgame.run import MethodsConfig


def test_it_is_at_most_60_lines():
    assert len(Path(stranger_game.__file__).read_text().splitlines()) <= 60


def test_both_players_learn_by_the_formula():
    """θ ← θ - lr ∇_θ and u ← u + lr ∇_u / |∇_u| (Adam's first step) of the same mean loss."""
    data = load_data("digits").train.first(40)
    x, y = data.floats(), data.labels
    module = make_classifier("small_cnn", data.shape, 10)
    before = [weight.detach().clone() for weight in module.parameters()]
    rules = stranger_game.Universal(Linf(0.2), data.shape, 0.1, "cpu")
    with torch.no_grad():
        rules.u.copy_(torch.linspace(-1, 1, 64).view_as(rules.u))
    u = rules.u.detach().clone().requires_grad_()
    module.train()
    loss = torch.nn.functional.cross_entropy(module((x + 0.2 * u.tanh()).clamp(0, 1)), y)
    *slopes, ascent = torch.autograd.grad(loss, [*module.parameters(), u])
    rules.step(Defender(module, lr=0.5, momentum=0.0, weight_decay=0.0), x, y, None)
    for weight, old, slope in zip(module.parameters(), before, slopes, strict=True):
        assert torch.allclose(weight, old - 0.5 * slope, atol=1e-6)
    moved = ascent.abs() > 1e-6
    assert moved.any()
    assert torch.allclose(rules.u[moved], (u + 0.1 * ascent.sign())[moved], atol=1e-3)


@pytest.mark.slow
def test_it_resumes_to_the_bit_and_is_judged(tmp_path, monkeypatch):
    config = stranger_game.Config(**{**SMALL, "runs_dir": str(tmp_path), "name": "whole"})
    whole = stranger_game.job.run(config)
    report = whole.report()
    assert report["n"] == SMALL["eval_n"]
    assert report["accuracy"]["fgsm"] <= report["accuracy"]["clean"]
    step, steps = stranger_game.Universal.step, []

    def stopped(self, *args, **settings):
        steps.append(1)
        if len(steps) == 8:  # within the second epoch
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **settings)

    monkeypatch.setattr(stranger_game.Universal, "step", stopped)
    with pytest.raises(SystemExit):
        stranger_game.job.run(stranger_game.Config(**{**vars(config), "name": "stopped"}))
    resumed = stranger_game.Config(resume=str(tmp_path / "stopped"))
    assert_equal_runs(whole.path, stranger_game.job.run(resumed).path)


def test_it_refuses_in_words(capsys):
    with pytest.raises(SystemExit):
        stranger_game.job.parse(["--attacker-lr", "fast"])
    assert "--attacker-lr" in capsys.readouterr().err


@pytest.mark.slow
def test_it_appears_in_a_study(tmp_path):
    config = MethodsConfig(
        methods=("still", "learning"),
        attacks=("pgd20",),
        seeds=1,
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path),
        extra="--train-n 200 --epochs 1 --eval-n 20",
    )
    stranger_game.Rates.main(config)
    found = json.loads((tmp_path / "digits.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["still", "learning"]
    text = (tmp_path / "digits.md").read_text()
    assert all(f"| {name} | 1 |" in text for name in ("still", "learning"))

"""scripts/train_minimax.py as a stranger runs it: small runs, interrupts, wrong words, files."""

import json
from dataclasses import replace

import pytest
import torch
import train_minimax
from equal_runs import SMALL
from studies import minimax as study_minimax
from torch import Generator
from train_minimax import Config, job

import agents.best_response
from advgame.attacks import fgsm
from advgame.classifiers import make_classifier
from advgame.data import load_data
from advgame.errors import InputError
from advgame.evaluation import score
from advgame.games.minimax import Minimax, SensitivityTraining
from advgame.run import table
from advgame.run.devices import make_fabric
from advgame.run.loop import load_best
from advgame.solvers import Optimistic, Solver
from advgame.threat import Linf


def small(folder, name, **changes):
    settings = {**SMALL, "epochs": 2, "response_steps": 5, "hidden": 20, "model": "small_cnn"}
    return replace(Config(), **{**settings, "runs_dir": str(folder), "name": name, **changes})


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"judged": "best"}])
def test_the_end_of_a_game_is_not_that_of_weights_that_did_not_play(changes, tmp_path):
    run = job.run(small(tmp_path, "run", defence="minimax", response_steps=2, **changes))
    report = json.loads((run.path / "report.json").read_text())
    assert "learned:attnet-curr" in report["accuracy"]
    assert "game" not in report


@pytest.mark.slow
def test_an_interrupted_report_keeps_its_fresh_attacker(tmp_path, monkeypatch):
    """Its verdicts belong to that network, which must not be trained anew."""
    run = job.run(small(tmp_path, "run", defence="plain"))
    before = (run.path / "attnet-curr.safetensors").read_bytes()
    report = json.loads((run.path / "report.json").read_text())
    (run.path / "report.json").unlink()
    monkeypatch.setattr(agents.best_response, "Ascent", None)
    again = job.run(Config(resume=str(run.path)))
    assert (again.path / "attnet-curr.safetensors").read_bytes() == before
    assert json.loads((run.path / "report.json").read_text())["accuracy"] == report["accuracy"]


def test_settings_reach_the_game():
    fabric = make_fabric("cpu", 1, "32-true")
    shape = (1, 8, 8)

    def made(**changes):
        return train_minimax.played(replace(Config(), **changes), shape, 10, fabric.device)

    network_settings = {"output_scale": 3.0, "centre": False}
    game = made(
        ascent_steps=3, attacker_lr=5e-3, hidden=7, dropout=0.25, bound="clip", **network_settings
    )
    assert isinstance(game, Minimax)
    network = game.attacker.module
    sizes = tuple(network.settings.values())[2:]
    assert sizes == (7, 0.25, "clip", 3.0, False)
    assert (game.ascent_steps, game.attacker.optimizer.defaults["lr"]) == (3, 5e-3)
    assert isinstance(made(defence="optimistic").direction, Optimistic)
    for defence, penalty in (("lwa", 0.0), ("sens", 0.25)):
        game = made(defence=defence, penalty=0.25)
        assert isinstance(game, SensitivityTraining)
        assert game.penalty == penalty


def test_every_defence_goes_where_its_formula_says():
    """One step on f = uv from (1, 0.5), rate 0.1, by hand; every setting at its own value."""
    u, v = 1.0, 0.5
    wanted = {
        "alt": (u - 0.1 * v, v + 0.1 * u),
        "minimax": (u - 0.1 * (v + 0.3 * u), v + 0.1 * u),
        "maximin": (u - 0.1 * v, v + 0.1 * (u - 0.3 * v)),
        "unrolled": (u - 0.1 * (v + 2 * 3 * 0.2 * u), v + 0.1 * u),
        "extragradient": (u - 0.1 * (v + 0.2 * u), v + 0.1 * (u - 0.4 * v)),
        "optimistic": (u - 0.1 * v, v + 0.1 * u),
    }
    config = replace(Config(), gamma=0.3, unroll=3, look_ahead_lr=0.2, lr=0.4)
    for defence, end in wanted.items():
        at = [torch.tensor([one], dtype=torch.float64).requires_grad_() for one in (u, v)]
        found = train_minimax.direction(replace(config, defence=defence))
        player, opponent = (torch.optim.SGD([one], 0.1) for one in at)
        Solver(found, player, opponent).step(lambda a, b: (a[0] * b[0]).sum())
        assert [one.item() for one in at] == pytest.approx(end), defence
    mixture = replace(config, defence="mixture", mixture=("fgsm", "attnet"), per="batch")
    game = train_minimax.played(mixture, (1, 8, 8), 10, "cpu")
    assert (game.names, game.per) == (["fgsm", "attnet"], "batch")


@pytest.mark.parametrize("judged", ["last", "best"])
def test_the_report_is_about_the_weights_that_were_asked_for(judged, tmp_path):
    own = {"defence": "plain", "response_steps": 0, "hidden": Config().hidden, "judged": judged}
    run = job.run(small(tmp_path, judged, **own))
    report = json.loads((run.path / "report.json").read_text())
    module = make_classifier("small_cnn", (1, 8, 8), 10, None)
    load_best(run, module, judged)
    wanted = score(module, load_data("digits").test.first(20), fgsm(Linf(0.15)), Generator())
    assert report["accuracy"]["clean"] == pytest.approx(wanted[0])
    assert ("best" in report) == (judged == "last") != ("last" in report)
    assert {"last": "last", "best": "clean accuracy"}[judged] in report["weights"]


def test_a_study_of_earlier_weights_is_refused_before_any_training(tmp_path):
    config = study_minimax.Config(extra="--judged best", out=str(tmp_path), runs_dir=str(tmp_path))
    with pytest.raises(InputError, match="about the last weights"):
        study_minimax.main(config)
    assert not list(tmp_path.iterdir())


def test_defences_are_compared_with_minimax_seed_by_seed():
    def run(method, seed, error, **more):
        return {"method": method, "seed": seed, "error_a": error, **more}

    runs = [run("minimax", s, 0.1 * s) for s in range(3)]
    runs += [run("alt", s, 0.1 * s + d, error_b=0.0) for s, d in enumerate((0.1, 0.2, 0.3))]
    runs += [run("plain", 2, 0.9), run("lwa", 7, 0.9), run("lwa", 8, 0.9)]
    columns = {name: table.Number(f"error_{name}") for name in "ab"}
    told, text = study_minimax.against(runs, columns, "minimax")
    assert "above 0 Minimax loses less" in told
    lines = text.splitlines()
    # t of 2 degrees of freedom is 4.303, the standard error 0.1 / √3
    assert lines[-1] == "| alt | 3 | +0.200 ± 0.248 | – |"
    assert len(lines) == 3
    assert study_minimax.against(runs[3:], columns, "minimax") == []
    told, text = study_minimax.against(runs, columns, "alt", ["minimax", "plain"])
    assert "above 0 alt loses less" in told
    assert text.splitlines()[-1] == "| minimax | 3 | -0.200 ± 0.248 | – |"


@pytest.mark.long
def test_the_study_writes_the_tables_of_the_paper(tmp_path):
    extra = "--train-n 100 --epochs 2 --batch-size 50 --eval-n 20 --response-steps 3 --hidden 9"
    config = study_minimax.Config(
        seeds=1,
        methods=("plain", "minimax", "maximin"),
        attacks=("mvm:fgsm", "pgd20"),
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path / "results"),
        extra=extra,
    )
    study_minimax.main(config)
    made = json.loads((tmp_path / "results" / "digits-small_cnn-0.15.json").read_text())
    cell = made["runs"][1]
    folder = tmp_path / "runs" / "digits-small_cnn-0.15" / "minimax-seed0"
    report = json.loads((folder / "report.json").read_text())
    assert cell["error_pgd20"] == 1 - report["accuracy"]["pgd20"]
    assert cell["error_types"] == pytest.approx(1 - report["worst_case"])  # all its attacks
    table = (tmp_path / "results" / "digits-small_cnn-0.15.md").read_text()
    assert f"| {cell['error_pgd20']:.3f} | {cell['error_learned:attnet-curr']:.3f} |" in table
    assert "5. maximin ≤ minimax" in table
    study_minimax.main(replace(config, methods=("plain",), finished_only=True))
    again = json.loads((tmp_path / "results" / "digits-small_cnn-0.15.json").read_text())
    assert again["runs"] == made["runs"]
    later = replace(config, runs_dir=str(tmp_path / "later"), methods=("plain",), seeds=2)
    study_minimax.main(replace(later, missing_only=True))
    cells = (tmp_path / "later" / "digits-small_cnn-0.15").glob("*-seed*")
    assert [folder.name for folder in cells] == ["plain-seed1"]
    again = json.loads((tmp_path / "results" / "digits-small_cnn-0.15.json").read_text())
    assert [run for run in again["runs"] if run["seed"] == 0] == made["runs"]
    assert len(again["runs"]) == len(made["runs"]) + 1
    for changes, answer in (
        ({"methods": ("strong",)}, "unknown method"),
        ({"attacks": ("pgd20",)}, "need mvm:fgsm"),
        ({"extra": ""}, "other flags"),
    ):
        with pytest.raises(InputError, match=answer):
            study_minimax.main(replace(config, **changes))


def test_every_data_set_has_settings_of_its_own(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        config = job.check(job.defaults(dataset=name))
        assert config.dataset == name
        if name != "digits":
            with pytest.raises(InputError, match="--data-dir"):
                job.run(replace(config, runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())

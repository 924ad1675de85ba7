"""scripts/train.py as a stranger runs it: small runs, interrupts, wrong words, files."""

import sys
from dataclasses import fields, replace

import pytest
import torch
import train
import train_adt
import train_l2l
import train_las_at
from equal_runs import SMALL
from published import PUBLISHED
from train import Config, job

from advgame.attacks.label_free import published_transport_from, transport_from
from advgame.data import load_data
from advgame.errors import InputError
from advgame.evaluation import validator
from advgame.games.awp import AWPDefender
from advgame.run.defender_job import training_plan
from advgame.run.devices import make_fabric
from advgame.run.folder import Metrics
from advgame.run.loop import load_best
from advgame.run.selection import criterion
from advgame.run.settings import RunConfig
from advgame.threat import Linf


def small(folder, name, game, **changes):
    settings = {**SMALL, "epochs": 2, "runs_dir": str(folder), "name": name, **changes}
    return replace(job.defaults(dataset="digits", game=game), **settings)


def cpu():
    return make_fabric("cpu", 1, "32-true")


def test_a_collapse_is_in_the_report(tmp_path, monkeypatch):
    collapse = {"epoch": 2, "fgsm": 0.9, "pgd10": 0.1, "best": 0.4}
    monkeypatch.setattr("advgame.evaluation.judge.catastrophic_overfitting", lambda rows: collapse)
    run = job.run(small(tmp_path, "fast", "fast", epochs=1))
    assert run.report()["catastrophic_overfitting"] == collapse
    assert "from 40.0 to 10.0" in (run.path / "report.md").read_text()


def test_standard_training_is_selected_by_clean_accuracy_and_says_so(tmp_path):
    settings = {"epochs": 6, "train_n": None, "eps": "0.3", "name": "plain"}
    run = job.run(small(tmp_path, game="standard", **settings))
    rows = Metrics.read(run.path / "metrics.csv")
    clean, robust = ([row[f"eval/{by}"] for row in rows] for by in ("clean", "robust"))
    chosen = clean.index(max(clean))
    assert clean[robust.index(max(robust))] < max(clean), "PGD-10 would have chosen others"
    module = job.classifier(job.defaults(game="standard"), load_data("digits").train, cpu())
    load_best(run, module)
    validation = load_data("digits").validation
    found = validator(validation, Linf(0.3), seed=0)(module)
    assert (found["eval/clean"], found["eval/robust"]) == (clean[chosen], robust[chosen])
    assert run.about()["config"]["select"] == "clean"
    for said in (run.report()["weights"], run.report()["selected_by"]):
        assert "clean accuracy" in said


def test_what_selects_can_be_asked_for_and_a_run_made_before_it_took_pgd(tmp_path):
    run = job.run(small(tmp_path, "asked", "standard", epochs=1, select="robust"))
    assert "PGD-10" in run.report()["weights"]
    about = run.about()
    del about["config"]["select"]
    run.write_json("config.json", about)
    assert criterion(run) == "robust"
    with pytest.raises(InputError, match="another script or version"):  # no default is made up
        job.run(Config(resume=str(run.path)))


def test_every_game_has_its_settings_and_a_line(capsys, monkeypatch):
    known = {field.name for field in fields(Config)}
    for name, game in train.GAMES.items():
        assert set(game.settings) <= known
        assert {*set(game.settings) - {one.name for one in fields(RunConfig)}} <= {*train.OPTIONS}
        for dataset in ("digits", "mnist", "cifar10", "svhn"):
            config = job.check(job.defaults(dataset=dataset, game=name))
            assert (config.game, config.dataset) == (name, dataset)
    assert job.defaults(dataset="digits", game="free").epochs == 40 // 8
    monkeypatch.setattr(sys, "argv", ["train.py", "--list"])
    job.from_command_line()
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in train.GAMES)
    assert "--beta 6.0" in said


def test_published_settings_are_the_papers():
    """Epochs, learning rate, weight decay, batch size, ε, as the published code has them."""
    said = {
        "pgd-at": (200, 0.1, 5e-4, 128, "8/255"),
        "fast": (15, 0.2, 5e-4, 128, "8/255"),
        "free": (11, 0.04, 5e-4, 128, "8/255"),
        "trades": (76, 0.1, 2e-4, 128, "0.031"),
        "mart": (120, 0.01, 3.5e-3, 128, "0.031"),
        "feature-scatter": (200, 0.1, 2e-4, 60, "8/255"),
    }
    assert set(PUBLISHED) == set(said) <= set(train.GAMES)
    found = {
        name: job.check(job.defaults(dataset="cifar10", game=name, preset="repo")) for name in said
    }
    for name, c in found.items():
        assert (c.epochs, c.lr, c.weight_decay, c.batch_size, c.eps) == said[name], name
        assert c.ema is None
        assert set(PUBLISHED[name]) <= {field.name for field in fields(Config)}
    models = {"trades": "wrn-34-10", "mart": "resnet18", "feature-scatter": "wrn-28-10"}
    models |= {"pgd-at": "preact_resnet18"}
    models |= dict.fromkeys(("fast", "free"), "preact_resnet18-fast")
    assert {name: found[name].model for name in models} == models
    las = train_las_at.job.defaults(dataset="tinyimagenet", preset="repo")
    assert train_las_at.job.check(las).model == "preact_resnet18-las"
    assert [found[name].beta for name in ("trades", "mart")] == [6.0, 5.0]
    assert [found[name].normalise for name in ("pgd-at", "trades", "mart")] == [True, False, False]
    for name in ("trades", "mart"):
        assert found[name].step_size * 0.031 == pytest.approx(0.007)
    assert (found["free"].replays, found["fast"].step_size) == (8, 1.25)
    assert [found[name].attack_mode for name in ("pgd-at", "fast")] == ["train", "train"]


def test_published_rates_drop_before_the_epochs_of_the_published_loops():
    """Those who count from 1 ask whether the epoch that begins is ``drop`` or above."""
    loops = {  # what the first epoch is called, and where the rate drops
        "trades": (train, 1, (75, 90, 100)),
        "mart": (train, 1, (75, 90, 100)),
        "feature-scatter": (train, 0, (60, 90)),
        "pgd-at": (train, 0, (100, 150)),
        "adt": (train_adt, 1, (75, 90, 100)),
        "l2l": (train_l2l, 1, (30, 60, 90)),
        "las-at": (train_las_at, 0, (99, 104)),
    }
    for name, (script, first, drops) in loops.items():
        game = {"game": name} if script is train else {}
        config = script.job.defaults(dataset="cifar10", preset="repo", **game)
        optimizer = torch.optim.SGD([torch.zeros(1)], config.lr)
        schedule = training_plan(config).scheduler(optimizer, 5 * config.epochs)
        for epoch in range(first, first + config.epochs):
            wanted = config.lr * 0.1 ** sum(epoch >= drop for drop in drops)
            for _ in range(5):
                rate = optimizer.param_groups[0]["lr"]
                assert rate == pytest.approx(wanted), (name, epoch)
                optimizer.step()
                schedule.step()


def test_settings_reach_the_game():
    fabric, data = cpu(), load_data("digits")

    def built(name, **changes):
        config = job.check(replace(job.defaults(dataset="digits", game=name), **changes))
        return job.game(config, data, fabric)

    rules = built("trades", beta=2.0, attack_steps=3, step_size=0.5, eps="0.1").rules
    attack = rules.attack(rules.threat).attack
    assert (rules.beta, attack.steps, attack.step_size) == (2.0, 3, pytest.approx(0.05))
    rules = built("fast", attack_mode="train", step_size=0.5).rules
    attack = rules.attack(rules.threat)
    assert (attack.mode, attack.step_size) == ("train", pytest.approx(0.075))
    attack = built("n-fgsm", noise=1.0).rules.attack(rules.threat)
    assert float(attack.threat.eps) == pytest.approx(0.3)
    assert built("free", replays=3).rules.replays == 3
    game = built("mart", awp=0.02, true_probability=0.9)
    assert isinstance(game.defender, AWPDefender)
    assert (game.defender.gamma, game.defender.true_probability) == (0.02, 0.9)
    assert game.defender.warm_up == round(0.3 * 40 * game.steps_per_epoch)
    for name, loss in (("fixed", transport_from), ("repo", published_transport_from)):
        game = built("feature-scatter", transport=name)
        assert game.defender.true_probability == 0.5
        assert game.rules.attack(game.rules.threat).loss_from is loss
    assert job.defaults(dataset="digits", game="feature-scatter").transport == "fixed"
    assert (
        job.defaults(dataset="cifar10", game="feature-scatter", preset="repo").transport == "repo"
    )

"""scripts/train_adt.py as a stranger runs it: small runs, interrupts, wrong words, its samplers."""

import json
import sys
from dataclasses import replace

import evaluate
import pytest
from equal_runs import SMALL
from train_adt import Config, job

from advgame.data import load_data
from advgame.errors import InputError
from advgame.games.adt import AdtAmortised, AdtExp
from advgame.run.cli import run_script
from advgame.run.devices import make_fabric
from advgame.threat import Linf
from agents.adt import ExplicitPlayer, ImplicitPlayer


def small(folder, name, **changes):
    settings = {**SMALL, "train_n": 100, "epochs": 2, "draws": 3}
    settings |= {"runs_dir": str(folder), "name": name}
    return replace(Config(), **{**settings, **changes})


@pytest.mark.slow
def test_its_generator_attacks_any_classifier(tmp_path, monkeypatch):
    job.run(small(tmp_path, "whole", epochs=1))
    run = job.run(small(tmp_path, "cut", epochs=1, method="imp-am", lam=1.0, latent=4)).path
    monkeypatch.chdir(run.parent)
    words = ["whole", "--attackers", "cut", "--attacks", "fgsm", "--n", "20", "--name", "e"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--queries", "7"])
    run_script(evaluate.job.from_command_line)
    report = json.loads((run.parent / "runs" / "e" / "report.json").read_text())
    assert list(report["accuracy"]) == ["clean", "fgsm", "learned:cut-worst-of-5"]
    standing = round(20 * report["accuracy"]["clean"])
    assert report["calls"]["learned:cut-worst-of-5"]["backwards"] == 2 * standing


def test_presets_data_sets_and_methods_have_settings_of_their_own(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        for preset in ("default", "repo"):
            for method in ("exp", "exp-am", "imp-am"):
                config = job.check(job.defaults(dataset=name, preset=preset, method=method))
                assert (config.dataset, config.preset, config.method) == (name, preset, method)
                assert config.lam == (1.0 if method == "imp-am" else 0.01)
        if name != "digits":
            with pytest.raises(InputError, match="--data-dir"):
                job.run(replace(config, runs_dir=str(tmp_path)))
    repo = job.defaults(dataset="cifar10", preset="repo")
    assert (repo.model, repo.generator, repo.ngf, repo.latent) == (
        "wrn-28-10", "resnet-3blocks", 256, 64,
    )  # fmt: skip
    assert (repo.epochs, repo.batch_size, repo.eps, repo.weight_decay) == (76, 64, "8/255", 2e-4)
    assert job.defaults(dataset="svhn", preset="repo").eps == "4/255"
    assert not list(tmp_path.iterdir()), "nothing is left behind by a refused run"


def test_settings_reach_the_game():
    fabric = make_fabric("cpu", 1, "32-true")

    def made(preset, method, **changes):
        config = replace(job.defaults(dataset="digits", preset=preset, method=method), **changes)
        return job.rules(config, load_data("digits").train, fabric)

    changes = {"inner_steps": 3, "samples": 4, "inner_lr": 0.2, "inner_betas": (0.5, 0.9)}
    game = made("default", "exp", lam=0.5, **changes)
    assert isinstance(game, AdtExp)
    attack = game.attack
    assert (attack.steps, attack.samples, attack.lr, attack.betas) == (3, 4, 0.2, (0.5, 0.9))
    assert (attack.lam, attack.accumulate, attack.batch_mean) == (0.5, False, False)
    assert attack.threat == Linf(0.15)
    repo = made("repo", "exp").attack
    assert (repo.steps, repo.samples, repo.lr, repo.betas) == (7, 5, 0.3, (0.0, 0.0))
    assert (repo.accumulate, repo.batch_mean) == (True, True)
    game = made("repo", "exp-am")
    assert isinstance(game, AdtAmortised)
    assert isinstance(game.attacker, ExplicitPlayer)
    group = game.attacker.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], game.attacker.lam) == (2e-4, (0.5, 0.999), 0.01)
    assert game.attacker.module.scaling == "raw"
    for preset, threshold in (("repo", 0.9), ("default", 0.5)):
        player = made(preset, "imp-am", encoder_lr=0.5, latent=3).attacker
        assert isinstance(player, ImplicitPlayer)
        assert (player.threshold, player.lazy) == (threshold, preset == "repo")
        assert player.module.latent == 3
        assert player.encoder_optimizer.param_groups[0]["lr"] == 0.5
        assert player.module.scaling == ("raw" if preset == "repo" else "image")

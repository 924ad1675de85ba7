"""scripts/train_l2l.py as a stranger runs it: small runs, interrupts, wrong words, its attacker."""

import json
import sys
from dataclasses import replace

import evaluate
import pytest
import torch
from equal_runs import SMALL
from studies import l2l as study_l2l
from train_l2l import Config, job

from advgame.data import load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import validator
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.l2l import Modes
from advgame.games.training import PANELS, DefenderTraining
from advgame.run.cli import run_script
from advgame.run.devices import make_fabric
from advgame.run.folder import Metrics, RunFolder
from advgame.run.loop import load_best
from advgame.run.selection import SCORES
from advgame.threat import Linf


def small(folder, name, **changes):
    settings = {**SMALL, "epochs": 2, "runs_dir": str(folder), "name": name, **changes}
    return replace(Config(), **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of Grad, and one of plain training."""
    folder = tmp_path_factory.mktemp("l2l") / "digits"
    job.run(small(folder, "grad-seed0"))
    job.run(small(folder, "plain-seed0", attacker="plain"))
    return folder


@pytest.mark.drawn
def test_a_run_leaves_its_curves(runs):
    rows = Metrics.read(runs / "grad-seed0" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    for _, columns in PANELS.values():
        assert set(columns) - {"game/pairing_loss"} <= set(rows[-1])
    assert rows[-1]["attacker/forwards_per_image"] == 4 + 3 + 2
    assert (runs / "grad-seed0" / "curves.png").stat().st_size > 10_000
    plain = Metrics.read(runs / "plain-seed0" / "metrics.csv")
    assert plain[-1]["game/clean_loss"] > 0
    assert not any(name.startswith("attacker/size") for name in plain[-1])


def test_the_clean_loss_of_naive_comes_from_the_end_of_the_epoch(tmp_path):
    run = job.run(small(tmp_path, "naive", attacker="naive", epochs=1))
    row = Metrics.read(run.path / "metrics.csv")[-1]
    assert row["game/clean_loss"] > 0
    assert row["cost/forwards"] == 2


def test_each_attacker_selects_by_what_its_game_is_for(runs, tmp_path):
    naive = job.run(small(tmp_path, "naive", attacker="naive", epochs=4, eps="0.3"))
    rows = Metrics.read(naive.path / "metrics.csv")
    scores, robust = ([row[f"eval/{by}"] for row in rows] for by in ("own_attacker", "robust"))
    assert scores.index(max(scores)) != robust.index(max(robust))
    module = job.game(Config(), load_data("digits"), make_fabric("cpu", 1, "32-true"))
    load_best(naive, module.defender.module)
    found = validator(load_data("digits").validation, Linf(0.15), 0)(module.defender.module)
    assert found["eval/clean"] == rows[scores.index(max(scores))]["eval/clean"]
    said = {
        "own": naive.report()["selected_by"],
        "clean": RunFolder(runs / "plain-seed0").report()["selected_by"],
        "robust": RunFolder(runs / "grad-seed0").report()["selected_by"],
    }
    assert said == {name: SCORES[name][1] for name in said}


def test_its_attacker_is_an_attack_on_any_classifier(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for target in ("grad", "plain"):
        words = [f"{target}-seed0", "--attackers", "grad-seed0", "--attacks", "fgsm"]
        words += ["--n", "40", "--name", target]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        run_script(evaluate.job.from_command_line)
        report = json.loads((runs / "runs" / target / "report.json").read_text())
        assert list(report["accuracy"]) == ["clean", "fgsm", "learned:grad-seed0"]
        standing = round(40 * report["accuracy"]["clean"])
        assert report["calls"]["learned:grad-seed0"]["backwards"] == standing
    settings = json.loads((runs / "runs/plain/evaluation/settings.json").read_text())
    (network,) = settings["extra"].values()
    assert "L2LNetwork" in network, "the attacker's weights are part of what was measured"


def test_the_repo_preset_and_every_data_set_have_settings_of_their_own(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        for preset in ("default", "repo"):
            config = job.check(job.defaults(dataset=name, preset=preset))
            assert config.dataset == name
            assert config.weight_decay == 2e-4
            if name != "digits":
                with pytest.raises(InputError, match="--data-dir"):
                    job.run(replace(config, runs_dir=str(tmp_path)))
    usual = job.defaults(dataset="cifar10", accelerator="cuda")
    assert (usual.width, usual.eps) == ("slim", "0.031")
    assert job.defaults(dataset="cifar10", accelerator="cpu").width == "small"
    repo = job.defaults(dataset="cifar10", preset="repo")
    assert (repo.width, repo.scaling, repo.gradient_mode) == ("wide-repo", "paper", "repo")
    assert repo.epochs == 76
    assert not list(tmp_path.iterdir()), "nothing is left behind by a refused run"


def test_the_study_reads_finished_cells(runs, tmp_path):
    config = study_l2l.Config(
        seeds=1,
        methods=("plain", "grad"),
        attacks=("fgsm",),
        runs_dir=str(runs.parent),
        out=str(tmp_path / "results"),
    )
    study_l2l.main(config)
    made = json.loads((tmp_path / "results" / "digits.json").read_text())
    report = json.loads((runs / "grad-seed0" / "report.json").read_text())
    assert [cell["method"] for cell in made["runs"]] == ["plain", "grad"]
    assert list(made["runs"][1]["curves"]) == list(study_l2l.CURVES)
    assert "game/adversarial_loss" not in made["runs"][0]["curves"]
    assert made["summary"]["grad"]["accuracy_fgsm"]["mean"] == report["accuracy"]["fgsm"]
    table = (tmp_path / "results" / "digits.md").read_text()
    assert f"| {100 * report['worst_case']:.1f} | " in table
    assert "85.84, 51.17" in table
    last = f"| grad | {100 * report['last']['clean']:.1f} | {100 * report['last']['pgd20']:.1f} | "
    assert last in table
    later = replace(config, methods=("plain",), finished_only=True)  # grad's folder may be gone
    study_l2l.main(later)
    again = json.loads((tmp_path / "results" / "digits.json").read_text())
    assert again["runs"] == made["runs"]
    assert list(again["summary"]) == ["plain", "grad"]
    with pytest.raises(InputError, match="unknown method"):
        study_l2l.main(replace(config, methods=("strong",)))
    assert set(study_l2l.PAPER) <= set(study_l2l.METHODS)


@pytest.mark.slow
def test_the_study_draws_sparse_validations_and_refuses_other_flags(tmp_path):
    extra = "--train-n 100 --epochs 3 --batch-size 50 --eval-n 20 --validate-every 2"
    config = study_l2l.Config(
        seeds=1,
        methods=("grad",),
        attacks=("fgsm",),
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path / "results"),
        extra=extra,
    )
    study_l2l.main(config)
    (cell,) = json.loads((tmp_path / "results" / "digits.json").read_text())["runs"]
    epochs = {tag: [point[0] for point in points] for tag, points in cell["curves"].items()}
    assert epochs["eval/robust"] == [2, 3]
    assert epochs["game/adversarial_loss"] == [1, 2, 3]
    for changes in ({"attacks": ("pgd20",)}, {"extra": ""}):
        with pytest.raises(InputError, match="other flags"):
            study_l2l.main(replace(config, **changes))
        with pytest.raises(InputError, match="another --runs-dir"):
            study_l2l.main(replace(config, **changes, out=str(tmp_path / "new")))


def test_settings_reach_the_game():
    fabric, images = make_fabric("cpu", 1, "32-true"), load_data("digits").train
    changes = {
        "attacker": "k-step", "steps": 4, "gradient_mode": "repo", "attacker_mode": "train",
        "learning_mode": "train", "attacker_lr": 2e-3, "attacker_lr_factor": 3.0,
        "attacker_weight_decay": 0.25, "scaling": "paper", "attacker_steps": 5,
    }  # fmt: skip
    game = job.rules(replace(Config(), **changes), images, fabric)
    assert game.modes == Modes("train", "train", "train", keep_buffers=False)
    assert (game.attacker.gradients, game.attacker.module.scaling) == (4, "paper")
    assert game.attacker_steps == 5
    group = game.attacker.optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (pytest.approx(6e-3), (0.9, 0.999))
    assert group["weight_decay"] == 0.25
    pgd = job.rules(replace(Config(), attacker="pgd"), images, fabric)
    attack = pgd.attack(Linf(0.31))
    assert (attack.steps, attack.step_size) == (10, pytest.approx(0.07))


def test_epsilon_grows_from_nothing_to_its_full_size(digits):
    seen = []

    class Watched(AdversarialTraining):
        def step(self, defender, x, y, rng, *, scale=1.0):
            seen.append(scale)
            return super().step(defender, x, y, rng, scale=scale)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    game = DefenderTraining(Watched(Linf(0.1)), Defender(model), digits.train, 32, 0, ramp_steps=4)
    for _ in range(6):
        game.step()
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1]
    with pytest.raises(InputError, match="ramp_steps"):
        DefenderTraining(Watched(Linf(0.1)), Defender(model), digits.train, 32, 0, ramp_steps=-1)


def test_what_a_study_gives_to_all_does_not_reach_controls_that_refuse_it():
    config = study_l2l.Config(seeds=1, extra="--scaling=paper --epochs 2 --width slim")
    cells = study_l2l.L2LStudy(config).cells()
    assert "--scaling=paper" in cells["grad-seed0"]
    for name in ("plain", "fgsm", "pgd"):
        words = cells[f"{name}-seed0"]
        assert not {"--scaling=paper", "--width", "slim"} & set(words)
        assert words[words.index("--epochs") + 1] == "2"

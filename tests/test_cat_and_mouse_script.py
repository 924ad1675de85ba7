"""The cat-and-mouse game's script and study: matrix, tables, resumption, wrong words."""

import json
import shutil
import signal
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from equal_runs import SMALL, assert_equal_runs
from studies import cat_and_mouse as study_cat_and_mouse
from train_cat_and_mouse import Config, Job, job

from advgame.classifiers import SmallCNN
from advgame.data import load_data
from advgame.errors import InputError
from advgame.games.cat_and_mouse import CatAndMouse, classifier_file, errors_under
from advgame.run import folder
from advgame.run.checkpoint import load_weights
from advgame.run.folder import Metrics
from advgame.run.table import rows

EPS, STEPS = 0.15, 3


TINY = {**SMALL, "epochs": 0, "rounds": 4, "round_steps": 8, "clean_rounds": 1, "test_n": 40}


def settings(folder, name, **changes):
    words = {**TINY, "runs_dir": str(folder), "name": name, **changes}
    return replace(Config(), **words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of the script."""
    return job.run(settings(tmp_path_factory.mktemp("runs"), "whole"))


def place(folder, number):
    module = SmallCNN((1, 8, 8), 10)
    load_weights(module, classifier_file(folder / "rounds", number))
    return module.eval()


def test_the_matrix_is_what_a_few_lines_of_torch_find(whole):
    """Every entry, and the curves are its diagonals."""
    found = json.loads((whole.path / "matrix.json").read_text())
    test = load_data("digits").test.first(40)
    x, y = test.floats(), test.labels

    def wrong(model, images):
        return float((model(images).argmax(1) != y).float().mean())

    classifiers = [place(whole.path, number) for number in range(5)]
    assert np.shape(found["errors"]) == (5, 5)
    assert found["n"] == 40
    assert found["clean"] == pytest.approx([wrong(model, x) for model in classifiers])
    for number, source in enumerate(classifiers):  # attack number + 1
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(source(leaf), y), leaf)
        made = (x + EPS * slope.sign()).clamp(0, 1)
        column = [row[number] for row in found["errors"]]
        assert column == pytest.approx([wrong(model, made) for model in classifiers])
    rows = Metrics.read(whole.path / "metrics.csv")
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    errors = np.array(found["errors"])
    assert [row["game/clean_error"] for row in rows] == found["clean"]
    assert [r["game/attack_error"] for r in rows[1:]] == errors.diagonal()[:4].tolist()
    assert [r["game/defence_error"] for r in rows[1:]] == errors.diagonal(-1).tolist()


def test_two_games_without_a_name_that_begin_in_one_second_get_two_folders(tmp_path, monkeypatch):
    now = SimpleNamespace(now=lambda: datetime(2026, 12, 1))  # the second does not end
    monkeypatch.setattr(folder, "datetime", now)
    short = settings(tmp_path, "", rounds=1, round_steps=1, validate_every=9)
    others, first = [], Job()

    class Second(Job):
        def build(self, config, fabric):
            others.append(first.run(short))
            return super().build(config, fabric)

        def settle(self, config, fabric, typed):
            return config, self.build(config, fabric)

    run = Second().run(short)
    assert run.path != others[0].path
    for one in (run, others[0]):
        assert classifier_file(one.path / "rounds", 1).exists()
        assert (one.path / "report.json").exists()


def test_the_table_is_the_papers_cut(whole):
    found = json.loads((whole.path / "matrix.json").read_text())
    text = (whole.path / "matrix.md").read_text()
    assert "| defence | clean | attack 1 | attack 2 | attack 4 | attack-curr |" in text
    for row, label in ((0, "No defence"), (1, "Adv 1"), (2, "Adv 2"), (4, "Adv 4")):
        errors = found["errors"][row]
        shown = [found["clean"][row], *(errors[k - 1] for k in (1, 2, 4)), errors[row]]
        assert f"| {label} | {' | '.join(f'{value:.3f}' for value in shown)} |" in text
    assert whole.report()["weights"].endswith("4"), "the last round's"
    assert whole.report()["n"] == 20
    for picture in ("curves.png", "matrix.png"):
        assert (whole.path / picture).stat().st_size


def interrupted(folder, after, **changes):
    """A run that SIGTERM stops after so many steps, and its resumption."""
    real, played = CatAndMouse.step, []

    def stopped(self):
        played.append(0)
        if len(played) == after:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CatAndMouse, "step", stopped)
        with pytest.raises(SystemExit) as stop:
            job.run(settings(folder, "cut", **changes))
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(played) == after
    return job.run(Config(resume=str(folder / "cut")))


def assert_equal_games(one, two, rounds):
    assert_equal_runs(one, two)
    names = [f"rounds/classifier_{number:03d}.safetensors" for number in range(rounds + 1)]
    for name in ("matrix.json", *names):
        first, second = ((run / name).read_bytes() for run in (one, two))
        assert first.replace(b"--name whole", b"--name cut") == second


def test_stopped_between_rounds_and_resumed_is_the_same_to_the_bit(whole, tmp_path):
    assert_equal_games(whole.path, interrupted(tmp_path, 24).path, 4)


@pytest.mark.slow
def test_stopped_within_a_round_and_resumed_is_the_same_to_the_bit(tmp_path, monkeypatch):
    """With random starts, dropout, and weights that began the round anew."""
    monkeypatch.setattr(
        "advgame.evaluation.judge.find_flags", lambda *_: []
    )  # they take the longest
    sizes = {"batch_size": 16, "round_steps": 3, "rounds": 2, "validate_every": 3}
    changes = {"attack": "pgd10", "restart_weights": True, "model": "minimax_cnn", **sizes}
    run = job.run(settings(tmp_path, "whole", **changes))
    assert_equal_games(run.path, interrupted(tmp_path, 5, **changes).path, 2)


def test_an_interrupted_matrix_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(whole.path, folder)
    (folder / "report.json").unlink()
    (folder / "matrix" / "attack_002.json").unlink()
    monkeypatch.setattr("advgame.evaluation.judge.find_flags", lambda *_: [])
    real, asked = errors_under, []
    monkeypatch.setattr(
        "advgame.games.cat_and_mouse.errors_under",
        lambda n, *rest: (asked.append(n), real(n, *rest))[1],
    )
    job.run(Config(resume=str(folder)))
    assert asked == [2]
    assert (folder / "matrix.json").read_bytes() == (whole.path / "matrix.json").read_bytes()


def test_a_run_is_not_overwritten_and_every_data_set_has_settings(tmp_path):
    for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"):
        config = job.check(job.defaults(dataset=name))
        assert config.dataset == name
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="never overwritten"):
        job.run(settings(tmp_path, "one"))


def test_answers_of_a_game_that_is_known():
    """Two classifiers in turn: each falls to the attack on its own kind, and the first returns."""
    rounds = 8
    kind = [k % 2 for k in range(rounds + 1)]
    errors = [
        [float(kind[row] == kind[column]) for column in range(rounds + 1)] for row in range(9)
    ]
    found = study_cat_and_mouse.answers({"errors": errors})
    assert found["mean"] == 1
    assert found["swing"] == 0
    assert found["trend"] == pytest.approx(0, abs=1e-9)
    assert found["defended"] == 0
    assert found["before_last"] == 1
    assert found["first"] == pytest.approx(4 / 7), "even classifiers, of 2 to 8"
    assert found["first_worst"] == 1
    for k in range(1, rounds + 2):  # attack k on classifier k-1: 0.2, 0.6, 0.2, …
        errors[k - 1][k - 1] = 0.6 if k % 2 else 0.2
    found = study_cat_and_mouse.answers({"errors": errors})
    assert found["swing"] == pytest.approx(0.4)
    assert found["turns"] == 1


def test_a_study_of_too_few_rounds_is_refused_before_any_training(tmp_path):
    config = study_cat_and_mouse.Config(
        extra="--rounds 3", out=str(tmp_path), runs_dir=str(tmp_path)
    )
    with pytest.raises(InputError, match="4 rounds or more"):
        study_cat_and_mouse.main(config)
    assert not list(tmp_path.iterdir())


def test_the_study_writes_its_tables_and_pictures(whole, tmp_path):
    """Two cells, the second a copy in which every attack fools half of the images."""
    for seed in range(2):
        folder = tmp_path / "cat_and_mouse_digits" / f"fgsm-0.15-seed{seed}"
        shutil.copytree(whole.path, folder)
        about = json.loads((folder / "config.json").read_text())
        about["config"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(about))
    matrix = json.loads((folder / "matrix.json").read_text())
    matrix["errors"] = [[0.5] * 5] * 5
    (folder / "matrix.json").write_text(json.dumps(matrix))
    config = study_cat_and_mouse.Config(
        seeds=2, attacks=("fgsm",), finished_only=True, runs_dir=str(tmp_path), out=str(tmp_path)
    )
    study_cat_and_mouse.main(config)
    name = tmp_path / "cat_and_mouse_digits"
    content = json.loads(name.with_suffix(".json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    row = content["summary"]["fgsm, ε 0.15"]
    first = json.loads((whole.path / "matrix.json").read_text())["errors"]
    answers = [study_cat_and_mouse.answers({"errors": one}) for one in (first, [[0.5] * 5] * 5)]
    assert row["swing"]["mean"] == pytest.approx((answers[0]["swing"] + answers[1]["swing"]) / 2)
    wrong = 1 - whole.report()["accuracy"]["fgsm"]
    assert [run["last"]["fgsm"] for run in content["runs"]] == pytest.approx([wrong, wrong])
    text = name.with_suffix(".md").read_text()
    assert "Table 3, fgsm, ε 0.15 (η 0.3)" in text
    shown = [f"{round((round(first[1][k], 4) + 0.5) / 2, 4):.3f}" for k in (0, 1, 3, 1)]
    assert f" | {' | '.join(shown)} |" in text
    for picture in ("cat_and_mouse_digits.png", "cat_and_mouse_digits_matrix.png"):
        assert (tmp_path / picture).stat().st_size


@pytest.mark.parametrize(("eps", "shown"), [("1e-1", "0.1"), ("0.15", "0.15"), ("8/255", "0.0314")])
def test_a_cell_is_known_by_its_radius_however_that_is_typed(eps, shown):
    config = study_cat_and_mouse.Config(eps=(eps,), seeds=1, first_seed=7)
    study = study_cat_and_mouse.CatAndMouseStudy(config)
    ((name, flags),) = study.cells().items()
    assert study.key(name, flags) == (f"fgsm, ε {shown}", 7)


def test_the_papers_numbers_stand_beside_ours():
    run = {"method": "fgsm, ε 0.15", "clean": [0.1] * 5, "errors": [[0.2] * 5] * 5}
    (row,) = rows([run])
    text = "\n".join(study_cat_and_mouse.table_3(row, True))
    wanted = "0.100 [.009] | 0.200 [.335] | 0.200 [.273] | 0.200 [.009] | 0.200 [.442]"
    assert f"| Adv 4 | {wanted} |" in text
    assert "[" not in "".join(study_cat_and_mouse.table_3(row, False))

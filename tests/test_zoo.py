"""The zoo: names, cards made from runs, checksums, and `zoo:NAME` wherever a run can be named."""

import json
import re
import shutil

import evaluate
import pytest
import ship
import sweeps
import torch
from conftest import ROOT
from torch import nn

import advgame
from advgame import zoo
from advgame.arena.mixture_file import read_mixture, write_mixture
from advgame.errors import InputError
from advgame.evaluation.cells import describe
from advgame.run.checkpoint import save_weights
from advgame.run.cli import run_script
from advgame.run.defender_job import start
from advgame.run.files import digest
from advgame.statistics import wilson
from advgame.targets import from_run, shipped
from advgame.zoo import entries, shipping

DIGITS = "digits/pgd-at-small_cnn-seed0"
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A zoo of one entry that a test may damage."""
    folder = tmp_path / "zoo"
    shutil.copytree(entries.HOME / DIGITS, folder / DIGITS)
    monkeypatch.setattr(entries, "HOME", folder)
    return folder


def check(name):
    evaluate.job.check(evaluate.job.parse([f"zoo:{name}"]))


@pytest.mark.parametrize("name", zoo.list())
def test_every_classifier_loads_and_takes_images(name):
    model = zoo.load(name)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert not any(one.requires_grad for one in model.parameters())
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    x = torch.rand(2, *SHAPES[zoo.card(name).dataset])
    assert model(x).shape == (2, 10)
    assert torch.equal(zoo.load(f"zoo:{name}")(x), model(x))


@pytest.mark.parametrize("name", zoo.list())
def test_every_card_is_what_its_files_say(name):
    folder, card = entries.HOME / name, zoo.card(name)
    about, report = (json.loads((folder / f).read_text()) for f in ("config.json", "report.json"))
    weights = folder / "checkpoints" / "best.safetensors"
    assert card == shipping.made_card(name, card.game, about, report, card.flags, digest(weights))
    assert card.autoattack_interval == wilson(report["accuracy"]["autoattack"], report["n"])
    assert {flag["name"] for flag in report["flags"]} <= set(card.flags)
    assert weights.stat().st_size <= shipping.LARGEST
    words = " ".join(file.read_text() for file in folder.glob("*.json"))
    assert not re.search(r"(?<![\w.])/\w", words), "a path of one machine"
    assert f"{100 * card.accuracy['autoattack']:.1f} %" in str(card)


def test_the_page_has_the_row_of_every_card():
    shown = (ROOT / "docs" / "zoo.md").read_text().splitlines()
    rows = [shipping.as_row(zoo.card(name)) for name in zoo.list()]
    assert [line for line in shown if line.startswith("| `")] == rows


def test_the_weights_of_the_study_are_those_of_the_zoo():
    """The zoo has some of the study's classifiers, the very weights that were judged."""
    study, shared = ROOT / "results" / "cifar10" / "weights" / "cifar10-compute", 0
    for name in zoo.list():
        kept = study / f"{name.split('/')[1].replace('-lean_resnet-half', '')}.safetensors"
        if name.startswith("cifar10/") and zoo.card(name).network == "lean_resnet-half":
            assert zoo.card(name).sha256 == digest(kept)
            shared += 1
    assert shared


def test_a_classifier_judged_again_is_what_its_card_says(digits):
    card = zoo.card(DIGITS)
    data = digits.test.first(card.n)
    ball = advgame.Linf(card.eps)
    found = advgame.evaluate(zoo.load(DIGITS), data, ball, ("fgsm", "pgd20")).accuracy()
    for name, share in found.items():
        assert share == pytest.approx(card.accuracy[name], abs=1.5 / card.n)


def test_damaged_weights_are_refused_in_a_line(home):
    path = home / DIGITS / "checkpoints" / "best.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for load in (zoo.load, check):
        with pytest.raises(InputError, match="is damaged, its checksum is not the card's") as found:
            load(DIGITS)
        assert "\n" not in str(found.value)
    (home / DIGITS / entries.CARD).write_text('{"name": "other"}')
    with pytest.raises(InputError, match="is no card of this version"):
        zoo.card(DIGITS)


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    with pytest.raises(InputError, match=f"did you mean {DIGITS}"):
        zoo.load("digits/pgd-at-small_cnn-seed1")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: check("digits"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "unknown classifier of the zoo 'digits': choose from" in said
    assert said.count("\n") == 1


def test_evaluate_judges_a_classifier_by_its_name(tmp_path):
    words = [f"zoo:{DIGITS}", "--attacks", "fgsm", "--n", "20", "--runs-dir", str(tmp_path)]
    run = evaluate.job.run(evaluate.job.parse([*words, "--name", "judged"]), set())
    report = run.report()
    assert report["what"] == f"zoo:{DIGITS}"
    assert report["weights"] == "best PGD-10 accuracy on the validation split"
    assert report["threat"] == {"norm": "Linf", "eps": 0.15}
    assert report["n"] == 20
    assert report["accuracy"]["clean"] > 0.9


def test_whatever_takes_a_run_takes_a_name(tmp_path):
    name = f"zoo:{DIGITS}"
    assert shipped().name == from_run(name).name == sweeps.name_of(name) == name
    assert start(name) == entries.HOME / DIGITS / "checkpoints" / "best.safetensors"
    write_mixture(tmp_path / "m.json", [name, tmp_path], [0.5, 0.5])
    assert [str(one) for one in read_mixture(tmp_path / "m.json").members] == [name, str(tmp_path)]
    write_mixture(tmp_path / "m.json", [name], [1.0])
    words = [str(tmp_path / "m.json"), "--surrogate", name, "--attacks", "transfer"]
    found = evaluate.job.check(evaluate.job.parse(words))
    assert (found.dataset, found.eps) == ("digits", "0.15")


def test_loading_leaves_torchs_stream_alone():
    torch.manual_seed(0)
    zoo.load(DIGITS)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@pytest.fixture
def judged(tmp_path):
    """A run folder and its evaluation, as `train` and `evaluate` leave them."""
    run, judged = tmp_path / "pgd-at-seed0", tmp_path / "judged"
    shutil.copytree(entries.HOME / DIGITS, run)
    judged.mkdir()
    about = json.loads((run / "config.json").read_text())
    asked = {"what": "runs/pgd-at-seed0", "weights": "best", "runs_dir": "/far/away"}
    (judged / "config.json").write_text(json.dumps({**about, "config": asked}))
    report = json.loads((run / "report.json").read_text())
    report["command"] = "python scripts/evaluate.py --runs-dir /far/away"
    (judged / "evaluation").mkdir()
    noted = {"networks": [describe(from_run(run).model)]}
    (judged / "evaluation" / "settings.json").write_text(json.dumps(noted))
    (judged / "report.json").write_text(json.dumps(report))
    dead = {"name": "dead_attacker", "meaning": "dead"}
    (run / "report.json").write_text(json.dumps({**report, "flags": [dead]}))
    return run, judged


def test_one_command_ships_a_judged_run(judged, home, monkeypatch, capsys):
    shutil.rmtree(home / DIGITS)
    monkeypatch.setattr(ship, "HOME", home)
    monkeypatch.setattr(ship, "PAGE", home / "zoo.md")
    (home / "zoo.md").write_text("above\n\n|---|\n| `old` |\n\nbelow\n")
    ship.main(ship.Config(*map(str, judged)))
    assert zoo.list() == (DIGITS,)
    row = shipping.as_row(zoo.card(DIGITS))
    assert (home / "zoo.md").read_text() == f"above\n\n|---|\n{row}\n\nbelow\n"
    card = zoo.card(DIGITS)
    assert str(card) in capsys.readouterr().out
    assert card.judged == "python scripts/evaluate.py --runs-dir runs"
    assert card.flags[-1] == "dead_attacker"
    assert zoo.load(DIGITS) is not None
    with pytest.raises(InputError, match="exists: remove it"):
        shipping.ship(*judged, home)


@pytest.mark.parametrize(
    ("file", "change", "answer"),
    [
        ("judged/config.json", {"what": "runs/other"}, "not of the best weights"),
        ("judged/config.json", {"weights": "last"}, "not of the best weights"),
        ("judged/report.json", {"accuracy": {"clean": 1}}, "without AutoAttack"),
        ("judged/report.json", {"dataset": "mnist"}, "another data set or ball"),
        ("pgd-at-seed0/config.json", {"model": "my_code:Net"}, "somebody's own"),
    ],
)
def test_what_is_no_evaluation_of_these_weights_is_refused(judged, home, file, change, answer):
    path = judged[0].parent / file
    content = json.loads(path.read_text())
    content.update(change) if "report" in file else content["config"].update(change)
    path.write_text(json.dumps(content))
    before = sorted(home.rglob("*"))
    with pytest.raises(InputError, match=answer):
        shipping.ship(*judged, home)
    assert sorted(home.rglob("*")) == before


def test_an_evaluation_of_a_run_that_was_trained_again_is_refused(judged, home):
    """Under the same folder name, so that nothing but the weights tells them apart."""
    run, evaluation = judged
    model = from_run(run).model
    with torch.no_grad():
        model.head.bias[0] += 1
    save_weights(model, run / "checkpoints" / "best.safetensors")
    with pytest.raises(InputError, match=r"judged other weights than the best of .*evaluate that"):
        shipping.ship(run, evaluation, home, game="again")
    (evaluation / "evaluation" / "settings.json").unlink()
    with pytest.raises(InputError, match=r"which weights were judged: evaluate .* again"):
        shipping.ship(run, evaluation, home, game="again")


def test_what_evaluate_notes_of_a_run_is_what_ships(judged, home, tmp_path):
    run, _ = judged
    words = [str(run), "--attacks", "fgsm", "--n", "8", "--runs-dir", str(tmp_path), "--name", "e"]
    evaluation = evaluate.job.run(evaluate.job.parse(words), set())
    evaluation.write_json("report.json", {**evaluation.report(), "accuracy": {"autoattack": 1.0}})
    with pytest.raises(InputError, match="exists: remove it"):
        shipping.ship(run, evaluation.path, home)


def test_a_commit_of_another_source_is_refused(judged, home):
    with pytest.raises(InputError, match="is not that of"):
        shipping.ship(*judged, home, game="other", commit="0" * 40)

"""Tournaments: cells equal to evaluations, growing, planted mixtures, refusals, the script."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tournament as script
from conftest import ROOT, Linear, undefended
from torch import nn

from advgame.arena import hold_tournament, read_mixture, solve, solve_per_image, standings
from advgame.arena.pictures import tournament_figure
from advgame.arena.tournament import as_markdown, playable
from advgame.attacks import Attack, AttackResult, Transfer, fgsm, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.cells import describe
from advgame.run.checkpoint import save_weights
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.statistics import wilson
from advgame.threat import Linf

pytestmark = pytest.mark.drawn

BALL = Linf(0.1)


@pytest.fixture(scope="module")
def rows(digits, victim):
    return {"robust": victim, "plain": undefended(digits)}


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.first(40)


def verdicts(out):
    with np.load(out / "errors.npz") as file:
        return {name: file[name] for name in file.files}


def test_cells_are_the_verdicts_of_evaluations(rows, few, tmp_path):
    content = hold_tournament(tmp_path, rows, few, BALL, ("fgsm", "pgd20"), transfer=("fgsm",))
    columns = ["fgsm", "pgd20", "transfer:robust:fgsm", "transfer:plain:fgsm"]
    found = verdicts(tmp_path)
    assert found["columns"].tolist() == content["columns"] == columns
    assert found["rows"].tolist() == content["rows"] == ["robust", "plain"]
    assert found["errors"].shape == (40, 2, 4)
    for d, (row, model) in enumerate(rows.items()):
        extra = {
            f"transfer:{name}:fgsm": Transfer(fgsm(BALL), other) for name, other in rows.items()
        }
        right = evaluate(model, few, BALL, columns, extra=extra).correct
        for a, column in enumerate(columns):
            errors = ~right[column].numpy()
            assert (found["errors"][:, d, a] == errors).all()
            cell = content["errors"][row][column]
            assert cell["share"] == pytest.approx(errors.mean())
            assert (cell["low"], cell["high"]) == wilson(errors.mean(), 40)
        assert content["clean"][row] == pytest.approx(float(right["clean"].float().mean()))
        mine = content["columns"].index(f"transfer:{row}:fgsm")
        assert (found["errors"][:, d, mine] == found["errors"][:, d, 0]).all()
    game, wanted = content["games"]["all"], solve_per_image(found["errors"])
    assert game["per_image"]["value"] == wanted.value
    assert list(game["per_image"]["defender"].values()) == wanted.defender.tolist()
    assert game["committed"]["value"] == solve(found["errors"].mean(0)).value
    blind = content["games"]["transfer"]["per_image"]["value"]
    assert blind == solve_per_image(found["errors"][:, :, 2:]).value
    assert json.loads((tmp_path / "tournament.json").read_text()) == content
    assert (tmp_path / "tournament.png").stat().st_size > 5000


def test_transfer_columns_draw_by_the_tournaments_seed(rows, few, tmp_path):
    robust = rows["robust"]
    hold_tournament(tmp_path, rows, few, BALL, transfer=("aa:apgd-ce",), seed=np.int64(3))
    made = Transfer(AutoAttackPart(BALL, "apgd-ce", seed=3), rows["plain"])
    right = evaluate(robust, few, BALL, ("a",), extra={"a": made}, seed=3).correct["a"]
    found = verdicts(tmp_path)
    column = found["columns"].tolist().index("transfer:plain:aa:apgd-ce")
    assert (found["errors"][:, 0, column] == ~right.numpy()).all()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["columns"]["transfer:plain:aa:apgd-ce"] == describe(made)


def test_it_grows_by_what_is_new_only_and_goes_on_after_a_stop(rows, few, tmp_path):
    def held(names, attacks, transfer=()):
        lines, chosen = [], {name: rows[name] for name in names}
        held = hold_tournament(
            tmp_path, chosen, few, BALL, attacks, transfer=transfer, progress=lines.append
        )
        return held, [line for line in lines if "clean on" not in line]

    first, lines = held(["robust"], ("fgsm",))
    assert lines == ["robust: fgsm on images 0 to 39"]
    _, lines = held(["robust"], ("fgsm", "pgd20"))
    assert lines == ["robust: pgd20 on images 0 to 39"]
    both, lines = held(["robust", "plain"], ("fgsm", "pgd20"))
    assert lines == ["plain: fgsm on images 0 to 39", "plain: pgd20 on images 0 to 39"]
    assert both["errors"]["robust"]["fgsm"] == first["errors"]["robust"]["fgsm"]
    again, lines = held(["robust", "plain"], ("fgsm", "pgd20"))
    assert not lines
    assert again == both

    def stopped(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold_tournament(tmp_path, rows, few, BALL, ("fgsm", "mim"), progress=stopped)
    fewer, lines = held(["plain"], ("fgsm",))
    assert not lines
    assert fewer["rows"] == ["plain"]
    _, lines = held(["robust", "plain"], ("fgsm",), ("fgsm",))
    assert len(lines) == 4, "two columns that are made on one classifier and meet both"


def test_what_others_have_done_meanwhile_is_taken_as_it_is(rows, few, tmp_path):
    """They begin when the folder is there; the result is that of one process."""
    lines = []

    def others():
        assert (tmp_path / "cup" / "settings.json").exists()
        assert not (tmp_path / "cup" / "cells").exists()
        hold_tournament(tmp_path / "cup", rows, few, BALL, ("fgsm", "mim"))

    asked = (rows, few, BALL, ("fgsm", "mim"))
    shared = hold_tournament(tmp_path / "cup", *asked, progress=lines.append, begun=others)
    assert lines == []
    assert shared == hold_tournament(tmp_path / "one", *asked)


def test_a_planted_pair_is_mixed_as_arithmetic_says():
    """Column a is right about half of the images, against one row each; a third row is worse."""
    errors = np.zeros((60, 3, 2))
    errors[:, 0, 0] = errors[:, 1, 1] = errors[:, 2] = 1
    found = standings(errors, ["one", "two", "bad"], ["transfer:one:a", "transfer:two:a"])
    assert list(found["games"]) == ["all"]
    seeing = found["games"]["all"]["per_image"]
    assert seeing["value"] == pytest.approx(0.5)
    assert list(seeing["defender"].values()) == pytest.approx([0.5, 0.5, 0], abs=1e-9)
    assert seeing["best_single"] == 1
    assert seeing["even_mixture"] == pytest.approx(2 / 3)
    assert seeing["even_mixture_exploitability"] == pytest.approx(2 / 3 - 1 / 2)
    assert found["games"]["all"]["committed"]["best_single"] == 1
    assert list(found["games"]["all"]["committed"]["attacker"].values()) == pytest.approx([0.5] * 2)


def test_page_and_picture_show_the_numbers(rows, few, tmp_path):
    content = hold_tournament(tmp_path, rows, few, BALL, ("fgsm",), transfer=("pgd20",))
    page = as_markdown(content)
    rate = 100 * content["errors"]["plain"]["fgsm"]["share"]
    assert f"| {rate:.1f} (" in page
    assert "## All columns" in page
    assert "## Columns that are made before the draw" in page
    assert (tmp_path / "tournament.md").read_text() == page
    (above, corner, heat, beside) = tournament_figure(content).axes
    shares = [[cell["share"] for cell in row.values()] for row in content["errors"].values()]
    assert heat.images[0].get_array().tolist() == shares
    assert next(text.get_text() for text in heat.texts) == f"{100 * shares[0][0]:.0f}"
    game = content["games"]["all"]
    widths = [bar.get_width() for bar in beside.patches]
    assert widths == [
        *game["committed"]["defender"].values(),
        *game["per_image"]["defender"].values(),
    ]
    heights = [bar.get_height() for bar in above.patches]
    assert heights == [
        *game["committed"]["attacker"].values(),
        *game["per_image"]["attacker"].values(),
    ]
    assert corner.get_legend() is not None


def test_the_page_says_what_a_reader_of_the_cells_should_know(rows, few, tmp_path):
    class Brighter(Attack):
        def _attack(self, model, x, y, rng, check):
            by = 0.5 if model is rows["plain"] else 0.0
            return AttackResult((x + by).clamp(0, 1), None, None, 0, 0)

    data = few.subset(slice(4))
    asked = (rows, data, BALL, ("autoattack-lite",))
    content = hold_tournament(tmp_path, *asked, extra={"mine": Brighter()})
    assert content["notes"] == [
        "autoattack-lite is half of AutoAttack: no number to quote",
        "plain: mine left the ball or [0, 1]: the numbers are not comparable",
    ]
    page = (tmp_path / "tournament.md").read_text()
    assert all(f"\nNote: {note}.\n" in page for note in content["notes"])


def test_what_is_hardly_played_is_left_out_of_a_mixture():
    found = playable({"a": 0.4998, "b": 0.5, "c": 2e-4})
    assert list(found) == ["a", "b"]
    assert sum(found.values()) == pytest.approx(1)


REFUSED = {
    "no row": (lambda r, d: ({}, d, BALL, ("fgsm",)), "needs a row"),
    "no column": (lambda r, d: (r, d, BALL, ()), "needs a column"),
    "a column twice": (lambda r, d: (r, d, BALL, ("fgsm", "fgsm")), "same name"),
    "a row's folder twice": (
        lambda r, d: ({"a:b": r["plain"], "a-b": r["robust"]}, d, BALL, ("fgsm",)),
        "two rows have the same name",
    ),
    "an unknown attack": (lambda r, d: (r, d, BALL, ("pgd21",)), "unknown attack"),
    "other classes": (
        lambda r, d: ({**r, "odd": Linear(torch.rand(12, 64))}, d, BALL, ("fgsm",)),
        "has 12 outputs",
    ),
    "other images": (lambda r, d: (r, d.subset(slice(20)), BALL, ("fgsm",)), "other images"),
    "another ball": (lambda r, d: (r, d, Linf(0.2), ("fgsm",)), "another ball"),
    "another row": (lambda r, d: ({"robust": r["plain"]}, d, BALL, ("fgsm",)), "row robust that"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_and_nothing_is_written(name, rows, few, tmp_path):
    hold_tournament(tmp_path, {"robust": rows["robust"]}, few, BALL, ("fgsm",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        hold_tournament(tmp_path, *asked(rows, few))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fresh = tmp_path / "fresh"
    if name.startswith(("no", "a column", "a row", "an unknown", "other classes")):
        with pytest.raises(InputError, match=said):
            hold_tournament(fresh, *asked(rows, few))
        assert not fresh.exists()


class Sharp(nn.Module):
    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        return self.net(self.scale * x)


def test_a_row_of_another_setting_is_refused(rows, few, tmp_path):
    for _ in range(2):
        hold_tournament(tmp_path, {"mine": Sharp(rows["plain"], 1.0)}, few, BALL, ("fgsm",))
    hold_tournament(tmp_path, rows, few, BALL, ("fgsm",))  # rows that it did not know
    with pytest.raises(InputError, match="row mine whose scale was another"):
        hold_tournament(tmp_path, {"mine": Sharp(rows["plain"], 0.5)}, few, BALL, ("fgsm",))


def test_other_settings_and_folders_are_refused(rows, few, tmp_path):
    hold_tournament(tmp_path / "a", rows, few, BALL, extra={"mine": fgsm(BALL)})
    for more, said in (
        ({"seed": 1}, "another seed"),
        ({"batch_size": 20}, "another batch_size"),
        ({"extra": {"mine": pgd(BALL, 2)}}, "column mine that is another"),
    ):
        with pytest.raises(InputError, match=said):
            hold_tournament(
                tmp_path / "a", rows, few, BALL, **{"extra": {"mine": fgsm(BALL)}, **more}
            )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "settings.json").write_text('{"rows": 3}')
    for folder, said in {
        "full": "no tournament's folder",
        "full/x": "is a file",
        "odd": "another format|something else",
    }.items():
        with pytest.raises(InputError, match=said):
            hold_tournament(tmp_path / folder, rows, few, BALL, ("fgsm",))


MINE = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def root(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cup")
    for name, model in rows.items():
        about = {"dataset": "digits", "model": "small_cnn", "eps": "0.1", "epochs": 1}
        run = RunFolder.create(folder / name, about, "cpu")
        save_weights(model, run.path / "checkpoints" / "best.safetensors")
    save_weights(rows["plain"], folder / "weights.safetensors")
    (folder / "my_code.py").write_text(MINE)
    (folder / "mixture.json").write_text('{"members": ["robust"], "weights": [1]}')
    return folder


def cup(words, root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["tournament.py", *words])
    run_script(lambda: script.main(script.tyro.cli(script.Config)))


def test_the_script_takes_runs_files_and_own_code_and_leaves_a_mixture(
    root, rows, digits, monkeypatch, capsys
):
    words = ["robust", "plain", "--transfer", "pgd20", "--attacks", "clean", "--n", "30"]
    words += ["--out", "out"]
    cup(words, root, monkeypatch)
    assert "value " in capsys.readouterr().out
    content = json.loads((root / "out" / "tournament.json").read_text())
    assert content["columns"] == ["transfer:robust:pgd20", "transfer:plain:pgd20"]
    mixture = read_mixture(root / "out" / "mixture.json")
    played = playable(content["games"]["all"]["per_image"]["defender"])
    assert [path.resolve().name for path in mixture.members] == list(played)
    assert mixture.weights == pytest.approx(tuple(played.values()))
    more = ["weights.safetensors", "my_code:build", "--model", "small_cnn", "--attacks", "fgsm"]
    more += ["--dataset", "digits", "--eps", "0.1"]  # which files and code do not know
    cup([*words[:2], *more, *words[2:4], *words[6:]], root, monkeypatch)
    grown = json.loads((root / "out" / "tournament.json").read_text())
    assert grown["rows"] == ["robust", "plain", "weights", "my_code.build"]
    for row in content["rows"]:
        for column in content["columns"]:
            assert grown["errors"][row][column] == content["errors"][row][column]
    assert grown["errors"]["weights"]["fgsm"] == grown["errors"]["plain"]["fgsm"]
    assert grown["clean"]["my_code.build"] < 0.5


def test_workers_are_asked_for_the_same_tournament():
    words = ["a", "b", "--attacks", "--transfer", "fgsm", "aa:apgd-ce", "--n", "None", "--eps=0.1"]
    more = ["--jobs", "3", "--engine", "ray", "--threads", "2", "--ray-address", "auto"]
    parse = functools.partial(script.tyro.cli, script.Config)
    asked = parse(args=[*words, *more])
    worker = parse(args=script.words_of(asked, Path("cup")))
    assert worker == replace(parse(args=words), out="cup")


@pytest.mark.slow
def test_two_workers_hold_the_tournament_of_one_process(root):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "scripts" / "tournament.py"), "robust", "plain"]
    words += ["--attacks", "fgsm,pgd20", "--n", "60", "--batch-size", "20"]
    for more in (["--out", "alone"], ["--out", "shared", "--jobs", "2"]):
        subprocess.run([*words, *more], cwd=root, env=env, check=True, capture_output=True)
    one, two = (verdicts(root / name) for name in ("alone", "shared"))
    assert {name: array.tolist() for name, array in one.items()} == {
        name: array.tolist() for name, array in two.items()
    }
    left = {path.name for path in (root / "shared").rglob("*") if path.is_file()}
    assert not [name for name in left if name.startswith(".token") or name.endswith(".partial")]


def test_a_mixture_of_own_code_leaves_no_file(root, tmp_path, capsys):
    """evaluate.py takes files and folders; that of a smaller tournament goes, too."""
    paths = {"robust": root / "robust", "mine": root / "my_code:build"}
    script.write_defender(tmp_path, paths, {"robust": 1.0, "mine": 1e-5})
    assert [path.name for path in read_mixture(tmp_path / "mixture.json").members] == ["robust"]
    script.write_defender(tmp_path, paths, {"robust": 0.5, "mine": 0.5})
    assert not (tmp_path / "mixture.json").exists()
    assert "mine is code, which no file of a mixture can name" in capsys.readouterr().out


def test_a_zoo_classifier_attacks_the_others_by_transfer(root, monkeypatch):
    zoo = "zoo:digits/pgd-at-small_cnn-seed0"
    cup([zoo, "robust", "--transfer", "fgsm", "--attacks", "--n", "4", "--out", "two",
         "--eps", "0.1"], root, monkeypatch)  # fmt: skip
    content = json.loads((root / "two" / "tournament.json").read_text())
    assert content["columns"] == [f"transfer:{zoo}:fgsm", "transfer:robust:fgsm"]


def test_rows_of_one_short_name_are_called_what_was_typed():
    names_of = script.sweeps.names_of
    assert names_of(["a/best.pth", "b/best.pth", "c"]) == ["a/best.pth", "b/best.pth", "c"]
    assert names_of(["nets:Wrap('')", "nets:Wrap('drop')"]) == [
        "nets:Wrap('')",
        "nets:Wrap('drop')",
    ]
    assert names_of(["nets:Wrap('')", "zoo:a/b"]) == ["nets.Wrap", "zoo:a/b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "arguments are required|name the run folders"),
        (["robust", "--attacks"], "needs a column"),
        (["robust", "--transfer", "autoattack"], "several attacks in a row"),
        (["robust", "--transfer", "pgd21"], "unknown attack"),
        (["robust", "--attacks", "transfer"], "--transfer pgd20 makes PGD-20 on each in turn"),
        (["robust", "--transfer", "transfer-mim"], "--transfer pgd20 makes PGD-20 on each"),
        (["robust", "--engine", "ray"], "makes no use of --engine"),
        (["robust", "--jobs", "2", "--engine", "rey"], "did you mean ray"),
        (["robust", "--n", "0"], "n must be 1 or above"),
        (["robust", "--batch-size", "0"], "batch_size must be 1 or above"),
        (["robust", "robust"], "two classifiers are called robust"),
        (["robust", "nowhere"], "nowhere does not exist"),
        (["mixture.json"], "is a mixture of classifiers"),
        (["weights.safetensors"], "needs --model"),
    ],
)
def test_wrong_words_are_refused_in_a_line(words, said, root, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cup([*words, "--out", str(out)], root, monkeypatch)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert any(part in told for part in said.split("|"))
    assert told.startswith("error: ") == (told.count("\n") == 1)
    assert not out.exists()


def test_one_image_and_one_row_make_a_tournament(rows, tmp_path):
    data = ImageSet(torch.zeros(1, 1, 8, 8).byte(), torch.tensor([3]), 10)
    content = hold_tournament(tmp_path, {"robust": rows["robust"]}, data, BALL, ("fgsm",))
    game = content["games"]["all"]
    assert game["per_image"]["value"] == game["committed"]["value"]
    assert game["per_image"]["defender"] == {"robust": 1.0}

"""`study.py`: one front for all studies; what was committed is rendered again as it was."""

import json
import shutil

import pytest
import study
from conftest import ROOT
from studies import cat_and_mouse, l2l, las_at, minimax, minimax_rates

from advgame.errors import InputError

# module, folder of results, stem, settings
COMMITTED = [
    (l2l, "l2l", "digits", {}),
    (l2l, "l2l", "mnist", {"dataset": "mnist"}),
    (minimax, "minimax", "digits-small_cnn-0.15", {}),
    (minimax, "minimax", "mnist-small_cnn-0.15", {"dataset": "mnist"}),
    (las_at, "las_at", "digits", {}),
    (las_at, "las_at", "mnist", {"dataset": "mnist"}),
    (las_at, "las_at/wide", "mnist", {"dataset": "mnist"}),
    (cat_and_mouse, "minimax", "cat_and_mouse_digits", {}),
    (cat_and_mouse, "minimax", "cat_and_mouse_mnist", {"dataset": "mnist"}),
    (minimax_rates, "minimax", "sweep-mnist-small_cnn-0.15", {"dataset": "mnist"}),
]


def test_the_studies_are_listed_by_their_first_lines(capsys):
    study.run([])
    lines = capsys.readouterr().out.splitlines()
    assert "l2l            L2L: does a classifier that learns from a learned attacker" in "\n".join(
        lines
    )
    assert {line.split()[0] for line in lines if line} >= set(study.STUDIES)
    with pytest.raises(InputError, match="did you mean las_at"):
        study.run(["las-at"])


@pytest.mark.parametrize(("module", "folder", "stem", "settings"), COMMITTED)
def test_committed_results_are_rendered_as_they_were(module, folder, stem, settings, tmp_path):
    committed = ROOT / "results" / folder
    shutil.copy(committed / f"{stem}.json", tmp_path)
    before = (tmp_path / f"{stem}.json").read_bytes()
    module.main(module.Config(out=str(tmp_path), from_json=True, **settings))
    assert (tmp_path / f"{stem}.json").read_bytes() == before
    assert (tmp_path / f"{stem}.md").read_text() == (committed / f"{stem}.md").read_text()
    assert len(json.loads(before)["runs"]) > 1

"""The study of mixtures: its cells, what they are made of, what is read of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from studies import arena
from studies.arena import CONTROLS, MEMBERS, METHODS, SINGLES, Arena, Config

from advgame.arena import read_mixture
from advgame.errors import InputError
from advgame.run import table
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder

TRAINED = "attacker/forwards_per_image"


def study(root, **changes):
    folders = {"runs_dir": str(root / "runs"), "out": str(root / "out")}
    return Arena(Config(**{**folders, "seeds": 1, **changes}))


def trained(cell, robust, spent=10.0, epochs=2):
    """What a training leaves, as far as the study looks."""
    config = {"batch_size": 4, "model": "small_cnn", "dataset": "digits", "eps": "0.15"}
    RunFolder.create(cell.folder, config, "cpu", {"train": 8})
    rows = [f"epoch,step,eval/robust,{TRAINED}"]
    rows += [f"{one},{2 * one},{robust},{spent}" for one in range(1, epochs + 1)]
    write_atomically(cell.folder / "metrics.csv", "\n".join(rows) + "\n")
    write_atomically(cell.folder / "report.json", '{"flags": []}')


def test_a_control_is_compared_with_the_mixture_whose_compute_it_has():
    found = [("uniform-4", 0, 0.5), ("uniform-4", 1, 0.6), ("long-uniform-4", 0, 0.7)]
    found += [("long-uniform-4", 1, 0.8), ("pgd-at", 0, 0.4), ("pgd-at", 1, 0.4)]
    runs = [{"method": name, "seed": seed, "worst_case": own} for name, seed, own in found]
    told = {row.name: arena.over_mixture(row) for row in table.rows(runs)}
    assert told == {"uniform-4": "–", "long-uniform-4": "+20.0 ± 0.0", "pgd-at": "–"}


def test_every_training_is_a_command_line_that_works(tmp_path):
    one = study(tmp_path, base="trades", rounds=3)
    one.check()
    one.prepare(one.cells())
    assert {cell["method"] for cell in one.cells().values()} == {*METHODS} - {*CONTROLS}
    psro = one.training("psro", 0)
    assert psro.flags[-4:] == ["--rounds", "3", "--seed", "0"]
    control = one.longer({"method": "long-psro", "seed": 1, "budget": 99.6})
    parsed = arena.script_of(SINGLES["trades"]).job.parse(control.flags)
    assert (parsed.game, parsed.budget, parsed.seed) == ("trades", 100.0, MEMBERS)
    assert control.folder.name == "long-psro-trades-1"


def test_no_two_seeds_share_a_classifier(tmp_path):
    one = study(tmp_path, base="pgd-at", seeds=3)
    cells = one.cells()
    of = {name: {member.folder for member in one.members(cell)} for name, cell in cells.items()}
    assert len(of["uniform-4-seed0"]) == 4
    assert of["uniform-2-seed1"] < of["uniform-4-seed1"]
    assert of["pgd-at-seed2"] < of["uniform-2-seed2"]
    assert not of["uniform-4-seed0"] & of["uniform-4-seed1"]
    assert len(of["nash-seed0"]) == 3


def test_the_base_is_the_best_by_validation(tmp_path):
    one = study(tmp_path, seeds=2)
    scores = {"pgd-at": (0.5, 0.6), "trades": (0.6, 0.7), "las-random": (0.9, 0.1)}
    for game, robust in scores.items():
        for seed, value in enumerate(robust):
            trained(one.training(game, MEMBERS * seed), value)
    assert one.base == "trades"
    assert study(tmp_path, base="pgd-at").base == "pgd-at"


def test_controls_are_given_the_compute_of_the_mixture(tmp_path):
    one = study(tmp_path, base="pgd-at")
    cell = {"method": "uniform-2", "seed": 0}
    for member in one.members(cell):
        trained(member, 0.5, spent=10.0, epochs=2)
    # 10 forwards per image in each of 4 steps of 4 images, for 8 training images: 20 a member
    assert [arena.forwards(member.folder) for member in one.members(cell)] == [20, 20]
    runs = [{"method": "uniform-2", "seed": 0, "forwards": 40.0}]
    assert one.later_cells(runs) == {
        "long-uniform-2-seed0": {"method": "long-uniform-2", "seed": 0, "budget": 40.0}
    }
    rounds = {"begin": {"forwards": 80}, "rounds": [{"forwards": 40}, {"forwards": 40}]}
    write_atomically(one.members(cell)[0].folder / "rounds.json", json.dumps(rounds))
    assert arena.forwards(one.members(cell)[0].folder) == 20


VERDICTS = """image,label,clean,adaptive:ce,arc,arc:warm,members:pgd20
0,1,1,1,0.5,1,1
1,2,1,0.5,1,0,0.5
2,3,0.5,1,1,1,1
"""


def test_a_row_is_trained_mixed_judged_and_read(tmp_path, monkeypatch):
    one = study(tmp_path, methods=("pgd-at", "uniform-2", "long-uniform-2"), base="pgd-at")
    started = []

    def run_all(self, cells, jobs=None):
        for cell in cells:
            started.append(cell.folder.name)
            if cell.script.name != "evaluate.py":
                if not cell.folder.exists():
                    trained(cell, 0.5)
                continue
            members = len(read_mixture(cell.flags[0]).members)
            RunFolder.create(cell.folder, {}, "cpu")
            write_atomically(cell.folder / "verdicts.csv", VERDICTS)
            report = {
                **{"n": 3, "threat": {"norm": "Linf", "eps": 0.15}, "accuracy": {"clean": 0.9}},
                **{"mixture": {"adaptive_alone": 0.8, "members": [{}] * members}},
                **{"worst_case": 0.4, "flags": [{"name": "gap"}], "device": "cpu"},
            }
            write_atomically(cell.folder / "report.json", json.dumps(report))

    monkeypatch.setattr(Arena, "run_all", run_all)
    one.play()
    found = json.loads((tmp_path / "out" / "digits.json").read_text())
    runs = {run["method"]: run for run in found["runs"]}
    assert list(runs) == ["pgd-at", "uniform-2", "long-uniform-2"]
    assert runs["pgd-at"]["arc"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert runs["pgd-at"]["union"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (runs["uniform-2"]["members"], runs["pgd-at"]["members"]) == (2, 1)
    assert runs["uniform-2"]["forwards"] == 2 * runs["pgd-at"]["forwards"] == 40
    mixture = read_mixture(Path(one.root) / "mixtures" / "pgd-at-uniform-2-seed0.json")
    assert mixture.weights == (0.5, 0.5)
    assert started.index("pgd-at-0") < started.index("pgd-at-uniform-2-seed0")
    assert started[-1] == "pgd-at-long-uniform-2-seed0"
    page = (tmp_path / "out" / "digits.md").read_text()
    assert "| uniform-2 | 1 | 2.0" in page
    assert "80.0" in page
    assert "pgd-at: gap" in page
    assert "are of pgd-at, the best" in page
    again = Arena(replace(one.config, from_json=True))
    again.play()
    assert (tmp_path / "out" / "digits.md").read_text() == page


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"methods": ("pgd",)}, "unknown method"),
        ({"base": "fast"}, "unknown base"),
        ({"methods": ("pgd-at", "long-psro")}, "has the compute of psro: add it"),
        ({"rounds": 0}, "rounds must be 1"),
        ({"extra": "--batch-size 0"}, "batch_size must be 1"),
        ({"methods": ()}, "nothing to run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, answer, tmp_path):
    with pytest.raises(InputError, match=answer):
        study(tmp_path, **changes).play()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_real_cells_are_trained_and_judged_and_not_mixed_with_others(tmp_path):
    tiny = "--epochs 1 --train-n 100 --batch-size 20"
    rows = {"methods": ("pgd-at", "uniform-2", "psro", "long-uniform-2"), "rounds": 1}
    one = study(tmp_path, n=20, extra=tiny, **rows, base="pgd-at", jobs=1)
    one.play()
    runs = json.loads((tmp_path / "out" / "digits.json").read_text())["runs"]
    assert {run["method"] for run in runs} == set(rows["methods"])
    for run in runs:
        least = min(run["adaptive"], run["arc"], run["union"])
        assert run["worst_case"] - 1e-6 <= least <= run["clean"] + 1e-6
    spent = {run["method"]: run["forwards"] for run in runs}
    assert spent["long-uniform-2"] == pytest.approx(spent["uniform-2"], rel=0.15)
    for changes in ({"extra": f"{tiny} --lr 0.01"}, {"n": 10}):
        with pytest.raises(InputError, match="made with other flags"):
            Arena(replace(one.config, **changes)).play()

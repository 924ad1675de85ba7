"""Studies of rates and of fresh attackers: small runs, what is chosen, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from equal_runs import SMALL
from studies import attnet as study_attnet
from studies import minimax_rates as sweep_minimax
from train_minimax import Config, job

from advgame.errors import InputError
from advgame.run.folder import RunFolder


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    settings = {**SMALL, "epochs": 1, "response_steps": 3, "hidden": 20, "model": "small_cnn"}
    folder = tmp_path_factory.mktemp("runs")
    return job.run(replace(Config(), **settings, runs_dir=str(folder), name="game")).path


@pytest.mark.slow
def test_a_fresh_attackers_curve_goes_on_from_step_to_step(played, tmp_path):
    config = study_attnet.Config(
        runs=(str(played),),
        name="small",
        rates=(1e-2,),
        scales=(0.0, 2.0),
        steps=(3, 40),
        out=str(tmp_path),
    )
    study_attnet.main(config)
    path = tmp_path / "attnet-small.json"
    made = json.loads(path.read_text())
    assert [one["scale"] for one in made["curves"]] == [0, 2]
    for one in made["curves"]:
        assert [row["step"] for row in one["rows"]] == [3, 40]
        assert one["rows"][0]["spread"] != one["rows"][1]["spread"]
    assert set(made["classifiers"]["game"]) == {"defence", "pgd20", "own"}
    study_attnet.main(replace(config, scales=(2.0,), seeds=2))
    again = json.loads(path.read_text())["curves"]
    assert again[:2] == made["curves"], "what is there is not made again"
    assert [(one["scale"], one["seed"]) for one in again[2:]] == [(2, 1)]
    with pytest.raises(InputError, match="other steps"):
        study_attnet.main(replace(config, steps=(3, 41)))
    alone = replace(config, steps=(40,), scales=(2.0,), out=str(tmp_path / "alone"))
    study_attnet.main(alone)
    whole = json.loads((tmp_path / "alone" / "attnet-small.json").read_text())["curves"][0]
    assert whole["rows"][0] == made["curves"][1]["rows"][1], "looking does not disturb"
    with pytest.raises(InputError, match="steps must"):
        study_attnet.main(replace(config, steps=(3, 3)))


def test_classifiers_in_folders_of_one_name_are_told_apart(tmp_path):
    paths = tuple(str(tmp_path / part / "m-seed0") for part in "AB")
    for path in paths:
        RunFolder.create(Path(path), {}, "cpu")

    def named(*runs):
        return study_attnet.FreshAttNets(study_attnet.Config(runs=runs)).folders

    assert list(named(*paths)) == list(paths)
    assert list(named(paths[0])) == ["m-seed0"]
    with pytest.raises(InputError, match="name each once"):
        named(paths[0], paths[0])


def run(method, criterion, spread, saturated=0.1):
    signs = {"spread": spread, "saturated": saturated}
    game = method.split("-")[0]
    alive = sweep_minimax.alive(signs)
    return {"method": method, "game": game, "criterion": criterion, "alive": alive, **signs}


def test_the_best_cell_of_a_game_is_chosen_among_those_whose_attacker_lives():
    runs = [
        run("alt-1", 0.3, 0.2),
        run("alt-2", 0.2, 0.1),
        run("alt-3", 0.1, 0.01),
        run("alt-4", 0.1, 0.2, saturated=0.9),
        run("minimax-1", 0.1, 0.0),
    ]
    assert sweep_minimax.chosen(runs) == {"alt": "alt-2"}


@pytest.mark.long
def test_the_sweep_reads_validation_only(tmp_path):
    config = sweep_minimax.Config(
        rates=(1e-3,), ratios=(1.0, 10.0), gammas=(1.0, 0.1), jobs=1,
        runs_dir=str(tmp_path / "runs"), out=str(tmp_path),
        extra="--train-n 100 --epochs 2 --batch-size 50 --response-steps 3 --hidden 9",
    )  # fmt: skip
    sweep_minimax.main(config)
    made = json.loads((tmp_path / "sweep-digits-small_cnn-0.15.json").read_text())
    assert len(made["runs"]) == 6
    names = {run["method"] for run in made["runs"]}
    assert "minimax-gamma0.1-lr0.001-ratio10" in names
    for one in made["runs"]:
        folder = Path(config.runs_dir) / "sweep-digits-small_cnn-0.15" / f"{one['method']}-seed0"
        settings = json.loads((folder / "config.json").read_text())["config"]
        assert settings["attacker_lr"] == pytest.approx(one["attacker_lr"])
        assert one["criterion"] == pytest.approx((one["fresh"] + one["pgd10"]) / 2)
        for share in (one["fresh"], one["pgd10"]):  # of 216 validation images, not of 10 test ones
            assert share * 216 == pytest.approx(round(share * 216), abs=1e-3)
    with pytest.raises(InputError, match="restarts"):
        sweep_minimax.main(replace(config, extra="--restarts 2"))

"""scripts/train_privacy_filter.py and study_privacy.py as a stranger runs them."""

import json
from dataclasses import replace

import pytest
import train_privacy_filter
from safetensors.torch import load_file
from studies import privacy as study_privacy
from train_privacy_filter import Config, job

from advgame.data import load_data
from advgame.errors import InputError
from advgame.privacy import FilterTraining, Inference, make_filter, make_task
from advgame.run.checkpoint import load_weights
from advgame.run.folder import Metrics


def small(folder, name, **changes):
    settings = {"steps": 4, "restarts": 1, "hidden": 4, "dim": 2, "batch_size": 64}
    return Config(**{**settings, "runs_dir": str(folder), "name": name, **changes})


def without_time(path):
    return {
        k: v for k, v in json.loads((path / "report.json").read_text()).items() if k != "timing"
    }


@pytest.mark.slow
def test_a_run_leaves_everything_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = job.run(small(tmp_path, "whole"))
    names = {"config.json", "curves.png", "filter.safetensors", "metrics.csv", "report.json"}
    assert names | {"report.md"} <= {p.name for p in whole.path.iterdir()}
    with pytest.raises(InputError, match="never overwritten"):
        job.run(small(tmp_path, "whole"))

    real, played = FilterTraining.step, []

    def stopped(self):
        played.append(0)
        if len(played) == 3:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(FilterTraining, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            job.run(small(tmp_path, "cut"))
    cut = job.run(Config(resume=str(tmp_path / "cut")))
    assert without_time(cut.path) == without_time(whole.path)
    assert Metrics.read(cut.path / "metrics.csv") == Metrics.read(whole.path / "metrics.csv")
    one, two = (load_file(run.path / "filter.safetensors") for run in (whole, cut))
    assert all((one[name] == two[name]).all() for name in one)
    before = (cut.path / "report.json").stat().st_mtime_ns
    job.run(Config(resume=str(cut.path)))
    assert (cut.path / "report.json").stat().st_mtime_ns == before, "a finished run is left alone"
    with pytest.raises(InputError, match="dim=2"):
        job.run(Config(resume=str(cut.path), dim=3), {"dim"})

    task = make_task(load_data("digits"), "class", "slant", 0)
    fresh = make_filter("linear", task.train.x, 2, 7)
    load_weights(fresh, cut.path / "filter.safetensors")
    kinds = train_privacy_filter.judge(small(tmp_path, ""), task, fresh)["private"]["kinds"]
    assert kinds == without_time(cut.path)["private"]["kinds"]


def test_a_baseline_has_nothing_to_train(tmp_path, monkeypatch):
    monkeypatch.setattr(FilterTraining, "step", None)
    sizes = {"dim": 2, "hidden": 4, "restarts": 1, "runs_dir": str(tmp_path)}
    run = job.run(Config(filter="pca", keep="parity", **sizes))
    report = run.report()
    assert report["game"] == {}
    assert not (run.path / "metrics.csv").exists()
    assert report["private"]["floor"] == pytest.approx(0.2, abs=0.01)
    kinds = report["private"]["kinds"]
    best = max(kinds, key=lambda kind: kinds[kind]["validation"])
    assert report["private"]["accuracy"] == kinds[best]["test"]
    assert (run.path / "report.md").stat().st_size


def test_settings_reach_the_game(tmp_path):
    _, filter_, game = job.build(
        small(tmp_path, "", solver="k-beam", beams=2, rho=3.0, ascent_steps=4, filter="mlp")
    )
    assert (len(game.adversaries), game.rho, game.solver.ascent_steps) == (2, 3.0, 4)
    assert (filter_.dim, game.batch_size) == (2, 64)
    assert game.solver.descend.defaults["lr"] == 1e-3
    assert game.solver.ascend.defaults["lr"] == 2e-2


@pytest.mark.drawn
def test_a_study_keeps_finished_cells_and_writes_its_table(tmp_path, monkeypatch):
    judged = []

    def quick(near, mid, far, classes, **_):
        judged.append(classes)
        if len(judged) == 5:
            raise KeyboardInterrupt
        return {kind: Inference(0.5, 0.5 + len(judged) / 100) for kind in ("linear", "mlp", "svm")}

    def here(cells, engine, jobs, begun):
        """The cells in this process, one after the other."""
        for cell in cells:
            root, name = str(cell.folder.parent), cell.folder.name
            asked = replace(train_privacy_filter.job.parse(cell.flags), name=name, runs_dir=root)
            old = cell.folder.exists()
            train_privacy_filter.job.run(Config(resume=str(cell.folder)) if old else asked)

    monkeypatch.setattr("advgame.run.study.run_cells", here)
    monkeypatch.setattr("advgame.privacy.fresh.try_all", quick)
    monkeypatch.setattr(study_privacy, "TASKS", {"class": "keep the digit, hide the slant"})
    monkeypatch.setattr(study_privacy, "RHOS", (3.0,))
    monkeypatch.setattr("advgame.run.curves.save_figure", lambda *_: None)
    config = study_privacy.Config(
        seeds=1, dims=(3,), steps=1, runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "out")
    )
    with pytest.raises(InputError, match="no finished cell"):
        study_privacy.main(replace(config, finished_only=True))
    with pytest.raises(KeyboardInterrupt):
        study_privacy.main(config)
    assert len(list((tmp_path / "runs").glob("*/report.json"))) == 2
    study_privacy.main(config)
    cells = study_privacy.Privacy(config).cells()
    assert len(judged) == 2 * len(cells) + 1, "finished ones were kept"
    assert "--steps" in cells["class-mlp-d3-seed0"]
    assert "--steps" not in cells["class-pca-d3-seed0"], "it would be refused"
    found = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert set(found["summary"]) == {
        "class-linear-d3", "class-mlp-d3", "class-pca-d3", "class-random-d3", "class-raw",
        "class-alt", "class-rho3",
    }  # fmt: skip
    text = (tmp_path / "out" / "privacy.md").read_text()
    assert text.count("| linear | 3 |") == 4  # two solvers, two ρ
    assert (tmp_path / "out" / "privacy.png").stat().st_size > 5000
    with pytest.raises(InputError, match="other flags"):
        study_privacy.main(replace(config, steps=2))
    with pytest.raises(InputError, match="dim must lie in"):
        study_privacy.main(replace(config, dims=(65,), out=str(tmp_path / "else")))


def test_cells_of_other_dimensions_count_among_those_that_there_are():
    """Results keep them, so that more than all of them seemed finished."""
    study = study_privacy.Privacy(study_privacy.Config(dims=(3,), seeds=2))
    told = {"keep": "class", "filter": "pca", "rho": 1.0, "solver": "minimax"}
    there = [("class-pca-d10", 10, seed) for seed in (0, 1, 2)] + [("class-pca-d3", 3, 1)]
    runs = [{"cell": cell, "dim": dim, "seed": seed, **told} for cell, dim, seed in there]
    assert study.found(runs)["cells"] == len(study.cells()) + 3

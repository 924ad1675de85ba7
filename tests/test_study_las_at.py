"""The study of LAS-AT: who is compared with whom, and that finished work is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import train_las_at
from studies import las_at as study

from advgame.errors import InputError


def cell(player, seed, autoattack, **more):
    strategies = {"eps_ratio": 1.0, "entropy_eps": 1.0, "attacker_reward": 1.0}
    cost = {"forwards_per_image": 20.0, "validation_pgd10": 0.9}
    accuracies = {f"accuracy_{name}": autoattack for name in ("clean", "pgd20", "autoattack")}
    about = {"flags": [], "commit": "c" * 40, "eps0": 0.15, "n": 10, "train_n": None, "epochs": 4}
    return {"method": player, "seed": seed, **strategies, **cost, **accuracies, **about, **more}


def test_differences_are_paired_by_seed_and_equal_compute_meets_its_learner_too():
    cells = [
        cell("reinforce", 0, 0.5),
        cell("reinforce", 1, 0.7),
        cell("random", 1, 0.8),
        cell("random", 0, 0.6),
        cell("random-equal-compute", 0, 0.65),
        cell("random-equal-compute", 1, 0.75),
        cell("repo", 0, 0.5),
        cell("repo-random", 0, 0.6),
    ]
    *_, lines, pairs = study.LasStudy(study.Config()).document(cells, {})
    shown = [line.split(" | ")[7] for line in lines.splitlines()[2:]]
    assert shown == ["-10.0 ± 0.0", "–", "+0.0 ± 63.5", "–", "–"]
    assert "interval: reinforce less random-equal-compute -10.0 ± 63.5." in pairs


def test_the_random_control_of_the_published_settings_differs_in_who_picks_only():
    def config(player):
        words = dict(zip(*[iter(study.PLAYERS[player].split())] * 2, strict=True))
        base = train_las_at.job.defaults(dataset="digits", preset=words.pop("--preset", "default"))
        return train_las_at.job.check(replace(base, **{k[2:]: v for k, v in words.items()}))

    assert replace(config("repo-random"), agent="reinforce") == config("repo")
    assert config("repo-random").true_probability == 0.7
    assert config("random").true_probability == 1


def test_equal_compute_is_for_the_learner_of_the_same_row():
    runs = [
        {"method": name, "seed": 0, "epochs": 40, "total_forwards_per_image": cost}
        for name, cost in {
            "reinforce": 60, "reinforce-interval-20": 22, "repo": 15, "random": 20,
            "repo-random": 10,
        }.items()
    ]  # fmt: skip
    made = study.LasStudy(study.Config()).later_cells(runs)
    lengths = {name: int(flags[flags.index("--epochs") + 1]) for name, flags in made.items()}
    assert lengths == {
        "random-equal-compute-seed0": 120,
        "random-equal-compute-20-seed0": 44,
        "repo-random-equal-compute-seed0": 60,
    }
    assert "repo" in made["repo-random-equal-compute-seed0"]


def test_cells_that_the_results_hold_stay_and_are_not_run_again(tmp_path, monkeypatch):
    out = tmp_path / "results"
    out.mkdir()
    earlier = [
        cell(p, s, 0.5, total_forwards_per_image=9.0) for p in ("repo", "random") for s in (0, 1)
    ]
    (out / "digits.json").write_text(json.dumps({"runs": earlier, "extra": ""}))
    asked = study.Config(
        seeds=2,
        methods=("repo", "repo-random"),
        missing_only=True,
        runs_dir=str(tmp_path / "runs"),
        out=str(out),
    )
    ran = []

    def read(self, folder):
        method, number = self.key(folder.name, None)
        return cell(method, number, 0.6, total_forwards_per_image=9.0, curves={})

    run = "advgame.run.study.run_cells"
    monkeypatch.setattr(
        run, lambda cells, engine, jobs, begun: ran.extend(one.folder.name for one in cells)
    )
    monkeypatch.setattr(study.LasStudy, "read", read)
    study.main(asked)
    assert ran == [
        "repo-random-seed0", "repo-random-seed1",
        "repo-random-equal-compute-seed0", "repo-random-equal-compute-seed1",
    ]  # fmt: skip
    made = json.loads((out / "digits.json").read_text())
    assert [run for run in made["runs"] if run["method"] in ("repo", "random")] == earlier
    assert not (out / "digits.png").exists(), "earlier cells have no curves"
    with pytest.raises(InputError, match="other flags"):
        study.main(replace(asked, extra="--epochs 5"))
    with pytest.raises(InputError, match="have epochs of their own"):
        study.main(replace(asked, extra="--budget 50", out=str(tmp_path / "new")))
    with pytest.raises(InputError, match="equal compute needs"):
        study.main(replace(asked, methods=("ppo",), out=str(tmp_path / "new")))
    assert not (Path(asked.runs_dir) / "digits" / "ppo-seed0").exists()

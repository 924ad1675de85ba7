"""The study of mixtures of committed weights: its members, what is read of them."""

import json

import pytest
import torch
from studies.mixtures import Config, Mixtures, jackknifed, pairs

from advgame.arena import read_mixture
from advgame.errors import InputError
from advgame.run import table
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder
from advgame.statistics import spread
from advgame.zoo.entries import HOME

VERDICTS = "image,label,clean,adaptive:ce,arc,arc:warm,members:pgd20\n0,1,1,1,0.5,1,1\n"


def runs(*named, spent=60.0):
    about = {"norm": "Linf", "eps": 0.15, "spent": spent}
    return {"runs": [{"method": name, "seed": seed, **about} for name, seed in named]}


@pytest.fixture
def study(tmp_path):
    """A study of two games with three seeds each, and of a longer one's; its weights are empty."""
    short = [(game, seed) for game in ("pgd", "fgsm") for seed in range(3)]
    longer = [("pgd", seed) for seed in range(3)]
    for folder, named, spent in (("", short, 60.0), ("long", longer, 120.0)):
        home = tmp_path / folder
        write_atomically(home / "r.json", json.dumps(runs(*named, spent=spent)))
        for game, seed in named:
            write_atomically(home / "weights" / "r" / f"{game}-seed{seed}.safetensors", "")

    def make(**changes):
        where = {"results": str(tmp_path / "r.json"), "longer": str(tmp_path / "long" / "r.json")}
        own = {"dataset": "digits", "runs_dir": str(tmp_path / "runs"), "out": str(tmp_path / "o")}
        return Mixtures(Config(**{**where, **own, "rows": ("pgd",), **changes}))

    return make


def test_a_game_that_comes_again_is_another_seed(study):
    one = study()
    for seed, others in ((0, [0, 1]), (2, [2, 0])):
        assert [run["seed"] for run in one.members("pgd+pgd", seed)] == others
    both = one.members("pgd+fgsm", 1)
    assert [(run["method"], run["seed"]) for run in both] == [("pgd", 1), ("fgsm", 1)]


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"rows": ("pdg",)}, "unknown game"),
        ({"rows": ("long:fgsm",)}, "unknown game"),
        ({"rows": ("pgd+pgd",), "seeds": 1}, "one mixture of all 1 seeds"),
        ({"rows": ("pgd+pgd",), "seeds": 2}, "one mixture of all 2 seeds"),
        ({"seeds": 4}, r"has pgd of the seeds \[0, 1, 2\]"),
        ({"rows": ()}, "nothing to run"),
        ({"results": "nowhere.json"}, "nowhere.json"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(study, tmp_path, changes, answer):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=answer):
        study(**changes).play()
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_there_are_refused(study, tmp_path):
    (tmp_path / "weights" / "r" / "pgd-seed2.safetensors").unlink()
    with pytest.raises(InputError, match=r"pgd-seed2\.safetensors is not there"):
        study().play()


@pytest.mark.parametrize("of", ["results", "longer"])
def test_mixtures_judged_from_another_file_are_not_taken_for_these(study, tmp_path, of):
    one = study()
    one.prepare({})
    one._note_flags()
    RunFolder.create(one.root / "judged" / "pgd-seed0", {}, "cpu")
    study().prepare({})
    with pytest.raises(InputError, match=r"other\.json"):
        study(**{of: str(tmp_path / "other.json")}).prepare({})


@pytest.mark.slow
def test_real_weights_are_judged(tmp_path):
    """Two classifiers of the zoo, in the place where a study keeps its weights."""
    named = [("pgd-at", 0), ("stopper", 0)]
    write_atomically(tmp_path / "r.json", json.dumps(runs(*named)))
    for game, _ in named:
        best = HOME / "digits" / f"{game}-small_cnn-seed0" / "checkpoints" / "best.safetensors"
        kept = tmp_path / "weights" / "r" / f"{game}-seed0.safetensors"
        write_atomically(kept, best.read_bytes())
    rows = {"rows": ("pgd-at", "pgd-at+stopper"), "seeds": 1, "attacks": ("fgsm",), "n": 12}
    where = {"results": str(tmp_path / "r.json"), "out": str(tmp_path / "o")}
    where["runs_dir"] = str(tmp_path / "runs")
    Mixtures(Config(**rows, **where, dataset="digits", model="small_cnn", jobs=1)).play()
    found = json.loads((tmp_path / "o" / "digits-mixtures.json").read_text())["runs"]
    assert {run["method"]: run["members"] for run in found} == {"pgd-at": 1, "pgd-at+stopper": 2}
    for run in found:
        least = min(run["adaptive"], run["arc"], run["union"])
        assert run["worst_case"] - 1e-6 <= least <= run["clean"] + 1e-6


def test_rows_are_mixed_judged_and_told(study, tmp_path, monkeypatch):
    mixed = {}

    def run_all(self, cells, jobs=None):
        for cell in cells:
            mixed[cell.folder.name] = read_mixture(cell.flags[0])
            assert cell.flags[cell.flags.index("--eps") + 1] == "0.15"
            RunFolder.create(cell.folder, {}, "cpu")
            write_atomically(cell.folder / "verdicts.csv", VERDICTS)
            report = {
                **{"n": 1, "threat": {"norm": "Linf", "eps": 0.15}, "accuracy": {"clean": 1.0}},
                **{"mixture": {"adaptive_alone": 0.75, "members": ["a", "b"]}},
                **{"worst_case": 0.5, "flags": [{"name": "gap"}], "device": "cpu"},
            }
            write_atomically(cell.folder / "report.json", json.dumps(report))

    monkeypatch.setattr(Mixtures, "run_all", run_all)
    study(rows=("pgd", "pgd+fgsm", "long:pgd")).play()
    assert len(mixed) == 9
    assert mixed["pgd+fgsm-seed1"].weights == (0.5, 0.5)
    names = [path.name for path in mixed["pgd+fgsm-seed1"].members]
    assert names == ["pgd-seed1.safetensors", "fgsm-seed1.safetensors"]
    assert mixed["long-pgd-seed0"].members[0].parts[-4] == "long"
    found = json.loads((tmp_path / "o" / "digits-mixtures.json").read_text())["runs"]
    spent = {run["method"]: run["forwards"] for run in found}
    assert spent == {"pgd": 60, "pgd+fgsm": 120, "long:pgd": 120}
    page = (tmp_path / "o" / "digits-mixtures.md").read_text()
    assert "| long:pgd | 3 |" in page
    assert "Linf ε = 0.15, 1 test images" in page
    assert "pgd: gap" in page
    assert "| long:pgd | pgd+fgsm | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |" in page


def test_differences_of_rows_are_paired_by_hand():
    worst = {"one": (0.3, 0.31, 0.32), "two": (0.32, 0.33, 0.34)}
    runs = [
        {"method": name, "seed": seed, "worst_case": value, "adaptive": value + 0.01}
        for name, values in worst.items()
        for seed, value in enumerate(values)
    ]
    runs[-1]["adaptive"] += 0.03
    # adaptive: 2, 2 and 5 points more, t = 4.303 with two degrees of freedom, sd = 1.732
    line = "| two | one | +2.0 ± 0.0 | +3.0 ± 4.3 | +1.0 ± 4.3 |"
    assert pairs(table.rows(runs)).splitlines()[2:] == [line]


def test_mixtures_that_share_classifiers_have_the_spread_of_their_classifiers():
    """Of three, the pseudo-values of means over two are the three classifiers' own numbers."""
    worst = (0.30, 0.33, 0.36)
    mixed = [
        {
            **{"method": "pgd+pgd", "seed": seed, "drawn": [seed, (seed + 1) % 3], "members": 2},
            "worst_case": (worst[seed] + worst[(seed + 1) % 3]) / 2,
        }
        for seed in range(3)
    ]
    alone = [{"method": "pgd", "seed": seed, "worst_case": worst[seed]} for seed in range(3)]
    found = jackknifed([*alone, *mixed])
    assert found[:3] == alone
    assert [run["worst_case"] for run in found[3:]] == pytest.approx(list(worst))
    assert [run["members"] for run in found[3:]] == [2, 2, 2]
    (one,) = jackknifed(mixed[:2])  # the third is not judged yet: a mean, and no spread
    assert one["worst_case"] == pytest.approx((mixed[0]["worst_case"] + mixed[1]["worst_case"]) / 2)


def test_intervals_of_shared_classifiers_cover_as_often_as_they_say(rng):
    """95 %, where those of the mixtures cover about 81 %; of five they are a quarter too wide."""
    held, wide, count, trials = 0, 0.0, 5, 2000
    for draws in torch.randn(trials, count, generator=rng, dtype=torch.float64):
        values = [(float(draws[i] + draws[(i + 1) % count])) / 2 for i in range(count)]
        rows = [
            {"method": "a+a", "seed": i, "drawn": [i, (i + 1) % count], "worst_case": value}
            for i, value in enumerate(values)
        ]
        found = spread([run["worst_case"] for run in jackknifed(rows)])
        held += abs(found["mean"]) <= found["half_interval"]
        wide += found["sd"] ** 2  # of one classifier it is 1
    assert 0.93 < held / trials < 0.985
    assert (wide / trials) ** 0.5 == pytest.approx(1.25, abs=0.03)

"""`study.py strategies`: one budget, intervals over seeds and images, Holm, digits cut anew."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t
from studies import strategies
from studies.strategies import BEST, FIXED, Config, Strategies, best_fixed, find_contrasts

from advgame.data import load_data
from advgame.data.resplit import digits as resplit
from advgame.errors import InputError
from advgame.statistics import crossed_interval, holm, spread


def flags_value(words, name):
    """The value that counts: the last one."""
    return words[len(words) - words[::-1].index(name)]


def test_an_interval_over_seeds_and_images_is_the_two_way_tables():
    """The mean squares, written out; on images that do not matter, the seeds' t-interval."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randint(-1, 2, (4, 30), generator=rng) + torch.randint(0, 2, (30,), generator=rng)
    d = table.double().numpy()
    s, n = d.shape
    of_seeds = n * ((d.mean(1) - d.mean()) ** 2).sum() / (s - 1)
    of_images = s * ((d.mean(0) - d.mean()) ** 2).sum() / (n - 1)
    rest = ((d - d.mean(1)[:, None] - d.mean(0) + d.mean()) ** 2).sum() / ((s - 1) * (n - 1))
    assert of_images > rest, "images matter here"
    top = of_seeds + of_images - rest
    freedom = (s - 1) * (top / of_seeds) ** 2
    found = crossed_interval(table)
    assert found["mean"] == pytest.approx(d.mean())
    half = t.ppf(0.975, freedom) * (top / s / n) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half))
    mirrored = torch.cat([table, -table], 1).float()  # no seed differs: the interval is the images'
    assert crossed_interval(mirrored)["mean"] == pytest.approx(0)
    assert crossed_interval(mirrored)["p"] == pytest.approx(1)
    seeds_alone = torch.tensor([0.1, 0.3, 0.4])[:, None].expand(3, 20)
    alone, usual = crossed_interval(seeds_alone), spread([0.1, 0.3, 0.4])
    assert alone["high"] - alone["mean"] == pytest.approx(usual["half_interval"])
    same = crossed_interval(torch.ones(3, 9))
    assert same == {"mean": 1.0, "low": 1.0, "high": 1.0, "p": 0.0}
    with pytest.raises(InputError, match="two of each"):
        crossed_interval(torch.ones(1, 9))


def test_nineteen_in_twenty_intervals_hold_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        d = rng.normal(0, 0.2, (5, 1)) + rng.normal(0, 2, (1, 40)) + rng.normal(0, 1, (5, 40))
        found = crossed_interval(torch.from_numpy(d))
        inside += found["low"] <= 0 <= found["high"]
        assert (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert 370 <= inside <= 398


def test_holms_p_values():
    assert holm([0.01, 0.04]) == [0.02, 0.04]
    assert holm([0.04, 0.03, 0.001]) == pytest.approx([0.06, 0.06, 0.003])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_digits_are_cut_anew():
    usual, other, again = load_data("digits"), resplit(7), resplit(7)
    for part in ("train", "validation", "test"):
        counts = [getattr(one, part).labels.bincount(minlength=10) for one in (usual, other)]
        assert (counts[0] - counts[1]).abs().max() <= 1, "as large, and stratified"
        assert torch.equal(getattr(other, part).images, getattr(again, part).images)
    rows = [
        {tuple(image.flatten().tolist()) for image in getattr(one, part).images}
        for one in (usual, other, resplit(8))
        for part in ("train", "validation", "test")
    ]
    assert len(rows[2] & rows[5]) < 0.4 * len(rows[5]), "most test images are others"
    assert len(rows[5] & rows[8]) < 0.4 * len(rows[8])
    assert set().union(*rows[:3]) == set().union(*rows[3:6])
    assert not rows[3] & rows[5]
    assert not rows[4] & rows[5]
    with pytest.raises(InputError, match="whole number"):
        resplit(-1)


def cell(method, seed, share, n=60, **more):
    """Survives on the first images; the seed moves the last few."""
    count = round(share * n) + seed
    base = {"method": method, "seed": seed, "n": n, "flags": [], "eps": 0.15, "train_n": None}
    base |= {"worst_case": count / n, "accuracy_clean": 1.0, "accuracy_autoattack": count / n}
    base |= {"epochs": 2.0, "forwards_per_image": 10.0, "seconds_per_epoch": 1.0, "seconds": 9.0}
    base |= {"validation": share, "spent": 20.0, "selected_by": "robust"}
    return {**base, "survives": "1" * count + "0" * (n - count), **more}


def runs(seeds=3, **shares):
    shares = {name.replace("_", "-"): share for name, share in shares.items()}
    return [cell(name, seed, share) for name, share in shares.items() for seed in range(seeds)]


def test_the_best_fixed_training_is_that_of_validation():
    made = runs(pgd_at=0.5, pgd_at_2=0.6, random=0.9)
    assert best_fixed(made) == ["pgd-at-2"]
    made[0]["validation"], made[1]["validation"] = 0.8, 0.8  # test accuracy has no say
    assert best_fixed(made) == ["pgd-at"]
    assert best_fixed(runs(random=0.5)) == []


def test_each_of_several_that_validation_ties_is_compared():
    made = runs(stopper=0.6, random=0.5, pgd_at=0.4, pgd_at_7=0.45, pgd_at_2=0.45)
    thirds = iter((0.1, 0.1, 0.4, 0.2, 0.3, 0.1))  # the same sum but for rounding
    for one in made:
        if one["method"].startswith("pgd-at"):
            one["validation"] = next(thirds) if one["method"] != "pgd-at-2" else 0.1
    best = best_fixed(made)
    assert best == ["pgd-at-7", "pgd-at"]
    found = find_contrasts(made, "stopper", best)
    first = [one["name"] for one in found if one["primary"]]
    assert first == ["stopper less random", "stopper less pgd-at-7", "stopper less pgd-at"]
    assert [one["holm"] for one in found[:3]] == holm([one["p"] for one in found[:3]])
    others = [one["name"] for one in found[3:]]
    assert others == ["random less pgd-at-7", "random less pgd-at"]
    assert set(FIXED) <= set(strategies.PLAYERS)


def test_contrasts_are_paired_by_seed_and_image_and_the_primary_ones_adjusted():
    made = runs(stopper=0.6, random=0.5, shuffled=0.55, pgd_at=0.4, pgd_at_2=0.45)
    found = find_contrasts(made, "stopper", best_fixed(made))
    names = [one["name"] for one in found]
    against = ["stopper less random", "stopper less pgd-at-2", "stopper less shuffled"]
    assert names == [*against, "random less pgd-at-2"]
    assert [one["primary"] for one in found] == [True, True, False, False]
    assert [one["mean"] for one in found] == pytest.approx([0.1, 0.15, 0.05, 0.05])
    assert all(one["low"] <= one["mean"] <= one["high"] for one in found)
    assert [one["holm"] for one in found[:2]] == holm([one["p"] for one in found[:2]])
    assert all("holm" not in one for one in found[2:])
    assert find_contrasts(runs(1, stopper=0.6, random=0.5), "stopper", []) == []
    other = find_contrasts(made, "shuffled", ["pgd-at"])
    assert [one["name"] for one in other][:2] == ["shuffled less random", "shuffled less pgd-at"]
    with pytest.raises(InputError, match="different numbers of images"):
        find_contrasts([*runs(2, stopper=0.5), *[cell("random", s, 0.5, 40) for s in (0, 1)]],
                       "stopper", [])  # fmt: skip


def study(tmp_path, **changes):
    base = Config(seeds=2, runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "results"))
    return Strategies(replace(base, **changes))


def test_all_players_have_one_budget_and_the_same_terms(tmp_path):
    every = tuple(strategies.PLAYERS | strategies.ABLATIONS)
    asked = study(tmp_path, methods=every, resplit=7, first_seed=100, stopper="there")
    cells = asked.cells()
    assert len(cells) == 2 * len(every)
    for name, words in cells.items():
        share = 0.6 if name.startswith("stopper-60") else 1
        assert float(flags_value(words, "--budget")) == pytest.approx(920 * share), name
        assert flags_value(words, "--dataset") == "advgame.data.resplit:digits(7)"
        smooth = name.startswith(("policy", "random-smoothed"))
        assert flags_value(words, "--true-probability") == ("0.7" if smooth else "1")
        if name in ("stopper-no-margin-seed100", "linucb-lists-seed100", "policy-seed100"):
            asked.script_of(name).job.check(asked.script_of(name).job.parse(words))
    assert flags_value(cells["stopper-frozen-seed100"], "--stopper") == "there"
    judged = asked.evaluations(cells)
    assert flags_value(judged["random-seed101"], "--dataset").endswith("digits(7)")
    assert asked.stem == "digits-split7-920"
    for changes, said in (
        ({"forwards": None}, "give --forwards"),
        ({"methods": ("stopper-frozen",)}, "give both, or neither"),
        ({"resplit": 3, "dataset": "mnist", "data_dir": "d"}, "--resplit is for digits"),
    ):
        with pytest.raises(InputError, match=said):
            study(tmp_path, **changes).check()


def test_cells_of_another_frozen_rule_are_refused(tmp_path):
    """By the file's content: a run folder stands for its stopper.json."""
    rules = [tmp_path / name for name in ("a", "b")]
    for number, rule in enumerate(rules):
        rule.mkdir()
        (rule / "stopper.json").write_text(json.dumps({"weights": number}))
    asked = {"methods": ("stopper-frozen",), "extra": ""}
    first, other = (study(tmp_path, **asked, stopper=str(rule)) for rule in rules)
    copy = study(tmp_path, **asked, stopper=str(rules[0] / "stopper.json"))
    about = {"extra": first.same(), **first.facts()}
    run = {"method": "stopper-frozen", "seed": 0, "epochs": 1, "stopper": first.frozen}
    first.path.parent.mkdir(parents=True)
    first.path.write_text(json.dumps({**about, "runs": [run]}))
    for one in (first, copy):
        one.prepare({})
    with pytest.raises(InputError, match="cells of another rule"):
        other.prepare({})
    first.path.unlink()
    folder = first.root / "stopper-frozen-seed0"
    folder.mkdir(parents=True)
    settings = {"epochs": 1, "stopper": str(rules[0])}
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    first.prepare({})
    with pytest.raises(InputError, match="cells of another rule"):
        other.prepare({})


def test_a_cell_is_read_and_the_table_has_its_differences(tmp_path):
    asked = study(tmp_path, methods=("stopper", "random", "pgd-at"))
    folder = asked.root / "stopper-seed0"
    told = {"n": 3, "threat": {"eps": 0.15}, "accuracy": {"clean": 1.0, "autoattack": 1 / 3}}
    told |= {"worst_case": 1 / 3, "flags": []}
    for place in (folder, asked.judged / "stopper-seed0"):
        place.mkdir(parents=True)
        (place / "report.json").write_text(json.dumps(told))
    (asked.judged / "stopper-seed0" / "verdicts.csv").write_text(
        "image,label,clean,adt:pgd20,autoattack\n0,1,1,0,1\n1,1,1,1,0\n2,4,0,1,1\n"
    )
    settings = {"seed": 0, "epochs": 1, "train_n": None}
    about = {"config": settings, "commit": "c", "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "metrics.csv").write_text(
        "step,time/seconds,attacker/forwards_per_image,eval/robust\n4,1,7,0.5\n8,2,7,0.4\n"
    )
    run = asked.read(folder)
    assert run["survives"] == "100", "of AutoAttack and the clean image"
    assert run["validation"] == 0.5
    made = runs(stopper=0.6, random=0.5, pgd_at=0.4)
    about = {**asked.found(made), "budget": 920.0, "prices": (1.0, 2.0)}
    text = "\n".join(asked.document(made, about))
    assert "| stopper less random | primary | 3 | +10.0 |" in text
    assert "Best fixed PGD-AT, by validation: pgd-at." in text
    assert about["contrasts"][1]["name"] == "stopper less pgd-at"
    assert about["best_fixed"] == "pgd-at" != BEST
    asked.path.parent.mkdir(parents=True)
    asked.pictures(made, about)
    beside = asked.path.with_name("digits-split0-920-differences.csv")
    assert beside.with_suffix(".png").exists()
    lines = list(csv.reader(beside.open()))
    assert lines[1][:4] == ["stopper less random", "primary", "3", "+10.0"]

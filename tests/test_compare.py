"""`study.py compare`: what is equal, what is read, what is refused."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import train
import tyro
from studies import compare, minimax
from studies.compare import AUTOATTACK, PGD, flags_of

from advgame.errors import InputError
from advgame.run import table
from advgame.run.selection import SCORES
from advgame.run.training_study import Finished, selection

pytestmark = pytest.mark.drawn

ACCURACY = {"clean": 1.0, PGD.split("_")[1]: 0.8, AUTOATTACK.split("_")[1]: 0.7}
TINY = "--train-n 100 --epochs 8 --batch-size 50 --validate-every 8"


def config(tmp_path, **changes):
    base = compare.Config(
        methods=("standard", "free", "pgd-at", "trades"),
        seeds=1,
        attacks=("adt:fgsm", "adt:pgd20", "transfer"),
        eval_n=20,
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path / "results"),
        extra=TINY,
    )
    return replace(base, **changes)


def flags(words, name):
    """The value that counts: the last one."""
    return words[len(words) - words[::-1].index(name)]


def study(tmp_path, **changes):
    return compare.Compare(config(tmp_path, **changes))


def test_equal_epochs_and_equal_terms(tmp_path):
    asked = study(tmp_path, methods=tuple(asked_for := compare.GAMES | compare.MORE), seeds=2)
    cells = {**asked.surrogate(), **asked.cells()}
    assert len(cells) == 2 * len(asked_for) + 1
    for name, words in cells.items():
        assert flags(words, "--epochs") == ("1" if name.startswith("free") else "8"), name
        for flag, value in (("--lr", "0.1"), ("--weight-decay", "5e-4"), ("--model", "small_cnn")):
            assert flags(words, flag) == value
        smoothing = "0.5" if name.startswith("feature-scatter") else "1"
        assert flags(words, "--true-probability") == smoothing
    assert flags(cells["pgd-at-seed1000"], "--seed") == "1000"
    judged = asked.evaluations(asked.cells())
    assert flags(judged["trades-seed0"], "--surrogate").endswith("pgd-at-seed1000")
    assert tyro.cli(compare.Config, args=["--games", "mart"]).methods == ("mart",)


def test_games_are_compared_on_an_own_network(tmp_path):
    """Each cell, and the judging of each, names it: a folder's code is not run unasked."""
    asked = study(tmp_path, extra="--model 'my_net:Net(width=8)'", methods=("trades", "las-at"))
    cells = asked.cells()
    judged = asked.evaluations(cells)
    assert len(cells) == 2
    for name in cells:
        assert flags(cells[name], "--model") == flags(judged[name], "--model")
        assert flags(judged[name], "--model") == "my_net:Net(width=8)"
    own = minimax.Config(model="my.net:Net(8, 'a/b')")
    assert minimax.MinimaxStudy(own).stem == "digits-my.net-Net-8-aofb--0.15"


def test_a_surrogate_is_given_where_an_attack_needs_one(tmp_path):
    """`evaluate.py` refuses one that nothing makes use of."""
    own = "transfer_mine:Mine"
    for attacks, wanted in ((("fgsm", "transfer"), True), (("fgsm", "spsa", own), False)):
        judged = study(tmp_path, attacks=attacks).evaluations({"trades-seed0": []})
        assert ("--surrogate" in judged["trades-seed0"]) == wanted


def test_no_classifier_is_judged_by_examples_that_were_made_on_itself(tmp_path):
    """The column would be PGD-20 with the classifier's own gradients, called transfer."""
    asked = {"methods": ("trades", "pgd-at"), "first_seed": 999, "seeds": 2}
    with pytest.raises(InputError, match="pgd-at with seed 1000 is what transferred examples"):
        study(tmp_path, **asked).check()
    for change in ({"seeds": 1}, {"methods": ("trades",)}, {"attacks": ("fgsm",)}):
        study(tmp_path, **{**asked, **change}).check()


def test_equal_compute_scales_epochs_by_what_a_step_costs(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        study(tmp_path, budget="compute").cells()
    runs = [
        {"method": name, "epochs": float(epochs), "forwards_per_image": cost}
        for name, epochs, cost in (
            ("pgd-at", 8, 22.0),
            ("pgd-at", 8, 24.0),
            ("standard", 8, 3.0),
            ("free", 1, 24.0),
        )  # the mean over seeds counts
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "digits-epochs.json").write_text(json.dumps({"runs": runs}))
    found = study(tmp_path, budget="compute", methods=("standard", "free", "pgd-at")).epochs()
    assert found == {"standard": 61, "free": 8, "pgd-at": 8}  # 8 · 23 / 3, 8 · 23 / 24, 8
    shorter = study(tmp_path, budget="compute", methods=("standard",), extra="--epochs 4")
    assert shorter.epochs() == {"standard": 31}  # 4 · 23 / 3
    with pytest.raises(InputError, match="does not hold trades"):
        study(tmp_path, budget="compute", methods=("trades",)).epochs()


def test_costs_may_come_from_another_file_and_lengths_are_not_mixed(tmp_path):
    cells = [
        {"method": name, "seed": 0, "epochs": 8.0, "forwards_per_image": cost}
        for name, cost in (("pgd-at", 20.0), ("standard", 4.0))
    ]
    first = tmp_path / "first.json"
    first.write_text(json.dumps({"runs": cells}))
    with pytest.raises(InputError, match="is for --budget compute"):
        compare.main(config(tmp_path, counted=str(first)))
    again = config(tmp_path, budget="compute", methods=("standard",), counted=str(first))
    assert compare.Compare(again).epochs() == {"standard": 40}  # 8 · 20 / 4
    held = {"extra": compare.Compare(again).same(), "runs": [{**cells[1], "epochs": 61.0}]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "digits-compute.json").write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"standard has cells of 61 epochs .* not 40"):
        compare.main(again)
    folder = tmp_path / "runs" / "digits-compute" / "standard-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"epochs": 7}}))
    with pytest.raises(InputError, match="standard has cells of 7 epochs"):
        compare.main(replace(again, out=str(tmp_path / "elsewhere")))
    assert not (folder / "report.json").exists()


def cell(method, seed=0, worst=0.5, **more):
    base = {"method": method, "seed": seed, "n": 200, "flags": [], "worst_case": worst}
    return {**base, "epochs": 1.0, "forwards_per_image": 3.0, "seconds_per_epoch": 1.0, **more}


def test_the_table_tells_the_passes_of_the_whole_training(tmp_path):
    lengths = {"pgd-at": (40.0, 23.0), "las-at": (16.0, 51.5)}
    runs = [cell(m, epochs=e, forwards_per_image=f) for m, (e, f) in lengths.items()]
    found = study(tmp_path).table(runs)
    assert [row[-1] for row in found] == ["passes, pgd-at = 1", "1.00", "0.90"]
    assert study(tmp_path).table(runs[1:])[1][-1] == "–"
    equal = [(10.0, 92.0), (20.0, 46.0)]  # seeds of unequal lengths, with 920 forwards each
    runs[1:] = [
        cell("stopper", k, epochs=e, forwards_per_image=f) for k, (e, f) in enumerate(equal)
    ]
    assert [row[-1] for row in study(tmp_path).table(runs)[1:]] == ["1.00", "1.00"]


def test_a_table_is_beside_the_papers_numbers_and_any_game(tmp_path):
    run = {"method": "pgd-at", "seed": 0, "n": 3, "eps": 0.1, "norm": "Linf", "epochs": 1.0}
    run |= {"accuracy_clean": 1.0, "worst_case": 0.5, "seconds_per_epoch": 1.0, "train_n": None}
    run |= {"forwards_per_image": 23.0, "selected_by": "x", "flags": [], "seconds": 1.0}
    beside = study(tmp_path, against="trades")
    better = {**run, "method": "trades", "worst_case": 0.75}
    both = [{**one, "seed": seed} for seed in (0, 1) for one in (run, better)]
    head, *lines = beside.table(both)
    own = head.index("worst − trades, paired, 95 %")
    assert [line[own] for line in lines] == ["-25.0 ± 0.0", "–"]
    cases = ("digits", "pgd-at", True), ("digits", "n-fgsm", False), ("own.npz", "pgd-at", False)
    for dataset, game, told in cases:
        pages = compare.Compare(config(tmp_path, dataset=dataset)).document(
            [{**run, "method": game}], {}
        )
        assert (compare.POSTER in pages) == told


def test_words_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown method"):
        compare.main(config(tmp_path, methods=("strong",)))
    with pytest.raises(InputError, match="unknown method 'pgd'"):
        compare.main(config(tmp_path, against="pgd"))
    with pytest.raises(InputError, match="no finished cell"):
        compare.main(config(tmp_path, finished_only=True))
    with pytest.raises(InputError, match="unknown attack 'nosuch'"):
        compare.main(config(tmp_path, attacks=("fgsm", "nosuch")))
    with pytest.raises(InputError, match="mnist needs --data-dir"):
        compare.main(config(tmp_path, dataset="mnist"))
    rows = compare.POSTER.splitlines()[2:]
    assert {row.split()[1] for row in rows} <= set(compare.GAMES)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"eval_n": 0}, InputError),
        ({"extra": "--epochs=five"}, SystemExit),
        ({"extra": "--epochs"}, SystemExit),
        ({"extra": "--epochs 0"}, InputError),
    ],
)
def test_numbers_that_cannot_work_are_refused(changes, error, tmp_path):
    with pytest.raises(error):
        compare.main(config(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_a_gap_to_autoattack_that_the_control_has_not_is_a_sign():
    def found(gap, seeds=3, control="pgd-at", **more):
        gaps = {"pgd-at": 0.02, "masked": gap}
        runs = [cell(m, s, gap=g, **more) for m, g in gaps.items() for s in range(seeds)]
        return flags_of("masked", runs, control)

    assert found(0.1) == "wider_gap_than_pgd-at"
    assert found(0.07 - 8e-9) == "wider_gap_than_pgd-at", "5 points more, as fp32 has them"
    assert found(0.06) == "none", "4 points more is no sign"
    for seeds in (1, 3):  # all on the same 200 images
        assert found(0.1, seeds, n=60) == "none", "8 points more may be chance on 60 images"
    assert found(-0.01) == "none", "AutoAttack does not run PGD-20 and may find less"
    assert found(0.02, flags=["saturated_loss"]) == "saturated_loss"
    assert found(0.1, control="trades") == "none", "nothing to compare with"


def test_the_table_says_what_selected_the_weights():
    games = ("trades", "pgd-at", "standard")
    older = [{"method": game} for game in games]
    assert selection(older) == "Weights selected by PGD-10 accuracy on the validation split"
    runs = [*older[:2], {"method": "standard", "selected_by": SCORES["clean"][1]}]
    assert selection(runs).endswith(" (standard: by clean accuracy on the validation split)")


def test_a_cell_has_the_dead_players_of_its_training(tmp_path):
    for folder, flags in (("run", ("dead_attacker_saturated", "zero_gradients")), ("judged", ())):
        report = {"n": 9, "threat": {"eps": 0.15}, "accuracy": ACCURACY, "worst_case": 0.5}
        report["flags"] = [{"name": name, "meaning": ""} for name in flags]
        (tmp_path / folder / "adt-exp-am-seed0").mkdir(parents=True)
        (tmp_path / folder / "adt-exp-am-seed0" / "report.json").write_text(json.dumps(report))
    run = tmp_path / "run" / "adt-exp-am-seed0"
    settings = {"seed": 0, "epochs": 1, "train_n": None}
    about = {"config": settings, "commit": "c", "device": "cpu"}
    (run / "config.json").write_text(json.dumps(about))
    (run / "metrics.csv").write_text(
        "step,time/seconds,attacker/forwards_per_image,cost/spent\n4,1,7,7\n8,2,7,14\n10,2.5,7,17.5\n"
    )
    found = study(tmp_path, judged=str(tmp_path / "judged")).read(run)
    assert found["flags"] == ["dead_attacker_saturated"]
    assert found["gap"] == pytest.approx(0.1), "what AutoAttack takes from what PGD-20 leaves"
    assert found["selected_by"] == SCORES["robust"][1]
    assert (found["epochs"], found["seconds_per_epoch"], found["spent"]) == (2.5, 1, 17.5)


def test_forwards_per_step_count_each_step_once():
    """The look-ahead of LAS-AT costs more as it learns: a short last epoch is not a whole one."""
    costs = [20.0, 20.0, 30.0]
    rows = [{"step": s, "cost": c} for s, c in zip((4, 8, 10), costs, strict=True)]
    assert compare.mean_over_steps(rows, "cost") == pytest.approx(22)
    assert compare.mean_over_steps(rows[:1], "cost") == 20


@pytest.mark.parametrize(("prices", "spent"), [((1.0, 2.0), 9.2), ((1.5, 2.5), 11.4)])
def test_a_budget_that_ends_within_the_first_epoch_says_so(prices, spent):
    """Not the script's own number of epochs, which no budget has a use for."""
    row = {"step": 8, "cost/forwards": 11, "cost/input_backwards": 10, "cost/backwards": 1}
    run = SimpleNamespace(settings={"epochs": 40, "prices": prices}, rows=[row])
    assert Finished.trained_epochs(run) == 40, "an epoch that is the only one asked for"
    run.rows = [{**row, "cost/spent": spent}]
    assert Finished.trained_epochs(run) == pytest.approx(0.4)
    rows = [table.rows([cell("a", epochs=length)])[0] for length in (0.4, 18.7)]
    assert [table.epochs(row) for row in rows] == ["0.40", "19"]


def test_a_budget_has_the_prices_that_were_measured(tmp_path):
    took = {"F": 2.0, "F + B_x": 5.0, "F + B": 7.0}
    rows = {name: {"median_s": seconds} for name, seconds in took.items()}
    case = {"network": "small_cnn", "contestants": rows}
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps({"groups": {"games": [case]}}))
    asked = {"budget": "compute", "forwards": 90.0, "cost": str(cost), "methods": ("trades",)}
    cells = study(tmp_path, **asked).cells()
    for words in cells.values():
        config = train.job.parse(words)
        assert (config.budget, config.prices) == (90, (1.5, 2.5))
        assert train.job.check(config), "no --epochs beside a budget"
    with pytest.raises(InputError, match="does not hold wrn-16-4"):
        study(tmp_path, **asked, extra="--model wrn-16-4").cells()
    for wrong in ({"budget": "epochs"}, {"forwards": None}, {"counted": "x"}):
        with pytest.raises(InputError, match="is for"):
            study(tmp_path, **{**asked, **wrong}).check()


def test_budgets_are_not_mixed_into_one_table(tmp_path):
    """What another budget made is refused: the page would state the new one for all."""
    asked = {"budget": "compute", "forwards": 60.0, "missing_only": True, "extra": ""}
    one = study(tmp_path, **asked)
    words = {"extra": one.same(), "budget": 60.0, "prices": [1.0, 2.0]}
    one.path.parent.mkdir(parents=True)
    one.path.write_text(json.dumps({**words, "runs": [cell("standard")]}))
    assert len(one.earlier()) == 1
    for changes in ({"forwards": 90.0}, {"forwards": None}):
        with pytest.raises(InputError, match="is about budget 60"):
            study(tmp_path, **{**asked, **changes}).earlier()
    one.path.write_text(json.dumps({"extra": one.same(), "runs": [cell("standard")]}))
    with pytest.raises(InputError, match="is about budget None"):
        one.earlier()
    folder = one.root / "standard-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"epochs": 40}}))
    one.path.unlink()
    one.prepare(one.cells())
    one._note_flags()
    later = study(tmp_path, **{**asked, "forwards": 90.0})
    with pytest.raises(InputError, match=r"cells made with other flags.*--forwards 90"):
        later.prepare(later.cells())


def test_weights_of_cells_that_were_only_collected_are_kept_too(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    one = study(tmp_path, methods=("standard",), finished_only=True, weights=str(kept))
    judged = one.judged / "standard-seed0" / "report.json"
    judged.parent.mkdir(parents=True)
    judged.write_text("{}")
    best = one.root / "standard-seed0" / "checkpoints" / "best.safetensors"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"weights")
    monkeypatch.setattr(compare.Compare, "read", lambda self, folder: cell("standard"))
    assert list(one.make(one.cells())) == [[cell("standard")]]
    assert (kept / one.stem / "standard-seed0.safetensors").read_bytes() == b"weights"


def test_own_images_are_known_by_their_content_not_by_their_name(tmp_path):
    def save(folder, value):
        (tmp_path / folder).mkdir(exist_ok=True)
        images = np.full((60, 8, 8), value, np.uint8)
        labels = np.arange(60, dtype=np.uint8) % 3
        path = tmp_path / folder / "faces.npz"
        np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
        return str(path)

    asked = {"methods": ("standard",), "attacks": ("fgsm",), "extra": ""}
    one = study(tmp_path, **asked, dataset=save("p", 10))
    one.path.parent.mkdir(parents=True)
    one.path.write_text(json.dumps({"extra": one.same(), **one.facts(), "runs": []}))
    other = study(tmp_path, **asked, dataset=save("q", 200))
    assert one.stem == other.stem
    one.earlier()
    with pytest.raises(InputError, match="is about data"):
        other.earlier()
    (one.root / "standard-seed0").mkdir(parents=True)
    about = {"config": {"epochs": one.epochs()["standard"]}}
    (one.root / "standard-seed0" / "config.json").write_text(json.dumps(about))
    one.path.unlink()
    one.prepare(one.cells())
    one._note_flags()
    with pytest.raises(InputError, match="cells made with other flags"):
        other.prepare(other.cells())
    assert study(tmp_path, **asked).facts() == {}, "a known data set is told by its name"


def test_a_table_is_written_again_with_the_attacks_and_the_control_that_it_had(tmp_path):
    runs = [cell(name, seed) for name in ("trades", "pgd-at-2") for seed in (0, 1)]
    for number, run in enumerate(runs):
        run |= {"accuracy_clean": 1.0, PGD: 0.8, "accuracy_adt:fea": 0.25, "eps": 0.1}
        run |= {"train_n": None, "worst_case": 0.5 + number / 10}
    one = study(tmp_path, methods=("trades",), from_json=True)
    one.path.parent.mkdir(parents=True)
    about = {"runs": runs, "against": "pgd-at-2", "commit": "c", "command": "c"}
    about |= {"device": "cpu", "jobs": 1, "summary": table.summarise(runs)}
    one.path.write_text(json.dumps(about))
    one.play()
    head, row = one.path.with_suffix(".csv").read_text().splitlines()[:2]
    assert "adt:fea" in head
    assert "worst − pgd-at-2" in head
    assert "-20.0 ± 0.0" in row
    study(tmp_path, against="trades", from_json=True).play()
    assert "worst − trades" in one.path.with_suffix(".csv").read_text()


@pytest.mark.long
def test_the_whole_of_a_small_comparison(tmp_path):
    asked = config(tmp_path)
    compare.main(asked)
    path = tmp_path / "results" / "digits-epochs.json"
    made = json.loads(path.read_text())
    assert [run["method"] for run in made["runs"]] == list(asked.methods)
    folder = tmp_path / "runs" / "digits-epochs"
    report = json.loads((folder / "judged" / "trades-seed0" / "report.json").read_text())
    assert made["runs"][3]["accuracy_transfer"] == report["accuracy"]["transfer"]
    costs = {run["method"]: run["forwards_per_image"] for run in made["runs"]}
    assert costs == {"standard": 3, "free": 24, "pgd-at": 23, "trades": 27}
    rows = list(csv.reader((tmp_path / "results" / "digits-epochs.csv").open()))
    assert [row[0] for row in rows] == ["game", *asked.methods]
    text = path.with_suffix(".md").read_text()
    assert f"| trades | 1 | 8 | {100 * report['accuracy']['clean']:.1f} |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    compare.main(replace(asked, methods=("standard",), finished_only=True))
    assert json.loads(path.read_text())["runs"] == made["runs"]
    with pytest.raises(InputError, match="other flags"):
        compare.main(replace(asked, eval_n=10))
    elsewhere = replace(asked, runs_dir=str(tmp_path / "later"), missing_only=True)
    compare.main(replace(elsewhere, methods=("standard",), seeds=2))
    later = {path.name for path in (tmp_path / "later" / "digits-epochs").glob("*-seed*")}
    assert later == {"pgd-at-seed1000", "standard-seed1"}
    assert len(json.loads(path.read_text())["runs"]) == len(asked.methods) + 1
    compare.main(replace(asked, budget="compute", methods=("standard", "pgd-at")))
    again = json.loads((tmp_path / "results" / "digits-compute.json").read_text())
    assert [run["epochs"] for run in again["runs"]] == [61, 8]
    budget = {"budget": "compute", "forwards": 15.0, "weights": str(tmp_path / "kept")}
    spent = {"out": str(tmp_path / "spent"), "runs_dir": str(tmp_path / "third")}
    compare.main(replace(asked, **budget, **spent, methods=("standard", "n-fgsm")))
    made = json.loads((tmp_path / "spent" / "digits-compute.json").read_text())
    assert [(run["epochs"], run["spent"]) for run in made["runs"]] == [(5, 15), (3, 15)]
    kept = tmp_path / "kept" / "digits-compute" / "n-fgsm-seed0.safetensors"
    best = tmp_path / "third" / "digits-compute" / "n-fgsm-seed0" / "checkpoints"
    assert kept.read_bytes() == (best / "best.safetensors").read_bytes()

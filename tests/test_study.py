"""`study.py`: one front for all studies; what was committed is rendered again as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import evaluate
import pytest
import study
from conftest import ROOT
from studies import referee

from advgame.errors import InputError
from advgame.run import table
from advgame.run.files import read_json
from advgame.run.folder import RunFolder
from advgame.run.job import kept
from advgame.run.options import check_types
from advgame.run.study import Study, StudyConfig, hardware
from advgame.zoo.entries import HOME

MNIST = {"dataset": "mnist", "data_dir": "data"}
ONE = {"setting": "fixed", "trajectories": 1}
CAR = {"env": "MountainCar-v0"}
COMPUTE = {"budget": "compute"}
CIFAR = {"dataset": "cifar10", "data_dir": "data", "against": "pgd-at-2", **COMPUTE}
# study, folder of results, stem within it, settings
COMMITTED = [
    ("l2l", "l2l", "digits", {}),
    ("l2l", "l2l", "mnist", MNIST),
    ("black_box", "l2l", "black_box_digits", {"title": "digits"}),
    ("minimax", "minimax", "digits-small_cnn-0.15", {}),
    ("minimax", "minimax", "mnist-small_cnn-0.15", MNIST),
    ("minimax", "minimax", "mnist-small_cnn-0.2", {**MNIST, "eps": "0.2"}),
    ("minimax", "minimax", "mnist-minimax_cnn-0.15", {**MNIST, "model": "minimax_cnn"}),
    ("minimax_rates", "minimax", "sweep-mnist-small_cnn-0.15", MNIST),
    ("attnet", "minimax", "attnet-games", {"name": "games"}),
    ("attnet", "minimax", "attnet-plain", {"name": "plain"}),
    ("privacy", "minimax", "privacy", {}),
    ("cat_and_mouse", "minimax", "cat_and_mouse_digits", {}),
    ("cat_and_mouse", "minimax", "cat_and_mouse_mnist", MNIST),
    ("las_at", "las_at", "digits", {}),
    ("las_at", "las_at", "mnist", MNIST),
    ("las_at", "las_at/wide", "mnist", MNIST),
    ("attacker", "referee", "attacker_digits", {"title": "digits"}),
    ("referee", "referee", "digits", {"title": "digits"}),
    ("referee", "referee", "mnist", {"title": "mnist"}),
    ("compare", "compare", "digits-epochs", {}),
    ("compare", "compare", "digits-compute", COMPUTE),
    ("compare", "compare/first", "digits-compute", COMPUTE),
    ("compare", "compare/spsa", "digits-epochs", {}),
    ("compare", "compare/l2", "digits-epochs", {}),
    ("compare", "cifar10", "cifar10-compute", CIFAR),
    ("compare", "cifar10", "cifar100-compute", {**CIFAR, "dataset": "cifar100"}),
    ("compare", "cifar10/long", "cifar10-compute", CIFAR),
    ("compare", "cifar10/hour", "cifar10-epochs", {"dataset": "cifar10", "data_dir": "data"}),
    ("compare", "cifar10/two-hours", "cifar10-epochs", {"dataset": "cifar10", "data_dir": "data"}),
    ("strategies", "strategies", "digits-split11-920", {"resplit": 11}),
    ("strategies", "strategies/again", "digits-split11-920", {"resplit": 11}),
    ("strategies", "strategies", "mnist-split0-230", {**MNIST, "forwards": 230.0}),
    ("arena", "arena", "digits", {}),
    ("mixtures", "arena", "cifar10-mixtures", {"data_dir": "data"}),
    ("influence", "strategies", "influence", {}),
    ("schedule", "cluster", "schedule", {}),
    ("engines", "cluster", "engines", {}),
    ("kills", "cluster", "kills", {}),
    ("gail", "gail", "cartpole_v1-paper/stability", {}),
    ("gail", "gail", "cartpole_v1-fixed/stability", {"setting": "fixed"}),
    ("gail", "gail", "cartpole_v1-fixed-1-every-1/stability", ONE),
    ("gail", "gail", "mountaincar_v0-paper/stability", CAR),
    ("gail", "gail", "mountaincar_v0-fixed/stability", {**CAR, "setting": "fixed"}),
    ("gail", "gail", "mountaincar_v0-fixed-1-every-1/stability", {**CAR, **ONE}),
]
OF_OTHERS = {"benchmark", "cost", "stopper", "sweeps", "tuning"}  # stems of what other scripts made


def module(name):
    return study.import_module(f"studies.{name}")


def test_the_studies_are_listed_by_their_first_lines(capsys):
    study.run([])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line} >= set(study.STUDIES)
    with pytest.raises(InputError, match="did you mean las_at"):
        study.run(["las-at"])


def test_flags_for_the_trainings_may_be_a_word_of_their_own():
    words = ["--seeds", "2", "--extra", "--epochs 5", "--out=o"]
    assert study.joined(words) == ["--seeds", "2", "--extra=--epochs 5", "--out=o"]
    assert study.joined(["--extra"]) == ["--extra"]  # refused by the parser


def test_every_committed_results_file_is_rendered_below():
    results = ROOT / "results"
    made = {f"{folder}/{stem}.json" for _, folder, stem, _ in COMMITTED}
    found = {path for path in results.rglob("*.json") if path.stem not in OF_OTHERS}
    assert {str(path.relative_to(results)) for path in found} == made


def test_committed_json_is_json():
    """NaN and Infinity are Python's alone: jq, R and JavaScript refuse them."""
    for path in [*ROOT.glob("results/**/*.json"), *HOME.glob("**/*.json")]:
        json.loads(path.read_text(), parse_constant=lambda _, path=path: pytest.fail(str(path)))


def test_a_study_of_one_seed_writes_json_and_reads_what_older_ones_wrote(tmp_path):
    toy = Toy(StudyConfig(out=str(tmp_path), seeds=1))
    toy.save([{"method": "a", "seed": 0, "value": 1.0}])
    json.loads(toy.path.read_text(), parse_constant=pytest.fail)
    toy.path.write_text(toy.path.read_text().replace("null", "NaN"))
    assert read_json(toy.path)["summary"]["a"]["value"]["sd"] is None


@pytest.mark.parametrize(("name", "folder", "stem", "settings"), COMMITTED)
def test_committed_results_are_rendered_as_they_were(name, folder, stem, settings, tmp_path):
    file = ROOT / "results" / folder / f"{stem}.json"
    copy = tmp_path / f"{stem}.json"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(file, copy)
    one = module(name)
    one.main(one.Config(out=str(tmp_path), from_json=True, **settings))
    assert copy.read_bytes() == file.read_bytes()
    for suffix in (".md", ".csv"):
        if file.with_suffix(suffix).exists():
            assert copy.with_suffix(suffix).read_text() == file.with_suffix(suffix).read_text()
    assert json.loads(copy.read_text())[one.main.__self__.listed]
    if name != "las_at":  # whose earlier cells have no curves
        assert file.with_suffix(".png").exists() <= copy.with_suffix(".png").exists()


@pytest.mark.parametrize(("name", "folder", "stem", "_"), COMMITTED)
def test_committed_results_can_be_added_to(name, folder, stem, _):
    one = module(name)
    toy = one.main.__self__(one.Config())
    runs = json.loads((ROOT / "results" / folder / f"{stem}.json").read_text())[toy.listed]
    assert len({toy.told_apart(run) for run in runs}) == len(runs)
    assert sorted(runs, key=toy.place)


class Toy(Study[StudyConfig]):
    """Two methods, a number each, and a third one that follows from them."""

    about, files = "Toys on toys", "toys"
    made: list = []  # noqa: RUF012

    def cells(self):
        found = [{"method": name, "seed": seed} for seed in self.seeds() for name in "ab"]
        return {f"{one['method']}{one['seed']}": one for one in found}

    def later_cells(self, runs):
        more = {run["seed"] for run in runs if run["method"] == "a" and run["value"] > 1}
        return {f"c{seed}": {"method": "c", "seed": seed} for seed in more}

    def make(self, cells):
        for name, cell in cells.items():
            if "broken" in self.config.extra and cell["method"] == "b":
                raise KeyboardInterrupt
            self.made.append(name)
            yield [{**cell, "value": 1.0 + cell["seed"], "flags": [], "commit": "c" * 40}]

    def place(self, run):
        return run["method"]

    def document(self, runs, about):
        columns = {"method": table.row_name, "value": table.Number("value", 1)}
        return [f"# {self.title}", table.render(columns, table.rows(runs))]


@pytest.fixture
def toy(tmp_path):
    Toy.made.clear()
    return StudyConfig(seeds=2, out=str(tmp_path))


def held(config):
    runs = json.loads((Toy(config).path).read_text())["runs"]
    return [f"{run['method']}{run['seed']}" for run in runs]


def test_a_study_runs_its_cells_and_those_that_follow_and_writes_what_they_found(toy, capsys):
    Toy.main(toy)
    assert Toy.made == ["a0", "b0", "a1", "b1", "c1"]
    assert held(toy) == ["a0", "a1", "b0", "b1", "c1"]
    found = json.loads(Toy(toy).path.read_text())
    assert found["summary"]["a"]["value"]["mean"] == 1.5
    assert found["device"] == "cpu; 2 process(es), a thread each"
    text = Toy(toy).path.with_suffix(".md").read_text()
    assert text.startswith("# Toys on toys\n\n| method | value |\n|---|---|\n| a | 1.5 ± 0.7 |\n")
    assert "| c | 2.0 |\n\nFlags raised: none.\n\nHardware: cpu; 2" in text
    assert f"Cells made at commit {'c' * 12}." in text
    assert "5 cells, 5 in all, 0 left out" in capsys.readouterr().out


def test_cells_that_the_results_hold_stay_and_can_be_left_out(toy):
    Toy.main(toy)
    Toy.main(replace(toy, seeds=3, missing_only=True))
    assert Toy.made[5:] == ["a2", "b2", "c2"]
    Toy.main(replace(toy, seeds=1, first_seed=1))
    assert Toy.made[8:] == ["a1", "b1", "c1", "c2"]
    assert held(toy) == ["a0", "a1", "a2", "b0", "b1", "b2", "c1", "c2"]
    before = Toy(toy).path.read_bytes()
    Toy.main(replace(toy, missing_only=True))
    assert Toy(toy).path.read_bytes() == before, "its command made the runs, this one made none"
    with pytest.raises(InputError, match=r"other flags, '', not '--epochs 3'.*another --out"):
        Toy.main(replace(toy, extra="--epochs 3"))


def test_what_was_found_before_an_interrupt_is_kept(toy):
    broken = replace(toy, extra="--broken")
    with pytest.raises(KeyboardInterrupt):
        Toy.main(broken)
    assert held(broken) == ["a0"]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"seeds": "two"}, "seeds cannot be"),
        ({"extra": "'"}, "cannot be read"),
    ],
)
def test_numbers_that_cannot_work_are_refused(settings, answer, toy, tmp_path):
    with pytest.raises(InputError, match=answer):
        Toy.main(replace(toy, **settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["toy", *study.STUDIES])
def test_no_study_runs_less_than_one_seed(name, toy):
    """Who writes a field anew must say again what its numbers are."""
    config = type(toy) if name == "toy" else module(name).Config
    for setting in ({"seeds": 0}, {"jobs": 0}, {"first_seed": -1}):
        with pytest.raises(InputError, match="must be"):
            check_types(config, setting, "settings")


@pytest.mark.parametrize(
    "content", ['{"extra": ""}', '{"runs": [3]}', '{"runs": [{"seed": 1}]}', "["]
)
def test_a_damaged_results_file_is_refused(content, toy):
    Toy(toy).path.write_text(content)
    with pytest.raises(InputError, match="choose another --out"):
        Toy.main(toy)
    assert Toy(toy).path.read_text() == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"runs": []}, "holds no results of this study"),
        ({"commit": "c"}, "holds no results of this study .KeyError: 'runs'"),
        ({"runs": [{"seed": 1}], "commit": "c"}, "KeyError: 'method'"),
        ({"runs": 2 * [{"method": "a", "seed": 1}], "commit": "c"}, "has a 1 twice"),
    ],
)
def test_an_edited_results_file_is_not_rendered_as_if_it_were_whole(content, said, toy):
    Toy(toy).path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        Toy.main(replace(toy, from_json=True))
    assert not Toy(toy).path.with_suffix(".md").exists()


def test_a_summary_of_other_runs_is_not_shown_beside_these(toy):
    """The table is made of the runs, differences and pictures of what was found of them."""
    Toy.main(toy)
    path = Toy(toy).path
    about, before = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    about["runs"].pop(0)
    path.write_text(json.dumps(about))
    left_out = replace(toy, seeds=1, first_seed=1, missing_only=True)
    for again in (replace(toy, from_json=True), left_out):
        with pytest.raises(InputError, match="lists 1 runs of a, its summary is of 2: restore it"):
            Toy.main(again)
        assert path.with_suffix(".md").read_text() == before
    Toy.main(toy)
    assert path.with_suffix(".md").read_text() == before


@pytest.mark.parametrize("extra", ["--seed 3", "--name foo", "--game trades"])
def test_further_flags_that_no_cell_would_have_are_refused(extra, tmp_path):
    """Else the results would name a setting that was not used."""
    compare = module("compare")
    asked = {"methods": ("pgd-at", "fgsm-at"), "runs_dir": str(tmp_path), "out": str(tmp_path)}
    with pytest.raises(InputError, match=f"{extra.split()[0]} is set by the study itself, or no"):
        compare.main(compare.Config(extra=extra, finished_only=True, **asked))
    with pytest.raises(InputError, match="no finished cell"):
        compare.main(compare.Config(extra="--epochs 3", finished_only=True, **asked))


@pytest.fixture
def judged(tmp_path):
    """Two classifiers in folders of one name, and evaluations of them with these flags."""
    for part in "AB":
        shutil.copytree(HOME / "digits" / "pgd-at-small_cnn-seed0", tmp_path / part / "m-seed0")
    config = referee.Config(
        runs=tuple(str(tmp_path / part / "m-seed0") for part in "AB"),
        attacks=("fgsm",),
        n=20,
        finished_only=True,
        runs_dir=str(tmp_path / "runs"),
        out=str(tmp_path / "out"),
    )

    def evaluated(extra=""):
        for name, flags in referee.Referee(replace(config, extra=extra)).cells().items():
            asked = evaluate.job.check(evaluate.job.parse(flags))
            run = RunFolder.create(tmp_path / "runs" / name, kept(asked), "cpu")
            report = json.loads(Path(asked.what, "report.json").read_text())
            run.write_json("report.json", {**report, "what": asked.what})
        return config

    return evaluated


def test_classifiers_in_folders_of_one_name_have_a_row_each(judged):
    config = judged()
    referee.main(config)
    found = json.loads(Path(config.out, "referee.json").read_text())["reports"]
    assert [one["classifier"] for one in found] == [one["what"] for one in found]
    assert [one["classifier"] for one in found] == list(config.runs)
    with pytest.raises(InputError, match="name each once"):
        referee.main(replace(config, runs=config.runs[:1] * 2))
    names = list(referee.Referee(replace(config, runs=("a/x=1", "b/y"))).cells())
    assert names == ["referee-x=1", "referee-y"], "others keep their folders"


@pytest.mark.parametrize("extra", ["--eps 0.3", "--weights last", "--batch-size 7"])
def test_classifiers_that_were_judged_otherwise_are_not_taken_for_these(extra, judged):
    """Their folders do not say so by their names, whichever of the two was typed."""
    config = judged(extra)
    name = extra.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(InputError, match=f"was started with {name}="):
        referee.main(config)
    referee.main(replace(config, extra=extra))


def test_older_cells_are_of_the_cpu():
    assert hardware([{"device": "cuda (H100)"}, {}], 2).startswith("cpu, cuda (H100); 2")


RUNS = [
    {"method": m, "seed": s, "worst_case": w, "n": 9}
    for m, s, w in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 1, 0.6), ("b", 0, 0.2), ("c", 0, 0.1))
]


def test_differences_are_paired_by_seed():
    found = table.summarise(RUNS, "a")
    assert found["a"]["worst_case"]["mean"] == pytest.approx(0.6)
    assert "worst_minus_control" not in found["a"]
    assert found["b"]["worst_minus_control"]["mean"] == pytest.approx(-0.2)
    assert "n" not in found["b"]  # a count is not averaged
    assert "worst_minus_control" not in table.summarise(RUNS)["b"]


def test_a_column_tells_mean_and_spread_and_what_is_missing():
    """-0.3 and -0.1: their sd is 0.141, t of one degree of freedom 12.706 times 0.1."""
    columns = {
        "": table.row_name,
        "n": table.seeds,
        "share": table.Percent("worst_case"),
        "mean": table.Mean("worst_case", 2),
        "pair": table.Paired("worst_case", minus="a"),
        "odd": table.Number(lambda run: run["worst_case"] if run["seed"] else None),
        " n ": lambda row: str(row["n"]),
    }
    assert table.cells(columns, table.rows(RUNS)) == [
        ["", "n", "share", "mean", "pair", "odd", "n"],
        ["a", "2", "60.0 ± 14.1", "0.60", "–", "–", "9"],
        ["b", "2", "40.0 ± 28.3", "0.40", "-20.0 ± 127.1", "–", "9"],
        ["c", "1", "10.0", "0.10", "–", "–", "9"],
    ]


@pytest.mark.parametrize(
    ("name", "folder", "stem", "changes", "said"),
    [
        ("influence", "strategies", "influence", {"lr": 0.5}, "not '--lr 0.5'"),
        ("mixtures", "arena", "cifar10-mixtures", {"data_dir": "data", "n": 100}, "not '--n 100'"),
        ("arena", "arena", "digits", {"extra": "--epochs 20", "rounds": 2}, "--rounds 2"),
        (
            "gail",
            "gail",
            "cartpole_v1-paper/stability",
            {"iterations": 9},
            "iterations 1000, not 9",
        ),
    ],
)
def test_options_that_change_numbers_are_not_mixed_into_one_table(
    name, folder, stem, changes, said, tmp_path
):
    copy = tmp_path / f"{stem}.json"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "results" / folder / f"{stem}.json", copy)
    one = module(name)
    with pytest.raises(InputError, match=f"(made with other flags|is about).*{said}"):
        one.main.__self__(one.Config(out=str(tmp_path), **changes)).earlier()

"""Sweeps, landscapes and diversity: closed forms, equal bits, what they must show, scripts."""

import json
import sys
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import evaluate
import pytest
import sweeps
import torch
import tournament
import train_l2l
from conftest import BatchNormNet, Linear
from equal_runs import SMALL
from studies import black_box as study_black_box
from studies import referee
from torch.nn.functional import cross_entropy

from advgame.attacks import Attack, AttackResult, fgsm, pgd
from advgame.classifiers.saved import run_classifier
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import write_sweeps
from advgame.evaluation.attacks import Context, make_suite
from advgame.evaluation.pictures import examples_figure, landscapes_figure, sweeps_figure
from advgame.evaluation.sweep_report import STEPS, _drawn, _measured
from advgame.evaluation.sweeps import diversity, landscape, over_radius, over_steps, sweep
from advgame.run import folder as folder_of_runs
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.statistics import wilson
from advgame.threat import L2, Linf

pytestmark = pytest.mark.drawn


@pytest.fixture
def line():
    """Logits ±(sum of 4 pixels - 2): a boundary at 0.5, and images 0.024 to 0.204 from it."""
    model = Linear(torch.tensor([[-1.0] * 4, [1.0] * 4]), torch.tensor([2.0, -2.0]))
    distance = torch.linspace(0.024, 0.204, 10)
    x = (0.5 + distance).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return model, ImageSet.from_floats(x, torch.ones(10, dtype=torch.int64), 2)


class Darker(Attack):
    """Every pixel falls by ε."""

    def _attack(self, model, x, y, rng, check):
        return AttackResult(x - 0.1, None, None, 0, 0)


def test_accuracies_beside_the_perturbations_are_of_images_that_are_right_when_clean(line):
    model, data = line
    labels = data.labels.clone()
    labels[0] = 0  # wrong when clean, and right when it is darker
    data, ball = ImageSet(data.images, labels, 2), Linf(0.1)
    found = _measured(model, data, ball, {"pgd20": pgd(ball, 20), "darker": Darker()}, 0)
    distances = data.floats()[:, 0, 0, 0] - 0.5
    wanted = float((distances > 0.1).float().mean())
    assert found["perturbations"]["darker"]["accuracy"] == pytest.approx(wanted)


def test_accuracy_over_the_radius_is_the_closed_form(line):
    model, data = line
    found = sweep(model, data, over_radius(Linf(0.1), [0.5, 1, 1.5]), seed=0)
    distances = data.floats()[:, 0, 0, 0] - 0.5
    wanted = {eps: float((distances > eps).float().mean()) for eps in found}
    assert list(found) == pytest.approx([0.05, 0.1, 0.15])
    assert found == pytest.approx(wanted)
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)])
def test_both_sweeps_agree_where_they_meet_and_with_reports(threat):
    ten, twenty = over_steps(threat, [10, 20]).values()
    assert over_radius(threat, [1.0]) == {threat.eps: ten}
    assert twenty == make_suite("pgd20", Context(threat))[0][1]


def test_the_panels_are_labelled_in_the_unit_that_was_typed():
    numbers = {"a": {"radius": {4 / 255: 0.5, 8 / 255: 0.2}, "steps": {10.0: 0.2}}}
    (radius, shown), (steps, counts) = _drawn(numbers, "Linf ε = 8/255", 255).items()
    assert list(shown["a"][0]) == pytest.approx([4, 8])
    assert list(counts["a"][0]) == [10]
    assert "1/255" in radius
    assert all("ε/4" in label for label in (radius, steps))


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)])
def test_a_landscape_is_the_loss_on_its_plane(threat, line, rng):
    model, data = line
    x, y = data.floats(), data.labels
    plane = landscape(model, x, y, threat, rng, reach=1.0, points=5)
    with torch.no_grad():
        assert plane[2, 2] == cross_entropy(model(x), y)
        up = torch.full_like(x, -1) if threat.norm == "Linf" else torch.full_like(x, -0.5)
        for row, offset in enumerate((-1, -0.5, 0, 0.5, 1)):
            moved = (x + offset * threat.eps * up).clamp(0, 1)
            torch.testing.assert_close(plane[row, 2], cross_entropy(model(moved), y))
    assert (plane[:, 2].diff() > 0).all()
    with pytest.raises(InputError, match="odd"):
        landscape(model, x, y, threat, rng, points=4)


def test_diversity_by_hand(line, rng):
    model, data = line
    x, y = data.floats(), data.labels
    same = diversity(model, x, y, fgsm(Linf(0.1)), Linf(0.1), 3, rng)
    assert same == pytest.approx({"cosine": 1, "distance": 0, "wrong_classes": 0.4})

    class Opposite:
        def __init__(self):
            self.sign = 1

        def run(self, model, x, y, *, rng=None, check=True):
            self.sign = -self.sign
            return type("Made", (), {"x_adv": x + 0.1 * self.sign})

    turned = diversity(model, x, y, Opposite(), Linf(0.1), 2, rng)
    assert turned == pytest.approx({"cosine": -1, "distance": 1, "wrong_classes": 0.4})
    with pytest.raises(InputError, match="2 restarts"):
        diversity(model, x, y, fgsm(Linf(0.1)), Linf(0.1), 1, rng)


def test_equal_seeds_give_equal_bits_and_models_stay_as_they_were(digits):
    model = BatchNormNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    part, threat = digits.test.subset(slice(20)), Linf(0.1)

    def once():
        rng = torch.Generator().manual_seed(3)
        x, y = part.floats(), part.labels
        return (
            sweep(model, part, over_steps(threat, [2]), seed=5),
            landscape(model, x, y, threat, rng, points=3).tolist(),
            diversity(model, x, y, pgd(threat, 2), threat, 2, rng),
        )

    assert once() == once()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_points_of_a_sweep_draw_the_same_chance(line):
    drawn = []

    class Spy:
        def run(self, model, x, y, *, rng=None, check=True):
            drawn.append(torch.rand(3, generator=rng).tolist())
            return type("Made", (), {"x_adv": x})

    model, data = line
    sweep(model, data, {1.0: Spy(), 2.0: Spy()}, seed=0)
    assert drawn[0] == drawn[1]


def test_the_picture_shows_means_bands_and_differences_to_the_baseline():
    base = [{1.0: 0.8, 2.0: 0.4}, {1.0: 0.6, 2.0: 0.2}]
    drawn = sweeps_figure({"steps": {"a": base, "b": [{1.0: 0.9, 2.0: 0.5}]}}, "a", "t")
    above, below = drawn.axes
    assert [line.get_label() for line in above.lines] == ["a", "b"]
    for axis, wanted in ((above, [[70, 30], [90, 50]]), (below, [[0, 0], [20, 20]])):
        for line, heights in zip(axis.lines, wanted, strict=True):
            assert line.get_xdata().tolist() == [1, 2]
            assert line.get_ydata() == pytest.approx(heights)
    band = above.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((20, 80))
    assert len(sweeps_figure({"steps": {"a": base}}, None, "t").axes) == 1


def test_landscapes_and_examples_are_drawn_from_what_they_are_given():
    plane = torch.arange(9.0).view(3, 3)
    panel = landscapes_figure({"a": plane}, 2.0, "t").axes[0]
    assert panel.images[0].get_array().tolist() == plane.tolist()
    x = torch.full((2, 1, 2, 2), 0.5)
    moved = x + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1)
    said = {"clean": ["1→1", "2→2"], "fgsm": ["1→2", "2→3"]}
    drawn = examples_figure(x, {"fgsm": moved}, said, Linf(0.1), "t").axes
    shown = [axis.images[0].get_array() for axis in drawn]
    assert [axis.get_title() for axis in drawn] == ["1→1", "", "2→2", "", "1→2", "", "2→3", ""]
    assert shown[4].mean() == pytest.approx(0.6)
    assert (shown[5].mean(), shown[7].mean()) == pytest.approx(
        (1, 0), abs=1e-6
    )  # +ε white, -ε black


@pytest.mark.slow
def test_no_picture_of_an_earlier_sweep_stays(line, tmp_path):
    model, data = line
    for names in (("a",), ("a", "b"), ("b",)):
        write_sweeps(tmp_path, dict.fromkeys(names, model), data.subset(slice(8)), Linf(0.1))
        drawn = ["examples.png"] if len(names) == 1 else [f"examples-{name}.png" for name in names]
        assert sorted(path.name for path in tmp_path.glob("examples*")) == drawn


def test_pictures_lie_in_the_folder_whatever_classifiers_are_called(line, tmp_path):
    """zoo:digits/a made a folder of that name, whose pictures stayed when others were drawn."""
    model, data = line
    for names in (("zoo:digits/a-seed0", "../runs/a"), ("b",)):
        write_sweeps(tmp_path, dict.fromkeys(names, model), data.subset(slice(4)), Linf(0.1))
        drawn = [path.name for path in tmp_path.iterdir() if path.name.startswith("examples")]
        assert len(drawn) == len(names)
        assert all((tmp_path / name).is_file() for name in drawn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods, two seeds each."""
    root = tmp_path_factory.mktemp("cells")
    for attacker, seed in (("plain", 0), ("plain", 1), ("grad", 0), ("grad", 1)):
        settings = {**SMALL, "runs_dir": str(root), "attacker": attacker, "seed": seed}
        train_l2l.job.run(replace(train_l2l.Config(), **settings, name=f"{attacker}-seed{seed}"))
    return root


@pytest.mark.slow
def test_the_script_draws_seeds_as_one_line(folder, tmp_path):
    names = ("plain-seed0", "plain-seed1", "grad-seed0")
    config = sweeps.Config(
        tuple(str(folder / name) for name in names),
        attackers=(str(folder / "grad-seed1"),),
        n=20,
        out=str(tmp_path),
    )
    (tmp_path / "examples-of-somebody.png").touch()
    sweeps.main(config)
    assert (tmp_path / "examples-of-somebody.png").exists(), "there was no sweep here before"
    sweeps.main(config)
    pictures = {"sweeps.png", "landscape.png", "examples-plain.png", "examples-grad.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*pictures, "sweeps.json"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)
    found = json.loads((tmp_path / "sweeps.json").read_text())
    assert list(found["classifiers"]) == list(names)
    one = found["classifiers"]["grad-seed0"]
    assert list(one["perturbations"]) == ["fgsm", "pgd20", "learned:grad-seed1"]
    assert 0 < one["perturbations"]["fgsm"]["size"] <= 1
    assert len(one["steps"]) == len(STEPS)
    assert set(found["landscape"]) == {"plain", "grad"}


@pytest.mark.parametrize("script", [sweeps, tournament])
def test_two_commands_of_one_second_write_into_two_folders(script, tmp_path, monkeypatch):
    """The second begins while the first still measures, and neither has written a file."""
    monkeypatch.chdir(tmp_path)
    config = script.Config(("zoo:digits/pgd-at-small_cnn-seed0",), n=2)
    places = []

    def measure(out, *_, **__):
        places.append(out)
        if len(places) == 1:
            with pytest.raises(ZeroDivisionError):
                script.main(config)
        raise ZeroDivisionError

    monkeypatch.setattr(sweeps, "write_sweeps", measure)
    monkeypatch.setattr(tournament, "hold_tournament", measure)
    monkeypatch.setattr(
        folder_of_runs, "datetime", SimpleNamespace(now=lambda: datetime(2026, 12, 1))
    )
    with pytest.raises(ZeroDivisionError):
        script.main(config)
    assert len(set(places)) == 2
    assert not list((tmp_path / "runs").iterdir()), "nothing came of them"


@pytest.mark.parametrize("name", ["taken", "taken/below"])
def test_a_file_is_no_folder_of_results(name, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setattr(sweeps, "write_sweeps", lambda *_, **__: pytest.fail("it measured"))
    config = sweeps.Config(("zoo:digits/pgd-at-small_cnn-seed0",), n=2, out=str(tmp_path / name))
    with pytest.raises(InputError, match="taken is no folder"):
        sweeps.main(config)


@pytest.mark.parametrize("option", ["model", "normalise"])
def test_what_no_classifier_makes_use_of_is_refused(option):
    """It was left out of account, and nothing said so."""
    what = ("zoo:digits/pgd-at-small_cnn-seed0", "zoo:digits/stopper-small_cnn-seed0")
    typed = {"model": "lean_resnet", "normalise": "0.5/0.2"}
    with pytest.raises(InputError, match=f"no use of --{option}"):
        sweeps.settled(sweeps.Config(what, **{option: typed[option]}))
    assert len(sweeps.settled(sweeps.Config(what))) == 2


@pytest.mark.slow
def test_black_box_pairs_are_of_different_seeds(folder, tmp_path, digits):
    cells = [str(path) for path in sorted(folder.iterdir())]
    config = study_black_box.Config(
        what=tuple(cells), title="tiny", n=20, runs_dir=str(tmp_path / "runs"), out=str(tmp_path)
    )
    study_black_box.main(config)
    found = json.loads((tmp_path / "black_box_tiny.json").read_text())
    made = {(row["target"], row["surrogate"]) for row in found["pairs"]}
    assert made == {
        *(("plain-seed0", "plain-seed1"), ("plain-seed1", "plain-seed0")),
        *(("grad-seed0", "plain-seed1"), ("grad-seed1", "plain-seed0")),
    }
    for row in found["pairs"]:
        assert 0 <= row["l2l:transfer-pgd10"] <= row["clean"] <= 1
    table = (tmp_path / "black_box_tiny.md").read_text()
    assert "| plain | 2 |" in table
    assert "(40.03)" in table
    x, y = digits.test.first(20).floats(), digits.test.first(20).labels
    own, other = (
        run_classifier(RunFolder.open(folder / f"plain-seed{k}"), (1, 8, 8), 10) for k in (0, 1)
    )
    moved = fgsm(Linf(0.15)).perturb(other, x, y)  # of the surrogate, by hand
    right = (own(x).argmax(1) == y) & (own(moved).argmax(1) == y)
    row = next(r for r in found["pairs"] if r["target"] == "plain-seed0")
    assert row["l2l:transfer-fgsm"] == pytest.approx(float(right.float().mean()))


def test_black_box_folders_of_one_name_are_refused(tmp_path, monkeypatch):
    """Results tell classifiers by their folders' names: one of two would be lost."""
    task = ("small_cnn", "digits", 0.15)
    monkeypatch.setattr(study_black_box, "about_run", lambda path: (task, len(path)))
    what, others = (f"{tmp_path}/a/plain-seed0", f"{tmp_path}/bb/plain-seed0"), ("c/plain-seed1",)
    config = study_black_box.Config(what=what, surrogates=others, title="t", out=str(tmp_path))
    with pytest.raises(InputError, match="two folders are called plain-seed0"):
        study_black_box.main(config)


def test_seeds_of_an_attack_are_no_further_black_box_pairs():
    same = {"clean": 1.0, "l2l:transfer-pgd10": 0.5, "n": 9}
    runs = [
        {**same, "target": t, "surrogate": "pgd-seed9", "seed": k, "l2l:transfer-fgsm": value}
        for t, values in {"pgd-seed0": (0.5, 0.7), "pgd-seed1": (0.6, 0.6)}.items()
        for k, value in enumerate(values)
    ]
    study = study_black_box.BlackBox(study_black_box.Config(what=("pgd-seed0",)))
    _, words, table = study.document(runs, {"dataset": "digits", "eps": 0.1})
    assert "| pgd | 2 | 60.0 ± 0.0 (" in table, "the pairs' means are equal"
    assert "different seeds, each a mean over 2 seeds of the attacks. In" in words
    _, words, table = study.document(runs[::2], {"dataset": "digits", "eps": 0.1})
    assert "| pgd | 2 | 55.0 ± 7.1 (" in table
    assert "different seeds. In" in words


@pytest.mark.slow
def test_a_referee_judges_each_classifier_once_and_in_one_way(folder, tmp_path, monkeypatch):
    judged = []

    def here(cells, engine, jobs, begun):
        """The evaluations in this process."""
        for cell in cells:
            if not cell.finished:
                judged.append(cell.folder.name)
                asked = evaluate.job.parse(cell.flags)
                root = str(cell.folder.parent)
                evaluate.job.run(replace(asked, name=cell.folder.name, runs_dir=root))

    monkeypatch.setattr("advgame.run.study.run_cells", here)
    monkeypatch.setattr("advgame.evaluation.judge.find_flags", lambda *_: [])
    config = referee.Config(
        runs=tuple(str(folder / f"{name}-seed0") for name in ("plain", "grad")),
        title="t", n=20, attacks=("fgsm",), runs_dir=str(tmp_path / "runs"), out=str(tmp_path),
    )  # fmt: skip
    referee.main(config)
    report = json.loads((tmp_path / "runs" / "t-grad-seed0" / "report.json").read_text())
    made = json.loads((tmp_path / "t.json").read_text())["reports"]
    assert [one["classifier"] for one in made] == ["plain-seed0", "grad-seed0"]
    assert made[1]["accuracy"] == report["accuracy"]
    low, high = wilson(report["worst_case"], 20)
    shown = f"{100 * report['worst_case']:.1f} ({100 * low:.1f} – {100 * high:.1f}) | none |"
    assert shown in (tmp_path / "t.md").read_text()
    later = replace(config, runs=config.runs[:1], seeds=2)
    referee.main(later)
    assert judged == ["t-plain-seed0", "t-grad-seed0", "t-plain-seed0-judged1"]
    rows = (tmp_path / "t.md").read_text().splitlines()[4:]
    assert [row.count("±") for row in rows[2:4]] == [3, 0], "of two evaluations, and of an earlier"
    with pytest.raises(InputError, match="other flags"):
        referee.main(replace(config, n=10))
    with pytest.raises(InputError, match="n=20"):
        referee.main(replace(config, n=10, out=str(tmp_path / "else")))
    with pytest.raises(InputError, match="name the run folders"):
        referee.main(referee.Config(out=str(tmp_path / "else")))


@pytest.mark.parametrize(
    ("script", "words", "answer"),
    [
        (sweeps, ["/nowhere"], "/nowhere"),
        (sweeps, ["{0}/checkpoints/best.safetensors"], "is a file of weights, which needs --model"),
        (sweeps, ["{0}", "{0}"], "two classifiers"),
        (sweeps, ["{0}", "--eps", "0"], "eps must be above 0"),
        (sweeps, ["{0}", "--n", "0"], "n must be 1 or above"),
        (study_black_box, ["{0}"], "no pair of a target"),
        (study_black_box, ["/nowhere"], "not a run folder"),
    ],
)
def test_wrong_words_get_one_line(script, words, answer, folder, monkeypatch, capsys):
    words = [word.format(folder / "plain-seed0") for word in words]
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: script.main(script.tyro.cli(script.Config)))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert answer in said
    assert said.count("\n") == 1

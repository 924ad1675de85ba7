"""Somebody's own network by `--model`, weights to start from by `--init`, runs made from Python."""

import json
import signal

import evaluate
import pytest
import sweeps
import torch
import train
import train_attacker
import train_cat_and_mouse
from equal_runs import assert_equal_runs, weights
from judging.subjects import Config, classifier

from advgame import Linf, load_data
from advgame.classifiers import Normalise, SmallCNN, make_classifier
from advgame.classifiers.foreign import built_as
from advgame.defender import Defender
from advgame.evaluation import sweep_report, validator
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.training import DefenderTraining
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.run.loop import Trainer
from advgame.run.plan import TrainingPlan
from advgame.seeding import seeded_init
from advgame.targets import from_run

TINY = [
    *("--game", "standard", "--train-n", "200", "--epochs", "2", "--batch-size", "32"),
    *("--eval-n", "30", "--attacks", "fgsm", "--lr", "0.05"),
]
DIGITS = ["--dataset", "digits", "--eps", "0.1"]
QUICK = ["--attacks", "fgsm", "--n", "30"]
MINE = """
import pathlib

import torch
from torch import nn

pathlib.Path("it ran").touch()


class Net(nn.Sequential):
    def __init__(self, width=8, *, classes=10):
        super().__init__(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes)
        )


def sloped(width, slope=0.0):
    net = Net(width)
    net[2] = nn.LeakyReLU(slope)
    return net


def softmax():
    return nn.Sequential(Net(), nn.Softmax(1))


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def broken():
    return undefined_name


def net_class():
    return Net


def pairs():
    class Pairs(Net):
        def forward(self, x):
            return super().forward(x), x

    return Pairs()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a stranger's network, weights of it from their own loop, a run with it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_net.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(train, ["--model", "my_net:Net(12)", *TINY, "--name", "mine"], patch)
        from my_net import Net

        net = torch.nn.DataParallel(Net(12))
        torch.save({"net": net.state_dict(), "epoch": 3}, folder / "mine.pth")
        torch.save(Net(12, classes=100).state_dict(), folder / "hundred.pth")
    return folder


@pytest.fixture
def here(root, monkeypatch):
    monkeypatch.chdir(root)
    return root


def run(script, words, patch):
    patch.setattr("sys.argv", ["script.py", *words])
    if script is sweeps:
        run_script(lambda: sweeps.main(sweeps.tyro.cli(sweeps.Config)))
    else:
        run_script(script.job.from_command_line)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_an_own_network_trains_resumes_and_is_judged_where_it_is_typed(here, monkeypatch, capsys):
    whole = here / "runs" / "mine"
    assert config(whole)["config"]["model"] == "my_net:Net(12)"
    assert weights(whole)["best/1.weight"].shape == (12, 64)
    step, steps = AdversarialTraining.step, []

    def stopped(self, *args, **settings):
        steps.append(1)
        if len(steps) == 8:  # within the second epoch
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "step", stopped)
        with pytest.raises(SystemExit):
            run(train, ["--model", "my_net:Net(12)", *TINY, "--name", "stopped"], patch)
    assert "go on with --resume runs/stopped --model 'my_net:Net(12)'\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(train, ["--resume", "runs/stopped", "--model", "my_net:Net(width=12)"], monkeypatch)
    assert "type --model 'my_net:Net(12)', or start" in capsys.readouterr().err
    (here / "it ran").unlink(missing_ok=True)
    for script, words in (
        (train, ["--resume", "runs/stopped"]),
        (evaluate, ["runs/mine", *QUICK]),
        (sweeps, ["runs/mine", "--n", "20"]),
        (train_attacker, ["--classifier", "runs/mine"]),
        (evaluate, ["runs/mine", *QUICK, "--model", "resnet18", "--normalise", "cifar10"]),
    ):
        with pytest.raises(SystemExit) as stop:
            run(script, words, monkeypatch)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        if "resnet18" not in words:
            assert "--model 'my_net:Net(12)'" in said
            assert "nothing that a folder names is run unasked" in said
    assert not (here / "it ran").exists()
    run(train, ["--resume", "runs/stopped", "--model", "my_net:Net(12)"], monkeypatch)
    assert_equal_runs(whole, here / "runs" / "stopped")
    words = ["runs/mine", "--model", "my_net:Net(width=12)", *QUICK, "--name", "judged"]
    run(evaluate, words, monkeypatch)
    report = json.loads((here / "runs" / "judged" / "report.json").read_text())
    assert report["threat"]["eps"] == 0.15
    trained = json.loads((whole / "report.json").read_text())
    assert report["accuracy"]["clean"] == trained["accuracy"]["clean"]
    run(evaluate, ["--resume", "runs/judged", *words[1:3]], monkeypatch)
    model = from_run(whole, "my_net:Net(12)").model
    assert torch.equal(model[1].weight, weights(whole)["best/1.weight"])


def test_weights_in_a_network_of_other_arguments_are_told(here, monkeypatch, capsys):
    """They fit, and the numbers are of another classifier than the run's."""
    words = "built as my_net:sloped(12, slope=-3.0), where the run notes my_net:Net(12)"
    for model, told in (("my_net:Net( 12 )", False), ("my_net:sloped(12, slope=-3.0)", True)):
        name = f"slope-{told}"
        run(evaluate, ["runs/mine", "--model", model, *QUICK, "--name", name], monkeypatch)
        said = capsys.readouterr().err
        assert (f"note: runs/mine: its weights are in a network {words}" in said) == told
        folder = here / "runs" / name
        report = json.loads((folder / "report.json").read_text())
        assert report["weights"].endswith(words) == told
        assert (words in (folder / "report.md").read_text()) == told


@pytest.mark.slow
def test_own_weights_of_an_own_loop_are_judged_swept_and_started_from(here, monkeypatch, capsys):
    own = ["--model", "my_net:Net(12)"]
    monkeypatch.setattr(sweep_report, "STEPS", (1,))
    monkeypatch.setattr(sweep_report, "SHARES", (1.0,))
    run(evaluate, ["mine.pth", *own, *DIGITS, *QUICK, "--name", "file"], monkeypatch)
    run(sweeps, ["mine.pth", *own, *DIGITS, "--n", "10", "--out", "swept"], monkeypatch)
    assert (here / "swept" / "sweeps.png").exists()
    assert list(json.loads((here / "swept" / "sweeps.json").read_text())["classifiers"]) == ["mine"]
    begin = [*own, "--init", "mine.pth", *TINY, "--lr", "1e-9"]
    run(train, [*begin, "--name", "begun"], monkeypatch)
    held = torch.load("mine.pth", weights_only=True)["net"]["module.1.weight"]
    torch.testing.assert_close(weights(here / "runs" / "begun")["last/1.weight"], held)
    run(train, [*own, "--init", "runs/begun", *TINY, "--name", "further"], monkeypatch)
    assert config(here / "runs" / "further")["config"]["init"] == "runs/begun"


@pytest.mark.slow
def test_a_resumed_run_needs_the_weights_that_it_began_with_until_it_has_its_own(
    here, monkeypatch, capsys
):
    with seeded_init(3):
        net = make_classifier("small_cnn", (1, 8, 8), 10)
    torch.save(net.state_dict(), "w.pth")
    begin = ["--init", "w.pth", *TINY]
    run(train, [*begin, "--name", "whole"], monkeypatch)
    step = AdversarialTraining.step

    def stop_at(number):
        steps = []

        def stopped(self, *args, **settings):
            steps.append(1)
            if len(steps) == number:
                raise KeyboardInterrupt
            return step(self, *args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(AdversarialTraining, "step", stopped)
            with pytest.raises(SystemExit):
                run(train, [*begin, "--name", f"at{number}"], patch)

    stop_at(2)
    stop_at(9)
    (here / "w.pth").rename("moved.pth")
    run(train, ["--resume", "runs/at9"], monkeypatch)  # it has a checkpoint
    assert_equal_runs(here / "runs" / "whole", here / "runs" / "at9")
    torch.save(make_classifier("small_cnn", (1, 8, 8), 10).state_dict(), "w.pth")
    with pytest.raises(SystemExit):
        run(train, ["--resume", "runs/at2"], monkeypatch)
    assert "w.pth holds other weights than" in capsys.readouterr().err
    run(train, ["--resume", "runs/at2", "--init", "moved.pth"], monkeypatch)
    assert (here / "runs" / "at2" / "report.json").exists()
    whole, again = weights(here / "runs" / "whole"), weights(here / "runs" / "at2")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_weights_to_start_from_bring_their_own_normalisation(tmp_path, monkeypatch):
    x = torch.rand(2, 3, 32, 32)
    data = load_data("digits")
    for number, layer in enumerate((None, Normalise((0.5,) * 3, (0.2,) * 3))):
        net = make_classifier("wrn-10-1", (3, 32, 32), 10, layer).eval()
        torch.save(net.state_dict(), tmp_path / "w.pth")
        settings = train.Config(model="wrn-10-1", init=str(tmp_path / "w.pth"), dataset="cifar10")
        colour = data.train.first(20)
        object.__setattr__(colour, "images", torch.zeros(20, 3, 32, 32, dtype=torch.uint8))
        begun = train.job.classifier(settings, colour, train.job.fabric(settings)).eval()
        with torch.no_grad():
            torch.testing.assert_close(begun(x), net(x))
        assert ("normalise.mean" in begun.state_dict()) == bool(number)


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (train, ["--model", "my_net:Nett"], "has no attribute 'Nett'"),
        (train, ["--model", "my_nett:Net"], "ModuleNotFoundError: No module named 'my_nett'"),
        (train, ["--model", "my_net.Net"], "expected package.module:factory"),
        (train, ["--model", "my_net.py:Net"], "without .py"),
        (train, ["--model", "my_net:Net(wide=3)"], "unexpected keyword argument 'wide'"),
        (train, ["--model", "my_net:Net(x)"], "only numbers"),
        (train, ["--model", "my_net:broken"], "NameError: name 'undefined_name' is not defined, "),
        (train, ["--model", "my_net:net_class"], "must return a torch.nn.Module, not the class"),
        (train, ["--model", "my_net"], "as my_net:Net"),
        (train, ["--model", "my_net:softmax"], "remove the final softmax"),
        (train, ["--model", "my_net:pairs"], "not a tuple"),
        (train, ["--model", "my_net:convolutions"], "images of this shape, (1, 8, 8)"),
        (train, ["--model", "my_net:Net(classes=3)"], "has 3 outputs, so that labels"),
        (
            train,
            ["--model", "my_net:Net(classes=12)"],
            "12 outputs, and the images have 10 classes",
        ),
        (
            evaluate,
            ["hundred.pth", "--model", "my_net:Net(12, classes=100)", *DIGITS],
            "100 outputs, and the images have 10 classes",
        ),
        (train_cat_and_mouse, ["--model", "my_net:softmax"], "remove the final softmax"),
        (
            train,
            ["--model", "my_net:Net", "--dataset", "cifar10", "--no-normalise"],
            "which normalises its own input, makes no use of --normalise",
        ),
        (train, ["--init", "nowhere.pth"], "no such file of weights or run folder"),
        (train, ["--init", "."], "not a run folder"),
        (train, ["--init", "my_net.py"], "is not a safetensors file"),
        (train, ["--init", "mine.pth"], "0 of its 4 keys fit small_cnn"),
        (train, ["--init", "hundred.pth", "--model", "my_net:Net(12)"], "for 100 classes"),
        (train_cat_and_mouse, ["--init", "mine.pth", "--restart-weights"], "leave --init away"),
        (evaluate, ["mine.pth", *DIGITS], "needs --model"),
        (evaluate, ["mine.pth", "--model", "my_net:Net(13)", *DIGITS], "1.weight is (12, 64)"),
        (evaluate, ["my_net.py", "--model", "my_net:Net", *DIGITS], "not a safetensors file"),
        (evaluate, [".", "--model", "my_net:Net", *DIGITS], "not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_newcomer_types_wrong_is_told_in_one_line(
    script, words, says, here, monkeypatch, capsys
):
    there = sorted(here.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(script, [*words, "--runs-dir", "none"], monkeypatch)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert {*here.iterdir()} - {*there} <= {here / "it ran", here / "__pycache__"}


def played(module, path, settings):
    """A run made from Python."""
    data = load_data("digits")
    game = DefenderTraining(
        AdversarialTraining(Linf(0.1)), Defender(module, lr=0.05), data.train.first(200), 50, 0
    )
    run = RunFolder.create(path, settings, "cpu")
    few = validator(data.validation.first(20), Linf(0.1), seed=0)
    Trainer(game, run, TrainingPlan(epochs=2), few).fit(resume=False)
    return run


def test_a_run_made_from_python_is_a_run(here, monkeypatch, capsys):
    """`evaluate.py` judges it, or says what to type."""
    with seeded_init(0):
        played(make_classifier("small_cnn", (1, 8, 8), 10), here / "built_in", {"eps": 0.1})
        played(SmallCNN((1, 8, 8), 10, width=8), here / "class", {"eps": "0.1"})
        played(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), here / "torch", {})
    assert config(here / "built_in")["network"] == "small_cnn"
    for words, says in (
        (["built_in", *QUICK], "--dataset"),
        (["class", *QUICK, *DIGITS], "--model advgame.classifiers.small:SmallCNN, with its arg"),
        (["torch", *QUICK, *DIGITS], "torch.nn.Sequential: type --model package.module:factory"),
    ):
        with pytest.raises(SystemExit):
            run(evaluate, words, monkeypatch)
        assert says in capsys.readouterr().err
    own = "advgame.classifiers:SmallCNN((1, 8, 8), 10, width=8)"
    for words in (["built_in", "--dataset", "digits"], ["class", *DIGITS, "--model", own]):
        run(evaluate, [*words, *QUICK, "--name", f"{words[0]}-judged"], monkeypatch)
        report = json.loads((here / "runs" / f"{words[0]}-judged" / "report.json").read_text())
        assert report["n"] == 30


def test_how_a_network_was_built_is_told():
    assert built_as(make_classifier("small_cnn", (1, 8, 8), 10)) == "small_cnn"
    assert built_as(SmallCNN((1, 8, 8), 10)) == "advgame.classifiers.small:SmallCNN"
    assert built_as(torch.nn.Flatten()) == "torch.nn.Flatten"


def test_weights_of_normalised_images(tmp_path, rng):
    net = make_classifier("wrn-10-1", (3, 32, 32), 10).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    asked = Config(str(tmp_path / "w.pth"), model="wrn-10-1", normalise="0.5,0.4,0.3/0.2,0.25,0.3")
    data = load_data("digits").test.first(8)
    object.__setattr__(data, "images", torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    x = torch.rand(2, 3, 32, 32, generator=rng)
    with torch.no_grad():
        want = net(Normalise((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))(x))
        torch.testing.assert_close(classifier(asked, data, asked.what)(x), want)

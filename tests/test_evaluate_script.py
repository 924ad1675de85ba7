"""scripts/evaluate.py as a stranger runs it: runs, weights, own code, wrong words, kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import evaluate as script
import pytest
import torch
from conftest import ROOT

from advgame.attacks.gradient_steps import Menu
from advgame.classifiers import make_classifier
from advgame.data import load_data
from advgame.run.checkpoint import save_weights
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.seeding import seeded_init
from agents.attacker import Attacker
from agents.l2l import L2LNetwork
from agents.policies import FeaturePolicy

DIGITS = ("--dataset", "digits", "--eps", "0.1")
SCRIPT = [sys.executable, str(ROOT / "scripts" / "evaluate.py")]
MINE = """
import torch
from advgame.data import ImageSet

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))

def softmax():
    return torch.nn.Sequential(linear(), torch.nn.Softmax(1))

def number():
    return 3

def headless():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.Flatten())

def broken():
    raise ZeroDivisionError("mine")

def images():
    torch.manual_seed(1)
    x = torch.rand(30, 3, 2, 2)
    return ImageSet.from_floats(x, linear()(x).argmax(1), 5)
"""


@pytest.fixture(scope="module")
def root(digits, tmp_path_factory):
    """A classifier as a weights file and as a run folder, and a stranger's own code."""
    folder = tmp_path_factory.mktemp("classifiers")
    with seeded_init(0):
        model = make_classifier("small_cnn", (1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = digits.train.floats(), digits.train.labels
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    save_weights(model, folder / "weights.safetensors")
    about = {"dataset": "digits", "model": "small_cnn", "eps": "0.1", "epochs": 1}
    run = RunFolder.create(folder / "run", about, "cpu")
    save_weights(model, run.path / "checkpoints" / "best.safetensors")
    RunFolder.create(folder / "unfinished", about, "cpu")
    L2LNetwork((1, 28, 28), gradients=1).save(folder / "large.safetensors")
    (folder / "my_code.py").write_text(MINE)
    (folder / "text.safetensors").write_text("not weights")
    return folder


def answer(words, root, monkeypatch):
    """Run the script in the folder ``root`` as its own process would."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    run_script(script.job.from_command_line)


FILE = ["weights.safetensors", *DIGITS]
QUICK = ["--attacks", "clean,fgsm,pgd20", "--n", "50"]


@pytest.mark.drawn
def test_a_run_a_file_and_own_code_are_evaluated(root, monkeypatch, capsys):
    answer(["run", *QUICK, "--name", "a"], root, monkeypatch)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "runs/a: 50 images, Linf ε = 0.1", (
        "what --resume takes stands there from the beginning"
    )
    assert "pgd20 on images 0 to 49" in told, "a line each where stderr is no terminal"
    report = json.loads((root / "runs" / "a" / "report.json").read_text())
    assert report["threat"] == {"norm": "Linf", "eps": 0.1}, "the run knows its own ε"
    assert report["weights"] == "best PGD-10 accuracy on the validation split, of an unfinished run"
    assert report["n"] == 50
    assert list(report["accuracy"]) == ["clean", "fgsm", "pgd20"]
    assert report["worst_case"] <= min(report["accuracy"].values())
    rows = (root / "runs" / "a" / "verdicts.csv").read_text().splitlines()
    assert rows[0] == "image,label,clean,fgsm,pgd20"
    labels = load_data("digits").test.first(50).labels.tolist()
    assert [int(row.split(",")[1]) for row in rows[1:]] == labels
    survive = sum(row.endswith(",1,1,1") for row in rows[1:]) / 50
    assert survive == pytest.approx(report["worst_case"])
    assert (root / "runs" / "a" / "accuracy.png").stat().st_size > 5000
    file = ["weights.safetensors", "--model", "small_cnn", *DIGITS]
    answer([*file, "--attacks", "fgsm", "pgd20", "--n", "50", "--name", "b"], root, monkeypatch)
    again = json.loads((root / "runs" / "b" / "report.json").read_text())
    assert again["accuracy"] == report["accuracy"]
    own = ["--model", "my_code:linear", "--dataset", "my_code:images", "--eps", "20/255"]
    answer([*own, "--norm", "L2", *QUICK, "--name", "c"], root, monkeypatch)
    mine = json.loads((root / "runs" / "c" / "report.json").read_text())
    assert (mine["accuracy"]["clean"], mine["n"]) == (1.0, 30)
    assert mine["threat"]["norm"] == "L2"
    capsys.readouterr()
    answer(["--resume", "runs/c"], root, monkeypatch)
    assert "finished before" in capsys.readouterr().out
    (root / "runs" / "c" / "report.json").unlink()
    for words in ([], own[:2], own[2:4]):  # a folder's code is run where it is typed, only there
        with pytest.raises(SystemExit):
            answer(["--resume", "runs/c", *words], root, monkeypatch)
        assert " again (nothing that a folder names is run" in capsys.readouterr().err
    answer(["--resume", "runs/c", *own[:4]], root, monkeypatch)
    assert json.loads((root / "runs" / "c" / "report.json").read_text())["n"] == 30
    for words in (
        ["run", "--resume", "runs/c"],
        ["--resume", "runs/a", "--model", "my_code:linear"],
    ):
        with pytest.raises(SystemExit):
            answer(words, root, monkeypatch)
        assert "was started with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to evaluate"),
        (["run", "--model", "my_code:linear"], "knows its own network, small_cnn: leave --model"),
        (["--import", "my_code:linear", *DIGITS], "--model takes package.module:factory"),
        (["--model", "small_cnn", *DIGITS], "small_cnn has no weights of its own"),
        (["--attacks", "fgsm", "run"], "comes first"),
        (["nowhere"], "nowhere does not exist"),
        (["unfinished"], "is it finished"),
        (["weights.safetensors"], "--model"),
        (["weights.safetensors", "--model", "small_cnn", "--dataset", "digits"], "--eps"),
        (["weights.safetensors", "--model", "small_cnn", "--eps", "0.1"], "whose test images"),
        (["--model", "my_code:linear", "--eps", "0.1"], "whose test images"),
        (["run", "--data-import", "my_code:images"], "--dataset takes package.module:function"),
        (["run", "--normalise", "cifar10"], "normalisation, makes no use of --normalise"),
        ([*FILE, "--model", "small_cnn", "--normalise", "grey"], "--normalise takes cifar10"),
        ([*FILE, "--model", "small_cnn", "--normalise", "cifar10"], "3 means, and the images 1"),
        (["run", "--surrogate", "weights.safetensors", "--attacks", "transfer"], "needs --model"),
        (["run", "--queries", "5"], "without --attackers makes no use of --queries"),
        (["run", "--surrogate", "run"], "without a transfer attack makes no use of --surrogate"),
        (["--model", "my_code:linear", *DIGITS, "--weights", "last"], "no use of --weights"),
        (["run", "--dataset", "my_code:images", "--data-dir", "."], "leave --data-dir,"),
        (["run", "--attacks", "PGD20"], "did you mean pgd20?"),
        (["weights.safetensors", "--model", "resnet18", *DIGITS], "this network's weights"),
        (["text.safetensors", "--model", "small_cnn", *DIGITS], "not a safetensors file"),
        (["run", "--attacks", "fgsm,pgd21"], "unknown attack 'pgd21': did you mean"),
        (["run", "--attacks", "fgsm,fgsm"], "asked for twice"),
        (["run", "--attacks", "transfer"], "--surrogate"),
        (["run", "--attacks", "transfer", "--surrogate", "unfinished"], "is it finished"),
        (["run", "--attackers", "weights.safetensors"], "is no attacker"),
        (["run", "--attackers", "large.safetensors"], "for images of (1, 28, 28)"),
        (["run", "--attackers", "nowhere"], "no attacker file"),
        (["run", "--queries", "0"], "queries must be 1"),
        (["run", "--eps", "8"], "did you mean 8/255"),
        (["run", "--norm", "L2"], "how far an attack may go in L2"),
        (["run", "--norm", "L2", "--eps", "1", "--attacks", "fgsm,cw-adam"], "Linf norm only"),
        (["run", "--norm", "L2", "--eps", "1", "--attacks", "adt:exp-worst-of-10"], "L∞"),
        (["run", "--engine", "ray"], "in one process (no --jobs) makes no use of --engine"),
        (["run", "--jobs", "2", "--engine", "rey"], "did you mean ray"),
        (["run", "--jobs", "-1"], "jobs must be 0 or above"),
        (["run", "--n", "0"], "n must be 1"),
        (["run", "--batch-size", "0"], "batch_size must be 1"),
        (["run", "--dataset", "cifar10"], "--data-dir"),
        (["--model", "my_code", *DIGITS], "as my_code:Factory"),
        (["--model", "my_code:nothing", *DIGITS], "AttributeError"),
        (["--model", "no_such_code:f", *DIGITS], "ModuleNotFoundError"),
        (["--model", "my_code:broken", *DIGITS], "ZeroDivisionError: mine, "),
        (["--model", "my_code:broken", *DIGITS], "my_code.py:"),
        (["--model", "my_code:number", *DIGITS], "must return a torch.nn.Module"),
        (["--model", "my_code:linear", *DIGITS], "images of this shape"),
        (["run", "--dataset", "my_code:number"], "ImageSet"),
        (
            [
                *("--model", "my_code:headless", "--dataset", "my_code:images"),
                *("--eps", "0.1", "--attacks", "fgsm,fea"),
            ],
            "linear layer",
        ),
        (["--resume", "run"], "another script or version"),
        # 1.8 billion weights: refused by their shapes, before any is made
        ([*FILE, "--model", "wrn-40-40"], "does not hold this network's weights"),
    ],
)
def test_wrong_words_get_one_clear_error_before_any_work(words, said, root, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        answer(["--runs-dir", "none", *words], root, monkeypatch)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (root / "none").exists()


def test_a_learned_attacker_is_an_attack_like_any_other(root, monkeypatch):
    menu = Menu()
    with seeded_init(0):
        policy = FeaturePolicy(len(menu.feature_names), menu.sizes)
    Attacker(policy, menu, "clean", {}).save(root / "mine.safetensors")
    words = ["run", "--attackers", "mine.safetensors", "--queries", "6", "--attacks", "fgsm"]
    answer([*words, "--n", "40", "--name", "learned"], root, monkeypatch)
    report = json.loads((root / "runs" / "learned" / "report.json").read_text())
    assert list(report["accuracy"]) == ["clean", "fgsm", "learned:mine"]
    assert report["flags"] == []
    standing = round(40 * report["accuracy"]["clean"])
    # six queries per image at most, then the verdict's own
    assert report["calls"]["learned:mine"]["forwards"] <= 7 * standing
    settings = json.loads((root / "runs" / "learned" / "evaluation" / "settings.json").read_text())
    weights = settings["extra"]["learned:mine"]
    assert "FeaturePolicy" in weights, "the attacker's weights are part of what was measured"


def test_softmax_outputs_are_refused(root, monkeypatch, capsys):
    words = ["--model", "my_code:softmax", "--dataset", "my_code:images", "--eps", "0.1"]
    with pytest.raises(SystemExit):
        answer([*words, "--runs-dir", "none"], root, monkeypatch)
    assert "remove the final softmax" in capsys.readouterr().err


def test_the_same_command_twice_is_one_evaluation(root, monkeypatch, capsys):
    shutil.copytree(root / "run", root / "changing")
    words = ["changing", "--attacks", "fgsm", "--n", "40", "--name", "twice"]
    words += ["--attackers", "twice.safetensors", "--queries", "2"]
    L2LNetwork((1, 8, 8), gradients=1).save(root / "twice.safetensors")
    answer(words, root, monkeypatch)
    report = (root / "runs" / "twice" / "report.json").read_bytes()
    capsys.readouterr()
    answer(words, root, monkeypatch)
    assert "; more in runs/twice/report.md; finished before" in capsys.readouterr().out
    assert (root / "runs" / "twice" / "report.json").read_bytes() == report
    for more in (["--seed", "1"], ["--batch-size", "20"]):
        with pytest.raises(SystemExit):
            answer([*words, *more], root, monkeypatch)
        assert "runs/twice exists and is never overwritten" in capsys.readouterr().err
    # what is there now was not judged
    with seeded_init(1):
        other = make_classifier("small_cnn", (1, 8, 8), 10)
        L2LNetwork((1, 8, 8), gradients=1).save(root / "twice.safetensors")
    for changed in ("learned attackers", "weights and learned attackers"):
        with pytest.raises(SystemExit):
            answer(words, root, monkeypatch)
        assert f"has judged other {changed} than are there now" in capsys.readouterr().err
        save_weights(other, root / "changing" / "checkpoints" / "best.safetensors")
    (root / "runs" / "twice" / "evaluation" / "settings.json").unlink()  # nothing tells it any more
    answer(words, root, monkeypatch)
    assert "finished before" in capsys.readouterr().out
    assert (root / "runs" / "twice" / "report.json").read_bytes() == report


SHIFTED = """
from pathlib import Path
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.last = torch.nn.Flatten(), torch.nn.Linear(64, 10)
        self.shift = float(Path("shift.txt").read_text())
    def forward(self, x):
        return self.last(self.flat(x)) + self.shift * x.mean((1, 2, 3))[:, None] ** 2
"""


def test_a_finished_evaluation_of_another_setting_is_refused(root, monkeypatch, capsys):
    (root / "shifted.py").write_text(SHIFTED)
    (root / "shift.txt").write_text("0.5")
    words = ["--model", "shifted:Net", "--dataset", "digits", "--eps", "0.1", "--attacks", "fgsm"]
    words += ["--n", "20", "--name", "setting"]
    answer(words, root, monkeypatch)
    answer(words, root, monkeypatch)
    assert "finished before" in capsys.readouterr().out
    (root / "shift.txt").write_text("0.25")
    with pytest.raises(SystemExit):
        answer(words, root, monkeypatch)
    assert "has judged other attributes than are there now" in capsys.readouterr().err


def test_an_evaluation_goes_on_where_its_classifier_has_moved(root, monkeypatch, capsys):
    for name in ("home", "other"):
        shutil.copytree(root / "run", root / name)
    with seeded_init(1):
        other = make_classifier("small_cnn", (1, 8, 8), 10)
    save_weights(other, root / "other" / "checkpoints" / "best.safetensors")
    answer(["home", "--attacks", "fgsm", "--n", "20", "--name", "moved"], root, monkeypatch)
    report = root / "runs" / "moved" / "report.json"
    found = json.loads(report.read_text())["accuracy"]
    (root / "home").rename(root / "elsewhere")
    report.unlink()
    for words, said in (
        ([], "home does not exist"),
        (["other"], "holds an evaluation of other weights"),
        (["elsewhere", "--seed", "1"], "with seed=0, not 1: leave --seed away"),
    ):
        with pytest.raises(SystemExit):
            answer([*words, "--resume", "runs/moved"], root, monkeypatch)
        assert said in capsys.readouterr().err
    answer(["elsewhere", "--resume", "runs/moved"], root, monkeypatch)
    assert json.loads(report.read_text())["accuracy"] == found
    capsys.readouterr()
    with pytest.raises(SystemExit):  # finished: nothing is compared
        answer(["other", "--resume", "runs/moved"], root, monkeypatch)
    said = "was started with what=home, not other: leave other away, or start a new run"
    assert said in capsys.readouterr().err


def test_workers_leave_the_one_report_that_one_process_leaves(root, monkeypatch, capsys):
    """The folder says nothing of them, so that it goes on with others, or with none."""
    words = ["run", "--attacks", "fgsm,pgd20", "--n", "30", "--batch-size", "10"]
    answer([*words, "--name", "no-workers"], root, monkeypatch)
    ran = []

    def run_workers(config, script_of, folder, own, again):
        assert (config.jobs, script_of.name, again) == (3, "evaluate.py", f"--resume {folder}")
        assert not (folder / "evaluation").exists(), "this process does nothing of it"
        ran.extend(own)
        answer(own, root, monkeypatch)

    monkeypatch.setattr(script, "run_workers", run_workers)
    answer([*words, "--name", "workers", "--jobs", "3", "--threads", "2"], root, monkeypatch)
    assert ran == ["--resume", "runs/workers", "--dataset=digits"]
    assert capsys.readouterr().out.count("; more in runs/workers/report.md") == 2
    one, several = (root / "runs" / name for name in ("no-workers", "workers"))
    assert (one / "verdicts.csv").read_bytes() == (several / "verdicts.csv").read_bytes()
    settings = [json.loads((run / "config.json").read_text())["config"] for run in (one, several)]
    assert settings[0] | {"name": "workers"} == settings[1]


def test_workers_are_told_again_what_a_folder_may_not_ask_for():
    """Code, and where the data lies now."""
    words = ["w.pth", "--model", "my_code:Net(width=8)", "--attacks", "fgsm,my_code:mine(1, b=2)"]
    words += ["--dataset", "my_code:images", "--data-dir", "a folder", "--eps", "0.1"]
    asked = script.job.parse([*words, "--jobs", "2", "--engine", "ray"])
    worker = script.job.parse(script.words_of(asked, RunFolder(Path("runs/x"))))
    told = ("model", "attacks", "dataset", "data_dir")
    assert [getattr(worker, name) for name in told] == [getattr(asked, name) for name in told]
    assert (worker.resume, worker.jobs, worker.engine) == ("runs/x", 0, "local")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_that_are_stopped_or_killed_leave_a_folder_that_goes_on(root):
    """By Ctrl-C; then one by SIGKILL, whose pieces the other takes over."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*SCRIPT, "run", "--attacks", "pgd100,aa:apgd-t", "--n", "24", "--batch-size", "6"]
    how = {"cwd": root, "env": env, "stderr": subprocess.PIPE, "text": True}
    subprocess.run([*words, "--name", "lone"], **how, check=True)
    folder = root / "runs" / "shared"
    cells = partial(folder.glob, "evaluation/*/*.json")

    def until(wanted):
        while len(list(cells())) < wanted:
            time.sleep(0.01)

    stopped = subprocess.Popen([*words, "--name", "shared", "--jobs", "2"], **how)
    until(2)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=600)[1]
    assert stopped.returncode == 130
    assert said.endswith("error: interrupted; --resume with the run's folder goes on\n")
    assert len(list(cells())) < 12

    again = [*SCRIPT, "--resume", "runs/shared", "--jobs", "2"]
    going_on = subprocess.Popen(again, **how)
    until(len(list(cells())) + 1)
    threads = Path(f"/proc/{going_on.pid}/task").glob("*/children")
    workers = [int(pid) for path in threads for pid in path.read_text().split()]
    assert len(workers) == 2
    os.kill(min(workers), signal.SIGKILL)
    said = going_on.communicate(timeout=600)[1]
    assert going_on.returncode == 2
    assert "failed, its last words: none, it was killed" in said
    assert said.endswith("; --resume runs/shared goes on\n")
    subprocess.run(again, **how, check=True)
    one, two = (root / "runs" / name / "verdicts.csv" for name in ("lone", "shared"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_three_processes_of_one_command_and_kills_give_the_verdicts_of_one(root):
    """They begin at once, as the tasks of a cluster do; two are killed, and one comes later."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*SCRIPT, "run", "--attacks", "pgd20,aa:apgd-ce", "--n", "90", "--batch-size", "6"]
    quiet = {"cwd": root, "env": env, "stdout": subprocess.DEVNULL}
    subprocess.run([*words, "--name", "one"], **quiet, check=True)
    several = [*words, "--name", "several"]
    folder = root / "runs" / "several"
    workers = [subprocess.Popen(several, **quiet) for _ in range(3)]
    for number, wanted in ((0, 4), (1, 14)):
        while len(list(folder.glob("evaluation/*/*.json"))) < wanted:
            time.sleep(0.01)
        workers[number].kill()
        workers[number].wait()
    late = subprocess.Popen([*SCRIPT, "--resume", str(folder)], **quiet)
    assert [workers[2].wait(), late.wait()] == [0, 0]
    one, two = ((root / "runs" / name / "verdicts.csv") for name in ("one", "several"))
    assert one.read_bytes() == two.read_bytes()
    assert not [path for path in folder.glob("evaluation/.claims/*") if path.is_file()]


@pytest.mark.long
def test_four_workers_of_which_one_or_another_is_killed_give_the_verdicts_of_one(root):
    """At random moments, eight times; another worker comes in its place."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*SCRIPT, "run", "--attacks", "pgd100,aa:apgd-t", "--n", "120", "--batch-size", "8"]
    quiet = {"cwd": root, "env": env, "stdout": subprocess.DEVNULL}
    subprocess.run([*words, "--name", "alone"], **quiet, check=True)
    folder, chance, kills = root / "runs" / "killed-workers", random.Random(0), 0
    workers = [subprocess.Popen([*words, "--name", folder.name], **quiet) for _ in range(4)]
    while not list(folder.glob("evaluation/*/*.json")):
        time.sleep(0.01)
    cells = 15 * 3  # clean and two attacks on each batch
    while kills < 8 and len(list(folder.glob("evaluation/*/*.json"))) < cells - 4:
        time.sleep(chance.uniform(0.2, 2))
        one = workers.pop(chance.randrange(4))
        kills += one.poll() is None
        one.kill()
        one.wait()
        workers.append(subprocess.Popen([*SCRIPT, "--resume", str(folder)], **quiet))
    assert [one.wait() for one in workers] == [0] * 4
    print(f"{kills} kills")
    assert kills >= 4
    one, several = (root / "runs" / name / "verdicts.csv" for name in ("alone", folder.name))
    assert one.read_bytes() == several.read_bytes()
    assert not [path for path in folder.glob("evaluation/.claims/*") if path.is_file()]


@pytest.mark.long
def test_killed_at_random_moments_and_resumed_gives_the_same_verdicts(root):
    words = ["run", "--attacks", "fgsm,pgd20,fea,autoattack", "--n", "24", "--batch-size", "8"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*SCRIPT, *words, "--name", "whole"]
    subprocess.run(whole, cwd=root, env=env, check=True, capture_output=True)
    folder, chance = root / "runs" / "killed", random.Random(0)
    kills = 0
    for wanted in (0, 1, 4, 8, 12, 16, 20):
        going_on = ["--resume", str(folder)] if folder.exists() else [*words, "--name", "killed"]
        process = subprocess.Popen(
            [*SCRIPT, *going_on],
            cwd=root,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(folder.glob("evaluation/*/*.json"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3 if wanted else 4))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 5
    last = [*SCRIPT, "--resume", str(folder)]
    subprocess.run(last, cwd=root, env=env, check=True, capture_output=True)
    ours, theirs = (folder / "verdicts.csv", root / "runs" / "whole" / "verdicts.csv")
    assert ours.read_text() == theirs.read_text()
    reports = [json.loads((run / "report.json").read_text()) for run in (folder, theirs.parent)]
    for key in ("accuracy", "worst_case", "flags", "calls", "n", "threat"):
        assert reports[0][key] == reports[1][key]

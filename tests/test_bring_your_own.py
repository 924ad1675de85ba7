"""Somebody's pictures, network and checkpoint, to a report and the picture of the sweeps.

Three commands, of which the network is the only code; and the same in Python.
"""

import json
import subprocess
import sys

import evaluate
import pytest
import torch
from conftest import ROOT
from PIL import Image

from advgame.data import load_data
from advgame.run.cli import run_script

NAMES = ("zero", "one", "two", "three")
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Flatten(), nn.Linear(36 * width, 4),
        )
"""
COMMANDS = """
train.py --dataset pictures --model my_net:Net(width=16) --init w.pth --epochs 2 --lr 0.02
    --eps 8/255 --batch-size 32 --attacks fgsm,pgd20 --name mine
evaluate.py runs/mine --model my_net:Net(width=16) --attacks pgd20,aa:apgd-ce --name judged
sweeps.py runs/mine --model my_net:Net(width=16) --out sweeps
"""
PYTHON = """
from my_net import Net

from advgame import Defender, Linf, RunFolder, Trainer, TrainingPlan, attacks, games, load_data
from advgame.classifiers import load_into
from advgame.evaluation import as_line, judge_run, validator, write_sweeps

data, threat = load_data("pictures"), Linf(8 / 255)
net = Net(width=16)
load_into(net, "w.pth")
rules = games.AdversarialTraining(threat, lambda ball: attacks.pgd(ball, steps=10))
game = games.DefenderTraining(rules, Defender(net, lr=0.02), data.train, batch_size=32, seed=0)
run = RunFolder.create("runs/python", {"dataset": "pictures", "eps": "8/255"}, "cpu")
Trainer(game, run, TrainingPlan(epochs=2), validator(data.validation, threat, seed=0)).fit()
print(as_line(judge_run(run, net, data.test, threat, dataset="pictures", attacks=("pgd20",))))
write_sweeps("runs/python/sweeps", {"mine": net}, data.test, threat)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of four digits, a network, and its weights as a training of one's own saves them."""
    root = tmp_path_factory.mktemp("stranger")
    digits = load_data("digits")
    for split, data, count in (("train", digits.train, 50), ("test", digits.test, 15)):
        for label, name in enumerate(NAMES):
            (root / "pictures" / split / name).mkdir(parents=True)
            pictures = data.floats()[data.labels == label][:count, 0]
            for number, one in enumerate(pictures):
                levels = (one * 255).round().byte().numpy()
                picture = Image.fromarray(levels).convert("RGB").resize((12, 12))
                picture.save(root / "pictures" / split / name / f"{number}.png")
    (root / "my_net.py").write_text(NET)
    torch.manual_seed(0)
    scope = {}
    exec(NET, scope)
    net, data = scope["Net"](width=16), load_data(str(root / "pictures"))
    adam, x, y = torch.optim.Adam(net.parameters(), 0.01), data.train.floats(), data.train.labels
    for _ in range(30):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        adam.step()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 30, "state_dict": state, "optimizer": adam.state_dict()}, root / "w.pth")
    return root


def ran(folder, words):
    path = {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_three_commands_lead_from_pictures_to_report_and_sweeps(folder):
    lines = COMMANDS.replace("\n    ", " ").strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        script, *words = line.split(" ")
        ran(folder, [str(ROOT / "scripts" / script), *words])
    for name in ("mine", "judged"):
        report = json.loads((folder / "runs" / name / "report.json").read_text())
        assert report["accuracy"]["clean"] > 0.8, "the checkpoint's knowledge is still there"
        assert (folder / "runs" / name / "report.md").exists()
    for picture in ("sweeps.png", "examples.png", "landscape.png"):
        assert (folder / "sweeps" / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_the_same_in_python_takes_at_most_25_lines(folder, monkeypatch, capsys):
    """The run that it leaves is one: the scripts take it."""
    assert len(PYTHON.strip().splitlines()) <= 25
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)  # another test's, of that name
    monkeypatch.syspath_prepend(str(folder))
    exec(PYTHON, {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("clean ")
    run = folder / "runs" / "python"
    assert json.loads((run / "report.json").read_text())["accuracy"]["clean"] > 0.8
    for file in ("report.md", "curves.png", "sweeps/sweeps.png", "checkpoints/best.safetensors"):
        assert (run / file).exists(), file
    words = ["runs/python", "--model", "my_net:Net(width=16)", "--attacks", "fgsm", "--name", "a"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    run_script(evaluate.job.from_command_line)
    assert "fgsm" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "my_net")

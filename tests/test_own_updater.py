"""An updater of one's own: the example of docs/updaters.md, and what goes wrong."""

import re
import sys

import pytest
import torch
import train_gail
from conftest import ROOT
from test_updaters import START, quadratic

from advgame.errors import InputError
from advgame.imitation import Updater
from advgame.run.cli import run_script
from advgame.run.folder import Metrics
from agents import GailTraining, load_policy, make_updater

PAGE = (ROOT / "docs" / "updaters.md").read_text()
(EXAMPLE,) = re.findall(
    r"^`my_updaters\.py`:\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
QUICK = ["--iterations", "4", "--evaluate-every", "2", "--episodes", "4", "--envs", "4"]
QUICK += ["--n-steps", "16", "--expert", "dummy"]
WRONG = """
import torch
from advgame.imitation import Updater

class Nothing(Updater):
    def step(self, params, grad, objective):
        params.sub_(0.1 * grad)

class Alone(Updater):
    def step(self, params, grad, objective):
        return params - 0.1 * grad

class Short(Updater):
    def step(self, params, grad, objective):
        return params[1:], {}

class Vector(Updater):
    def step(self, params, grad, objective):
        return params, {"updater/grad": grad}

class Raising(Updater):
    def step(self, params, grad, objective):
        return params @ grad[1:], {}

class Objects(Updater):
    def step(self, params, grad, objective):
        return params, {}
    def saved(self):
        return {"me": self}
    def restore(self, state):
        self.me = state["me"]

class Keys(Objects):
    def saved(self):
        return {}

class Worse(Updater):
    def step(self, params, grad, objective):
        return params * float("nan"), {"updater/mine": 1}

class Seeded(Updater):
    def __init__(self, rate, seed, blocks, other=3):
        self.given = (rate, seed, blocks, other)
    def step(self, params, grad, objective):
        return params - 0.1 * grad, {}

class Unwritten(Updater):
    pass

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A stranger's folder with the example in it."""
    names = {"my_updaters": EXAMPLE, "wrong_updaters": WRONG}
    for name, text in names.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gail, "resembles", lambda *_: {})
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def run(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gail.py", *words])
    run_script(train_gail.job.from_command_line)


def test_the_example_is_short_trains_and_is_resumed_when_it_is_typed_again(
    here, monkeypatch, capsys
):
    assert len(EXAMPLE.splitlines()) <= 30
    own = "my_updaters:Signum(0.01, decay=0.5)"
    words = ["--updater", own, *QUICK]
    run([*words, "--name", "whole"], monkeypatch)
    rows = Metrics.read(here / "runs/whole/metrics.csv")
    assert all(row["updater/mean"] > 0 for row in rows)
    report = (here / "runs/whole/report.md").read_text()
    assert f"by {own}" in report

    part, calls = GailTraining.step, []

    def stopped(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return part(self)

    with monkeypatch.context() as patch:
        patch.setattr(GailTraining, "step", stopped)
        with pytest.raises(SystemExit):
            run([*words, "--save-every", "1", "--name", "half"], patch)
    with pytest.raises(SystemExit):
        run(["--resume", "runs/half"], monkeypatch)
    assert "to go on, type --updater 'my_updaters:Signum" in capsys.readouterr().err
    run(["--resume", "runs/half", "--updater", own], monkeypatch)
    ends = [load_policy(f"runs/{name}").state_dict() for name in ("whole", "half")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_updaters:Nothing", "Nothing.step must return the new parameters, a tensor (2625,)"),
        ("wrong_updaters:Alone", "not parameters of shape (2625,)"),
        ("wrong_updaters:Short", "not parameters of shape (2624,)"),
        ("wrong_updaters:Vector", "Vector.step must return scalars to log"),
        ("wrong_updaters:Raising", "Raising failed: RuntimeError"),
        ("wrong_updaters:Objects", "Objects.saved must return tensors, numbers, and containers"),
        ("wrong_updaters:Keys", "Keys failed: KeyError: 'me', "),
        ("wrong_updaters:Unwritten", "abstract"),
        ("wrong_updaters:number", "must return an advgame.imitation.Updater, not int"),
        ("wrong_updaters:Lion", "has no attribute 'Lion'"),
        ("wrong_updaters:Seeded", "missing 1 required positional argument: 'rate'"),
        ("there_is_none:Signum", "there is no module 'there_is_none'"),
        ("my_updaters:Signum(lr)", "the arguments in"),
        ("my_updaters.py:Signum", "name the module without .py"),
        ("my_updaters:Signum --updater-lr 0.1", "makes no use of --updater-lr"),
    ],
)
def test_what_is_no_updater_is_refused_in_one_line(name, words, here, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(["--updater", *name.split(), *QUICK, "--name", "a"], monkeypatch)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert words in line
    assert not (here / "runs").exists()


def test_nan_is_a_result(here, monkeypatch):
    run(["--updater", "wrong_updaters:Worse", *QUICK, "--name", "a"], monkeypatch)
    text = (here / "runs/a/report.md").read_text()
    assert "**It diverged after 0 iterations**" in text
    assert "No flag but the divergence above." in text
    assert load_policy("runs/a").act(torch.zeros(4)).shape == ()


def test_seed_and_blocks_are_given_to_who_takes_them(here):
    shared = {"lr": None, "seed": 5, "blocks": (10, 6)}
    assert make_updater("wrong_updaters:Seeded(0.1)", **shared).given == (0.1, 5, (10, 6), 3)
    assert make_updater("wrong_updaters:Seeded(1, seed=2)", **shared).given == (1, 2, (10, 6), 3)
    with pytest.raises(InputError, match="type its settings within its brackets"):
        make_updater("my_updaters:Signum", lr=0.1, seed=0)


def test_half_of_a_memory_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match="Half has one of saved and restore"):

        class Half(Updater):
            def step(self, params, grad, objective):
                return params, {}

            def saved(self):
                return {}


def test_neither_side_can_write_into_the_others_parameters(here):
    class InPlace(Updater):
        def step(self, params, grad, objective):
            params.sub_(0.1 * grad)
            self.kept = params
            return params, {"updater/mine": 1}

    updater, kept = InPlace(), START.clone()
    updater.init(START)
    made = updater.update(START, quadratic)
    assert torch.equal(kept, START)
    assert not torch.equal(made.params, START)
    before = made.params.clone()
    updater.kept.zero_()
    assert torch.equal(made.params, before)

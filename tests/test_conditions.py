"""Runs that go on elsewhere or later, whose files got lost, that are stopped or not watched."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from types import SimpleNamespace

import evaluate
import psro
import pytest
import torch
import train
import train_adt
import train_attacker
import train_duel
import train_gail
import train_l2l
import train_las_at
import train_minimax
import train_privacy_filter
from conftest import ROOT
from lightning_fabric import Fabric
from rich.console import Console

from advgame.errors import InputError
from advgame.run import folder
from advgame.run.cells import note_flags, same_flags
from advgame.run.checkpoint import Checkpoints
from advgame.run.cli import run_script
from advgame.run.folder import Metrics, RunFolder
from advgame.run.job import Job, kept, resume_settings
from advgame.run.loop import Trainer, load_best
from advgame.run.plan import TrainingPlan

TRAINING = (train, train_adt, train_l2l, train_las_at, train_minimax)
RESUMED = (
    *TRAINING, evaluate, train_privacy_filter, train_attacker, train_gail, train_duel, psro,
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"seed": 1}, "cpu")


@pytest.fixture
def threads(monkeypatch):
    """Nobody asks for a number of threads; it is put back."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


class Game:
    """Two steps an epoch; ``at`` is called at each."""

    steps_per_epoch = 2

    def __init__(self, at=lambda step: None):
        module = torch.nn.Linear(1, 1)
        self.at, self.played = at, 0
        self.learner = SimpleNamespace(
            fabric=Fabric(accelerator="cpu", devices=1),
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), 0.1),
        )

    def step(self):
        self.played += 1
        self.at(self.played)
        self.learner.optimizer.step()
        return {"game/loss": torch.tensor(float(self.played))}

    def end_epoch(self, curves, step):
        return {}

    def state_dict(self):
        return {"played": self.played}

    def load_state_dict(self, state):
        self.played = state["played"]


def play(run, at=lambda step: None, *, resume=False):
    plan = TrainingPlan(3, "constant")
    Trainer(Game(at), run, plan, lambda module: {"eval/robust": 0.5}).fit(resume=resume)
    return [row["game/loss"] for row in Metrics.read(run.path / "metrics.csv")]


def stop(step, number=signal.SIGTERM):
    """Raise a signal at a step."""
    return lambda now: signal.raise_signal(number) if now == step else None


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/step_*"])
def test_a_run_whose_checkpoints_are_lost_is_not_begun_again(lost, run):
    with pytest.raises(SystemExit):
        play(run, stop(3))
    for path in run.path.glob(lost):
        shutil.rmtree(path)
    before = (run.path / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=r"metrics.csv has epochs.*restore one from a backup"):
        play(run, resume=True)
    assert (run.path / "metrics.csv").read_bytes() == before


def forget_best(path):
    """Make a checkpoint one of an earlier version, which held no best weights."""
    (path / "best.safetensors").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]["best.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_best_weights_that_are_lost_come_from_the_checkpoint(run):
    with pytest.raises(SystemExit):
        play(run, stop(3))
    best = run.path / "checkpoints" / "best.safetensors"
    before = best.read_bytes()
    best.unlink()
    assert play(run, resume=True) == [1.5, 3.5, 5.5]
    assert best.read_bytes() == before, "epochs that are no better leave them"


def test_a_run_whose_best_weights_are_lost_is_not_gone_on_with(run):
    with pytest.raises(SystemExit):
        play(run, stop(3))
    for path in run.path.glob("checkpoints/step_*[1-9]*"):
        forget_best(path)
    (run.path / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(InputError, match=r"best.safetensors is lost: restore it"):
        play(run, resume=True)


def scored(run, scores, *, resume=False, dies_at=0, **plan):
    """Play with these scores; the network's weight is the number of the epoch."""

    def learn(step):
        if step == dies_at:
            raise KeyboardInterrupt
        torch.nn.init.constant_(game.learner.module.weight, (step + 1) // 2)

    game, told = Game(learn), iter(scores)
    plan = TrainingPlan(4, "constant", **plan)
    trainer = Trainer(game, run, plan, lambda module: {"eval/robust": next(told)})
    trainer.fit(resume=resume)
    return trainer.best


def best_epoch(run):
    module = torch.nn.Linear(1, 1)
    load_best(run, module)
    return module.weight.item()


def no_links(*_):
    raise OSError(errno.EPERM, "no hard links here")


@pytest.mark.parametrize("links", [True, False])
def test_best_weights_are_those_of_the_best_score_after_a_kill(links, run, monkeypatch):
    """Epoch 3 was the best, and is lost: played again it has another score, as on a GPU."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(KeyboardInterrupt):
        scored(run, [0.1, 0.5, 0.9], dies_at=7, save_every=2)
    assert best_epoch(run) == 3
    assert scored(run, [0.4, 0.45], resume=True, save_every=2) == 0.5
    assert best_epoch(run) == 2


def test_no_best_weights_are_left_where_the_only_score_is_lost(run):
    best = run.path / "checkpoints" / "best.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scored(run, [0.9], dies_at=3, save_every=2)
    assert best.exists()
    with pytest.raises(SystemExit):
        play(run, stop(1), resume=True)
    assert not best.exists()


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(run):
    with pytest.raises(KeyboardInterrupt):
        scored(run, [0.1, 0.5, 0.9], dies_at=7)
    for path in run.path.glob("checkpoints/step_*[1-9]*"):
        forget_best(path)
    assert scored(run, [0.4], resume=True) == 0.9
    assert best_epoch(run) == 3


@pytest.mark.parametrize("state", [{}, {"device": "cpu"}, {"device": "cpu", "game": [1]}], ids=str)
def test_a_checkpoint_of_something_else_is_refused(state, run):
    run.checkpoints.save(3, {"defender": torch.nn.Linear(1, 1)}, state)
    with pytest.raises(InputError, match="step_00000003 is a checkpoint of another game"):
        play(run, resume=True)


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(step, run, monkeypatch):
    """As it begins, and between the first row and its checkpoint."""
    save = Checkpoints.save

    def killed(self, now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return save(self, now, *rest)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        play(run)
    monkeypatch.undo()
    assert play(run, resume=True) == [1.5, 3.5, 5.5]


def test_a_terminal_that_is_closed_leaves_a_checkpoint(run):
    def hang_up(step):
        if step == 3:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)  # from the shell, and from the system

    with pytest.raises(SystemExit) as ended:
        play(run, hang_up)
    assert ended.value.code == 128 + signal.SIGHUP
    assert play(run, resume=True) == [1.5, 3.5, 5.5]


def test_under_nohup_a_terminal_may_be_closed(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert play(run, stop(3, signal.SIGHUP)) == [1.5, 3.5, 5.5]
    finally:
        signal.signal(signal.SIGHUP, before)


CHANGES = {
    "torch": ("versions", {**folder.versions(), "torch": "0.0"}),
    "commit": ("commit", "abc"),
    "processor": ("processor", "abacus"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_conditions_are_told_in_a_line_each(name, run, capsys):
    run.take_conditions()
    assert not capsys.readouterr().err, "nothing has changed"
    field, value = CHANGES[name]
    run.write_json("config.json", {**run.about(), field: value})
    run.take_conditions()
    said = capsys.readouterr().err
    assert said.startswith(f"note: {run.path}: {name} was ")
    assert said.count("\n") == 1


def test_a_run_goes_on_with_its_own_threads_unless_others_are_asked_for(
    run, threads, monkeypatch, capsys
):
    own = threads + 1
    run.write_json("config.json", {**run.about(), "threads": own})
    run.take_conditions()
    assert torch.get_num_threads() == own
    assert f"threads are {own}, as they were" in capsys.readouterr().err
    torch.set_num_threads(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    run.take_conditions()
    assert torch.get_num_threads() == threads
    assert f"threads were {own} and are {threads}" in capsys.readouterr().err
    for wrong in (0, -1, 10**6, 1.5, "2", None, True):
        run.write_json("config.json", {**run.about(), "threads": wrong})
        with pytest.raises(InputError, match="threads: restore it"):
            run.take_conditions()


@pytest.mark.parametrize("script", RESUMED, ids=lambda script: script.__name__)
def test_every_script_says_so_as_it_resumes(script, tmp_path, threads, capsys):
    asked = script.Config()
    run = RunFolder.create(tmp_path / "run", kept(asked), "cpu")
    run.write_json("config.json", {**run.about(), "commit": "abc", "threads": threads + 1})
    resume_settings(run.path, asked, ())
    assert torch.get_num_threads() == threads + 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    run.write_json("report.json", {"done": True})
    resume_settings(run.path, asked, ())
    assert not capsys.readouterr().err, "nothing is left to differ"


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_job_goes_on_when_nobody_reads_its_log(closed, monkeypatch):
    ends = []
    for name in ("stdout", "stderr") if closed == "both" else (closed,):
        reader, writer = os.pipe()
        os.close(reader)
        ends.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, name, ends[-1])

    def job():
        for _ in range(3):
            print("line", flush=True)
            print("line", file=sys.stderr)
            Console(stderr=True).print("line")
            Console().print("line")
        raise InputError("and its status is as it would be")

    with pytest.raises(SystemExit) as ended:
        run_script(job)
    assert ended.value.code == 2
    for end in ends:
        end.close()  # as Python does at its end: fails where something is held back


def test_nothing_is_written_in_place():
    """A file that is cut short would be taken for a whole one: `write_atomically` replaces it."""
    writing = re.compile(
        r"(?<!run)\.write_(?:text|bytes)\(|\bopen\([^)]*[\"'][wax]b?\+?[\"']|\.savefig\((?!png|content)|"
        r"\bjson\.dump\(|\bnp\.savez?(?:_compressed)?\((?!file)|"
        r"(?<!\.)\btorch\.save\((?!.*, memory)|save_file\("
    )
    advice = re.compile(r'\s*f?"[^"]*"?$|\s*`')  # within a message or a docstring
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("advgame", "agents", "envs", "scripts")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if writing.search(line) and not advice.match(line)
    ]
    assert found == [
        # a claim is made by who makes the file; one without its name counts as a dead worker's
        "advgame/evaluation/claims.py: "
        'with self._path(name, number + 1).open("x", encoding="utf-8") as file:',
        # of a checkpoint, under another name until it is whole
        'advgame/run/checkpoint.py: with (partial / "state.pt").open("wb") as file:',
        "advgame/run/checkpoint.py: torch.save(dict(state), file)",
        # events are appended; a last record that was cut short is dropped at the next start
        'advgame/run/events.py: self._records = RecordWriter(path.open("ab"))',
        # what a worker says, read while it says it
        'scripts/studies/kills.py: with every[-1].open("wb") as file:',
    ]


def test_a_studys_note_of_its_flags_is_written_once_and_whole(tmp_path, monkeypatch):
    root = tmp_path / "cells"
    note_flags(root, "--epochs 3")
    (root / "a").mkdir()
    (root / "a" / "config.json").write_text("{}")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("it was written again"))
    same_flags(root, "--epochs 3")
    note_flags(root, "--epochs 3")
    with pytest.raises(InputError, match="other flags"):
        same_flags(root, "--epochs 4")
    monkeypatch.undo()
    (root / "a" / "config.json").unlink()
    same_flags(root, "--epochs 4")  # no cell is left that was made by the others

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        note_flags(root, "--epochs 4")
    assert (root / "extra.txt").read_text() == "--epochs 3"


@dataclass(frozen=True)
class ToyConfig:
    """What every job has."""

    runs_dir: str = "runs"
    name: str = ""
    resume: str | None = None


class Toy(Job[ToyConfig, None]):
    """Calls ``meanwhile`` once, when it has chosen its folder and not yet made it."""

    config = ToyConfig

    def __init__(self, meanwhile):
        self.meanwhile = meanwhile

    def build(self, config, fabric):
        self.meanwhile()

    def work(self, config, run, made, *, resume):
        run.write_json("report.json", {})

    def told(self, run):
        return str(run.path)


def test_runs_without_a_name_that_choose_one_folder_get_two(tmp_path, monkeypatch):
    now = SimpleNamespace(now=lambda: datetime(2026, 12, 1))  # the second does not end
    monkeypatch.setattr(folder, "datetime", now)
    others = []
    config = ToyConfig(str(tmp_path))
    other = Toy(lambda: None)
    run = Toy(lambda: others.append(other.run(config))).run(config)
    assert run.path != others[0].path
    assert all((path / "report.json").exists() for path in (run.path, others[0].path))
    taken = Toy(lambda: other.run(replace(config, name="mine")))
    with pytest.raises(InputError, match="choose another --name"):
        taken.run(replace(config, name="mine"))

"""A study's cells: a failure is told at once, and nothing goes on behind a study that has ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import train
from conftest import ROOT

from advgame.errors import InputError
from advgame.run.cells import Cell, run_cells, values_of, without
from advgame.run.engines import Local
from advgame.run.folder import RunFolder
from advgame.run.job import resume_settings

# a cell that notes when it begins, fails or waits as told, and how it ends
CELL = """
import json, signal, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(words["--runs-dir"]) / words["--name"]
folder.mkdir(parents=True, exist_ok=True)
def stop(number, frame):
    with (folder / "stopped").open("a") as file:
        file.write("once ")
    time.sleep(0.5)  # it writes its checkpoint: a second signal would end that
    raise SystemExit(143)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
with (folder / "began").open("a") as file:
    file.write("once ")
if "--fail" in words:
    sys.exit("error: " + words["--fail"])
time.sleep(float(words["--wait"]))
(folder / "report.json").write_text("{}")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "cell.py"
    path.write_text(CELL)
    return path


def run(script, root, cells, jobs):
    """Cells without needs, name -> flags, on this machine."""
    every = [Cell(script, root / name, flags) for name, flags in cells.items()]
    run_cells(every, Local([None] * jobs), jobs)


def began(root):
    return sorted(path.parent.name for path in root.glob("*/began"))


def test_the_first_failure_ends_the_queue_and_all_are_told(script, tmp_path, capsys):
    cells = {
        "a": ["--wait", "0.5"],
        "b": ["--fail", "too bad"],
        **{f"c{n}": ["--wait", "0"] for n in range(9)},
    }
    with pytest.raises(InputError, match="b failed, its last words: too bad"):
        run(script, tmp_path / "runs", cells, jobs=2)
    assert set(began(tmp_path / "runs")) <= {"a", "b", "c0"}
    assert (tmp_path / "runs" / "a" / "report.json").exists(), "what was under way has ended"
    assert "no further cell begins" in capsys.readouterr().err
    both = {"b": ["--fail", "one"], "d": ["--fail", "two"]}
    with pytest.raises(InputError, match=r"one.*two|two.*one"):
        run(script, tmp_path / "more", both, jobs=2)


def test_finished_cells_are_left_alone(script, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "report.json").write_text(json.dumps({}))
    run(script, tmp_path / "runs", {"a": ["--fail", "never run"], "b": ["--wait", "0"]}, 1)
    assert began(tmp_path / "runs") == ["b"]


@pytest.mark.parametrize("data", [["--data-dir", "new place"], ["--data-dir=new place"]])
def test_a_cell_that_goes_on_is_told_where_its_data_lie_now(data, tmp_path):
    """Its folder may have been made where they lay elsewhere; of the other flags it has its own."""
    cell = Cell(tmp_path, tmp_path / "a", ["--epochs", "3", *data, "--seed", "1"])
    assert cell.words(tmp_path)[:2] == ["--epochs", "3"], "it is new"
    RunFolder.create(cell.folder, asdict(train.Config(data_dir="old place")), "cpu")
    words = cell.words(tmp_path)
    assert words == ["--resume", str(cell.folder), "--data-dir", "new place"]
    asked = train.job.parse(words)
    assert resume_settings(cell.folder, asked, {"resume", "data_dir"})[1].data_dir == "new place"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_study_that_is_stopped_stops_its_cells_once(script, tmp_path, number):
    """Signals to the whole group, as a terminal sends them; no further cell begins."""
    code = (
        "import sys; from pathlib import Path; from advgame.run.cells import Cell, run_cells;"
        "from advgame.run.engines import Local; script, root = map(Path, sys.argv[1:]);"
        "cells = [Cell(script, root / f'c{n}', ['--wait', '60']) for n in range(6)];"
        "run_cells(cells, Local([None, None]), 2)"
    )
    root = tmp_path / "runs"
    words = [sys.executable, "-c", code, str(script), str(root)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = {"env": env, "stderr": subprocess.DEVNULL, "cwd": ROOT, "start_new_session": True}
    with subprocess.Popen(words, **shell) as study:
        limit = time.monotonic() + 60
        while len(began(root)) < 2 and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(study.pid, number)
        assert study.wait(30) != 0
    assert began(root) == ["c0", "c1"]
    assert {path.parent.name: path.read_text() for path in root.glob("*/stopped")} == {
        "c0": "once ",
        "c1": "once ",
    }


def test_options_are_left_out_with_all_their_values():
    words = ["--fixed", "8", "5", "2", "--lr=0.1", "--space", "eps=1", "steps=2", "--seed", "-1"]
    assert without(words, ["fixed", "lr"]) == words[5:]
    assert without(words, ["space", "seed"]) == words[:5]
    assert values_of([*words, "--lr", "0.2", "--no-ema"]) == {
        "fixed": ["8", "5", "2"],
        "lr": ["0.2"],
        "space": ["eps=1", "steps=2"],
        "seed": ["-1"],
        "no_ema": [],
    }


TWICE = """
import signal, sys
from advgame.run.interrupt import Interrupt

first, second = map(int, sys.argv[1:])
with Interrupt() as interrupt:
    signal.raise_signal(first)
    signal.raise_signal(second)
    print("a checkpoint of", interrupt.signal)
"""


@pytest.mark.parametrize(
    ("first", "second", "killed"),
    [
        (signal.SIGTERM, signal.SIGTERM, False),  # to all processes, and passed on by one of them
        (signal.SIGINT, signal.SIGTERM, False),  # torchrun, which heard Ctrl-C too
        (signal.SIGHUP, signal.SIGHUP, False),
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGINT, True),
    ],
)
def test_one_request_that_comes_by_two_ways_does_not_kill(first, second, killed):
    """The study's own signal killed a cell that the system had asked to end, without checkpoint."""
    words = [sys.executable, "-c", TWICE, str(int(first)), str(int(second))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode == -second) is killed
    assert (f"a checkpoint of {int(first)}" in done.stdout) is not killed

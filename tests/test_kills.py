"""The study of kills: what it counts, whom it kills, and that it tells what is lost."""

import json
import random
from types import SimpleNamespace

import pytest
from studies import kills

from advgame.errors import InputError

# in the place of scripts/evaluate.py: the same sharing of cells, none of the arithmetic; the last
# cells wait until all kills have been, however slow the machine is
TOY = """
import sys, time
from pathlib import Path
from advgame.evaluation.claims import Task, share
words = dict(zip(sys.argv[-4::2], sys.argv[-3::2]))
folder = Path(words["--runs-dir"]) / words["--name"]
cells = folder / "evaluation" / "toy"
cells.mkdir(parents=True, exist_ok=True)
def work(start):
    print(f"toy on images {start} to {start}", file=sys.stderr, flush=True)
    time.sleep(0.05)
    processes = 3 + 4 if folder.parent.name == "killed" else 1
    while len(list(cells.iterdir())) >= 9 and len(list(folder.glob("../logs/*"))) < processes:
        time.sleep(0.05)
    (cells / f"{start}.json").touch()
share(
    [Task(f"{n}", (cells / f"{n}.json").exists, lambda n=n: work(n)) for n in range(12)],
    folder / "evaluation",
)
(folder / "verdicts.csv").write_text("the same")
"""
ABOUT = {"cpu": "a processor", "cores": 2}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    monkeypatch.setattr(kills, "evaluate", SimpleNamespace(__file__=str(script)))
    monkeypatch.setattr(kills, "LATER", 0.05)
    return script


def study(root, **settings):
    where = {"runs_dir": str(root / "runs"), "out": str(root / "out")}
    return kills.Kills(kills.Config(**{**where, "parts": ("workers",), **settings}))


def log(*starts, then=""):
    lines = [f"pgd20 on images {start} to {start + 3}" for start in starts]
    return "\n".join(["runs/x: 8 images", *lines, *([then] if then else [])]) + "\n"


def test_a_cell_that_is_begun_again_is_told_apart_by_the_kill_at_it():
    cut, ended = log(0, 4), log(4, 8, then="1 task(s) left, which other processes work on")
    assert kills.counted([cut, ended, ""], [cut, ""]) == {
        "begun": [2, 1],
        "at_a_cell": 1,
        "ended": 1,
        "unasked": 0,
    }
    found = kills.counted([cut, ended], [])
    assert (found["ended"], found["unasked"]) == (2, 1), "two living workers were at one cell"
    waited = log(0, then="1 task(s) left, which other processes work on")
    assert kills.counted([waited, log(0)], [waited])["unasked"] == 1, "it was killed later"


def test_random_workers_are_killed_and_others_begin_in_their_place(toy, tmp_path):
    found = study(tmp_path, workers=3, kills=4).workers(tmp_path / "part", random.Random(0))
    assert (found["kills"], found["cells"], found["lost"]) == (4, 12, 0)
    assert len(list((tmp_path / "part" / "killed" / "logs").iterdir())) == 3 + 4
    assert sum(found["begun"]) == 12
    assert (found["ended"], found["unasked"], found["equal"]) == (1, 0, True)
    assert found["alone"]["begun"] == [12]


def test_a_worker_that_fails_is_told_with_its_last_words(toy, tmp_path):
    toy.write_text("import sys; sys.exit('too bad')")
    with pytest.raises(InputError, match="a worker failed, its last words: too bad"):
        kills.evaluated(tmp_path / "part", [], 2, [1], random.Random(0))


def test_what_is_lost_or_other_stands_out_in_the_table(tmp_path):
    alone = {"seconds": 60.0}
    run = {"workers": 20, "kills": 40, "at_a_cell": 9, "cells": 268, "lost": 2, "begun": [260, 8]}
    run |= {"method": "workers", "seed": 0, "ended": 1, "unasked": 0, "seconds": 30.0}
    other = {"method": "cluster", "seed": 0, "machines": 3, "cells": 6, "finished": 2}
    other |= {"gone_on": {"cell4": [20, 36]}, "seconds": 50.0}
    runs = [run | {"equal": False, "alone": alone}, other | {"equal": True, "alone": alone}]
    text = "\n".join(study(tmp_path).document(runs, ABOUT))
    assert "| 0 | 20 | 40 | 9 | 268 | 2 | 260, 8 | 1 time(s) | 0 | NOT EQUAL | 30 | 60 |" in text
    assert "| 0 | 3 | 6 | 2 | 20, 36 | equal to the byte | 50 | 60 |" in text


def test_folders_and_parts_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown part 'worker': did you mean workers"):
        study(tmp_path, parts=("worker",)).play()
    (tmp_path / "runs" / "kills" / "workers-0").mkdir(parents=True)
    with pytest.raises(InputError, match="is there: delete it"):
        study(tmp_path).play()


@pytest.mark.long
@pytest.mark.parametrize("part", kills.PARTS)
def test_real_evaluations_and_trainings_lose_nothing(part, tmp_path):
    if part == kills.CLUSTER:
        pytest.importorskip("ray")
    one = study(tmp_path, parts=(part,), workers=3, kills=4, n=48)
    one.play()
    (run,) = json.loads(one.path.read_text())["runs"]
    assert run["equal"]
    if part == kills.WORKERS:
        assert (run["kills"], run["cells"], run["lost"], run["unasked"]) == (4, 36, 0, 0)
        assert run["ended"] == 1
    else:
        assert run["finished"] >= 2
        assert [at for steps in run["gone_on"].values() for at in steps if at > 0]

"""Processes that share one folder: each task is worked on once, and the dead lose theirs."""

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from conftest import ROOT

from advgame.evaluation import claims
from advgame.evaluation.claims import Claims, Task, share

# a worker on the tasks of a folder, each of which notes who did it, and takes a while
WORKER = """
import sys, time
from pathlib import Path
from advgame.evaluation.claims import Task, share
folder, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def work(number):
    with (folder / f"{number}.begun").open("a") as file:
        file.write("x")
    time.sleep(seconds)
    (folder / f"{number}.done").touch()
share([
    Task(f"{n}", (folder / f"{n}.done").exists, lambda n=n: work(n)) for n in range(count)
], folder)
"""


def worker(folder, count, seconds):
    words = [sys.executable, "-c", WORKER, str(folder), str(count), str(seconds)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})


def begun(folder):
    return {path.stem: len(path.read_text()) for path in folder.glob("*.begun")}


def tasks(done, names, order=None):
    def work(name):
        time.sleep(0.02)
        done.append(name)

    return [Task(name, lambda n=name: n in done, lambda n=name: work(n)) for name in names]


def test_workers_share_the_tasks_and_all_stay_until_every_task_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.01)
    done, names, left = [], [f"p{n}" for n in range(20)], []

    def join():
        share(tasks(done, names), tmp_path)
        left.append(len(done))

    threads = [threading.Thread(target=join) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(done) == sorted(names)
    assert left == [20] * 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no claim is left"


def test_a_task_waits_for_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.01)
    done, said = [], []
    late, early = (tasks(done, [name])[0] for name in ("late", "early"))
    late = Task("late", late.done, late.work, ready=lambda: "early" in done)
    with Claims(tmp_path / ".claims") as other, ExitStack() as held:
        assert held.enter_context(other.taken("early"))
        helper = threading.Thread(target=share, args=([late, early], tmp_path, said.append))
        helper.start()
        while not said:
            time.sleep(0.01)
        assert done == []
        held.close()  # whoever had it gave up
        helper.join()
    assert done == ["early", "late"]
    assert said == ["2 task(s) left, which other processes work on"]


def test_nothing_is_left_of_a_worker_that_was_killed_just_after_its_task(tmp_path):
    (tmp_path / ".claims").mkdir()
    (tmp_path / ".claims" / "a.0").write_text("elsewhere.1")
    (tmp_path / ".claims" / "of-others.0").write_text("elsewhere.1")
    share(tasks(["a"], ["a"]), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["of-others.0"]


def test_a_task_that_fails_is_free_again(tmp_path):
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        share([Task("a", lambda: False, fail)], tmp_path)
    with Claims(tmp_path / ".claims") as other, other.taken("a") as mine:
        assert mine


def test_a_killed_workers_task_is_taken_over_at_once_and_a_living_ones_is_not(tmp_path):
    with worker(tmp_path, 1, 60) as killed:
        while not begun(tmp_path):
            time.sleep(0.02)
        with Claims(tmp_path / ".claims") as other:
            with other.taken("0") as mine:
                assert not mine
            killed.kill()
            killed.wait()
            with other.taken("0") as mine:
                assert mine
                with Claims(tmp_path / ".claims") as third, third.taken("0") as both:
                    assert not both


def test_a_worker_of_another_machine_is_dead_when_its_file_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 0.3)
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with Claims(tmp_path) as far, far.taken("a"), Claims(tmp_path) as near:
        monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
        for _ in range(8):  # longer than the lease, in which it beats
            with near.taken("a") as mine:
                assert not mine
            time.sleep(0.1)
        far._ended.set()
        far._heart.join()
        taken = []
        while not any(taken):
            with near.taken("a") as mine:
                taken.append(mine)
            time.sleep(0.02)
        assert len(taken) > 5, "it is waited for"


def test_a_claim_without_a_name_lapses_too(tmp_path, monkeypatch):
    """Its worker was killed between the two steps of making it."""
    monkeypatch.setattr(claims, "LEASE", 0.1)
    with Claims(tmp_path) as one:
        (tmp_path / "a.0").touch()
        with one.taken("a") as mine:
            assert not mine
        time.sleep(0.15)
        with one.taken("a") as mine:
            assert mine
            assert {path.name for path in tmp_path.glob("a.*")} == {"a.0", "a.1"}
        assert not list(tmp_path.glob("a.*"))


@pytest.mark.slow
def test_twenty_workers_and_forty_kills_lose_nothing(tmp_path):
    chance, kills, count = random.Random(0), 0, 200
    workers = [worker(tmp_path, count, 0.6) for _ in range(20)]
    while kills < 40 and len(list(tmp_path.glob("*.done"))) < count:
        time.sleep(chance.uniform(0.05, 0.15))
        one = workers.pop(chance.randrange(20))
        if one.poll() is None:
            one.kill()
            kills += 1
        one.wait()
        workers.append(worker(tmp_path, count, 0.6))
    assert [one.wait() for one in workers] == [0] * 20
    assert kills == 40
    assert len(list(tmp_path.glob("*.done"))) == count
    found = begun(tmp_path)
    lost = sum(found.values()) - count
    print(f"{kills} kills, {lost} tasks begun again, at most {max(found.values())} times one")
    assert lost <= kills

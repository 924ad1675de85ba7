"""Engines that run a study's cells: the same cells by all, and what is not there is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import study
from conftest import ROOT
from studies import compare
from test_cells import CELL

from advgame.errors import InputError
from advgame.run import engines
from advgame.run.cells import Cell, run_cells
from advgame.run.engines import Local, Place, Slurm, check_engine, gpu_slots
from advgame.run.study import StudyConfig, hardware


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "cell.py"
    path.write_text(CELL)
    return path


def cells(script, root, count=4, wait="0.1"):
    return [Cell(script, root / f"c{n}", ["--wait", wait]) for n in range(count)]


@pytest.mark.parametrize(
    ("gpus", "per_cell", "jobs", "slots"),
    [
        ([], None, 3, [None, None, None]),
        ([], 0, 2, ["", ""]),
        (["0", "1"], None, 3, ["0", "1", "0"]),
        (["0", "1"], 0, 2, ["", ""]),
        (["2", "5"], 1, 2, ["2", "5"]),
        (["0", "1"], 0.5, 4, ["0", "1", "0", "1"]),
        (["0", "1", "2", "3", "4"], 2, 2, ["0,1", "2,3"]),
        (["0"], 1 / 3, 3, ["0"] * 3),
    ],
)
def test_gpus_are_shared_out(gpus, per_cell, jobs, slots):
    assert gpu_slots(gpus, per_cell, jobs) == slots


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "rey"}, "unknown engine 'rey': did you mean ray?"),
        ({"ray_address": "auto"}, "--ray-address is for --engine ray"),
        ({"slurm_partition": "gpu"}, "--slurm-partition is for --engine slurm"),
        ({"gpus_per_cell": 1.0}, "has 0 GPU(s) that can be used, enough for 0 cell(s)"),
        ({"gpus_per_cell": -1.0}, "a share, such as 0.5, or a whole number, not -1"),
        ({"gpus_per_cell": 1.5}, "not 1.5"),
        ({"engine": "slurm", "gpus_per_cell": 0.5}, "whole GPUs only"),
        ({"engine": "slurm"}, "there is no sbatch here"),
    ],
)
def test_what_is_not_there_is_refused(settings, said, monkeypatch):
    monkeypatch.setattr(engines, "cuda_devices", lambda: 0)
    monkeypatch.setattr(engines.importlib, "import_module", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError) as refusal:
        check_engine(StudyConfig(**settings))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_extra_that_is_not_installed_is_named(engine, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    asked = compare.Config(engine=engine, runs_dir=str(tmp_path / "runs"), out=str(tmp_path / "o"))
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'advgame\[{engine}\]'"):
        compare.main(asked)
    assert not list(tmp_path.iterdir())


def test_a_study_in_its_own_process_has_no_engine():
    one = study.import_module("studies.attnet")
    with pytest.raises(InputError, match="no --jobs, no --engine"):
        one.main(one.Config(engine="ray"))


def test_a_study_whose_engine_is_not_there_leaves_nothing(tmp_path, monkeypatch):
    """Ray alone knows whether a cluster is at its address ``auto``."""

    class Away(Local):
        def start(self, roots):
            raise InputError("no cluster")

    monkeypatch.setattr("advgame.run.study.make_engine", lambda config: Away([None]))
    where = {"runs_dir": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match="no cluster"):
        compare.main(compare.Config(methods=("standard",), seeds=1, **where))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "nothing answers there"), ("nowhere", "auto or HOST:PORT"), (":1", "HOST")],
)
def test_an_address_where_nothing_answers_is_refused_at_once(address, said):
    with pytest.raises(InputError, match=said):
        engines._check_address(address)


def test_hardware_tells_the_threads():
    assert hardware([{}], 2) == "cpu; 2 process(es), a thread each"
    assert hardware([{}], 2, 4) == "cpu; 2 process(es), 4 threads each"


def test_a_cell_begins_when_what_it_needs_is_finished_and_two_are_kept_busy(script, tmp_path):
    """Two trainings and their evaluations: none waits for a script."""
    root, order = tmp_path / "runs", []

    class Noting(Local):
        def run(self, cell):
            order.append((cell.folder.parent.name, cell.folder.name))
            super().run(cell)

    todo = [Cell(script, root / "s", ["--wait", "0.6"])]
    for name in ("a", "b"):
        todo.append(Cell(script, root / name, ["--wait", "0"]))
        after = [root / name, root / "s"]
        todo.append(Cell(script, root / "judged" / name, ["--wait", "0"], after))
    run_cells(todo, Noting([None, None]), 2)
    assert order[:3] == [("runs", "s"), ("runs", "a"), ("runs", "b")], "the second is not idle"
    assert sorted(order[3:]) == [("judged", "a"), ("judged", "b")]
    assert all(cell.finished for cell in todo)


def test_compare_evaluates_a_cell_when_it_and_the_surrogate_are_trained(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        "advgame.run.study.run_cells", lambda cells, engine, jobs, begun: ran.extend(cells)
    )
    asked = compare.Config(
        methods=("pgd-at", "las-at"),
        seeds=1,
        attacks=("fgsm", "transfer"),
        runs_dir=str(tmp_path),
        out=str(tmp_path),
    )
    one = compare.Compare(asked)
    one.run(one.cells())
    told = [(cell.script.stem, cell.folder.name) for cell in ran]
    assert told == [
        ("train", "pgd-at-seed1000"),
        ("train", "pgd-at-seed0"), ("evaluate", "pgd-at-seed0"),
        ("train_las_at", "las-at-seed0"), ("evaluate", "las-at-seed0"),
    ]  # fmt: skip
    assert [path.name for path in ran[2].after] == ["pgd-at-seed0", "pgd-at-seed1000"]


def test_compare_begins_what_took_longest_and_what_is_new_first_within_a_seed(tmp_path):
    asked = compare.Config(
        methods=("fast", "trades", "mart", "pgd-at"), seeds=2, first_seed=1, out=str(tmp_path)
    )
    one = compare.Compare(asked)
    names = list(one.cells())
    assert list(one.long_ones_first(one.cells())) == names, "nothing is known"
    took = {"fast": 3.0, "trades": 50.0, "pgd-at": 40.0}
    runs = [
        {"method": game, "seed": 0, "epochs": 10, "seconds_per_epoch": seconds}
        for game, seconds in took.items()
    ]
    one.path.write_text(json.dumps({"extra": one.same(), "runs": runs}))
    order = list(one.long_ones_first(one.cells()))
    assert order == [
        f"{game}-seed{seed}" for seed in (1, 2) for game in ("mart", "trades", "pgd-at", "fast")
    ]
    assert list(one.cells()) == names, "results are read in the order of the games"


def test_each_process_sees_its_own_gpu_and_its_threads(script, tmp_path):
    script.write_text(
        "import json, os, sys\nfrom pathlib import Path\n"
        "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "folder = Path(words['--runs-dir']) / words['--name']\nfolder.mkdir(parents=True)\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')\n"
        "(folder / 'report.json').write_text(json.dumps([os.environ[one] for one in names]))\n"
    )
    todo = cells(script, tmp_path / "runs", 2)
    run_cells(todo, Local(["3", "7"], 2), 2)
    found = [json.loads((cell.folder / "report.json").read_text()) for cell in todo]
    assert sorted(found) == [["3", "2"], ["7", "2"]]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a child can end with its parent")
def test_a_cell_ends_with_the_process_that_runs_it(script, tmp_path):
    """Else it held its folder's lock, and who takes over would be refused."""
    code = (
        "import sys; from pathlib import Path; from advgame.run.cells import Cell, run_cell;"
        "run_cell(Cell(Path(sys.argv[1]), Path(sys.argv[2]), ['--wait', '60']), {})"
    )
    folder = tmp_path / "runs" / "a"
    words = [sys.executable, "-c", code, str(script), str(folder)]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT) as study:
        while not (folder / "began").exists():
            time.sleep(0.02)
        child = f"/proc/{study.pid}/task/{study.pid}/children"
        (number,) = Path(child).read_text().split()
        study.send_signal(signal.SIGKILL)
    limit = time.monotonic() + 10
    while os.path.exists(f"/proc/{number}/fd/1") and time.monotonic() < limit:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{number}/fd/1")


def test_a_machine_that_does_not_see_the_folder_says_so(script, tmp_path):
    root = tmp_path / "runs"
    place = Place.here([root], 1)
    assert place.missing() == ""
    (cell,) = cells(script, root, 1)
    (token,) = place.tokens
    token.write_text("of another study")
    assert "does not see" in place.run(cell)
    assert "--runs-dir must lie on storage that all machines share" in place.run(cell)
    assert "where the study was started" in replace(place, cwd=root / "no", tokens={}).missing()
    assert not cell.folder.exists()
    place.clear()
    assert not list(root.iterdir())


def test_a_job_that_slurm_does_not_take_fails_in_a_line_and_the_others_end(
    script, tmp_path, monkeypatch
):
    """Any error but InputError cancels what is under way."""
    pytest.importorskip("submitit")
    said = "sbatch: error: invalid partition specified: nowhere"
    for name in ("sbatch", "srun"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=f"^c0 was not submitted: {said}$"):
        run_cells(cells(script, tmp_path / "runs", 1), Slurm({"slurm_partition": "nowhere"}), 1)


CANCELLED = """
import signal, sys
from pathlib import Path
from advgame.run.cells import Cell
from advgame.run.engines import Place, _Requeued

signal.signal(signal.SIGTERM, lambda number, frame: print("bypassed"))  # as submitit does
cell = Cell(Path(sys.argv[1]), Path(sys.argv[2]), ["--wait", "60"])
print(_Requeued(Place.here([], 1), cell)())
"""


def test_the_cell_of_a_job_that_is_cancelled_is_asked_to_end(script, tmp_path):
    """SLURM may ask submitit's process alone; the cell was killed 30 seconds later."""
    folder = tmp_path / "runs" / "a"
    words = [sys.executable, "-c", CANCELLED, str(script), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        while not (folder / "began").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=30)
    assert (folder / "stopped").read_text() == "once "
    assert said.startswith("a failed, its last words")


def test_a_job_may_reach_its_time_limit_more_often_than_submitit_allows(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    path = tmp_path / "srun"
    path.write_text("")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    engine = Slurm({"timeout_min": 5})
    engine.start([tmp_path / "runs"])
    engine.close()
    assert engine._executor._executor.max_num_timeout == 1000, "its own is 3"


def test_more_threads_than_any_machine_has_are_refused_by_ray(script, tmp_path, monkeypatch):
    """Ray itself would wait for such a machine, without an end."""
    ray = pytest.importorskip("ray")
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in (4.0, 8.0)]
    for name, found in {"init": None, "nodes": nodes, "shutdown": None}.items():
        monkeypatch.setattr(ray, name, lambda found=found, **how: found)
    with pytest.raises(InputError, match="--threads 9: the machines of the cluster have 8 CPUs"):
        run_cells(cells(script, tmp_path / "runs", 1), engines.Ray("", None, 9), 1)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_slurm_runs_the_same_cells_by_submitit(cluster, script, tmp_path):
    pytest.importorskip("submitit")
    todo = cells(script, tmp_path / "runs", 3)
    run_cells(todo, Slurm({"timeout_min": 5}, cluster=cluster), 2)
    assert all(cell.finished for cell in todo)
    bad = [Cell(script, tmp_path / "runs" / "bad", ["--fail", "too bad"])]
    with pytest.raises(InputError, match="bad failed, its last words: too bad"):
        run_cells(bad, Slurm({"timeout_min": 5}, cluster=cluster), 1)
    assert not list((tmp_path / "runs").glob(".token*"))


def driven(code, *words):
    """Run code in a process of its own, where Ray's threads and signals stay."""
    # Ray's own niceness of 15 would leave cells waiting beside any other work
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_all_engines_leave_the_same_weights(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("submitit")
    driven(ALL, ROOT / "scripts" / "train.py", tmp_path)
    weights = {
        path.parents[2].name: path.read_bytes()
        for path in tmp_path.glob("*/cell/checkpoints/last.safetensors")
    }
    assert weights.keys() == {"local", "ray", "slurm"}
    assert len(set(weights.values())) == 1


ALL = """
import sys
from pathlib import Path
from advgame.run.cells import Cell, run_cells
from advgame.run.engines import Local, Ray, Slurm

script, root = map(Path, sys.argv[1:])
flags = "--game pgd-at --train-n 100 --epochs 1 --batch-size 50 --attacks fgsm --eval-n 20".split()
slurm = Slurm({"timeout_min": 5}, cluster="local")
for name, engine in {"local": Local([None]), "slurm": slurm, "ray": Ray("", None, 1)}.items():
    run_cells([Cell(script, root / name / "cell", flags)], engine, 1)
"""


@pytest.mark.slow
def test_ray_runs_cells_and_goes_on_when_a_machine_is_lost(script, tmp_path):
    """Three machines, which this one plays; the one that is at work on a cell is killed."""
    pytest.importorskip("ray")
    done = driven(RAY, script, tmp_path / "runs")
    began = {p.parent.name: p.read_text() for p in (tmp_path / "runs").glob("*/began")}
    assert len(list((tmp_path / "runs").glob("*/report.json"))) == 4
    again = [name for name, text in began.items() if text == "once once "]
    assert len(again) == 1, "the lost machine's cell, and no other, began a second time"
    assert set(began.values()) == {"once ", "once once "}
    assert "the machines of the cluster have 0 at most" in done.stdout


RAY = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from advgame.errors import InputError
from advgame.run.cells import Cell, run_cells
from advgame.run.engines import Ray

script, root = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
todo = [Cell(script, root / f"c{n}", ["--wait", "3"]) for n in range(4)]

def lose():
    while not list(root.glob("*/began")):
        time.sleep(0.05)
    time.sleep(0.5)
    cluster.remove_node(nodes[0], allow_graceful=False)

killer = threading.Thread(target=lose, daemon=True)
killer.start()
run_cells(todo, Ray(cluster.address, None, 1), 3)
killer.join()
try:
    run_cells([Cell(script, root / "d", [])], Ray(cluster.address, 1.0, 1), 1)
except InputError as problem:
    print(problem)
cluster.shutdown()
"""

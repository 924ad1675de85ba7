"""The plan for a borrowed GPU, rehearsed: what is packed and restored, time limits, failures."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gpu_plan
import pytest
import torch
import tyro
from conftest import ROOT, multiplications
from plan_parts import bad, crash, good, hang, leave
from plans import packing, running, sizes, start, steps
from plans.running import Record, Step, play

from advgame.classifiers import make_classifier
from advgame.errors import InputError

# what is carried and restored


def batch(rng, images):
    """A file built as Python 2's pickles of CIFAR-10 are: the pixels are one string in it."""
    pixels = bytes(torch.randint(256, (images * 3072,), generator=rng, dtype=torch.uint8).tolist())
    before = b"\x80\x02}q\x01(U\x04dataq\x02T\x01\x00\x00\x00x"
    return before + b"T" + len(pixels).to_bytes(4, "little") + pixels + b"q\x03U\x06labels]e." * 9


@pytest.fixture
def cifar(tmp_path, rng):
    """A folder like CIFAR-10's, of few images."""
    folder = tmp_path / "theirs" / packing.FOLDER
    folder.mkdir(parents=True)
    for number, name in enumerate(packing.BATCHES):
        (folder / name).write_bytes(batch(rng, 99 + number))
    (folder / "batches.meta").write_bytes(b"names")
    return folder.parent


def test_images_come_back_byte_for_byte_from_parts_of_the_size_asked_for(cifar, tmp_path):
    folder = tmp_path / "plan"
    about = packing.pack(folder, cifar, 1.5, packages=(), words=["--minutes", "9"])
    assert len(about["parts"]) > 2
    assert {path.name for path in folder.iterdir()} == {"start.py", "parts.json", *about["parts"]}
    assert all(path.stat().st_size <= 1.5e6 for path in folder.iterdir())
    start.unpack(folder, about, tmp_path / "unpacked")
    restored = packing.restore(tmp_path / "unpacked")
    for name in (*packing.BATCHES, "batches.meta"):
        own = (restored / packing.FOLDER / name).read_bytes()
        assert own == (cifar / packing.FOLDER / name).read_bytes()
    code = tmp_path / "unpacked" / "code"
    for name in ("scripts/plans/steps.py", "tests/test_gpu.py", "pyproject.toml"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(code.rglob("__pycache__"))


def test_images_that_changed_on_the_way_are_refused(cifar, tmp_path):
    packing.pack(tmp_path / "plan", cifar, 60, packages=())
    about = json.loads((tmp_path / "plan" / "parts.json").read_text())
    start.unpack(tmp_path / "plan", about, tmp_path / "unpacked")
    rest = tmp_path / "unpacked" / "data" / "test_batch.rest"
    rest.write_bytes(rest.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="test_batch is not what was packed"):
        packing.restore(tmp_path / "unpacked")


def test_a_part_that_did_not_arrive_or_is_damaged_is_named(tmp_path, capsys):
    folder, root = tmp_path / "plan", tmp_path / "unpacked"
    about = packing.pack(folder, None, 0.5, packages=())
    first, *_, last = about["parts"]
    whole = (folder / last).read_bytes()
    (folder / last).unlink()
    for problem in (f"{last} of {len(about['parts'])} parts did not arrive", "is damaged"):
        with pytest.raises(SystemExit) as end:
            start.unpack(folder, about, root)
        assert end.value.code == 2
        assert problem in capsys.readouterr().err
        assert not root.exists()
        (folder / last).write_bytes(whole[:-1] + b"!")
    (folder / last).write_bytes(whole)
    start.unpack(folder, about, root)
    assert (root / "code" / "scripts" / "gpu_plan.py").exists()
    assert first == "part1of" + str(len(about["parts"]))


def test_packages_are_carried_without_their_examples(tmp_path):
    about = packing.pack(tmp_path / "plan", None, 60)
    start.unpack(tmp_path / "plan", about, tmp_path / "unpacked")
    site = tmp_path / "unpacked" / "site"
    assert {"gymnasium", "stable_baselines3", "sb3_contrib", "tyro"} <= {
        p.name for p in site.iterdir()
    }
    assert not list(site.rglob("examples"))
    code = tmp_path / "unpacked" / "code"
    (weights,) = code.rglob("*.safetensors")  # of the zoo's only those that the tests load
    assert weights.relative_to(code).as_posix().startswith(packing.LOADED)
    words = [sys.executable, "-c", "from advgame.targets import shipped; shipped()"]
    subprocess.run(words, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, check=True)
    assert sum(path.stat().st_size for path in (tmp_path / "plan").iterdir()) < 4e6


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({}, "say --pack DIR here, or --run DIR"),
        ({"pack": "a", "run": "b"}, "say --pack DIR here, or --run DIR"),
        ({"pack": "new"}, "say where CIFAR-10 lies: --data-dir"),
        ({"pack": "full", "miniature": True}, "is there already"),
        ({"pack": "new", "miniature": True, "max_mb": 0.1}, "0.2 is the least"),
        ({"pack": "new", "miniature": True, "packages": ("numpy",)}, "numpy: it is not pure Py"),
        ({"pack": "new", "miniature": True, "packages": ("nnn",)}, "nnn: it is not installed"),
        ({"pack": "new", "data_dir": "full"}, "there is no .*data_batch_1"),
        (
            {"pack": "new", "miniature": True, "steps": ("tset",)},
            "unknown step .tset.: choose from",
        ),
        ({"run": "full"}, "is no plan that start.py unpacked"),
        ({"run": "full", "minutes": 0.0}, "minutes must be above 0"),
        ({"run": "full", "data_dir": "d"}, "--run makes no use of --data-dir"),
        ({"pack": "new", "miniature": True, "out": "o"}, "--pack makes no use of --out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings, answer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match=answer):
        gpu_plan.main(gpu_plan.Config(**settings))
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_file_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        packing.pixels(b"T\x00\x0c\x00\x00" + bytes(100), tmp_path / "x")


# steps within a time limit


def step(do, name=None, least=0.0, most=60.0, needs=()):
    return Step(name or do.__name__, do, least, most, needs)


def played(tmp_path, *chosen, seconds=60.0):
    record = Record(tmp_path / "out.json", {"command": "test"})
    states = play(chosen, None, tmp_path, record, time.time() + running.SPARE + seconds)
    found = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert {name: row["state"] for name, row in found.items()} == states
    return found


def test_what_fails_crashes_or_leaves_takes_no_other_step_with_it(tmp_path, capsys):
    chosen = (bad, good, crash, leave)
    again = step(good, "again", needs=("good",))
    lacking = step(good, "lacking", needs=("good", "crash"))
    found = played(tmp_path, *map(step, chosen), again, lacking)
    assert found["bad"]["state"] == "failed"
    assert "InputError: it cannot be done" in found["bad"]["why"]
    assert found["bad"]["result"] == {"seen": 1}, "what it had found is kept"
    assert "exit code 7" in found["crash"]["why"]
    assert "SystemExit: 3" in found["leave"]["why"]
    assert found["again"]["result"]["before"] == ["good"]
    assert found["lacking"]["why"] == "it needs crash, which was not done"
    assert "bad: failed, advgame.errors.InputError: it cannot be done" in capsys.readouterr().out


def test_steps_that_end_well_share_a_process(tmp_path):
    found = played(tmp_path, step(good, "one"), step(good, "two"))
    assert found["one"]["result"]["pid"] == found["two"]["result"]["pid"] != os.getpid()


def test_a_process_that_died_between_steps_is_noted_and_replaced(tmp_path):
    worker = running.Worker()
    work = running.Work(None, tmp_path, {}, time.time() + 60)
    _, told = worker.do(good, work, lambda facts: None)
    os.kill(told["pid"], signal.SIGKILL)
    worker._process.join()
    found = worker.do(good, work, lambda facts: None)
    assert found == ("failed", "its process died with exit code -9")
    assert worker.do(good, work, lambda facts: None)[0] == "done"
    worker.stop()


def test_a_step_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    began = time.monotonic()
    # a worker that is there already: its start may take longer than the step may on a busy machine
    found = played(tmp_path, step(good, "before"), step(hang, most=2.0), step(good))
    assert time.monotonic() - began < 30
    assert found["hang"]["state"] == "out of time"
    child = found["hang"]["result"]["child"]
    for _ in range(100):
        try:
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                break
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("its child lives on")
    assert found["good"]["state"] == "done"


def test_a_step_that_does_not_fit_is_skipped_and_a_smaller_one_is_not(tmp_path):
    found = played(tmp_path, step(good, "long", least=50.0), step(good, "short"), seconds=30.0)
    assert found["long"]["state"] == "skipped"
    assert found["long"]["why"].startswith("it asks for 50 s, and ")
    assert found["short"]["state"] == "done"
    found = played(tmp_path, step(good, "long", least=50.0), step(good, "short"))
    assert found["long"]["state"] == "done", "the next visit takes it"
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(content["visits"]) == 2


def test_what_is_done_is_not_done_again(tmp_path):
    first = played(tmp_path, step(good), step(bad))
    second = played(tmp_path, step(good), step(good, "bad"))
    assert first["good"] == second["good"]
    assert second["bad"]["state"] == "done"


def test_what_a_step_had_found_is_kept_where_the_next_visit_finds_nothing(tmp_path):
    first = played(tmp_path, step(bad), step(good))
    assert first["bad"]["result"] == {"seen": 1}
    skipped = played(tmp_path, step(bad, least=50.0), step(good), seconds=30.0)
    assert (skipped["bad"]["state"], skipped["bad"]["result"]) == ("skipped", {"seen": 1})
    died = played(tmp_path, step(crash, "bad"), step(good))
    assert (died["bad"]["state"], died["bad"]["result"]) == ("failed", {"seen": 1})
    assert played(tmp_path, step(good, "bad"), step(good))["bad"]["result"]["seen"] == 2


def test_results_of_a_rehearsal_are_not_taken_for_the_plans(tmp_path):
    """All of its steps are done, so that nothing would be measured."""
    (tmp_path / "parts.json").write_text(json.dumps({"commit": "none"}))
    words = ["--run", str(tmp_path), "--minutes", "0.01", "--steps", "pgd"]
    for small in ("--limits=60", "--limits=70"):
        with pytest.raises(SystemExit):
            gpu_plan.main(tyro.cli(gpu_plan.Config, args=[*words, "--miniature", small]))
    for other, what in (([], "network was small_cnn"), (["--miniature", "--images=9"], "images")):
        with pytest.raises(InputError, match=f"{what}.*--out"):
            gpu_plan.main(tyro.cli(gpu_plan.Config, args=[*words, *other]))


# what is measured


def test_operations_are_those_of_the_layers():
    plan = sizes.FULL
    forward, query = steps.operations(plan)
    model = make_classifier(plan.network, plan.shape, 10)
    assert forward == 2 * multiplications(model, torch.zeros(1, *plan.shape))
    assert forward / 1e9 == pytest.approx(1.11, abs=0.005)
    assert query == 2 * forward, "a backward to the input costs a forward"


def test_a_row_is_held_against_the_cards_rate():
    row = steps.against(rate=2.0, seconds=0.5, images=10, count=5e11)
    assert (row["images_per_second"], row["tflops"], row["share_of_matrix_product"]) == (20, 1, 0.5)


def test_every_limit_has_a_recipe_and_every_step_a_function():
    for plan in (sizes.FULL, sizes.MINIATURE):
        assert max(plan.speedruns) == math.inf
        assert list(plan.speedruns) == sorted(plan.speedruns)
        json.loads(json.dumps(asdict(plan)), parse_constant=pytest.fail)  # inf is no JSON
        found = sizes.steps(plan)
        names = [one.name for one in found]
        assert len(set(names)) == len(names)
        for number, one in enumerate(found):
            assert hasattr(steps, one.do.args[0])
            assert set(one.needs) <= set(names[:number])
            assert one.least <= one.most


def test_the_options_of_a_speedrun_are_those_of_the_training_script():
    for plan in (sizes.FULL, sizes.MINIATURE):
        for recipe in plan.speedruns.values():
            steps.train.job.parse([*plan.training.split(), *recipe.split()])


def test_no_epoch_may_fit(tmp_path):
    work = running.Work(sizes.MINIATURE, tmp_path, {"data": {"data_dir": None}}, math.inf)
    with pytest.raises(InputError, match=r"no epoch fits in 0\.001 s: one takes"):
        steps.speedrun(0.001, work)


# tests


def test_each_test_is_noted_as_it_ends(tmp_path):
    """The table comes at the end, when the time may be out."""
    noted = []
    keep = lambda facts: noted.append(json.loads(json.dumps(facts)))  # noqa: E731
    found = steps.tests(running.Work(None, tmp_path, {}, time.time() + 600, keep))
    assert len(noted) > 2
    assert len(noted[0]["so far"]) == 1
    assert len(noted[-2]["so far"]) == found["passed"] + found["skipped"]
    assert noted[-1] == found


# the rehearsal


def begin(folder, *words):
    """`start.py` on a machine that has nothing of ours, and others' packages of the same names."""
    others = folder.parent / "others"
    others.mkdir(exist_ok=True)
    for name in ("gymnasium", "tyro", "advgame", "stable_baselines3"):
        (others / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    environment = {**os.environ, "PYTHONPATH": str(others), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "start.py"), *words]
    told = {"cwd": folder.parent, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=900, **told)


def results(folder):
    return json.loads((folder / "unpacked" / "gpu_plan.json").read_text())["steps"]


@pytest.mark.slow
def test_the_whole_plan_in_miniature(tmp_path):
    """Two visits: a step fails in the first, the second takes it up and does the rest."""
    folder = tmp_path / "plan"
    words = ["--pack", str(folder), "--miniature", "--max-mb", "2", "--limits", "60"]
    gpu_plan.main(tyro.cli(gpu_plan.Config, args=words))
    parts = sorted(folder.glob("part*of*"))
    assert len(parts) > 1
    whole = parts[-1].read_bytes()
    parts[-1].unlink()
    early = begin(folder)
    assert (early.returncode, early.stderr.count("\n")) == (2, 1)
    assert f"error: {parts[-1].name} of {len(parts)} parts did not arrive" in early.stderr
    parts[-1].write_bytes(whole)

    late = begin(folder, "--minutes", "0.04")
    assert late.returncode == 1, late.stderr
    assert {row["state"] for row in results(folder).values()} == {"skipped"}

    tests = folder / "unpacked" / "code" / "tests" / "test_gpu.py"
    own = tests.read_text()
    tests.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): assert not 'broken'\n")
    first = begin(folder, "--minutes", "9", "--steps", "tests", "data")
    assert first.returncode == 1, first.stderr
    found = results(folder)
    assert (found["tests"]["state"], found["data"]["state"]) == ("failed", "done")
    assert "1 of 1 tests failed: test_it" in found["tests"]["why"]
    assert "def test_it(): assert not 'broken'" in found["tests"]["result"]["failed"]["test_it"]
    assert found["speedrun-60"]["state"] == "skipped", "of the visit before"

    tests.write_text(own)
    second = begin(folder, "--minutes", "9")
    found = results(folder)
    assert {name: row.get("why") for name, row in found.items() if row["state"] != "done"} == {}
    assert second.returncode == 0, second.stderr
    names = [one.name for one in sizes.steps(sizes.MINIATURE)]
    assert list(found) == [name for name in names if not name.endswith("-120")]
    content = {name: row["result"] for name, row in found.items()}
    assert not content["environment"]["missing"]
    assert content["tests"]["skipped"] > 5
    assert set(content["pgd"]["rows"]) >= {"floor", "advgame"}
    assert set(content["attack-env"]["rows"]) >= {"floor", "advgame"}
    for row in (content["n-fgsm"], content["las"], content["pgd"]["rows"]["advgame"]):
        assert min(row["operations"], row["share_of_matrix_product"]) > 0
        assert row["min_s"] <= row["seconds"] <= row["max_s"]
    run = content["speedrun-60"]
    assert run["epochs"] == sizes.MINIATURE.epochs
    assert run["within_limit"] == (run["training_seconds"] <= 60)
    assert run["report"]["n"] == sizes.MINIATURE.images
    assert 1 <= len(run["curve"]) <= steps.CHECKS
    checkpoints = sorted(path.name for path in Path(run["run"], "checkpoints").glob("step_*"))
    assert len(checkpoints) == 2, "as it began and as it ended"
    assert Path(run["run"]).is_relative_to(folder / "unpacked")
    judged = content["judge-60"]
    assert judged["images"] == sizes.MINIATURE.images
    assert judged["autoattack-lite"] <= min(judged["clean"], judged["interval"][1])


@pytest.mark.slow
def test_cifar_10_itself_comes_back_and_is_trained_on(real_data, tmp_path):
    folder = tmp_path / "plan"
    gpu_plan.main(gpu_plan.Config(pack=str(folder), data_dir=str(real_data), miniature=True))
    assert 90e6 < sum(path.stat().st_size for path in folder.iterdir()) < 112e6
    done = begin(folder, "--steps", "data", "environment", "n-fgsm")
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "unpacked" / "gpu_plan.json").read_text())
    assert told["visits"][0]["plan"]["training"] == sizes.COLOUR
    for name in packing.BATCHES:
        own = (folder / "unpacked" / "images" / packing.FOLDER / name).read_bytes()
        assert own == (real_data / packing.FOLDER / name).read_bytes()

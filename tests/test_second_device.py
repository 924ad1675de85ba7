"""Everything runs where tensors do not lie on the CPU: a stand-in for the GPU that is not here."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("c++") and HEADER.exists()), reason="no C++ compiler or Python.h"
    ),
]
TINY = "--train-n 96 --batch-size 32 --eval-n 20 --attacks fgsm"
TRAININGS = {
    "las": "train_las_at.py --objective trades --awp 0.01 --epochs 2",
    "ppo": "train_las_at.py --agent ppo --epochs 2",
    "free": "train.py --game free --epochs 2",
    "scatter": "train.py --game feature-scatter --epochs 2",
    "l2l": "train_l2l.py --attacker two-step --epochs 2",
    "adt": "train_adt.py --method exp-am --epochs 2",
    "exp": "train_adt.py --method exp --epochs 2",
    "minimax": "train_minimax.py --defence minimax --response-steps 3 --gap-steps 3 --epochs 2",
    "sens": "train_minimax.py --defence sens --response-steps 3 --epochs 2",
    "mixture": "train_minimax.py --defence mixture --response-steps 3 --epochs 2",
    "chase": "train_cat_and_mouse.py --rounds 3 --round-steps 3",
    "psro": "psro.py --rounds 1 --game-n 20 --epochs 2",
}
ATTACKER = "train_attacker.py --envs 16 --epochs 2 --updates 2 --validation-n 30"
ATTACKS = "fgsm,pgd20,mim,cw,fea,autoattack"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The jobs' results, on the second device; the evaluation also on the CPU."""
    folder = tmp_path_factory.mktemp("second")
    script, runs = f"{ROOT}/scripts/", f"--runs-dir {folder}"
    clean = f"{script}train.py --game standard --epochs 20 --eval-n 20 --attacks fgsm {runs}"
    jobs = [(f"{clean} --name standard", None)]
    for name, words in {**TRAININGS, "attacker": ATTACKER}.items():
        tiny = "" if name == "attacker" else TINY
        jobs.append((f"{script}{words} {tiny} {runs} --name {name}", 3 if tiny else 2))
        jobs.append((f"{script}{words.split()[0]} --resume {folder}/{name}", None))
    judged = f"{script}evaluate.py {folder}/standard --eps 0.03 --attacks {ATTACKS} --n 10 {runs}"
    jobs.append((f"{judged} --name there", None))
    learned = f"--attackers {folder}/l2l {folder}/adt {folder}/attacker"
    jobs.append((f"{judged} {learned} --name learned", None))
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"words": w.split(), "stop_at": stop} for w, stop in jobs]))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "tests/second_device.py"), str(folder), str(path)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    here = [sys.executable, *judged.split(), "--name", "here"]
    subprocess.run(here, cwd=ROOT, env=env, capture_output=True, check=True)
    return folder, json.loads((folder / "results.json").read_text())


def test_the_device_refuses_what_a_gpu_would(found):
    sums, choices, chance, arrays = found[1]["refusals"]
    assert "same device" in sums
    assert "meets a tensor of the CPU" in choices
    assert "a generator of the CPU" in chance
    assert "convert" in arrays


def test_every_game_trains_stops_and_goes_on_there(found):
    assert {words: error for words, error in found[1]["jobs"].items() if error} == {}


def test_verdicts_are_the_cpus(found):
    there, here = ((found[0] / name / "verdicts.csv").read_text() for name in ("there", "here"))
    assert there == here
    rows = [line.split(",")[2:] for line in here.splitlines()[1:]]
    assert {"0", "1"} == {row[-1] for row in rows}, "some survive and some do not"

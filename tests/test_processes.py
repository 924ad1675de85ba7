"""A training in several processes: what is refused, what they agree on, and an end of one."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
from conftest import ROOT
from torch import nn

from advgame.attacks import pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import verdicts
from advgame.evaluation.judge import help_judging, judge_classifier
from advgame.run.accelerators import check_world
from advgame.run.callback import Callback, Hooks
from advgame.run.checkpoint import save_weights
from advgame.run.devices import left_alone
from advgame.run.folder import RunFolder
from advgame.run.job import resume_settings
from advgame.run.loop import Trainer
from advgame.threat import Linf
from agents.reinforce import averaging

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "nodes", "devices", "said"),
    [
        ({}, 1, 2, ""),  # Fabric starts them itself
        ({"WORLD_SIZE": "2"}, 1, 2, ""),  # which it has
        ({}, 2, 1, "--nodes 2: start it on each machine by torchrun or srun"),
        ({**TORCHRUN, "WORLD_SIZE": "4"}, 2, 2, ""),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, 1, 1, "torchrun has started 2 process"),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, 2, 1, "torchrun has started 1 process"),
        ({"SLURM_NTASKS": "8"}, 1, 1, ""),  # of an allocation, in which no step was begun
        ({"SLURM_STEP_NUM_TASKS": "8"}, 2, 4, ""),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 1, 1, "srun has started 8 process(es), and --nodes 1"),
    ],
)
def test_a_launcher_must_have_started_what_is_asked_for(
    environment, nodes, devices, said, monkeypatch
):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not said:
        check_world(nodes, devices)
        return
    with pytest.raises(InputError) as refusal:
        check_world(nodes, devices)
    assert said in str(refusal.value)


def test_a_training_is_refused_before_it_makes_a_folder(refused, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(train, [], "torchrun has started 2 process(es), and --nodes 1 times --devices 1 is 1")


def test_only_what_collectives_say_is_the_end_of_another_process():
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    assert left_alone(gone)
    assert left_alone(torch.distributed.DistBackendError("NCCL error"))
    assert not left_alone(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_all_processes_attack_the_same_network():
    """Each saw its own images: batch norm's statistics are averaged, its counter is not."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    defender = Defender(net, lr=0.1)
    x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    other = torch.tensor([1.0, 2, 3, 4, 5, 6])
    defender.fabric = SimpleNamespace(
        world_size=2, all_reduce=lambda mine: (mine + other) / 2, backward=defender.fabric.backward
    )
    before = []
    step = defender._wrapped_optimizer.step

    def stepping():
        before.extend([net[2].running_mean.clone(), net[2].running_var.clone()])
        step()

    defender._wrapped_optimizer.step = stepping
    defender.backward(x, y)
    defender.step()
    assert torch.equal(net[2].running_mean, (before[0] + other[:3]) / 2)
    assert torch.equal(net[2].running_var, (before[1] + other[3:]) / 2)
    assert int(net[2].num_batches_tracked) == 1


def test_all_processes_attack_by_the_same_network():
    """What learns to attack: its gradients, and batch norm's statistics."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    (net(torch.rand(4, 2)) ** 3).sum().backward()
    buffers = net[1].running_mean, net[1].running_var
    before = [one.clone() for one in (net[0].weight.grad, *buffers)]
    averaging(SimpleNamespace(world_size=2, all_reduce=lambda mine: (mine + 1) / 2))(net)
    for one, mine in zip((net[0].weight.grad, *buffers), before, strict=True):
        assert torch.equal(one, (mine + 1) / 2)
    assert averaging(SimpleNamespace(world_size=1)) is None


def test_metrics_are_means_over_processes(monkeypatch):
    """A statistic that one process alone has is that one's."""

    def gather(every, mine):
        every[:] = [mine, {"a": 3.0, "b": 5.0}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = SimpleNamespace(fabric=SimpleNamespace(world_size=2))
    assert Trainer._agreed(trainer, {"a": 1.0, "c": 7.0}) == {"a": 2.0, "c": 7.0}
    assert Trainer._agreed(SimpleNamespace(fabric=SimpleNamespace(world_size=1)), {"a": 1}) == {
        "a": 1
    }


@pytest.mark.parametrize(("mine", "others"), [(0.125, 0.0625), (0.0625, 0.125)])
def test_signals_are_asked_for_about_once_a_second_and_at_the_end_of_epochs(
    mine, others, monkeypatch
):
    """Of two processes the slower one's second counts, and both ask at the same steps."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("advgame.run.loop.time.monotonic", lambda: clock.now)
    hooks, found = SimpleNamespace(told_of_steps=False), []
    one = SimpleNamespace(hooks=hooks, stopped_by=None, _asked=(0, 0.0), _asked_at=0)
    for step in range(1, 41):
        told = torch.tensor([15.0 if step > 12 else 0.0, 0.0, others])
        one.fabric = SimpleNamespace(
            world_size=2, device="cpu", all_reduce=lambda x, reduce_op, t=told: torch.maximum(x, t)
        )
        one.step, clock.now = step, clock.now + mine
        before = one._asked
        signal_number, enough = Trainer._asked_to_stop(one, None, last=step == 40)
        assert not enough
        if one._asked != before:
            found.append((step, signal_number))
    assert found == [(1, 0), (9, 0), (17, 15), (25, 15), (33, 15), (40, 15)]


def test_a_callback_that_looks_at_steps_has_all_ask_at_each():
    class Looking(Callback):
        def on_step(self, trainer, stats):
            return None

    assert Hooks([Looking()]).told_of_steps
    assert not Hooks([Callback()]).told_of_steps


def test_another_number_of_processes_is_refused_with_the_reason(tmp_path):
    config = train.job.defaults()
    RunFolder.create(tmp_path / "run", asdict(config), "cpu")
    with pytest.raises(InputError, match=r"devices=1, not 2 \(each process.*leave --devices away"):
        resume_settings(tmp_path / "run", replace(config, devices=2), {"devices"})


def test_a_process_that_helps_leaves_the_first_one_nothing_to_attack(tmp_path, victim, digits):
    run, few, ball = RunFolder.create(tmp_path / "run", {}, "cpu"), digits.test.first(20), Linf(0.1)
    save_weights(victim, run.path / "checkpoints" / "best.safetensors")
    own = {"learned:own": pgd(ball, 2)}
    help_judging(run, victim, few, ball, ("fgsm",), 3, own)
    asked = {"dataset": "digits", "weights": "best", "seed": 3, "tell": (lines := []).append}
    judge_classifier(run, victim, few, ball, ("fgsm",), extra=own, **asked)
    assert not [line for line in lines if "on images" in line]


@pytest.mark.parametrize("batch", [500, 20])
def test_processes_share_the_batches_of_a_validation(batch, victim, digits, monkeypatch):
    """Each finds what one alone finds; none attacks what another does."""
    monkeypatch.setattr(verdicts, "_BATCH", batch)
    few, attacked = digits.validation.first(50), []

    def attack(model, data, attack=None, rng=None):
        attacked.append(len(data))
        return withstand(model, data, attack, rng)

    withstand = verdicts.withstand
    monkeypatch.setattr(verdicts, "withstand", attack)
    alone = verdicts.validator(few, Linf(0.2), 0)(victim)
    whole, shares = sum(attacked), []

    def reduce(rank, said):
        def all_reduce(mine, reduce_op):
            shares.append(mine)
            return mine if said is None else mine + said

        return SimpleNamespace(global_rank=rank, world_size=2, all_reduce=all_reduce)

    verdicts.validator(few, Linf(0.2), 0, fabric=reduce(0, None))(victim)
    attacked.clear()
    found = verdicts.validator(few, Linf(0.2), 0, fabric=reduce(1, shares[0]))(victim)
    assert found == alone
    assert 0 < sum(attacked) < 0.7 * whole
    assert not (shares[0] & shares[1]).any()


TINY = [
    *("--game", "pgd-at", "--train-n", "128", "--epochs", "6", "--batch-size", "32"),
    *("--validate-every", "3", "--attacks", "fgsm,pgd20", "--eval-n", "20", "--accelerator", "cpu"),
]
SCRIPT = str(ROOT / "scripts" / "train.py")
TWO = [sys.executable, SCRIPT, *TINY, "--devices", "2", "--name"]


def run_of(folder):
    """Weights, and metrics without their times."""
    weights = (folder / "checkpoints" / "last.safetensors").read_bytes()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return weights, [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def how():
    """What the processes of these tests are started with."""
    return {"env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, "text": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory, how):
    """A training in two processes on this machine, that nothing stopped."""
    root = tmp_path_factory.mktemp("two")
    subprocess.run([*TWO, "one"], cwd=root, **how, **QUIET, check=True)
    return root / "runs" / "one"


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_machine(one, how):
    """By torchrun on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    words = [SCRIPT, *TINY, "--nodes", "2", "--name", "nodes"]
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), *words], cwd=one.parents[1], **how, **QUIET
        )
        for rank in range(2)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert run_of(one.parent / "nodes") == run_of(one)


@pytest.mark.slow
def test_the_report_that_processes_share_is_that_of_one(one, how):
    words = ["runs/one", "--n", "20", "--attacks", "fgsm,pgd20", "--accelerator", "cpu"]
    judge = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *words, "--name", "judged"]
    subprocess.run(judge, cwd=one.parents[1], **how, **QUIET, check=True)
    shared, alone = (path / "verdicts.csv" for path in (one, one.parent / "judged"))
    assert shared.read_bytes() == alone.read_bytes()
    assert not [path for path in one.glob("evaluation/.claims/*") if path.is_file()]


@pytest.mark.slow
def test_processes_share_the_report_of_adt_by_the_same_generator(tmp_path, how):
    """Its batch norm has seen other images in each process: a helper with another is refused."""
    words = [sys.executable, str(ROOT / "scripts" / "train_adt.py"), "--method", "exp-am"]
    words += ["--generator", "resnet-3blocks", "--ngf", "4", "--train-n", "64", "--epochs", "1"]
    words += ["--batch-size", "16", "--attacks", "fgsm", "--eval-n", "20", "--draws", "2"]
    words += ["--devices", "2", "--accelerator", "cpu", "--name", "adt"]
    done = subprocess.run(words, cwd=tmp_path, **how, check=True, capture_output=True)
    assert "error" not in done.stderr
    report = json.loads((tmp_path / "runs" / "adt" / "report.json").read_text())
    assert list(report["accuracy"]) == ["clean", "fgsm", "learned:exp-am-worst-of-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGKILL, 1, "another process of this training has ended or is silent"),
    ],
)
def test_a_process_that_is_stopped_or_killed_ends_the_training_which_goes_on(
    number, code, said, one, how
):
    """The second process; the first one ends in time, and its line has the command to go on."""
    name, root = number.name, one.parents[1]
    metrics = root / "runs" / name / "metrics.csv"
    with subprocess.Popen([*TWO, name], stderr=subprocess.PIPE, cwd=root, **how) as main:
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.05)
        (other,) = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
        os.kill(int(other), number)
        assert main.wait(30) == code
        lines = [line for line in main.stderr.read().splitlines() if said in line]
    (line,) = set(lines)  # of a signal both tell
    assert line.endswith(f"train.py --resume runs/{name}")
    again = [sys.executable, SCRIPT, "--resume", f"runs/{name}"]
    subprocess.run(again, cwd=root, **how, **QUIET, check=True)
    assert run_of(root / "runs" / name) == run_of(one)

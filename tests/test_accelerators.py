"""What a training has by default depends on the machine: a GPU, a CPU with bf16, another CPU."""

import ctypes

import numpy as np
import pytest
import torch
import train
import train_adt
import train_l2l
import train_las_at
import train_minimax

from advgame.run import accelerators, settings

CIFAR = ["--dataset", "cifar10"]


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without a GPU, and with or without bf16."""

    def make(*, gpu, bf16=True):
        monkeypatch.setattr(accelerators, "has_cuda", lambda: gpu)
        monkeypatch.setattr(settings, "has_bf16", lambda: bf16)

    return make


@pytest.mark.parametrize("script", [train, train_las_at])
def test_colour_images_get_the_large_network_on_a_gpu_only(script, machine):
    machine(gpu=True)
    large = script.job.parse(CIFAR)
    assert (large.model, large.precision, large.epochs) == ("preact_resnet18", "auto", 30)
    asked = script.job.parse([*CIFAR, "--accelerator", "cpu"])
    machine(gpu=False)
    lean = script.job.parse(CIFAR)
    assert (lean.model, lean.precision) == ("lean_resnet", "bf16-mixed")
    assert (asked.model, asked.epochs) == (lean.model, lean.epochs)
    assert script.job.parse([*CIFAR, "--accelerator", "cuda"]).model == "preact_resnet18"
    assert script.job.parse([*CIFAR, "--model", "resnet18"]).model == "resnet18"


def test_without_a_gpu_an_attacker_asks_for_less_than_its_classifier(machine):
    found = []
    for gpu in (True, False):
        machine(gpu=gpu)
        adt = train_adt.job.parse([*CIFAR, "--method", "exp-am"])
        played = train_las_at.job.parse(CIFAR).policy_network, train_l2l.job.parse(CIFAR).width
        found.append((*played, adt.generator, adt.attacker_lr))
    assert found == [
        (None, "slim", "resnet-3blocks", 2e-4),
        ("lean_resnet-half", "small", "small", 2e-3),
    ]
    asked = ["--method", "exp-am", "--generator", "resnet-3blocks", "--ngf", "16"]
    assert train_adt.job.parse([*CIFAR, *asked]).ngf == 16


def test_digits_and_published_settings_do_not_depend_on_the_machine(machine):
    found = []
    for gpu in (True, False):
        machine(gpu=gpu)
        found.append((train.job.parse([]), train.job.parse(["--preset", "repo", *CIFAR])))
    assert found[0] == found[1]
    assert found[0][0].precision == "auto"


def test_a_cpu_without_bf16_stays_in_full_precision(machine):
    machine(gpu=False, bf16=False)
    assert train.job.parse(CIFAR).precision == "32-true"
    machine(gpu=False)
    assert train_minimax.job.parse(CIFAR).precision == "32-true", "it takes nothing else"


@pytest.mark.slow
def test_colour_images_train_in_bf16_and_are_judged_in_full_precision(machine, tmp_path):
    machine(gpu=False)
    rng = np.random.default_rng(0)
    parts = {"train": 64, "val": 16, "test": 16}
    images = {
        f"{name}_images": rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        for name, n in parts.items()
    }
    labels = {f"{name}_labels": np.arange(n) % 4 for name, n in parts.items()}
    np.savez(tmp_path / "own.npz", **images, **labels)
    words = f"--game fgsm-at --data {tmp_path}/own.npz --epochs 1 --batch-size 32 --attacks fgsm"
    config = train.job.parse([*words.split(), "--runs-dir", str(tmp_path / "runs")])
    seen = []

    class Job(type(train.job)):
        def classifier(self, *args, **more):
            module = super().classifier(*args, **more)
            module.stem.register_forward_hook(lambda _, x, out: seen.append(out.dtype))
            return module

    run = Job().run(config)
    about = run.about()["config"]
    assert (about["model"], about["precision"]) == ("lean_resnet", "bf16-mixed")
    assert {torch.bfloat16, torch.float32} == set(seen), "training, then validation and report"
    assert run.report()["n"] == 16


class Driver:
    """CUDA's driver, which answers a call with 0 where all is well."""

    def __init__(self, begins, devices):
        self.begins, self.devices = begins, devices

    def cuInit(self, flags):
        return self.begins

    def cuDeviceGetCount(self, count):
        count.value = self.devices
        return 0


@pytest.mark.parametrize(
    ("driver", "devices"),
    [(Driver(0, 2), 2), (Driver(0, 0), 0), (Driver(100, 2), 0), (None, 0)],
)
def test_the_driver_is_asked_for_devices(driver, devices, monkeypatch):
    def load(name):
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert accelerators.cuda_devices.__wrapped__() == devices


@pytest.mark.parametrize(
    ("cpu", "faster"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx512f", False),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile", True),
        (None, False),
    ],
)
def test_bf16_is_for_cpus_that_gain_by_it(cpu, faster, monkeypatch):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if cpu is None:
            raise FileNotFoundError(path)
        return cpu

    monkeypatch.setattr(accelerators.Path, "read_text", read_text)
    assert accelerators.has_bf16.__wrapped__() == faster

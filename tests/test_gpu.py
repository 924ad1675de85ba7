"""What is asked of a GPU: trainings go on, verdicts are the CPU's, environments step, nobody waits.

Everything also runs on the CPU, so that a test is not wrong where minutes on a GPU are short.
`pytest -m gpu` runs the others; without CUDA they are skipped.
"""

import signal

import gymnasium as gym
import pytest
import torch
import train
from conftest import ROOT, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import envs
from advgame.attacks import attacked, n_fgsm, pgd
from advgame.classifiers import make_classifier
from advgame.data import load_data
from advgame.defender import Defender
from advgame.evaluation import evaluate
from advgame.games import AdversarialTraining
from advgame.games.las_at import LasAt
from advgame.games.training import DefenderTraining
from advgame.run.devices import make_fabric
from advgame.run.folder import Metrics, RunFolder
from advgame.run.loop import Trainer
from advgame.run.plan import TrainingPlan
from advgame.seeding import seeded_init, stream
from advgame.targets import shipped
from advgame.threat import Linf
from agents.policies import entropies, log_probability

BALL = Linf(0.15)
NO_CUDA = "this machine has no CUDA"
GAIL = ("GAILCartPole", "GAILMountainCar")
IDS = ("StrategySelection", "AdaptiveAttack", "Attack", "BlackBoxAttack", *GAIL)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA),
            ],
        ),
    ]
)
def device(request):
    return request.param


SMALL = "--game n-fgsm --train-n 256 --epochs 3 --batch-size 64 --ema 0.9 --eval-n 10"


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on(device, tmp_path, monkeypatch):
    """To the losses of one that was not; to the bit on a CPU, which other tests hold."""
    words = [*SMALL.split(), "--attacks", "fgsm", "--accelerator", device]
    words += ["--runs-dir", str(tmp_path), "--name"]
    whole = train.job.run(train.job.parse([*words, "whole"]))
    real = Trainer._one_step

    def stopping(trainer):
        stats = real(trainer)
        if trainer.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return stats

    monkeypatch.setattr(Trainer, "_one_step", stopping)
    with pytest.raises(SystemExit):
        train.job.run(train.job.parse([*words, "cut"]))
    monkeypatch.undo()
    cut = train.job.run(train.Config(resume=str(tmp_path / "cut")))
    rows = [Metrics.read(run.path / "metrics.csv") for run in (whole, cut)]
    assert len(rows[0]) == len(rows[1]) == 3
    for one, two in zip(*rows, strict=True):
        assert one["step"] == two["step"]
        assert two["game/adversarial_loss"] == pytest.approx(one["game/adversarial_loss"], rel=0.05)
    assert cut.report()["accuracy"].keys() == {"clean", "fgsm"}


ATTACKS = ("fgsm", "autoattack-lite")


def verdicts(device):
    data, target = load_data("digits").test.first(20), shipped()
    found = evaluate(target.model.to(device), data.to(device), target.threat, ATTACKS)
    return {name: correct.cpu() for name, correct in found.correct.items()}


@pytest.fixture(scope="module")
def on_the_cpu():
    return verdicts("cpu")


@pytest.mark.slow
def test_verdicts_are_the_cpus(device, on_the_cpu):
    """AutoAttack draws on the CPU, FGSM does not draw: what differs would be ties of rounding."""
    found = verdicts(device)
    assert 5 < int(found["autoattack-lite"].sum()) < 20
    for name in ("clean", *ATTACKS):
        allowed = 1 if name == "autoattack-lite" else 0
        assert int((found[name] != on_the_cpu[name]).sum()) <= allowed, name


def made(name, device):
    """A vector environment with whatever it plays on, on the device."""
    number = 8
    if "GAIL" in name:
        return gym.make_vec(f"advgame/{name}-v0", number, device=device)
    if name in ("StrategySelection", "AdaptiveAttack"):
        fabric = make_fabric(device, 1, "auto")
        with seeded_init(0):
            module = make_classifier("small_cnn", (1, 8, 8), 10)
        defender = Defender(module, lr=0.1, fabric=fabric)
        return gym.make_vec(f"advgame/{name}-v0", number, defender=defender)
    return gym.make_vec(f"advgame/{name}-v0", number, classifier=shipped().model.to(device))


@pytest.mark.parametrize("name", IDS)
def test_every_environment_steps(name, device):
    env = made(name, device)
    seen, _ = env.reset(seed=0)
    for _ in range(6):
        seen, reward, ended, cut, _ = env.step(env.action_space.sample())
        for one in (seen, reward, ended, cut):
            assert one.device.type == device
    assert bool(seen.isfinite().all())
    assert bool(reward.isfinite().all())


def test_these_are_all_environments():
    assert envs
    registered = {name for name in gym.registry if name.startswith("advgame/")}
    assert registered == {f"advgame/{name}-v0" for name in IDS}


class Asking(TorchDispatchMode):
    """Names of the operations whose result the host looks at, or whose size it must know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or any(part in name for part in self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def trainer(attack, device, folder):
    """A training with all that a speedrun has: crops, flips, a moving average, a schedule."""
    data = load_data("digits").train.to(device)
    with seeded_init(0):
        module = make_classifier("small_cnn", data.shape, 10)
    fabric = make_fabric(device, 1, "auto")
    game = DefenderTraining(
        AdversarialTraining(BALL, attack),
        Defender(module, lr=0.1, fabric=fabric),
        data,
        64,
        0,
        crop=True,
        flip=True,
    )
    run = RunFolder.create(folder / "run", {"seed": 0}, device)
    return Trainer(game, run, TrainingPlan(2, ema=0.9), lambda module: {"eval/robust": 0.5})


@pytest.mark.parametrize("attack", [n_fgsm, lambda ball: pgd(ball, 3)], ids=["n-fgsm", "pgd"])
def test_within_an_epoch_the_host_waits_for_nothing(attack, device, tmp_path):
    made = trainer(attack, device, tmp_path)
    made._one_step()
    made._one_step()  # the second is the first that averages
    with Asking() as asking:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")  # copies between devices, too
        try:
            for _ in range(3):
                made._one_step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    # the average's own counter, which lies on the CPU
    assert len(asking.seen) <= 3, asking.seen
    assert made.step == 5


def test_a_look_ahead_asks_once_per_step_who_still_stands(device):
    """10 steps and a last look, of 2 restarts; nobody is fooled in so small a ball."""
    data, model = load_data("digits").test.first(20).to(device), shipped().model.to(device)
    attack, rng = LasAt(Linf(1e-4)).look_ahead_attack(), stream(0, "start", device)
    with Asking() as asking:
        made = attack.run(model, data.floats(), data.labels, rng=rng, check=False)
    assert int(made.fooled.sum()) < 5
    assert asking.seen == ["nonzero"] * 2 * 11


def test_a_policys_chances_are_not_looked_at(device):
    logits = [torch.randn(6, n, device=device) for n in (4, 3)]
    with Asking() as asking:
        entropies(logits)
        log_probability(logits, torch.zeros(6, 2, dtype=torch.int64, device=device))
    assert asking.seen == []


class Copies(TorchDispatchMode):
    """Names of the operations that write memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name not in ("detach", "empty_like"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_what_batch_norm_counts_and_averages_is_put_back_by_two_copies(device):
    model = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(5))).to(device)
    x = torch.rand(3, 2, 4, 4, device=device)
    before = [buffer.clone() for buffer in model.buffers()]
    with Copies() as into, attacked(model, "train"):
        written = list(into.seen)
        model(x)
        assert not torch.equal(model[0].running_mean, before[0])
        into.seen.clear()
    assert written == into.seen == ["_foreach_copy_"] * 2
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_a_look_at_a_number_is_seen():
    x = torch.rand(4, generator=seeded())
    for ask in (lambda: float(x[0]), lambda: x[x > 0.5], lambda: bool((x > 2).any()), x.nonzero):
        with Asking() as asking:
            ask()
        assert asking.seen


def test_no_other_file_has_tests_for_a_gpu():
    """The plan runs this file alone: collecting all would take longer than they do."""
    marked = [p.name for p in (ROOT / "tests").glob("*.py") if "pytest.mark.gpu," in p.read_text()]
    assert marked == ["test_gpu.py"]

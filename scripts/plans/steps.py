"""What the steps of the GPU plan do; `plans.sizes` says in what order, and with what sizes.

Rates are held against the card's own: what a large matrix product reaches there in the same
precision, in the same minutes. ``operations`` of a step are those of its convolutions and matrix
products, two per multiplication, as torch counts them.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train
import train_las_at
from benchmarks.attacks import Network, measure_pgd
from benchmarks.environments import measure_attack
from benchmarks.timing import compare, task
from lightning_fabric import Fabric
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from advgame.attacks import attacked
from advgame.classifiers.saved import run_classifier
from advgame.data import Splits
from advgame.errors import InputError
from advgame.evaluation import evaluate, validator
from advgame.run.defender_job import DefenderJob, ball, tested
from advgame.run.devices import make_fabric
from advgame.run.folder import Metrics, RunFolder, cpu_name, device_name, made_by
from advgame.statistics import wilson
from advgame.threat import Threat
from plans.packing import ROOT, restore
from plans.running import Facts, Work
from plans.sizes import Plan

OTHER_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # of a package and of its module
CHECKS = 4  # validations of a speedrun
SHARE = 0.9  # of a speedrun's limit that is planned; the rest is for saving and for surprises


def restore_images(work: Work) -> Facts:
    """CIFAR-10's files as they were before they were packed."""
    folder = restore(work.folder)
    return {"data_dir": None if folder is None else str(folder)}


# what machine this is


def environment(work: Work) -> Facts:
    """Python, packages, device, and the rates that the device really reaches.

    Raises:
        InputError: packages that are missing; all else has been noted by then.
    """
    fabric = _fabric()
    found: Facts = {**made_by(), "platform": platform.platform(), "cpu": cpu_name()}
    found |= {"cores": os.cpu_count(), "device": device_name(fabric.device)}
    if fabric.device.type == "cuda":
        card = torch.cuda.get_device_properties(fabric.device)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gb": card.total_memory / 1e9,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    found["missing"] = missing()
    work.note(found)
    found["tflops"] = {
        "bf16": matrix_rate(fabric.device, torch.bfloat16, work.plan.matrix),
        "fp32": matrix_rate(fabric.device, torch.float32, work.plan.matrix),
    }
    found["copy_gb_per_s"] = copy_rate(fabric.device, work.plan.matrix)
    work.note(found)
    if found["missing"]:
        raise InputError(f"missing here: {', '.join(found['missing'])}; carry them (--packages)")
    return found


def missing() -> list[str]:
    """Those of the project's dependencies that cannot be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [line.split(">=")[0] for line in project["dependencies"]]
    modules = {name: OTHER_NAMES.get(name, name.replace("-", "_")) for name in [*names, "pytest"]}
    return [name for name, module in modules.items() if find_spec(module) is None]


def matrix_rate(device: torch.device, kind: torch.dtype, side: int) -> float:
    """10^12 operations a second of a product of two square matrices of random numbers."""
    one, two = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    seconds: float = _timed(lambda: one @ two, 10)["median_s"]
    return 2 * side**3 / seconds / 1e12


def copy_rate(device: torch.device, side: int) -> float:
    """10^9 bytes a second, read and written, of a copy within the device's memory."""
    source = torch.randn(4 * side, side, device=device)
    target = torch.empty_like(source)
    seconds: float = _timed(lambda: target.copy_(source), 10)["median_s"]
    return 2 * source.nbytes / seconds / 1e9


def _fabric() -> Fabric:
    return make_fabric("auto", 1, "auto")


def _timed(play: Callable[[], object], turns: int, warm_up: int = 3) -> Facts:
    """Seconds of so many turns, after some that do not count: median, least, most, how many."""
    row = compare({"it": play}, turns, warm_up, nullcontext, "it")["it"]
    return {name: row[name] for name in ("median_s", "min_s", "max_s", "n")}


_ENDED = re.compile(r"\S+::(.+) (PASSED|FAILED|ERROR|SKIPPED)")


def tests(work: Work) -> Facts:
    """The tests that need a GPU; without one all are skipped.

    Raises:
        InputError: which have failed.
    """
    table = work.folder / "tests.xml"
    words = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    words += [f"--junitxml={table}", "tests/test_gpu.py"]
    lines, so_far = list[str](), dict[str, str]()
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            if ended := _ENDED.match(line):  # the table comes at the end: time may be out before
                so_far[ended[1]] = ended[2]
                work.note({"so far": so_far})
    if not table.exists():
        raise InputError(f"pytest ended with {running.returncode}: {''.join(lines)}")
    suite = ET.parse(table).getroot()[0]
    cases = suite.findall("testcase")
    bad = {
        str(case.get("name")): (problem.text or str(problem.get("message")))[-3000:]
        for case in cases
        for kind in ("failure", "error")
        for problem in case.findall(kind)
    }
    skipped = int(suite.get("skipped", 0))
    found: Facts = {"passed": len(cases) - skipped - len(bad), "skipped": skipped, "failed": bad}
    found["seconds"] = {str(case.get("name")): float(case.get("time", 0)) for case in cases}
    work.note(found)
    if bad or not cases:
        raise InputError(f"{len(bad)} of {len(cases)} tests failed: {', '.join(bad)}")
    return found


# throughput


def operations(plan: Plan) -> tuple[int, int]:
    """Of one image: a forward F, and with its backward to the input F + B_x."""
    model, x, y = task(plan.network, plan.shape, 1, torch.device("cpu"))
    x.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def query() -> None:
        with attacked(model):
            grad(F.cross_entropy(model(x), y), x)

    return _counted(forward), _counted(query)


class Operations(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products, as torch's FlopCounterMode.

    That one follows modules with hooks, which `torch.autograd.grad` with respect to the images does
    not bear.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what was computed."""
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.count += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _counted(play: Callable[[], object]) -> int:
    counter = Operations()
    with counter:
        play()
    return counter.count


def against(rate: float, seconds: float, images: int, count: float) -> Facts:
    """A row of the table: what was done each second, and its share of the card's own rate.

    Args:
        rate: 10^12 operations a second that the card reaches in a matrix product.
        seconds: of the piece of work.
        images: in it.
        count: of operations in it.
    """
    tflops = count / seconds / 1e12
    row: Facts = {"seconds": seconds, "images_per_second": images / seconds}
    return row | {"operations": count, "tflops": tflops, "share_of_matrix_product": tflops / rate}


def _rate(work: Work) -> float:
    """The card's own rate in the precision that trainings have there."""
    rates = work.before["environment"]["tflops"]
    return float(rates["bf16" if _fabric().device.type == "cuda" else "fp32"])


def _network(plan: Plan) -> Network:
    return plan.network, plan.shape, plan.eps, plan.batch, plan.batch


def pgd(work: Work) -> Facts:
    """PGD-10 beside the bare passes that it cannot do without."""
    plan: Plan = work.plan
    case = measure_pgd(_fabric(), plan.repeats, _network(plan))
    return _rows(work, case, 10 * plan.batch * operations(plan)[1], 10 * plan.batch)


def attack_env(work: Work) -> Facts:
    """A step of advgame/Attack-v0 beside the bare gradient query."""
    plan: Plan = work.plan
    case = measure_attack(_fabric(), plan.repeats, _network(plan))
    return _rows(work, case, plan.batch * operations(plan)[1], plan.batch)


def _rows(work: Work, case: Mapping[str, Any], count: int, images: int) -> Facts:
    rate = _rate(work)
    rows = {
        name: {**row, **against(rate, row["median_s"], images, count)}
        for name, row in case["contestants"].items()
    }
    return {"network": work.plan.network, "batch": work.plan.batch, "rows": rows}


def n_fgsm(work: Work) -> Facts:
    """A training step of N-FGSM as `scripts/train.py` makes it."""
    return _step(work, train.job, "--game", "n-fgsm")


def las(work: Work) -> Facts:
    """A training step of LAS-AT as `scripts/train_las_at.py` makes it."""
    return _step(work, train_las_at.job)


def _step(work: Work, job: DefenderJob[Any, Any], *more: str) -> Facts:
    config = job.check(job.parse([*_training(work), *more]))
    made = job.build(config, job.fabric(config))
    return step_of(made, config.batch_size, work.plan.repeats, _rate(work))


def step_of(made: tuple[Any, Splits], batch: int, repeats: int, rate: float | None) -> Facts:
    """Seconds of a game's step; with the card's rate also its operations, as torch counts them.

    Args:
        made: game and data.
        batch: images of a step.
        repeats: steps that are timed.
        rate: see `against`.
    """
    game, _ = made
    row = _timed(game.step, repeats)
    seconds = row["median_s"]
    if rate is None:
        return {**row, "seconds": seconds, "images_per_second": batch / seconds}
    counts = [_counted(game.step) for _ in range(3)]  # LAS-AT's differ from step to step
    return {**row, **against(rate, seconds, batch, sum(counts) / len(counts))}


def _training(work: Work) -> list[str]:
    """Options of every training of the plan."""
    folder = work.before["data"]["data_dir"]
    return [*work.plan.training.split(), *(["--data-dir", folder] if folder else [])]


# the robust speedrun


class Timed(train.Job):
    """The training of `scripts/train.py`, with a clock from the made game to the saved weights."""

    seconds = math.nan

    @override
    def work(
        self, config: train.Config, run: RunFolder, made: tuple[Any, Splits], *, resume: bool
    ) -> None:
        self._began = time.perf_counter()
        super().work(config, run, made, resume=resume)

    @override
    def report(
        self, config: train.Config, run: RunFolder, game: Any, data: Splits, threat: Threat
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        super().report(config, run, game, data, threat)


def speedrun(limit: float, work: Work) -> Facts:
    """A training that ends within ``limit`` seconds, with as many epochs as fit.

    A step and a validation are timed first, which does not count. The game is then made anew.

    Raises:
        InputError: not one epoch fits.
    """
    plan: Plan = work.plan
    recipe = next(words for most, words in plan.speedruns.items() if limit <= most)
    words = [*_training(work), *recipe.split(), "--eval-n", str(plan.images), "--attacks", "pgd20"]
    fit, timed = how_many_epochs(limit, words, plan.repeats)
    work.note({"limit": limit, "timed": timed})
    if not fit:
        raise InputError(f"no epoch fits in {limit:g} s: one takes {timed['epoch']:.1f} s")
    epochs = min(fit, plan.epochs)
    every = math.ceil(epochs / CHECKS)
    words += ["--epochs", str(epochs), "--validate-every", str(every), "--save-every", str(epochs)]
    words += ["--runs-dir", str(work.folder / "runs"), "--name", _free(work.folder, limit)]
    job = Timed()
    run = job.run(job.parse(words))
    found: Facts = {"limit": limit, "timed": timed, "epochs": epochs, "options": words}
    found |= {"training_seconds": job.seconds, "within_limit": job.seconds <= limit}
    rows = Metrics.read(run.path / "metrics.csv")
    shown = ("epoch", "eval/", "time/", "game/adversarial_loss")
    curve = [
        {k: v for k, v in row.items() if k.startswith(shown)}
        for row in rows
        if "eval/robust" in row
    ]
    return found | {"run": str(run.path), "curve": curve, "report": run.report()}


def how_many_epochs(limit: float, words: list[str], repeats: int) -> tuple[int, Facts]:
    """Epochs that fit in ``limit`` seconds, and what was timed: a step, a validation."""
    job = train.Job()
    config = job.check(job.parse(words))
    made = job.build(config, job.fabric(config))
    game, data = made
    timed = step_of(made, config.batch_size, repeats, None)
    validate = validator(data.validation, ball(config), config.seed)
    check = _timed(lambda: validate(game.learner.module), turns=1, warm_up=1)["median_s"]
    epoch = game.steps_per_epoch * timed["seconds"]
    timed |= {"epoch": epoch, "validation": check}
    return max(0, int((SHARE * limit - CHECKS * check) / epoch)), timed


def _free(folder: Path, limit: float) -> str:
    """A name that no run folder of a former visit has."""
    names = (f"speedrun-{limit:g}-{number}" for number in itertools.count(1))
    return next(name for name in names if not (folder / "runs" / name).exists())


def judge(of: str, work: Work) -> Facts:
    """The plan's attack on a speedrun's best weights, in fp32, part by part.

    What has been judged is noted after each part, so that an end in between leaves an accuracy on
    fewer images.

    Args:
        of: the speedrun's step.
        work: what a step is given.
    """
    run = RunFolder.open(Path(work.before[of]["run"]))
    job, plan, fabric = train.Job(), work.plan, _fabric()
    config = job.parse([*work.before[of]["options"]])
    _, data = job.build(config, job.fabric(config))
    test = tested(config, data)
    module = run_classifier(run, test.shape, test.classes, "best", config.model)
    module = module.to(fabric.device)
    clean, left, found = 0, 0, Facts()
    began = time.perf_counter()
    for start in range(0, len(test), plan.part):
        part = test.subset(slice(start, start + plan.part))
        verdicts = evaluate(
            module, part, ball(config), (plan.attack,), seed=config.seed, batch_size=plan.part
        )
        clean += int(verdicts.correct["clean"].sum())
        left += int((verdicts.correct["clean"] & verdicts.correct[plan.attack]).sum())
        n = start + len(part)
        found = {"images": n, "clean": clean / n, plan.attack: left / n, "precision": "fp32"}
        found["interval"] = wilson(left / n, n)
        work.note(found | {"seconds": time.perf_counter() - began})
    return found | {"seconds": time.perf_counter() - began, "weights": "best"}

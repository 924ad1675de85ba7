"""What tests of whole runs share: small settings, and what "equal to the bit" means."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = {"train_n": 200, "epochs": 3, "batch_size": 32, "eval_n": 20, "attacks": ("fgsm",)}


def slow_but(quick: str, names: Iterable[str]) -> list[object]:
    """Parameters of a test: the default suite runs one of them."""
    return [pytest.param(n, marks=[] if n == quick else pytest.mark.slow) for n in names]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The last and the best weights."""
    return {
        f"{which}/{name}": value
        for which in ("last", "best")
        for name, value in load_file(run / "checkpoints" / f"{which}.safetensors").items()
    }


def assert_equal_metrics(one: Path, two: Path) -> None:
    """metrics.csv, wall-clock columns aside."""
    tables = []
    for run in (one, two):
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows])
    first, second = tables
    assert len(first) == len(second)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.keys() == b.keys()
        differing = {name: (a[name], b[name]) for name in a if a[name] != b[name]}
        assert not differing, f"row {number}: {differing}"


def assert_equal_runs(one: Path, two: Path) -> None:
    """Weights, metrics.csv and report, wall-clock fields and the command aside."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_equal_metrics(one, two)
    reports = []
    for run in (one, two):
        report = json.loads((run / "report.json").read_text())
        for field in ("seconds", "timing", "command"):
            assert report.pop(field)
        reports.append(report)
    assert reports[0] == reports[1]

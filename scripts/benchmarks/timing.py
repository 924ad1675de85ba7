"""Times functions that do the same work against each other, on random images."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from advgame.classifiers import make_classifier
from advgame.seeding import seeded_init, stream

Play = Callable[[], object]
Case = dict[str, Any]
Shape = tuple[int, int, int]
CLASSES, STEPS, WARM_UP, SEED = 10, 10, 2, 0


def task(
    name: str, shape: Shape, batch: int, device: torch.device
) -> tuple[nn.Module, Tensor, Tensor]:
    """The classifier in evaluation mode, random images and random labels."""
    with seeded_init(SEED):
        model = make_classifier(name, shape, CLASSES).eval().to(device)
    rng = stream(SEED, "images", device)
    x = torch.rand(batch, *shape, generator=rng, device=device)
    y = torch.randint(CLASSES, (batch,), generator=rng, device=device)
    colour = device.type == "cuda" or shape[0] > 1  # as trainings lay them out
    layout = torch.channels_last if colour else torch.contiguous_format
    return model.to(memory_format=layout), x.to(memory_format=layout), y


def compare(
    plays: Mapping[str, Play],
    repeats: int,
    warm_up: int,
    context: Any,
    held_to: str = "advgame",
) -> dict[str, dict[str, Any]]:
    """Seconds of every contestant; what they are held to is ``floor``, if any, and ``held_to``.

    They take turns in shuffled order, so that a busy machine slows all of them; ratios are
    medians over turns of the ratio within one turn.

    Args:
        plays: name -> one turn.
        repeats: turns that count.
        warm_up: turns before.
        context: makes the context manager that each turn runs in.
        held_to: the contestant of ``times_ours``.
    """
    times: dict[str, list[float]] = {name: [] for name in plays}
    order, shuffle, screen = list(plays), random.Random(0), Console(stderr=True)
    wait: Play = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.freeze()  # or each collection below would take longer than a turn
    gc.disable()
    # without auto_refresh no thread draws while the clock runs
    for turn in track(range(warm_up + repeats), console=screen, auto_refresh=False, transient=True):
        shuffle.shuffle(order)
        gc.collect()
        for name in order:
            wait()
            begin = time.perf_counter()
            with context():
                plays[name]()
            wait()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - begin)
    gc.enable()
    gc.unfreeze()
    rows: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        row: dict[str, Any] = {
            "median_s": median(own),
            "min_s": min(own),
            "max_s": max(own),
            "n": len(own),
        }
        if "floor" in times:
            row["floor_share"] = median(map(truediv, times["floor"], own))
        rows[name] = row | {"times_ours": median(map(truediv, own, times[held_to]))}
    return rows


def show(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print a table per case: group -> cases, whose ``contestants`` are rows of `compare`."""
    usual = ("median_s", "min_s", "max_s", "n", "floor_share", "times_ours")
    for group, case in ((group, case) for group, cases in groups.items() for case in cases):
        facts = {key: value for key, value in case.items() if key != "contestants"}
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        rows = case["contestants"]
        more = {"games": ["measured_over_predicted"], "autoattack": ["cpu_s"]}
        columns = [*usual, *more.get(group, ())]
        table = Table("", *columns, title=group, caption=", ".join(words))
        for name, row in rows.items():
            table.add_row(name, *(f"{row[c]:.4g}" if c in row else "-" for c in columns))
        Console(markup=False).print(table)

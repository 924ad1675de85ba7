"""What each part of the engine brings PGD-10 alone: memory, layout, first layer, folding, bf16."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advgame.attacks import pgd
from advgame.attacks.folding import folding
from advgame.classifiers.first_layer import FirstConv2d
from advgame.run.table import markdown
from advgame.seeding import stream
from advgame.threat import Linf
from benchmarks.timing import SEED, STEPS, WARM_UP, Case, Play, Shape, compare, task

# classifier, shape of the images, ε, batch
Query = tuple[str, Shape, float, int]
QUERIES: list[Query] = [
    ("small_cnn", (1, 28, 28), 0.3, 256),
    ("lean_resnet", (3, 32, 32), 8 / 255, 128),
    ("wrn-16-2", (3, 32, 32), 8 / 255, 32),
    ("resnet18", (3, 32, 32), 8 / 255, 32),
]
NOTHING, KEPT = "nothing", "freed memory kept"
PARTS = {  # beside freed memory, which a process keeps once and for all
    KEPT: (),
    "channels_last": ("channels_last",),
    "first layer's own gradient": ("first layer",),
    "batch norm folded": ("folded",),
    "all of these, fp32": ("usual layout", "first layer", "folded"),
    "bf16, weights cast at each pass": ("bf16", "again"),
    "bf16, weights cast once": ("bf16",),
    "all": ("usual layout", "first layer", "folded", "bf16"),
}


def played(query: Query, parts: Sequence[str], device: torch.device) -> Play:
    """PGD-10 with some parts of the engine; without any, it asks the bare network in fp32.

    Args:
        query: classifier, images, ε and batch.
        parts: of ``channels_last`` and ``usual layout``, which is that for colour only;
            ``first layer``, ``folded``, ``bf16``, and ``again``: autocast casts at each pass.
        device: of the classifier.
    """
    name, shape, eps, batch = query
    model, x, y = task(name, shape, batch, device)
    if "usual layout" not in parts:
        layout = torch.channels_last if "channels_last" in parts else torch.contiguous_format
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    for module in model.modules():
        if isinstance(module, FirstConv2d) and "first layer" not in parts:
            vars(module)["forward"] = partial(nn.Conv2d.forward, module)
    attack, rng = pgd(Linf(eps), STEPS), stream(SEED, "start", device)

    def play() -> Tensor:
        fold = folding() if "folded" in parts else contextlib.nullcontext()
        bf16 = torch.autocast(
            device.type, torch.bfloat16, enabled="bf16" in parts, cache_enabled="again" not in parts
        )
        with fold, bf16:
            return attack.run(model, x, y, rng=rng, check=False).x_adv

    return play


def _answer(asked: Connection, query: Query, threads: int) -> None:
    torch.set_num_threads(threads)
    play = played(query, (), torch.device("cpu"))
    while asked.recv():
        play()
        asked.send(True)


@contextlib.contextmanager
def elsewhere(query: Query) -> Iterator[Play]:
    """The bare attack in another process, whose C library gives freed memory back as it likes."""
    mine, its = multiprocessing.Pipe()
    started = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(its, query, torch.get_num_threads()), daemon=True
    )
    started.start()
    its.close()  # or a process that dies is waited for

    def play() -> None:
        mine.send(True)
        mine.recv()

    try:
        yield play
    finally:
        with contextlib.suppress(OSError):  # it may have died
            mine.send(False)
        started.join()
        mine.close()


def measure_engine(fabric: Fabric, repeats: int, query: Query) -> Case:
    """Each part alone, and all together; ratios are to a process that keeps freed memory.

    Scripts do (`advgame.run.cli.run_script`). On a GPU there is no ``nothing``.
    """
    name, shape, eps, batch = query
    plays = {what: played(query, parts, fabric.device) for what, parts in PARTS.items()}
    with contextlib.ExitStack() as stack:
        if fabric.device.type == "cpu":
            plays = {NOTHING: stack.enter_context(elsewhere(query)), **plays}
        rows = compare(plays, repeats, WARM_UP, contextlib.nullcontext, held_to=KEPT)
    facts: Case = {"network": name, "shape": shape, "batch": batch, "eps": eps, "steps": STEPS}
    return {**facts, "contestants": rows}


def as_markdown(cases: Sequence[Case], about: Mapping[str, Any]) -> str:
    """The table for people: a network per column, times as shares of `KEPT`.

    Args:
        cases: of `measure_engine`.
        about: ``device``, ``cpu``, ``repeats``, ``commit`` and ``command``.
    """
    head = ["", *(f"{case['network']}, batch {case['batch']}" for case in cases)]
    body = [
        [what, *(f"{case['contestants'][what]['times_ours']:.2f}" for case in cases)]
        for what in cases[0]["contestants"]
    ]
    seconds = (f"{case['contestants'][KEPT]['median_s']:.2f}" for case in cases)
    text = [
        "# What each part of the engine brings alone",
        f"PGD-10 on random images of the data's size. Times as shares of a process that keeps "
        f"freed memory and has no other part; medians over {about['repeats']} turns, in each of "
        f"which all take one turn. `{NOTHING}` is a process that does not keep it.",
        markdown(head, [*body, [f"seconds, {KEPT}", *seconds]]),
        f"Hardware: {about['device']}, {about['cpu']}. Commit {about['commit'][:12]}. "
        f"Command: `{about['command']}`.",
    ]
    return "\n\n".join(text) + "\n"

"""AutoAttack standard beside pyautoattack: the same verdicts, and how much sooner."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advgame.data import load_data
from advgame.errors import InputError
from advgame.evaluation.autoattack import VERSIONS, AutoAttackPart
from advgame.losses import margin
from advgame.run.options import Count
from advgame.run.table import markdown
from advgame.targets import Target, from_run, shipped
from advgame.threat import Linf
from benchmarks.timing import Case


@dataclass(frozen=True)
class Judges:
    """Whose verdicts AutoAttack gives, beside the shipped classifier's."""

    runs: tuple[str, ...] = ()
    """of autoattack: run folders of classifiers for L∞; none is the shipped one"""
    data_dir: str | None = None
    """of autoattack: data folder (all but digits)"""
    images: Count = 500
    """of autoattack: test images, one batch"""


def targets(config: Judges) -> list[tuple[Target, Judges]]:
    """The classifiers, each with the settings.

    Raises:
        InputError: a folder without a classifier, or another ball.
    """
    found = [from_run(Path(run)) for run in config.runs] or [shipped()]
    for one in found:
        if not isinstance(one.threat, Linf):
            raise InputError(f"{one.name} was trained in {one.threat.norm}: Linf is timed")
    return [(one, config) for one in found]


def ours(target: Target, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The images after AutoAttack, each attack seeing what the ones before it left."""
    found, left = x.clone(), torch.arange(len(x))
    for part in VERSIONS["standard"]:
        with torch.no_grad():
            left = left[target.model(found[left]).argmax(1) == y[left]]
        if len(left):
            attack = AutoAttackPart(target.threat, part, seed=seed)
            found[left] = attack.run(target.model, x[left], y[left]).x_adv
    return found


def theirs(target: Target, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The images after all four attacks of pyautoattack's standard version."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    eps = float(target.threat.eps)
    judge = AutoAttack(target.model, norm="Linf", eps=eps, seed=seed, device=x.device)
    judge.verbose = False
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        found: Tensor = judge.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return found


def measure_autoattack(fabric: Fabric, repeats: int, one: tuple[Target, Judges]) -> Case:
    """Verdicts and seconds of both, a seed at a time.

    A differing image comes with its margin (in logits, above 0 is fooled) after either.
    """
    target, config = one
    data = load_data(target.dataset, config.data_dir, image_size=target.image_size).test
    data = data.subset(slice(config.images))
    x, y = data.floats().to(fabric.device), data.labels.to(fabric.device)
    model = target.model.to(fabric.device)
    times: dict[str, list[tuple[float, float]]] = {"advgame": [], "pyautoattack": []}
    robust, differing = [], []
    for seed in range(repeats):
        after: list[Tensor] = []
        for name, judge in (("advgame", ours), ("pyautoattack", theirs)):
            clocks = time.perf_counter(), time.process_time()
            found = judge(target, x, y, seed)
            passed = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
            times[name].append(passed)
            with torch.no_grad():
                after.append(torch.cat([margin(model(p), q) for p, q in pairs(found, y)]))
        robust.append(int((after[0] < 0).sum()))
        for image in ((after[0] < 0) != (after[1] < 0)).nonzero()[:, 0].tolist():
            margins = [float(one[image]) for one in after]
            differing.append({"seed": seed, "image": image, "margins": margins})
    rows: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        wall, cpu = ([turn[i] for turn in own] for i in (0, 1))
        ratio = median(w / o[0] for w, o in zip(wall, times["advgame"], strict=True))
        limits = {"median_s": median(wall), "min_s": min(wall), "max_s": max(wall)}
        rows[name] = {**limits, "n": len(own), "times_ours": ratio, "cpu_s": median(cpu)}
    facts = {"target": target.name, "dataset": target.dataset, "images": len(y)}
    facts |= {"eps": float(target.threat.eps), "robust": robust, "differing": differing}
    return {**facts, "contestants": rows}


def as_markdown(cases: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The table for people.

    Args:
        cases: of `measure_autoattack`.
        about: ``cpu``, ``threads``, ``commit`` and ``command``.
    """
    lines, notes = list[list[str]](), list[str]()
    for case in cases:
        ours, theirs = (case["contestants"][name] for name in ("advgame", "pyautoattack"))
        name, differing = case["target"], case["differing"]
        judged = case["images"] * len(case["robust"])
        lines.append(
            [
                f"{name}, {case['dataset']}, ε = {case['eps']:.3g}",
                f"{case['images']} × {len(case['robust'])}",
                ", ".join(map(str, case["robust"])),
                f"{len(differing)} of {judged}",
                *(f"{one['cpu_s']:.0f}" for one in (ours, theirs)),
                f"{ours['cpu_s'] / theirs['cpu_s']:.2f}",
                *(f"{one['median_s']:.0f}" for one in (ours, theirs)),
            ]
        )
        for one in differing:
            after, other = (f"{value:.2g}" for value in one["margins"])
            notes.append(
                f"- {name}, seed {one['seed']}, image {one['image']}: {after} after ours, {other} "
                "after pyautoattack"
            )
    head = ["classifier", "images × seeds", "robust, per seed", "verdicts that differ"]
    head += ["CPU s, ours", "CPU s, pyautoattack", "ratio", "s, ours", "s, pyautoattack"]
    text = [
        "# AutoAttack standard beside pyautoattack",
        "Both get the same images and seeds, and take turns. Seconds are medians over seeds, of "
        f"one process with {about['threads']} thread(s).",
        markdown(head, lines),
    ]
    if notes:
        said = "Verdicts that differ, with the margin of the image that the attack ended with"
        text += [f"{said} (logits; above 0 is fooled):", "\n".join(notes)]
    text.append(
        f"Hardware: {about['device']}, {about['cpu']}. Commit {about['commit'][:12]}. "
        f"Command: `{about['command']}`."
    )
    return "\n\n".join(text) + "\n"


def pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Images and labels in parts that every network has the memory for."""
    return list(zip(x.split(500), y.split(500), strict=True))

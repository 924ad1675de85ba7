"""What a fresh AttNet reaches, by effort, rate and output scale, against finished classifiers.

    python scripts/study.py attnet runs/A runs/B --name games --out runs/results
    python scripts/study.py attnet runs/A --name plain --data-dir DIR --scales 0 2 --rates 1e-3 1e-4

The classifiers are the last ones of runs of `train_minimax.py`. While a fresh attacker learns from
the training images, this measures on the validation images the classifier's error, f(u, v*(u)) as
a curve over effort, and whether the network lives: saturated outputs, spread within a class,
gradient norm over parameter norm. The errors under PGD-20 and under the game's own attacker, where
the run has one, stand beside it. The distance to the latter is what the attacker gains by the
response, the larger part of the duality gap.

Writes `<out>/attnet-<name>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from advgame.attacks import attacked, pgd
from advgame.classifiers.saved import run_classifier
from advgame.data import Splits, load_data
from advgame.errors import InputError
from advgame.health import network_signs
from advgame.losses import cross_entropy
from advgame.run.curves import save_figure, seeds_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import RunFolder, made_by
from advgame.run.options import parse_eps
from advgame.threat import Linf
from agents.attacker_file import NAME
from agents.attacker_network import placed
from agents.attackers import load_network
from agents.attnet import AttNet
from agents.best_response import Ascent, Effort, errors

STEPS = (100, 300, 600, 1500, 3000, 6000)
TITLES = {
    "error": "error under a fresh AttNet",
    "spread": "spread within a class, units of ε",
    "saturated": "share of saturated outputs",
    "gradient": "log10 gradient norm / parameter norm",
}


@dataclass(frozen=True)
class Config:
    """Train fresh AttNets on finished classifiers and watch them."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of train_minimax.py, of one data set and one ε"""
    name: str
    """of the results: attnet-NAME.json"""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """of Adam"""
    scales: tuple[float, ...] = (2.0,)
    """AttNet's output scales; 0 is a bare tanh"""
    centred: tuple[bool, ...] = (True,)
    """whether AttNet sees each image less its mean"""
    steps: tuple[int, ...] = STEPS
    """where to look"""
    seeds: int = 1
    """attackers, seeds 0, 1, … of each"""
    data_dir: str | None = None
    """data folder (all but digits)"""
    out: str = "results/minimax"
    """where the results go"""


def curve(
    run: RunFolder,
    data: Splits,
    scale: float,
    centre: bool,
    rate: float,
    seed: int,
    steps: Sequence[int],
) -> list[dict[str, float]]:
    """One fresh attacker on its way: what `TITLES` names, at each of ``steps``."""
    settings, shape = run.about()["config"], data.train.shape
    model = run_classifier(run, shape, data.train.classes, "last")
    threat = Linf(parse_eps(settings["eps"]))
    ascent = Ascent(
        model, data.train, threat,
        lambda: AttNet(shape, data.train.classes, scale=scale, centre=centre),
        Effort(lr=rate), seed=seed,
    )  # fmt: skip
    x, y = data.validation.floats(), data.validation.labels
    rows, done = [], 0
    for step in steps:
        network = ascent.run(step - done)
        done = step
        with attacked(model):
            risk = cross_entropy(model(placed(network(x, y), x, threat)), y).mean()
            weights = list(network.parameters())
            slope = torch.autograd.grad(risk, weights)
        norms = [
            torch.stack([p.detach().norm() for p in group]).norm() for group in (slope, weights)
        ]
        error = errors(model, network.attack(threat), data.validation, seed)
        rows.append(
            {
                "step": step,
                "error": float(error.mean()),
                **network_signs(network, x, y),
                "gradient": float((norms[0] / norms[1]).clamp_min(1e-12).log10()),  # 0 is -12
            }
        )
    return rows


def about_classifier(run: RunFolder, data: Splits) -> dict[str, Any]:
    """What a run's classifier does without a fresh attacker, on validation images."""
    settings = run.about()["config"]
    model = run_classifier(run, data.train.shape, data.train.classes, "last")
    threat, held_out = Linf(parse_eps(settings["eps"])), data.validation
    found = {
        "defence": settings["defence"],
        "pgd20": float(errors(model, pgd(threat, 20), held_out).mean()),
    }
    if (run.path / NAME).exists():
        own = load_network(run.path).attack(threat)
        found["own"] = float(errors(model, own, held_out).mean())
    return found


def label(one: Mapping[str, Any]) -> str:
    """Of a curve, its seed aside."""
    centred = "" if one["centre"] else ", not centred"
    return f"{one['classifier']}, scale {one['scale']:g}{centred}, rate {one['rate']:g}"


def as_markdown(content: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# A fresh AttNet by effort, rate and output scale: {content['name']}",
        "",
        f"Validation error ({content['n']} images) of finished classifiers while an attacker "
        "learns from scratch; in brackets the spread of its perturbations within a class, in "
        "units of ε, and the share of saturated outputs. Scale 0 is a bare tanh.",
        "",
    ]
    for name, about in content["classifiers"].items():
        own = f", under the game's own attacker {about['own']:.3f}" if "own" in about else ""
        lines += [f"{name} ({about['defence']}): under PGD-20 {about['pgd20']:.3f}{own}.", ""]
    steps = [row["step"] for row in content["curves"][0]["rows"]]
    lines += [
        "| classifier | scale | centred | rate | seed | "
        + " | ".join(f"{s} steps" for s in steps)
        + " |",
        "|---" * (len(steps) + 5) + "|",
    ]
    for one in content["curves"]:
        cells = [
            f"{row['error']:.3f} ({row['spread']:.2f}, {row['saturated']:.2f})"
            for row in one["rows"]
        ]
        words = [one["classifier"], f"{one['scale']:g}", "yes" if one["centre"] else "no"]
        words += [f"{one['rate']:g}", str(one["seed"])]
        lines.append("| " + " | ".join([*words, *cells]) + " |")
    return "\n".join([*lines, "", f"Command: `{content['command']}`.", ""])


def main(config: Config) -> None:
    """Train what is missing, writing the results after each attacker."""
    if list(config.steps) != sorted(set(config.steps)) or min(config.steps, default=0) < 1:
        raise InputError(f"steps must go up from 1 or above, not {config.steps}")
    folders = {path.name: RunFolder.open(path) for path in config.runs}
    settings = [run.about()["config"] for run in folders.values()]
    if len({(one["dataset"], one["eps"]) for one in settings}) != 1:
        raise InputError("name one run folder or more, all of one data set and one eps")
    data = load_data(settings[0]["dataset"], config.data_dir, train_n=settings[0]["train_n"])
    path = Path(config.out) / f"attnet-{config.name}.json"
    curves: list[dict[str, Any]] = read_json(path)["curves"] if path.exists() else []
    if any([row["step"] for row in one["rows"]] != list(config.steps) for one in curves):
        raise InputError(f"{path} has curves with other steps: choose another --name")
    content = {
        **made_by(),
        "name": config.name,
        "n": len(data.validation),
        "classifiers": {name: about_classifier(run, data) for name, run in folders.items()},
        "curves": curves,
    }
    for name, scale, centre, rate, seed in product(
        folders, config.scales, config.centred, config.rates, range(config.seeds)
    ):
        key: dict[str, Any] = {"scale": scale, "centre": centre, "rate": rate, "seed": seed}
        if any((key | {"classifier": name}).items() <= one.items() for one in curves):
            continue
        rows = curve(folders[name], data, **key, steps=config.steps)
        curves.append({"classifier": name, **key, "rows": rows})
        print(f"{label(curves[-1])}, seed {seed}: {rows[-1]['error']:.3f}")
        write_atomically(path, json.dumps(content) + "\n")
    write_atomically(path.with_suffix(".md"), as_markdown(content))
    lines: dict[str, list[Any]] = {}
    for one in curves:
        lines.setdefault(label(one), []).append(one["rows"])
    title = f"A fresh AttNet on its way: {config.name}"
    save_figure(seeds_figure(lines, TITLES, title, x="step"), path.with_suffix(".png"))

"""Is a learned schedule of gradient steps better than PGD, MIM and APGD at equal queries?

    python scripts/study.py attacker --runs-dir runs/study/digits

Attackers are trained by `train_attacker.py` on one classifier (a seed each) and attack test images
of classifiers that they have not seen: other seeds of the same training, and another training.
The classifiers are run folders of `study.py las_at`: fixed is PGD-AT, reinforce LAS-AT. A query
is a forward of the classifier on one image; final forwards and first looks count, and every attack
may stop at the first query that fools. Success is the share of the images that are classified
correctly as they are.

Finished attackers are kept and interrupted ones resumed, so that the command can be given again.
Writes `<out>/attacker_<dataset>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from advgame.attacks import GradientAttack, attacked, mim, pgd
from advgame.data import ImageSet, load_data
from advgame.errors import InputError
from advgame.losses import margin
from advgame.run.cells import run_cell
from advgame.run.curves import save_figure
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder, device_name, made_by
from advgame.seeding import derive_seed, stream
from advgame.statistics import spread
from advgame.targets import Target, from_run
from advgame.threat import Threat
from agents.attacker import load_attacker

# (model, x, y, ball, queries, seed) -> adversarial examples of correctly classified images
Contestant = Callable[[nn.Module, Tensor, Tensor, Threat, int, int], Tensor]
LEARNED = "learned"


@dataclass(frozen=True)
class Config:
    """Compare learned attackers with hand-made ones at equal query budgets."""

    runs_dir: str = "runs/study/digits"
    """run folders of the classifiers"""
    train_on: tuple[str, ...] = ("fixed-seed0",)
    """classifiers that the attackers learn on, by name of the run"""
    test_on: tuple[str, ...] = (
        *(f"fixed-seed{seed}" for seed in (1, 2, 3, 4)),
        *(f"reinforce-seed{seed}" for seed in (1, 2, 3, 4)),
    )
    """classifiers that are attacked"""
    seeds: int = 3
    """attackers, and repetitions of the attacks that start at random"""
    budgets: tuple[int, ...] = (5, 10, 20, 50)
    """queries per image"""
    n: int | None = None
    """test images; None takes all"""
    attackers: str = "runs/attackers"
    """run folders of the attackers; not committed"""
    out: str = "results/referee"
    """where the results go"""
    data_dir: str | None = None
    """data folder (all but digits)"""


def train(seed: int, config: Config) -> Path:
    """The run folder of one attacker, trained, resumed or finished before."""
    root = Path(config.attackers)
    folder = root / f"{'+'.join(config.train_on)}-attacker{seed}"
    victims = [str(Path(config.runs_dir) / name) for name in config.train_on]
    had = RunFolder.open(folder).about()["config"] if folder.exists() else {"classifier": victims}
    if had.get("classifier") != victims:
        raise InputError(f"{folder} learned on {had.get('classifier')}: choose another --attackers")
    flags = ["--classifier", *victims, "--seed", str(seed)]
    flags += ["--data-dir", config.data_dir] if config.data_dir else []
    run_cell(Path(__file__).parents[1].joinpath("train_attacker.py"), folder, flags)
    return folder


def stepped(make: Callable[[Threat, int], GradientAttack]) -> Contestant:
    """A gradient attack of Q-1 steps and a last look."""

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, ball: Threat, queries: int, seed: int
    ) -> Tensor:
        stopping = replace(make(ball, queries - 1), stop_when_fooled=True)
        rng = stream(seed, "start", x.device)
        return stopping.run(model, x, y, rng=rng, check=False).x_adv

    return attack


def apgd(loss: str) -> Contestant:
    """AutoAttack's APGD: a random start and Q-1 steps; its look at the clean images is free."""

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, ball: Threat, queries: int, seed: int
    ) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack

        own = derive_seed(seed, "apgd") % 2**31
        judge = APGDAttack(
            model,
            n_iter=queries - 1,
            norm=ball.norm,
            eps=float(ball.eps),
            seed=own,
            loss=loss,
            device=x.device,
        )
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            found: Tensor = judge.perturb(x, y)
        return found.detach()

    return attack


def learned(folders: list[Path]) -> Contestant:
    """The attacker of the seed."""
    attackers = [load_attacker(folder) for folder in folders]

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, ball: Threat, queries: int, seed: int
    ) -> Tensor:
        rng = stream(seed, "jumps", x.device)
        return attackers[seed].attack(ball, queries).run(model, x, y, rng=rng, check=False).x_adv

    return attack


HAND_MADE: dict[str, Contestant] = {
    "PGD": stepped(pgd),
    "I-FGSM": stepped(lambda ball, steps: replace(pgd(ball, steps), start=None)),
    "MIM": stepped(mim),
    "APGD-CE": apgd("ce"),
    "APGD-DLR": apgd("dlr"),
}


def measure(
    name: str, contestant: Contestant, victim: Target, images: ImageSet, config: Config
) -> list[dict[str, Any]]:
    """Success and mean best margin of one attack on one classifier, per budget and seed."""
    x, y, found = images.floats(), images.labels, []
    with attacked(victim.model):
        with torch.no_grad():
            clean = margin(victim.model(x), y)
        x, y, clean = x[clean < 0], y[clean < 0], clean[clean < 0]
        for queries in config.budgets:
            for seed in range(config.seeds):
                x_adv = contestant(victim.model, x, y, victim.threat, queries, seed)
                assert (victim.threat.size(x_adv - x) <= float(victim.threat.eps) + 1e-6).all()
                with torch.no_grad():
                    reached = margin(victim.model(x_adv), y)
                row = {"attack": name, "classifier": victim.name, "seed": seed, "n": len(x)}
                success = float((reached > 0).float().mean())
                found.append({**row, "queries": queries, "success": success})
    return found


def summarise(cells: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Spread over seeds of the mean over classifiers, and paired differences over classifiers."""

    def success(attack: str, queries: int, **where: Any) -> float:
        wanted = {"attack": attack, "queries": queries, **where}
        return mean(float(c["success"]) for c in cells if all(c[k] == wanted[k] for k in wanted))

    names = list(dict.fromkeys(cell["attack"] for cell in cells))
    table = {
        name: {
            str(q): spread([success(name, q, seed=seed) for seed in range(config.seeds)])
            for q in config.budgets
        }
        for name in names
    }
    differences = {}
    for factor in (1, 2):  # at as many queries, and at half as many
        for q in (q for q in config.budgets if factor * q in config.budgets):
            for name in (name for name in names if name != LEARNED):
                differences[f"{LEARNED} at {q} - {name} at {factor * q}"] = spread(
                    [
                        success(LEARNED, q, classifier=one)
                        - success(name, factor * q, classifier=one)
                        for one in config.test_on
                    ]
                )
    return {"success": table, "differences": differences}


def as_markdown(about: dict[str, Any], config: Config) -> str:
    """The comparison for people."""
    summary, cells = about["summary"], about["cells"]
    lines = [
        f"# A learned schedule against hand-made ones at equal queries, {about['dataset']}",
        "",
        f"Success in % of the {min(c['n'] for c in cells)} to {max(c['n'] for c in cells)} test "
        f"images that are classified correctly, mean over {len(config.test_on)} classifiers; ± is "
        f"half of the 95 % t-interval over {config.seeds} seeds (attackers, random starts). "
        f"Attackers trained on {', '.join(config.train_on)}; "
        f"attacked: {', '.join(config.test_on)}.",
        "",
        "| attack | " + " | ".join(f"{q} queries" for q in config.budgets) + " |",
        "|---" * (len(config.budgets) + 1) + "|",
    ]
    for name, row in summary["success"].items():
        entries = [f"{100 * v['mean']:.2f} ± {100 * v['half_interval']:.2f}" for v in row.values()]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    lines += [
        "",
        "Differences in points, paired by classifier, with the 95 % t-interval over classifiers:",
        "",
        "| | difference |",
        "|---|---|",
    ]
    for name, v in summary["differences"].items():
        lines.append(f"| {name} | {100 * v['mean']:+.2f} ± {100 * v['half_interval']:.2f} |")
    lines += [
        "",
        "A query is a forward on one image. PGD, I-FGSM: step ε/4; MIM: ε/steps. PGD and APGD "
        "start at random, the others at the clean image, so that I-FGSM and MIM do not vary; "
        "APGD's look at the clean image is not counted.",
        "",
        f"Hardware: {about['device']}. Commit {about['commit'][:12]}.",
        "",
        f"Command: `{about['command']}`.",
        "",
    ]
    return "\n".join(lines)


def picture(summary: dict[str, Any], title: str) -> Figure:
    """Success against queries."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for number, (name, row) in enumerate(summary["success"].items()):
        queries = [int(q) for q in row]
        values = [100 * v["mean"] for v in row.values()]
        spans = [100 * v["half_interval"] for v in row.values()]
        style = {"lw": 2.4, "color": "black", "zorder": 5} if name == LEARNED else {"lw": 1.2}
        shifted = [q * 1.015 ** (number - 2) for q in queries]  # so that bars stand apart
        axis.errorbar(shifted, values, spans, label=name, marker="o", ms=3, capsize=2, **style)
    ticks = [int(q) for q in next(iter(summary["success"].values()))]
    axis.set(xscale="log", xlabel="queries per image", ylabel="success, %", title=title)
    axis.set_xticks(ticks, [str(q) for q in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main(config: Config) -> None:
    """Train what is missing, attack, write the results."""
    if config.seeds < 2 or not config.budgets or min(config.budgets) < 2:
        raise InputError("the study needs --seeds 2 or more and --budgets 2 or more")
    if shared := set(config.train_on) & set(config.test_on):
        raise InputError(f"{min(shared)} is both trained on and attacked")
    root, screen = Path(config.runs_dir), Console(stderr=True)
    victims = [from_run(root / name) for name in config.test_on]
    dataset = victims[0].dataset
    test = load_data(dataset, config.data_dir).test
    test = test if config.n is None else test.first(config.n)
    folders = []
    for seed in range(config.seeds):
        folders.append(train(seed, config))
        screen.print(f"attacker {seed + 1}/{config.seeds} {folders[-1]}")
    cells: list[dict[str, Any]] = []
    for name, contestant in {LEARNED: learned(folders), **HAND_MADE}.items():
        for victim in victims:
            cells += measure(name, contestant, victim, test, config)
        screen.print(f"measured {name}")
    about: dict[str, Any] = {
        **made_by(),
        "device": device_name(torch.device("cpu")),
        "dataset": dataset,
        "attackers": [RunFolder.open(one).report() for one in folders],
        "summary": summarise(cells, config),
        "cells": cells,
    }
    out = Path(config.out)
    write_atomically(out / f"attacker_{dataset}.json", json.dumps(about, indent=1) + "\n")
    write_atomically(out / f"attacker_{dataset}.md", as_markdown(about, config))
    title = f"Attack success on {dataset}, {len(victims)} unseen classifiers"
    save_figure(picture(about["summary"], title), out / f"attacker_{dataset}.png")

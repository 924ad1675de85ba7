"""How fast attacks, environments and games are, beside the bare model and other libraries.

    python scripts/benchmark.py                    # about half an hour on 2 idle cores
    python scripts/benchmark.py --only strategies,env --threads 1
    python scripts/benchmark.py --only games       # WRN-28-10, wide attacker; minutes
    python scripts/benchmark.py --only games --family baselines --network wrn-16-4
    python scripts/benchmark.py --only games --network small_cnn --shape 1 28 28 --width small
    python scripts/benchmark.py --only engine      # what each of its parts brings; 20 minutes
    python scripts/benchmark.py --only autoattack --repeats 3 --runs runs/mine --data-dir D

The contestants of a case take turns in shuffled order, so that a busy machine slows all of them;
ratios are medians over turns of the ratio within one turn. ``floor`` is what cannot be left out:
the bare model's passes, or the parts of an environment's step. The steps of games are held against
their own counts of passes (`cost/*` in their curves): what single passes took in the same run
predicts what a step takes. Games, engine and autoattack have a Markdown table beside the JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import tyro
from benchmarks import attacks, autoattack, engine, environments, games
from benchmarks.timing import Case, show
from lightning_fabric import Fabric

from advgame.errors import InputError
from advgame.run.cli import run_script
from advgame.run.files import write_atomically
from advgame.run.folder import cpu_name, device_name, made_by
from advgame.run.program import prog


@dataclass(frozen=True)
class Config(games.Games, autoattack.Judges):
    """Measure attacks, environments or games; prints tables and writes one JSON file."""

    only: str = "pgd,strategies,env,adaptive,duel,attack,imitation"
    """PGD-10 and its peers; steps per image and LAS-AT's masked loop; environments (adaptive:
    AdaptiveAttack-v0 beside the bare loop); GAIL; engine (what each of its parts brings PGD-10);
    games; autoattack beside pyautoattack"""
    repeats: int | None = None
    """how often every contestant takes its turn, 15 if not told, games 5; environments ten times,
    adaptive, whose turn is an episode, twice"""
    threads: int = 0
    """CPU threads; 0 is torch's default, all cores"""
    quick: bool = False
    """two repeats of the smallest network: for tests, not for figures"""
    out: str = "results/benchmark.json"
    """where the figures go"""


def main(config: Config) -> None:
    """Measure, print, write; InputError for settings that cannot work."""
    if (config.repeats is not None and config.repeats < 1) or config.threads < 0:
        raise InputError("--repeats must be 1 or above and --threads 0 or above")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    cuda = torch.cuda.is_available()
    precision: Any = "bf16-mixed" if cuda else "32-true"
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=1, precision=precision)
    cases = 1 if config.quick else len(attacks.NETWORKS) if cuda else 2
    attacked = environments.ATTACKED[: 1 if config.quick else 4 if cuda else 3]
    measures: dict[str, tuple[Callable[..., Case], list[Any]]] = {
        "pgd": (attacks.measure_pgd, attacks.NETWORKS[:cases]),
        "strategies": (attacks.measure_strategies, attacks.NETWORKS[:cases]),
        "env": (environments.measure_env, environments.data_sets()[:cases]),
        "adaptive": (
            environments.measure_adaptive,
            environments.adaptive_cases()[: 1 if config.quick else None],
        ),
        "duel": (environments.measure_duel, environments.data_sets()[:cases]),
        "attack": (environments.measure_attack, attacked),
        "imitation": (environments.measure_imitation, ["CartPole-v1", "MountainCar-v0"][:cases]),
        "engine": (engine.measure_engine, engine.QUERIES[: 1 if config.quick else None]),
        "games": (games.measure_games, [config]),
        "autoattack": (autoattack.measure_autoattack, []),
    }
    asked = config.only.split(",")
    if unknown := set(asked) - set(measures):
        raise InputError(f"--only knows {','.join(measures)}, not {','.join(sorted(unknown))}")
    if "autoattack" in asked:
        measures["autoattack"][1].extend(autoattack.targets(config))
    repeats = dict.fromkeys(measures, 2 if config.quick else config.repeats or 15)
    repeats["games"] = config.repeats or 5
    groups = {
        name: [measure(fabric, repeats[name], one) for one in ones]
        for name, (measure, ones) in measures.items()
        if name in asked
    }
    show(groups)
    found = {one.name: one.version for one in distributions()}
    about = made_by()
    about["versions"] |= {name: found.get(name, "not installed") for name in attacks.PEERS}
    turns = {name: repeats[name] for name in groups}
    about |= {
        "device": device_name(fabric.device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": "bf16-mixed, channels_last" if cuda else "fp32, colour channels_last",
        "repeats": turns if len(set(turns.values())) > 1 else repeats[asked[0]],
    }
    out = Path(config.out)
    write_atomically(out, json.dumps({**about, "groups": groups}, indent=2) + "\n")
    pages = [games.as_markdown(case, about) for case in groups.get("games", ())]
    if parts := groups.get("engine"):
        pages.append(engine.as_markdown(parts, {**about, "repeats": repeats["engine"]}))
    if judged := groups.get("autoattack"):
        pages.append(autoattack.as_markdown(judged, about))
    if pages:
        write_atomically(out.with_suffix(".md"), "\n".join(pages))


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config, prog=prog())))

"""How stable is imitation? Updaters of GAIL's discriminator against each other and controls.

    python scripts/study.py gail --env CartPole-v1 --setting paper --iterations 3000
    python scripts/study.py gail --env MountainCar-v0 --setting fixed --updaters adam-sn

Each cell is one run of `train_gail.py` (method x seed) in its own process; finished cells are
kept and interrupted ones resumed, so that the command can be given again, with more methods, too.
Runs that the results already hold stay there, also where their folders are gone.

Settings: `paper` has the task's own termination and the reward whose sign solves the task
(survival on CartPole, cost elsewhere); `fixed` has episodes of one length with absorbing states
and the neutral reward, so that only what the expert did can tell what to do.

Writes `<out>/<task>-<setting>/`: stability.json (every evaluation of every run), stability.md,
stability.png (the L2L paper's Fig. 6).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
import train_gail

from advgame.choices import Horizon
from advgame.errors import InputError, unknown
from advgame.health import deaths
from advgame.imitation.demonstrations import provenance, shipped, slug
from advgame.imitation.stability import (
    as_rows,
    pairs_as_lines,
    pairwise,
    score,
    summarise,
    with_stability,
)
from advgame.run.cells import check_cells, run_cells, same_flags, split_flags, usable, with_earlier
from advgame.run.curves import Rows, save_figure, seeds_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import Metrics, made_by
from advgame.seeding import stream
from agents.resemblance import expert_halves
from envs.imitation import ImitationVectorEnv
from envs.tasks import make_task, play

# name -> (what it is, flags of train_gail.py)
UPDATERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adam": ("Adam 0.01, Ho & Ermon's", ("--updater", "adam")),
    "adam-lockstep": ("Adam 0.01, all rows at one phase", ("--no-stagger",)),
    "adam-settle": ("Adam 0.01, shrinking policy steps", ("--settle", "100")),
    "adam-settle-lockstep": (
        "the same, all rows at one phase",
        ("--settle", "100", "--no-stagger"),
    ),
    "adam-small-kl": ("Adam 0.01, a tenth of the trust region", ("--max-kl", "0.001")),
    "adam-c-gail": ("Adam 0.01, C-GAIL's controller, weight 1", ("--controller", "1")),
    "adam-c-gail-10": ("Adam 0.01, C-GAIL's controller, weight 10", ("--controller", "10")),
    "adam-sn": ("Adam 0.01, spectral norm", ("--updater", "adam", "--spectral-norm")),
    "adam-gp": ("Adam 0.01, gradient penalty 10, norm 1", ("--updater", "adam", "--penalty", "10")),
    "adam-gp0": (
        "Adam 0.01, gradient penalty 1, norm 0",
        ("--updater", "adam", "--penalty", "1", "--penalty-target", "0"),
    ),
    "adam-replay": ("Adam 0.01, half of the policy's pairs from before", ("--replay", "0.5")),
    "adam-gp0-replay": (
        "Adam 0.01, gradient penalty 0.3, norm 0, and replay",
        ("--penalty", "0.3", "--penalty-target", "0", "--replay", "0.5"),
    ),
    "adam-gp0-replay-settle": (
        "Adam 0.01, penalty and replay as above, shrinking policy steps",
        ("--penalty", "0.3", "--penalty-target", "0", "--replay", "0.5", "--settle", "100"),
    ),
    "coordinatewise": ("one small learned network per coordinate", ("--updater", "coordinatewise")),
    "coordinatewise-gp0": (
        "the same, gradient penalty 1, norm 0",
        ("--updater", "coordinatewise", "--penalty", "1", "--penalty-target", "0"),
    ),
    "mlp-narrow": ("narrow U (512, 256), stabilised", ("--updater", "mlp-narrow")),
    "mlp": ("the paper's U, Adam 0.01", ("--updater", "mlp", "--save-every", "30")),
    "mlp-stable": (
        "the paper's U, stabilised, Adam 3e-7",
        ("--updater", "mlp-stable", "--save-every", "30"),
    ),
}
# U in full takes gigabytes: one at a time, and saved seldom
HEAVY = ("mlp", "mlp-stable")
CONTROLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "true": ("the task's own reward", ("--source", "true")),
    "true-lockstep": (
        "the task's own reward, all rows at one phase",
        ("--source", "true", "--no-stagger"),
    ),
    "constant": ("a constant reward", ("--source", "constant")),
    "random": ("a random discriminator, never updated", ("--source", "random")),
    "dummy": ("Adam 0.01, an expert that always takes action 0", ("--expert", "dummy")),
    "cloning": ("behaviour cloning", ("--source", "cloning")),
}
TRUE = ("true", "true-lockstep")  # controls that learn for as long as the updaters
METHODS = UPDATERS | CONTROLS
WATCHED = ("discriminator/loss", "discriminator/norm")
BLIND = "health/batch/blind"


@dataclass(frozen=True)
class Config:
    """Compare updaters over seeds, beside controls that need no expert."""

    env: str = "CartPole-v1"
    """task"""
    setting: Literal["paper", "fixed"] = "paper"
    """see above"""
    updaters: tuple[str, ...] = ("adam", "adam-sn", "coordinatewise")
    """which updaters"""
    controls: tuple[str, ...] = tuple(name for name in CONTROLS if name != "true-lockstep")
    """which controls"""
    seeds: int = 5
    """seeds per method"""
    first_seed: int = 0
    """the first of them; keep those that you tuned on out"""
    random_seeds: int = 20
    """seeds of the random discriminator, where one sign can decide"""
    iterations: int = 1000
    """of updaters and of the true reward"""
    control_iterations: int = 300
    """of the other controls"""
    heavy_iterations: int = 100
    """of U in full"""
    heavy_seeds: int = 1
    """seeds of U in full"""
    trajectories: int = 10
    """of the expert"""
    every: int = 1
    """keep every so many pairs of each"""
    jobs: int = 2
    """processes at a time, one thread each; U in full runs alone"""
    runs_dir: str = "runs/gail"
    """run folders, one per cell; not committed"""
    out: str = "results/gail"
    """where the results go"""
    extra: str = ""
    """further flags of train_gail.py for every cell, e.g. --extra="--algorithm ppo" """
    finished_only: bool = False
    """train nothing: write the results of the cells that are finished"""


def name_of(config: Config) -> str:
    """Of the comparison: task, setting and what is not the default of the demonstrations."""
    part = (config.trajectories, config.every)
    few = "" if part == (10, 1) else "-{}-every-{}".format(*part)
    return f"{slug(config.env)}-{config.setting}{few}"


def cells(config: Config) -> dict[str, list[str]]:
    """Name of each run -> its flags; the slow ones last."""
    preset = "paper" if config.setting == "paper" else "default"
    shared = ["--env", config.env, "--preset", preset]
    shared += ["--trajectories", str(config.trajectories), "--every", str(config.every)]
    found = {}
    methods = [m for m in METHODS if m in (*config.updaters, *config.controls)]
    for method in sorted(methods, key=lambda m: m in HEAVY):
        seeds, iterations = config.seeds, config.iterations
        if method in HEAVY:
            seeds, iterations = config.heavy_seeds, config.heavy_iterations
        elif method in CONTROLS and method not in TRUE:
            iterations = config.control_iterations
            seeds = config.random_seeds if method == "random" else seeds
        for seed in range(config.first_seed, config.first_seed + seeds):
            wanted = ["--iterations", str(iterations), *split_flags(config.extra)]
            flags = [*shared, *usable(wanted, METHODS[method][1], train_gail)]
            found[f"{method}-seed{seed}"] = [*flags, *METHODS[method][1], "--seed", str(seed)]
    return found


def references(env_id: str) -> dict[str, float]:
    """Mean returns of the random policy, over 1,000 episodes, and of the expert, over 100."""
    space = make_task(env_id, 1).action_space
    rng = stream(0, "random policy")

    def act(raw: torch.Tensor) -> torch.Tensor:
        return torch.randint(int(space.n), (len(raw),), generator=rng)  # type: ignore[union-attr]

    returns = play(env_id, act, 1000, stream(0, "random starts"))["returns"]
    expert = provenance(env_id)["expert"]["returns"]["mean"]
    return {"random": float(returns.mean()), "expert": float(expert)}


def imitated(config: Config) -> ImitationVectorEnv:
    """The environment of the cells, for its pairs and ends of episodes."""
    horizon: Horizon = "task" if config.setting == "paper" else "fixed"
    return ImitationVectorEnv(1, env_id=config.env, horizon=horizon)


def read(folder: Path, method: str, seed: int, ends: Mapping[str, float]) -> dict[str, Any]:
    """What one finished run says."""
    report = read_json(folder / "report.json")
    about = read_json(folder / "config.json")
    rows: list[dict[str, float]] = []
    if not (folder / "metrics.csv").exists():  # cloned, or diverged before the first evaluation
        steps = [report["diverged"]["iteration"] if report["diverged"] else 0]
        returns, errors = [report["eval/return"]], [report["eval/standard_error"]]
    else:
        rows = Metrics.read(folder / "metrics.csv")
        steps = [int(row["step"]) for row in rows]
        returns = [row["eval/return"] for row in rows]
        errors = [row["eval/standard_error"] for row in rows]
    watched = [row for row in rows if "discriminator/loss" in row]
    gaps = [r["discriminator/logit_expert"] - r["discriminator/logit_policy"] for r in watched]
    curves = {tag: [float(f"{r[tag]:.4g}") for r in watched] for tag in WATCHED}
    return {
        "method": method,
        "seed": seed,
        "iterations": steps[-1],
        "asked": about["config"]["iterations"],
        "diverged": report["diverged"],
        "standard_errors": [round(e / (ends["expert"] - ends["random"]), 4) for e in errors],
        "logit_gap": mean(abs(gap) for gap in gaps) if gaps else None,
        "imitation": {
            way: {name: round(value, 4) for name, value in found.items()}
            for way, found in report.get("imitation", {}).items()
        },
        "flags": [death.name for death in deaths(rows)],
        "blind": mean(one) if (one := [r[BLIND] for r in rows if BLIND in r]) else None,
        "seconds_per_iteration": rows[-1]["time/seconds"] / steps[-1] if rows else None,
        "commit": about["commit"],
        "every": about["config"]["evaluate_every"],
        "scores": [round(score(one, **ends), 6) for one in returns],
        "curves": curves if watched else {},
    }


def as_markdown(config: Config, about: Mapping[str, Any]) -> str:
    """The comparison for people."""
    ends, errors = about["references"], [e for r in about["runs"] for e in r["standard_errors"]]
    lines = [
        f"# {config.env}, setting {config.setting}: stability of imitation",
        "",
        f"Score 0 is the random policy ({ends['random']:.1f}, 1,000 episodes), 1 the expert "
        f"({ends['expert']:.1f}, 100 episodes); {config.trajectories} demonstrated trajectories, "
        f"{'all pairs' if config.every == 1 else f'one pair in {config.every}'} of them. "
        "An evaluation is 200 fresh episodes of the deterministic policy, every 10 iterations; its "
        f"standard error is {median(errors):.3f} (median), at most {max(errors):.3f}, and above "
        f"0.02 in {mean(e > 0.02 for e in errors):.0%} of them. After a run first reaches 0.95: "
        "share of evaluations below 0.90, falls below 0.70, worst; last: the last 50 iterations. "
        "A run that never reaches 0.95 counts as below 0.90 throughout, one that diverges from "
        "there on. Settled: the same share "
        "after five evaluations of 0.95 or more in a row, and the runs that got there.",
        "",
        "| method | what it is | iterations | reached 0.95 | first (median) | "
        "below 0.90, mean (per seed) | falls | worst | settled | last: mean (range) |",
        "|---" * 10 + "|",
    ]
    for method, row in about["summary"].items():
        first = "–" if row["first"] is None else f"{row['first']:.0f}"
        worst = "–" if row["worst"] is None else f"{row['worst']:.2f}"
        few = row["seeds"] <= 5
        shares = " ".join(f"{one:.2f}" for one in row["dips"])
        dips = f"{mean(row['dips']):.3f}" + (f" ({shares})" if few else "")
        falls = " ".join("–" if one is None else str(one) for one in row["drops"]) if few else ""
        last = f"{mean(row['last']):.2f} ({min(row['last']):.2f} – {max(row['last']):.2f})"
        ended = f", {row['diverged']} diverged" if row["diverged"] else ""
        calm = [one for one in row["settled_dips"] if one is not None]
        settled = f"{mean(calm):.3f} in {len(calm)}" if calm else "–"
        if method == "cloning":
            first, dips, falls, worst = "–", "–", "–", "–"
        lines.append(
            f"| {method} | {METHODS[method][0]} | {row['iterations']} | "
            f"{row['reached']} of {row['seeds']}{ended} | {first} | {dips} | {falls} | {worst} | "
            f"{settled} | {last} |"
        )
    lines += imitation_as_lines(about["runs"], about["expert_halves"])
    lines += pairs_as_lines(about["tests"])
    flags = sorted({f"{r['method']}: {f}" for r in about["runs"] for f in r.get("flags", [])})
    lines += ["", f"Flags raised: {', '.join(flags) or 'none'}."]
    lines += ["", f"Hardware: {about['device']}. Command: `{about['command']}`.", ""]
    return "\n".join(lines)


def imitation_as_lines(runs: Sequence[Mapping[str, Any]], halves: Sequence[float]) -> list[str]:
    """How far the final policies are from the expert, and what the discriminator saw."""
    if not any(run.get("imitation") for run in runs):  # of before it was measured
        return []
    lines = [
        "",
        "Is it imitation? A fresh discriminator learns to convergence against the final policy and "
        "is judged on held-out episodes of both (`advgame.imitation.resemblance`): loss (chance "
        "1.386) and accuracy, mean over seeds, of the sampled policy and of the deterministic one. "
        "Two halves of the expert's own trajectories, told apart in the same way, give "
        f"{' and '.join(f'{loss:.2f}' for loss in halves)}. "
        "Blind: share of iterations in which next to all pairs of the policy were absorbing.",
        "",
        "| method | seeds | sampled: loss | accuracy | deterministic: loss | accuracy | blind |",
        "|---" * 7 + "|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method and run.get("imitation")]
        if not mine:
            continue
        cells = [method, str(len(mine))]
        for way in ("sampled", "deterministic"):
            for name in ("loss", "accuracy"):
                values = [run["imitation"][way][name] for run in mine]
                cells.append(f"{mean(values):.2f} ({min(values):.2f} – {max(values):.2f})")
        blind = [run["blind"] for run in mine if run["blind"] is not None]
        cells.append(f"{mean(blind):.2f}" if blind else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(config: Config, about: Mapping[str, Any], path: Path) -> None:
    """The L2L paper's Fig. 6, and what the discriminator did meanwhile."""
    runs: dict[str, list[Rows]] = {}
    for run in about["runs"]:
        if run["iterations"] and run["method"] in (*UPDATERS, *TRUE):
            runs.setdefault(run["method"], []).append(as_rows(run))
    if not runs:  # controls that end where they began
        return
    tags = {
        "score": "true return (random policy 0, expert 1)",
        "discriminator/loss": "discriminator's loss (chance 1.386)",
        "discriminator/norm": "‖θ_D‖",
    }
    drawn = {tag for rows in runs.values() for one in rows for tag in one[0]}
    tags = {tag: name for tag, name in tags.items() if tag in drawn}
    title = f"{config.env}, {config.setting}: mean and 10–90 % band over seeds"
    save_figure(seeds_figure(runs, tags, title, x="iteration", band=(0.1, 0.9)), path)


def check(config: Config) -> None:
    """Refuse what cannot work, before any work."""
    for name in (*config.updaters, *config.controls):
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    numbers = (config.seeds, config.jobs, config.iterations, config.control_iterations)
    if min(*numbers, config.heavy_iterations, config.heavy_seeds, config.random_seeds) < 1:
        raise InputError("seeds, jobs and iterations must be 1 or above")
    provenance(config.env)


def main(config: Config) -> None:
    """Train what is missing, then write the results."""
    check(config)
    todo, root = cells(config), Path(config.runs_dir) / name_of(config)
    out = Path(config.out) / name_of(config)
    check_cells(train_gail, todo, config.jobs)
    with_earlier([], out / "stability.json", config.extra)  # refuses before any training
    if not config.finished_only:
        same_flags(root, config.extra)
        script = Path(__file__).parents[1].joinpath("train_gail.py")
        heavy = {name: f for name, f in todo.items() if name.rsplit("-seed", 1)[0] in HEAVY}
        light = {name: f for name, f in todo.items() if name not in heavy}
        run_cells(script, root, light, config.jobs)
        run_cells(script, root, heavy, jobs=1)
    ends, results = references(config.env), []
    for name in todo:
        if (root / name / "report.json").exists():
            method, seed = name.rsplit("-seed", 1)
            results.append(read(root / name, method, int(seed), ends))
    runs = [with_stability(r) for r in with_earlier(results, out / "stability.json", config.extra)]
    if not runs:
        raise InputError(f"{root} holds no finished run")
    runs.sort(key=lambda run: list(METHODS).index(run["method"]))
    summary = summarise(runs)
    about = {
        **made_by(),
        "device": f"cpu, {config.jobs} processes of 1 thread",
        "extra": config.extra,
        "references": ends,
        "expert_halves": expert_halves(imitated(config), shipped(config.env)),
        "summary": summary,
        "tests": pairwise(runs, (*UPDATERS, *TRUE)),
        "runs": runs,
    }
    write_atomically(out / "stability.json", json.dumps(about) + "\n")
    write_atomically(out / "stability.md", as_markdown(config, about))
    if results:  # else there are no curves that the picture has not
        picture(config, about, out / "stability.png")
    print(f"{len(results)} of {len(todo)} runs, {len(runs)} in all; {out}/stability.md")

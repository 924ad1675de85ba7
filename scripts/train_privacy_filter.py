"""Train a privacy filter on digits and report what it keeps and what it gives away.

    python scripts/train_privacy_filter.py                             # keep digits, hide slant
    python scripts/train_privacy_filter.py --keep attribute            # the reverse
    python scripts/train_privacy_filter.py --keep parity --filter mlp  # odd or even, but not which
    python scripts/train_privacy_filter.py --filter pca                # a baseline without training
    python scripts/train_privacy_filter.py --resume runs/NAME          # after an interrupt

The classifiers of the game are thrown away. Fresh ones are trained on what the filter gives out,
chosen on the validation split, and the test split is reported. A run takes seconds, so there is no
checkpoint in the middle: --resume starts an interrupted run again, to the same bits.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from advgame.errors import InputError
from advgame.run import job as jobs
from advgame.run.folder import Metrics, RunFolder
from advgame.run.options import Count

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from advgame.privacy import Filter, FilterTraining, PrivacyTask
    from advgame.run.curves import Panels

    Made = tuple[PrivacyTask, Filter, FilterTraining | None]

PANELS: Panels = {
    "Risks on the training split": (
        "nats",
        {
            "game/useful_risk": "useful label",
            "game/private_risk": "private label",
            "game/risk": "ρ useful − private",
        },
    ),
    "Accuracy on the validation split": (
        "share, by the classifiers of the game",
        {"eval/useful": "useful label", "eval/private": "private label"},
    ),
    "Slopes": ("norm", {"game/descent": "filter and task", "game/ascent": "adversary"}),
}
MEASURES = 20  # of a training


@dataclass(frozen=True)
class Config:
    """Train a privacy filter on digits and report what it keeps and what it gives away."""

    keep: Literal["class", "attribute", "parity"] = "class"
    """class hides the attribute, attribute hides the class, parity hides which digit it is"""
    attribute: Literal["slant", "stroke", "inversion"] = "slant"
    """planted by a fair coin; of no effect for parity"""
    filter: Literal["linear", "mlp", "random", "pca", "raw"] = "linear"
    """linear and mlp are trained; random projection, PCA and raw images are baselines"""
    dim: int = 10
    """d, numbers that the filter gives out per image; raw gives all pixels"""
    rho: float = 1.0
    """ρ, weight of the useful label against the private one"""
    solver: Literal["alt", "minimax", "k-beam"] = "minimax"
    """plain descent and ascent, with the sensitivity penalty, or against several adversaries"""
    gamma: float = 1.0
    """minimax: γ of the penalty"""
    ascent_steps: int = 5
    """of the adversary per step of the filter"""
    beams: int = 3
    """k-beam: adversaries"""
    adversary: Literal["linear", "mlp"] = "mlp"
    """kind of the classifiers in the game"""
    hidden: Count = 32
    """width of every MLP"""
    steps: Count = 800
    """of the filter"""
    batch_size: int = 256
    """images per step"""
    lr: float = 1e-3
    """of Adam on filter and task classifier"""
    adversary_lr: float = 2e-2
    """of Adam on the adversary"""
    weight_decay: float = 1e-3
    """of both"""
    restarts: Count = 3
    """fresh MLPs per setting"""
    seed: int = 0
    """of attribute, filter, classifiers and batches"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the time when empty"""
    resume: str | None = None
    """a run folder to finish"""


# settings of `FilterTraining`
PLAYED = (
    "rho", "solver", "gamma", "ascent_steps", "beams", "adversary", "hidden", "lr", "adversary_lr",
    "weight_decay", "batch_size", "seed",
)  # fmt: skip


def train(config: Config, game: FilterTraining, run: RunFolder) -> dict[str, float]:
    """Play, with curves; returns where the game ended."""
    from advgame.run.curves import Curves, game_figure, save_figure

    (run.path / "metrics.csv").unlink(missing_ok=True)
    metrics, curves = Metrics(run.path / "metrics.csv"), Curves(run.path, purge_step=0)
    every, row = max(1, config.steps // MEASURES), {"step": 0.0, **game.measure()}
    metrics.add(row)
    for step in range(1, config.steps + 1):
        slopes = game.step()
        if step % every and step != config.steps:
            continue
        row = {"step": step, **game.measure(), **{k: float(v) for k, v in slopes.items()}}
        if not all(math.isfinite(value) for value in row.values()):
            raise InputError(f"training diverged in step {step}: start a new run, lower --lr")
        metrics.add(row)
        curves.scalars({name: value for name, value in row.items() if "/" in name}, step)
    curves.close()
    title = f"{game.task.name}, {config.filter} filter, d = {config.dim}, seed {config.seed}"
    save_figure(
        game_figure(metrics.rows, title, PANELS, x=("step", "step")), run.path / "curves.png"
    )
    return row


def judge(config: Config, task: PrivacyTask, filter_: Filter) -> dict[str, Any]:
    """What fresh classifiers find in what the filter gives out."""
    import torch

    from advgame.privacy import strongest, try_all
    from advgame.seeding import derive_seed
    from advgame.statistics import wilson

    parts = (task.train, task.validation, task.test)
    with torch.no_grad():
        z = [filter_(part.x) for part in parts]
    found: dict[str, Any] = {}
    for label in ("useful", "private"):
        labels = [getattr(part, label) for part in parts]
        near, mid, far = zip(z, labels, strict=True)
        kinds = try_all(
            near,
            mid,
            far,
            getattr(task, f"{label}_classes"),
            seed=derive_seed(config.seed, "fresh"),
            restarts=config.restarts,
            hidden=config.hidden,
        )
        best = strongest(kinds)
        found[label] = {
            "accuracy": kinds[best].test,
            "interval": wilson(kinds[best].test, len(z[2])),
            "by": best,
            "guess": task.guess(label),
            "kinds": {kind: asdict(one) for kind, one in kinds.items()},
        }
    found["private"]["floor"] = task.floor()
    return found


def as_markdown(config: Config, report: dict[str, Any]) -> str:
    """The report in Markdown: accuracies of fresh classifiers on both labels."""
    kinds = list(report["useful"]["kinds"])
    lines = [
        f"# {report['task']}",
        "",
        f"Filter: {config.filter}, d = {report['dim']}, seed {config.seed}; {report['n']} test "
        "images. Accuracy in % of fresh classifiers on what the filter gives out; the strongest "
        "is the one that the validation split chose, with its 95 % interval (Wilson).",
        "",
        f"| label | strongest | {' | '.join(kinds)} | most frequent class | "
        "told the useful label |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for label in ("useful", "private"):
        row = report[label]
        low, high = row["interval"]
        cells = [f"{100 * row['accuracy']:.1f} ({100 * low:.1f} – {100 * high:.1f}), {row['by']}"]
        cells += [f"{100 * row['kinds'][kind]['test']:.1f}" for kind in kinds]
        cells += [f"{100 * row['guess']:.1f}"]
        cells += [f"{100 * row['floor']:.1f}" if "floor" in row else "–"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "This promises privacy against these classifiers with this much data, and no more. "
        f"Hardware: {report['device']}.",
        "",
    ]
    return "\n".join(lines)


class Job(jobs.Job[Config, "Made"]):
    """The filter's training and its report."""

    config = Config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        games = (
            "rho", "solver", "gamma", "ascent_steps", "beams", "adversary", "steps", "batch_size",
            "lr", "adversary_lr", "weight_decay",
        )  # fmt: skip
        from advgame.privacy import FILTERS

        found: dict[str, tuple[str, ...]] = {}
        if config.filter not in FILTERS:
            found[f"--filter {config.filter}"] = games + (
                ("dim",) if config.filter == "raw" else ()
            )
        if config.keep == "parity":
            found["--keep parity"] = ("attribute",)
        whose = {"gamma": "minimax", "beams": "k-beam"}
        others = tuple(name for name, solver in whose.items() if config.solver != solver)
        return {**found, f"--solver {config.solver}": others}

    def build(self, config: Config, fabric: Fabric | None = None) -> Made:
        """Task, filter, and the training, where the filter is one to be trained."""
        from advgame.data import load_data
        from advgame.privacy import FILTERS, FilterTraining, make_filter, make_task

        task = make_task(load_data("digits"), config.keep, config.attribute, config.seed)
        filter_ = make_filter(config.filter, task.train.x, config.dim, config.seed, config.hidden)
        if config.filter not in FILTERS:
            return task, filter_, None
        settings = {name: getattr(config, name) for name in PLAYED}
        return task, filter_, FilterTraining(task, filter_, **settings)

    def work(self, config: Config, run: RunFolder, made: Made, *, resume: bool) -> None:
        """Train, where there is something to train, judge and write the report."""
        from advgame.run.checkpoint import save_weights

        began, (task, filter_, game) = time.perf_counter(), made
        end = {} if game is None else train(config, game, run)
        filter_ = filter_ if game is None else game.filter()
        save_weights(filter_, run.path / "filter.safetensors")
        report = {
            "task": task.name,
            "dim": filter_.dim,
            "n": len(task.test.x),
            "device": run.about()["device"],
            **judge(config, task, filter_),
            "game": end,
            "timing": {"seconds": time.perf_counter() - began},
        }
        run.write_text("report.md", as_markdown(config, report))
        run.write_json("report.json", report)

    def told(self, run: RunFolder) -> str:
        """What is kept and what is given away."""
        report = run.report()
        found = ", ".join(
            f"{label} {100 * report[label]['accuracy']:.1f} % "
            f"(most frequent class {100 * report[label]['guess']:.1f})"
            for label in ("useful", "private")
        )
        return f"{found}; more in {run.path}/report.md"


job = Job()

if __name__ == "__main__":
    job.main()

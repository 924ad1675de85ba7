"""How stable is imitation? Updaters of GAIL's discriminator against each other and controls.

    python scripts/study.py gail --env CartPole-v1 --setting paper --iterations 3000
    python scripts/study.py gail --env MountainCar-v0 --setting fixed --updaters adam-sn
    python scripts/study.py gail --env my_task:Reach-v0 --demonstrations reach.npz --setting fixed
    python scripts/study.py gail --updaters adam "my_updaters:Signum(0.001)"    # your own

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

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import train_gail
from typing_extensions import override

from advgame.choices import Horizon
from advgame.classifiers.foreign import weights_digest
from advgame.errors import InputError, unknown
from advgame.health import deaths
from advgame.imitation.demonstrations import Demonstrations, provenance, shipped, slug
from advgame.imitation.stability import as_rows, pairwise, score, summarise, with_stability
from advgame.own_code import own_code
from advgame.run import table
from advgame.run.cells import split_flags, usable
from advgame.run.curves import Rows, save_figure, seeds_figure
from advgame.run.files import read_json
from advgame.run.folder import Metrics
from advgame.run.options import Count
from advgame.run.study import StudyConfig
from advgame.run.table import Column, Columns, Row, Runs
from advgame.run.training_study import Flags, TrainingStudy
from agents.gail import random_returns
from agents.resemblance import expert_halves
from envs.imitation import ImitationVectorEnv
from envs.tasks import NATIVE, make_task

# name -> (what it is, flags of train_gail.py)
UPDATERS = {
    "adam": ("Adam 0.01, Ho & Ermon's", "--updater adam"),
    "adam-lockstep": ("Adam 0.01, all rows at one phase", "--no-stagger"),
    "adam-settle": ("Adam 0.01, shrinking policy steps", "--settle 100"),
    "adam-settle-lockstep": ("the same, all rows at one phase", "--settle 100 --no-stagger"),
    "adam-small-kl": ("Adam 0.01, a tenth of the trust region", "--max-kl 0.001"),
    "adam-c-gail": ("Adam 0.01, C-GAIL's controller, weight 1", "--controller 1"),
    "adam-c-gail-10": ("Adam 0.01, C-GAIL's controller, weight 10", "--controller 10"),
    "adam-sn": ("Adam 0.01, spectral norm", "--updater adam --spectral-norm"),
    "adam-gp": ("Adam 0.01, gradient penalty 10, norm 1", "--updater adam --penalty 10"),
    "adam-gp0": (
        "Adam 0.01, gradient penalty 1, norm 0",
        "--updater adam --penalty 1 --penalty-target 0",
    ),
    "adam-replay": ("Adam 0.01, half of the policy's pairs from before", "--replay 0.5"),
    "adam-gp0-replay": (
        "Adam 0.01, gradient penalty 0.3, norm 0, and replay",
        "--penalty 0.3 --penalty-target 0 --replay 0.5",
    ),
    "adam-gp0-replay-settle": (
        "Adam 0.01, penalty and replay as above, shrinking policy steps",
        "--penalty 0.3 --penalty-target 0 --replay 0.5 --settle 100",
    ),
    "coordinatewise": ("one small learned network per coordinate", "--updater coordinatewise"),
    "coordinatewise-gp0": (
        "the same, gradient penalty 1, norm 0",
        "--updater coordinatewise --penalty 1 --penalty-target 0",
    ),
    "mlp-narrow": ("narrow U (512, 256), stabilised", "--updater mlp-narrow"),
    "mlp": ("the paper's U, Adam 0.01", "--updater mlp --save-every 30"),
    "mlp-stable": ("the paper's U, stabilised, Adam 3e-7", "--updater mlp-stable --save-every 30"),
}
# U in full takes gigabytes: one at a time, and saved seldom
HEAVY = ("mlp", "mlp-stable")
CONTROLS = {
    "true": ("the task's own reward", "--source true"),
    "true-lockstep": ("the task's own reward, all rows at one phase", "--source true --no-stagger"),
    "constant": ("a constant reward", "--source constant"),
    "random": ("a random discriminator, never updated", "--source random"),
    "dummy": ("Adam 0.01, an expert that always takes action 0", "--expert dummy"),
    "cloning": ("behaviour cloning", "--source cloning"),
}
TRUE = ("true", "true-lockstep")  # controls that learn for as long as the updaters
METHODS = UPDATERS | CONTROLS
LONG = (*UPDATERS, *TRUE)
PRESETS = {"paper": "paper", "fixed": "default"}
CURVES = {
    "score": "true return, random 0, expert 1",
    "discriminator/loss": "discriminator's loss, nats; chance 1.386",
    "discriminator/norm": "‖θ_D‖, L2 norm",
}
WATCHED = ("discriminator/loss", "discriminator/norm")
BLIND = "health/batch/blind"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare updaters over seeds, beside controls that need no expert."""

    env: str = "CartPole-v1"
    """task: any Gymnasium id, or module:id of your own"""
    demonstrations: str | None = None
    """an .npz of ours, D4RL's or imitation's; those that ship with the package when not given"""
    setting: Literal["paper", "fixed"] = "paper"
    """paper: the task's own ends, and a reward whose sign can solve the task alone; fixed: episodes
    of one length with absorbing states, and the neutral reward"""
    updaters: tuple[str, ...] = ("adam", "adam-sn", "coordinatewise")
    """adam, adam-sn, coordinatewise, … (a wrong name is answered by all of them), or your own,
    module:factory(0.1)"""
    controls: tuple[str, ...] = tuple(name for name in CONTROLS if name != "true-lockstep")
    """which controls"""
    seeds: Count = 5
    random_seeds: Count = 20
    """seeds of the random discriminator, where one sign can decide"""
    iterations: Count = 1000
    """of updaters and of the true reward"""
    control_iterations: Count = 300
    """of the other controls"""
    heavy_iterations: Count = 100
    """of U in full"""
    heavy_seeds: Count = 1
    """seeds of U in full"""
    trajectories: Count = 10
    """of the expert"""
    every: Count = 1
    """keep every so many pairs of each"""
    runs_dir: str = "runs/gail"
    out: str = "results/gail"


LENGTHS = ("iterations", "control_iterations", "heavy_iterations")


class Gail(TrainingStudy[Config]):
    """Updaters and controls; U in full runs alone."""

    about, script = "stability of imitation", train_gail
    ending = ("Flags raised: {flags}.", "Hardware: {device}. Command: `{command}`.")
    sharing = ("demonstrations",)
    unsaid: Mapping[str, Any] = {one: getattr(Config, one) for one in LENGTHS}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        own = {named(word): f"--updater {shlex.quote(word)}" for word in config.updaters}
        known = {name: flags for name, (_, flags) in METHODS.items()}
        self.methods = {**{name: own[name] for name in own if name not in known}, **known}

    @property
    def stem(self) -> str:
        """Task, setting and what is not the default of the demonstrations."""
        part = (self.config.trajectories, self.config.every)
        few = "" if part == (10, 1) else "-{}-every-{}".format(*part)
        return f"{slug(self.config.env)}-{self.config.setting}{few}"

    @property
    @override
    def path(self) -> Path:
        return Path(self.config.out) / self.stem / "stability.json"

    @override
    def facts(self) -> dict[str, Any]:
        """Lengths, and demonstrations of one's own by their digest: a file may be replaced."""
        lengths = {one: getattr(self.config, one) for one in LENGTHS}
        return {**lengths, "demonstrations": self.digest} if self.digest else lengths

    @override
    def agree(self, root: Path, flags: str) -> None:
        super().agree(root, f"{flags} --digest {self.digest}" if self.digest else flags)

    def asked(self) -> list[str]:
        """Updaters and controls, the slow ones last."""
        updaters = map(named, self.config.updaters)
        asked = dict.fromkeys((*updaters, *self.config.controls))
        return sorted(asked, key=lambda m: (m in HEAVY, [*METHODS, m].index(m)))

    @override
    def check(self) -> None:
        called = {name: name for name in METHODS}
        for name in self.config.updaters:
            if name not in UPDATERS:
                if ":" not in name:
                    raise unknown("updater", name, UPDATERS)
                own_code(name).find()
            other = called.setdefault(named(name), name)
            if other != name:
                raise InputError(
                    f"the study would call both {other} and {name} {named(name)}: give one of them "
                    "a factory of another name"
                )
        super().check()
        self.demonstrations.subset(self.config.trajectories)
        if not self.demonstrations.paid:
            raise InputError(
                f"{self.config.demonstrations} has no rewards: the study measures by the expert's "
                "return, train_gail.py alone imitates without"
            )
        score(0.0, **self.ends)  # refuses an expert at the level of chance

    @override
    def prepare(self, cells: Mapping[str, Flags]) -> None:
        super().prepare(cells)
        if self.config.env not in NATIVE:
            begun = [path.parent for path in self.root.glob("*/config.json")]
            halves = [one for one in begun if not (one / "report.json").exists()]
            if halves and not self.config.finished_only:
                raise InputError(
                    f"{halves[0]} was interrupted, and a run on {self.config.env} cannot be "
                    "resumed: delete that folder, the study makes it again"
                )
        one = {self.key(name, None)[0]: flags for name, flags in cells.items()}
        for method, flags in one.items():
            if method not in METHODS and not self.config.finished_only:
                train_gail.make_parts(train_gail.job.parse(flags))  # own code fails now or never

    @override
    def cells(self) -> dict[str, list[str]]:
        config, found = self.config, dict[str, list[str]]()
        shared = ["--env", config.env, "--preset", PRESETS[config.setting]]
        shared += ["--trajectories", str(config.trajectories), "--every", str(config.every)]
        for method in self.asked():
            count, iterations = config.seeds, config.iterations
            if method in HEAVY:
                count, iterations = config.heavy_seeds, config.heavy_iterations
            elif method in CONTROLS and method not in TRUE:
                iterations = config.control_iterations
                count = config.random_seeds if method == "random" else count
            own = split_flags(self.methods[method])
            wanted = ["--iterations", str(iterations), *self.shared()]
            for seed in range(config.first_seed, config.first_seed + count):
                flags = [*shared, *usable(wanted, own, train_gail), *own, "--seed", str(seed)]
                found[f"{method}-seed{seed}"] = flags
        return found

    def run(self, cells: Mapping[str, Flags]) -> None:
        """U in full takes gigabytes: one at a time, after the others."""
        heavy = {name: f for name, f in cells.items() if name.rsplit("-seed", 1)[0] in HEAVY}
        super().run({name: f for name, f in cells.items() if name not in heavy})
        self.run_all([self.cell(name, flags) for name, flags in heavy.items()], jobs=1)

    @cached_property
    def demonstrations(self) -> Demonstrations:
        """All that there are, of the task."""
        if self.config.demonstrations is None:
            return shipped(self.config.env)
        space = make_task(self.config.env, 1).action_space
        return Demonstrations.load(self.config.demonstrations, self.config.env, space)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of one's own demonstrations; "" of those that ship with the package."""
        if self.config.demonstrations is None:
            return ""
        return weights_digest(self.demonstrations.as_module())

    @cached_property
    def episodes(self) -> dict[str, int]:
        """Over how many the mean returns of random policy and expert are."""
        own = len(self.demonstrations)  # the package's expert was judged on others
        return {
            "random": 1000 if self.config.env in NATIVE else 100,
            "expert": 100 if self.config.demonstrations is None else own,
        }

    @cached_property
    def ends(self) -> dict[str, float]:
        """Mean returns of the random policy and of the expert."""
        returns = random_returns(self.config.env, self.episodes["random"])
        expert = float(self.demonstrations.returns.mean())
        if self.config.demonstrations is None:
            expert = float(provenance(self.config.env)["expert"]["returns"]["mean"])
        return {"random": float(returns.mean()), "expert": expert}

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        report, about = read_json(folder / "report.json"), read_json(folder / "config.json")
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
        method, seed = self.key(folder.name, None)
        reach = self.ends["expert"] - self.ends["random"]
        return with_stability(
            {
                "method": method,
                "seed": seed,
                **({} if method in METHODS else {"updater": about["config"]["updater"]}),
                "iterations": steps[-1],
                "asked": about["config"]["iterations"],
                "diverged": report["diverged"],
                "standard_errors": [round(e / reach, 4) for e in errors],
                "logit_gap": mean(abs(gap) for gap in gaps) if gaps else None,
                "imitation": {
                    way: {name: round(value, 4) for name, value in found.items()}
                    for way, found in report.get("imitation", {}).items()
                },
                "flags": [death.name for death in deaths(rows)],
                "blind": mean(one) if (one := [r[BLIND] for r in rows if BLIND in r]) else None,
                "seconds_per_iteration": rows[-1]["time/seconds"] / steps[-1] if rows else None,
                "commit": about["commit"],
                "device": about["device"],
                "every": about["config"]["evaluate_every"],
                "evaluated": about["config"]["episodes"],
                "scores": [round(score(one, **self.ends), 6) for one in returns],
                "curves": curves if watched else {},
            }
        )

    def found(self, runs: Runs) -> dict[str, Any]:
        """What scores are measured by, and which methods differ by more than their seeds do."""
        horizon: Horizon = "task" if self.config.setting == "paper" else "fixed"
        env = ImitationVectorEnv(1, env_id=self.config.env, horizon=horizon)
        expert = self.demonstrations
        return {
            "references": self.ends,
            "episodes": self.episodes,
            "expert_halves": expert_halves(env, expert) if len(expert) >= 8 else [],
            "summary": summarise(runs),
            "tests": pairwise(runs, learning(runs)),
        }

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        config, ends = self.config, about["references"]
        counts = about.get("episodes", {"random": 1000, "expert": 100})
        errors = [e for run in runs for e in run["standard_errors"]]
        every = "all pairs" if config.every == 1 else f"one pair in {config.every}"
        return [
            f"# {config.env}, setting {config.setting}: {self.about}",
            f"Score 0 is the random policy ({ends['random']:.1f}, {counts['random']:,} episodes), "
            f"1 the expert ({ends['expert']:.1f}, {counts['expert']} episodes); "
            f"{config.trajectories} demonstrated trajectories, {every} of them. "
            f"An evaluation is {evaluations(runs)}; "
            f"its standard error is {median(errors):.3f} (median), at most {max(errors):.3f}, and "
            f"above 0.02 in {mean(e > 0.02 for e in errors):.0%} of them. After a run first "
            "reaches 0.95: "
            "share of evaluations below 0.90, falls below 0.70, worst; last: the last 50 "
            "iterations. "
            "A run that never reaches 0.95 counts as below 0.90 throughout, one that diverges from "
            "there on. Settled: the same share "
            "after five evaluations of 0.95 or more in a row, and the runs that got there.",
            table.render(COLUMNS, table.rows(runs)),
            *resemblance(runs, about.get("expert_halves", ())),
            *differences(pairwise(runs, learning(runs))),
        ]

    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        """The L2L paper's Fig. 6, and what the discriminator did meanwhile."""
        shown: dict[str, list[Rows]] = {}
        for run in runs:
            if run["iterations"] and run["method"] in learning(runs):
                shown.setdefault(run["method"], []).append(as_rows(run))
        drawn = {tag for lines in shown.values() for one in lines for tag in one[0]}
        tags = {tag: name for tag, name in CURVES.items() if tag in drawn}
        title = f"{self.config.env}, {self.config.setting}: mean and 10–90 % band over seeds"
        if tags:  # controls end where they began
            figure = seeds_figure(shown, tags, title, x="iteration", band=(0.1, 0.9))
            save_figure(figure, self.path.with_suffix(".png"), pdf=True)


def named(updater: str) -> str:
    """What the study calls an updater: its name, or own code as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", updater).strip("-")


def evaluations(runs: Runs) -> str:
    """How many episodes an evaluation is, and how often there is one, as the runs have it.

    Runs that diverged and clones have no evaluations at regular times, and older results are of
    200 episodes.
    """
    regular = [run for run in runs if run["iterations"] and not run["diverged"]] or runs
    many = " or ".join(map(str, sorted({run.get("evaluated", 200) for run in regular})))
    every = " or ".join(map(str, sorted({run["every"] for run in regular})))
    return f"{many} fresh episodes of the deterministic policy, every {every} iterations"


def learning(runs: Runs) -> list[str]:
    """Methods that learn for as long as the updaters: ours, then those of own code."""
    own = dict.fromkeys(run["method"] for run in runs if run["method"] not in METHODS)
    return [*LONG, *own]


def mean_and_range(values: Sequence[float]) -> str:
    """Mean and range of values over seeds, in words."""
    return f"{mean(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def of(show: Callable[[Mapping[str, Any]], str], cloned: bool = False) -> Column:
    """Column: words for what `summarise` says of a method.

    Args:
        show: the words.
        cloned: of behaviour cloning, too, which has one evaluation that nothing can follow.
    """
    return lambda row: (
        "–" if row.name == "cloning" and not cloned else show(summarise(row.runs)[row.name])
    )


def arrivals(found: Mapping[str, Any]) -> str:
    """How many came near the expert."""
    lost = f", {found['diverged']} diverged" if found["diverged"] else ""
    return f"{found['reached']} of {found['seeds']}{lost}"


def dips(found: Mapping[str, Any]) -> str:
    """Shares of evaluations below 0.90; of few runs each."""
    each = " ".join(f"{share:.2f}" for share in found["dips"])
    return f"{mean(found['dips']):.3f}" + (f" ({each})" if found["seeds"] <= 5 else "")


def falls(found: Mapping[str, Any]) -> str:
    """How often each run's score fell below 0.70, where there are few runs."""
    each = " ".join("–" if one is None else str(one) for one in found["drops"])
    return each if found["seeds"] <= 5 else ""


def settled(found: Mapping[str, Any]) -> str:
    """The share below 0.90 after five good evaluations in a row."""
    calm = [one for one in found["settled_dips"] if one is not None]
    return f"{mean(calm):.3f} in {len(calm)}" if calm else "–"


COLUMNS: Columns = {
    "method": table.row_name,
    "what it is": lambda row: METHODS[row.name][0] if row.name in METHODS else row["updater"],
    "iterations": of(lambda found: str(found["iterations"]), cloned=True),
    "reached 0.95": of(arrivals, cloned=True),
    "first (median)": of(lambda found: "–" if found["first"] is None else f"{found['first']:.0f}"),
    "below 0.90, mean (per seed)": of(dips),
    "falls": of(falls),
    "worst": of(lambda found: "–" if found["worst"] is None else f"{found['worst']:.2f}"),
    "settled": of(settled, cloned=True),
    "last: mean (range)": of(lambda found: mean_and_range(found["last"]), cloned=True),
}


def resemblance(runs: Runs, halves: Sequence[float]) -> list[str]:
    """How far the final policies are from the expert, and what the discriminator saw."""
    measured = [run for run in runs if run.get("imitation")]
    if not measured:  # of before it was measured
        return []

    def judged_by(way: str, name: str) -> Column:
        return lambda row: mean_and_range([run["imitation"][way][name] for run in row.runs])

    def blind(row: Row) -> str:
        shares = [run["blind"] for run in row.runs if run["blind"] is not None]
        return f"{mean(shares):.2f}" if shares else "–"

    columns: Columns = {
        "method": table.row_name,
        "seeds": table.seeds,
        "sampled: loss": judged_by("sampled", "loss"),
        "accuracy": judged_by("sampled", "accuracy"),
        "deterministic: loss": judged_by("deterministic", "loss"),
        "accuracy ": judged_by("deterministic", "accuracy"),
        "blind": blind,
    }
    between = ""
    if halves:
        losses = " and ".join(f"{loss:.2f}" for loss in halves)
        between = (
            "Two halves of the expert's own trajectories, told apart in the same way, give "
            f"{losses}. "
        )
    return [
        "Is it imitation? A fresh discriminator learns to convergence against the final policy and "
        "is judged on held-out episodes of both (`advgame.imitation.resemblance`): loss (chance "
        "1.386) and accuracy, mean over seeds, of the sampled policy and of the deterministic one. "
        f"{between}Blind: share of iterations in which next to all pairs of the policy were "
        "absorbing.",
        table.render(columns, table.rows(measured)),
    ]


def differences(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the pairwise tests: shares, their difference and p-values."""
    lines = []
    for one in tests:
        (first, second), (low, high) = one["shares"], one["interval"]
        lines.append(
            [
                ", ".join(one["pair"]),
                str(one["iterations"]),
                f"{first:.3f}, {second:.3f}",
                f"{second - first:+.3f} ({low:+.3f} to {high:+.3f})",
                *("–" if one[p] is None else f"{one[p]:.3f}" for p in ("dips", "falls", "last")),
            ]
        )
    if not lines:
        return []
    return [
        "Pairs: the share below 0.90, the second's less the first's with its 95 % interval "
        "(Welch), and two-sided permutation tests. Dips are not spread evenly over a run, so "
        "shares are of the first iterations, as many as the shorter had; last is of whole runs. "
        "No difference shown is not the same as none: look at the interval.",
        table.markdown(
            ["pair", "iterations", "below 0.90", "difference", "p", "p of falls", "p of last"],
            lines,
        ),
    ]


main = Gail.main

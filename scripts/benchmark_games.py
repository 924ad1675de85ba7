"""What a step of each game costs, and whether that is what its passes predict.

    python scripts/benchmark_games.py       # WRN-28-10, wide attacker; minutes on 2 idle cores
    python scripts/benchmark_games.py --network small_cnn --shape 1 28 28 --width small --batch 64
    python scripts/benchmark_games.py --family baselines --network wrn-16-4

The contestants take turns in shuffled order. Each game's step counts its own passes (`cost/*` in
its curves); the prediction is those counts times what a single pass was measured to take in the
same run. ``published PGD-10`` forms and throws away weight gradients in its attack, as several
published codes do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import Play, compare
from torch import Tensor, nn
from torch.autograd import grad

from advgame.attacks import DistributionalAttack, attacked, fast, feature_scatter, pgd
from advgame.choices import Form
from advgame.classifiers import make_classifier
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adt import AdtAmortised, AdtExp
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import AWPDefender
from advgame.games.costs import DefenderStep, Passes
from advgame.games.free import Free
from advgame.games.l2l import L2L
from advgame.games.pairing import LogitPairing, Mart, Trades
from advgame.games.training import Rules
from advgame.losses import cross_entropy
from advgame.run.cli import run_script
from advgame.run.files import write_atomically
from advgame.run.folder import cpu_name, device_name, made_by
from advgame.seeding import seeded_init, stream
from advgame.threat import Linf
from agents.adt import ADTNetwork, ExplicitPlayer
from agents.attacker_network import AttackerPlayer
from agents.l2l import GRADIENTS, L2LNetwork
from agents.settings import Width

CLASSES, SEED, STEPS, OFTEN = 10, 0, 10, 4
PER_TURN = ("median_s", "min_s", "max_s", "times_ours")
PUBLISHED, AWP, ADT = "published PGD-10", "PGD-10, AWP", "ADT-EXP-AM"
# the L2L paper's table 3, CIFAR-10 on one 2080 Ti, over its PGD-10
PAPER = {"plain": 0.08, PUBLISHED: 1.0, "naive": 0.22, "grad": 0.47, "two-step": 0.61}


@dataclass(frozen=True)
class Config:
    """Time the steps of games against their counted passes; writes one JSON file and a table."""

    network: str = "wrn-28-10"
    """the defender"""
    width: Width = "wide"
    """of L2L's attacker"""
    family: Literal["l2l", "baselines"] = "l2l"
    """which games, beside plain and PGD-10 training"""
    shape: tuple[int, int, int] = (3, 32, 32)
    """channels, height and width of the images"""
    batch: int = 4
    """images per step"""
    repeats: int = 5
    """how often every contestant takes its turn"""
    threads: int = 0
    """CPU threads; 0 is torch's default, all cores"""
    out: str = "results/benchmark_games.json"
    """where the figures go, with a table beside them"""


def published_pgd(
    defender: Defender, x: Tensor, y: Tensor, eps: float, rng: torch.Generator
) -> None:
    """PGD-10 training whose attack calls ``backward``: gradients on the weights come with it."""
    ball, model = Linf(eps), defender.module.eval()
    x_adv = ball.random_start(x, rng)
    for _ in range(STEPS):
        leaf = x_adv.detach().requires_grad_()
        cross_entropy(model(leaf), y).mean().backward()
        assert leaf.grad is not None
        x_adv = ball.project(x_adv + eps * 7 / 31 * leaf.grad.sign(), x)
    defender.backward(x_adv.detach(), y)
    defender.step()


def games(config: Config, threat: Linf) -> dict[str, Rules]:
    """Every game by name, each with an attacker of its own."""
    found: dict[str, Rules] = {
        "plain": AdversarialTraining(threat),
        "PGD-10": AdversarialTraining(threat, lambda t: pgd(t, STEPS, t.eps * 7 / 31)),
    }
    if config.family == "baselines":
        return found | {
            "fast": AdversarialTraining(threat, fast),
            "Free, 4 replays": Free(threat, replays=4),
            "ALP": LogitPairing(threat),
            "Feature Scatter": AdversarialTraining(threat, feature_scatter),
            "TRADES": Trades(threat),
            "MART": Mart(threat),
            AWP: found["PGD-10"],
            "ADT-EXP": AdtExp(DistributionalAttack(threat)),
            ADT: AdtAmortised(threat, ExplicitPlayer(generator(config))),
        }
    for name, gradients in GRADIENTS.items():
        for form in get_args(Form):
            with seeded_init(SEED, "attacker"):
                player = AttackerPlayer(L2LNetwork(config.shape, gradients, config.width))
            title = name if form == "alternating" else f"{name}, shared"
            found[title] = L2L(threat, player, form)
    return found


def generator(config: Config) -> ADTNetwork:
    """ADT's small one."""
    with seeded_init(SEED, "attacker"):
        return ADTNetwork(config.shape)


def networks(config: Config) -> dict[str, tuple[nn.Module, int]]:
    """The family's attackers: name -> a network like theirs, and the images that it looks at."""
    if config.family == "baselines":
        return {"attacker": (generator(config).body, 3)}
    with seeded_init(SEED, "attacker"):
        pair = [L2LNetwork(config.shape, n, config.width).body for n in (1, 0)]
    return {"attacker": (pair[0], 2), "naive attacker": (pair[1], 1)}


def single_passes(
    defender: Defender, attackers: Mapping[str, tuple[nn.Module, int]], x: Tensor, y: Tensor
) -> dict[str, Play]:
    """One pass of each kind that `Passes` counts, and the optimisers' steps."""
    model = defender.module
    leaf = x.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def to_input() -> None:
        with attacked(model):
            grad(cross_entropy(model(leaf), y).sum(), leaf)

    def attack(body: nn.Module, given: Tensor) -> None:
        with torch.no_grad():
            body(given)

    def learn(body: nn.Module, given: Tensor) -> None:
        body(given).sum().backward()

    weights = list(next(iter(attackers.values()))[0].parameters())
    optimizer = torch.optim.Adam(weights, fused=True)
    gradients = [torch.full_like(weight, 1e-3) for weight in weights]

    def adam() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    found: dict[str, Play] = {
        "F": forward,
        "F + B_x": to_input,
        "F + B": lambda: defender.backward(x, y),
        "SGD step": defender.step,
        "Adam step": adam,
    }
    for name, (body, images) in attackers.items():
        given = torch.cat([x] * images, 1)
        found[f"{name} F"] = partial(attack, body.train(), given)
        found[f"{name} F + B"] = partial(learn, body, given)
    return found


def often(play: Play) -> None:
    """`OFTEN` times: in a game's step, too, most passes follow another one."""
    for _ in range(OFTEN):
        play()


def predict(passes: Passes, times: dict[str, float], naive: bool) -> float:
    """Seconds of a step by its passes."""
    kind = "naive attacker" if naive else "attacker"
    alone = passes.forwards - passes.input_backwards - passes.backwards
    attacking = passes.attacker_forwards - passes.attacker_backwards
    seconds = (
        alone * times["F"]
        + passes.input_backwards * times["F + B_x"]
        + passes.backwards * times["F + B"]
        + times["SGD step"]
    )
    if passes.attacker_forwards:
        seconds += attacking * times[f"{kind} F"]
        seconds += passes.attacker_backwards * times[f"{kind} F + B"] + times["Adam step"]
    return seconds


def counted(stats: Mapping[str, Tensor]) -> Passes:
    """What a step says of its own passes."""
    return Passes(**{name: int(stats[f"cost/{name}"]) for name in asdict(Passes())})


def measure(config: Config) -> dict[str, Any]:
    """All contestants in one run."""
    defenders: list[Defender] = []
    for kind in (Defender, partial(AWPDefender, gamma=0.01)):
        with seeded_init(SEED):
            defenders.append(kind(make_classifier(config.network, config.shape, CLASSES), lr=1e-4))
    defender, perturbed = defenders
    rng = stream(SEED, "images")
    x = torch.rand(config.batch, *config.shape, generator=rng)
    y = torch.randint(CLASSES, (config.batch,), generator=rng)
    threat, start = Linf(0.031), stream(SEED, "start")
    steps: dict[str, Callable[[], DefenderStep]] = {
        name: partial(rules.step, perturbed if name == AWP else defender, x, y, start)
        for name, rules in games(config, threat).items()
    }
    passes = {name: counted(step().stats) for name, step in steps.items()}
    singles = single_passes(defender, networks(config), x, y)
    plays: dict[str, Play] = {
        **{name: partial(often, one) for name, one in singles.items()},
        PUBLISHED: partial(published_pgd, defender, x, y, 0.031, start),
        **steps,
    }
    rows = compare(plays, config.repeats, 1, nullcontext, held_to=PUBLISHED)
    for name in singles:
        rows[name] |= {key: rows[name][key] / OFTEN for key in PER_TURN}
    times = {name: row["median_s"] for name, row in rows.items()}
    for name, count in passes.items():
        expected = predict(count, times, naive=name.startswith("naive"))
        rows[name] |= {"predicted_s": expected, "measured_over_predicted": times[name] / expected}
        rows[name] |= {"over_pgd": times[name] / times["PGD-10"], "passes": asdict(count)}
    return rows


def as_markdown(config: Config, about: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# A step of each game: {config.network}, batch {config.batch}"
        + f", {config.width} attacker" * (config.family == "l2l"),
        "",
        "Predicted: the step's own counts of passes times what single passes took in the same "
        "run. F: forwards of the defender, B_x: backwards to the input only, B: with weight "
        "gradients, A: forwards of the attacker, of which with backward.",
        "",
        "| game | F | B_x | B | A | seconds (min – max) | measured / predicted | / published "
        "PGD-10 | / our PGD-10 | paper, / its PGD-10 |",
        "|---" * 10 + "|",
    ]
    for name, row in about["contestants"].items():
        count = row.get("passes")
        if count is None and name != PUBLISHED:
            continue
        cells = ["–"] * 4 if count is None else [
            str(count["forwards"]), str(count["input_backwards"]), str(count["backwards"]),
            f"{count['attacker_forwards']}, {count['attacker_backwards']}",
        ]  # fmt: skip
        cells.append(f"{row['median_s']:.3g} ({row['min_s']:.3g} – {row['max_s']:.3g})")
        cells.append(f"{row['measured_over_predicted']:.2f}" if count else "–")
        cells.append(f"{row['times_ours']:.2f}")
        cells.append(f"{row['over_pgd']:.2f}" if count else "–")
        cells.append(f"{PAPER[name]:.2f}" if name in PAPER else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    parts = [
        f"{name} {row['median_s']:.3g}"
        for name, row in about["contestants"].items()
        if "passes" not in row and name != PUBLISHED
    ]
    lines += ["", f"Single passes, seconds: {', '.join(parts)}.", ""]
    lines.append(
        f"Medians of {config.repeats} turns. Hardware: {about['device']}, {about['cpu']}. "
        f"Commit {about['commit'][:12]}. Command: `{about['command']}`."
    )
    return "\n".join([*lines, ""])


def main(config: Config) -> None:
    """Measure, print, write."""
    if config.repeats < 1 or config.batch < 2 or config.threads < 0:
        raise InputError("repeats must be 1 or above, batch 2 or above, threads 0 or above")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    about = {
        **made_by(),
        "device": device_name(torch.device("cpu")),
        "cpu": cpu_name(),
        **asdict(config),
        "contestants": measure(config),
    }
    table = Table("", "seconds", "measured / predicted", "/ published PGD-10")
    for name, row in about["contestants"].items():
        share = row.get("measured_over_predicted")
        table.add_row(
            name,
            f"{row['median_s']:.4g}",
            "-" if share is None else f"{share:.2f}",
            f"{row['times_ours']:.3f}",
        )
    Console().print(table)
    out = Path(config.out)
    write_atomically(out, json.dumps(about, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), as_markdown(config, about))


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

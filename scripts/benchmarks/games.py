"""What a step of each game costs, and whether that is what its passes predict.

Each game's step counts its own passes (`cost/*` in its curves); the prediction is those counts
times what a single pass was measured to take in the same run. ``published PGD-10`` forms and throws
away weight gradients in its attack, as several published codes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.autograd import grad

from advgame.attacks import DistributionalAttack, attacked, fast, feature_scatter, pgd
from advgame.choices import Form
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
from advgame.run.folder import device_name
from advgame.run.table import markdown
from advgame.seeding import seeded_init, stream
from advgame.threat import Linf
from agents.adt import ADTNetwork, ExplicitPlayer
from agents.attacker_network import AttackerPlayer
from agents.l2l import GRADIENTS, L2LNetwork
from agents.settings import Width
from benchmarks.timing import SEED, STEPS, Case, Play, Shape, compare, task

OFTEN = 4
PER_TURN = ("median_s", "min_s", "max_s", "times_ours")
PUBLISHED, AWP, ADT = "published PGD-10", "PGD-10, AWP", "ADT-EXP-AM"
# the L2L paper's table 3, CIFAR-10 on one 2080 Ti, over its PGD-10
PAPER = {"plain": 0.08, PUBLISHED: 1.0, "naive": 0.22, "grad": 0.47, "two-step": 0.61}


@dataclass(frozen=True)
class Games:
    """Which games' training steps are measured, on which network and images."""

    network: str = "wrn-28-10"
    """of games: the defender"""
    width: Width = "wide"
    """of games: of L2L's attacker"""
    family: Literal["l2l", "baselines"] = "l2l"
    """of games: which, beside plain and PGD-10 training"""
    shape: Shape = (3, 32, 32)
    """of games: channels, height and width of the images"""
    batch: int = 4
    """of games: images per step"""


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


def games(config: Games, threat: Linf) -> dict[str, Rules]:
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


def generator(config: Games) -> ADTNetwork:
    """ADT's smaller generator, with the benchmark's seed."""
    with seeded_init(SEED, "attacker"):
        return ADTNetwork(config.shape)


def networks(config: Games) -> dict[str, tuple[nn.Module, int]]:
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
    model, leaf = defender.module, x.clone().requires_grad_()
    weights = list(next(iter(attackers.values()))[0].parameters())
    optimizer = torch.optim.Adam(weights, fused=True)
    gradients = [torch.full_like(weight, 1e-3) for weight in weights]

    def to_input() -> None:
        with attacked(model):
            grad(cross_entropy(model(leaf), y).sum(), leaf)

    def learn(body: nn.Module, given: Tensor) -> None:
        body(given).sum().backward()

    def adam() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    found: dict[str, Play] = {
        "F": partial(torch.no_grad()(model), x),
        "F + B_x": to_input,
        "F + B": lambda: defender.backward(x, y),
        "SGD step": defender.step,
        "Adam step": adam,
    }
    for name, (body, images) in attackers.items():
        given = torch.cat([x] * images, 1)
        found[f"{name} F"] = partial(torch.no_grad()(body.train()), given)
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
    return Passes(**{name: float(stats[f"cost/{name}"]) for name in asdict(Passes())})


def measure_games(fabric: Fabric, repeats: int, config: Games) -> Case:
    """All contestants in one run, on the CPU."""
    if config.batch < 2:
        raise InputError("batch must be 2 or above")
    cpu, defenders = torch.device("cpu"), list[Defender]()
    for kind in (Defender, partial(AWPDefender, gamma=0.01)):
        model, x, y = task(config.network, config.shape, config.batch, cpu)
        defenders.append(kind(model.train(), lr=1e-4))
    defender, perturbed = defenders
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
    rows = compare(plays, repeats, 1, nullcontext, held_to=PUBLISHED)
    for name in singles:
        rows[name] |= {key: rows[name][key] / OFTEN for key in PER_TURN}
    times = {name: row["median_s"] for name, row in rows.items()}
    for name, count in passes.items():
        expected = predict(count, times, naive=name.startswith("naive"))
        rows[name] |= {"predicted_s": expected, "measured_over_predicted": times[name] / expected}
        rows[name] |= {"over_pgd": times[name] / times["PGD-10"], "passes": asdict(count)}
    facts = {field.name: getattr(config, field.name) for field in fields(Games)}
    return {**facts, "device": device_name(cpu), "repeats": repeats, "contestants": rows}


def as_markdown(case: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The table for people.

    Args:
        case: of `measure_games`.
        about: ``cpu``, ``commit`` and ``command``.
    """
    parts, lines = list[str](), list[list[str]]()
    for name, row in case["contestants"].items():
        count = row.get("passes")
        if count is None and name != PUBLISHED:
            parts.append(f"{name} {row['median_s']:.3g}")
            continue
        cells = [name, *["–"] * 4]
        if count:
            cells[1:] = [
                f"{count[kind]:g}" for kind in ("forwards", "input_backwards", "backwards")
            ]
            cells.append(f"{count['attacker_forwards']:g}, {count['attacker_backwards']:g}")
        cells.append(f"{row['median_s']:.3g} ({row['min_s']:.3g} – {row['max_s']:.3g})")
        cells.append(f"{row['measured_over_predicted']:.2f}" if count else "–")
        cells.append(f"{row['times_ours']:.2f}")
        cells.append(f"{row['over_pgd']:.2f}" if count else "–")
        lines.append([*cells, f"{PAPER[name]:.2f}" if name in PAPER else "–"])
    head = ["game", "F", "B_x", "B", "A", "seconds (min – max)", "measured / predicted"]
    head += ["/ published PGD-10", "/ our PGD-10", "paper, / its PGD-10"]
    width = f", {case['width']} attacker" if case.get("family", "l2l") == "l2l" else ""
    text = [
        f"# A step of each game: {case['network']}, batch {case['batch']}{width}",
        "Predicted: the step's own counts of passes times what single passes took in the same "
        "run. F: forwards of the defender, B_x: backwards to the input only, B: with weight "
        "gradients, A: forwards of the attacker, of which with backward.",
        markdown(head, lines),
        f"Single passes, seconds: {', '.join(parts)}.",
        f"Medians of {case['repeats']} turns. Hardware: {case['device']}, {about['cpu']}. "
        f"Commit {about['commit'][:12]}. Command: `{about['command']}`.",
    ]
    return "\n\n".join(text) + "\n"

"""Detects players of a game that no longer learn: saturated, constant, or without a gradient.

A dead player leaves no error behind. Its opponent learns against nothing, and a comparison says
something about who died first. So every player logs ``health/<player>/<sign>`` once per epoch, one
registry here holds what each sign means and from which value on, and a report flags a player that
ended dead, as it flags masked gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from advgame.attacks.boundary import attacked

PREFIX = "health/"
_NORM = "gradient_norm"  # in a group of an optimiser, next to its settings
AT_BOUND = 0.995  # |tanh| at an input of 3, where a hundredth of the gradient is left


@dataclass(frozen=True)
class Sign:
    """What a number says of a player.

    Args:
        meaning: of the number, for the list of tags.
        verdict: what is wrong with a player past the threshold, after its name.
        above: dead where the number is larger.
        below: dead where it is smaller.
        whole: the mean over the run counts, not how it ended.
    """

    meaning: str
    verdict: str = ""
    above: float = math.inf
    below: float = -math.inf
    whole: bool = False

    def dead(self, value: float) -> bool:
        """Whether a player with this number cannot learn, or what it learns from is void."""
        return value > self.above or value < self.below


SIGNS: dict[str, Sign] = {
    "saturated": Sign(
        "share of a network's outputs at their bound, where next to no gradient passes",
        "is saturated: its outputs are at their bound, where next to no gradient passes",
        above=0.99,
    ),
    "spread": Sign(
        "standard deviation of the perturbation over the images of one class, in units of ε: mean "
        "over pixels and classes",
        "gives all images of a class the same perturbation",
        below=0.02,
    ),
    "gradient": Sign(
        "norm of the optimiser's moving mean of the gradient, over the norm of the weights (where "
        "weights decay: moving mean of the gradient's norm)",
        "gets no gradient",
        below=1e-6,
    ),
    "entropy": Sign(
        "mean entropy of the choices over that of a uniform choice",
        "always makes the same choice and cannot learn of others",
        below=0.01,
    ),
    "width": Sign(
        "mean σ of a distribution of perturbations before its bound",
        "has collapsed to a single perturbation per image",
        below=1e-3,
    ),
    "constant": Sign(
        "share of the last batch that is given the class given most often",
        "gives next to all images the same class",
        above=0.95,
    ),
    "step": Sign(
        "length of the step over the norm of what is moved", "has stopped moving", below=1e-7
    ),
    "unexplained": Sign(
        "mean square error of its predictions over the variance of what is predicted",
        "predicts far worse than a constant",
        above=1.5,  # the images that it keeps are alike: among them 1 may be all that can be had
        whole=True,
    ),
    "phase": Sign(
        "mean resultant length of the rows' places in their episodes: 1 where all rows are at one "
        "place, near 0 where they are spread over the whole of an episode"
    ),
    "absorbing": Sign("share of the policy's pairs whose episode is over"),
    "blind": Sign(
        "share of batches in which next to all pairs of the policy are absorbing",
        "of the policy holds next to no live pair again and again: rows that move in step?",
        above=0.02,
        whole=True,
    ),
}


@dataclass(frozen=True)
class Death:
    """A player that ended past a threshold, or was past it on average.

    Args:
        player: its name in the tags.
        sign: of `SIGNS`.
        since: epoch (of a run that counts epochs) from which on it was so; of an average the first.
        value: the last one, or the mean.
    """

    player: str
    sign: str
    since: int
    value: float

    @property
    def name(self) -> str:
        """The flag's name, such as ``dead_attacker_saturated``."""
        return f"dead_{self.player.replace('-', '_')}_{self.sign}"

    def as_dict(self) -> dict[str, str]:
        """The dead player as a flag of ``report.json``."""
        return {"name": self.name, "meaning": self.sentence}

    @property
    def sentence(self) -> str:
        """What the report says: who is dead, since when, and by which number."""
        verdict = SIGNS[self.sign].verdict
        tag = f"{PREFIX}{self.player}/{self.sign}"
        return f"the {self.player} {verdict}, since epoch {self.since} ({tag} = {self.value:.3g})"


def deaths(rows: Sequence[Mapping[str, float]]) -> list[Death]:
    """Players that end a run past a threshold, or are past it on average where that counts.

    Args:
        rows: of metrics.csv, one per epoch with ``epoch``; a tag may be missing in some.
    """
    found = []
    for tag in dict.fromkeys(tag for row in rows for tag in row if tag.startswith(PREFIX)):
        player, name = tag.removeprefix(PREFIX).rsplit("/", 1)
        if name not in SIGNS:
            continue
        series = [(int(row["epoch"]), row[tag]) for row in rows if tag in row]
        value = series[-1][1]
        if SIGNS[name].whole:
            value = mean(one for _, one in series)
            series = [point for point in series if SIGNS[name].dead(point[1])]
        if not SIGNS[name].dead(value):
            continue
        since = series[-1][0]
        for epoch, one in reversed(series):
            if not SIGNS[name].dead(one):
                break
            since = epoch
        found.append(Death(player, name, since, value))
    return found


def tagged(player: str, signs: Mapping[str, float]) -> dict[str, float]:
    """The signs of life of a player under the tags that curves have."""
    return {f"{PREFIX}{player}/{name}": value for name, value in signs.items()}


def output_signs(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``saturated`` and ``spread`` of what an attacker network puts out.

    Args:
        outputs: (B, ...), in units of ε, before the pixel range cuts them.
        labels: (B,); classes with one image only say nothing about the spread.
    """
    flat = outputs.detach().float().flatten(1)
    spreads = [
        flat[labels == one].std(0).mean()
        for one in labels.unique()
        if int((labels == one).sum()) > 1
    ]
    found = {"saturated": float((flat.abs() >= AT_BOUND).float().mean())}
    if spreads:
        found["spread"] = float(torch.stack(spreads).mean())
    return found


def network_signs(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """`output_signs` of a network that sees image and label, asked in evaluation mode.

    Args:
        network: g, of (x, y), with outputs in [-1, 1].
        x: images (B, C, H, W), wherever they lie: a network from a file lies on the CPU.
        y: labels (B,).
    """
    device = next(network.parameters()).device
    x, y = x.to(device), y.to(device)
    with torch.no_grad(), attacked(network):
        return output_signs(network(x, y), y)


def entropy_sign(
    entropies: Tensor, sizes: Sequence[int], player: str = "strategy"
) -> dict[str, Tensor]:
    """``entropy`` of a policy, for the step's statistics.

    Args:
        entropies: (choices,) mean entropy of each choice, nats.
        sizes: number of options of each; a choice among one is none.
        player: whose.
    """
    real = [k for k, size in enumerate(sizes) if size > 1]
    if not real:
        return {}
    largest = torch.tensor([math.log(sizes[k]) for k in real], device=entropies.device)
    return {f"{PREFIX}{player}/entropy": (entropies.detach()[real] / largest).mean()}


def note_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Remember the gradient's norm where weights decay, for `gradient_sign`: before each step.

    There the first moment has the decay in it, next to which a gradient of zero is not seen. What
    is remembered is part of the optimiser's state.

    Args:
        optimizer: of the player, whose gradients are there.
    """
    for group in optimizer.param_groups:
        if group.get("weight_decay"):
            found = [one.grad for one in group["params"] if one.grad is not None]
            norm = nn.utils.get_total_norm(found).to(group["params"][0].device)
            before = group.get(_NORM, torch.zeros_like(norm))
            group[_NORM] = 0.9 * before.to(norm) + 0.1 * norm


def gradient_sign(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """``gradient``, from the first moment that Adam or SGD with momentum keeps; {} before a step.

    Where weights decay and `note_gradient` was told, it is the moving mean of the norm instead.

    Args:
        optimizer: of the player.
    """
    moments, weights = [], []
    for group in optimizer.param_groups:
        if _NORM in group:
            weights += [weight.detach().float().norm() for weight in group["params"]]
            moments.append(group[_NORM].to(weights[-1]))
            continue
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            moment = state.get("exp_avg", state.get("momentum_buffer"))
            if moment is not None:
                moments.append(moment.detach().float().norm())
                weights.append(weight.detach().float().norm())
    if not moments:
        return {}
    return {"gradient": float(torch.stack(moments).norm() / torch.stack(weights).norm())}


def constant_sign(logits: Tensor) -> dict[str, float]:
    """``constant`` of a classifier.

    Args:
        logits: (B, K).
    """
    return {"constant": float(logits.argmax(1).bincount().max() / len(logits))}

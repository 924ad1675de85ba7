"""What does a step of an image's attack do to the held-out robust loss, and can the stopper see it?

    python scripts/study.py influence                     # digits, three seeds, minutes
    python scripts/study.py influence --from-json         # the table again

The stopper is paid by the loss that a step gains on the image itself. What training is for is
another thing: that the loss on other images falls. For one step of SGD that can be computed,

    credit_i(x') = ⟨ ∇_θ L_held(θ̂), ∇_θ L(f_θ(x'), y_i) ⟩

which is how far L_held falls, per unit of λ/B, because image i was learned from at x'. θ̂ is θ
after the step on the batch's adversarial examples. L_held is the loss on validation images under
PGD-10, at fixed adversarial examples. The influence of a step of the attack is credit_i(x_{t+1}) -
credit_i(x_t); that of the radius is the derivative of credit_i(x_i + s δ_i) by s at s = 1. A double
backward pass through the step gives both.

A stopper trains the classifier, with a constant learning rate; at some epochs training images are
attacked by the game's own ε and step sizes, and a ridge regression on the stopper's features
predicts the influence on half of the images from the other half. R² near 0 means that a player that
sees these features cannot learn it. How far two halves of the validation images agree on the
influence (their correlation) tells how much of it is there to learn.

Writes `<out>/influence.json` and `.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import train_las_at
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from advgame.attacks import Seen, StoppingRule, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.games.stopping import features, true_probability
from advgame.losses import cross_entropy
from advgame.run import table
from advgame.run.defender_job import ball
from advgame.run.folder import device_name, made_by
from advgame.run.options import Count
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Number, Run, Runs
from advgame.seeding import stream
from advgame.threat import Threat, per_image
from agents.las_at import RandomStrategy, StrategyGame

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Config(StudyConfig):
    """Measure the influence of attack steps, and how much of it the stopper's features tell."""

    epochs: tuple[int, ...] = (5, 15, 30)
    """of the training, at whose end is measured"""
    steps: Count = 10
    """of the attacks that are measured"""
    lr: float = 0.05
    """learning rate of the classifier, constant"""
    jobs: Count = 1
    out: str = "results/strategies"


class Influence(Study[Config]):
    """A run is one epoch of one training."""

    about, files = "Influence of an attack's steps on the held-out robust loss", "influence"
    ending = ("Hardware: {devices}. Command: `{command}`.",)
    parallel = remembers = False
    sharing = ("steps", "lr")

    @override
    def check(self) -> None:
        super().check()
        if not self.config.epochs or min(self.config.epochs) < 1 or self.config.lr <= 0:
            raise InputError("--epochs are whole numbers of 1 or above, and --lr is above 0")

    @override
    def cells(self) -> dict[str, dict[str, Any]]:
        return {
            f"epoch{epoch}-seed{seed}": {"method": f"epoch {epoch}", "epoch": epoch, "seed": seed}
            for seed in self.seeds()
            for epoch in sorted(self.config.epochs)
        }

    @override
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        for seed in dict.fromkeys(cell["seed"] for cell in cells.values()):
            wanted = {cell["epoch"]: cell for cell in cells.values() if cell["seed"] == seed}
            job = train_las_at.job
            config = replace(
                job.defaults(), agent="stopper", seed=seed, lr=self.config.lr, model="small_cnn"
            )
            game, data = job.build(config, job.fabric(config))
            threat = ball(config)
            for epoch in range(1, max(wanted) + 1):
                for _ in range(game.steps_per_epoch):
                    game.step()
                if epoch in wanted:
                    found = measure(game, data.train, data.validation, threat, self.config.steps)
                    device = device_name(game.defender.device)
                    commit = made_by()["commit"]
                    yield [{**wanted[epoch], **found, "device": device, "commit": commit}]

    @override
    def place(self, run: Run) -> Any:
        return run["epoch"]

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """What the features explain, and what steps are worth, a line per epoch each."""
        first = runs[0]
        columns: dict[str, table.Column] = {
            "": table.row_name,
            "seeds": table.seeds,
            "held-out robust loss": Number("held_out_loss", 2),
            "R², gain of a step": Number("gain_r2", 2),
            "R², influence of a step": Number("step_r2", 2),
            "rank correlation": Number("step_rank", 2),
            "agreement of halves": Number("step_agreement", 2),
            "R², influence of ε": Number("eps_r2", 2),
            "its agreement": Number("eps_agreement", 2),
        }
        return [
            f"# {self.title}",
            f"Digits, {first['images']} training images, {first['held_out']} validation images, "
            f"attacks of {first['steps']} steps; mean ± sd over seeds. R² is on images that the "
            "regression has not seen; the gain of a step is what the stopper learns. Rank "
            "correlation: of predicted and true influence of a step. Agreement: correlation of "
            "the influence on two halves of the validation images.",
            table.markdown(*tabled(runs, columns)),
            "Mean credit of learning from an image after so many steps, over the mean credit "
            "after none (mean over seeds), and what is best:",
            table.markdown(*_by_steps(runs)),
        ]


def tabled(runs: Runs, columns: table.Columns) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table."""
    return list(columns), [[column(row) for column in columns.values()] for row in table.rows(runs)]


def _by_steps(runs: Runs) -> tuple[list[str], list[list[str]]]:
    shown = range(0, runs[0]["steps"] + 1, 2)
    columns: dict[str, table.Column] = {
        "": table.row_name,
        **{f"{k} steps": Number(partial(_share, steps=k), 2, width="") for k in shown},
        "best for the mean": Number("best_mean", 1),
        "mean of the best per image": Number("best_each", 1),
        "images for a larger ε, %": table.Percent("larger_eps"),
    }
    return tabled(runs, columns)


def _share(run: Run, steps: int) -> float:
    return float(run["credit"][steps] / run["credit"][0])


class Watch(StoppingRule):
    """Ends nothing; keeps features, losses and perturbations at every point of the attack."""

    last_step = True

    def __init__(self, eps0: float) -> None:
        self.eps0 = eps0
        self.features, self.losses, self.deltas = list[Tensor](), list[Tensor](), list[Tensor]()
        self._p: Tensor | None = None

    def stop(self, seen: Seen) -> Tensor:
        """End no image's attack, and keep what is seen."""
        p = true_probability(seen)
        self.features.append(features(seen, p, p if self._p is None else self._p, self.eps0))
        self.losses.append(seen.loss)
        self.deltas.append(seen.delta)
        self._p = p
        return torch.zeros_like(seen.y, dtype=torch.bool)


def slope(model: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Weights:
    """The gradient of the mean loss by the weights, at weights that need not be the model's."""
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    loss = cross_entropy(functional_call(model, leaves, (x,)), y).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def credits(
    model: nn.Module, x: Tensor, delta: Tensor, y: Tensor, along: Sequence[Weights]
) -> list[tuple[Tensor, Tensor]]:
    """⟨along, ∇_θ L(f_θ(x + s δ), y)⟩ of each image at s = 1, and its derivative by s, (B,) each.

    Args:
        model: f_θ; in the mode that it learns in.
        x: clean images (B, C, H, W).
        delta: perturbations, the same shape.
        y: labels (B,).
        along: gradients of held-out losses by each parameter; a pair is returned for each.
    """
    weights = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    share = torch.ones(len(x), dtype=x.dtype, device=x.device, requires_grad=True)
    scale = torch.ones_like(share).requires_grad_()
    points = x + per_image(scale, delta) * delta
    losses = share * cross_entropy(functional_call(model, weights, (points,)), y)
    slopes = torch.autograd.grad(losses.sum(), list(weights.values()), create_graph=True)
    found = []
    for way in along:
        pairs = zip(weights, slopes, strict=True)
        dot = torch.stack([(one * way[name]).sum() for name, one in pairs]).sum()
        # linear in the shares: the derivative by each is the image's own product
        one, other = torch.autograd.grad(dot, (share, scale), retain_graph=True)
        found.append((one, other))
    return found


def measure(
    game: StrategyGame, train: ImageSet, held: ImageSet, threat: Threat, steps: int
) -> dict[str, Any]:
    """Influence on the held-out loss of every training image, and what features tell of it.

    Args:
        game: a training, which is left as it is.
        train: its images.
        held: validation images.
        threat: the ball in which these are attacked.
        steps: of the attacks on the training images.
    """
    env, model = game.env, game.defender.module
    rng = stream(0, "influence", game.defender.device)
    player = RandomStrategy(env.space.sizes, rng)
    x_held, y_held = held.floats(), held.labels
    x_held = pgd(threat, 10).perturb(model, x_held, y_held, rng=rng)
    here = {name: value.detach() for name, value in model.named_parameters()}
    rate = game.defender.optimizer.param_groups[0]["lr"]
    kept: dict[str, list[Tensor]] = {name: [] for name in ("phi", "gain", "credit", "eps")}
    halves = slice(0, None, 2), slice(1, None, 2)
    for first in range(0, len(train) - env.batch_size + 1, env.batch_size):
        part = slice(first, first + env.batch_size)
        x, y = train.floats(part), train.labels[part]
        watch = Watch(env.space.eps0)
        chosen = env.space.decode(player.act(x, learn=False))
        chosen = replace(chosen, steps=torch.full_like(chosen.steps, steps))
        attack = replace(env.rules, rule=watch).attack(chosen)
        x_adv = attack.run(model, x, y, rng=rng, check=False).x_adv
        deltas = [*watch.deltas, x_adv - x]
        with torch.no_grad():
            losses = [*watch.losses, cross_entropy(model(x_adv), y)]
        step = slope(model, here, x_adv, y)
        ahead = {name: value - rate * step[name] for name, value in here.items()}
        along = [slope(model, ahead, x_held[half], y_held[half]) for half in halves]
        found = [credits(model, x, delta, y, along) for delta in deltas]
        # (B, points, halves) and (B, halves)
        by_step = [torch.stack([one for one, _ in pairs], 1) for pairs in found]
        kept["credit"].append(torch.stack(by_step, 1))
        kept["eps"].append(torch.stack([one for _, one in found[-1]], 1))
        kept["phi"].append(torch.stack(watch.features, 1))
        kept["gain"].append(torch.stack(losses, 1).diff(dim=1))
    phi, gain, by_half, eps_by_half = (torch.cat(kept[n]) for n in ("phi", "gain", "credit", "eps"))
    # linear in the held-out gradient: that of all images is the mean of the halves
    credit, by_eps = by_half.mean(2), eps_by_half.mean(1)
    influence = credit.diff(dim=1)
    mean = credit.mean(0)
    r2, rank = explained(phi, influence)
    with torch.no_grad():
        loss = float(cross_entropy(model(x_held), y_held).mean())
    return {
        "images": len(phi),
        "held_out": len(held),
        "steps": steps,
        "held_out_loss": loss,
        "gain_r2": explained(phi, gain)[0],
        "step_r2": r2,
        "step_rank": rank,
        "step_agreement": correlation(*by_half.diff(dim=1).flatten(0, 1).T),
        "eps_r2": explained(phi[:, :1], by_eps[:, None])[0],
        "eps_agreement": correlation(*eps_by_half.T),
        "credit": mean.tolist(),
        "best_mean": int(mean.argmax()),
        "best_each": float(credit.argmax(1).float().mean()),
        "larger_eps": float((by_eps > 0).float().mean()),
    }


def explained(phi: Tensor, target: Tensor, penalty: float = 1.0) -> tuple[float, float]:
    """R² and rank correlation of a ridge regression, on images that it has not seen.

    Each half of the images is predicted from the other.

    Args:
        phi: features (n, times, k), a constant among them.
        target: (n, times).
        penalty: ρ.
    """
    predicted = torch.empty_like(target, dtype=torch.float64)
    halves = torch.arange(len(phi)) % 2 == 0, torch.arange(len(phi)) % 2 == 1
    for seen, other in (halves, halves[::-1]):
        rows, goal = phi[seen].flatten(0, 1).double(), target[seen].flatten().double()
        moment = rows.T @ rows + penalty * torch.eye(rows.shape[1], dtype=torch.float64)
        predicted[other] = phi[other].double() @ torch.linalg.solve(moment, rows.T @ goal)
    true = target.double()
    residual = (true - predicted).square().mean() / true.var(correction=0)
    ranks = [one.flatten().argsort().argsort().double() for one in (predicted, true)]
    return 1 - float(residual), correlation(*ranks)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors (n,)."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


main = Influence.main

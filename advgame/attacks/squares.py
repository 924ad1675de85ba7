"""Square patches without gradients: one forward per query, kept where the margin rises.

A query adds a square of one sign pattern to the best point so far and projects:

    candidate = Π( best + r·ε·steepest(patch) ),   kept where its margin is larger

With L∞ and r = 2 the patch's pixels end on the ball's face, as in the Square attack; where it
lies, how large it is and which signs its channels have is somebody's choice instead of chance.

Source: Andriushchenko et al. 2020 (Square attack), whose schedule and stripes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.losses import cross_entropy, dlr, margin
from advgame.threat import Threat, per_image

GRID = 8
"""Positions per axis, and cells per axis of what is observed."""


@dataclass(frozen=True)
class Patches:
    """The lists that a patch is chosen from.

    Args:
        shape: (C, H, W) of the images.
        sides: side of the square as a share of the image's shorter side; one pixel at least.
        reaches: r.

    Raises:
        InputError: an empty list, or a number that no attack can use.
    """

    shape: tuple[int, int, int]
    sides: tuple[float, ...] = (0.5, 0.35, 0.25, 0.13, 0.05)
    reaches: tuple[float, ...] = (2, 0.5)

    def __post_init__(self) -> None:
        if not self.sides or not all(0 < side <= 1 for side in self.sides):
            raise InputError(f"sides must lie in (0, 1], not {self.sides}")
        if not self.reaches or min(self.reaches) <= 0:
            raise InputError(f"reaches must be numbers above 0, not {self.reaches}")

    @property
    def signs(self) -> Tensor:
        """Sign patterns of the channels, (patterns, C): all of them up to three channels."""
        channels = self.shape[0]
        if channels > 3:
            return torch.tensor([[1.0], [-1.0]]).expand(2, channels)
        bits = torch.arange(2**channels)[:, None] >> torch.arange(channels)
        return 1.0 - 2.0 * (bits & 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of options: row, column, side, sign pattern, reach."""
        return GRID, GRID, len(self.sides), len(self.signs), len(self.reaches)

    def draw(self, actions: Tensor) -> Tensor:
        """Indices (B, 5) -> patches (B, C, H, W) of -1, 0 and 1."""
        row, column, side, sign, _ = actions.unbind(1)
        height, width = self.shape[1:]
        shares = torch.tensor(self.sides, device=actions.device)[side]
        length = (shares * min(height, width)).round().clamp_min(1)
        inside = []
        for place, extent in ((row, height), (column, width)):
            first = (place * (extent - length) / (GRID - 1)).round()[:, None]
            pixel = torch.arange(extent, device=actions.device)
            inside.append((pixel >= first) & (pixel < first + length[:, None]))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        pattern = self.signs.to(actions.device)[sign]
        return square * pattern[:, :, None, None]

    def reach(self, actions: Tensor) -> Tensor:
        """R of each image, (B,)."""
        return torch.tensor(self.reaches, device=actions.device)[actions[:, 4]]


class Siege:
    """B images under a black-box attack, one query at a time.

    Args:
        model: a frozen classifier in evaluation mode.
        threat: the ball, one radius for all.
        patches: what can be chosen.
        x: clean images (B, C, H, W) in [0, 1], where the attack begins.
        y: labels (B,).
        budget: queries of each image, (B,) int64; the features know it, nothing enforces it.
    """

    x_adv: Tensor  # the last candidate
    best_x: Tensor
    logits: Tensor  # at the best point
    margin: Tensor  # of the last candidate
    best_margin: Tensor
    start_margin: Tensor
    scale: Tensor  # standard deviation of the logits at the start
    kept: Tensor  # whether the last candidate was
    accepted: Tensor  # how many candidates were kept
    fooled: Tensor  # at any query so far

    _ROWS = (
        *("x", "y", "budget", "used", "x_adv", "best_x", "margin", "best_margin"),
        *("start_margin", "scale", "fooled", "kept", "accepted", "logits", "chosen"),
    )

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        patches: Patches,
        x: Tensor,
        y: Tensor,
        budget: Tensor,
    ) -> None:
        self.model, self.threat, self.patches = model, threat, patches
        self.forwards = self.backwards = 0
        self.x, self.y, self.budget = x.clone(), y.clone(), budget.clone()
        self.used = torch.zeros_like(self.y)
        self.best_x = self.x.clone()
        for name in ("best_margin", "start_margin", "scale", "accepted"):
            setattr(self, name, x.new_zeros(len(x)))
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)
        self.chosen = torch.full((len(x), len(patches.sizes)), -1, device=x.device)
        self._query(self.x.clone(), first_of_all=True)

    def step(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for every image.

        Args:
            actions: (B, 5) indices.
            rows: positions (k,) whose images leave; their actions are void.
            arrivals: images, labels and budgets that come instead.
        """
        direction = self.threat.steepest(self.patches.draw(actions).to(self.x))
        size = self.patches.reach(actions) * self.threat.eps
        point = self.threat.project(self.best_x + direction * per_image(size, direction), self.x)
        self.chosen = actions.clone()
        if rows is not None:
            self.x[rows], self.y[rows], self.budget[rows] = arrivals
            point[rows] = arrivals[0]
            self.used[rows], self.chosen[rows], self.accepted[rows] = 0, -1, 0
        self._query(point)

    def _query(self, point: Tensor, *, first_of_all: bool = False) -> None:
        first = self.used == 0
        with torch.no_grad():
            logits = self.model(point)
        self.forwards += len(point)
        self.x_adv = point
        self.margin = margin(logits, self.y)
        spread = logits.float().std(1, correction=0).clamp_min(1e-12)
        self.scale = torch.where(first, spread, self.scale)
        self.start_margin = torch.where(first, self.margin, self.start_margin)
        self.kept = first | (self.margin > self.best_margin)
        self.accepted = self.accepted + (self.kept & ~first)
        self.best_margin = torch.where(self.kept, self.margin, self.best_margin)
        self.best_x = torch.where(per_image(self.kept, point), point, self.best_x)
        kept = self.kept[:, None]
        self.logits = logits if first_of_all else torch.where(kept, logits, self.logits)
        self.fooled = (logits.argmax(1) != self.y) | (self.fooled & ~first)
        self.used = self.used + 1

    def restart(self, rows: Tensor, x: Tensor, y: Tensor, budget: Tensor) -> None:
        """Put other images in the rows (k,) at once, for k forwards more."""
        new = Siege(self.model, self.threat, self.patches, x, y, budget)
        self.forwards += new.forwards
        for name in self._ROWS:
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, rows, getattr(new, name)))


# name -> what it is; s(v) = v / (1 + |v|); σ is the standard deviation of the logits at the start
FEATURES = {
    "queries_left": "queries left over the budget",
    "urgency": "1 / (1 + queries left)",
    "true_probability": "softmax probability of the true class at the best point",
    "margin": "s(best margin / σ)",
    "dlr": "the DLR loss at the best point, cut at ±1",
    "progress": "(best margin - start margin) / |start margin|, cut at ±1",
    "candidate": "s((margin of the last candidate - best margin) / σ)",
    "kept": "1 if the last candidate was kept",
    "accepted": "share of the candidates that were kept",
    "on_face": "share of pixels on the ball's face at the best point",
}


def feature_names(patches: Patches) -> tuple[str, ...]:
    """`FEATURES`, the last choices, then an 8x8 map of the clean image and one of δ/ε."""
    maps = (
        f"{kind}_{i}_{j}" for kind in ("clean", "delta") for i in range(GRID) for j in range(GRID)
    )
    last = ("last_row", "last_column", "last_side", "last_sign", "last_reach")
    return (*FEATURES, *last, *maps)


def features(siege: Siege) -> Tensor:
    """The vector of each image, float32 (B, n) in [-1, 1], in the order of `feature_names`."""
    left = (siege.budget - siege.used).float()
    gap = (siege.margin - siege.best_margin) / siege.scale
    best = siege.best_margin / siege.scale
    start = siege.start_margin.abs().clamp_min(1e-12)
    delta = siege.best_x - siege.x
    numbers = torch.stack(
        [
            left / siege.budget,
            1 / (1 + left.clamp_min(0)),
            torch.exp(-cross_entropy(siege.logits, siege.y)),
            best / (1 + best.abs()),
            dlr(siege.logits, siege.y),
            (siege.best_margin - siege.start_margin) / start,
            gap / (1 + gap.abs()),
            siege.kept.float(),
            siege.accepted / (siege.used - 1).clamp_min(1),
            siege.threat.on_face(delta),
        ],
        1,
    )
    # in [-1, 1], and -1 for "none yet", as for the first of many
    options = torch.tensor(siege.patches.sizes, device=siege.y.device)
    last = siege.chosen.clamp_min(0) / (options - 1).clamp_min(1) * 2 - 1
    maps = [
        F.adaptive_avg_pool2d(image.mean(1, keepdim=True), GRID).flatten(1)
        for image in (siege.x, delta / siege.threat.eps)
    ]
    return torch.cat([numbers, last, *maps], 1).float().nan_to_num(0.0).clamp_(-1, 1)

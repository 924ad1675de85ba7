"""The patch attack: square patches without gradients, kept where the margin rises.

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
from torch import Tensor

from advgame.attacks.queries import AttackState, Choices, in_range, squash
from advgame.errors import InputError
from advgame.threat import per_image

GRID = 8
"""Positions per axis, and cells per axis of what is observed."""

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


@dataclass(frozen=True)
class Patches(Choices):
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

    @property
    def feature_names(self) -> tuple[str, ...]:
        """`FEATURES`, the last choices, then an 8x8 map of the clean image and one of δ/ε."""
        grid = [f"{i}_{j}" for i in range(GRID) for j in range(GRID)]
        last = ("last_row", "last_column", "last_side", "last_sign", "last_reach")
        return (*FEATURES, *last, *(f"{kind}_{at}" for kind in ("clean", "delta") for at in grid))

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
        """The chosen r of the candidate's step r·ε, per image (B,)."""
        return torch.tensor(self.reaches, device=actions.device)[actions[:, 4]]


class PatchAttackState(AttackState):
    """B images under a black-box attack by patches; see `AttackState` for the arguments."""

    choices: Patches
    kept: Tensor  # whether the last candidate was
    accepted: Tensor  # how many candidates were kept
    best_logits: Tensor  # (B, K), at the best point

    def _start(self, x: Tensor, y: Tensor, budget: Tensor, eps: Tensor) -> None:
        self.accepted, self.best_logits = torch.zeros_like(eps), eps.new_zeros(len(eps), 0)
        super()._start(x, y, budget, eps)

    def _begin(self, rows: Tensor) -> Tensor:
        self.accepted[rows] = 0
        return super()._begin(rows)

    def step(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        """One query for every image, at its candidate; see `AttackState.step`."""
        direction = self.threat.steepest(self.choices.draw(actions).to(self.x))
        size = self.choices.reach(actions) * self.eps
        candidate = self.best_x + direction * per_image(size, direction)
        self._go(self._ball().project(candidate, self.x), actions, rows, arrivals)

    def _forward(self, first: Tensor) -> None:
        with torch.no_grad():
            self.logits = self.model(self.x_adv.to(self.dtype))

    def _query(self, point: Tensor) -> Tensor:
        self.kept = super()._query(point)
        self.accepted = self.accepted + (self.kept & (self.used > 1))
        best = self.best_logits if self.best_logits.numel() else self.logits
        self.best_logits = torch.where(self.kept[:, None], self.logits, best)
        return self.kept

    def features(self) -> Tensor:
        """The vector of each image, float32 (B, n), in the order of `Patches.feature_names`."""
        delta = self.best_x - self.x
        entries = [
            *self._common_features(self.best_logits, self.best_margin),
            squash((self.margin - self.best_margin) / self.scale),
            self.kept,
            self.accepted / (self.used - 1).clamp_min(1),
            self._ball().on_face(delta),
        ]
        # in [-1, 1], and -1 for "none yet", as for the first of many
        options = torch.tensor(self.choices.sizes, device=self.y.device)
        last = self.chosen.clamp_min(0) / (options - 1).clamp_min(1) * 2 - 1
        maps = [
            F.adaptive_avg_pool2d(image.mean(1, keepdim=True), GRID).flatten(1)
            for image in (self.x, delta / per_image(self.eps, delta))
        ]
        return in_range(entries, last, *maps)

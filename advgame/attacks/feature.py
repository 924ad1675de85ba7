"""FeaAttack: push the features of an image towards those of an image of another class.

Source: the evaluation of Dong et al., Adversarial Distributional Training, NeurIPS 2020, where it
breaks a defence whose loss is masked at the output, Feature Scatter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advgame.attacks.attack import Attack, AttackResult
from advgame.attacks.boundary import attacked
from advgame.attacks.input_gradients import input_gradient
from advgame.checks import check_logits
from advgame.errors import InputError
from advgame.losses import misclassified
from advgame.threat import Threat, per_image


@contextlib.contextmanager
def penultimate(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, each forward leaves its penultimate features (B, D) as the list's last.

    They are what the last linear layer that ran was given.

    Raises:
        InputError: the model has no linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError("FeaAttack needs a classifier that ends in a linear layer")
    seen: list[Tensor] = []

    def remember(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[:] = [given[0]]

    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class FeatureAttack(Attack):
    """Ascend cos(features(x'), features(target image)); the first success ends it.

    Args:
        threat: the ball.
        pool: (M, C, H, W), images that targets are drawn from.
        pool_labels: (M,); an image's targets have other labels than its own.
        targets: how many target images each image tries, one after another.
        steps: steps per target.
        step_size: in pixel units; ε/8 (1/255 at 8/255) when None.

    Raises:
        InputError: no target, no step, or a step size that is not above 0.
    """

    threat: Threat
    pool: Tensor
    pool_labels: Tensor
    targets: int = 200
    steps: int = 50
    step_size: float | None = None

    def __post_init__(self) -> None:
        if min(self.targets, self.steps) < 1:
            raise InputError(
                f"FeaAttack needs 1 target and 1 step or more, not {self.targets} and {self.steps}"
            )
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise InputError(f"step_size must be finite and above 0, not {self.step_size}")

    def check_task(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Refuse a classifier without the features, and images without targets.

        Args:
            model: as in `run`.
            x: an image of those that will be attacked or more, (n, C, H, W).
            y: all their labels, (N,).

        Raises:
            InputError: no linear layer that runs, or no image of another class in the pool.
        """
        with torch.no_grad(), attacked(model), penultimate(model) as seen:
            model(x[:1])
        if not seen:
            raise InputError("FeaAttack needs a linear layer, and none of this classifier's runs")
        kinds = self.pool_labels.unique()
        if len(kinds) < 2 and bool((y == kinds[0]).any()):
            raise InputError("FeaAttack needs images of other classes to aim at: give it more")

    def _draws(self) -> str:
        return "FeaAttack, which draws target images,"

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        assert rng is not None
        if check:
            self.check_task(model, x, y)
        best, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        forwards = backwards = 0
        with attacked(model), penultimate(model) as seen:
            for _ in range(self.targets):
                rows = (~fooled).nonzero()[:, 0]
                # one draw for every image: an image's targets do not depend on the others' fate
                chosen = self._draw(y, rng)[rows]
                if not len(rows):
                    break
                with torch.no_grad():
                    model(self.pool[chosen])
                    goal = seen[0]
                forwards += len(rows)
                x_adv = self.threat.random_start(x, rng)[rows]
                for step in range(self.steps + 1):
                    leaf = x_adv.detach().requires_grad_()
                    with torch.enable_grad():
                        logits = model(leaf)
                        hit = misclassified(logits, y[rows])
                        alike = F.cosine_similarity(seen[0].flatten(1), goal.flatten(1))
                    if check and not backwards:
                        check_logits(logits, y[rows])
                    forwards += len(rows)
                    best[rows[hit]], fooled[rows[hit]] = leaf.detach()[hit], True
                    if step == self.steps or bool(hit.all()):
                        break
                    grad = input_gradient(alike.sum(), leaf)
                    backwards += len(rows)
                    rows, goal, kept = rows[~hit], goal[~hit], leaf.detach()[~hit]
                    x_adv = self._step(kept, grad[~hit], x[rows], rows)
        return AttackResult(best, None, fooled, forwards, backwards)

    def _draw(self, y: Tensor, rng: torch.Generator) -> Tensor:
        """Positions in the pool, (B,), of images of other classes."""
        other = self.pool_labels[None, :] != y[:, None]
        return torch.multinomial(other.float(), 1, generator=rng)[:, 0]

    def _step(self, x_adv: Tensor, grad: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        ball = self.threat.select(rows)
        size = ball.radii(x) / 8 if self.step_size is None else self.step_size
        return ball.project(x_adv + per_image(size, x) * ball.steepest(grad), x)

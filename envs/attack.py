"""`advgame/Attack-v0`: choose each gradient step of an attack on a frozen classifier."""

from __future__ import annotations

from typing import Unpack, get_args

import torch
from torch import Tensor

from advgame.attacks.gradient_steps import GradientStepsState, Menu, Start
from advgame.errors import InputError
from envs.adapters import SingleEnv
from envs.queries import QueryVectorEnv, Shared


class AttackVectorEnv(QueryVectorEnv):
    """A batch of B images = B environments that attack one frozen classifier.

    Description:
        Each step is one gradient query. Its backward goes through the graph that the last
        forward left, with the loss that the action picks; then the step is made, projected, and
        the forward at the new point ends the query. An episode of Q queries is one forward and
        Q-1 steps of one forward and one backward (`advgame.attacks.gradient_steps`).

    Action space:
        MultiDiscrete (step size, momentum, loss, direction, move) per image, the lists being
        those of `advgame.attacks.gradient_steps.Menu`. Tensors or arrays of integers (B, 5).

    Observation space:
        Box [-1, 1], ``Menu.feature_names``, float32, (B, n) on the classifier's device; with
        ``images`` a Dict that adds the clean and the current image.

    Reward, start and end are `QueryVectorEnv`'s.

    Args:
        num_envs: B, images attacked side by side.
        menu: the lists that an action chooses from.
        start: ``"clean"``, or ``"random"``: at a random point of the ball.
        shared: see `QueryVectorEnv`; 10 queries by default.
    """

    def __init__(
        self,
        num_envs: int = 64,
        *,
        menu: Menu | None = None,
        start: Start = "clean",
        **shared: Unpack[Shared],
    ) -> None:
        if start not in get_args(Start):
            raise InputError(f"start must be one of {', '.join(get_args(Start))}, not {start!r}")
        self.menu, self.start = menu or Menu(), start
        super().__init__(num_envs, self.menu, **shared)
        with torch.inference_mode(False), torch.enable_grad():
            x = self.pool.data.floats(slice(1)).requires_grad_()
            logits = self.model(x)
            found = logits.requires_grad and torch.autograd.grad(logits.sum(), x, allow_unused=True)
        if not found or found[0] is None:
            raise InputError(
                "no gradient comes back through this classifier (is it quantised, or does it "
                "detach?): use advgame/BlackBoxAttack-v0, which needs none"
            )

    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> GradientStepsState:
        return GradientStepsState(
            self.model, self.threat, self.menu, x, y, budget, start=self.start, rng=self.rng
        )


class AttackEnv(SingleEnv):
    """One image at a time, in NumPy: `AttackVectorEnv` with B = 1, whose arguments it takes."""

    vector = AttackVectorEnv

"""`advgame/Attack-v0`: choose each gradient step of an attack on a frozen classifier."""

from __future__ import annotations

from typing import Any, Unpack, get_args

import torch
from gymnasium import spaces
from torch import Tensor
from typing_extensions import override

from advgame.attacks.gradient_steps import GradientStepsState, Menu, Start, Step
from advgame.errors import InputError
from envs.actions import StepBox
from envs.adapters import SingleEnv
from envs.queries import QueryVectorEnv, Shared
from envs.standard import check_kind, known_settings


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
        With ``flatten_actions`` Discrete: one number for all five. With ``continuous`` Box
        [-1, 1]: step size and momentum as numbers, and a score for each option of the other
        lists, of which the largest is taken (`envs.actions.StepBox`).

    Observation space:
        Box [-1, 1], ``Menu.feature_names``, float32, (B, n) on the classifier's device; with
        ``images`` a Dict that adds the clean and the current image.

    Reward, start and end are `QueryVectorEnv`'s.

    Args:
        num_envs: B, images attacked side by side.
        menu: the lists that an action chooses from.
        start: ``"clean"``, or ``"random"``: at a random point of the ball.
        continuous: actions are points of a box instead of choices, for agents such as SAC.
        shared: see `QueryVectorEnv`; 10 queries by default.
    """

    @known_settings(*Shared.__annotations__)
    def __init__(
        self,
        num_envs: int = 64,
        *,
        menu: Menu | None = None,
        start: Start = "clean",
        continuous: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        if start not in get_args(Start):
            raise InputError(f"start must be one of {', '.join(get_args(Start))}, not {start!r}")
        if continuous and shared.get("flatten_actions"):
            raise InputError("continuous actions are numbers already: leave out flatten_actions")
        check_kind("menu", menu, Menu, "advgame.attacks.gradient_steps.Menu()")
        self.menu, self.start = menu or Menu(), start
        self.steps = StepBox(self.menu) if continuous else None
        """What continuous actions mean."""
        self._taken: Step | None = None  # where it is drawn
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

    @override
    def _actions(self) -> spaces.Space[Any]:
        return self.steps.space if self.steps else super()._actions()

    @override
    def _read(self, actions: Tensor) -> Tensor:
        return self.steps.read(actions) if self.steps else super()._read(actions)

    @override
    def _advance(
        self, actions: Tensor, rows: Tensor | None = None, arrivals: tuple[Tensor, ...] = ()
    ) -> None:
        if self.render_mode:
            decoded = self.steps.decode(actions)[0] if self.steps else self.menu.decode(actions)
            self._taken = decoded
        if self.steps is None:
            super()._advance(actions, rows, arrivals)
        else:
            assert isinstance(self.state, GradientStepsState)
            self.state.take(*self.steps.decode(actions), rows, arrivals)

    @override
    def _in_words(self, row: int) -> str:
        assert self._taken is not None
        size, momentum, loss, accumulated, best, random = (float(v[row]) for v in self._taken)
        if random:
            return "last action: to a random point of the ball"
        origin = "the best point" if best else "this point"
        along = "the sum of gradients" if accumulated else "the gradient"
        words = f"last action: {size:.3g} ε from {origin} along {along} of "
        words += self.menu.losses[int(loss)]
        return words if best or not momentum else f"{words}, momentum {momentum:.2g}"

    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> GradientStepsState:
        return GradientStepsState(
            self.model, self.threat, self.menu, x, y, budget, start=self.start, rng=self.rng
        )


class AttackEnv(SingleEnv):
    """One image at a time, in NumPy: `AttackVectorEnv` with B = 1, whose arguments it takes."""

    vector = AttackVectorEnv

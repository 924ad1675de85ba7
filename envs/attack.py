"""`advgame/Attack-v0`: choose each gradient step of an attack on a frozen classifier."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from advgame.attacks.features import feature_names, features
from advgame.attacks.menu import Menu
from advgame.attacks.schedule import Ascent, Start
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.threat import Threat
from envs.queries import QueryEnv, QueryVectorEnv
from envs.standard import check_standard


class AttackVectorEnv(QueryVectorEnv[Ascent]):
    """A batch of B images = B environments that attack one frozen classifier.

    Description:
        Each step is one gradient query. Its backward goes through the graph that the last
        forward left, with the loss that the action picks; then the step is made, projected, and
        the forward at the new point ends the query. An episode of Q queries is one forward and
        Q-1 steps of one forward and one backward (`advgame.attacks.schedule.Ascent`).

    Action space:
        MultiDiscrete (step size, momentum, loss, direction, move) per image, the lists being
        those of `advgame.attacks.menu.Menu`. Tensors or arrays of integers (B, 5).

    Observation space:
        Box [-1, 1], the features of `advgame.attacks.features`, float32, (B, n) on the
        classifier's device; with ``images`` a Dict that adds the clean and the current image.

    Reward:
        gain · (best margin now - before) / (mean clean margin of the images attacked)
        + bonus at success - price. The margin is the largest other logit minus the true one.

    Start:
        The next image of the data that the classifier gets right, as it is or at a random point
        of the ball. ``reset(seed=s)`` restores the order, so that two seeded runs are equal;
        ``reset()`` goes on to other images.

    End:
        ``terminated`` where the classifier is fooled or the budget is spent, which is part of what
        is seen; ``info["fooled"]`` tells the two apart. ``truncated`` never. Autoreset is
        NEXT_STEP: the next step's forward is the new image's.

    Args:
        num_envs: B, images attacked side by side.
        classifier: attacked as a frozen copy in evaluation mode; the shipped one when None.
        data: images with labels; the digits training split when None.
        threat: the ball; L∞ with ε = 0.15 when None.
        menu: the lists that an action chooses from.
        queries: forwards per image, or several numbers of which each episode draws one.
        gain: reward per mean clean margin gained.
        bonus: reward of success.
        price: of each query.
        start: ``"clean"`` or ``"random"``.
        images: observe the images too.
        render_mode: None; it draws no pictures.
        max_episode_steps: None; episodes end by ``queries``.
    """

    def __init__(
        self,
        num_envs: int = 64,
        *,
        classifier: nn.Module | None = None,
        data: ImageSet | None = None,
        threat: Threat | None = None,
        menu: Menu | None = None,
        queries: int | tuple[int, ...] = 10,
        gain: float = 1.0,
        bonus: float = 1.0,
        price: float = 0.01,
        start: Start = "clean",
        images: bool = False,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_standard(render_mode, max_episode_steps, "its episodes end by `queries`")
        if start not in get_args(Start):
            raise InputError(f"start must be one of {', '.join(get_args(Start))}, not {start!r}")
        self.menu, self.start = menu or Menu(), start
        super().__init__(
            num_envs,
            sizes=self.menu.sizes,
            width=len(feature_names(self.menu)),
            classifier=classifier,
            data=data,
            threat=threat,
            queries=queries,
            gain=gain,
            bonus=bonus,
            price=price,
            images=images,
        )
        with torch.inference_mode(False), torch.enable_grad():
            x = self.pool.data.floats(slice(1)).requires_grad_()
            logits = self.model(x)
            found = logits.requires_grad and torch.autograd.grad(logits.sum(), x, allow_unused=True)
        if not found or found[0] is None:
            raise InputError(
                "no gradient comes back through this classifier (is it quantised, or does it "
                "detach?): use advgame/BlackBoxAttack-v0, which needs none"
            )

    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> Ascent:
        return Ascent(
            self.model, self.threat, self.menu, x, y, budget, start=self.start, rng=self.rng
        )

    def _play(
        self, siege: Ascent, actions: Tensor, rows: Tensor | None, arrivals: tuple[Tensor, ...]
    ) -> None:
        siege.step(self.menu.decode(actions, check=False), rows, arrivals)

    def _features(self, siege: Ascent) -> Tensor:
        return features(siege)


class AttackEnv(QueryEnv):
    """One image at a time, in NumPy: `AttackVectorEnv` with B = 1, whose arguments it takes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(AttackVectorEnv(1, **settings))

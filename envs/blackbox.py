"""`advgame/BlackBoxAttack-v0`: place square patches on an image, seeing logits only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from advgame.attacks.squares import Patches, Siege, feature_names, features
from advgame.data import ImageSet, load_data
from advgame.threat import Threat
from envs.queries import QueryEnv, QueryVectorEnv
from envs.standard import check_standard


class BlackBoxAttackVectorEnv(QueryVectorEnv[Siege]):
    """A batch of B images = B environments that attack one frozen classifier without gradients.

    Description:
        Each step proposes a square patch on the best point so far; the forward at the candidate
        is the query, and the candidate is kept where its margin is larger
        (`advgame.attacks.squares`). An episode of Q queries is one forward at the clean image
        and Q-1 steps.

    Action space:
        MultiDiscrete (row, column, side, sign pattern, reach) per image: rows and columns are
        places on an 8x8 grid, the other lists those of `advgame.attacks.squares.Patches`.
        Tensors or arrays of integers (B, 5).

    Observation space:
        Box [-1, 1], the features of `advgame.attacks.squares`, float32, (B, n) on the
        classifier's device; with ``images`` a Dict that adds the clean and the last image.

    Reward:
        gain · (best margin now - before) / (mean clean margin of the images attacked)
        + bonus at success - price.

    Start:
        The next image of the data that the classifier gets right. ``reset(seed=s)`` restores
        the order; ``reset()`` goes on to other images.

    End:
        ``terminated`` where the classifier is fooled or the budget is spent, which is part of what
        is seen; ``info["fooled"]`` tells the two apart. ``truncated`` never. Autoreset is
        NEXT_STEP: the next step's forward is the new image's.

    Args:
        num_envs: B, images attacked side by side.
        classifier: attacked as a frozen copy in evaluation mode; the shipped one when None.
        data: images with labels; the digits training split when None.
        threat: the ball; L∞ with ε = 0.15 when None.
        patches: the lists that an action chooses from.
        queries: forwards per image, or several numbers of which each episode draws one.
        gain: reward per mean clean margin gained.
        bonus: reward of success.
        price: of each query.
        images: observe the images too.
        render_mode: None; it draws no pictures.
        max_episode_steps: None; episodes end by ``queries``.

    Source: Andriushchenko et al., Square Attack, ECCV 2020.
    """

    def __init__(
        self,
        num_envs: int = 64,
        *,
        classifier: nn.Module | None = None,
        data: ImageSet | None = None,
        threat: Threat | None = None,
        patches: Patches | None = None,
        queries: int | tuple[int, ...] = 50,
        gain: float = 1.0,
        bonus: float = 1.0,
        price: float = 0.01,
        images: bool = False,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_standard(render_mode, max_episode_steps, "its episodes end by `queries`")
        data = data if data is not None else load_data("digits").train
        self.patches = patches or Patches(data.shape)
        super().__init__(
            num_envs,
            sizes=self.patches.sizes,
            width=len(feature_names(self.patches)),
            classifier=classifier,
            data=data,
            threat=threat,
            queries=queries,
            gain=gain,
            bonus=bonus,
            price=price,
            images=images,
        )

    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> Siege:
        return Siege(self.model, self.threat, self.patches, x, y, budget)

    def _play(
        self, siege: Siege, actions: Tensor, rows: Tensor | None, arrivals: tuple[Tensor, ...]
    ) -> None:
        siege.step(actions, rows, arrivals)

    def _features(self, siege: Siege) -> Tensor:
        return features(siege)


class BlackBoxAttackEnv(QueryEnv):
    """One image at a time, in NumPy: `BlackBoxAttackVectorEnv` with B = 1."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(BlackBoxAttackVectorEnv(1, **settings))

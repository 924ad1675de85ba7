"""`advgame/BlackBoxAttack-v0`: place square patches on an image, seeing logits only."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor
from typing_extensions import override

from advgame.attacks.patches import PatchAttackState, Patches
from advgame.data import load_data
from advgame.errors import InputError
from envs.adapters import SingleEnv
from envs.queries import QueryVectorEnv, Shared
from envs.standard import check_data, check_kind, known_settings


class BlackBoxAttackVectorEnv(QueryVectorEnv):
    """A batch of B images = B environments that attack one frozen classifier without gradients.

    Description:
        Each step proposes a square patch on the best point so far; the forward at the candidate
        is the query, and the candidate is kept where its margin is larger
        (`advgame.attacks.patches`). An episode of Q queries is one forward at the clean image
        and Q-1 steps.

    Action space:
        MultiDiscrete (row, column, side, sign pattern, reach) per image: rows and columns are
        places on an 8x8 grid, the other lists those of `advgame.attacks.patches.Patches`.
        Tensors or arrays of integers (B, 5). With ``flatten_actions`` Discrete: one number for all
        five.

    Observation space:
        Box [-1, 1], ``Patches.feature_names``, float32, (B, n) on the classifier's device; with
        ``images`` a Dict that adds the clean and the last image.

    Reward, start and end are `QueryVectorEnv`'s.

    Args:
        num_envs: B, images attacked side by side.
        patches: the lists that an action chooses from, for images of the data's shape.
        shared: see `QueryVectorEnv`; 50 queries by default.

    Raises:
        InputError: patches for images of another shape.

    Source: Andriushchenko et al., Square Attack, ECCV 2020.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **QueryVectorEnv.metadata,
        "render_fps": 10,
    }

    @known_settings(*Shared.__annotations__)
    def __init__(
        self, num_envs: int = 64, *, patches: Patches | None = None, **shared: Unpack[Shared]
    ) -> None:
        data = shared.get("data")
        check_data(data)
        check_kind("patches", patches, Patches, "advgame.attacks.patches.Patches(data.shape)")
        shared["data"] = data = data if data is not None else load_data("digits").train
        shared.setdefault("queries", 50)
        self.patches = patches or Patches(data.shape)
        if tuple(self.patches.shape) != tuple(data.shape):
            raise InputError(
                f"the patches are for images of {tuple(self.patches.shape)}, the data's have "
                f"{tuple(data.shape)}: give Patches(data.shape)"
            )
        super().__init__(num_envs, self.patches, **shared)

    @override
    def _in_words(self, row: int) -> str:
        assert isinstance(self.state, PatchAttackState)
        patch = self.state.chosen[row].tolist()
        share, reach = self.patches.sides[patch[2]], self.patches.reaches[patch[4]]
        signs = "".join("+" if one > 0 else "-" for one in self.patches.signs[patch[3]].tolist())
        kept = "kept" if self.state.kept[row] else "not kept"
        return (
            f"last patch: {share:.0%} of the side at row {patch[0]}, column {patch[1]} of 8, "
            f"signs {signs}, reach {reach:g} ε: {kept}"
        )

    def _begin(self, x: Tensor, y: Tensor, budget: Tensor) -> PatchAttackState:
        return PatchAttackState(self.model, self.threat, self.patches, x, y, budget)


class BlackBoxAttackEnv(SingleEnv):
    """One image at a time, in NumPy: `BlackBoxAttackVectorEnv` with B = 1."""

    vector = BlackBoxAttackVectorEnv

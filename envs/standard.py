"""Checks of Gymnasium's own arguments (`render_mode`, `seed`, `options`), alike for every id."""

from __future__ import annotations

from typing import Any

import numpy as np

from advgame.errors import InputError


class NoPictures(InputError, TypeError):
    """A render mode was asked for.

    It is a TypeError as well, as for an argument that is not taken: Stable-Baselines3's
    `make_vec_env` asks for pictures first and goes on without them after a TypeError.
    """


def check_standard(render_mode: str | None, max_episode_steps: int | None, length: str) -> None:
    """Refuse what the environments do not have; None, which Gymnasium may hand over, is fine.

    Args:
        render_mode: of ``gymnasium.make`` and ``make_vec``.
        max_episode_steps: of ``make_vec``; ``gymnasium.make`` keeps its own and wraps instead.
        length: what sets an episode's length here.

    Raises:
        InputError: anything but None.
    """
    if render_mode is not None:
        raise NoPictures(f"this environment draws no pictures: leave out {render_mode=}")
    if max_episode_steps is not None:
        raise InputError(
            f"max_episode_steps={max_episode_steps} has no effect on the vector form: {length}"
        )


def check_reset(seed: object, options: dict[str, Any] | None, shared: str) -> int | None:
    """The seed of a vector environment's reset.

    Args:
        seed: one integer, or None.
        options: of ``reset``; there are none, and all rows are reset together.
        shared: why there is one seed for all.

    Raises:
        InputError: another seed, or options, such as Gymnasium's ``reset_mask``.
    """
    if options:
        raise InputError(f"reset has no options here, and resets every row: not {sorted(options)}")
    if seed is not None and not isinstance(seed, int | np.integer):
        raise InputError(f"{shared}: reset takes one integer seed")
    return None if seed is None else int(seed)

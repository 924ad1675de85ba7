"""Checks of Gymnasium's own arguments (`render_mode`, `seed`, `options`), alike for every id."""

from __future__ import annotations

from typing import Any

import numpy as np

from advgame.data import ImageSet
from advgame.errors import InputError

RENDER_MODES = ["rgb_array"]


def check_render_mode(render_mode: str | None) -> None:
    """Refuse what the environments do not draw; ``gymnasium.make`` makes windows of pictures.

    Raises:
        InputError: another mode than ``"rgb_array"`` and None.
    """
    if render_mode not in (None, *RENDER_MODES):
        raise InputError(
            f'render_mode must be "rgb_array" or left out here, not {render_mode!r}; '
            'gymnasium.make(id, render_mode="human") opens a window'
        )


def check_num_envs(number: object, name: str = "num_envs") -> None:
    """Refuse what is no number of rows, or of whatever ``name`` counts.

    Raises:
        InputError: no whole number, or below 1.
    """
    if not isinstance(number, int | np.integer) or number < 1:
        raise InputError(f"{name} must be a whole number of 1 or above, not {number!r}")


def check_data(data: object) -> None:
    """Refuse what are no images with labels; None stands for the default ones.

    Raises:
        InputError: something else, such as a name or all three splits.
    """
    if data is None or isinstance(data, ImageSet):
        return
    raise InputError(
        'data is an advgame.ImageSet, such as load_data("digits").train or '
        f"ImageSet.from_floats(images, labels, classes), not a {type(data).__name__}"
    )


def check_no_time_limit(max_episode_steps: int | None, length: str) -> None:
    """Refuse a time limit where there is none; None, which Gymnasium may hand over, is fine.

    Args:
        max_episode_steps: of ``make_vec``; ``gymnasium.make`` keeps its own and wraps instead.
        length: what sets an episode's length here.

    Raises:
        InputError: anything but None.
    """
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

"""Checks of the environments' arguments, Gymnasium's own among them, and the default defender."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch

from advgame.attacks import attacked
from advgame.checks import check_labels, check_logits
from advgame.classifiers import make_classifier
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError, unknown
from advgame.seeding import seeded_init

RENDER_MODES = ["rgb_array"]

Init = TypeVar("Init", bound=Callable[..., None])


def ids_of(form: type, settings: dict[str, Any]) -> str:
    """The id that is made of an environment's class with these settings; else the class's name."""
    paths = {f"{one.__module__}:{one.__name__}" for one in form.__mro__}
    ids = [
        name
        for name, spec in gym.registry.items()
        if paths & {spec.entry_point, spec.vector_entry_point}
        and all(settings.get(k, v) == v for k, v in spec.kwargs.items())
    ]
    return " or ".join(ids) or form.__name__


def known_settings(*more: str) -> Callable[[Init], Init]:
    """Decorator of an environment's ``__init__``: a mistyped setting is told by the id.

    Python's own TypeError names a class that who typed the id has never seen.

    Args:
        more: names that ``__init__`` takes beside those of its signature.

    Raises:
        InputError: from ``__init__``, of a setting that the environment has not.
    """

    def decorate(init: Init) -> Init:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        taken = inspect.signature(init).parameters.items()
        names = [name for name, one in taken if one.kind in kinds and name != "self"] + [*more]

        @wraps(init)
        def checked(self: object, *args: Any, **settings: Any) -> None:
            for name in (one for one in settings if one not in names):
                env_id = ids_of(type(self), settings)
                if name == "continuous":
                    raise InputError(f"{env_id} has no continuous actions; advgame/Attack-v0 has")
                raise unknown(f"setting of {env_id}", name, names)
            init(self, *args, **settings)

        return cast(Init, checked)

    return decorate


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


def check_defender(defender: object) -> None:
    """Refuse what does not learn; None stands for the default one.

    Raises:
        InputError: something else, such as a classifier without an optimiser.
    """
    if defender is not None and not isinstance(defender, Defender):
        raise InputError(
            "defender is a classifier with its optimiser, Defender(module, lr=0.1), not a "
            f"{type(defender).__name__}"
        )


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    """Refuse a setting of another type; None stands for the default one.

    Args:
        name: of the setting.
        value: what was given.
        kind: what it has to be.
        example: how one is written.

    Raises:
        InputError: something else, such as a number.
    """
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(
            f"{name} must be {article} {kind.__name__}, such as {example}, "
            f"not the {type(value).__name__} {value!r:.60}"
        )


def check_fit(defender: Defender, data: ImageSet) -> None:
    """Refuse images that the defender's classifier cannot take, or labels that it does not have.

    Raises:
        InputError: shapes, classes or logits that do not fit.
    """
    try:
        with attacked(defender.module), torch.no_grad():
            logits = defender.module(data.floats(slice(2)))
    except RuntimeError as error:  # as PyTorch words it when shapes do not fit
        raise InputError(
            f"the defender's classifier cannot take the data's images, {data.shape}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_logits(logits, data.labels[:2])
    check_labels(data.labels, len(data), logits.shape[1])


def default_defender(data: ImageSet) -> Defender:
    """A small CNN with SGD, the same one at every call."""
    with seeded_init(0):
        module = make_classifier("small_cnn", data.shape, data.classes)
    return Defender(module, lr=0.05)


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

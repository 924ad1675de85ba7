"""Defaults that some data cannot take, and what then takes their place; imports no torch.

What a person typed is never changed: it is refused where it cannot work.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from advgame.choices import FEW_CLASSES, LEAST_CLASSES


class _Attacked(Protocol):
    @property
    def attacks(self) -> tuple[str, ...]: ...


SettingsT = TypeVar("SettingsT", bound=_Attacked)


def for_few_classes(attacks: Sequence[str]) -> tuple[str, ...]:
    """The names with `FEW_CLASSES` in place of ``autoattack``, each once."""
    found = [one for name in attacks for one in (FEW_CLASSES if name == "autoattack" else (name,))]
    return tuple(dict.fromkeys(found))


def fit_attacks(
    config: SettingsT, usual: SettingsT, typed: Collection[str], classes: int, *, tell: bool
) -> SettingsT:
    """The settings with attacks that classifiers of few classes can be judged by.

    Args:
        config: all settings.
        usual: the same with nothing asked for.
        typed: options that were typed.
        classes: of the images.
        tell: whether to say so on stderr.
    """
    if classes >= LEAST_CLASSES or "attacks" in typed or config.attacks != usual.attacks:
        return config
    attacks = for_few_classes(config.attacks)
    if tell and attacks != config.attacks:
        print(
            f"note: AutoAttack needs {LEAST_CLASSES} classes, the images have {classes}: "
            f"--attacks {','.join(attacks)}",
            file=sys.stderr,
        )
    return cast(SettingsT, replace(cast(Any, config), attacks=attacks))


def fit_batch(
    config: Any, usual: Any, typed: Collection[str], images: int, processes: int, *, tell: bool
) -> Any:
    """The settings with a batch size that the training images fill.

    Args:
        config: all settings.
        usual: the same with nothing asked for.
        typed: options that were typed.
        images: for training.
        processes: that share them.
        tell: whether to say so on stderr.

    Returns:
        The settings; where the usual batch is larger than the images of a process it is a quarter
        of those, for some steps an epoch, and even, as games that halve batches need it.
    """
    own = images // processes
    asked = "batch_size" in typed or config.batch_size != usual.batch_size
    if asked or config.batch_size <= own or own < 2:
        return config
    size = max(2, own // 8 * 2)
    if tell:
        print(
            f"note: {images} training images do not fill the usual batch of {config.batch_size}: "
            f"--batch-size {size}",
            file=sys.stderr,
        )
    return replace(config, batch_size=size)

"""What `--dataset` can name, told from the words alone; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from advgame.errors import InputError, unknown
from advgame.own_code import is_own_code


@dataclass(frozen=True)
class Named:
    """A published data set.

    Args:
        recipe: whose settings a training has by default.
        colour: whether its images have three channels.
        flip: whether a mirrored image is of the same class.
    """

    recipe: str
    colour: bool = False
    flip: bool = False


NAMED = {
    "digits": Named("digits"),
    "mnist": Named("mnist"),
    "cifar10": Named("cifar10", colour=True, flip=True),
    "cifar100": Named("cifar100", colour=True, flip=True),
    "svhn": Named("svhn", colour=True),
}
DATASETS = tuple(NAMED)


def check_dataset(
    dataset: str, data_dir: str | Path | None = None, *, download: bool = False
) -> None:
    """Refuse, before any work, words that name no data, and options that they make no use of.

    Args:
        dataset: a name, or ``package.module:function``.
        data_dir: folder of a published data set.
        download: whether what is missing there is fetched.

    Raises:
        InputError: what there is, or what to leave away.
    """
    given = data_dir is not None or download
    if is_own_code(dataset):
        if given:
            raise InputError(
                f"{dataset} is your code, which reads its own files: leave --data-dir and "
                "--download away"
            )
    elif dataset not in NAMED:
        raise unknown("dataset", dataset, NAMED)
    elif dataset == "digits" and given:
        raise InputError(
            "digits is embedded and reads no folder: leave --data-dir and --download away, or say "
            f"which data lie there, e.g. --dataset {DATASETS[1]}"
        )


def recipe(dataset: str) -> str:
    """Whose settings a training on these data has by default; "" where nothing is known."""
    return NAMED[dataset].recipe if dataset in NAMED else ""


def colour(dataset: str) -> bool | None:
    """Whether the images have three channels; None where only a function's code knows."""
    return NAMED[dataset].colour if dataset in NAMED else None


def short_name(dataset: str) -> str:
    """What reports and files call the data: a name, or that of the file or folder."""
    if dataset in NAMED or is_own_code(dataset):
        return dataset
    path = Path(dataset).expanduser().resolve()
    return path.stem if path.suffix == ".npz" else path.name


def flips(dataset: str) -> bool:
    """Whether a training mirrors images: never your own, whose classes may be left and right."""
    return dataset in NAMED and NAMED[dataset].flip

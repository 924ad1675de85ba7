"""What ``--model`` may say: a built-in network, or somebody's own; imports no torch."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advgame.choices import COLOUR
from advgame.errors import InputError, unknown
from advgame.own_code import is_own_code, own_code

CLASSIFIERS = (
    "small_cnn",
    "minimax_cnn",
    "lean_resnet",
    "lean_resnet-half",
    "resnet18",
    "resnet34",
    "resnet50",
    "preact_resnet18",
    "preact_resnet18-las",
    "preact_resnet18-fast",
    "wrn-DEPTH-WIDEN",
    "wrn-DEPTH-WIDEN-swish",
)
WIDE = re.compile(r"wrn-(\d+)-(\d+)(-swish)?")


def is_built_in(name: str) -> bool:
    """Whether `advgame.classifiers.make_classifier` knows a network of that name."""
    return name in CLASSIFIERS[:-2] or WIDE.fullmatch(name) is not None


def check_model(name: str) -> None:
    """Refuse what names no network, before torch is imported; nothing of a stranger's is run.

    Args:
        name: one of `CLASSIFIERS`, or ``package.module:factory``, with literal arguments in
            brackets where it takes any.

    Raises:
        InputError: what may stand there.
    """
    if is_built_in(name):
        return
    if set(name) & set(":/(") or "." in name:
        own_code(name)  # says what is wrong with it
        return
    if Path(f"{name}.py").is_file():
        raise InputError(
            f"--model {name}: name the class or function of {name}.py that makes the network, too, "
            f"as {name}:{_made_in(Path(f'{name}.py'))}"
        )
    raise unknown("model", name, (*CLASSIFIERS, "package.module:factory of your own"))


def _made_in(file: Path) -> str:
    """The first class of a file, or word that stands for it; nothing is run."""
    with contextlib.suppress(OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        for part in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(part, ast.ClassDef):
                return part.name
    return "Factory"


def statistics(text: str) -> tuple[tuple[float, ...], tuple[float, ...]] | str:
    """What ``--normalise`` says: means and deviations per channel, or the name of a data set.

    Args:
        text: a colour data set of `advgame.choices.COLOUR`, or ``MEANS/DEVIATIONS`` with commas.

    Raises:
        InputError: what may stand there.
    """
    if text in COLOUR:
        return text
    try:
        mean, std = (tuple(float(one) for one in part.split(",")) for part in text.split("/"))
        if len(mean) != len(std) or not min(std) > 0 or not max(map(abs, (*mean, *std))) < 100:
            raise ValueError("no means and deviations")
    except ValueError as error:
        raise InputError(
            f"--normalise takes {', '.join(COLOUR)}, or a mean and a deviation per channel of "
            f"images in [0, 1], as 0.5,0.5,0.5/0.2,0.2,0.2, not {text!r}"
        ) from error
    return mean, std


def recorded(about: Mapping[str, Any]) -> str:
    """What a run's ``config.json`` says of its network; empty where it says nothing."""
    found = about["config"].get("model") or about.get("network")
    return found if isinstance(found, str) else ""


def knows(about: Mapping[str, Any]) -> bool:
    """Whether a run's ``config.json`` names a built-in network, which is built unasked."""
    return is_built_in(recorded(about))


def rebuilt(about: Mapping[str, Any], model: str) -> str:
    """How a network is built, in words, where its run notes another way; "" where it does not.

    Weights fit every network of the same shapes: ``my:Net(slope=0.1)`` takes those of
    ``my:Net(slope=0.2)``, and answers otherwise.

    Args:
        about: what the run's ``config.json`` says.
        model: the network that its weights go into; empty is the run's own.
    """
    noted = about["config"].get("model")  # a run from Python notes a class without its arguments
    if not model or not isinstance(noted, str) or not noted or _call(noted) == _call(model):
        return ""
    return f"built as {model}, where the run notes {noted}"


def _call(model: str) -> object:
    """What a word of ``--model`` calls with which arguments, however it is spelled."""
    with contextlib.suppress(InputError):
        found = own_code(model)
        return found.module, found.attribute, repr(found.args), repr(sorted(found.settings.items()))
    return model


def model_of(
    path: object, about: Mapping[str, Any], typed: str = "", *, other: bool = False
) -> str:
    """How the network of a run is built.

    Args:
        path: the run's folder, for messages.
        about: what its ``config.json`` says.
        typed: the network that a person named, empty where nobody did.
        other: whether that may be about another network, too.

    Returns:
        A built-in name that the folder knows, or what was typed: code that a folder names, which
        may be a stranger's, is not run unasked.

    Raises:
        InputError: what to type.
    """
    known = recorded(about)
    if is_built_in(known):
        if typed not in ("", known) and not other:
            raise InputError(f"{path} knows its own network, {known}: leave --model away")
        return known
    if typed:
        return typed
    if not known:
        raise InputError(
            f"{path} does not say how its network is built: if it trained a classifier, name it "
            "with --model, a built-in one or package.module:factory"
        )
    code = shlex.quote(known) if is_own_code(known) else "package.module:factory"
    raise InputError(
        f"{path} has a network of somebody's own, {known}: type --model {code}, with its arguments "
        "in brackets where it takes any (nothing that a folder names is run unasked)"
    )

"""Options as a person types them, refused in words where they cannot work; imports no torch."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from advgame.choices import PAPERS
from advgame.errors import InputError
from advgame.own_code import is_own_code

# options of all scripts that may name code of somebody's own
CODE = ("model", "dataset", "game", "reward", "attacks", "attack", "updater")


def _named(words: str, field: str, hint: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(words.split(), (field, hint))


# options of other projects -> the field that a script must have instead, what to type
FOREIGN: Mapping[str, tuple[str, str]] = {
    **_named(
        "out output out-dir output-dir save-dir log-dir logdir run-dir run-name exp-name",
        "runs_dir",
        "--runs-dir is where new folders go, --name what the new one is called",
    ),
    **_named(
        "gpu gpus gpu-id cuda device",
        "accelerator",
        "--accelerator cuda or cpu; auto takes a GPU where there is one",
    ),
    **_named(
        "workers num-workers",
        "dataset",
        "images lie in memory, and no processes load them",
    ),
    **_named("learning-rate", "lr", "--lr is the learning rate"),
    **_named("iters iterations num-iters max-iters max-steps", "epochs", "--epochs is how long"),
    **_named(
        "checkpoint ckpt load pretrained",
        "init",
        "--init starts from weights, --resume goes on with a run folder",
    ),
}


@dataclass(frozen=True)
class Must:
    """What a number of a settings class must be; part of its type, and asked by `check_types`.

    Args:
        words: after the field's name, e.g. ``"be above 0"``.
        holds: whether a value does; NaN never should.
    """

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Must("be 1 or above", lambda value: value >= 1)]
Whole = Annotated[int, Must("be 0 or above", lambda value: value >= 0)]
Positive = Annotated[float, Must("be above 0", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[
    float, Must("be finite and 0 or above", lambda value: 0 <= value < math.inf)
]
Finite = Annotated[float, Must("be finite", math.isfinite)]
Share = Annotated[float, Must("lie in [0, 1)", lambda value: 0 <= value < 1)]


def split_names(word: str) -> list[str]:
    """Names with commas between; those in the brackets of ``module:factory(1, size=0.5)`` stay."""
    parts, depth = [""], 0
    for letter in word:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [name for part in parts if (name := part.strip())]


# An option that takes names, with spaces or commas between: --attacks fgsm,pgd20 autoattack
Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME [NAME ...]",
        instance_from_str=lambda words: tuple(name for word in words for name in split_names(word)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]

# An option that is one text, whose words may be typed with quotes around them or without
Words = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME",
        instance_from_str=" ".join,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


def _norm(words: Sequence[str]) -> str:
    """The norm that a person typed in any case, also as l_2 or l-inf."""
    known = {name.lower(): name for name in ("Linf", "L2")}
    if (plain := words[0].lower().replace("_", "").replace("-", "")) not in known:
        raise ValueError(f"choose Linf or L2, not {words[0]!r}")
    return known[plain]


# The norm of a ball, which --norm takes in any case
Norm = Annotated[
    Literal["Linf", "L2"],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="{Linf,L2}",
        instance_from_str=_norm,
        is_instance=lambda value: value in ("Linf", "L2"),
        str_from_instance=lambda value: [value],
    ),
]


def refuse_unasked(place: object, option: str, value: object) -> None:
    """Refuse code that a folder names, which may be a stranger's, where it was not typed.

    Args:
        place: what names it.
        option: the option that would.
        value: what stands there, one word or several; anything but code is let through.

    Raises:
        InputError: what to type.
    """
    if asked := _code(option, value):
        raise InputError(
            f"{place} runs your code {asked[0]}: to go on, type "
            f"{shlex.join(typed_again({option: value}))} again (nothing that a folder names is "
            "run unasked)"
        )


def typed_again(config: Mapping[str, Any]) -> list[str]:
    """The options of a run that name code, as words to type again where it goes on.

    Args:
        config: option -> value, one word or several.
    """
    found: list[str] = []
    for name in CODE:
        if _code(name, value := config.get(name)):
            found += [f"--{name}", *_words(value)]
    return found


def _code(option: str, value: object) -> list[str]:
    """The words of an option's value that name code of somebody's own."""
    known = PAPERS if option.startswith("attack") else ()
    code = [one for one in _words(value) if isinstance(one, str) and is_own_code(one)]
    return [one for one in code if one.split(":")[0] not in known]


def _words(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def aliases(kind: type) -> dict[str, str]:
    """The other words for options of a settings class, without dashes -> the field."""
    return {
        word.lstrip("-"): name
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for part in getattr(hint, "__metadata__", ())
        for word in getattr(part, "aliases", None) or ()
    }


def refuse_foreign(kind: type, words: Sequence[str]) -> None:
    """Answer options of other projects, which are far from the names that they have here.

    Args:
        kind: the settings class.
        words: of the command line.

    Raises:
        InputError: what to type.
    """
    own = {field.name for field in fields(kind)}
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        field, hint = FOREIGN.get(option.removeprefix("--"), ("", ""))
        known = option[2:].replace("-", "_") in own
        if option.startswith("--") and field in own and not known:
            raise InputError(f"there is no {option}: {hint}")


def peek(
    words: Sequence[str], others: Mapping[str, str] | None = None, **defaults: str | None
) -> dict[str, str]:
    """The values of a few options among the words of a command line, before it is parsed in full.

    They decide what the other options' defaults are, which ``--help`` then shows.

    Args:
        words: of the command line.
        others: further words for options, as `aliases` gives them.
        defaults: the options; those of None are left out where they do not stand there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        more = [f"--{word}" for word, field in (others or {}).items() if field == name]
        spelled = dict.fromkeys((dashed(name), f"--{name}", *more))
        parser.add_argument(*spelled, dest=name, default=default)
    try:
        known, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:  # an option without its value: the full parser says so better
        return _given(defaults)
    return _given(vars(known))


def _given(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def as_typed(kind: type, name: str, word: str) -> Any:
    """What an option of a settings class makes of one word: a number, or by a spelling of its own.

    Raises:
        ValueError: a word that the option does not know.
    """
    hint = get_type_hints(kind, include_extras=True)[name]
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, PrimitiveConstructorSpec):
            return part.instance_from_str([word])
    whole = any(getattr(part, "__origin__", part) is int for part in (hint, *get_args(hint)))
    return int(word) if whole else word


def typed_options(kind: type) -> set[str]:
    """The fields of a settings class that stand on the command line.

    Raises:
        InputError: an option of several values that is given twice, of which the last would count.
    """
    given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    words, others = [word.lstrip("-").replace("-", "_") for word in given], aliases(kind)
    words = [others.get(word, word) for word in words]
    for field in fields(kind):
        if isinstance(field.default, tuple) and words.count(field.name) > 1:
            word = dashed(field.name)
            raise InputError(f"{word} is given twice: name all after one {word}")
    return {f.name for f in fields(kind) if {f.name, f"no_{f.name}"} & set(words)}  # --no-FLAG


def is_positional(kind: type, name: str) -> bool:
    """Whether an option of a settings class is typed without its name."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return Positional in getattr(hint, "__metadata__", ())


def dashed(name: str) -> str:
    """A field as it is typed: --some-option."""
    return f"--{name.replace('_', '-')}"


def check_types(kind: type, values: Mapping[str, Any], where: object) -> None:
    """Refuse values that are not of the types of a settings class, or not what those say.

    Args:
        kind: the settings class; `Must` may be part of a type.
        values: some of its fields, by name.
        where: whose they are, for the message.

    Raises:
        InputError: which value, and what it should be.
    """
    hints, every = get_type_hints(kind, include_extras=True), CollectionCheckStrategy.ALL_ITEMS
    for name, value in values.items():
        try:
            check_type(value, hints[name], collection_check_strategy=every)
        except TypeCheckError as error:
            raise InputError(f"{where}: {name} cannot be {value!r} ({error})") from error
        for must, one in _musts(hints[name], value):
            if not must.holds(one):
                raise InputError(f"{name} must {must.words}, not {value}")


def _musts(hint: Any, value: Any) -> Iterator[tuple[Must, Any]]:
    """What a type asks of a value of it, also within tuples and beside None."""
    if get_origin(hint) is Annotated:
        yield from ((part, value) for part in hint.__metadata__ if isinstance(part, Must))
        hint = hint.__origin__
    parts = [part for part in get_args(hint) if part not in (..., type(None))]
    if value is None or not parts or get_origin(hint) is Literal:
        return
    if isinstance(value, tuple):
        kinds = parts * len(value) if len(parts) == 1 else parts
        for kind, one in zip(kinds, value, strict=True):
            yield from _musts(kind, one)
    elif len(parts) == 1:
        yield from _musts(parts[0], value)


def refuse_idle(config: object, usual: object, idle: Mapping[str, Collection[str]]) -> None:
    """Refuse options that change nothing, where they differ from what is usual.

    Args:
        config: all settings.
        usual: the same with nothing asked for.
        idle: why -> options, e.g. ``{"--agent ppo": ["baseline"]}``.

    Raises:
        InputError: the first of them.
    """
    for why, names in idle.items():
        for name in names:
            if getattr(config, name) != getattr(usual, name):
                raise InputError(f"{why} makes no use of {dashed(name)}: leave it away")


def parse_number(text: str | float, name: str = "value") -> float:
    """A finite number typed as ``"0.15"`` or as a fraction ``"8/255"``.

    Raises:
        InputError: not a number, a zero denominator, or not finite.
    """
    parts = str(text).split("/")
    try:
        value = float(parts[0]) if len(parts) == 1 else float(parts[0]) / float(parts[1])
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if len(parts) > 2 or not math.isfinite(value):
        raise InputError(f"{name} must be a number such as 0.15 or 8/255, not {text!r}")
    return value


def parse_eps(text: str | float) -> float:
    """The radius ε of a threat model, in [0, 1] pixel units.

    Raises:
        InputError: not a number, not finite, or not above 0.
    """
    eps = parse_number(text, "eps")
    if eps <= 0:
        raise InputError(f"eps must be above 0, not {text!r}")
    return eps


def parse_linf_eps(text: str | float) -> float:
    """The radius of an L∞ ball as a person types it; 1 and above are levels of 255, not pixels.

    Raises:
        InputError: as `parse_eps`, or 1 and above, which holds every image.
    """
    eps = parse_eps(text)
    if eps >= 1:
        raise InputError(f"eps is in [0, 1] pixels: did you mean {text}/255?")
    return eps


def parse_radius(text: str | float, norm: str) -> float:
    """The radius of a ball as a person types it for a norm.

    Raises:
        InputError: as `parse_linf_eps` and `parse_eps`, or no radius at all.
    """
    if text == "":
        example = "0.15 or 8/255" if norm == "Linf" else "0.5 or 128/255"
        raise InputError(f"say how far an attack may go in {norm}: --eps, e.g. {example}")
    return parse_linf_eps(text) if norm == "Linf" else parse_eps(text)

"""`InputError`: the exception for all settings, files and tensors that a user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input, found before any work started; the message is one line that says what to do.

    Scripts print it without a traceback and exit with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that there is not: the near ones, else all.

    Args:
        kind: what was named, e.g. ``"attack"``.
        name: what was typed.
        known: the names that there are.
    """
    spelled = {one.lower(): one for one in known}
    word = name.lower()
    near = [word] if word in spelled else get_close_matches(word, spelled, n=3)
    if near:
        found = " or ".join(spelled[one] for one in near)
        return InputError(f"unknown {kind} {name!r}: did you mean {found}?")
    return InputError(f"unknown {kind} {name!r}: choose from {', '.join(spelled.values())}")

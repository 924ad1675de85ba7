"""Somebody's own code, named on a command line: ``package.module:factory(1, width=8)``.

The name is read without running anything. Imports no torch.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advgame.errors import InputError

FORM = "package.module:factory or package.module:factory(1, width=8)"
_NAME = re.compile(r"([\w.]+):([\w.]+)(\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class OwnCode:
    """What is to be called, as a name says it.

    Args:
        text: the name.
        module: where it is, e.g. ``"package.module"``.
        attribute: a function or class of the module.
        args: literal arguments.
        settings: literal arguments by name.
    """

    text: str
    module: str
    attribute: str
    args: tuple[Any, ...]
    settings: dict[str, Any]

    def there(self) -> bool:
        """Whether there is a module or package of the first word; nothing is run."""
        top = self.module.split(".")[0]
        try:
            with in_this_folder():
                return top in sys.modules or importlib.util.find_spec(top) is not None
        except (ImportError, ValueError):
            return False

    def find(self) -> None:
        """Refuse a module that is not there, before any work; nothing is run.

        Raises:
            InputError: where it was looked for.
        """
        if not self.there():
            raise InputError(
                f"{self.text}: there is no module {self.module.split('.')[0]!r} in this folder, "
                f"{Path.cwd()}, or installed; start where it lies, or set PYTHONPATH"
            )

    def __call__(self, *first: object, **offered: object) -> object:
        """What it returns; the present folder is looked in first.

        Args:
            first: arguments that come before the typed ones.
            offered: arguments by name; those that it takes and that were not typed are given.

        Raises:
            InputError: no such module or attribute, or it fails.
        """
        try:
            with in_this_folder():
                found = importlib.import_module(self.module)
                for part in self.attribute.split("."):
                    found = getattr(found, part)
                given = dict(self.settings)
                if offered:
                    form = inspect.signature(found)  # type: ignore[arg-type]
                    typed = form.bind_partial(*first, *self.args, **given).arguments
                    takes = form.parameters.keys() - typed
                    given |= {name: one for name, one in offered.items() if name in takes}
                return found(*first, *self.args, **given)  # type: ignore[operator]
        except (Exception, SystemExit) as error:  # a stranger's code may raise anything, or exit
            raise InputError(f"{self.text} failed: {in_words(error)}") from error

    def make(self, kind: type, words: str, *first: object, **offered: object) -> Any:
        """What it returns, which must be of a kind.

        Args:
            kind: the class.
            words: what the class is called, for the message.
            first: arguments that come before the typed ones.
            offered: arguments by name, for who takes them.

        Raises:
            InputError: it fails, or returns something else.
        """
        made = self(*first, **offered)
        if not isinstance(made, kind):
            says = f"the class {made.__name__}" if isinstance(made, type) else type(made).__name__
            raise InputError(f"{self.text} must return {words}, not {says}")
        return made


@contextlib.contextmanager
def in_this_folder() -> Iterator[None]:
    """Within the block the present folder is looked in first."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def is_own_code(text: str) -> bool:
    """Whether a name has the form ``module:factory`` or ``module:factory(...)``."""
    return _NAME.fullmatch(text.strip()) is not None


def own_code(text: str) -> OwnCode:
    """Read a name; nothing is imported or run.

    Args:
        text: ``package.module:factory``, with literal arguments in brackets where it takes any.

    Raises:
        InputError: the name has another form, or arguments that are no literals.
    """
    found = _NAME.fullmatch(text.strip())
    if found is None:
        hint = ""
        if "/" in text or text.split(":")[0].endswith(".py"):
            stem = Path(text.split(":")[0]).stem
            hint = f"; for a file {stem}.py in this folder, {stem}:factory"
        raise InputError(f"expected {FORM}, not {text!r}{hint}")
    module, attribute, call = found.groups()
    if module.endswith(".py"):
        raise InputError(f"expected {FORM}, not {text!r}: name the module without .py")
    try:
        tree = ast.parse(f"f{call or '()'}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("not one call")
        if any(word.arg is None for word in tree.keywords):
            raise ValueError("** is no literal")
        args = tuple(ast.literal_eval(one) for one in tree.args)
        settings = {str(one.arg): ast.literal_eval(one.value) for one in tree.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"the arguments in {text!r} cannot be read: only numbers, quoted words, True, False, "
            "None, and lists, tuples and dicts of them can be typed, e.g. (8, mode='small')"
        ) from error
    return OwnCode(text.strip(), module, attribute, args, settings)


def in_words(error: BaseException) -> str:
    """A stranger's error in one line, with the last place in the stranger's own files."""
    ours = str(Path(__file__).parent)
    places = [
        f", {frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen")) and "importlib" not in frame.filename
    ]
    own = [place for place in places if "site-packages" not in place] or places
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    said += own[-1] if own else ""
    top = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if top in ("envs", "agents"):
        said += f"; the package {top} is advgame's own here, give yours another name"
    return said

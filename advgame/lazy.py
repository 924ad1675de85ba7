"""Packages whose public names are imported when they are first used, so that importing is quick."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def lazily(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Its ``__init__.py`` holds its imports under ``if TYPE_CHECKING:``, as type checkers and editors
    read them. They are read here too, and made one by one when a name is asked for.

    Args:
        package: its ``__name__``.
        file: its ``__file__``.
    """
    top = package.partition(".")[0]
    blocks = [part for part in ast.parse(Path(file).read_text()).body if isinstance(part, ast.If)]
    homes = {
        alias.name: line.module
        for block in blocks
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module and line.module.startswith(top)
        for alias in line.names
    }

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:  # a module of its own
            return import_module(f"{package}.{name}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: list(sys.modules[package].__all__)

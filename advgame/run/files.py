"""Atomic writes of files, and reading JSON that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from advgame.errors import InputError


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file by its new content, or leave the old one untouched.

    The new content is written under a name that nobody can know beforehand, so that two writers do
    not meet and no link that lies there is followed. A link at ``path`` itself is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fchmod(descriptor, 0o666 & ~UMASK)  # mkstemp's files are their owner's alone
            os.fsync(descriptor)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file's content a second name, without its bytes where the disk knows hard links.

    Args:
        source: a file that is only ever replaced, as `write_atomically` does.
        target: a free name.
    """
    try:
        os.link(source, target)
    except OSError:  # a file system without them
        shutil.copyfile(source, target)
        sync(target)


def digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:  # never whole in memory: an updater's state has 4 GB
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


UMASK = _umask()
"""Of this process, read once, before there are threads."""


def read_json(path: Path, repair: str = "restore it, or start anew", kind: type = dict) -> Any:
    """What a JSON file holds; a NaN, which JSON does not have, is None.

    Args:
        path: of the file.
        repair: what to do where it is damaged.
        kind: ``dict`` or ``list``, what it must hold; an empty one counts as damage.

    Raises:
        InputError: missing or damaged file.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise ValueError("it is no file")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=lambda c: None if c == "NaN" else float(c))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): {repair}") from error
    if not isinstance(content, kind) or not content:
        raise InputError(f"{path} cannot be read (damaged, or of something else): {repair}")
    return content

"""Unpack the plan that lies beside this file, and run it: ``python start.py [OPTION ...]``.

`scripts/gpu_plan.py --pack` puts a copy beside the parts that are carried. Where it runs there is
nothing of the project yet: it needs Python's own library only. Options are those of
`scripts/gpu_plan.py`; they win over those that were noted when the plan was packed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Unpack if that was not done yet; then this process becomes `scripts/gpu_plan.py --run`."""
    began, here = time.time(), Path(__file__).resolve().parent
    about = json.loads((here / "parts.json").read_text(encoding="utf-8"))
    root = here / "unpacked"
    if not root.exists():
        unpack(here, about, root)
    elif json.loads((root / "parts.json").read_text(encoding="utf-8")) != about:
        refuse(f"{root} is of another plan: take it away")
    places = [str(root / "site"), str(root / "code")]
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*places, before]))}
    script = str(root / "code" / "scripts" / "gpu_plan.py")
    words = [sys.executable, script, "--run", str(root), "--began", str(began)]
    sys.stdout.flush()
    os.execve(sys.executable, [*words, *about["words"], *sys.argv[1:]], environment)


def unpack(here: Path, about: dict[str, Any], root: Path) -> None:
    """Join the parts and write what they hold, all of it or nothing.

    Args:
        here: the folder of the parts.
        about: ``parts``: name and SHA-256 of each.
        root: the folder that is made.

    Raises:
        SystemExit: 2, a part that is missing or damaged.
    """
    missing = [name for name in about["parts"] if not (here / name).is_file()]
    if missing:
        refuse(f"{', '.join(missing)} of {len(about['parts'])} parts did not arrive in {here}")
    parts = [(here / name).read_bytes() for name in about["parts"]]
    for (name, digest), part in zip(about["parts"].items(), parts, strict=True):
        if hashlib.sha256(part).hexdigest() != digest:
            refuse(f"{here / name} is damaged: carry it again")
    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
        archive.extractall(partial)
    shutil.copy(here / "parts.json", partial)
    partial.rename(root)


def refuse(problem: str) -> NoReturn:
    """Say in a line what is wrong, and end."""
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

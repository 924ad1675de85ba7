"""The folder that is carried: code, packages and CIFAR-10 as one archive, cut into parts.

CIFAR-10's files hold the pixels of 10,000 images, names and labels. The pixels are carried as one
picture of 100 images a row, in lossless WebP, which takes 104 MB for all where the files take 186;
what is around them is carried as it is. What is restored is the files, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from advgame.errors import InputError
from advgame.run.files import digest, read_json, write_atomically
from advgame.run.folder import made_by
from plans import start

ROOT = Path(__file__).resolve().parents[2]
CODE = ("advgame", "agents", "envs", "scripts", "tests", "pyproject.toml")
LACKING = (
    "gymnasium", "farama-notifications", "cloudpickle", "stable-baselines3", "sb3-contrib",
    "tyro", "typeguard", "docstring-parser", "pyautoattack",
)  # fmt: skip
"""Of our dependencies, and of theirs, those that are pure Python and rarely there beside torch."""
LOADED = "advgame/zoo/digits/pgd-at-small_cnn-seed0/"  # `advgame.targets.shipped`
FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
MB = 10**6
_OWN = 64_000  # bytes left for start.py and parts.json
_SHAPE = (3, 32, 32)
_ROW = 100  # images in a row of the picture


def pack(
    folder: Path,
    data: Path | None,
    max_mb: float,
    packages: Sequence[str] = LACKING,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the folder that is carried.

    Args:
        folder: a new one.
        data: where `FOLDER` lies; None carries no images, since digits need none.
        max_mb: largest file of the folder, in 10^6 bytes.
        packages: distributions of this environment that are carried, pure Python all.
        words: options of ``gpu_plan.py --run`` that hold where no others are typed.

    Returns:
        What ``parts.json`` holds.

    Raises:
        InputError: a folder that is there, files or packages that are missing or cannot be carried.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: name a new folder")
    size = int(max_mb * MB) - _OWN
    if size < MB // 10:
        raise InputError(f"--max-mb {max_mb:g} leaves no room for a part: 0.2 is the least")
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in (*_code(), *_packages(packages)):
            archive.write(path, name)
        for name, content in _images(data) if data is not None else ():
            archive.writestr(name, content)
    whole = memory.getvalue()
    cut = [whole[start : start + size] for start in range(0, len(whole), size)]
    names = [f"part{number}of{len(cut)}" for number in range(1, len(cut) + 1)]
    for name, part in zip(names, cut, strict=True):
        write_atomically(folder / name, part)
    digests = [hashlib.sha256(part).hexdigest() for part in cut]
    about = {**made_by(), "words": list(words), "parts": dict(zip(names, digests, strict=True))}
    shutil.copy(start.__file__, folder)
    write_atomically(folder / "parts.json", json.dumps(about, indent=2) + "\n")
    return about


def _code() -> Iterator[tuple[str, Path]]:
    """Name and place of the project's own files."""
    for name in CODE:
        path = ROOT / name
        if not path.exists():
            raise InputError(
                f"{path} is not there: a plan is packed in a clone of the repository, whose tests "
                "it runs"
            )
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            # the zoo's classifiers stay at home, and they grow with every study; the tests load one
            named = str(file.relative_to(ROOT))
            carried = file.suffix != ".safetensors" or LOADED in named
            if file.is_file() and "__pycache__" not in file.parts and carried:
                yield f"code/{named}", file


def _packages(names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Name and place of the files of installed packages, their examples left out."""
    for name in names:
        try:
            files = metadata.files(name) or ()
        except metadata.PackageNotFoundError:
            raise InputError(f"--packages {name}: it is not installed here") from None
        for file in files:
            if {"..", "__pycache__", "examples"} & set(file.parts):  # "..": its commands
                continue
            if file.suffix in (".so", ".pyd", ".dylib"):
                raise InputError(f"--packages {name}: it is not pure Python, and cannot be carried")
            yield f"site/{file}", Path(str(file.locate()))


def _images(data: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of what is carried of CIFAR-10."""
    about = {}
    for name in BATCHES:
        path = data / FOLDER / name
        if not path.is_file():
            raise InputError(f"there is no {path}: --data-dir is the folder that {FOLDER} lies in")
        blob = path.read_bytes()
        place = pixels(blob, path)
        yield f"data/{name}.webp", picture(blob[place])
        yield f"data/{name}.rest", blob[: place.start] + blob[place.stop :]
        about[name] = {"start": place.start, "bytes": place.stop - place.start}
        about[name]["sha256"] = digest(path)
    yield "data/batches.meta", (data / FOLDER / "batches.meta").read_bytes()
    yield "data/about.json", json.dumps(about).encode()


def pixels(blob: bytes, path: Path) -> slice:
    """Where a batch's images stand in its file: a pickle holds them as one string after its length.

    Raises:
        InputError: there are none.
    """
    for found in re.finditer(rb"T(?=(.{4}))", blob[:100_000], re.DOTALL):
        begin, size = found.end() + 4, int.from_bytes(found[1], "little")
        if size % np.prod(_SHAPE) == 0 and len(blob) // 2 < size <= len(blob) - begin:
            return slice(begin, begin + size)
    raise InputError(f"{path} holds no images: restore CIFAR-10's own files")


def picture(values: bytes) -> bytes:
    """Images, (N, 3, 32, 32) as bytes, as a lossless picture with `_ROW` of them side by side."""
    images = np.frombuffer(values, np.uint8).reshape(-1, *_SHAPE)
    rows = -(-len(images) // _ROW)
    whole = np.zeros((rows * _ROW, *_SHAPE), np.uint8)
    whole[: len(images)] = images
    tiles = whole.reshape(rows, _ROW, *_SHAPE).transpose(0, 3, 1, 4, 2)
    memory = io.BytesIO()
    side = Image.fromarray(tiles.reshape(rows * 32, _ROW * 32, 3))
    side.save(memory, "WEBP", lossless=True, method=3, quality=50)
    return memory.getvalue()


def images_of(picture: bytes, size: int) -> bytes:
    """The first ``size`` bytes of the images that a picture was made of."""
    tiles = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    whole = tiles.reshape(-1, 32, _ROW, 32, 3).transpose(0, 2, 4, 1, 3)
    return whole.tobytes()[:size]


def restore(root: Path) -> Path | None:
    """Write CIFAR-10's files from what was carried; returns their ``--data-dir``.

    Args:
        root: the folder that ``start.py`` unpacked; None comes back where it holds no images.

    Raises:
        InputError: they are not what they were.
    """
    source, out = root / "data", root / "images"
    if not source.is_dir():
        return None
    for name, about in read_json(source / "about.json").items():
        middle = images_of((source / f"{name}.webp").read_bytes(), about["bytes"])
        rest = (source / f"{name}.rest").read_bytes()
        blob = rest[: about["start"]] + middle + rest[about["start"] :]
        if hashlib.sha256(blob).hexdigest() != about["sha256"]:
            raise InputError(f"{name} is not what was packed: carry the parts again")
        write_atomically(out / FOLDER / name, blob)
    write_atomically(out / FOLDER / "batches.meta", (source / "batches.meta").read_bytes())
    return out

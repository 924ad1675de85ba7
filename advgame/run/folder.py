"""`RunFolder`: settings, metrics, report and checkpoints of one run; never overwritten."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from advgame.errors import InputError
from advgame.run.files import UMASK, read_json, write_atomically
from advgame.run.program import program

if TYPE_CHECKING:
    import torch

    from advgame.run.checkpoint import Checkpoints

FORMAT = 1
_ABOUT = {"config": dict, "command": str, "versions": dict, "commit": str, "device": str}
_MOST_THREADS = 1024
_PACKAGES = (
    "advgame",
    "torch",
    "torchvision",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "sb3-contrib",
)


def versions() -> dict[str, str]:
    """Python and the packages that a number can depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The source's git commit, with ``+changes`` when the tree differs; "unknown" outside git.

    Results do not count: a study rewrites its own after every cell.

    An installed package may lie within somebody's own repository, whose commit says nothing of it:
    this file must be one of those that the repository tracks.
    """
    source = Path(__file__).resolve()
    root = source.parents[2]
    try:
        _git(root, "ls-files", "--error-unmatch", str(source))
        head = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "-uno", "--", ".", ":(exclude)results")
        return head + ("+changes" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout


def device_name(device: torch.device) -> str:
    """The device in words, e.g. "cpu (x86_64, 2 threads)"."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def cpu_name() -> str:
    """The processor's model where the system tells it, else "unknown"."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(": ")[1] for line in lines if "model name" in line), "unknown")


def command() -> str:
    """The command line, quoted so that a shell takes it."""
    return shlex.join([*program(), *sys.argv[1:]])


def made_by() -> dict[str, Any]:
    """What every results file says of its making: command, commit, versions."""
    return {"command": command(), "commit": commit(), "versions": versions()}


class RunFolder:
    """``config.json``, ``metrics.csv``, ``checkpoints/``, TensorBoard events, report, pictures.

    Args:
        path: an existing folder of a run; `create` makes a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the run's training, in its ``checkpoints`` folder."""
        from advgame.run.checkpoint import Checkpoints

        return Checkpoints(self.path / "checkpoints")

    def weights(self, which: Literal["best", "last"] = "best") -> Path:
        """The file of the weights that a training kept; ``best`` is what validation chose.

        Raises:
            InputError: there is none yet.
        """
        path = self.path / "checkpoints" / f"{which}.safetensors"
        if not path.exists():
            raise InputError(f"{self.path} has no {which} weights of a classifier: is it finished?")
        return path

    @staticmethod
    def new_path(root: Path, name: str) -> Path:
        """Where a new run goes; an empty name becomes the current time, and is free now.

        Raises:
            InputError: the folder exists, or the name is not one of a folder.
        """
        if not name:
            return next(path for path in _by_time(root) if not path.exists())
        path = root / name
        if path.parent != root or path.name == ".." or not path.name.isprintable():
            raise InputError(
                f"the name of a run must be a plain folder name, not {name!r}: choose another "
                "--name, such as run1; where runs lie is --runs-dir"
            )
        if path.exists():
            raise InputError(
                f"{path} exists and is never overwritten: choose another --name, "
                f"or go on with --resume {path}"
            )
        return path

    @staticmethod
    @contextlib.contextmanager
    def claimed(root: Path) -> Iterator[Path]:
        """A new folder of this process alone, called by the current time; removed if left empty.

        For scripts whose files come long after the command: others may begin in the same second.

        Raises:
            OSError: it cannot be made.
        """
        root.mkdir(parents=True, exist_ok=True)
        for path in _by_time(root):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):  # it has results
                path.rmdir()

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        device: str,
        data: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Make the folder ``path`` of a new run.

        Args:
            path: a folder that is not there.
            config: the settings.
            device: in words, see `device_name`.
            data: what `advgame.data.Splits.about` says of its images, where it has some.

        Raises:
            InputError: it exists, or cannot be made.
        """
        import torch

        path = Path(path)
        about = {
            "format": FORMAT,
            "config": dict(config),
            "command": command(),
            "versions": versions(),
            "commit": commit(),
            "device": device,
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            **({} if data is None else {"data": dict(data)}),
        }
        partial: Path | None = None
        try:  # a folder of that name has its settings in it, or does not exist
            path.parent.mkdir(parents=True, exist_ok=True)
            # of this process alone: others may begin a run of the same name in the same second
            partial = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
            partial.chmod(0o777 & ~UMASK)
            write_atomically(partial / "config.json", json.dumps(about, indent=2) + "\n")
            if path.exists():
                raise FileExistsError(path)  # also an empty one: see `claimed`
            partial.rename(path)  # fails where another run was faster: it has a file in it
        except OSError as error:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            if path.exists():
                raise InputError(
                    f"{path} exists, maybe made by another process just now, and is never "
                    "overwritten: choose another --name"
                ) from error
            raise InputError(f"cannot make the run folder {path}: {error}") from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            InputError: not a run folder, or one of another version.
        """
        path = Path(path)
        if not (path / "config.json").exists():
            why = "it has no config.json" if path.exists() else "there is no such folder"
            raise InputError(f"{path} is not a run folder: {why}")
        run = cls(path)
        run.about()
        return run

    def check_links(self) -> None:
        """Refuse a folder through which something outside of it would be written.

        Raises:
            InputError: it holds symbolic links.
        """
        if links := [path for path in self.path.rglob("*") if path.is_symlink()]:
            raise InputError(
                f"{links[0]} is a symbolic link: nothing is written through links that lie in a "
                "run's folder, remove it or move the whole folder to where there is room"
            )

    @contextlib.contextmanager
    def held(self, *, wait: bool = False) -> Iterator[None]:
        """While this process writes the run; released also by a kill.

        Within such a block a further one of the same object is part of it.

        Args:
            wait: until other processes have ended theirs.

        Raises:
            InputError: another process is writing it, or it holds symbolic links.
        """
        if self._lock is not None:
            yield
            return
        self.check_links()
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout as error:
            raise InputError(
                f"{self.path} is being written by another process: let it end, or stop it first"
            ) from error
        except OSError as error:
            raise InputError(
                f"cannot lock {self.path} ({error}): its .lock must be a file that you may write"
            ) from error
        for left in self.path.rglob(".*.partial"):  # half written when a process was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def about(self) -> dict[str, Any]:
        """What ``config.json`` says: settings, command, versions, commit, device.

        Raises:
            InputError: it is damaged, or of another version.
        """
        path = self.path / "config.json"
        content: dict[str, Any] = read_json(path)
        if content.get("format") != FORMAT:
            raise InputError(
                f"{self.path} was written in run format {content.get('format')}, this version "
                f"reads {FORMAT}: resume with the version of advgame that wrote it"
            )
        for name, kind in _ABOUT.items():
            if not isinstance(content.get(name), kind):
                raise InputError(f"{path} cannot be read (no {name}): restore it, or start anew")
        return content

    def note_network(self, network: str) -> None:
        """Note how the network that learns is built, where no setting says it: a run from Python.

        Args:
            network: see `advgame.classifiers.foreign.built_as`.

        Raises:
            InputError: a damaged ``config.json``.
        """
        about = self.about()
        if "model" not in about["config"]:
            self.write_json("config.json", {**about, "network": network})

    def take_conditions(self) -> None:
        """Go on under the conditions that the run began under; tell those that are others.

        Equal bits are promised on the same processor, with the same packages, code and number of
        threads. The threads are the run's own, unless OMP_NUM_THREADS asks for others.

        Raises:
            InputError: a damaged ``config.json``.
        """
        import torch

        about = self.about()
        had: dict[str, Any] = {**about["versions"], **about}
        now = {**versions(), "commit": commit(), "processor": cpu_name()}
        if about["device"].startswith("cuda") and torch.cuda.is_available():
            now["device"] = device_name(torch.device("cuda"))
        notes = [
            f"{name} was {had[name]} and is {value}: numbers may differ from those of one run"
            for name, value in now.items()
            if had.get(name, value) != value  # older runs do not note all
        ]
        mine = torch.get_num_threads()
        threads = about.get("threads", mine)
        if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
            raise InputError(f"{self.path}/config.json says {threads!r} threads: restore it")
        if threads != mine and "OMP_NUM_THREADS" in os.environ:
            notes.append(f"threads were {threads} and are {mine}, as OMP_NUM_THREADS asks for")
        elif threads != mine:
            torch.set_num_threads(threads)
            notes.append(f"threads are {threads}, as they were: OMP_NUM_THREADS={mine} changes it")
        for note in notes:
            print(f"note: {self.path}: {note}", file=sys.stderr)

    def check_data(self, data: Mapping[str, Any] | None) -> None:
        """Refuse to go on with other images than the run began with.

        Args:
            data: what `advgame.data.Splits.about` says of those of now.

        Raises:
            InputError: they differ.
        """
        if data is not None and (other := self.differing(data)):
            raise InputError(
                f"{self.path} began with other images ({other}): restore them, or start a new run"
            )

    def differing(self, data: Mapping[str, Any]) -> str:
        """How images differ from those that the run began with, in words; "" where they do not.

        What was done to them is told in sentences, which may have other words in a later version.

        Args:
            data: what `advgame.data.Splits.about` says of those of now.

        Raises:
            InputError: a damaged ``config.json``.
        """
        had = self.about().get("data")  # older runs note none
        if had is None or (isinstance(had, dict) and _facts(had) == _facts(data)):
            return ""
        return _differing(had, _facts(data))

    def note_frozen(self, digests: Mapping[str, str]) -> None:
        """Note the weights or data that the run works against and does not train.

        Args:
            digests: what each is -> `advgame.classifiers.foreign.weights_digest`.

        Raises:
            InputError: a damaged ``config.json``.
        """
        if digests:
            self.write_json("config.json", {**self.about(), "frozen": dict(digests)})

    def check_frozen(self, digests: Mapping[str, str]) -> None:
        """Refuse to go on against other weights or data than the run began against.

        Args:
            digests: those of now, as `note_frozen` takes them.

        Raises:
            InputError: they differ.
        """
        had = self.about().get("frozen", digests)  # older runs note none
        for name, now in digests.items():
            if not isinstance(had, dict) or had.get(name) != now:
                raise InputError(
                    f"{self.path} began with other contents of its {name}: restore them, or start "
                    "a new run"
                )

    def report(self) -> dict[str, Any]:
        """What ``report.json`` says.

        Raises:
            InputError: it is missing or damaged.
        """
        path = self.path / "report.json"
        again = f"delete it, and --resume {self.path} makes it again"
        content: dict[str, Any] = read_json(path, again)
        return content

    def norm(self) -> str:
        """Of the ball that a classifier's run is about.

        A run made from Python may say it in its report alone; one of before there was L2 says
        nothing.

        Raises:
            InputError: its files are damaged.
        """
        if said := self.about()["config"].get("norm"):
            return str(said)
        reported = self.report() if (self.path / "report.json").is_file() else {}
        return str(reported.get("threat", {}).get("norm", "Linf"))

    def write_json(self, name: str, content: Any) -> None:
        """Write JSON to the file ``name``, whole or not at all."""
        write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write text to the file ``name``, whole or not at all."""
        write_atomically(self.path / name, content)


def _by_time(root: Path) -> Iterator[Path]:
    """Folders that a new one may be: the current time, and that with a number, without an end."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    yield root / now
    for number in itertools.count(2):
        yield root / f"{now}-{number}"


def _facts(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "notes"}


def _differing(had: Any, now: Mapping[str, Any]) -> str:
    """The first fact of two notes of data that differs, in words."""
    if isinstance(had, dict):
        for name in now:
            if name != "sha256" and had.get(name) != now[name]:
                return f"{name} was {had.get(name)} and is {now[name]}"
    return "their pixels, labels or order"


class Metrics:
    """``metrics.csv``: one row per epoch, empty where a column was not measured.

    Args:
        path: the file; rows beyond ``rows`` are dropped, as they belong to lost work.
        rows: number of rows that the resumed checkpoint vouches for.
    """

    def __init__(self, path: Path, rows: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if rows:
            self.rows = self._read(path, rows)
            if len(self.rows) < rows:
                raise InputError(f"{path} has lost rows: it has {len(self.rows)} of {rows}")
        if path.exists():
            self._write()

    @classmethod
    def read(cls, path: Path) -> list[dict[str, float]]:
        """The rows of a file, one or more, without their empty cells.

        Raises:
            InputError: missing or damaged file.
        """
        rows = cls._read(path, None)
        if not rows:
            raise InputError(f"{path} holds no rows")
        return rows

    @staticmethod
    def _read(path: Path, count: int | None) -> list[dict[str, float]]:
        """All rows, or the first ones, whatever comes after them."""
        try:
            if path.exists() and not path.is_file():  # a pipe would wait for ever
                raise ValueError("it is no file")
            *lines, rest = path.read_text(encoding="utf-8").split("\n")
            if rest and count is None:
                raise ValueError("its last line is cut short")
            table = csv.reader(lines if count is None else lines[: count + 1], strict=True)
            header, *rows = [*table] or [[]]
            if len(set(header)) < len(header):
                raise ValueError("a column stands twice in its first line")
            if odd := [n for n, row in enumerate(rows, 2) if len(row) != len(header)]:
                raise ValueError(f"line {odd[0]} does not have the {len(header)} cells of line 1")
            return [
                {name: _number(value) for name, value in zip(header, row, strict=True) if value}
                for row in rows
            ]
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; it may leave columns empty and bring new ones."""
        self.rows.append(dict(row))
        self._write()

    def _write(self) -> None:
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())


def _number(text: str) -> float:
    """Whole numbers stay whole, so that a file read and written again is the same."""
    return int(text) if text.isdigit() else float(text)

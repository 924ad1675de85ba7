"""What scripts that fill a run folder share: settings, early refusals, the folder, resuming.

Nothing here imports torch before a command line is read, so that a typo is answered at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

import tyro

from advgame.data.names import check_dataset, is_own
from advgame.errors import InputError
from advgame.run.accelerators import check_world
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder, command, commit, device_name
from advgame.run.options import (
    CODE,
    aliases,
    as_typed,
    check_types,
    dashed,
    is_positional,
    peek,
    refuse_foreign,
    refuse_idle,
    refuse_unasked,
    typed_again,
    typed_options,
)
from advgame.run.program import prog

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

_FREE = ("resume", "data_dir", "download", "init")  # may differ when a run goes on
_WHY = dict.fromkeys(
    ("devices", "nodes"),
    " (each process has its own share of every batch, and its own chance, in the checkpoints)",
)
"""settings -> why a run goes on with the same"""


class Settings(Protocol):
    """What the settings of every job have."""

    @property
    def runs_dir(self) -> str:
        """The folder that new run folders are made in."""
        ...

    @property
    def name(self) -> str:
        """What the new run folder is called; empty for date and time."""
        ...

    @property
    def resume(self) -> str | None:
        """A folder to go on with."""
        ...


ConfigT = TypeVar("ConfigT", bound=Settings)
MadeT = TypeVar("MadeT")


class Job(ABC, Generic[ConfigT, MadeT]):
    """A script that works in a folder of its own: it refuses early, never overwrites, goes on.

    ``job.main()`` is the script, ``job.run(Config(...))`` the same from Python.
    """

    config: type[ConfigT]
    """the settings; their docstrings are the help"""
    peeked: ClassVar[Mapping[str, str | None]] = {}
    """options that decide what the others' defaults are, with their own defaults"""

    gone: ClassVar[Mapping[str, str]] = {}
    """options of earlier versions -> what to type instead, in words"""

    shared: ClassVar[bool] = False
    """whether several processes may be at one folder at a time"""

    located: ClassVar[tuple[str, ...]] = ()
    """options that say where something lies which the work compares by its content: it may lie
    elsewhere when a run goes on"""

    def defaults(self, **peeked: Any) -> ConfigT:
        """The settings where nothing else is asked for.

        Args:
            peeked: of the options named by ``peeked``; their own defaults where not given.
        """
        return self.config(**peeked)

    def idle(self, config: ConfigT) -> Mapping[str, Collection[str]]:
        """Why -> options that then change nothing, and are refused."""
        return {}

    def check(self, config: ConfigT) -> ConfigT:
        """Refuse settings that cannot work, before any work; returns them, settled.

        Raises:
            InputError: what is wrong, in one line.
        """
        check_types(self.config, vars(config), "settings")
        check_images(config)
        refuse_idle(config, self.usual(config), self.idle(config))
        return config

    def usual(self, config: ConfigT) -> ConfigT:
        """The same settings with all other options at their defaults."""
        return self.defaults(**{name: getattr(config, name) for name in self.peeked})

    def check_resumed(self, config: ConfigT, typed: Collection[str]) -> None:
        """Refuse code that a folder names where it is not typed again: it may be a stranger's.

        Args:
            config: the folder's.
            typed: options that were typed again, with the folder's values.

        Raises:
            InputError: what to type.
        """
        if config.resume is None or (Path(config.resume) / "report.json").exists():
            return  # nothing is run
        for name in CODE:
            if name not in typed:
                refuse_unasked(config.resume, name, getattr(config, name, None))

    def fabric(self, config: ConfigT) -> Fabric:
        """Device and processes; one CPU process unless a job has options for it."""
        from advgame.run.devices import make_fabric

        return make_fabric("cpu", 1, "32-true")

    @abstractmethod
    def build(self, config: ConfigT, fabric: Fabric) -> MadeT:
        """Everything that the work needs.

        Raises:
            InputError: data, models or sizes that will not do; nothing is written yet.
        """

    def settle(
        self, config: ConfigT, fabric: Fabric, typed: Collection[str]
    ) -> tuple[ConfigT, MadeT]:
        """What a new run needs, and its settings, whose defaults may give way to its data.

        Args:
            config: all settings.
            fabric: device and processes.
            typed: options that were typed, which never change.

        Raises:
            InputError: as `build`.
        """
        return config, self.build(config, fabric)

    def place(self, config: ConfigT) -> Path:
        """Where a new run goes.

        Raises:
            InputError: the folder exists, or the name is not one of a folder.
        """
        return RunFolder.new_path(Path(config.runs_dir), config.name)

    def begin(
        self, path: Path, config: ConfigT, device: str, images: Mapping[str, Any] | None
    ) -> None:
        """Make the folder of a new run.

        Raises:
            InputError: it exists, or cannot be made.
        """
        RunFolder.create(path, kept(config), device, images)

    def begin_free(
        self, path: Path, config: ConfigT, device: str, images: Mapping[str, Any] | None
    ) -> Path:
        """`begin`, and where nobody chose a name and another process took it since, the next one.

        Raises:
            InputError: as `begin`.
        """
        while True:
            try:
                self.begin(path, config, device, images)
                return path
            except InputError:
                if config.name or not path.exists():
                    raise
                path = self.place(config)

    def share(self, config: ConfigT, run: RunFolder, made: MadeT) -> None:
        """What processes of a `shared` job do together, before one of them does the work."""

    def check_finished(self, config: ConfigT, run: RunFolder, made: MadeT) -> None:
        """Refuse a finished folder of a `shared` job whose numbers are of other things than now.

        Raises:
            InputError: what has changed.
        """

    def images(self, made: MadeT) -> Mapping[str, Any] | None:
        """What `advgame.data.Splits.about` says of what the job works on, where it is images."""
        return None

    def frozen(self, made: MadeT) -> Mapping[str, nn.Module]:
        """Names of what the job works against and does not train -> the modules.

        They may come from a run that goes on: a resumed job is refused others than it began with.
        """
        return {}

    @abstractmethod
    def work(self, config: ConfigT, run: RunFolder, made: MadeT, *, resume: bool) -> None:
        """Work until ``report.json`` is there; in every process, the first one writes."""

    @abstractmethod
    def told(self, run: RunFolder) -> str:
        """What a finished run found, for the screen."""

    def parse(self, words: Sequence[str]) -> ConfigT:
        """The settings of a command line; `check` refuses those that cannot work.

        Raises:
            InputError: an option that is no more, or of other projects.
        """
        for word in words:
            if (option := word.partition("=")[0]) in self.gone:
                raise InputError(f"there is no {option} any more: {self.gone[option]}")
        refuse_foreign(self.config, words)
        seen: dict[str, Any] = {**self.peeked}
        for name, value in peek(words, aliases(self.config), **self.peeked).items():
            with suppress(InputError, ValueError):  # tyro refuses the word, and shows the choices
                word = as_typed(self.config, name, value)
                check_types(self.config, {name: word}, "")
                seen[name] = word
        return tyro.cli(self.config, default=self.defaults(**seen), args=words, prog=prog())

    def run(self, config: ConfigT, typed: Collection[str] = ()) -> RunFolder:
        """Do the job, or go on with it; returns its folder.

        Args:
            config: all settings.
            typed: those that a resumed run must agree with.

        Raises:
            InputError: settings or data that cannot work, found before any work.
        """
        resume = config.resume is not None
        if config.resume is not None:
            run, config = resume_settings(Path(config.resume), config, typed, self.located)
            path = run.path
            config = replace(cast(Any, config), resume=str(path))
            self.check_resumed(config, typed)
            if (path / "report.json").exists():
                print(f"{self.told(run)}; finished before")
                return run
        else:
            path = self.place(config)
        if not self.shared:
            check_world(getattr(config, "nodes", 1), getattr(config, "devices", 1))
        config = self.check(config)
        fabric = self.fabric(config)
        if resume:
            made = self.build(config, fabric)
        else:
            config, made = self.settle(config, fabric, typed)
        if fabric.global_rank == 0:
            images, frozen = self.images(made), _digests(self.frozen(made))
            if resume:
                RunFolder(path).check_data(images)
                RunFolder(path).check_frozen(frozen)
            else:
                path = self.begin_free(path, config, device_name(fabric.device), images)
                RunFolder(path).note_frozen(frozen)
        run = RunFolder(Path(fabric.broadcast(str(path))))
        if self.shared:
            if (run.path / "report.json").exists():
                self.check_finished(config, run, made)
                print(f"{self.told(run)}; finished before")
                return run
            run.check_links()
            self.share(config, run, made)
        with run.held(wait=self.shared) if fabric.global_rank == 0 else nullcontext():
            if not (run.path / "report.json").exists():  # another process may have finished it
                self.work(config, run, made, resume=resume)
            if fabric.global_rank == 0:
                print(self.told(run))
        return run

    def main(self) -> None:
        """The script: the words of the command line, and errors in one line."""
        run_script(self.from_command_line)

    def from_command_line(self) -> RunFolder | None:
        """Do the job with the options of the command line."""
        return self.run(self.parse(sys.argv[1:]), typed_options(self.config))


def _digests(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> what tells a module's weights from others'."""
    from advgame.classifiers.foreign import weights_digest

    return {name: weights_digest(module) for name, module in modules.items()}


def check_images(config: Any) -> None:
    """Refuse settings whose ``dataset``, where they have one, names no data.

    Raises:
        InputError: what there is, in one line.
    """
    if (dataset := getattr(config, "dataset", None)) is not None:
        check_dataset(
            dataset,
            getattr(config, "data_dir", None),
            download=getattr(config, "download", False),
            image_size=getattr(config, "image_size", None),
        )


def about(config: Any) -> dict[str, Any]:
    """What a learned attacker's file says of its making."""
    return {"command": command(), "commit": commit(), "config": kept(config)}


def kept(config: Any) -> dict[str, Any]:
    """The settings that a folder notes: all, less those that the class names ``unkept``."""
    left_out = getattr(config, "unkept", ())
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def resume_settings(
    path: Path, asked: ConfigT, typed: Collection[str], located: Collection[str] = ()
) -> tuple[RunFolder, ConfigT]:
    """The run at ``path`` and its own settings.

    Args:
        path: a run folder.
        asked: the settings of the command line that resumes.
        typed: the fields that were really asked for; a value that differs from the run's own
            is refused, except for where the data lies.
        located: further fields that may lie elsewhere; of a finished run nothing is compared, so
            that there they may not.

    Raises:
        InputError: not a run of this script and version, or another setting is asked for.
    """
    run = RunFolder.open(path)
    saved = _rebuild(asked, run)
    located = () if (path / "report.json").exists() else located
    for name in typed:
        want, had = getattr(asked, name), getattr(saved, name)
        if want != had and not _may_differ(name, want, had, located):
            raise InputError(
                f"{path} was started with {name}={had}, not {want}{_WHY.get(name, '')}: "
                f"{_advice(type(asked), name, want, had)}, or start a new run"
            )
    if not (path / "report.json").exists():
        import torch

        run.take_conditions()
        if getattr(saved, "devices", 1) > 1:  # Fabric's processes take them from there
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    free = (*_FREE[1:], "dataset", *located)
    moved = {name: getattr(asked, name) for name in free if name in typed}
    if "download" not in moved and hasattr(saved, "download"):
        moved["download"] = False  # a folder may be a stranger's: it fetches nothing unasked
    return run, replace(cast(Any, saved), **moved)


def _may_differ(name: str, want: Any, had: Any, located: Collection[str]) -> bool:
    """Whether a run goes on with another value: what lies there is compared later."""
    if name == "dataset":
        return None not in (want, had) and is_own(want) and is_own(had)
    return name in _FREE or (name in located and bool(want and had))


def _advice(kind: type, name: str, want: Any, had: Any) -> str:
    """What to type where a run was started with another value."""
    if again := typed_again({name: had}):  # code cannot be left away
        return f"type {shlex.join(again)}"
    return f"leave {want if is_positional(kind, name) else dashed(name)} away"


def _rebuild(asked: ConfigT, run: RunFolder) -> ConfigT:
    """The settings that a folder notes, and of the others those of now."""
    kind, stored = type(asked), run.about()["config"]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    if values.keys() != kept(asked).keys():
        raise InputError(
            f"{run.path} holds the settings of another script or version: resume it with those"
        )
    check_types(kind, values, f"{run.path}/config.json")
    return cast(ConfigT, replace(cast(Any, asked), **values))

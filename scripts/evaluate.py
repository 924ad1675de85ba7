"""Measure any classifier's robustness: which images survive which attack.

    python scripts/evaluate.py runs/NAME                              # a run of a training script
    python scripts/evaluate.py w.pth --model wrn-34-10 --dataset cifar10 --data-dir D --eps 8/255
    python scripts/evaluate.py w.pth --model "my_code:Net(width=8)" --dataset digits --eps 0.15
    python scripts/evaluate.py --model my_code:build --dataset digits --eps 0.15  # as it is
    python scripts/evaluate.py runs/NAME --attacks clean,fgsm,pgd20,mim,cw,fea,autoattack --n 1000
    python scripts/evaluate.py runs/NAME --attackers runs/ATTACKER --queries 10
    python scripts/evaluate.py zoo:digits/pgd-at-small_cnn-seed0      # ships with the package
    python scripts/evaluate.py mixture.json                           # one is drawn per query
    python scripts/evaluate.py --list                                 # every attack by name
    python scripts/evaluate.py runs/NAME --n 10000 --jobs 8           # shared by 8 processes
    python scripts/evaluate.py --resume runs/EVALUATION               # go on after a kill, or help

Leaves one folder: report.json, report.md, verdicts.csv (a row per image, a column per attack),
accuracy.png. Every batch and attack is committed as it is done, so that a killed evaluation goes
on to the same verdicts. The same command, started several times with one --name, shares the work,
on any machines that see the folder (docs/cluster.md). Arithmetic is in fp32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from judging.subjects import (
    Config,
    asked_alike,
    check_networks,
    classifier,
    filled_in,
    images,
    judged,
    learned,
    members,
    mixture,
    names,
    refuse_unused,
    threat,
    try_out,
    weights_in_words,
)
from typing_extensions import override

from advgame import evaluation
from advgame.arena.mixture_file import MixtureFile, is_mixture, read_mixture
from advgame.choices import TRANSFER
from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run import job as jobs
from advgame.run.files import read_json
from advgame.run.fitting import fit_attacks, for_few_classes
from advgame.run.folder import RunFolder
from advgame.run.options import typed_again, typed_options
from advgame.run.progress import telling
from advgame.run.workers import check_workers, run_workers
from advgame.zoo.entries import place

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.attacks import Attack
    from advgame.data import ImageSet


class Materials(NamedTuple):
    """Images and what was done to them, classifier, surrogate, further attacks."""

    data: ImageSet
    held_out: ImageSet | None
    notes: tuple[str, ...]
    module: nn.Module
    surrogate: nn.Module | None
    extra: dict[str, Attack]


class Job(jobs.Job[Config, Materials]):
    """An evaluation, in a folder of its own."""

    config, shared, located = Config, True, ("what", "surrogate")
    gone = {  # noqa: RUF012
        "--import": "--model takes package.module:factory of your own",
        "--data-import": "--dataset takes package.module:function, too",
        "--devices": "start the same command once per device, with one --name: they share the work",
    }

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        folders = [place(one).is_dir() for one in members(config)]
        if not any(folders):
            found["a classifier that is no run folder"] = ("weights",)
        elif all(folders) and (not config.surrogate or place(config.surrogate).is_dir()):
            found["a run folder, which knows its own normalisation,"] = ("normalise",)
        if not config.attackers:
            found["an evaluation without --attackers"] = ("queries",)
        if not set(TRANSFER) & {*config.attacks}:
            found["an evaluation without a transfer attack"] = ("surrogate",)
        return found

    def check(self, config: Config) -> Config:
        """Refuse what cannot work, before any work; fill in what a run folder knows."""
        from advgame.seeding import derive_seed

        config = super().check(config)
        check_workers(config, "an evaluation")
        check_networks(config)
        if is_mixture(config.what):
            config = self.settled(config, read_mixture(config.what))
        elif config.what and place(config.what).is_dir():
            config = filled_in(config)
        if not config.dataset:
            raise InputError(
                "say whose test images are attacked: --dataset, e.g. digits or cifar10, or for "
                "your own package.module:function"
            )
        config = replace(config, norm=config.norm or "Linf")
        threat(config)
        if not (config.attacks or config.attackers):
            raise InputError("--attacks names none: say one, e.g. fgsm,pgd20,autoattack")
        if is_mixture(config.what) and not (names(config) or config.attackers):
            raise InputError(
                "a mixture is judged by its members' adversarial examples, too: name an attack "
                "beside clean, e.g. --attacks fgsm"
            )
        evaluation.check_attacks(names(config))
        wants = [name for name in names(config) if name in TRANSFER]
        if wants and not config.surrogate:
            raise InputError(f"{wants[0]} needs --surrogate, another classifier to attack")
        derive_seed(config.seed, "check")
        return config

    def settled(self, config: Config, members: MixtureFile) -> Config:
        """The settings of a mixture; what its run folders know holds of files of weights, too."""
        each = [judged(config, str(path)) for path in members.members]
        refuse_unused(config, each)
        runs = [one for one in each if place(one.what).is_dir()]
        if runs:
            one = asked_alike([self.check(run) for run in runs])
            config = replace(config, dataset=one.dataset, image_size=one.image_size)
            config = replace(config, norm=one.norm, eps=one.eps, own_images=one.own_images)
        for path in members.members:
            if not place(path).is_dir():
                self.check(judged(config, str(path)))
        return config

    @override
    def fabric(self, config: Config) -> Fabric:
        from advgame.run.devices import make_fabric

        return make_fabric(config.accelerator, 1, "32-true")

    def build(self, config: Config, fabric: Fabric) -> Materials:
        """Classifiers, images and attacks, each tried on a few images."""
        notes: list[str] = []
        return self.tried(config, fabric, *images(config, note=notes.append), notes)

    @override
    def settle(
        self, config: Config, fabric: Fabric, typed: Collection[str]
    ) -> tuple[Config, Materials]:
        """The same; the attacks fit the number of classes where they were not typed."""
        notes: list[str] = []
        data, held_out = images(config, note=notes.append)
        config = fit_attacks(config, self.usual(config), typed, data.classes, tell=True)
        return config, self.tried(config, fabric, data, held_out, notes)

    def tried(
        self,
        config: Config,
        fabric: Fabric,
        data: ImageSet,
        held_out: ImageSet | None,
        notes: Sequence[str],
    ) -> Materials:
        """Classifiers and attacks for these images, each tried on a few of them."""
        extra = learned(config)
        threat(config).check_shape(data.shape)
        surrogate, data = None, data.to(fabric.device)
        if config.surrogate:
            surrogate = classifier(config, data, config.surrogate).to(fabric.device)
        members: list[nn.Module]
        module: nn.Module
        if is_mixture(config.what):
            module = mixture(config, data).to(fabric.device)
            members = list(module.members)
        else:
            module = classifier(config, data, config.what).to(fabric.device)
            members = [module]
        seed, asked = config.seed, names(config)
        for one in members:
            evaluation.check_evaluation(
                one, data, threat(config), asked, seed=seed, surrogate=surrogate
            )
            try_out(extra, one, data, seed)
        return Materials(data, held_out, tuple(notes), module, surrogate, extra)

    @override
    def images(self, made: Materials) -> Mapping[str, Any] | None:
        """What was done to images of one's own, and what these are like; None where nothing was."""
        like = {"shape": list(made.data.shape), "classes": made.data.classes}
        return {**like, "notes": list(made.notes)} if made.notes else None

    @override
    def place(self, config: Config) -> Path:
        """As of every job; or the folder of this very evaluation, which this process takes part in.

        One that is started twice by mistake is computed once, and all workers of a cluster are
        started by one command.
        """
        try:
            return super().place(config)
        except InputError:
            path, config = Path(config.runs_dir) / config.name, self.check(config)
            few = replace(config, attacks=for_few_classes(config.attacks))  # as `settle` may do
            if not (_is_of(path, config) or _is_of(path, few)):
                raise
            return path

    @override
    def begin(
        self, path: Path, config: Config, device: str, images: Mapping[str, Any] | None
    ) -> None:
        try:
            super().begin(path, config, device, images)
        except InputError:
            if not _is_of(path, config):
                raise
            RunFolder(path).take_conditions()

    @override
    def check_finished(self, config: Config, run: RunFolder, made: Materials) -> None:
        """Refuse where weights or images behind the same names are others: the numbers are old."""
        from advgame.evaluation.cells import describe, fingerprint, other_attribute

        noted = run.path / "evaluation" / "settings.json"
        if not noted.exists():  # somebody made room: nothing tells what was judged
            return
        had: dict[str, Any] = read_json(noted, f"delete {noted.parent}, and the report counts")
        ball, more = threat(config), [made.surrogate] if made.surrogate is not None else []
        now = fingerprint(made.module, made.data, ball, config.seed, config.batch_size, *more)
        if had.get("format") != now["format"]:  # an earlier version noted them otherwise
            return
        extra = had.get("extra") or {}
        learned = {name: describe(attack) for name, attack in made.extra.items()}
        changed = {
            "weights": had.get("networks") != now["networks"],
            "attributes": other_attribute(had, now) != "",
            "images": had.get("images") != now["images"],
            "learned attackers": learned != {name: extra.get(name) for name in learned},
        }
        if others := [what for what, differ in changed.items() if differ]:
            raise InputError(
                f"{run.path} is finished, and has judged other {' and '.join(others)} than are "
                "there now: choose another --name"
            )

    @override
    def share(self, config: Config, run: RunFolder, made: Materials) -> None:
        """Find the verdicts, together with all processes that are started with this folder."""
        with telling(
            f"{run.path}: {len(made.data)} images, {config.norm} ε = {config.eps}"
        ) as tell:
            if config.jobs:
                tell(f"{config.jobs} workers share the work")
                words = words_of(config, run)
                run_workers(config, Path(__file__), run.path, words, f"--resume {run.path}")
                return
            common: dict[str, Any] = {
                "seed": config.seed,
                "batch_size": config.batch_size,
                "surrogate": made.surrogate,
                "extra": made.extra,
                "folder": run.path / "evaluation",
                "progress": tell,
            }
            ball, asked = threat(config), (*names(config), *made.extra)
            if is_mixture(config.what):
                from advgame.arena import evaluate_mixture
                from advgame.arena.best_response import as_mixture

                evaluate_mixture(as_mixture(made.module), made.data, ball, asked, **common)
            else:
                evaluation.evaluate(made.module, made.data, ball, asked, **common)

    def work(self, config: Config, run: RunFolder, made: Materials, *, resume: bool) -> None:
        """Look for flags, write the report of the verdicts that are there."""
        others = made.held_out
        held_out = None if others is None else others.to(made.data.images.device)
        with telling(f"{run.path}: all verdicts are there") as tell:
            common: dict[str, Any] = {
                "dataset": short_name(str(config.dataset)),
                "weights": weights_in_words(config),
                "tell": tell,
                "extra": made.extra,
                "also": {"what": config.what or config.model, "batch_size": config.batch_size},
                "seed": config.seed,
                "batch_size": config.batch_size,
                "surrogate": made.surrogate,
                "held_out": held_out,
            }
            ball, asked = threat(config), names(config)
            if is_mixture(config.what):
                from advgame.arena import judge_mixture
                from advgame.arena.best_response import as_mixture

                members = [str(path) for path in read_mixture(config.what).members]
                judge_mixture(
                    run, as_mixture(made.module), made.data, ball, asked, names=members, **common
                )
            else:
                evaluation.judge_classifier(run, made.module, made.data, ball, asked, **common)

    @override
    def told(self, run: RunFolder) -> str:
        return f"{evaluation.as_line(run.report())}; more in {run.path}/report.md"

    def from_command_line(self) -> RunFolder | None:
        """Run what was typed, or list the attacks."""
        config = self.parse(sys.argv[1:])
        if config.list_:
            from rich.console import Console
            from rich.table import Table

            table = Table("name", "attack")
            for name, entry in evaluation.ATTACKS.items():
                table.add_row(name, entry.about)
            table.add_row("module:factory", "an attack of your own: docs/extending.md")
            Console().print(table)
            return None
        said = {"what"} if config.what else set()
        return self.run(config, typed_options(Config) | said)


def words_of(config: Config, run: RunFolder) -> list[str]:
    """The command line of a worker: the folder, and what must be typed again where it goes on."""
    asked = jobs.kept(config)
    where = {name: value for name in ("dataset", "data_dir") if (value := asked.pop(name))}
    data = [f"--{name.replace('_', '-')}={value}" for name, value in where.items()]
    return ["--resume", str(run.path), *typed_again(asked), *data]


def _is_of(path: Path, config: Config) -> bool:
    """Whether a folder is that of an evaluation with these settings, wherever its data lies."""
    if not (path / "config.json").exists():
        return False
    had, asked = RunFolder(path).about()["config"], json.loads(json.dumps(jobs.kept(config)))
    free = ("data_dir", "download")
    return bool(had == asked | {name: had[name] for name in free if name in had})


job = Job()

if __name__ == "__main__":
    job.main()

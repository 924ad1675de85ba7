"""What a fresh AttNet reaches, by effort, rate and output scale, against finished classifiers.

    python scripts/study.py attnet runs/A runs/B --name games --out runs/results
    python scripts/study.py attnet runs/A --name plain --data-dir DIR --scales 0 2 --rates 1e-3 1e-4

The classifiers are the last ones of runs of `train_minimax.py`. While a fresh attacker learns from
the training images, this measures on the validation images the classifier's error, f(u, v*(u)) as
a curve over effort, and whether the network lives: saturated outputs, spread within a class,
gradient norm over parameter norm. The errors under PGD-20 and under the game's own attacker, where
the run has one, stand beside it. The distance to the latter is what the attacker gains by the
response, the larger part of the duality gap.

Writes `<out>/attnet-<name>.json`, `.md` and `.png`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from sweeps import names_of
from torch import nn
from typing_extensions import override

from advgame.attacks import Attack, attacked, pgd
from advgame.classifiers.saved import run_classifier
from advgame.data import ImageSet, Splits, load_data
from advgame.errors import InputError
from advgame.health import network_signs
from advgame.losses import cross_entropy
from advgame.run import table
from advgame.run.cells import split_flags
from advgame.run.curves import save_figure, seeds_figure
from advgame.run.files import read_json
from advgame.run.folder import RunFolder
from advgame.run.options import Count, parse_eps, refuse_unasked
from advgame.run.settings import OptionalDataset
from advgame.run.study import Study, StudyConfig
from advgame.run.table import Run, Runs
from advgame.threat import Linf
from agents.attacker_file import NAME
from agents.attacker_network import placed
from agents.attackers import load_network
from agents.attnet import AttNet
from agents.best_response import Ascent, Effort, errors

STEPS = (100, 300, 600, 1500, 3000, 6000)
TITLES = {
    "error": "error under a fresh AttNet, share",
    "spread": "spread within a class, units of ε",
    "saturated": "share of saturated outputs",
    "gradient": "log10 gradient norm / parameter norm",
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Train fresh AttNets on finished classifiers and watch them."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders of train_minimax, of one data set and one ε"""
    name: str = "fresh"
    """of the results: attnet-NAME.json"""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """of Adam"""
    scales: tuple[float, ...] = (2.0,)
    """AttNet's output scales; 0 is a bare tanh"""
    centred: tuple[bool, ...] = (True,)
    """whether AttNet sees each image less its mean"""
    steps: tuple[Count, ...] = STEPS
    """where to look"""
    seeds: Count = 1
    """attackers, seeds 0, 1, … of each"""
    jobs: Count = 1
    extra: str = ""
    """images per step of the attackers, --extra="--batch-size 64" """
    dataset: OptionalDataset = None
    """whose images; the classifiers' own when not given"""
    data_dir: str | None = None
    """data folder (all but digits)"""
    runs_dir: str = ""
    out: str = "results/minimax"


class FreshAttNets(Study[Config]):
    """The study of fresh AttNets: a cell trains one against a finished classifier."""

    about, files, ending = "A fresh AttNet", "attnet-{name}", ("Command: `{command}`.",)
    listed, identity = "curves", ("classifier", "scale", "centre", "rate", "seed")
    parallel = remembers = False

    @cached_property
    def folders(self) -> dict[str, RunFolder]:
        """The runs of the classifiers by name."""
        paths = self.config.runs
        names = names_of(paths, lambda path: Path(path).name)
        return {name: RunFolder.open(Path(path)) for name, path in zip(names, paths, strict=True)}

    @cached_property
    def data(self) -> Splits:
        """The data set that all classifiers were trained on."""
        settings = [run.about()["config"] for run in self.folders.values()]
        if len({(one["dataset"], one["eps"]) for one in settings}) != 1:
            raise InputError("name one run folder or more, all of one data set and one eps")
        first, dataset = settings[0], self.config.dataset
        if dataset is None:
            dataset = first["dataset"]
            refuse_unasked(" ".join(self.config.runs), "dataset", dataset)
        return load_data(
            dataset,
            self.config.data_dir,
            image_size=first.get("image_size"),
            train_n=first["train_n"],
        )

    @override
    def check(self) -> None:
        super().check()
        steps = self.config.steps
        if not steps or list(steps) != sorted(set(steps)):
            raise InputError(f"steps must go up, not be {steps}")

    def cells(self) -> dict[str, dict[str, Any]]:
        """A fresh attacker per classifier, scale, centring, rate and seed."""
        config = self.config
        values = (self.folders, config.scales, config.centred, config.rates, self.seeds())
        found = [dict(zip(self.identity, one, strict=True)) for one in product(*values)]
        return {f"{label(cell)}, seed {cell['seed']}": cell for cell in found}

    def prepare(self, cells: Mapping[str, Any]) -> None:
        """Refuse what would not fit to the curves that are there."""
        _ = self.data, self.effort(1.0)
        steps = list(self.config.steps)
        if any([row["step"] for row in one["rows"]] != steps for one in self.earlier()):
            raise InputError(f"{self.path} has curves with other steps: choose another --name")

    def effort(self, rate: float) -> Effort:
        """Batch size, steps and learning rate of a fresh attacker."""
        usual, words = Effort(lr=rate), split_flags(self.config.extra)
        effort = tyro.cli(Effort, args=words, default=usual)
        if effort != replace(usual, batch_size=effort.batch_size):
            raise InputError("--extra can be --batch-size; see --rates, --steps and --seeds")
        return effort

    @override
    def make(self, cells: Mapping[str, Any]) -> Iterator[Runs]:
        for name, cell in cells.items() if not self.config.finished_only else ():
            lines = self.curve(**cell)
            print(f"{name}: {lines[-1]['error']:.3f}")
            yield [{**cell, "rows": lines}]

    def curve(
        self, classifier: str, scale: float, centre: bool, rate: float, seed: int
    ) -> list[dict[str, float]]:
        """One fresh attacker on its way: what `TITLES` names, at each of ``--steps``."""
        train, held_out = self.data.train, self.data.validation
        model, threat, _ = taken(self.folders[classifier], train)

        def fresh() -> AttNet:
            return AttNet(train.shape, train.classes, scale=scale, centre=centre)

        ascent = Ascent(model, train, threat, fresh, self.effort(rate), seed=seed)
        x, y = held_out.floats(), held_out.labels
        rows, done = list[dict[str, float]](), 0
        for step in self.config.steps:
            network = ascent.run(step - done)
            done = step
            with attacked(model):
                risk = cross_entropy(model(placed(network(x, y), x, threat)), y).mean()
                weights = list(network.parameters())
                slope = torch.autograd.grad(risk, weights)
            gradient, size = (
                torch.stack([p.detach().norm() for p in group]).norm() for group in (slope, weights)
            )
            error = errors(model, network.attack(threat), held_out, seed).mean()
            life = network_signs(network, x, y)
            ratio = float((gradient / size).clamp_min(1e-12).log10())  # 0 is -12
            rows.append({"step": step, "error": float(error), **life, "gradient": ratio})
        return rows

    @cached_property
    def classifiers(self) -> dict[str, Any]:
        """What the classifiers do without a fresh attacker, beside those of earlier curves."""
        earlier = read_json(self.path).get("classifiers", {}) if self.path.exists() else {}
        own = {name: about_classifier(run, self.data) for name, run in self.folders.items()}
        return {**earlier, **own}

    def facts(self) -> dict[str, Any]:
        """The name, and how many images tell the errors."""
        return {"name": self.config.name, "n": len(self.data.validation)}

    @override
    def found(self, runs: Runs) -> dict[str, Any]:
        return {"classifiers": self.classifiers}

    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        """The table for people: a line per attacker."""
        steps = [f"{row['step']} steps" for row in runs[0]["rows"]]
        lines = [
            [
                *(one["classifier"], f"{one['scale']:g}", "yes" if one["centre"] else "no"),
                *(f"{one['rate']:g}", str(one["seed"])),
                *(
                    f"{r['error']:.3f} ({r['spread']:.2f}, {r['saturated']:.2f})"
                    for r in one["rows"]
                ),
            ]
            for one in runs
        ]
        return [
            f"# {self.about} by effort, rate and output scale: {self.config.name}",
            f"Validation error ({about['n']} images) of finished classifiers while an attacker "
            "learns from scratch; in brackets the spread of its perturbations within a class, in "
            "units of ε, and the share of saturated outputs. Scale 0 is a bare tanh.",
            *(
                f"{name} ({one['defence']}): under PGD-20 {one['pgd20']:.3f}"
                + (f", under the game's own attacker {one['own']:.3f}." if "own" in one else ".")
                for name, one in about["classifiers"].items()
            ),
            table.markdown(["classifier", "scale", "centred", "rate", "seed", *steps], lines),
        ]

    @override
    def pictures(self, runs: Runs, about: Mapping[str, Any]) -> None:
        shown: dict[str, list[Any]] = {}
        for one in runs:
            shown.setdefault(label(one), []).append(one["rows"])
        title = f"{self.about} on its way: {self.config.name}"
        figure = seeds_figure(shown, TITLES, title, x="step")
        save_figure(figure, self.path.with_suffix(".png"), pdf=True)


def taken(run: RunFolder, train: ImageSet) -> tuple[nn.Module, Linf, str]:
    """A run's last classifier, the ball, and how it was defended."""
    settings = run.about()["config"]
    model = run_classifier(run, train.shape, train.classes, "last")
    return model, Linf(parse_eps(settings["eps"])), settings["defence"]


def about_classifier(run: RunFolder, data: Splits) -> dict[str, Any]:
    """What a run's classifier does without a fresh attacker, on validation images."""
    model, threat, defence = taken(run, data.train)
    attacks: dict[str, Attack] = {"pgd20": pgd(threat, 20)}
    if (run.path / NAME).exists():
        attacks["own"] = load_network(run.path).attack(threat)
    found = {name: errors(model, one, data.validation) for name, one in attacks.items()}
    return {"defence": defence, **{name: float(one.mean()) for name, one in found.items()}}


def label(one: Run) -> str:
    """What a curve is called: classifier, scale, centring and rate, without the seed."""
    centred = "" if one["centre"] else ", not centred"
    return f"{one['classifier']}, scale {one['scale']:g}{centred}, rate {one['rate']:g}"


main = FreshAttNets.main

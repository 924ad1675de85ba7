"""Sweeps and pictures: how a classifier's robustness depends on the attack, and what it looks like.

    python scripts/sweeps.py runs/A                           # one classifier
    python scripts/sweeps.py runs/pgd runs/grad runs/two      # the first is the baseline
    python scripts/sweeps.py runs/A --attackers runs/two      # pictures of a learned attacker too
    python scripts/sweeps.py w.pth --model my_code:Net --dataset digits --eps 0.15
    python scripts/sweeps.py runs/l2l/digits/{pgd,grad}-seed{0,1,2} --out results/l2l/sweeps

Classifiers whose folders differ in `-seedN` alone are one line with a band. Writes
`<out>/`: sweeps.png (accuracy against ε and against the number of PGD steps, and the differences
to the first classifier; L2L's Fig. 4; steps are ε/4 long, as in reports), examples.png (adversarial
examples side by side, L2L's Fig. 5), landscape.png (loss along the gradient and a random
direction), and sweeps.json with the numbers, diversity and smoothness of the adversarial examples
among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import evaluate
import tyro
from judging import subjects
from torch import nn

from advgame.attacks import Attack
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import check_classifier, write_sweeps
from advgame.own_code import is_own_code
from advgame.run.cli import run_script
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder
from advgame.run.options import Names, Norm
from advgame.run.program import prog
from advgame.run.settings import OptionalDataset
from advgame.threat import Threat
from advgame.zoo.entries import is_zoo


@dataclass(frozen=True)
class Config:
    """Vary the attack on one or more classifiers and draw what happens."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders of classifiers, zoo:NAME, files of weights (with --model, --dataset and --eps),
    or package.module:factory of your own"""
    model: str = ""
    """network of weights files, and of runs whose network is somebody's own code: a built-in name,
    or package.module:factory(…)"""
    normalise: str = ""
    """of weights files that do not hold how images are normalised, as `evaluate` takes it"""
    attackers: Names = ()
    """learned attackers for examples and smoothness, as `evaluate` takes them"""
    queries: int = 10
    """of a learned attacker that was trained for a budget"""
    dataset: OptionalDataset = None
    """whose test images; the run folder's own when not given"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    image_size: int | None = None
    """resize images and crop them to so many pixels square; the run folder's own when not given"""
    norm: Norm | None = None
    """Linf or L2, in any case; the run folder's own when not given"""
    eps: str = ""
    """radius of the ball; the run folder's own when not given"""
    n: int | None = 200
    """test images; None takes all"""
    seed: int = 0
    """of everything random"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    out: str = ""
    """folder of the results, whose files are replaced; runs/<current time> when empty"""


def settled(config: Config) -> list[subjects.Config]:
    """The settings of each classifier's evaluation, with what its run folder knows.

    Raises:
        InputError: no classifiers, or unequal ones.
    """
    if not config.what:
        raise InputError("name the run folders of the classifiers, or files of weights")
    given = {
        field.name: getattr(config, field.name)
        for field in fields(subjects.Config)
        if hasattr(config, field.name) and field.name != "what"
    }
    common = subjects.Config(**given)
    each = [subjects.judged(common, what) for what in config.what]
    subjects.refuse_unused(common, each)
    asked = [evaluate.job.check(one) for one in each]
    subjects.asked_alike(asked)
    return asked


def load(
    config: Config, asked: Sequence[subjects.Config]
) -> tuple[dict[str, nn.Module], ImageSet, Threat, dict[str, Attack]]:
    """Classifiers by name, images, ball, learned attackers.

    Args:
        config: all settings.
        asked: those of each classifier, as `settled` finds them.

    Raises:
        InputError: two of one name, or data or networks that cannot be judged.
    """
    first = asked[0]
    names = names_of(config.what)
    learned, (data, _) = subjects.learned(first), subjects.images(*asked)
    device = make_fabric(config.accelerator, 1, "32-true").device
    data = data.to(device)
    models = {
        name: subjects.classifier(one, data, one.what).to(device)
        for name, one in zip(names, asked, strict=True)
    }
    for model in models.values():
        check_classifier(model, data)
        subjects.try_out(learned, model, data, config.seed)
    return models, data, subjects.threat(first), learned


def names_of(whats: Sequence[str], shorten: Callable[[str], str] | None = None) -> list[str]:
    """What classifiers are called: by all that was typed where a shorter name is of several.

    Args:
        whats: as they were typed.
        shorten: gives the shorter name; `name_of` where there is none.

    Raises:
        InputError: one is named twice.
    """
    short = list(map(shorten or name_of, whats))
    names = [
        what if short.count(name) > 1 else name for what, name in zip(whats, short, strict=True)
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two classifiers are called {twice[0]}: name each once")
    return names


def name_of(what: str) -> str:
    """The short name of a classifier: its folder, its file without ending, or its factory."""
    if is_zoo(what):
        return what
    path = Path(what)
    if is_own_code(what) and not path.exists():
        return what.partition("(")[0].replace(":", ".")
    return path.name if path.is_dir() else path.stem


def results_in(out: str) -> AbstractContextManager[Path]:
    """The folder of results: the one asked for, or one of this process alone."""
    return nullcontext(Path(out)) if out else RunFolder.claimed(Path("runs"))


def main(config: Config) -> None:
    """Measure all classifiers, draw the pictures and write the numbers."""
    out = Path(config.out)
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is no folder: --out names that of the results")
    asked = settled(config)
    models, data, threat, learned = load(config, asked)
    per = float(asked[0].eps.partition("/")[2] or 1)  # of 8/255, which are levels of a byte
    with results_in(config.out) as out:
        write_sweeps(out, models, data, threat, extra=learned, seed=config.seed, per=per)
        print(f"{len(models)} classifiers; {out}/sweeps.png")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config, prog=prog())))

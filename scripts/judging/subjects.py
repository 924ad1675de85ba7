"""What is judged, and on what: the classifiers, images and attacks that an evaluation's words mean.

Nothing here imports torch before a classifier or an image is asked for, so that a typo is answered
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from advgame.arena.mixture_file import is_mixture, read_mixture
from advgame.classifiers.names import check_model, is_built_in, knows, model_of, rebuilt, statistics
from advgame.errors import InputError
from advgame.own_code import is_own_code
from advgame.run.folder import RunFolder
from advgame.run.job import check_images
from advgame.run.options import Count, Names, Norm, check_types, parse_radius, refuse_unasked
from advgame.run.selection import SCORES, criterion
from advgame.run.settings import OptionalDataset
from advgame.run.workers import WorkersConfig
from advgame.zoo.entries import place

if TYPE_CHECKING:
    from torch import nn

    from advgame.arena import ClassifierMixture
    from advgame.attacks import Attack
    from advgame.data import ImageSet, Splits
    from advgame.threat import Threat

USUAL = ("fgsm", "pgd20", "autoattack")
DIGITS: Mapping[str, Any] = {"shape": (1, 8, 8), "classes": 10}
"""What older runs, which note no images, were trained on where their data set is digits."""


@dataclass(frozen=True)
class Config(WorkersConfig):
    """Evaluate a classifier against a list of attacks."""

    what: Annotated[str, tyro.conf.Positional] = ""
    """a run folder, zoo:NAME, or a file of weights (with --model): safetensors, or .pth, .pt of
    torch.save; or a mixture of those, FILE.json with members (paths) and weights"""
    model: str = ""
    """network of a weights file: small_cnn, lean_resnet, resnet18, wrn-28-10, …, or your own,
    package.module:factory(…); the latter alone is judged as the function returns it"""
    normalise: str = ""
    """of weights that were trained on normalised images and do not hold how: a data set, e.g.
    cifar10, or MEANS/DEVIATIONS, e.g. 0.5,0.5,0.5/0.2,0.2,0.2"""
    weights: Literal["best", "last"] = "best"
    """of a run folder: what validation chose, or the last"""
    dataset: OptionalDataset = None
    """whose test images are attacked; a run folder knows its own"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    image_size: Count | None = None
    """resize images and crop them to so many pixels square; a run folder knows its own"""
    norm: Norm | None = None
    """Linf or L2, in any case; a run folder knows its own, Linf elsewhere"""
    eps: str = ""
    """radius of the ball, e.g. 0.15 or 8/255; a run folder knows its own"""
    attacks: Names = USUAL
    """names, with spaces or commas between; --list shows them all; or your own,
    package.module:factory(1, size=0.5), which is called with the ball before the rest"""
    attackers: Names = ()
    """learned attackers: runs of train_attacker, train_l2l, … or their files"""
    queries: Count = 10
    """of a learned attacker: forwards per image"""
    surrogate: str = ""
    """run folder or weights file of another classifier (same --model), for the transfer attacks"""
    n: Count | None = 1000
    """test images; None takes all"""
    batch_size: Count = 500
    """images at a time; AutoAttack's verdicts can depend on it"""
    seed: int = 0
    """of everything random"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    runs_dir: str = "runs"
    """where the evaluation's folder goes"""
    name: str = ""
    """its name; the current time when empty"""
    resume: str | None = None
    """an evaluation's folder to go on with; its own settings are used"""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """print the attacks and end"""
    own_images: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    """whether run folders alone say which images; `filled_in` finds it out"""

    unkept: ClassVar[tuple[str, ...]] = (*WorkersConfig.unkept, "own_images")


def threat(config: Config) -> Threat:
    """The ball in which the classifier is attacked, of `--norm` and `--eps`."""
    from advgame.threat import THREATS

    norm = config.norm or "Linf"  # `evaluate.Job.check` settled it
    return THREATS[norm](parse_radius(config.eps, norm))


def names(config: Config) -> tuple[str, ...]:
    """The attacks asked for; the clean images always come first and need no name."""
    return tuple(name for name in config.attacks if name != "clean")


def weights_in_words(config: Config) -> str:
    """Whose weights were judged, whether their run has ended, and in which network, if in another.

    A run that was trained in ``my:Net(slope=0.1)`` can be judged in ``my:Net(slope=0.2)``.
    """
    runs = [place(one) for one in members(config) if place(one).is_dir()]
    others = [rebuilt(about, config.model) for run in runs if not knows(about := _about(run))]
    return ", ".join([_weights_in_words(config), *dict.fromkeys(filter(None, others))])


def _about(run: Path) -> dict[str, Any]:
    return RunFolder.open(run).about()


def _weights_in_words(config: Config) -> str:
    path = place(config.what)
    if is_mixture(config.what):
        return f"{config.weights} of each member of {config.what}"
    if not (config.what and path.is_dir()):
        return config.what or config.model
    by = f" {SCORES[criterion(RunFolder(path))][1]}" if config.weights == "best" else ""
    ended = "" if (path / "report.json").exists() else ", of an unfinished run"
    return config.weights + by + ended


def learned(config: Config) -> dict[str, Attack]:
    """The learned attackers asked for, by name."""
    from agents.attackers import learned_name, load_attacker

    paths = map(Path, config.attackers)
    made = [(path, load_attacker(path).attack(threat(config), config.queries)) for path in paths]
    found = {learned_name(path, attack): attack for path, attack in made}
    if len(found) < len(made):
        raise InputError("two learned attackers have the same name: rename a file")
    return dict(found)


def try_out(attacks: Mapping[str, Attack], model: nn.Module, data: ImageSet, seed: int) -> None:
    """Run learned attackers on two images, so that one for other images is refused at once."""
    from advgame.attacks import attacked
    from advgame.seeding import stream

    few = data.subset(slice(2))
    for attack in attacks.values():
        with attacked(model):
            attack.run(
                model, few.floats(), few.labels, rng=stream(seed, "trial", few.labels.device)
            )


def images(
    config: Config, *others: Config, note: Callable[[str], object] = lambda sentence: None
) -> tuple[ImageSet, ImageSet | None]:
    """The test images; others of the same data set, where there are any.

    Args:
        config: all settings.
        others: those of further classifiers that are judged on the same images.
        note: told what was done to the images, a sentence each.

    Raises:
        InputError: data that cannot be read, or that have changed since a run was trained on them.
    """
    from advgame.data import load_test

    def check(found: Splits | ImageSet) -> None:
        for one in (config, *others):
            refuse_changed(one, found)

    assert config.dataset is not None  # `evaluate.Job.check` found it
    data, held_out = load_test(
        config.dataset,
        config.data_dir,
        download=config.download,
        image_size=config.image_size,
        check=check,
        note=note,
    )
    return data if config.n is None else data.first(config.n), held_out


def refuse_changed(config: Config, found: Splits | ImageSet) -> None:
    """Refuse other images than runs were trained on, where these runs alone name the data.

    Where we cut the test images off, a few more images in a folder are cut elsewhere, and most of
    the test images are then some that the classifier has learned from.

    Args:
        config: all settings.
        found: all images, training images among them, as they are now.

    Raises:
        InputError: which run, and how they differ.
    """
    runs = [one for one in members(config) if config.own_images and place(one).is_dir()]
    for what in runs:
        if other := changed(what, found):
            raise InputError(
                f"{config.dataset} has changed since {what} was trained on it ({other}): restore "
                f"it, or judge knowingly what is there now, with --dataset {config.dataset}"
            )


def changed(what: str, found: Splits | ImageSet) -> str:
    """How images differ from those that a run was trained on, in words; "" where they do not.

    Args:
        what: the run, as it was typed.
        found: all images, training images among them, as they are now.
    """
    from advgame.data import Splits

    run = RunFolder.open(place(what))
    about = run.about()
    if "data" not in about:  # older runs note no images
        return ""
    if not isinstance(found, Splits):
        return "its training images are gone"
    count = about["config"].get("train_n")
    few = found.train.first(count) if isinstance(count, int) else found.train
    return run.differing(replace(found, train=few).about())


def members(config: Config) -> tuple[str, ...]:
    """The classifiers that are judged: those of a mixture, or the one."""
    if is_mixture(config.what):
        return tuple(map(str, read_mixture(config.what).members))
    return (config.what,) if config.what else ()


def network(config: Config, what: str) -> str:
    """How the network of a run folder is built; see `advgame.classifiers.names.model_of`."""
    files = any(one and not place(one).is_dir() for one in (config.what, config.surrogate))
    return model_of(what, RunFolder.open(place(what)).about(), config.model, other=files)


def classifier(config: Config, data: ImageSet, what: str) -> nn.Module:
    """The network in a run folder, in a weights file, or as somebody's own code returns it.

    Raises:
        InputError: one that cannot be loaded, or that is for other images or classes.
    """
    from advgame.classifiers.saved import (
        load_classifier,
        new_classifier,
        normalised,
        run_classifier,
    )

    path, task = place(what), (data.shape, data.classes)
    if what and path.is_dir():
        run = RunFolder.open(path)
        try:
            module = run_classifier(run, *task, config.weights, network(config, what))
        except InputError as error:
            if (its := task_of(run)) in ("", in_words(*task)):
                raise
            raise InputError(f"{what} is for {its}; these are {in_words(*task)}") from error
        refuse_other_classes(what, run, data.names)
        return module
    made = (
        load_classifier(path, config.model, *task) if what else new_classifier(config.model, *task)
    )
    return normalised(made, config.normalise, data.shape[0]) if config.normalise else made


def refuse_other_classes(what: str, run: RunFolder, names: Sequence[str]) -> None:
    """Refuse images whose classes are called otherwise than those that a run was trained on.

    Classes of a folder are numbered in the order of their names: where one is left out and another
    comes, all between them have other numbers, and the accuracy says nothing.

    Args:
        what: the run, as it was typed.
        run: its folder.
        names: of the classes now; where one side has numbers only, nothing can be compared.

    Raises:
        InputError: the first class that differs.
    """
    noted = (run.about().get("data") or {}).get("names", ())
    for number, (was, now) in enumerate(zip(noted, names, strict=False)):
        if was != now:
            raise InputError(
                f"class {number} was {was} in {what} and is {now} here: it can be judged on images "
                "of the same classes, which have the same names in the same order"
            )


def task_of(run: RunFolder) -> str:
    """What a run's classifier is for, as `in_words` says it; "" where its folder does not say."""
    about = run.about()
    data = about.get("data") or (DIGITS if about["config"].get("dataset") == "digits" else None)
    return in_words(tuple(data["shape"]), data["classes"]) if data else ""


def in_words(shape: tuple[int, ...], classes: int) -> str:
    """Images (C, H, W) and classes in words: 1x8x8 images and 10 classes."""
    return f"{'x'.join(map(str, shape))} images and {classes} classes"


def judged(config: Config, what: str) -> Config:
    """The same settings for one of several classifiers; a run that knows its network needs none.

    Args:
        config: of all of them.
        what: the path of this one, or its code.

    Raises:
        InputError: it is a mixture.
    """
    if is_mixture(what):
        raise InputError(f"{what} is a mixture of classifiers: evaluate.py judges it, alone")
    if is_own_code(what) and not place(what).exists():
        return replace(config, what="", model=what, weights="best")
    if not place(what).is_dir():
        return replace(config, what=what, weights="best")
    if knows(RunFolder.open(place(what)).about()):
        config = replace(config, model="", normalise="")
    return replace(config, what=what)


def refuse_unused(config: Config, asked: Sequence[Config]) -> None:
    """Refuse ``--model`` and ``--normalise`` where every classifier brings its own.

    Args:
        config: of all of them, as it was typed.
        asked: those of each, as `judged` has them.

    Raises:
        InputError: which option changes nothing.
    """
    if config.surrogate and not place(config.surrogate).is_dir():
        return
    for name in ("model", "normalise"):
        typed = getattr(config, name)
        if typed and all(getattr(one, name) != typed for one in asked):
            raise InputError(
                f"classifiers that bring their own network make no use of --{name}: leave it away"
            )


def asked_alike(asked: Sequence[Config]) -> Config:
    """The first of several classifiers' settled settings, if all are of one data set and ball.

    Raises:
        InputError: they are not.
    """
    if len({(one.dataset, one.image_size, threat(one)) for one in asked}) > 1:
        raise InputError(
            "the classifiers are of different data sets, norms or radii: give --dataset, --norm "
            "and --eps"
        )
    return asked[0]


def mixture(config: Config, data: ImageSet) -> ClassifierMixture:
    """The members of a mixture's file, with their weights.

    Raises:
        InputError: a member that cannot be loaded, or that is for other images.
    """
    from advgame.arena import ClassifierMixture

    found = read_mixture(config.what)
    members = [judged(config, str(path)) for path in found.members]
    return ClassifierMixture([classifier(one, data, one.what) for one in members], found.weights)


def check_networks(config: Config) -> None:
    """Refuse, before torch is imported, what names no classifier.

    Raises:
        InputError: what to type.
    """
    if config.model:
        check_model(config.model)
    if not config.what and not config.model:
        raise InputError(
            "say what to evaluate: a run folder or a file of weights, which comes first, or "
            "your own network, --model package.module:factory"
        )
    if not config.what and is_built_in(config.model):
        raise InputError(
            f"{config.model} has no weights of its own: name a file of them first, or a run folder"
        )
    if config.normalise:
        statistics(config.normalise)
    if is_mixture(config.surrogate):
        raise InputError(f"{config.surrogate} is a mixture: a surrogate is one classifier")
    folder = place(config.what) if config.what else Path()
    if config.what and (folder / "mixture.json").exists() and not (folder / "checkpoints").exists():
        raise InputError(
            f"{config.what} holds no classifier but a mixture: evaluate {folder / 'mixture.json'}"
        )
    one_by_one = "" if is_mixture(config.what) else config.what  # members are checked each
    for path in filter(None, (one_by_one, config.surrogate)):
        if not place(path).exists():
            raise InputError(f"{path} does not exist")
        if place(path).is_dir():
            network(config, path)
        elif not config.model:
            raise InputError(
                f"{path} is a file of weights, which needs --model, the network that it "
                "belongs to: a built-in name, or package.module:factory of your own"
            )


def filled_in(config: Config) -> Config:
    """The settings of a run folder's evaluation, with what the folder knows where nothing is typed.

    Raises:
        InputError: the folder is no run, or names no images that can be had.
    """
    folder = RunFolder.open(place(config.what))
    own = folder.about()["config"]
    its = folder.norm()
    norm = config.norm or its
    # a radius of one norm says nothing of the other
    known = str(own.get("eps", "")) if norm == its else ""
    dataset, eps = config.dataset or own.get("dataset"), config.eps or known
    size = config.image_size
    if size is None and not is_own_code(str(dataset)):  # code makes its images itself
        size = own.get("image_size")
    found: dict[str, Any] = {
        "dataset": dataset,
        "image_size": size,
        "norm": norm,
        "eps": eps,
        "own_images": config.own_images or (config.dataset is None and config.image_size is None),
    }
    check_types(Config, found, f"{config.what}/config.json")
    if config.dataset is None:
        refuse_unasked(config.what, "dataset", dataset)
    config = replace(config, **found)
    check_images(config)
    return config

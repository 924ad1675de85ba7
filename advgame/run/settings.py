"""The settings that every training script has, and their checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning_fabric import Fabric
from torch import nn

from advgame.classifiers import Normalise, make_classifier
from advgame.data import STATISTICS, ImageSet
from advgame.errors import InputError
from advgame.evaluation import check_attacks
from advgame.run.devices import check_devices
from advgame.run.loop import TrainingPlan
from advgame.run.options import Names, check_types, parse_linf_eps, refuse_idle
from advgame.run.selection import Select
from advgame.seeding import derive_seed, seeded_init

_DROPS = ("milestones",)
Dataset = Literal["digits", "mnist", "cifar10", "cifar100", "svhn"]


@dataclass(frozen=True)
class RunConfig:
    """Data, defender, training and evaluation of a run; games add their own fields."""

    dataset: Dataset = "digits"
    """digits is embedded; the others need --data-dir"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    download: bool = False
    """let torchvision download what is missing into --data-dir"""
    train_n: int | None = None
    """use only this many training images"""
    model: str = "small_cnn"
    """small_cnn, minimax_cnn, resnet18, preact_resnet18 or wrn-DEPTH-WIDEN, e.g. wrn-34-10"""
    eps: str = "0.15"
    """ε₀, the radius that the classifier is judged at, e.g. 0.15 or 8/255"""
    epochs: int = 40
    """passes over the training images"""
    batch_size: int = 64
    """images per step and process"""
    lr: float = 0.1
    """peak learning rate of the defender"""
    weight_decay: float = 5e-4
    """weight decay of the defender"""
    true_probability: float = 1.0
    """label smoothing: the probability left on the true class; 1 is none"""
    schedule: Literal["onecycle", "multistep", "constant"] = "onecycle"
    """learning-rate schedule, per step"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: shares of the training at which the rate drops tenfold"""
    ema: float | None = None
    """decay of a moving average of the weights, which is then validated and reported"""
    grad_clip: float | None = None
    """largest gradient norm of the defender"""
    validate_every: int = 1
    """epochs between validations"""
    select: Select = "auto"
    """what the best weights score best in on the validation split: clean, robust (PGD-10), own (the
    game's own attacker, where it has one), or auto, which is what the game is for"""
    attacks: Names = ("fgsm", "pgd20", "autoattack")
    """attacks of the final report"""
    eval_n: int | None = None
    """test images in the report; None takes all"""
    seed: int = 0
    """seed of the run"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    devices: int = 1
    """processes, one device each"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto is bf16-mixed on CUDA, 32-true elsewhere"""
    compile: bool = False
    """compile the classifier with torch.compile"""
    runs_dir: str = "runs"
    """where run folders go"""
    name: str = ""
    """name of the run folder; the current time when empty"""
    resume: str | None = None
    """a run folder to go on with; its own settings are used"""


def training_plan(config: RunConfig) -> TrainingPlan:
    """Length and schedule of the training."""
    return TrainingPlan(
        config.epochs,
        config.schedule,
        config.milestones,
        ema=config.ema,
        validate_every=config.validate_every,
    )


def check_run(
    config: RunConfig, usual: RunConfig, idle: Mapping[str, Collection[str]] | None = None
) -> None:
    """Refuse settings that cannot work, before any work.

    Args:
        config: all settings.
        usual: the same with nothing asked for.
        idle: why -> the game's own options that then change nothing.

    Raises:
        InputError: what is wrong, in one line.
    """
    check_types(type(config), vars(config), "settings")
    parse_linf_eps(config.eps)
    if not config.attacks:
        raise InputError("--attacks names none: a report needs one, e.g. fgsm,pgd20,autoattack")
    check_attacks(config.attacks)
    if wants := [name for name in config.attacks if "transfer" in name]:
        raise InputError(
            f"{wants[0]} needs another classifier, which a training has not: leave it away, and "
            "give it to evaluate.py with --surrogate afterwards"
        )
    for name in ("lr", "batch_size", "eval_n", "devices", "grad_clip"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0, not {value}")
    check_devices(config.accelerator, config.devices)
    if config.select not in get_args(Select):
        raise InputError(f"unknown select {config.select!r}: use {', '.join(get_args(Select))}")
    if not 0 <= config.weight_decay < 1:
        raise InputError(f"weight_decay must lie in [0, 1), not {config.weight_decay}")
    derive_seed(config.seed, "check")
    training_plan(config)
    drops = {} if config.schedule == "multistep" else {f"--schedule {config.schedule}": _DROPS}
    refuse_idle(config, usual, {**drops, **(idle or {})})


def make_module(
    config: RunConfig, data: ImageSet, fabric: Fabric, *, normalise: bool = True
) -> nn.Module:
    """The classifier of a run, new, in the memory layout of its device; compiled if asked for.

    Args:
        config: model, data set and seed.
        data: for the images' shape and the classes.
        fabric: for the device.
        normalise: begin with the data set's mean and deviation, where they are known.
    """
    known = normalise and config.dataset in STATISTICS
    with seeded_init(config.seed, "defender"):
        layer = Normalise(*STATISTICS[config.dataset]) if known else None
        module = make_classifier(config.model, data.shape, data.classes, layer)
    if fabric.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    if config.compile:
        module.compile()
    return module

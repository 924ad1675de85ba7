"""ADT: a classifier learns from samples of adversarial distributions that are kept wide.

    python scripts/train_adt.py                                   # digits, EXP, minutes on 2 cores
    python scripts/train_adt.py --method exp-am                   # a generator makes μ and σ
    python scripts/train_adt.py --method imp-am                   # a generator makes the samples
    python scripts/train_adt.py --dataset cifar10 --data-dir DIR  # uses a GPU if there is one
    python scripts/train_adt.py --resume runs/NAME                # go on, to the same bits
    python scripts/evaluate.py runs/A --attackers runs/B          # B's generator on A's classifier

The game is `advgame.games.adt`. A run leaves one folder: settings, TensorBoard events, metrics.csv,
checkpoints, report.json and report.md (AutoAttack on test images, and the worst of --draws samples
of the method's own distribution), diversity.json, curves.png, examples.png, and, where a generator
learned, attacker.safetensors, the generator as it was in the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import override

from advgame.choices import COLOUR, Preset
from advgame.errors import InputError
from advgame.run.defender_job import DefenderJob, ball, tested
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder
from advgame.run.job import about
from advgame.run.options import Count, Positive, Share
from advgame.run.settings import RunConfig, recipes
from agents.settings import Body, GradientScaling

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.attacks import Attack
    from advgame.attacks.distributional import DistributionalAttack
    from advgame.data import ImageSet, Splits
    from advgame.games.training import DefenderTraining, Rules
    from advgame.run.curves import Panels
    from advgame.threat import Threat

Method = Literal["exp", "exp-am", "imp-am"]
DIVERSITY_RUNS, DIVERSITY_IMAGES = 10, 100


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by ADT and report its robustness.

    The defaults shown are those of the --dataset, --method and --preset on the same command line.
    """

    weight_decay: Share = 2e-4
    """weight decay of the defender"""
    preset: Preset = "default"
    """default: ours; repo: the published code's settings and quirks"""
    method: Method = "exp"
    """exp fits a distribution to each image; exp-am and imp-am learn a generator of them"""
    lam: float = 0.01
    """λ, weight of the entropy per dimension (imp-am: of z)"""
    inner_steps: Count = 7
    """exp: steps of the fit"""
    samples: int = 5
    """exp: draws per step"""
    inner_lr: Positive = 0.3
    """exp: Adam's, in units of u where δ = ε·tanh(u)"""
    inner_betas: tuple[float, float] = (0.0, 0.0)
    """exp: Adam's; 0 makes its steps signs"""
    accumulate: bool = False
    """exp: never clear the gradients of earlier steps (repo)"""
    batch_mean: bool = False
    """exp: climb the mean over the batch, whose size then matters to Adam (repo)"""
    generator: Body = "small"
    """exp-am, imp-am: small, or resnet-3blocks of --ngf"""
    ngf: Count = 256
    """width of resnet-3blocks"""
    latent: Count = 16
    """imp-am: dimensions of z"""
    gradient_scaling: GradientScaling = "image"
    """of the gradients that the generator sees: by the image's largest entry, or raw (repo)"""
    threshold: float = 0.5
    """imp-am: NLL of z below which nothing is asked of the generator (repo: 0.9, never binding)"""
    lazy_encoder: bool = False
    """imp-am: below it the encoder stops learning, too (repo)"""
    attacker_lr: Positive = 2e-3
    """Adam's on the generator, constant"""
    encoder_lr: Positive = 2e-3
    """imp-am: Adam's on the encoder, constant"""
    draws: int = 10
    """samples of which the sampler in the report keeps the worst"""


# beside a small classifier; the published encoder takes no image below 20 pixels
_SMALL: dict[str, Any] = {"generator": "small", "attacker_lr": 2e-3, "encoder_lr": 2e-3}

# what a data set changes in Config
RECIPES = recipes(
    colour={
        "generator": "resnet-3blocks",
        "ngf": 48,
        "latent": 64,
        "attacker_lr": 2e-4,
        "encoder_lr": 2e-4,
    },
    svhn={"eps": "4/255"},
    small={**_SMALL, "latent": 16},
)
REPO: dict[str, Any] = {
    "preset": "repo",
    "accumulate": True,
    "batch_mean": True,
    "gradient_scaling": "raw",
    "threshold": 0.9,
    "lazy_encoder": True,
    "attacker_lr": 2e-4,
    "encoder_lr": 2e-4,
    "latent": 64,
}
_REPO_COLOUR: dict[str, Any] = {
    "model": "wrn-28-10",
    "ngf": 256,
    "epochs": 76,
    "batch_size": 64,
    "schedule": "multistep",
    "milestones": (74 / 76,),  # the code drops it before epoch 75, counted from 1
    "lr": 0.1,
    "ema": None,
}


_EXP = ("inner_steps", "samples", "inner_lr", "inner_betas", "accumulate", "batch_mean")
_AM = ("generator", "ngf", "gradient_scaling", "attacker_lr")
_IMP = ("latent", "threshold", "lazy_encoder", "encoder_lr")
OF_OTHERS: dict[Method, tuple[str, ...]] = {
    "exp": _AM + _IMP, "exp-am": _EXP + _IMP, "imp-am": _EXP
}  # fmt: skip


def fitting(config: Config, threat: Threat, draws: int = 1) -> DistributionalAttack:
    """EXP's inner problem, and its sampler."""
    from advgame.attacks.distributional import DistributionalAttack

    return DistributionalAttack(
        threat,
        steps=config.inner_steps,
        samples=config.samples,
        lr=config.inner_lr,
        betas=config.inner_betas,
        lam=config.lam,
        draws=draws,
        accumulate=config.accumulate,
        batch_mean=config.batch_mean,
    )


class Job(DefenderJob[Config, "DefenderTraining"]):
    """The job that trains a classifier by ADT and judges it."""

    config = Config
    peeked = {**DefenderJob.peeked, "preset": "default", "method": "exp"}  # noqa: RUF012
    recipes = RECIPES
    repo = REPO
    repo_recipes = dict.fromkeys(COLOUR, _REPO_COLOUR)
    linf_only = "ADT's distributions are those of ε·tanh(u), which fills an L∞ ball"
    helped = True

    @override
    def on_a_cpu(self) -> Mapping[str, Any]:
        """The colour recipe's generator would ask for eight times what `lean_resnet` does."""
        return {**super().on_a_cpu(), **_SMALL}

    def defaults(self, **peeked: Any) -> Config:
        """IMP-AM's λ is per dimension of z."""
        usual = super().defaults(**peeked)
        return replace(usual, lam=1.0) if usual.method == "imp-am" else usual

    @override
    def title(self, config: Config) -> str:
        return f"ADT, {config.method},"

    def panels(self) -> Panels:
        """Panels of curves.png, with the distribution's entropy."""
        from advgame.games.training import PANELS

        return PANELS | {
            "Entropy": (
                "nats per dimension",
                {"game/entropy": "of δ/ε (IMP-AM: its bound, per dimension of z)"},
            )
        }

    @override
    def check(self, config: Config) -> Config:
        config = super().check(config)
        if math.isnan(config.threshold):
            raise InputError("threshold must be a number: -inf pushes always")
        fitting(config, ball(config), config.draws)
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        width = () if config.generator == "resnet-3blocks" else ("ngf",)
        others = OF_OTHERS[config.method]
        return {f"--method {config.method}": others, f"--generator {config.generator}": width}

    def augmentation(self, config: Config, data: ImageSet) -> dict[str, bool]:
        """The usual augmentation; as published, SVHN's images are not cropped."""
        usual = super().augmentation(config, data)
        whole = config.dataset == "svhn" and config.preset == "repo"
        return {**usual, "crop": False} if whole else usual

    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        """The game, with its generator where there is one."""
        import torch

        from advgame.games.adt import AdtAmortised, AdtExp
        from advgame.seeding import seeded_init
        from agents.adt import ADTNetwork, ExplicitPlayer, ImplicitPlayer, matching_encoder
        from agents.reinforce import averaging

        threat = ball(config)
        if config.method == "exp":
            return AdtExp(fitting(config, threat))
        with seeded_init(config.seed, "attacker"):
            body: Any = (config.generator, config.ngf, config.latent)
            told: Any = (config.gradient_scaling, config.batch_size)
            network = ADTNetwork(data.shape, config.method, *body, *told).to(fabric.device)
            implicit = config.method == "imp-am"
            encoder = matching_encoder(network).to(fabric.device) if implicit else None
        if fabric.device.type == "cuda" or data.shape[0] > 1:  # faster on CPUs, too
            network = network.to(memory_format=torch.channels_last)
        common: Any = {
            "lam": config.lam,
            "lr": config.attacker_lr,
            "synchronise": averaging(fabric),
        }
        if encoder is None:
            return AdtAmortised(threat, ExplicitPlayer(network, **common))
        own: Any = {
            "threshold": config.threshold,
            "lazy": config.lazy_encoder,
            "encoder_lr": config.encoder_lr,
        }
        return AdtAmortised(threat, ImplicitPlayer(network, encoder, **common, **own))

    def own_attacker(self, game: DefenderTraining, threat: Threat) -> Attack:
        """One sample, which is what the defender meets."""
        return sampler(game, threat)

    @override
    def met(self, config: Config, game: DefenderTraining, threat: Threat) -> dict[str, Attack]:
        """The worst of several samples."""
        name = f"learned:{config.method}-worst-of-{config.draws}"
        return {name: sampler(game, threat, config.draws)}

    def judging(
        self, config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Threat
    ) -> Mapping[str, Any]:
        """The sampler and how its samples vary; a generator becomes a file."""
        from advgame.attacks.distributional import Sampler
        from advgame.evaluation.sweeps import variety
        from agents.attacker_file import NAME
        from agents.attacker_network import network_of

        if network := network_of(game.rules):
            network.save(run.path / NAME, about(config))
        few = tested(config, data).subset(slice(DIVERSITY_IMAGES))

        def respond(model: nn.Module) -> dict[str, Attack]:
            met = self.met(config, game, threat)
            (own,) = met.values()
            found = variety(model, few, cast(Sampler, own), threat, DIVERSITY_RUNS, config.seed)
            write_atomically(run.path / "diversity.json", json.dumps(found, indent=1) + "\n")
            return met

        return {"respond": respond}


def sampler(game: DefenderTraining, threat: Threat, draws: int = 1) -> Attack:
    """The worst of so many samples of the game's own distributions, as an attack.

    With one it is what the defender meets: ``eval/own_attacker``.
    """
    from advgame.games.adt import AdtExp
    from agents.attacker_network import NetworkAttack, network_of

    if isinstance(game.rules, AdtExp):
        return replace(game.rules.attack, threat=threat, draws=draws)
    network = network_of(game.rules)
    assert network is not None, "the other methods' generator"
    return NetworkAttack(network, threat, draws)


job = Job()

if __name__ == "__main__":
    job.main()

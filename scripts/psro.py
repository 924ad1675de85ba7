"""PSRO: classifiers and attackers answer each other's mixtures, round after round.

    python scripts/psro.py                                  # digits, 5 rounds, some minutes
    python scripts/psro.py --response scratch --own-share 0 # best responses to the letter
    python scripts/psro.py --response barre                 # BARRE's boosting
    python scripts/psro.py --game committed                 # the attacker has not seen the image
    python scripts/psro.py --resume runs/NAME               # go on after a kill

Each round solves the game of the classifiers and attackers that there are (Lanctot et al. 2017;
double oracle, McMahan et al. 2003). The attacker answers the classifiers' mixture by the worst of
ascent on its expected losses, ARC and its members' own adversarial examples. A further classifier
answers the attackers' mixture: it learns from attacks drawn from it. Both are added. The game is
that of validation images; the report judges the last mixture on test images.

A run keeps every classifier as a run folder (`defenders/`) and every attacker (`attackers/`), and
ends with rounds.md and rounds.json (values, mixtures, what the answers gain, which is a lower bound
on exploitability), payoffs.png, curves.png, errors.npz, report.json, report.md and mixture.json,
which evaluate.py judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from typing_extensions import override

from advgame.choices import TRANSFER
from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run.defender_job import DefenderJob, ball, tested, training_plan
from advgame.run.folder import RunFolder, device_name
from advgame.run.options import Count, Names, Positive, Share
from advgame.run.progress import telling
from advgame.run.selection import Select
from advgame.run.settings import RunConfig, recipes

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.arena import Population
    from advgame.arena.population import Score
    from advgame.data import ImageSet, Splits
    from advgame.games import DefenderTraining, Rules

BOOSTING = ("barre_attack", "osp_steps", "osp_rate", "osp_n")


@dataclass(frozen=True)
class Config(RunConfig):
    """Let classifiers and attackers answer each other's mixtures.

    The defaults shown are those of the --dataset on the same command line.
    """

    rounds: Count = 5
    """each adds a classifier and an attacker; classifier 0 learns by PGD-AT"""
    response: Literal["warm", "scratch", "barre"] = "warm"
    """warm: a classifier begins with the weights of the one before and learns from attacks drawn
    from the attackers' mixture; scratch: it begins anew; barre: it begins with the weights of the
    one before and learns from the attack on all classifiers, itself among them"""
    game: Literal["per-image", "committed"] = "per-image"
    """the attacker picks its strategy after it has seen the image, or mixes before"""
    own_share: Share = 0.5
    """share of a new classifier's images that PGD on itself attacks, beside the attackers' mixture,
    which is made for other classifiers; 0 is PSRO to the letter"""
    attack_steps: Count = 10
    """of the attacks that classifiers learn from: PGD, and ascent on the expected cross-entropy"""
    inner_attacks: Names = ("aa:apgd-ce",)
    """the attacker's answers have these on each classifier that is played, beside ascent on the
    expected losses and ARC"""
    game_n: Count | None = None
    """validation images that the game is about; None takes all"""
    barre_attack: Literal["adaptive", "arc"] = "adaptive"
    """barre: what classifiers learn from, ascent on the expected cross-entropy or ARC"""
    osp_steps: Count = 10
    """barre: attacks of the search for the sampling probabilities"""
    osp_rate: Positive = 1.0
    """barre: length of its first step; step t has a t-th of it"""
    osp_n: Count = 500
    """barre: training images that it looks at"""
    epochs: Count = 20
    """passes over the training images, of each classifier"""
    attacks: Names = ("autoattack-lite",)
    """of the report, on each classifier of the last mixture, beside the attacks on the mixture"""
    select: tyro.conf.Suppress[tyro.conf.Fixed[Select]] = "auto"
    """an answer's weights are selected by what it is paid, others by PGD-10"""


class Job(DefenderJob[Config, "DefenderTraining"]):
    """The rounds, and the report on the last mixture."""

    config = Config
    recipes = recipes(mnist={"epochs": 5, "game_n": 500}, colour={"epochs": 10, "game_n": 500})

    @override
    def check(self, config: Config) -> Config:
        from advgame.evaluation import check_attacks

        config = super().check(config)
        if not config.inner_attacks:
            raise InputError("--inner-attacks names none: say one, e.g. aa:apgd-ce")
        check_attacks(config.inner_attacks)
        if wants := [name for name in config.inner_attacks if name in TRANSFER]:
            raise InputError(f"{wants[0]} needs another classifier: --inner-attacks has none")
        if config.processes > 1:
            raise InputError("the mixtures of all rounds lie on one device: leave --devices away")
        if config.init is not None and config.response == "scratch":
            raise InputError("--response scratch begins every classifier anew: leave --init away")
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        if config.response == "barre":
            return {"--response barre": ("own_share",)}
        return {f"--response {config.response}": BOOSTING}

    @override
    def title(self, config: Config) -> str:
        return f"PSRO, {config.response}"

    @override
    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        """Those of classifier 0."""
        from advgame.attacks import pgd
        from advgame.games import AdversarialTraining

        return AdversarialTraining(ball(config), partial(pgd, steps=config.attack_steps))

    @override
    def build(self, config: Config, fabric: Fabric) -> tuple[DefenderTraining, Splits]:
        from advgame.evaluation import check_evaluation

        first, data = super().build(config, fabric)
        module, attacks = first.learner.module, config.inner_attacks
        check_evaluation(module, data.validation, ball(config), attacks, seed=config.seed)
        return first, data

    @override
    def work(
        self, config: Config, run: RunFolder, made: tuple[DefenderTraining, Splits], *, resume: bool
    ) -> None:
        """Play the rounds, write what they found, judge the last mixture."""
        from advgame.arena import Answering, Population, rounds

        first, data = made
        every = data.validation
        how = Answering(
            boosting=config.response == "barre",
            own_share=config.own_share,
            steps=config.attack_steps,
            attacks=config.inner_attacks,
            boosting_attack=config.barre_attack,
            seed=config.seed,
        )
        population = Population(
            run.path,
            every if config.game_n is None else every.first(config.game_n),
            ball(config),
            partial(self.trained, config, run, first, data),
            how,
            partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True),
        )
        per_image = config.game == "per-image"
        found = rounds.play(run, population, config.rounds, per_image=per_image)
        if config.response == "barre":
            shares, error = population.sampling(
                data.train.first(config.osp_n), config.osp_steps, config.osp_rate
            )
            found["sampling"] = {"shares": rounds.named(shares), "error": error}
        title = f"{self.title(config)} on {short_name(config.dataset)}, seed {config.seed}"
        rounds.write(run, ball(config), title, found)
        self.judge(config, run, population, data, found)

    def trained(
        self,
        config: Config,
        run: RunFolder,
        first: DefenderTraining,
        data: Splits,
        number: int,
        rules: Rules | None,
        score: Score | None,
    ) -> nn.Module:
        """A classifier in a run folder of its own, trained as far as that is not done.

        Args:
            config: all settings.
            run: the folder of all rounds.
            first: the training of classifier 0.
            data: the images.
            number: of the classifier.
            rules: by which it learns; None are those of classifier 0.
            score: what its weights are selected by; None takes PGD-10.
        """
        from advgame.arena.rounds import defender_folder
        from advgame.classifiers.foreign import frozen_copy
        from advgame.evaluation import validator
        from advgame.run.checkpoint import load_weights
        from advgame.run.loop import Trainer, load_best
        from advgame.seeding import derive_seed

        game, fabric = first, first.learner.fabric
        if rules is not None:
            own = replace(config, seed=derive_seed(config.seed, f"defender {number}"))
            game = self.training(own, data, fabric, rules)
        module, path = game.learner.module, defender_folder(run.path, number)
        if not (path / "checkpoints" / "last.safetensors").exists():
            begun, part = path.exists(), RunFolder(path)
            if not begun:
                settings = {**asdict(config), "name": path.name, "classifier": number}
                RunFolder.create(path, settings, device_name(fabric.device), data.about())
            if rules is not None and config.response != "scratch":
                load_weights(module, RunFolder(defender_folder(run.path, number - 1)).weights())
            usual = validator(data.validation, ball(config), config.seed)

            def validate(model: nn.Module) -> dict[str, float]:
                paid = {} if score is None else {"eval/answer": score(model)}
                return {**usual(model), **paid}

            trainer = Trainer(
                *(game, part, training_plan(config), validate),
                select="eval/robust" if score is None else "eval/answer",
                panels=self.panels(),
                part_of=run,
            )
            trainer.fit(resume=begun)
        load_best(RunFolder(path), module)
        return frozen_copy(module, "a classifier that is played stays as it is")

    def judge(
        self,
        config: Config,
        run: RunFolder,
        population: Population,
        data: Splits,
        found: Mapping[str, Any],
    ) -> None:
        """The report on the mixture in mixture.json, under test images."""
        from advgame.arena import ClassifierMixture, judge_mixture, read_mixture

        told = read_mixture(run.path / "mixture.json")
        numbers = [int(path.name) for path in told.members]
        members = [population.classifiers[one] for one in numbers]
        mixture = ClassifierMixture(members, told.weights).to(data.test.images.device)
        with telling(f"{run.path}: the last mixture, {len(members)} classifiers") as tell:
            judge_mixture(
                run,
                mixture,
                tested(config, data),
                ball(config),
                config.attacks,
                names=[f"defenders/{path.name}" for path in told.members],
                dataset=short_name(config.dataset),
                weights="of each classifier the best by validation",
                tell=tell,
                also={"psro": {"last": found["last"], "gap": found["rounds"][-1]["gap"]}},
                seed=config.seed,
                held_out=data.validation,
            )


job = Job()

if __name__ == "__main__":
    job.main()

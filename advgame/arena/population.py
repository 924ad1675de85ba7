"""Classifiers and attackers as the two players of PSRO, kept in a run's folder.

A pure strategy of the attacker is a mixture of classifiers that it was made for: it attacks that
mixture, and gives the example to whichever classifier is drawn. On the images that the game is
about it is the worst of everything that is tried on mixtures (`advgame.arena.judge`), in trainings
ascent on the expected cross-entropy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import nn

from advgame.arena.best_response import ARC, ExpectedLoss, OnMixture, WorstOf
from advgame.arena.judge import plan_mixture
from advgame.arena.matrix_games import Floats
from advgame.arena.mixture import ClassifierMixture
from advgame.arena.oracles import PLAYED
from advgame.arena.sampling import optimal_sampling
from advgame.attacks import Attack, attacked, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.measure import Nothing, counted
from advgame.evaluation.verdicts import adversarial, predict
from advgame.games.answers import Boosting, DrawnAttacks
from advgame.games.training import Rules
from advgame.run.files import read_json, write_atomically
from advgame.seeding import stream
from advgame.threat import Threat

FIRST = 2
"""Attackers before the first round: none, and one that was made for classifier 0."""

Score: TypeAlias = Callable[[nn.Module], float]
"""What an answer is paid, 1 less the defender's cost: it selects a training's weights."""
Train: TypeAlias = Callable[[int, Rules | None, Score | None], nn.Module]
"""(number, rules or None for classifier 0's own, score or None) -> a classifier, also one that was
trained before."""


@dataclass(frozen=True)
class Answering:
    """How both players answer.

    Args:
        boosting: by BARRE's rule, instead of learning from attacks drawn from a mixture.
        own_share: share of a new classifier's images that are attacked by PGD on itself, below 1.
        steps: of the attacks in trainings.
        attacks: names; the attacker has them on each classifier that is played.
        boosting_attack: what BARRE's classifiers learn from.
        seed: of all attacks.
    """

    boosting: bool = False
    own_share: float = 0.5
    steps: int = 10
    attacks: Sequence[str] = ("aa:apgd-ce",)
    boosting_attack: Literal["adaptive", "arc"] = "adaptive"
    seed: int = 0


class Population:
    """`advgame.arena.Players`: what is in the folder is read, what is not is made.

    Classifier 0 and the `FIRST` attackers are made at once.

    Args:
        folder: its ``attackers`` are this object's.
        game: the images that the game is about, on the classifiers' device.
        threat: the ball, with one radius.
        train: makes classifiers.
        how: both players' answers.
        tell: told a line before each attack.
    """

    def __init__(
        self,
        folder: Path,
        game: ImageSet,
        threat: Threat,
        train: Train,
        how: Answering,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.game, self.threat, self.how = folder / "attackers", game, threat, how
        self.train, self.tell = train, tell
        self.classifiers = [train(0, None, None)]
        self.mixtures: list[ClassifierMixture | None] = [None]
        self.examples = [game.floats()]
        alone = ClassifierMixture(self.classifiers, [1.0]).to(game.images.device)
        self._make(1, alone, ExpectedLoss(threat, steps=20))

    def errors(self, row: int, column: int) -> Floats:
        """Where a classifier errs on an attacker's examples, (N,) of 0 and 1."""
        model = self.classifiers[row]
        with attacked(model):
            wrong = predict(model, self.examples[column]) != self.game.labels
        return wrong.cpu().numpy().astype(np.float64)

    def attack(self, column: int, defender: Floats) -> None:
        """The worst of everything on the mixture, image by image."""
        mixture = self.mixture(defender)
        plan = plan_mixture(mixture, self.game, self.threat, self.how.attacks, seed=self.how.seed)
        parts = [
            (f"{name} {part}", attack) for name, suite in plan.items() for part, attack in suite
        ]
        self._make(column, mixture, WorstOf(parts))

    def defend(self, row: int, attacker: Floats) -> None:
        """A classifier that has learned from the attackers' mixture, or by BARRE's rule.

        Of an attacker that picks for each image the mean over the game's images is what others are
        trained on.
        """
        if self.how.boosting:
            rules: Rules = Boosting(self.threat, tuple(self.classifiers), self._boosting_attack())
            found = self.train(row, rules, None)
        else:
            found = self.train(row, self._answer(attacker), partial(self._paid, attacker))
        self.classifiers.append(found)

    def mixture(self, shares: Floats) -> ClassifierMixture:
        """The classifiers that are played, drawn with their shares (D,)."""
        played = np.nonzero(shares > PLAYED)[0].tolist()
        weights = shares[played] / shares[played].sum()
        members = [self.classifiers[one] for one in played]
        return ClassifierMixture(members, weights.tolist()).to(self.game.images.device)

    def sampling(self, data: ImageSet, steps: int, rate: float) -> tuple[Floats, float]:
        """OSP's weights of all classifiers against ARC, and the error that it leaves on ``data``.

        Args:
            data: images that the search looks at.
            steps: attacks.
            rate: see `optimal_sampling`.
        """
        images, seed = data.floats(), self.how.seed

        def errors(weights: Floats) -> Floats:
            mixture = ClassifierMixture(self.classifiers, weights.tolist()).to(images.device)
            with attacked(mixture):
                rng = stream(seed, "sampling", images.device)
                x_adv = adversarial(mixture, images, data.labels, ARC(self.threat), rng)
                wrong = ~mixture.right(x_adv, data.labels)
            return wrong.cpu().numpy().astype(np.float64)

        self.tell(f"sampling probabilities of {len(self.classifiers)} classifiers")
        return optimal_sampling(errors, len(self.classifiers), steps=steps, rate=rate)

    def spent(self, column: int) -> dict[str, Any]:
        """An attacker's ``forwards`` and ``backwards``, of images by classifiers, and seconds."""
        path = self._file(column, "spent.json")
        found: dict[str, Any] = read_json(path, f"delete {path.parent}, and resume")
        return found

    def _answer(self, attacker: Floats) -> DrawnAttacks:
        own, steps = self.how.own_share, self.how.steps
        attacks: list[Callable[[Threat], Attack]] = [partial(pgd, steps=steps)]
        weights = [own]
        # the round's own answer of the attacker is there already, and not in its mixture
        for mixture, share in zip(self.mixtures, attacker.mean(0).tolist(), strict=False):
            attacks.append(partial(_transferred, mixture, steps))
            weights.append((1 - own) * share)
        played = [place for place, share in enumerate(weights) if share > PLAYED]
        whole = sum(weights[one] for one in played)
        return DrawnAttacks(
            self.threat,
            [attacks[one] for one in played],
            [weights[one] / whole for one in played],
        )

    def _boosting_attack(self) -> Callable[[Threat], Attack]:
        steps = self.how.steps
        if self.how.boosting_attack == "arc":
            return lambda threat: ARC(threat, steps)
        return lambda threat: ExpectedLoss(threat, steps=steps)

    def _paid(self, attacker: Floats, model: nn.Module) -> float:
        """What a classifier is right about against a mixture of the attackers."""
        met = self.examples[: attacker.shape[1]]
        with attacked(model):
            right = torch.stack([predict(model, one) == self.game.labels for one in met], 1)
        return float((attacker * right.cpu().numpy()).sum(1).mean())

    def _file(self, column: int, name: str) -> Path:
        return self.folder / f"{column:02d}" / name

    def _make(self, column: int, mixture: ClassifierMixture, attack: Attack) -> None:
        """An attacker's examples of the game's images."""
        path = self._file(column, "examples.safetensors")
        if not self._file(column, "spent.json").exists():
            self.tell(f"attacker {column}, on a mixture of {len(mixture.members)}")
            began, x, y = time.perf_counter(), self.game.floats(), self.game.labels
            rng = stream(self.how.seed, f"attacker {column}", x.device)
            with ExitStack() as held:
                calls = [held.enter_context(counted(one)) for one in mixture.members]
                held.enter_context(attacked(mixture))
                x_adv = adversarial(mixture, x, y, attack, rng)
            write_atomically(path, safetensors.torch.save({"examples": x_adv.cpu().contiguous()}))
            told = {
                "forwards": sum(one.forwards for one in calls),
                "backwards": sum(one.backwards for one in calls),
                "seconds": time.perf_counter() - began,
            }
            write_atomically(self._file(column, "spent.json"), json.dumps(told) + "\n")
        try:
            found = safetensors.torch.load(path.read_bytes())["examples"]
        except (OSError, LookupError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): delete {path.parent}, and resume"
            ) from error
        self.mixtures.append(mixture)
        self.examples.append(found.to(self.game.images.device))


def _transferred(mixture: ClassifierMixture | None, steps: int, threat: Threat) -> Attack:
    """An attacker as classifiers learn from it; None does not attack."""
    return Nothing() if mixture is None else OnMixture(ExpectedLoss(threat, steps=steps), mixture)

"""The cat-and-mouse game: attack the classifier as it is, retrain it, attack it again.

Source: Hamm & Mehra 2018, section 3.1. Classifier 0 learns from clean images. Attack k is made on
classifier k-1; classifier k is retrained on clean images and on attack k's, 1:1, with the true
labels. What is counted are errors, as in the paper: shares of all images that are misclassified.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, attacked
from advgame.classifiers.foreign import check_savable, copying
from advgame.data import Batches, ImageSet, Splits
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import predict
from advgame.evaluation.verdicts import adversarial
from advgame.games.training import PANELS as TRAINING_PANELS
from advgame.run.checkpoint import load_weights, save_weights
from advgame.run.curves import Curves, Panels
from advgame.seeding import PrivateRNG, derive_seed, stream

PANELS: Panels = {
    "Cat and mouse": (
        "test error",
        {
            "game/attack_error": "attack k on classifier k-1",
            "game/defence_error": "attack k on classifier k",
            "game/clean_error": "clean",
        },
    ),
    "Losses": (
        "cross-entropy",
        {"game/adversarial_loss": "on the attack's images", "game/clean_loss": "clean"},
    ),
    "Validation accuracy": TRAINING_PANELS["Validation accuracy"],
}

_PARTS = ("defender", "clean", "adversarial", "chance")  # of the game's state


def classifier_file(folder: Path, number: int) -> Path:
    """The weights of classifier ``number``; 0 has met no attack."""
    return folder / f"classifier_{number:03d}.safetensors"


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of all images (N, C, H, W) that are misclassified, the model in evaluation mode."""
    with attacked(model):
        return float((predict(model, images) != labels).float().mean())


def attack_images(
    number: int, model: nn.Module, attack: Attack, data: ImageSet, seed: int
) -> Tensor:
    """The images (N, C, H, W) of attack ``number``, made on ``model``; number 0 is no attack."""
    if not number:
        return data.floats()
    rng = stream(seed, f"attack {number}", data.images.device)
    with attacked(model):
        return adversarial(model, data.floats(), data.labels, attack, rng)


def errors_under(
    number: int,
    folder: Path,
    rounds: int,
    module: nn.Module,
    attack: Attack,
    data: ImageSet,
    seed: int,
) -> list[float]:
    """A column of table 3: what attack ``number`` does to the classifiers 0 to ``rounds``.

    Args:
        number: of the attack, made on the classifier before it; 0 is no attack.
        folder: holds the classifiers' weights.
        rounds: number of the last classifier.
        module: of their architecture; its weights are overwritten.
        attack: the kind.
        data: test images.
        seed: of the game.
    """
    load_weights(module, classifier_file(folder, max(0, number - 1)))
    images = attack_images(number, module, attack, data, seed)
    found = []
    for one in range(rounds + 1):
        load_weights(module, classifier_file(folder, one))
        found.append(error(module, images, data.labels))
    return found


class CatAndMouse:
    """`advgame.run.loop.Game` over all rounds; an epoch is a round.

    The first ``clean_rounds`` epochs train classifier 0. In round k each batch is half clean and
    half attack k's images, of two streams that each pass through all training images. An attack's
    image is made when its batch comes, on a copy of the classifier as it was when the round began:
    that copy does not move, so it is the image that an attack on the whole set at once would have
    made, up to the draws of an attack that draws.

    Args:
        attack: the kind, any of `advgame.attacks`; it is shown the true labels.
        defender: learns; its device is everybody's.
        data: training, validation and test images on that device.
        folder: where every round's classifier is kept.
        batch_size: images per step, half of them adversarial; even.
        round_steps: steps of the defender per round.
        clean_rounds: rounds without an attack, before the game.
        seed: of order, attacks and dropout.
        fresh: round -> a classifier that knows nothing, with whose weights that round begins, the
            optimiser anew; None goes on from the round before.

    Raises:
        InputError: an odd batch, or no steps.
    """

    def __init__(
        self,
        attack: Attack,
        defender: Defender,
        data: Splits,
        folder: Path,
        *,
        batch_size: int,
        round_steps: int,
        clean_rounds: int,
        seed: int,
        fresh: Callable[[int], nn.Module] | None = None,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise InputError(f"half of a batch is clean: batch_size must be even, not {batch_size}")
        if round_steps < 1 or clean_rounds < 1:
            raise InputError("round_steps and clean_rounds must be 1 or above")
        self.attack, self.defender, self.data, self.folder = attack, defender, data, folder
        self.learner, self.fresh, self.seed = defender, fresh, seed
        self.steps_per_epoch, self.clean_rounds = round_steps, clean_rounds
        half = batch_size // 2
        self.clean = Batches(data.train, half, derive_seed(seed, "clean"))
        self.adversarial = Batches(data.train, half, derive_seed(seed, "adversarial"))
        defender.check_batch(data.train.floats(slice(half)).to(defender.device))
        self.rng = stream(seed, "attack", defender.device)
        self.chance = PrivateRNG(derive_seed(seed, "dropout"), defender.device)
        self.steps = 0
        check_savable(defender.module)
        with copying(defender.module, "the classifiers of former rounds are copies"):
            self._target = copy.deepcopy(defender.module)
        self._target_number = -1  # no classifier's weights yet

    @property
    def round(self) -> int:
        """k, of the step that comes next; 0 and below while classifier 0 learns."""
        return self.steps // self.steps_per_epoch - self.clean_rounds + 1

    def target(self, number: int) -> nn.Module:
        """Classifier ``number`` as its file has it; overwritten by the next call."""
        if number != self._target_number:
            load_weights(self._target, classifier_file(self.folder, number))
            self._target_number = number
        return self._target

    def step(self) -> dict[str, Tensor]:
        """One step of the defender; once attacks are there, half of its batch is attacked."""
        number, half = self.round, self.clean.batch_size
        if number > 0 and self.fresh is not None and self.steps % self.steps_per_epoch == 0:
            self._begin_anew(self.fresh(number))
        with self.chance:
            x, y = self._mixture(number)
            losses = self.defender.backward(x, y)
            self.defender.step()
        self.steps += 1
        if number <= 0:
            return {"game/clean_loss": losses.mean()}
        return {
            "game/clean_loss": losses[:half].mean(),
            "game/adversarial_loss": losses[half:].mean(),
        }

    def _mixture(self, number: int) -> tuple[Tensor, Tensor]:
        """Clean images first, then attack ``number``'s, or more clean ones where there is none."""
        (clean, labels), (x, y) = self.clean.next(), self.adversarial.next()
        if number > 0:
            model = self.target(number - 1)
            with self.defender.under_attack(), attacked(model):
                x = self.attack.run(model, x, y, rng=self.rng, check=False).x_adv
        return torch.cat((clean, x)), torch.cat((labels, y))

    def _begin_anew(self, module: nn.Module) -> None:
        self.defender.module.load_state_dict(module.state_dict())
        self.defender.optimizer.state.clear()

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """Errors of the round that ended, on test and validation images; keeps its classifier."""
        number = self.round - 1  # the last step has moved on
        row: dict[str, float] = {"round": max(0, number)}
        if number >= 0:
            save_weights(self.defender.module, classifier_file(self.folder, number))
        for name, data in (("", self.data.test), ("validation_", self.data.validation)):
            row |= {f"game/{name}{tag}": value for tag, value in self._errors(number, data).items()}
        return row

    def _errors(self, number: int, data: ImageSet) -> dict[str, float]:
        module = self.defender.module
        found = {"clean_error": error(module, data.floats(), data.labels)}
        if number > 0:
            target = self.target(number - 1)
            images = attack_images(number, target, self.attack, data, self.seed)
            found["attack_error"] = error(target, images, data.labels)
            found["defence_error"] = error(module, images, data.labels)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights: the defender's are the loop's, the rounds' are files."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {**parts, "rng": self.rng.get_state(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        self.steps = state["steps"]
        self._target_number = -1

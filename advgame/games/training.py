"""`DefenderTraining`, the game that the training loop plays over a data set, and its `Rules`."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from advgame.attacks import attacked
from advgame.data import Batches, ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep
from advgame.health import constant_sign, gradient_sign, tagged
from advgame.losses import cross_entropy
from advgame.run.curves import Curves, Panels
from advgame.seeding import PrivateRNG, derive_seed, stream

PANELS: Panels = {
    "Losses": (
        "cross-entropy",
        {
            "game/attacker_loss": "what the attacker ascends",
            "game/adversarial_loss": "what the defender descends",
            "game/clean_loss": "clean",
            "game/pairing_loss": "between clean and adversarial outputs",
        },
    ),
    "Perturbation": (
        "in units of ε, and a share",
        {
            "attacker/size": "mean |δ| / ε",
            "attacker/variation": "mean |difference of neighbours| / ε",
            "attacker/on_face": "share of pixels at the face",
        },
    ),
    "Validation accuracy": (
        "share",
        {
            "eval/clean": "clean",
            "eval/robust": "PGD-10 at ε₀",
            "eval/fgsm": "FGSM at ε₀",
            "eval/own_attacker": "its own attacker",
        },
    ),
}


class Rules(ABC):
    """What a batch does in a game between a defender and whoever perturbs its images."""

    @abstractmethod
    def step(
        self, defender: Defender, x: Tensor, y: Tensor, rng: torch.Generator, *, scale: float = 1.0
    ) -> DefenderStep:
        """Play one batch.

        Args:
            defender: learns.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            rng: stream of random starts, on the images' device.
            scale: share of ε that is in use.
        """

    def state_dict(self) -> dict[str, Any]:
        """What learns besides the defender, or is carried over from batch to batch: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        return

    def health(self, defender: Defender, x: Tensor, y: Tensor) -> dict[str, float]:
        """Signs of life by tag, see `advgame.health`, of a player that learns, on one batch.

        Nothing is changed or drawn.
        """
        return {}


def _check_step(rules: Rules, result: object) -> None:
    """Refuse what a step may not return.

    Raises:
        InputError: what it should.
    """
    name = f"{type(rules).__name__}.step"
    if not isinstance(result, DefenderStep):
        raise InputError(
            f"{name} must return a DefenderStep(x_adv, losses, stats), not {type(result).__name__}"
        )
    for tag, value in result.stats.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise InputError(
                f"{name}: stats are tensors of one number each, such as losses.mean(), and "
                f"{tag!r} is a {type(value).__name__}{shape}"
            )


def _check_state(rules: Rules, state: dict[str, Any]) -> None:
    """Refuse a state that could be saved and not be read back: nobody's classes are unpickled.

    Raises:
        InputError: what can be kept.
    """
    memory = io.BytesIO()
    try:
        torch.save(state, memory)
        memory.seek(0)
        torch.load(memory, map_location="cpu", weights_only=True)
    except Exception as error:  # somebody's objects may raise anything
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"a {found[1]}" if found else str(error).splitlines()[0]
        raise InputError(
            f"{type(rules).__name__}.state_dict holds what a resumed run cannot read ({reason}): "
            "keep tensors, numbers, words, and lists and dicts of them"
        ) from error


def defender_health(defender: Defender, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Logits (B, K) of images (B, C, H, W) in evaluation mode, and signs of life by tag."""
    with attacked(defender.module), torch.no_grad(), defender.fabric.autocast():
        logits: Tensor = defender.module(x)
    return logits, tagged("defender", constant_sign(logits) | gradient_sign(defender.optimizer))


class DefenderTraining:
    """`advgame.run.loop.Game` over a data set.

    Args:
        rules: of the game.
        defender: learns; its device is everybody's.
        data: training images.
        batch_size: B, per process.
        seed: of order, augmentation, random starts and dropout.
        crop: random crops.
        flip: random flips; they come with ``crop`` only.
        ramp_steps: over the first steps ε grows linearly to its full size. MNIST at ε = 0.3 needs
            it: at full strength from the start a network ends as a constant. In the unit of
            `Defender.clock`.
    """

    def __init__(
        self,
        rules: Rules,
        defender: Defender,
        data: ImageSet,
        batch_size: int,
        seed: int,
        *,
        crop: bool = False,
        flip: bool = False,
        ramp_steps: int = 0,
    ) -> None:
        if ramp_steps < 0:
            raise InputError(f"ramp_steps must be 0 or above, not {ramp_steps}")
        if not isinstance(rules, Rules):
            raise InputError(
                "rules are an instance of a subclass of advgame.games.Rules, such as "
                f"AdversarialTraining(threat), not {type(rules).__name__}; rules of LAS-AT are "
                "played by agents.las_at.StrategyGame"
            )
        self.rules, self.defender, self.ramp_steps = rules, defender, ramp_steps
        self.learner = defender
        defender.check_batch(data.floats(slice(batch_size)).to(defender.device))
        rank, world = defender.fabric.global_rank, defender.fabric.world_size
        self.batches = Batches(
            data.to(defender.device), batch_size, seed, crop=crop, flip=flip, rank=rank, world=world
        )
        self.steps_per_epoch = len(self.batches)
        self.rng = stream(seed, f"attack{rank}", defender.device)
        self.chance = PrivateRNG(derive_seed(seed, f"dropout{rank}"), defender.device)
        self.steps = 0
        # the last batch, and whether no step needed its clean images: set by every step, so that
        # they are no part of the state
        self._last: tuple[Tensor, Tensor] | None = None
        self._unseen = False
        self._kept = False  # whether the rules' state is known to be one that a checkpoint keeps

    def step(self) -> dict[str, Tensor]:
        """One training step on the next batch, by the rules; its statistics."""
        x, y = self.batches.next()
        made = self.defender.clock(self.steps)
        scale = min(1.0, (made + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        with self.chance:
            result = self.rules.step(self.defender, x, y, self.rng, scale=scale)
        _check_step(self.rules, result)
        self.steps += 1
        self._last, self._unseen = (x, y), "game/clean_loss" not in result.stats
        return result.stats

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """On the last batch: all players' signs of life; the clean loss, if no step needed it."""
        if self._last is None:
            return {}
        x, y = self._last
        logits, found = defender_health(self.defender, x)
        if self._unseen:
            found["game/clean_loss"] = float(cross_entropy(logits, y).mean())
        return found | self.rules.health(self.defender, x, y)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs but the defender's weights."""
        rules = self.rules.state_dict()
        if not self._kept:
            _check_state(self.rules, rules)
            self._kept = True
        return {
            "rules": rules,
            "defender": self.defender.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": self.rng.get_state(),
            "chance": self.chance.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self.rules.load_state_dict(state["rules"])
        self.defender.load_state_dict(state["defender"])
        self.batches.load_state_dict(state["batches"])
        self.rng.set_state(state["rng"])
        self.chance.load_state_dict(state["chance"])
        self.steps = state["steps"]

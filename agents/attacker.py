"""`LearnedAttack`: a trained policy that chooses gradient steps, as an attack like any other.

    attacker = load_attacker(Path("runs/NAME/attacker.safetensors"))
    result = attacker.attack(Linf(8 / 255), queries=10).run(model, x, y, rng=rng)

The file is safetensors: the policy's weights, and in its metadata the menu that the policy
chooses from, the features that it was trained on, and how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, AttackResult, attacked
from advgame.attacks.gradient_steps import GradientStepsState, Menu, Start
from advgame.attacks.queries import attack_through
from advgame.errors import InputError
from advgame.threat import Threat
from agents.attacker_file import filled, read_file, reading, write_file
from agents.policies import FeaturePolicy, sample

FORMAT = "advgame attacker 1"


@dataclass(frozen=True)
class Attacker:
    """A trained policy with its menu, ready for any threat and budget.

    Args:
        policy: over the features of the menu.
        menu: what it chooses from.
        start: where it begins.
        about: how it came about: command, settings.
    """

    policy: FeaturePolicy
    menu: Menu
    start: Start
    about: dict[str, Any]

    def attack(self, threat: Threat, queries: int) -> LearnedAttack:
        """The attack within a threat model and a budget."""
        return LearnedAttack(self, threat, queries)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        metadata = {
            "format": FORMAT,
            "menu": json.dumps(asdict(self.menu)),
            "features": json.dumps(self.menu.feature_names),
            "hidden": str(self.policy.hidden),
            "start": self.start,
            "about": json.dumps(self.about),
        }
        write_file(path, self.policy, metadata)


@dataclass(frozen=True)
class LearnedAttack(Attack):
    """A policy chooses every step of a gradient attack; see `attack_through`.

    Args:
        attacker: the policy, and what it chooses from.
        threat: the ball; its radius may be per image, (B,).
        queries: forwards per image, the first one and the last one included.
        stochastic: draw the choices as in training, instead of taking the likeliest.
        watch: shown the state of the attack after each step.
    """

    attacker: Attacker
    threat: Threat
    queries: int
    stochastic: bool = False
    watch: Callable[[GradientStepsState], None] = lambda state: None

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise InputError(f"queries must be 1 or above, not {self.queries}")

    def _draws(self) -> str | None:
        return "drawing the choices" if self.stochastic else None

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        attacker, policy = self.attacker, self.attacker.policy.to(x.device).eval()
        budget = torch.full((len(x),), self.queries, device=x.device)

        def step(state: GradientStepsState) -> None:
            logits = policy(state.features())
            if self.stochastic:
                assert rng is not None
                actions = sample(logits, rng)
            else:
                actions = torch.stack([one.argmax(1) for one in logits], 1)
            state.step(actions)
            self.watch(state)

        with attacked(model), torch.no_grad():
            state = GradientStepsState(
                *(model, self.threat, attacker.menu, x, y, budget),
                start=attacker.start,
                rng=rng,
                check=check,
            )
            x_adv, fooled = attack_through(state, self.queries, step)
        return AttackResult(x_adv, None, fooled, state.forwards, state.backwards)


def load_attacker(path: Path) -> Attacker:
    """Read what `Attacker.save` wrote; a run folder stands for its ``attacker.safetensors``.

    Raises:
        InputError: missing or damaged file, one that holds something else, or one that was
            trained on other features than this version's.
    """
    metadata, weights = read_file(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no attacker: it says {metadata.get('format')!r}")
    with reading(path):
        lists = json.loads(metadata["menu"])
        menu = Menu(**{name: tuple(values) for name, values in lists.items()})
        names, start = tuple(json.loads(metadata["features"])), metadata["start"]
        about, hidden = json.loads(metadata["about"]), int(metadata["hidden"])
        if start not in get_args(Start):
            raise InputError(f"it begins at {start!r}")
    if names != menu.feature_names:
        raise InputError(f"{path} was trained on other features: train it again with this version")
    with reading(path):
        policy = filled(lambda: FeaturePolicy(len(names), menu.sizes, hidden), weights)
    return Attacker(policy.requires_grad_(False), menu, cast(Start, start), about)

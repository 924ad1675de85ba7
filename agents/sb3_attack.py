"""`SB3Attack`: an agent that Stable-Baselines3 trained on an attack environment, as an attack.

    attack = SB3Attack(Linf(0.15), "ppo.zip", queries=10)
    result = attack.run(model, x, y, rng=rng)

A zip file of SB3's holds pickles, which run code when they are opened.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from torch import Tensor, nn

from advgame.attacks import Attack, AttackResult, attacked
from advgame.attacks.gradient_steps import GradientStepsState, Menu, Start
from advgame.attacks.patches import PatchAttackState, Patches
from advgame.attacks.queries import AttackState, attack_through
from advgame.errors import InputError
from advgame.own_code import in_words
from advgame.threat import Threat
from envs.actions import StepBox, unflatten


class Predicts(Protocol):
    """What an agent must have; all policies and algorithms of SB3 do."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]

    def predict(self, observation: Any, *, deterministic: bool) -> tuple[Any, Any]:
        """Actions of a batch of NumPy observations, and a state, None without a memory."""
        ...


class SB3Attack(Attack):
    """An agent of ``advgame/Attack-v0`` or ``advgame/BlackBoxAttack-v0`` chooses every query.

    It takes its likeliest action. The rest is as in `attack_through`.

    Args:
        threat: the ball; its radius may be per image, (B,).
        agent: the file that ``save`` of SB3 or sb3-contrib wrote, opened by running its pickles; a
            loaded algorithm; or an object of yours with ``predict``, ``observation_space`` and
            ``action_space``, for an agent that sees normalised observations, say.
        queries: forwards per image, the first one and the last one included.
        choices: the `Menu` or `Patches` of its environment where they were not the default ones.
        start: of ``Attack-v0``.

    Raises:
        InputError: a file that holds no agent; when it attacks, an agent with other spaces, of
            other images, or with a memory.
    """

    def __init__(
        self,
        threat: Threat,
        agent: str | os.PathLike[str] | Predicts,
        queries: int = 10,
        *,
        choices: Menu | Patches | None = None,
        start: Start = "clean",
    ) -> None:
        if queries < 1:
            raise InputError(f"queries must be 1 or above, not {queries}")
        if isinstance(agent, str | os.PathLike):
            agent = _policy(Path(agent))
        elif isinstance(agent, BaseAlgorithm):
            agent = cast(Predicts, agent.policy)
        self.threat, self.agent, self.queries = threat, agent, queries
        self.choices, self.start = choices, start

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        choices = self._choices(cast(tuple[int, int, int], tuple(x.shape[1:])))
        budget = torch.full((len(x),), self.queries, device=x.device)
        with attacked(model), torch.no_grad():
            state: GradientStepsState | PatchAttackState
            if isinstance(choices, Menu):
                state = GradientStepsState(
                    *(model, self.threat, choices, x, y, budget),
                    start=self.start,
                    rng=rng,
                    check=check,
                )
            else:
                state = PatchAttackState(model, self.threat, choices, x, y, budget)
            x_adv, fooled = attack_through(state, self.queries, self._step)
        return AttackResult(x_adv, None, fooled, state.forwards, state.backwards)

    def _choices(self, shape: tuple[int, int, int]) -> Menu | Patches:
        """What the agent chooses from, found by its spaces, for images (C, H, W)."""
        sees, does = self.agent.observation_space, self.agent.action_space
        features = sees
        if isinstance(sees, spaces.Dict) and "features" in sees.spaces:
            features = sees["features"]
            if "clean" in sees.spaces and sees["clean"].shape != shape:
                raise InputError(
                    f"the agent sees images of {sees['clean'].shape}; these are of {shape}"
                )
        for choices in (Menu(), Patches(shape)) if self.choices is None else (self.choices,):
            known: list[spaces.Space[Any]] = [
                spaces.MultiDiscrete(list(choices.sizes)),
                spaces.Discrete(int(np.prod(choices.sizes))),
            ]
            if isinstance(choices, Menu) and isinstance(does, spaces.Box):
                known.append(StepBox(choices).space)
            if features.shape == (len(choices.feature_names),) and does in known:
                return choices
        whose = "advgame/Attack-v0's or advgame/BlackBoxAttack-v0's of these images"
        raise InputError(
            f"the agent sees {sees} and acts in {does}, which are not "
            f"{whose if self.choices is None else 'those of its choices'}: an agent that was "
            "trained with menu= or patches= needs the same as choices="
        )

    def _step(self, state: AttackState) -> None:
        seen: Any = state.features().cpu().numpy()
        if isinstance(self.agent.observation_space, spaces.Dict):
            images = {"clean": state.x, "adversarial": state.x_adv}
            shown = {name: one.float().cpu().numpy() for name, one in images.items()}
            seen = {"features": seen, **shown}
        chosen, memory = self.agent.predict(seen, deterministic=True)
        if memory is not None:
            raise InputError("an agent with a memory (a recurrent policy) cannot be an attack")
        actions = torch.as_tensor(chosen, device=state.y.device)
        if isinstance(self.agent.action_space, spaces.Box):
            box = StepBox(cast(Menu, state.choices))
            cast(GradientStepsState, state).take(*box.decode(box.read(actions)))
            return
        if isinstance(self.agent.action_space, spaces.Discrete):
            actions = unflatten(actions, state.choices.sizes)
        state.choices.check(actions)
        state.step(actions.long())


def _policy(path: Path) -> BasePolicy:
    """The policy alone of an algorithm's zip file, whichever algorithm it was, on the CPU."""
    try:
        data, parameters, _ = load_from_zip_file(path, device="cpu")
        assert data is not None, "it has no settings"
        kind, settings = data["policy_class"], dict(data["policy_kwargs"])
        settings.pop("device", None)
        if "use_sde" in inspect.signature(kind).parameters:
            settings.setdefault("use_sde", data["use_sde"])
        policy: BasePolicy = kind(
            data["observation_space"], data["action_space"], lambda _: 0.0, **settings
        )
        policy.load_state_dict(cast(dict[str, Tensor], parameters["policy"]))
    except Exception as error:  # pickles may raise anything
        raise InputError(
            f"{path} holds no agent that this version of Stable-Baselines3 can load "
            f"({in_words(error)})"
        ) from error
    return policy.to("cpu")

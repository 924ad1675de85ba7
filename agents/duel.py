"""Players of the duel, the game of two of them for the training loop, and who beats whom."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from lightning_fabric import Fabric
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn
from torch.distributions import Categorical
from typing_extensions import override

from advgame.choices import Order
from advgame.errors import InputError
from advgame.games.duel import LESSON, Lesson, nearest
from advgame.games.strategy import CHOICES, StrategySpace, strategy_space
from advgame.health import gradient_sign, tagged
from advgame.run.checkpoint import step_of
from advgame.run.curves import Curves, Panels
from advgame.run.folder import RunFolder
from advgame.seeding import derive_seed, stream
from advgame.statistics import spread
from advgame.threat import Threat
from agents.attacker_file import filled, read_file, reading, write_file
from agents.policies import FeaturePolicy, StrategyPolicy, entropy_stats, sample
from agents.sb3 import SB3Learner, as_feature_policy, set_up
from envs.duel import AGENTS, FEATURES, DuelEnv, Seen

Array = np.ndarray[Any, Any]
NAMES = {
    "attacker": CHOICES[:3],
    "defender": tuple("clean_weight" if name == "clean" else name for name in LESSON),
}
"""What each side chooses."""

FILES = {side: f"{side}_policy.safetensors" for side in AGENTS}
"""Of a run folder, the policies that learned."""

PANELS: Panels = {
    "Standing at a match's end": (
        "share of held-out images",
        {"game/final_robust": "PGD-10 at ε₀", "game/final_clean": "clean"},
    ),
    "Return": ("of the defender per match", {"game/return": "last standing less the first"}),
    "Gain over the fixed player": (
        "standing at the end, against the fixed other side",
        {"eval/attacker_gain": "attacker", "eval/defender_gain": "defender"},
    ),
    "Choices": (
        "place in the list",
        {f"strategy/place_{name}": name for side in AGENTS for name in NAMES[side]},
    ),
    "Entropy": (
        "share of the largest",
        {f"health/{side}/entropy": side for side in AGENTS},
    ),
}


class Player(ABC):
    """One side of several duels that are played step by step side by side."""

    @abstractmethod
    def act(self, seen: Sequence[Seen]) -> Array:
        """The actions (n, …) for what each of n duels shows this side."""


class Fixed(Player):
    """The same action at every step.

    Args:
        action: indices.
    """

    def __init__(self, action: Sequence[int]) -> None:
        self.action = np.array(action)

    @override
    def act(self, seen: Sequence[Seen]) -> Array:
        return np.tile(self.action, (len(seen), 1))


class Sampled(Player):
    """A policy's own draws; without a policy uniform over all actions, the control.

    Args:
        policy: of the features; None is the uniform one.
        sizes: number of options of each choice.
        rng: stream of the draws.
    """

    def __init__(
        self, policy: FeaturePolicy | None, sizes: tuple[int, ...], rng: torch.Generator
    ) -> None:
        self.policy, self.sizes, self.rng = policy, sizes, rng

    @override
    def act(self, seen: Sequence[Seen]) -> Array:
        if self.policy is None:
            logits = [torch.zeros(len(seen), size) for size in self.sizes]
        else:
            with torch.no_grad():
                logits = self.policy(torch.from_numpy(_vectors(seen)))
        actions: Array = sample(logits, self.rng).numpy()
        return actions


class LasAttacker(Player):
    """LAS-AT's policy: a strategy for each image, from the image alone.

    Args:
        policy: as LAS-AT has trained it.
        rng: stream of the draws.
    """

    def __init__(self, policy: StrategyPolicy, rng: torch.Generator) -> None:
        self.policy, self.rng = policy.eval(), rng

    @override
    def act(self, seen: Sequence[Seen]) -> Array:
        images = [torch.from_numpy(one["images"]) for one in seen]
        with torch.no_grad():
            return np.stack([sample(self.policy(one), self.rng).numpy() for one in images])


class Learner(SB3Learner, Player):
    """PPO on whole matches: plays n duels to the end, then learns from all their steps.

    Args:
        sizes: number of options of each choice.
        rows: n.
        steps: of a match.
        seed: of SB3's own streams.
        lr: learning rate.
        entropy_coef: weight of the entropy bonus.
        hidden: units of the two hidden layers.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        rows: int,
        steps: int,
        seed: int,
        *,
        lr: float,
        entropy_coef: float,
        hidden: int,
    ) -> None:
        self.sizes = sizes

        def make() -> OnPolicyAlgorithm:
            ppo = PPO(
                "MlpPolicy",
                None,  # type: ignore[arg-type]
                learning_rate=lr,
                n_steps=steps,
                batch_size=max(rows * steps // 2, 2),
                n_epochs=4,
                gamma=1.0,  # a match is short, and its return is where it ends
                ent_coef=entropy_coef,
                policy_kwargs={"net_arch": [hidden, hidden], "activation_fn": nn.Tanh},
                device="cpu",
                _init_setup_model=False,
            )
            seen = spaces.Box(-np.inf, np.inf, (len(FEATURES),), np.float32)
            return set_up(ppo, seen, spaces.MultiDiscrete(list(sizes)), rows)

        super().__init__(make, seed)
        self._move: tuple[Any, ...] = ()

    @override
    def act(self, seen: Sequence[Seen]) -> Array:
        vectors = torch.from_numpy(_vectors(seen))
        self.policy.set_training_mode(False)
        with torch.no_grad(), self.running():
            actions, values, log_probs = self.policy(vectors)
        self._move = (vectors.numpy(), actions.numpy(), values, log_probs)
        chosen: Array = actions.numpy()
        return chosen

    def take(self, paid: Array, first: bool) -> None:
        """Remember what the last actions were paid, (n,); ``first`` at a match's first step."""
        seen, acted, values, log_probs = self._move
        starts = np.full(len(paid), first, np.float32)
        self.algorithm.rollout_buffer.add(seen, acted, paid, starts, values, log_probs)

    def learn(self, side: str) -> dict[str, Tensor]:
        """Learn from the matches that have ended; scalars to log."""
        buffer = self.algorithm.rollout_buffer
        rows = buffer.n_envs
        with self.running():
            buffer.compute_returns_and_advantage(torch.zeros(rows), np.ones(rows))
            self.algorithm.train()
        names = {"policy_loss": "policy_gradient_loss", "kl": "approx_kl"}
        names["explained_variance"] = "explained_variance"
        return self.logged({f"{side}/{tag}": name for tag, name in names.items()})

    def forget(self) -> None:
        """Leave what was remembered out, learned from or not."""
        self.algorithm.rollout_buffer.reset()

    def entropies(self, side: str) -> dict[str, Tensor]:
        """Of each choice over what is remembered, in nats, and as a share of the largest."""
        seen = torch.from_numpy(self.algorithm.rollout_buffer.observations).flatten(0, 1)
        with torch.no_grad():
            heads: Sequence[Categorical] = self.policy.get_distribution(seen).distribution  # type: ignore[assignment]
        found = torch.stack([one.entropy().mean() for one in heads])
        return entropy_stats(NAMES[side], [one.logits for one in heads], found, side)

    def frozen(self) -> FeaturePolicy:
        """A copy of the policy as it is now, without SB3."""
        return as_feature_policy(self.policy, self.sizes)


@dataclass(frozen=True)
class Match:
    """What n matches, played side by side, came to.

    Args:
        first: the defender's value v before the first step, (n,).
        last: after the last step, (n,).
        robust: robust accuracy then, (n,).
        clean: clean accuracy then, (n,).
        choices: side -> mean place of each of its choices, 0 the first option and 1 the last.
    """

    first: Array
    last: Array
    robust: Array
    clean: Array
    choices: dict[str, Array]


def play(envs: Sequence[DuelEnv], players: Mapping[str, Player], seeds: Sequence[int]) -> Match:
    """Play a match per seed, on as many environments, side by side; learners remember all.

    Args:
        envs: of equal settings.
        players: of both sides.
        seeds: of the matches, as many as environments or fewer.
    """
    envs = envs[: len(seeds)]
    seen = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    first = np.array([env.standing.value(env.reward) for env in envs])
    places = []
    for step in range(envs[0].max_cycles):
        moves = {side: players[side].act([one[side] for one in seen]) for side in AGENTS}
        told = [
            env.step({side: moves[side][row] for side in AGENTS}) for row, env in enumerate(envs)
        ]
        seen = [one[0] for one in told]
        for side, player in players.items():
            if isinstance(player, Learner):
                player.take(np.array([one[1][side] for one in told], np.float32), step == 0)
        places.append([_vectors([one[0]["defender"]])[0] for one in told])
    mean, names = np.mean(places, (0, 1)), list(FEATURES)
    return Match(
        first,
        np.array([env.standing.value(env.reward) for env in envs]),
        np.array([env.standing.robust for env in envs]),
        np.array([env.standing.clean for env in envs]),
        {side: mean[[names.index(one) for one in NAMES[side]]] for side in AGENTS},
    )


class Both:
    """The policies that learn, as the training loop saves them.

    Args:
        players: of both sides; one of them learns, or both.
        fabric: where they run.
    """

    def __init__(self, players: Mapping[str, Player], fabric: Fabric) -> None:
        self.fabric = fabric
        learners = {side: one for side, one in players.items() if isinstance(one, Learner)}
        self.module = nn.ModuleDict({side: one.policy for side, one in learners.items()})
        self.optimizer = next(iter(learners.values())).optimizer  # its rate stands for both


class DuelGame:
    """`advgame.run.loop.Game` of two players: a step is a match per duel, then a lesson.

    Args:
        envs: one per duel.
        players: of both sides, of whom one or both learn.
        seed: of the matches.
        fabric: where this runs.
        steps_per_epoch: steps between two validations.
        order: ``"simultaneous"``: whoever learns does so after every match; ``"alternating"``:
            the sides take turns, one stands still while the other learns.
        turn: steps of a turn.
    """

    def __init__(
        self,
        envs: Sequence[DuelEnv],
        players: Mapping[str, Player],
        seed: int,
        fabric: Fabric,
        steps_per_epoch: int,
        order: Order = "simultaneous",
        turn: int = 1,
    ) -> None:
        self.envs, self.players, self.seed = tuple(envs), dict(players), seed
        self.steps_per_epoch, self.order, self.turn = steps_per_epoch, order, turn
        self.learners = {side: one for side, one in players.items() if isinstance(one, Learner)}
        self.learner, self.played = Both(players, fabric), 0

    def step(self) -> dict[str, Tensor]:
        """A match per duel, from which whoever's turn it is learns; scalars to log."""
        names = [f"match {self.played} of {row}" for row in range(len(self.envs))]
        match = play(self.envs, self.players, [derive_seed(self.seed, name) for name in names])
        sides = [*self.learners]
        if self.order == "alternating":
            sides = [sides[self.played // self.turn % len(sides)]]
        stats: dict[str, Tensor] = {}
        for side, learner in self.learners.items():
            stats |= learner.entropies(side)
            if side in sides:
                stats |= learner.learn(side)
            learner.forget()
        self.played += 1
        stats |= {
            "game/return": _scalar(match.last - match.first),
            "game/final_robust": _scalar(match.robust),
            "game/final_clean": _scalar(match.clean),
        }
        for side in AGENTS:
            named = zip(NAMES[side], match.choices[side], strict=True)
            stats |= {f"strategy/place_{name}": _scalar(one) for name, one in named}
        return stats

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """The learners' gradients; their entropies are among the steps' means."""
        row: dict[str, float] = {}
        for side, learner in self.learners.items():
            row |= tagged(side, gradient_sign(learner.optimizer))
        return row

    def state_dict(self) -> dict[str, Any]:
        """The learners' states, those of the other players' streams, and the number of matches."""
        streams = {
            side: one.rng.get_state()
            for side, one in self.players.items()
            if isinstance(one, Sampled | LasAttacker)
        }
        learners = {side: one.state_dict() for side, one in self.learners.items()}
        return {"learners": learners, "streams": streams, "played": self.played}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, which lies between two matches."""
        for side, learner in self.learners.items():
            learner.load_state_dict(state["learners"][side])
        for side, place in state["streams"].items():
            self.players[side].rng.set_state(place)  # type: ignore[attr-defined]
        self.played = state["played"]


Named = Callable[[torch.Generator], Player]
"""Makes a player, whose draws come from a stream."""


def controls(env: DuelEnv, side: str) -> dict[str, Named]:
    """The players that learn nothing, by name.

    ``fixed`` is PGD-10 at ε₀ with steps of ε₀/4, and a plain step on adversarial examples, each by
    the nearest options that there are: together PGD-AT.
    """
    if side == "attacker":
        action, sizes = nearest(env.space.lists, (8, 10, 2)), env.space.sizes
    else:
        action, sizes = env.lessons.index(Lesson()), env.lessons.sizes
    return {
        "fixed": lambda rng: Fixed(action),
        "random": lambda rng: Sampled(None, sizes, rng),
    }


def write_policy(path: Path, policy: FeaturePolicy, side: str) -> None:
    """A policy as one file that says whose it is."""
    about = {"side": side, "sizes": policy.sizes, "hidden": policy.hidden, "inputs": len(FEATURES)}
    write_file(path, policy, {"duel_policy": json.dumps(about)})


def read_policy(path: Path, side: str, sizes: tuple[int, ...]) -> FeaturePolicy:
    """What `write_policy` wrote.

    Args:
        path: the file.
        side: whose it must be.
        sizes: the number of options of each choice, which must be its own.

    Raises:
        InputError: no such file, or a policy that plays something else.
    """
    metadata, weights = read_file(path)
    with reading(path):
        about = json.loads(metadata["duel_policy"])
        of, held = about["side"], tuple(about["sizes"])
        if (of, held, about["inputs"]) != (side, sizes, len(FEATURES)):
            raise InputError(
                f"{path} plays the {of} with {held} options; here is the {side} with {sizes}"
            )
        return filled(lambda: FeaturePolicy(len(FEATURES), sizes, about["hidden"]), weights)


def read_las(
    path: Path, shape: tuple[int, int, int], threat: Threat
) -> tuple[StrategyPolicy, StrategySpace] | None:
    """The policy that a run of train_las_at.py trained, and its lists; None of another script.

    Args:
        path: the run folder.
        shape: (C, H, W) of the images.
        threat: the ball of ε₀, whose eighths the lists count.

    Raises:
        InputError: no run folder, or one without a policy for these images.
    """
    run = RunFolder.open(path)
    config = run.about()["config"]
    if "reward_interval" not in config:
        return None
    if (config["agent"], config["objective"]) != ("reinforce", "pgd"):
        raise InputError(
            f"{path} has no policy that could attack here: it takes a run of train_las_at.py "
            "with --agent reinforce and --objective pgd"
        )
    newest, _ = run.checkpoints.newest()
    if newest is None or step_of(newest) == 0:  # an empty one marks where the run began
        raise InputError(f"{path} has no checkpoint of its policy yet: let it train first")
    cap = threat.whole(math.prod(shape)) / 2
    space = strategy_space(config["space"], float(threat.eps), eps_cap=cap)
    policy = StrategyPolicy(shape, space.sizes, network=config["policy_network"])
    try:
        state = run.checkpoints.load(newest, {})
        policy.load_state_dict(state["game"]["player"]["policy"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} was trained on other images or strategies than these") from error
    return policy, space


@dataclass(frozen=True)
class Cell:
    """What several matches of two players came to.

    Args:
        attacker: its name.
        defender: its name.
        robust: robust accuracy at each match's end.
        clean: clean accuracy then.
        paid: what the defender was paid in each match.
    """

    attacker: str
    defender: str
    robust: tuple[float, ...]
    clean: tuple[float, ...]
    paid: tuple[float, ...]


def against_all(
    envs: Sequence[DuelEnv],
    attackers: Mapping[str, Named],
    defenders: Mapping[str, Named],
    matches: int,
    seed: int,
) -> list[Cell]:
    """Every attacker against every defender, on the same matches.

    Args:
        envs: what they are played on, side by side.
        attackers: by name.
        defenders: by name.
        matches: of each pair.
        seed: of the matches and of the players' draws.
    """
    found = []
    for name, make in attackers.items():
        for other, make_other in defenders.items():
            players = {
                "attacker": make(stream(seed, "attacker")),
                "defender": make_other(stream(seed, "defender")),
            }
            seeds = [derive_seed(seed, f"judged match {i}") for i in range(matches)]
            parts = [
                play(envs, players, seeds[start : start + len(envs)])
                for start in range(0, matches, len(envs))
            ]
            columns = (
                np.concatenate([one.robust for one in parts]),
                np.concatenate([one.clean for one in parts]),
                np.concatenate([one.last - one.first for one in parts]),
            )
            found.append(Cell(name, other, *[tuple(one.tolist()) for one in columns]))
    return found


def level(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN of one value."""
    found = spread(values)
    sd = math.nan if found["sd"] is None else found["sd"]
    return found["mean"], sd / math.sqrt(len(values))


def _vectors(seen: Sequence[Seen]) -> Array:
    """The features of what several duels show, (n, features)."""
    return np.stack([one["features"] if isinstance(one, dict) else one for one in seen])


def _scalar(values: Array | float) -> Tensor:
    return torch.tensor(float(np.mean(values)), dtype=torch.float64)

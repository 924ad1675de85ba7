"""Train experts on classic control and record what they do, for imitation.

    python scripts/train_experts.py                        # all that ship, minutes on one core
    python scripts/train_experts.py MountainCar-v0 --out demonstrations

An expert is SB3's or sb3-contrib's learner on raw observations, playing without exploration. It
is chosen by its mean return over selection episodes, then judged on fresh ones; below the task's
threshold nothing is written. The trajectories are the first episodes after those, whatever their
return. Writes `<out>/<task>.npz` and `.json`, which says how it was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from sb3_contrib import TRPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations, slug
from advgame.imitation.recording import record
from advgame.run.cli import run_script
from advgame.run.files import write_atomically
from advgame.run.folder import command, commit, versions
from advgame.run.interrupt import Interrupt
from advgame.run.program import prog
from advgame.seeding import derive_seed

# reset seeds of the episodes; training resets with small seeds, one per attempt
SELECTION, EVALUATION = 1_000_000, 2_000_000
_ALGORITHMS = {"DQN": DQN, "PPO": PPO, "TRPO": TRPO}


@dataclass(frozen=True)
class Expert:
    """How the expert of one task is trained and what it must reach."""

    algorithm: str
    settings: Mapping[str, Any]
    steps: int
    """environment steps of one attempt"""
    target: float
    """an attempt ends at the first snapshot with this mean return over selection episodes"""
    threshold: float
    """mean return over fresh episodes below which the expert is refused"""
    snapshots: int = 1
    """snapshots that are judged, evenly over the second half of an attempt; the last is its end"""
    envs: int = 1
    """copies of the environment side by side"""


# settings: RL Baselines3 Zoo's tuned ones, learning rates held constant
EXPERTS = {
    "CartPole-v1": Expert(
        "TRPO",
        {
            "n_steps": 512,
            "batch_size": 512,
            "cg_damping": 1e-3,
            "gae_lambda": 0.98,
            "gamma": 0.99,
            "n_critic_updates": 20,
            "learning_rate": 1e-3,
        },
        steps=100_000,
        target=500,
        threshold=500,
        envs=2,
    ),
    "MountainCar-v0": Expert(
        "DQN",
        {
            "learning_rate": 4e-3,
            "batch_size": 128,
            "buffer_size": 10_000,
            "learning_starts": 1000,
            "gamma": 0.98,
            "target_update_interval": 600,
            "train_freq": 16,
            "gradient_steps": 8,
            "exploration_fraction": 0.2,
            "exploration_final_eps": 0.07,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
        steps=120_000,
        target=-102,
        threshold=-105,
        snapshots=12,
    ),
}


@dataclass(frozen=True)
class Config:
    """Train experts and record their trajectories."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(EXPERTS)
    """Gymnasium's names of the tasks"""
    trajectories: int = 10
    """how many to record"""
    episodes: int = 100
    """episodes of the selection, and again of the evaluation"""
    attempts: int = 10
    """seeds that are tried before giving up"""
    steps: int | None = None
    """environment steps of one attempt; the task's own when not given"""
    seed: int = 0
    """of the first attempt; the next one takes the next"""
    out: str = "advgame/imitation"
    """where the files go"""
    overwrite: bool = False
    """replace files that are there"""


class Judge(BaseCallback):
    """Judges snapshots on the way and ends the training at the first one that reaches the target.

    Args:
        env_id: the task.
        expert: what must be reached.
        steps: of one attempt.
        episodes: per judgement.
    """

    def __init__(self, env_id: str, expert: Expert, steps: int, episodes: int) -> None:
        super().__init__()
        self._env_id, self._expert, self._episodes = env_id, expert, episodes
        half = steps // 2
        self._due = [steps - half * k // expert.snapshots for k in range(expert.snapshots)]
        self.judged: list[dict[str, float]] = []

    @property
    def reached(self) -> bool:
        """Whether the latest snapshot reaches the target."""
        return bool(self.judged) and self.judged[-1]["mean"] >= self._expert.target

    def judge(self) -> None:
        """Play the selection episodes with the policy as it is."""
        played = play(self.model, self._env_id, SELECTION, self._episodes)
        self.judged.append({"steps": self.num_timesteps, **summary(played.returns.tolist())})

    def _on_step(self) -> bool:
        if len(self._due) > 1 and self.num_timesteps >= self._due[-1]:
            self._due.pop()
            self.judge()
        return not self.reached

    def _on_training_end(self) -> None:
        if not self.reached:
            self.judge()


def play(model: BaseAlgorithm, env_id: str, seed: int, episodes: int) -> Demonstrations:
    """Demonstrations: whole episodes of the policy's deterministic actions."""
    return record(lambda seen: model.predict(seen, deterministic=True)[0], env_id, seed, episodes)


def summary(returns: list[float]) -> dict[str, float]:
    """Mean, standard deviation, extremes and number of episodes."""
    return {
        "mean": mean(returns),
        "sd": pstdev(returns),
        "min": min(returns),
        "max": max(returns),
        "episodes": len(returns),
    }


def train(env_id: str, config: Config, console: Console) -> tuple[BaseAlgorithm, dict[str, Any]]:
    """Try seeds until one passes selection and evaluation.

    Returns:
        The expert, and its evaluation with all attempts.

    Raises:
        InputError: none of them passes.
    """
    expert, attempts = EXPERTS[env_id], []
    steps = config.steps or expert.steps
    for seed in range(config.seed, config.seed + config.attempts):
        model = _ALGORITHMS[expert.algorithm](
            "MlpPolicy",
            make_vec_env(env_id, expert.envs, seed=seed),
            seed=seed,
            device="cpu",
            **expert.settings,
        )
        model.set_logger(Logger(None, []))  # SB3's own makes a folder in /tmp
        judge = Judge(env_id, expert, steps, config.episodes)
        model.learn(steps, callback=judge)
        attempt: dict[str, Any] = {"seed": seed, "selection": judge.judged}
        attempts.append(attempt)
        if judge.reached:
            played = play(model, env_id, EVALUATION, config.episodes)
            attempt["evaluation"] = found = summary(played.returns.tolist())
            if found["mean"] >= expert.threshold:
                return model, {"returns": found, "seed": seed, "attempts": attempts}
        console.print(f"{env_id}, seed {seed}: {attempt}")
    raise InputError(
        f"no expert of {env_id} reaches {expert.threshold} in {config.attempts} attempts of "
        f"{steps} steps: try more --attempts, more --steps or another --seed"
    )


def check(config: Config) -> None:
    """Refuse what cannot work, before any work."""
    unknown = [name for name in config.tasks if name not in EXPERTS]
    if unknown or not config.tasks:
        asked = ", ".join(unknown) or "none"
        raise InputError(
            f"there are settings for {', '.join(EXPERTS)}, not for {asked}: "
            "record a policy of your own by advgame.imitation.record, docs/imitation.md"
        )
    for name in ("trajectories", "episodes", "attempts"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be 1 or above, not {getattr(config, name)}")
    if config.steps is not None and config.steps < 1:
        raise InputError(f"steps must be 1 or above, not {config.steps}")
    derive_seed(config.seed, "check")
    for name in config.tasks:
        for path in _files(config, name):
            if path.exists() and not config.overwrite:
                raise InputError(f"{path} exists: choose another --out, or give --overwrite")


def _files(config: Config, env_id: str) -> tuple[Path, Path]:
    stem = Path(config.out) / slug(env_id)
    return stem.with_suffix(".npz"), stem.with_suffix(".json")


def main(config: Config) -> None:
    """Train, evaluate, record and write, one task after the other."""
    check(config)
    torch.set_num_threads(1)  # the networks are tiny, and sums come out the same everywhere
    console = Console()
    source = commit()  # before the files below change the tree
    for env_id in config.tasks:
        model, found = train(env_id, config, console)
        first = EVALUATION + config.episodes
        demonstrations = play(model, env_id, first, config.trajectories)
        expert, last = EXPERTS[env_id], first + config.trajectories - 1
        about = {
            "what": f"{config.trajectories} trajectories of an expert, without exploration",
            "env_id": env_id,
            "command": command(),
            "commit": source,
            "versions": versions(),
            "expert": {
                "algorithm": expert.algorithm,
                "settings": dict(expert.settings),
                "envs": expert.envs,
                "steps": found["attempts"][-1]["selection"][-1]["steps"],
                "seed": found["seed"],
                "target": expert.target,
                "threshold": expert.threshold,
                "deterministic": True,
                "returns": found["returns"],
            },
            "trajectories": {
                "returns": demonstrations.returns.tolist(),
                "lengths": demonstrations.lengths.tolist(),
                "terminated": demonstrations.terminated.tolist(),
            },
            "reset_seeds": {
                "selection": [SELECTION, SELECTION + config.episodes - 1],
                "evaluation": [EVALUATION, first - 1],
                "trajectories": [first, last],
            },
            "attempts": found["attempts"],
        }
        data, text = _files(config, env_id)
        with Interrupt() as interrupt:  # Ctrl-C waits: both files or none
            demonstrations.save(data)
            write_atomically(text, json.dumps(about, indent=1) + "\n")
        if interrupt.signal is not None:
            raise KeyboardInterrupt
        returns = found["returns"]
        console.print(f"{env_id}: {returns['mean']:.1f} ± {returns['sd']:.1f}; {data}")


def _from_command_line() -> None:
    main(tyro.cli(Config, prog=prog()))


if __name__ == "__main__":
    run_script(_from_command_line, "tasks that were finished are written")

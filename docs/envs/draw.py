"""Draws the moving pictures of these pages: ``python docs/envs/draw.py`` writes a GIF per id."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

import envs  # noqa: F401  registers the ids
from advgame.attacks.gradient_steps import Menu
from advgame.games import Gail
from advgame.seeding import stream
from advgame.threat import Linf
from agents.updaters import make_updater
from envs.canvas import BLUE, GREEN, INK, RED, WOOD
from envs.duel import parallel_env
from envs.imitation import ImitationVectorEnv

Film = tuple[list[np.ndarray[Any, Any]], int]  # pictures, and how many a second


def play(name: str, steps: int, *, action: Any = None, rows: int = 1, **settings: Any) -> Film:
    """Row 0 of an environment.

    Args:
        name: of the id.
        steps: how many.
        action: of each step; drawn at random when None.
        rows: of the environment.
        settings: of the environment.
    """
    env: Any = gym.make_vec(f"advgame/{name}-v0", rows, render_mode="rgb_array", **settings)
    env.action_space.seed(0)
    env.reset(seed=0)
    frames = [env.render()[0]]
    for _ in range(steps):
        env.step(env.action_space.sample() if action is None else np.array([action]))
        frames.append(env.render()[0])
    return frames, env.metadata["render_fps"]


def imitate(task: str, steps: int) -> Film:
    """Random actions, then an episode of the expert's, paid by a discriminator that knows both."""
    env = ImitationVectorEnv(1, env_id=task, horizon="task", render_mode="rgb_array")
    env.theta = learned_theta(task, 3 * steps)
    frames = []

    def film(act: Callable[[int], Any], length: int) -> None:
        frames.append(env.render()[0])
        for step in range(length):
            *_, terminated, truncated, _ = env.step(act(step))
            frames.append(env.render()[0])
            if bool(terminated | truncated):
                break

    env.action_space.seed(0)
    env.reset(seed=0)
    film(lambda step: env.action_space.sample(), steps // 4)
    env.reset()
    place = env.state_dict()
    place["task"]["state"][0] = env.demonstrations.observations[0]
    env.load_state_dict(place)
    film(lambda step: env.demonstrations.actions[step : step + 1], steps)
    return frames, env.metadata["render_fps"]


def learned_theta(task: str, steps: int) -> torch.Tensor:
    """A discriminator that has learned to tell the expert's pairs from those of random actions."""
    env = ImitationVectorEnv(16, env_id=task, horizon="task", stagger=True)
    rng = stream(0, "pairs")
    rules = Gail(env.discriminator, env.expert_pairs(env.demonstrations, rng))
    updater = make_updater("adam", lr=3e-3, seed=0)
    updater.init(env.theta)
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(steps):
        pairs = []
        for _ in range(8):
            actions = torch.as_tensor(env.action_space.sample())
            pairs.append(env.code.pairs(env.observations, actions))
            env.step(actions)
        env.theta, _ = rules.step(env.theta, torch.cat(pairs), updater, rng)
    return env.theta


def duel(steps: int) -> Film:
    """A match of random players, or its beginning."""
    env = parallel_env(render_mode="rgb_array")
    for number, agent in enumerate(env.possible_agents):
        env.action_space(agent).seed(number)
    env.reset(seed=0)
    frames: list[Any] = [env.render()]
    for _ in range(steps):
        env.step({agent: env.action_space(agent).sample() for agent in env.agents})
        frames.append(env.render())
    return frames, env.metadata["render_fps"]


STEP = Menu().index(1, 0.25, "ce", "steepest", "on")
# the page's name -> a film of so many steps, and how many
FILMS: dict[str, tuple[Callable[[int], Film], int]] = {
    "strategy_selection_v0": (lambda n: play("StrategySelection", n, rows=32), 24),
    "adaptive_attack_v0": (lambda n: play("AdaptiveAttack", n, rows=32), 40),
    "attack_v0": (lambda n: play("Attack", n, action=STEP, threat=Linf(0.25)), 29),
    "black_box_attack_v0": (lambda n: play("BlackBoxAttack", n, threat=Linf(0.4)), 49),
    "gail_cart_pole_v0": (lambda n: imitate("CartPole-v1", n), 150),
    "gail_mountain_car_v0": (lambda n: imitate("MountainCar-v0", n), 200),
    "duel_v0": (duel, 19),
}


def palette() -> Image.Image:
    """Greys, and the pictures' colours in shades: one for all, so that only changes are kept."""
    shades = np.linspace(0, 1, 9)[1:, None]
    coloured = [255 + shades * (np.array(one) - 255) for one in (RED, BLUE, INK, GREEN, WOOD)]
    greys = np.linspace(0, 255, 24)[:, None].repeat(3, 1)
    image = Image.new("P", (1, 1))
    image.putpalette(np.concatenate([greys, *coloured]).round().astype(np.uint8).tobytes())
    return image


def main(folder: Path, length: float = 1.0) -> None:
    """Write the films, or their beginnings, at 15 pictures per second or fewer."""
    for name, (film, steps) in FILMS.items():
        frames, fps = film(max(round(steps * length), 1))
        every = max(round(fps / 15), 1)
        shown = [Image.fromarray(one).resize((480, 320)) for one in frames[::every]]
        first, *more = [one.quantize(palette=palette(), dither=Image.Dither.NONE) for one in shown]
        path = folder / f"{name}.gif"
        first.save(path, append_images=more, save_all=True, duration=1000 * every / fps, loop=0)
        print(path, len(shown), "pictures,", path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

"""How fast attacks and environments are, beside the bare model and beside other libraries.

    python scripts/benchmark.py                    # about half an hour on 2 idle cores
    python scripts/benchmark.py --only strategies,env --threads 1

The contestants of a case take turns in shuffled order, so that a busy machine slows all of them;
ratios are medians over turns of the ratio within one turn. ``floor`` is what cannot be left out:
the bare model's passes, or the parts of an environment's step.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
import train_gail
import tyro
from lightning_fabric import Fabric
from peers import peer
from sb3_contrib import TRPO
from stable_baselines3.common.vec_env import DummyVecEnv
from timing import Play, compare, show
from torch import Tensor, nn
from torch.autograd import grad

from advgame.attacks import attacked, pgd
from advgame.classifiers import make_classifier
from advgame.data import Batches, ImageSet, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.las_at import LasAt
from advgame.games.strategy import Strategies, StrategySpace
from advgame.run.cli import run_script
from advgame.run.files import write_atomically
from advgame.run.folder import command, commit, cpu_name, device_name, versions
from advgame.seeding import seeded_init, stream
from advgame.threat import Linf, per_image
from agents.imitator import Imitator
from agents.las_at import RandomStrategy
from agents.updaters import make_updater
from envs import make_sb3
from envs.attack import AttackVectorEnv
from envs.strategy_selection import StrategySelectionVectorEnv

STEPS, CLASSES, ENVS, WARM_UP, SEED = 10, 10, 64, 2, 0
Case = dict[str, Any]
Shape = tuple[int, int, int]
Network = tuple[str, Shape, float, int, int]
Task = tuple[nn.Module, Tensor, Tensor]
# classifier, shape of the images, ε, batch for PGD-10, batch for steps per image
NETWORKS: list[Network] = [
    ("small_cnn", (1, 28, 28), 0.3, 64, 128),
    ("resnet18", (3, 32, 32), 8 / 255, 32, 64),
    ("preact_resnet18", (3, 32, 32), 8 / 255, 128, 128),  # from here on with a GPU only
    ("wrn-34-10", (3, 32, 32), 8 / 255, 128, 128),
]
ATTACKED: list[Network] = [
    *((name, (1, 28, 28), 0.3, 256, 0) for name in ("small_cnn", "minimax_cnn")),
    *NETWORKS[1:3],
]
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


@dataclass(frozen=True)
class Config:
    """Measure attacks and environments; prints tables and writes one JSON file."""

    out: str = "results/benchmark.json"
    """where the figures go"""
    repeats: int = 15
    """how often every contestant takes its turn (the environments: ten times as often)"""
    only: str = "pgd,strategies,env,attack,imitation"
    """PGD-10 and its peers; steps per image and LAS-AT's masked loop; environments; GAIL"""
    threads: int = 0
    """CPU threads; 0 is torch's default, all cores"""
    quick: bool = False
    """two repeats of the smallest network: for tests, not for figures"""


def task(name: str, shape: Shape, batch: int, device: torch.device) -> Task:
    """The classifier in evaluation mode, random images and random labels."""
    with seeded_init(SEED):
        model = make_classifier(name, shape, CLASSES).eval().to(device)
    rng = stream(SEED, "images", device)
    x = torch.rand(batch, *shape, generator=rng, device=device)
    y = torch.randint(CLASSES, (batch,), generator=rng, device=device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(memory_format=layout), x.to(memory_format=layout), y


def measure_pgd(fabric: Fabric, repeats: int, network: Network) -> Case:
    """Floor, ours and the peers with the same ε, step size, steps, random start and batch."""
    name, shape, eps, batch, _ = network
    model, x, y = task(name, shape, batch, fabric.device)
    attack, rng = pgd(Linf(eps), STEPS), stream(SEED, "start", fabric.device)
    bare, leaf = copy.deepcopy(model).requires_grad_(False), x.clone().requires_grad_()
    plays: dict[str, Play] = {
        "floor": lambda: [grad(F.cross_entropy(bare(leaf), y), leaf) for _ in range(STEPS)],
        "advgame": lambda: attack.perturb(model, x, y, rng=rng),
        "advgame unchecked": lambda: attack.run(model, x, y, rng=rng, check=False),
    }
    for other in PEERS:
        with suppress(ImportError):  # on copies: some leave weight gradients behind
            plays[other] = peer(other, copy.deepcopy(model), x, y, eps, STEPS)
    rows = compare(plays, repeats, WARM_UP, fabric.autocast)
    missing = {other: "pip install -e '.[bench]'" for other in PEERS if other not in plays}
    facts = {"batch": batch, "eps": eps, "step_size": eps / 4, "steps": STEPS}
    return {"network": name, "shape": shape, **facts, "not_installed": missing, "contestants": rows}


def masked_loop(
    model: nn.Module, x: Tensor, y: Tensor, strategies: Strategies, rng: torch.Generator
) -> Tensor:
    """LAS-AT's published loop, vectorised: all run to the maximum, moves too many are masked."""
    ball, size = Linf(strategies.eps), per_image(strategies.step_size, x)
    x_adv = ball.random_start(x, rng)
    with attacked(model):
        for step in range(int(strategies.steps.max())):
            leaf = x_adv.detach().requires_grad_()
            (slope,) = grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
            moved = ball.project(ball.steepest(slope).mul_(size).add_(x_adv), x)
            x_adv = torch.where((strategies.steps > step).view(-1, 1, 1, 1), moved, x_adv)
    return x_adv


def measure_strategies(fabric: Fabric, repeats: int, network: Network) -> Case:
    """Images that leave the batch against images that are masked, with the same strategies."""
    name, shape, eps, _, batch = network
    model, x, y = task(name, shape, batch, fabric.device)
    game, space, rng = LasAt(Linf(eps)), StrategySpace(eps), stream(SEED, "start", fabric.device)
    chosen = space.decode(RandomStrategy(space.sizes, rng).act(x, learn=False))
    plays: dict[str, Play] = {
        "advgame": lambda: game.attack(chosen).run(model, x, y, rng=rng, check=False),
        "masked loop": lambda: masked_loop(model, x, y, chosen, rng),
    }
    rows = compare(plays, repeats, WARM_UP, fabric.autocast)
    facts: Case = {"network": name, "shape": shape, "batch": batch, "eps": eps}
    facts |= {"mean_steps": chosen.steps.sum().item() / batch, "max_steps": int(chosen.steps.max())}
    return facts | {"speed_up": rows["masked loop"]["times_ours"], "contestants": rows}


def bare_parts(
    game: LasAt, defender: Defender, x: Tensor, y: Tensor, chosen: Strategies, rng: torch.Generator
) -> None:
    """What a step of the environment cannot do without, line by line."""
    with defender.fabric.autocast():
        x_adv = game.attack(chosen).run(defender.module, x, y, rng=rng, check=False).x_adv
        defender.module.eval()
        with torch.no_grad():
            game.loss(defender.module(x_adv), y)
    defender.backward(x_adv, y)
    with defender.fabric.autocast():
        ahead = defender.look_ahead()
        game.look_ahead_attack().run(ahead, x, y, rng=rng, check=False)
        with torch.no_grad():
            ahead(x)
    defender.step()


def measure_env(fabric: Fabric, repeats: int, images: tuple[ImageSet, float]) -> Case:
    """The environment's step against its bare parts, on equal batches, streams and strategies."""
    (data, eps), device = images, fabric.device
    game = LasAt(Linf(eps))
    models = [task("small_cnn", data.shape, ENVS, device)[0] for _ in range(2)]
    defender, twin = (Defender(model, lr=0.05, fabric=fabric) for model in models)
    env = StrategySelectionVectorEnv(ENVS, data=data, defender=defender, rules=game)
    env.reset(seed=SEED)
    player = RandomStrategy(env.space.sizes, stream(SEED, "actions", device))
    warm_up = 3 * repeats  # teaches the defender, so that the look-ahead attack has work to do
    batches, rng = Batches(data.to(device), ENVS, SEED), stream(SEED, "attack0", device)
    drawn = [batches.next() for _ in range(warm_up + 10 * repeats)]
    actions = [player.act(x, learn=False) for x, _ in drawn]
    inputs = iter([(*one, env.space.decode(a)) for one, a in zip(drawn, actions, strict=True)])
    played = iter(actions)
    plays: dict[str, Play] = {
        "floor": lambda: bare_parts(game, twin, *next(inputs), rng),
        "advgame": lambda: env.step(next(played)),
    }
    rows = compare(plays, 10 * repeats, warm_up, nullcontext)
    facts: Case = {"network": "small_cnn", "shape": data.shape, "batch": ENVS, "eps": eps}
    facts["overhead_percent"] = 100 * (1 / rows["advgame"]["floor_share"] - 1)
    same_work = all(map(torch.equal, *(model.parameters() for model in models)))
    return facts | {"same_work": same_work, "contestants": rows}


def measure_attack(fabric: Fabric, repeats: int, network: Network) -> Case:
    """A step of the attack environment against the bare gradient query, with random actions.

    A random network is easily fooled: at a tenth of the usual ε most episodes last.
    """
    name, shape, eps, batch, _ = network
    model, x, _ = task(name, shape, 4 * batch, fabric.device)
    with torch.no_grad():  # only images that it gets right are attacked
        y = torch.cat([model(part).argmax(1) for part in x.split(batch)])
    data = ImageSet.from_floats(x, y, CLASSES)
    settings: Any = {"classifier": model, "data": data, "threat": Linf(eps / 10)}
    env, inner = (AttackVectorEnv(batch, **settings) for _ in range(2))
    env.reset(seed=SEED)
    adapter = make_sb3(inner)
    adapter.reset()
    bare, leaf = copy.deepcopy(model).requires_grad_(False), x[:batch].clone().requires_grad_()
    turns, ends = WARM_UP + 10 * repeats, []
    rng = stream(SEED, "actions")
    columns = [torch.randint(size, (turns, batch), generator=rng) for size in env.sizes]
    chosen = torch.stack(columns, 2)
    ours, theirs = iter(chosen.to(fabric.device)), iter(chosen.numpy())

    def step() -> None:
        env.step(next(ours))
        ends.append(int(env.done.sum()))

    plays: dict[str, Play] = {
        "floor": lambda: grad(F.cross_entropy(bare(leaf), y[:batch]), leaf),
        "advgame": step,
        "advgame, SB3 adapter": lambda: adapter.step(next(theirs)),
    }
    rows = compare(plays, 10 * repeats, WARM_UP, fabric.autocast)
    facts: Case = {"network": name, "shape": shape, "batch": batch, "eps": eps / 10}
    facts["image_steps_per_second"] = batch / rows["advgame"]["median_s"]
    facts["share_of_rows_ending_per_step"] = sum(ends) / len(ends) / batch
    return facts | {"contestants": rows}


def measure_imitation(fabric: Fabric, repeats: int, env_id: str) -> Case:
    """An iteration of GAIL of 2,048 steps, its parts, and the loop that `imitation` builds on.

    That library cannot be installed beside current releases; its generator is SB3's loop. It runs
    twice: with our own learner in it, where all settings are equal (networks, batches, passes,
    conjugate-gradient steps, Fisher matrix of a part), and with sb3-contrib's defaults, whose
    critic alone makes 160 steps where ours makes 20.
    """
    training, _, _ = train_gail.make_training(
        replace(train_gail.job.defaults(env=env_id), n_steps=64, envs=32)
    )
    env, player = training.env, training.player
    actions, rollout = torch.zeros(env.num_envs, dtype=torch.int64), player.collect(env)
    pairs = env.code.pairs(rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1))
    theta, updater = env.theta, make_updater("adam", lr=None, seed=SEED)
    updater.init(theta)
    copies = DummyVecEnv([partial(gym.make, env_id)] * env.num_envs)
    usual = TRPO("MlpPolicy", copies, n_steps=64, device="cpu", seed=SEED)
    theirs: Any = SimpleNamespace(
        num_envs=env.num_envs,
        single_observation_space=copies.observation_space,
        single_action_space=copies.action_space,
    )
    assert isinstance(player, Imitator)
    equal = Imitator(theirs, SEED, player.settings).algorithm
    equal.set_env(copies)
    plays: dict[str, Play] = {
        "advgame": training.step,
        "environment alone": lambda: [env.step(actions) for _ in range(64)],
        "environment and policy": lambda: player.collect(env),
        "discriminator": lambda: training.rules.step(theta, pairs, updater, stream(SEED, "pairs")),
        "TRPO": lambda: player.learn(rollout, rollout.rewards),
        "sb3-contrib's loop, equal settings, no discriminator": lambda: equal.learn(
            2048, reset_num_timesteps=False
        ),
        "sb3-contrib's loop, its defaults, no discriminator": lambda: usual.learn(
            2048, reset_num_timesteps=False
        ),
    }
    rows = compare(plays, repeats, WARM_UP, nullcontext)
    speed = 2048 / rows["environment alone"]["median_s"]
    return {"task": env_id, "environment_steps_per_second": speed, "contestants": rows}


def main(config: Config) -> None:
    """Measure, print, write; InputError for settings that cannot work."""
    if config.repeats < 1 or config.threads < 0:
        raise InputError("--repeats must be 1 or above and --threads 0 or above")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    cuda = torch.cuda.is_available()
    precision: Any = "bf16-mixed" if cuda else "32-true"
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=1, precision=precision)
    repeats = 2 if config.quick else config.repeats
    cases = 1 if config.quick else len(NETWORKS) if cuda else 2
    _, x, y = task("small_cnn", (1, 28, 28), 20 * ENVS, torch.device("cpu"))
    data = [(load_data("digits").train, 0.15), (ImageSet.from_floats(x, y, CLASSES), 0.3)]
    measures: dict[str, tuple[Callable[..., Case], list[Any]]] = {
        "pgd": (measure_pgd, NETWORKS[:cases]),
        "strategies": (measure_strategies, NETWORKS[:cases]),
        "env": (measure_env, data[:cases]),
        "attack": (measure_attack, ATTACKED[: 1 if config.quick else 4 if cuda else 3]),
        "imitation": (measure_imitation, ["CartPole-v1", "MountainCar-v0"][:cases]),
    }
    asked = config.only.split(",")
    if unknown := set(asked) - set(measures):
        raise InputError(f"--only knows {','.join(measures)}, not {','.join(sorted(unknown))}")
    groups = {
        name: [f(fabric, repeats, one) for one in ones]
        for name, (f, ones) in measures.items()
        if name in asked
    }
    show(groups)
    found = {one.name: one.version for one in distributions()}
    about = {
        "command": command(),
        "versions": versions() | {name: found.get(name, "not installed") for name in PEERS},
        "commit": commit(),
        "device": device_name(fabric.device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": "bf16-mixed, channels_last" if cuda else "fp32",
        "repeats": repeats,
    }
    write_atomically(Path(config.out), json.dumps({**about, "groups": groups}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config)))

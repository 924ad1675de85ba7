"""Steps of the environments beside what they cannot do without, and an iteration of GAIL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import train_gail
from lightning_fabric import Fabric
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from torch.autograd import grad

from advgame.attacks import Seen, attacked
from advgame.data import Batches, ImageSet, load_data
from advgame.defender import Defender
from advgame.games.adaptive import AdaptiveAttack
from advgame.games.las_at import LasAt
from advgame.games.stopping import features, true_probability
from advgame.games.strategy import Strategies
from advgame.losses import cross_entropy
from advgame.seeding import PrivateRNG, derive_seed, stream
from advgame.threat import Linf, per_image
from agents.imitator import Imitator
from agents.las_at import RandomStrategy
from agents.updaters import make_updater
from benchmarks.attacks import NETWORKS, Network
from benchmarks.timing import CLASSES, SEED, WARM_UP, Case, Play, compare, task
from envs import make_sb3
from envs.adaptive_attack import AdaptiveAttackVectorEnv
from envs.attack import AttackVectorEnv
from envs.duel import DuelEnv
from envs.strategy_selection import StrategySelectionVectorEnv

ENVS = 64
ATTACKED: list[Network] = [
    *((name, (1, 28, 28), 0.3, 256, 0) for name in ("small_cnn", "minimax_cnn")),
    *NETWORKS[1:3],
]


def data_sets() -> list[tuple[ImageSet, float]]:
    """Images of two sizes, with a radius each: digits, and random ones like MNIST's."""
    _, x, y = task("small_cnn", (1, 28, 28), 20 * ENVS, torch.device("cpu"))
    return [(load_data("digits").train, 0.15), (ImageSet.from_floats(x, y, CLASSES), 0.3)]


def adaptive_cases() -> list[tuple[str, ImageSet, float]]:
    """The same with their classifiers, and once more with a larger one."""
    digits, large = data_sets()
    return [("small_cnn", *digits), ("small_cnn", *large), ("minimax_cnn", *large)]


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


def bare_stopping(
    rules: AdaptiveAttack,
    defender: Defender,
    x: Tensor,
    y: Tensor,
    actions: Tensor,
    rng: torch.Generator,
    *,
    seen: bool,
) -> None:
    """A turn of AdaptiveAttack-v0, line by line: attacks that are chosen query by query, a lesson.

    Args:
        rules: of the game, with one radius.
        defender: learns.
        x: clean images (B, C, H, W).
        y: labels (B,).
        actions: (queries, B), of which an image's first stop ends its attack.
        rng: stream of the starts.
        seen: also form the features that a choice is made from.
    """
    torch.randint(1, (len(x),), generator=rng, device=x.device)  # the environment draws radii
    ball, model = rules.threat, defender.module
    sizes = torch.tensor([*rules.step_sizes, 0.0, 0.0], device=x.device) * float(ball.eps)
    rows = torch.arange(len(x), device=x.device)
    x_adv = ball.random_start(x, rng)
    p = None
    with attacked(model), defender.fabric.autocast():
        for done, chosen in enumerate(actions):
            leaf = x_adv[rows].requires_grad_()
            with torch.enable_grad():
                logits = model(leaf)
                loss = cross_entropy(logits, y[rows])
            if seen:
                delta, told = leaf.detach() - x[rows], (logits.detach(), loss.detach(), y[rows])
                one = Seen(rows, delta, ball, *told, done, rules.queries - 1)
                after = true_probability(one)
                features(one, after, after if p is None else p[rows], float(ball.eps))
                p = after.new_zeros(len(x)).index_copy(0, rows, after)
            if done == rules.queries - 1:
                break
            going = (chosen[rows] != rules.stop).nonzero()[:, 0]
            if not len(going):
                break
            (slope,) = grad(loss.sum(), leaf)
            rows, points, slope = rows[going], leaf.detach()[going], slope[going]
            move = ball.steepest(slope).mul_(per_image(sizes[chosen[rows]], slope))
            points = ball.project(move.add_(points), x[rows])
            if len(jumps := (chosen[rows] == len(rules.step_sizes)).nonzero()[:, 0]):
                points[jumps] = ball.random_start(x[rows[jumps]], rng)
            x_adv[rows] = points
    defender.backward(x_adv, y)
    defender.step()


def measure_adaptive(fabric: Fabric, repeats: int, images: tuple[str, ImageSet, float]) -> Case:
    """A turn of AdaptiveAttack-v0 against the bare loop, on equal batches, streams and actions."""
    (name, data, eps), device = images, fabric.device
    rules = AdaptiveAttack(Linf(eps))
    models = [task(name, data.shape, ENVS, device)[0] for _ in range(3)]
    defender, twin, third = (Defender(model, lr=0.05, fabric=fabric) for model in models)
    env = AdaptiveAttackVectorEnv(ENVS, data=data, defender=defender, rules=rules)
    turns = WARM_UP + 2 * repeats
    drawn = stream(SEED, "actions")
    actions = torch.randint(rules.options, (turns, rules.queries, ENVS), generator=drawn)
    actions = actions.to(device)

    def bare(defender: Defender, *, seen: bool) -> Play:
        batches, rng = Batches(data.to(device), ENVS, SEED), stream(SEED, "attack0", device)
        given, dropout = iter(actions), PrivateRNG(derive_seed(SEED, "dropout0"), device)

        def turn() -> None:
            with dropout:
                bare_stopping(rules, defender, *batches.next(), next(given), rng, seen=seen)

        return turn

    played, steps = iter(actions), []
    env.reset(seed=SEED)

    def turn() -> None:
        for chosen in next(played):
            _, _, ended, *_ = env.step(chosen[:, None])
            if ended[0]:
                break
        assert env.result is not None
        steps.append(float(env.result.stats["strategy/steps"]))
        env.reset()

    plays: dict[str, Play] = {
        "floor": bare(twin, seen=True),
        "advgame": turn,
        "without features": bare(third, seen=False),
    }
    rows = compare(plays, 2 * repeats, WARM_UP, nullcontext)
    facts: Case = {"network": name, "shape": data.shape, "batch": ENVS, "eps": eps}
    facts["mean_steps"] = sum(steps) / len(steps)
    facts["overhead_percent"] = 100 * (1 / rows["advgame"]["floor_share"] - 1)
    alike = (map(torch.equal, models[0].parameters(), one.parameters()) for one in models[1:])
    return facts | {"same_work": all(map(all, alike)), "contestants": rows}


def measure_duel(fabric: Fabric, repeats: int, images: tuple[ImageSet, float]) -> Case:
    """The duel's step against its rules, on equal batches, streams and random moves.

    The rules are the training step with its pay, which is the standing after it; the training step
    of the rules alone stands beside it.
    """
    (data, eps), device = images, fabric.device
    models = [task("small_cnn", data.shape, ENVS, device)[0] for _ in range(3)]
    defender, twin, third = (Defender(model, lr=0.05, fabric=fabric) for model in models)
    held_out, turns = data.first(ENVS), 13 * repeats
    env = DuelEnv(
        data=data, held_out=held_out, defender=defender, threat=Linf(eps), max_cycles=turns
    )
    env.reset(seed=SEED)
    x, y = env.held_out.floats(), env.held_out.labels
    rng = np.random.default_rng(SEED)
    moves = [
        {agent: rng.integers(env.action_space(agent).nvec) for agent in env.agents}
        for _ in range(turns)
    ]

    def inputs() -> Iterator[Any]:
        batches, attack = Batches(data.to(device), ENVS, SEED), stream(SEED, "attack", device)
        for move in moves:
            strategy, lesson = (torch.from_numpy(one).to(device) for one in move.values())
            strategies = env.space.decode(strategy.expand(ENVS, -1))
            yield *batches.next(), strategies, env.lessons.decode(lesson), attack

    given, alone, played = inputs(), inputs(), iter(moves)

    def bare() -> None:
        env.rules.step(twin, *next(given))
        env.rules.judge(twin.module, x, y, stream(SEED, "judge", device))

    plays: dict[str, Play] = {
        "floor": bare,
        "advgame": lambda: env.step(next(played)),
        "its training step alone": lambda: env.rules.step(third, *next(alone)),
    }
    rows = compare(plays, 10 * repeats, 3 * repeats, nullcontext)
    facts: Case = {"network": "small_cnn", "shape": data.shape, "batch": ENVS, "eps": eps}
    facts["held_out"] = len(held_out)
    same_work = all(map(torch.equal, *(model.parameters() for model in models[:2])))
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
    training, *_ = train_gail.make_parts(
        replace(train_gail.job.defaults(env=env_id), n_steps=64, envs=32)
    )
    env, player = training.env, training.player
    actions, rollout = torch.zeros(env.num_envs, dtype=torch.int64), player.collect(env)
    pairs = env.code.pairs(rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1))
    theta, updater = env.theta, make_updater("adam", lr=None, seed=SEED)
    updater.init(theta)
    copies = DummyVecEnv([partial(gym.make, env_id)] * env.num_envs)
    usual = TRPO("MlpPolicy", copies, n_steps=64, device="cpu", seed=SEED)
    usual.set_logger(Logger(None, []))  # SB3's own makes a folder in /tmp
    theirs: Any = SimpleNamespace(
        num_envs=env.num_envs,
        single_observation_space=copies.observation_space,
        single_action_space=copies.action_space,
        **{name: getattr(env, name) for name in ("env_id", "code", "task")},
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

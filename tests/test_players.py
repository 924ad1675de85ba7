"""REINFORCE and PPO: gradients, baselines, determinism, a bandit and a planted data set."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import slowly
from lightning_fabric import Fabric

from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.las_at import LasAt
from advgame.games.stopping import StopAtError
from advgame.games.strategy import StrategySpace
from advgame.seeding import seeded_init, stream
from advgame.threat import Linf
from agents.las_at import FixedStrategy, RandomStrategy, StrategyGame, make_player
from agents.policies import StrategyPolicy, ValueNet, entropies, log_probability, sample
from agents.reinforce import Reinforce
from agents.sb3 import PPOPlayer
from agents.settings import PRESETS, ReinforceConfig
from envs.strategy_selection import StrategySelectionVectorEnv

SHAPE, SIZES = (1, 8, 8), (4, 3, 2)


def reinforce(seed=0, **changes):
    with seeded_init(seed):
        policy, value = StrategyPolicy(SHAPE, SIZES), ValueNet(SHAPE)
    settings = replace(PRESETS["default"], **changes)
    value = value if settings.baseline == "value" else None
    return Reinforce(policy, settings, stream(seed, "policy"), value)


def ppo(seed=0, num_envs=64):
    return PPOPlayer(SHAPE, SIZES, num_envs, seed, lr=3e-3, entropy_coef=0.003)


def bandit_reward(images, actions):
    """A bright image wants (3, 0, 1), a dark one (0, 2, 1); a point for each right choice."""
    bright = (images.mean((1, 2, 3)) > 0.5)[:, None]
    best = torch.where(bright, torch.tensor([3, 0, 1]), torch.tensor([0, 2, 1]))
    return (actions == best).float().sum(1)


def play_bandit(player, steps):
    rng = torch.Generator().manual_seed(7)
    rewards = []
    for _ in range(steps):
        level = torch.randint(0, 2, (64, 1, 1, 1), generator=rng) * 0.8 + 0.1
        images = (level + 0.1 * torch.rand(64, *SHAPE, generator=rng)).clamp(0, 1)
        actions = player.act(images, learn=True)
        reward = bandit_reward(images, actions)
        player.learn(reward)
        rewards.append(float(reward.mean()))
    return rewards


def test_a_policy_has_the_trunk_that_it_is_asked_for():
    usual = StrategyPolicy((3, 32, 32), SIZES)
    lean = StrategyPolicy((3, 32, 32), SIZES, network="lean_resnet-half")
    params = [sum(p.numel() for p in one.parameters()) / 1e6 for one in (usual, lean)]
    assert [round(n, 1) for n in params] == [11.2, 0.3]
    assert [one.shape[1] for one in lean(torch.rand(2, 3, 32, 32))] == list(SIZES)


def test_a_new_policy_is_uniform_and_draws_from_its_stream(rng):
    policy = StrategyPolicy(SHAPE, SIZES)
    logits = policy(torch.rand(5, *SHAPE, generator=rng))
    torch.testing.assert_close(entropies(logits), torch.tensor(SIZES).float().log())
    first = sample(logits, torch.Generator().manual_seed(1))
    assert torch.equal(first, sample(logits, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(
        log_probability(logits, first), torch.full((5,), -24.0).abs().log().neg()
    )


def test_gradient_is_the_policy_gradient(rng):
    """Averaged over many draws, REINFORCE's step follows the exact gradient of E[R]."""
    logits = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    payoff = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(1) * payoff).sum(), logits)
    draws = sample([logits.detach().expand(200_000, 3)], rng)
    reward = payoff[draws[:, 0]]
    for baseline in (0.0, float(reward.mean()), 3.0):  # none of them biases
        score = log_probability([logits.expand(200_000, 3)], draws)
        (got,) = torch.autograd.grad((score * (reward - baseline)).mean(), logits)
        # standard error of the mean: spread of the reward (about 3) over sqrt(200,000)
        torch.testing.assert_close(got, exact, rtol=0, atol=0.03)


def test_leave_one_out_removes_exactly_what_the_batch_shares():
    own = torch.tensor([1.0, 2.0, 6.0])
    player = reinforce(baseline="loo")
    advantages = [r - player._baseline(torch.zeros(3), r) for r in (own, own + 100)]
    torch.testing.assert_close(advantages[0], advantages[1])
    torch.testing.assert_close(advantages[0], torch.tensor([-3.0, -1.5, 4.5]))
    shared = torch.full((3,), 7.0)  # credit "batch": nothing is left
    assert not (shared - player._baseline(torch.zeros(3), shared)).any()


@pytest.mark.parametrize("level", [6.0, -40.0])
def test_the_value_baseline_follows_rewards_of_any_level(level):
    """Bright images earn 2 more than dark ones: V must take both that and the level away."""
    player, rng = reinforce(baseline="value"), torch.Generator().manual_seed(0)
    for _ in range(150):
        bright = torch.randint(0, 2, (64,), generator=rng).float()
        images = (0.1 + 0.8 * bright).view(-1, 1, 1, 1).expand(64, *SHAPE)
        player.act(images, learn=True)
        stats = player.learn(level + 2 * bright + 0.1 * torch.randn(64, generator=rng))
    assert abs(float(stats["attacker/advantage_mean"])) < 0.3
    assert float(stats["attacker/advantage_spread"]) < 0.3  # 1.0 without V, 0.1 is the noise


FURTHER = ("loo", "running", "value", "ppo")


@pytest.mark.parametrize("player", slowly(["none", *FURTHER], FURTHER))
def test_the_best_strategy_of_a_bandit_is_found(player):
    make = ppo if player == "ppo" else partial(reinforce, baseline=player)
    rewards = play_bandit(make(), 300)
    assert sum(rewards[:4]) / 4 < 1.5, "uniform play earns 1/4·… = 1.08 on average"
    assert sum(rewards[-20:]) / 20 > 2.8


def test_the_published_settings_hardly_move():
    """2150 updates of at most 1e-4 each: an L2 displacement below 0.215, whatever the reward."""
    with seeded_init(0):
        policy = StrategyPolicy(SHAPE, SIZES, uniform=False)
    player = Reinforce(policy, PRESETS["repo"], stream(0, "policy"))
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    rewards = play_bandit(player, 300)
    moved = torch.nn.utils.parameters_to_vector(policy.parameters()).detach() - before
    assert 0 < float(moved.norm()) <= 300 * 1e-4 * 1.0001
    assert sum(rewards[-20:]) / 20 < 1.6


@pytest.mark.parametrize(
    ("preset", "peer"),
    [
        ("repo", partial(torch.optim.SGD, lr=1e-4)),
        ("repo-momentum", partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=5e-4)),
        ("default", partial(torch.optim.Adam, lr=1e-3)),
    ],
)
def test_the_published_optimisers_are_torchs(preset, peer):
    with seeded_init(0):
        policy = StrategyPolicy(SHAPE, SIZES, uniform=False)
    config = replace(PRESETS[preset], baseline="none")
    ours = Reinforce(policy, config, stream(0, "policy")).optimizer
    theirs = peer(policy.parameters())
    assert type(ours) is type(theirs)
    assert ours.defaults == theirs.defaults


@pytest.mark.parametrize("make", [reinforce, pytest.param(ppo, marks=pytest.mark.slow)])
def test_same_seed_same_bits_and_resumable(make):
    """PPO is stopped in the middle of a rollout; SB3's global streams must not leak in or out."""
    whole = play_bandit(make(), 30)
    torch.manual_seed(99)
    want, numpys = torch.rand(1), np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(99)
    assert whole == play_bandit(make(), 30)
    assert torch.equal(torch.rand(1), want)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002
    first, second = make(), make(seed=5)
    assert whole != play_bandit(second, 30)
    play_bandit(first, 10)
    play_bandit(second, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    # bandit images restart with each call, for both alike
    assert play_bandit(first, 15) == play_bandit(second, 15)


def test_controls_do_what_they_say():
    images = torch.rand(3000, *SHAPE)
    draws = RandomStrategy(SIZES, torch.Generator().manual_seed(0)).act(images, learn=False)
    for column, size in enumerate(SIZES):
        shares = draws[:, column].bincount(minlength=size) / 3000
        assert (shares - 1 / size).abs().max() < 0.04  # four standard errors
    fixed = FixedStrategy((2, 1, 0)).act(images, learn=False)
    assert fixed.unique(dim=0).tolist() == [[2, 1, 0]]


def test_ppo_learns_with_the_policy_that_played():
    """Colour images have a trunk with batch norm: running statistics in play, a batch's beyond."""
    player = PPOPlayer((3, 8, 8), SIZES, 8, 0, lr=1e-30, n_steps=2, network="resnet18")
    with torch.no_grad():  # a policy that has learned something
        player.policy.action_net.weight.mul_(100)
    images = torch.rand(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for one in images:
        player.act(one, learn=True)
        stats = player.learn(torch.arange(8.0))
    assert float(stats["attacker/kl"]) == pytest.approx(0, abs=1e-6)
    assert player.algorithm.logger.name_to_value["train/clip_fraction"] == 0


def test_ppo_learns_from_single_images():
    player = ppo(num_envs=1)
    for _ in range(4):
        player.act(torch.rand(1, *SHAPE), learn=True)
        stats = player.learn(torch.rand(1))
    assert "attacker/kl" in stats


def test_misuse_is_refused():
    with pytest.raises(InputError, match="act"):
        reinforce().learn(torch.zeros(3))
    with pytest.raises(InputError):
        Reinforce(StrategyPolicy(SHAPE, SIZES), ReinforceConfig(lr=0), stream(0, "x"))


@pytest.mark.parametrize(
    ("agent", "answer"),
    [("stopper", "rule"), ("fat", "rule"), ("thompson", "progress"), ("reinforc", "reinforce?")],
)
def test_no_agent_is_played_by_another_one(agent, answer):
    space, fabric = StrategySpace(0.15), Fabric(accelerator="cpu", devices=1)
    with pytest.raises(InputError, match=answer):
        make_player(agent, space, SHAPE, 8, ReinforceConfig(), seed=0, fabric=fabric)
    settings = {"seed": 0, "fabric": fabric, "rule": StopAtError()}
    with pytest.raises(InputError, match="leave rule out"):
        make_player("random", space, SHAPE, 8, ReinforceConfig(), **settings)


def planted(rng, n=512):
    """Two classes that only a defender trained at the large radius separates robustly.

    One strong pixel shows the class by ±0.15, right for 85 %; eight weak ones by ±0.05, always
    right. Attacks of radius 0.01 leave the weak pixels useful, those of radius 0.08 invert them:
    then only the strong one is worth a weight (the data of Tsipras et al. 2019, made small).
    """
    y = torch.randint(0, 2, (n,), generator=rng)
    sign = (2 * y - 1).float()
    x = 0.5 + 0.02 * (torch.rand(n, 1, 3, 3, generator=rng) - 0.5)
    right = 2 * (torch.rand(n, generator=rng) < 0.85).float() - 1
    x += 0.05 * sign.view(-1, 1, 1, 1)
    x[:, 0, 0, 0] += 0.15 * sign * right - 0.05 * sign
    return ImageSet.from_floats(x.clamp(0, 1), y, 2)


def robustness_after(player, rng, steps=250):
    data = planted(rng)
    defender = Defender(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2)), lr=0.5)
    torch.nn.init.zeros_(defender.module[1].weight)
    env = StrategySelectionVectorEnv(
        64,
        data=data,
        defender=defender,
        rules=LasAt(Linf(0.08), r2_weight=1.0, r3_weight=0.0),
        space=StrategySpace(0.08, (1, 8), (5,), (2,)),
    )
    game = StrategyGame(env, player, seed=0)
    rows = [game.step() for _ in range(steps)]
    x, y = data.floats(), data.labels
    weight = defender.module[1].weight.detach()
    away = (weight[1 - y] - weight[y]).view(-1, 1, 3, 3).sign()
    robust = defender.module(x + 0.08 * away).argmax(1) == y
    return float(robust.float().mean()), float(rows[-1]["strategy/eps"])


@pytest.mark.slow
def test_on_planted_data_the_learned_choice_makes_the_defender_robust(rng):
    """The choice of ε decides robustness here, and REINFORCE has to find the right one."""
    small, _ = robustness_after(FixedStrategy((0, 0, 0)), rng)
    large, _ = robustness_after(FixedStrategy((1, 0, 0)), rng)
    assert large > small + 0.3, "the plant must separate the two strategies"
    with seeded_init(0):
        policy, value = StrategyPolicy((1, 3, 3), (2, 1, 1)), ValueNet((1, 3, 3))
    player = Reinforce(policy, PRESETS["default"], stream(0, "policy"), value)
    learned, eps = robustness_after(player, rng)
    assert eps > 0.07, "it picks the large radius"
    assert learned > large - 0.05

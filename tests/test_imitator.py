"""The imitating policy: sb3-contrib's TRPO to the bit, equal seeds, time limits, true rewards."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from box_tasks import WHOLE
from sb3_contrib import TRPO

from advgame.errors import InputError
from advgame.games.gail import Gail
from agents.gail import GailTraining
from agents.imitator import Imitator, SubsampledTRPO
from agents.settings import PolicySettings
from agents.updaters import make_updater
from envs.imitation import ImitationVectorEnv
from envs.tasks import play

SHORT = PolicySettings(n_steps=16, value_epochs=1)


def made(seed=0, settings=SHORT, **environment):
    env = ImitationVectorEnv(8, **{"horizon": "task", **environment})
    env.reset(seed=seed)
    return env, Imitator(env, seed, settings)


def weights(imitator):
    return torch.cat([one.detach().flatten() for one in imitator.policy.parameters()])


def test_ppo_has_no_steps_that_settle():
    """It took the shrinking trust region for the divergence at which it stops an update."""
    with pytest.raises(InputError, match="settle shrinks TRPO's steps"):
        PolicySettings("ppo", settle=5)


@pytest.mark.parametrize(("algorithm", "settle"), [("trpo", 0), ("trpo", 2), ("ppo", 0)])
def test_equal_seeds_equal_bits_and_resuming_too(algorithm, settle):
    settings = PolicySettings(algorithm, n_steps=16, value_epochs=1, settle=settle)
    ends = []
    for _ in range(2):
        env, imitator = made(settings=settings)
        for _ in range(2):
            rollout = imitator.collect(env)
            imitator.learn(rollout, rollout.true_rewards)
        ends.append(weights(imitator))
    assert torch.equal(*ends)
    states = copy.deepcopy((env.state_dict(), imitator.state_dict()))
    rollout = imitator.collect(env)
    imitator.learn(rollout, rollout.rewards)
    other_env, other = made(seed=5, settings=settings)
    other_env.load_state_dict(states[0])
    other.load_state_dict(states[1])
    rollout = other.collect(other_env)
    other.learn(rollout, rollout.rewards)
    assert torch.equal(weights(other), weights(imitator))


def test_it_learns_cartpole_from_the_true_reward():
    settings = PolicySettings(n_steps=128, value_epochs=3)
    env, imitator = made(settings=settings)
    for _ in range(30):
        rollout = imitator.collect(env)
        imitator.learn(rollout, rollout.true_rewards)

    def act(raw):
        return imitator.act(env.code.observe(raw), deterministic=True)

    returns = play("CartPole-v1", act, 30, torch.Generator().manual_seed(0))["returns"]
    assert returns.mean() > 300  # a random policy stays 22 steps


def test_the_policy_does_not_see_the_scale_of_rewards():
    ends = []
    for scale in (1.0, 8.0):
        # without values to learn: those of the first update are the untrained network's
        env, imitator = made()
        torch.nn.init.zeros_(imitator.policy.value_net.weight)
        rollout = imitator.collect(env)
        imitator.learn(rollout, scale * rollout.true_rewards)
        ends.append(imitator.policy.action_net.weight.detach().clone())
    assert torch.allclose(*ends, atol=1e-5)


def test_a_time_limit_is_bootstrapped_and_an_end_is_not():
    env, imitator = made(env_id="MountainCar-v0")
    rollout = imitator.collect(env)
    shape = rollout.rewards.shape
    seen = rollout.observations[3]
    rollout.final[3] = seen
    rollout.truncated[3, 0], rollout.terminated[3, 1] = True, True
    with torch.no_grad():
        value = imitator.policy.predict_values(seen)[0, 0]
        paid = imitator._bootstrapped(rollout, torch.zeros(shape))
    expected = torch.zeros(shape)
    expected[3, 0] = imitator.settings.gamma * value
    assert torch.allclose(paid, expected)


def test_with_the_whole_batch_it_is_sb3_contribs_trpo():
    env, imitator = made(settings=PolicySettings(n_steps=16, fisher_every=1, value_epochs=1))
    rollout = imitator.collect(env)
    peer = copy.deepcopy(imitator)
    peer.algorithm.__class__ = TRPO
    for one in (imitator, peer):
        one.learn(rollout, rollout.true_rewards)
    assert isinstance(imitator.algorithm, SubsampledTRPO)
    assert torch.equal(weights(imitator), weights(peer))


def test_a_part_of_the_batch_gives_nearly_the_same_step():
    steps = []
    for every in (1, 4):
        env, imitator = made(settings=PolicySettings(n_steps=256, fisher_every=every))
        before = imitator.policy.action_net.weight.detach().clone()
        rollout = imitator.collect(env)
        stats = imitator.learn(rollout, rollout.true_rewards)
        assert 0 < stats["policy/kl"] < 0.01  # inside the trust region of the whole batch
        steps.append((imitator.policy.action_net.weight.detach() - before).flatten())
    assert torch.cosine_similarity(*steps, dim=0) > 0.8
    assert not torch.equal(*steps)


def test_steps_that_settle_are_as_short_as_they_should_be():
    """KL ≤ 0.01 / (1 + t/2)², of the policy as it was; otherwise 0.01 at every iteration."""

    def divergences(settle):
        env, imitator = made(settings=PolicySettings(n_steps=64, value_epochs=1, settle=settle))
        found = []
        for _ in range(7):
            rollout = imitator.collect(env)
            found.append(imitator.learn(rollout, rollout.true_rewards)["policy/kl"])
        return found

    settled, free = divergences(2), divergences(0)
    bounds = [0.01 / (1 + t / 2) ** 2 for t in range(7)]
    assert all(0 < kl <= bound for kl, bound in zip(settled, bounds, strict=True))
    assert settled[0] == free[0]
    assert settled[-1] > bounds[-1] / 20  # shorter, and not gone
    assert free[-1] > bounds[-1]


class Drift(gym.Env):
    """Three numbers that actions of three entries push about; paid for staying near zero."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        self.place = (0.9 * self.place + 0.1 * action).astype(np.float32)
        return self.place.copy(), float(-(self.place**2).sum()), False, False, {}


@pytest.mark.parametrize("settle", [0, 1])
def test_the_trust_region_is_of_the_whole_action(settle):
    """The divergence of three independent Gaussians is the sum of theirs, not the mean."""
    gym.register("Drift-v0", Drift, max_episode_steps=50)
    settings = PolicySettings(n_steps=32, fisher_every=1, value_epochs=1, settle=settle)
    try:
        env, imitator = made(settings=settings, env_id="Drift-v0")
    finally:
        del gym.registry["Drift-v0"]
    for t in range(2):
        rollout = imitator.collect(env)
        seen = rollout.observations.flatten(0, 1)
        with torch.no_grad():
            old = imitator.policy.get_distribution(seen).distribution
            old = torch.distributions.Normal(old.mean.clone(), old.stddev.clone())
        stats = imitator.learn(rollout, rollout.true_rewards)
        with torch.no_grad():
            new = imitator.policy.get_distribution(seen).distribution
        kl = float(torch.distributions.kl_divergence(new, old).sum(1).mean())
        bound = settings.max_kl / (1 + t * settle) ** 2
        assert bound / 3 < kl <= bound
        assert stats["policy/kl"] == pytest.approx(kl, rel=1e-4)


def test_a_task_with_one_action_has_no_entropy_to_be_judged_by():
    class Fixed(Drift):
        action_space = gym.spaces.Discrete(1)

    gym.register("Fixed-v0", Fixed, max_episode_steps=5)
    try:
        env, imitator = made(env_id="Fixed-v0")
    finally:
        del gym.registry["Fixed-v0"]
    rules = Gail(env.discriminator, torch.randn(8, env.code.pair_size))
    stats = GailTraining(env, imitator, rules, make_updater("adam", lr=None, seed=0)).step()
    assert stats["policy/entropy"] == 0
    assert "health/policy/entropy" not in stats


def test_actions_of_a_box_stay_inside():
    env = ImitationVectorEnv(2, env_id="Pendulum-v1")
    env.reset(seed=0)
    imitator = Imitator(env, 0, PolicySettings(n_steps=16, value_epochs=1))
    with torch.no_grad():
        imitator.policy.log_std.fill_(3.0)
    actions = imitator.act(env.observations, deterministic=False)
    assert actions.abs().max() <= 2
    rollout = imitator.collect(env)
    assert rollout.actions.abs().max() > 2  # the policy's own draw is what it learns from
    assert torch.equal(rollout.executed, rollout.actions.clamp(-2, 2))
    imitator.learn(rollout, rollout.rewards)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", WHOLE])
def test_the_discriminator_is_shown_what_the_environment_did(env_id):
    """A draw outside the action space is not what was paid for, and no expert ever draws one."""
    env = ImitationVectorEnv(2, env_id=env_id)
    imitator = Imitator(env, 0, PolicySettings(n_steps=16, value_epochs=1))
    with torch.no_grad():
        imitator.policy.log_std.fill_(3.0)
    shown, before = [], env.theta

    class Game:
        def step(self, theta, pairs, updater, rng):
            shown.append(pairs)
            return theta, {}

    played = []
    collect = imitator.collect
    imitator.collect = lambda env: played.append(collect(env)) or played[-1]
    GailTraining(env, imitator, Game(), make_updater("adam", lr=None, seed=0)).step()
    assert played[0].actions.abs().max() > 2
    paid = env.discriminator.logits(before, shown[0]).detach().view(16, 2)
    torch.testing.assert_close(paid, played[0].rewards)
    if env_id == WHOLE:  # the task rounds, and the expert's actions are whole
        assert torch.equal(played[0].executed, played[0].executed.round())


@pytest.mark.parametrize("algorithm", ["trpo", "ppo"])
def test_a_draw_of_a_box_of_integers_keeps_its_likelihood(algorithm):
    """The policy learns from what it drew, 0.7, and not from a 0 that SB3's buffer makes of it."""
    settings = PolicySettings(algorithm, n_steps=16, value_epochs=1)
    env, imitator = made(settings=settings, env_id=WHOLE)
    rollout = imitator.collect(env)
    imitator.learn(rollout, rollout.rewards)
    found = torch.as_tensor(imitator.algorithm.rollout_buffer.actions)
    # the buffer is flattened row by row while the policy learns
    assert torch.equal(found.view(8, 16, 2).transpose(0, 1), rollout.actions)


def test_the_global_streams_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    env, imitator = made()
    rollout = imitator.collect(env)
    imitator.learn(rollout, rollout.rewards)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_short_way_to_the_most_likely_action_is_sb3s():
    env, imitator = made()
    short = imitator.act(env.observations, deterministic=True)
    long = imitator.policy.get_distribution(env.observations).get_actions(deterministic=True)
    assert torch.equal(short, long)


def test_advantages_by_the_definition():
    """Generalised advantage estimation, written out: it stops at ends and at time limits."""
    env, imitator = made()
    rollout = imitator.collect(env)
    steps, rows = rollout.rewards.shape
    rollout.terminated[4, 0], rollout.truncated[9, 1] = True, True
    rollout.final[9] = rollout.observations[0]
    gamma, lam = imitator.settings.gamma, imitator.settings.gae_lambda
    with torch.no_grad():
        value = imitator.policy.predict_values(rollout.observations.flatten(0, 1))
        value = value.view(steps, rows)
        after = torch.cat([value[1:], imitator.policy.predict_values(rollout.last).T])
        after[9, 1] = imitator.policy.predict_values(rollout.final[9])[1, 0]
    imitator.learn(rollout, rollout.rewards)
    expected, running = torch.zeros(steps, rows), torch.zeros(rows)
    for t in reversed(range(steps)):
        error = (1 - gamma) * rollout.rewards[t] - value[t]
        error = error + gamma * torch.where(rollout.terminated[t], 0.0, after[t])
        goes_on = ~(rollout.terminated[t] | rollout.truncated[t])
        running = error + gamma * lam * torch.where(goes_on, running, 0.0)
        expected[t] = running
    found = torch.as_tensor(imitator.algorithm.rollout_buffer.advantages)
    # the buffer is flattened row by row while the policy learns
    assert torch.allclose(found.view(rows, steps).T, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"algorithm": "sac"}, "trpo or ppo"),
        ({"gamma": 1.0}, "1 - gamma"),  # would pay nothing
        ({"gamma": -0.1}, "gamma in"),
        ({"gae_lambda": 1.1}, "gae_lambda in"),
        ({"n_steps": 0}, "n_steps"),
        ({"hidden": (64, 0)}, "hidden"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"value_lr": float("nan")}, "value_lr"),
        ({"settle": -1}, "settle"),
        ({"cg_damping": -0.1}, "cg_damping"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        PolicySettings(**settings)


def test_equal_returns_have_no_variance_to_explain():
    env, imitator = made(horizon="fixed")
    torch.nn.init.zeros_(imitator.policy.value_net.weight)
    rollout = imitator.collect(env)
    stats = imitator.learn(rollout, torch.zeros_like(rollout.rewards))
    assert "policy/explained_variance" not in stats
    assert "policy/kl" in stats

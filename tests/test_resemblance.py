"""How far a policy is from the expert, against clouds whose distance is known."""

import pytest
import torch
from torch.nn import functional as F

from advgame.errors import InputError
from advgame.imitation.discriminator import CHANCE_LOSS
from advgame.imitation.resemblance import held_out_discriminator
from agents.resemblance import _episodes
from envs.imitation import ImitationVectorEnv


def episodes(rng, mean, count=8, n=200):
    return [torch.randn(n, 2, generator=rng) + mean for _ in range(count)]


def bayes_loss(distance):
    """Of the optimal discriminator between two normal clouds, whose logit is linear."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(7)).double()
    logit = distance * (x - distance / 2)  # of a pair of the low side, whose mean is 0
    return float(2 * F.softplus(logit).mean())


@pytest.mark.slow
def test_equals_cannot_be_told_apart(rng):
    found = held_out_discriminator(episodes(rng, 0.0), episodes(rng, 0.0))
    assert found["loss"] == pytest.approx(CHANCE_LOSS, abs=0.05)
    assert found["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert found["divergence"] == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("distance", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_two_normal_clouds_are_as_far_apart_as_they_are(rng, distance):
    shift = torch.tensor([distance, 0.0])
    found = held_out_discriminator(episodes(rng, 0.0), episodes(rng, shift))
    assert found["loss"] == pytest.approx(bayes_loss(distance), abs=0.06)
    assert found["divergence"] == pytest.approx(1 - found["loss"] / CHANCE_LOSS)


def test_what_holds_in_one_episode_only_is_not_learned(rng):
    """Every episode has a place of its own: nothing that was learned of some helps with others."""
    far = [one + 5 * torch.randn(2, generator=rng) for one in episodes(rng, 0.0, 40, 20)]
    found = held_out_discriminator(far[::2], far[1::2])
    assert found["loss"] > CHANCE_LOSS - 0.1


def test_equal_seeds_equal_bits(rng):
    one, other = episodes(rng, 0.0, 4, 40), episodes(rng, 1.0, 4, 40)
    found = [held_out_discriminator(one, other, seed=seed, steps=100) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_the_policy_plays_in_the_environment_that_it_was_given():
    """Its scale and its time limit are those that the policy has learned in."""
    env = ImitationVectorEnv(2, scale=(torch.zeros(4), torch.full((4,), 0.1)), max_episode_steps=30)
    seen = []

    class Rocking:
        def act(self, observations, *, deterministic):
            seen.append(observations)
            return torch.full((len(observations),), len(seen) % 2)

    played = _episodes(env, Rocking(), 3, seed=0, deterministic=True)
    assert [len(one) for one in played] == [30, 30, 30]
    assert 0.1 < seen[0].abs().max() <= 0.5  # CartPole begins within 0.05


def test_too_few_episodes(rng):
    with pytest.raises(InputError, match="needs 4 episodes of each side, not 3 of the policy"):
        held_out_discriminator(episodes(rng, 0.0, 3), episodes(rng, 0.0, 4))

"""`examples/gail.py`, written from the papers, against the library's game; and its number."""

import pytest
import torch
from conftest import load_example
from stable_baselines3.common.vec_env import DummyVecEnv

from advgame.games.gail import Gail
from advgame.imitation.discriminator import Discriminator
from agents.coordinatewise import CoordinatewiseUpdater
from envs.imitation import ImitationVectorEnv

gail = load_example("gail")

EQUAL = {"rtol": 1e-9, "atol": 1e-12}


def played(rng):
    """Pairs of some policy (50, 7), a third of them absorbing."""
    over = (torch.rand(50, 1, generator=rng) < 1 / 3).double()
    seen = torch.randn(50, 4, generator=rng, dtype=torch.float64)
    actions = torch.randint(2, (50,), generator=rng)
    return gail.pairs(torch.cat([(1 - over) * seen, over], 1), actions)


@pytest.mark.parametrize("untrained", [True, False])
def test_three_steps_of_discriminator_and_updater_are_the_librarys(untrained):
    rng = torch.Generator().manual_seed(0)
    discriminator = Discriminator(7)
    theta = discriminator.init(rng).double()
    updater = CoordinatewiseUpdater(seed=0)
    weights = updater.network.state_dict()
    if not untrained:  # all of U's weights then matter from the first step on
        weights["head.weight"] = torch.randn(2, 32, generator=rng)
        weights["head.bias"] = torch.randn(2, generator=rng)
    updater.load_network(weights)
    updater.init(theta)
    expert = gail.demonstrations().double()
    game = Gail(discriminator, expert)

    own, mine = theta.clone(), gail.Updater(len(theta)).double()
    mine.load_state_dict(weights)
    for _ in range(3):
        policy = played(rng)
        twin = torch.Generator().set_state(rng.get_state())
        chosen = expert[torch.randint(len(expert), (len(policy),), generator=twin)]
        theta, _ = game.step(theta, policy, updater, rng)
        own, _ = gail.discriminator_step(own, mine, policy, chosen)
        torch.testing.assert_close(own, theta, **EQUAL)

    state = updater.saved()
    assert state["steps"] == mine.t == 3
    torch.testing.assert_close(mine.momenta, state["momenta"], **EQUAL)
    torch.testing.assert_close(mine.square, state["square"], **EQUAL)
    for name, weight in mine.state_dict().items():
        torch.testing.assert_close(weight, state["network"][name], **EQUAL)
        assert not torch.equal(weight, weights[name].double()), f"{name} has learned"
    moments = mine.adam.state_dict()["state"]
    assert moments.keys() == state["adam"].keys()
    for place, ours in moments.items():
        for name, value in ours.items():
            torch.testing.assert_close(value, state["adam"][place][name], **EQUAL)


def test_the_experts_pairs_are_the_librarys():
    env = ImitationVectorEnv(1)
    theirs = env.expert_pairs(env.demonstrations, torch.Generator())
    assert torch.equal(gail.demonstrations(), theirs)


def test_episodes_and_pay_are_the_librarys():
    theta = gail.first_theta()
    rows = DummyVecEnv([gail.Absorbing, lambda: gail.Absorbing(250)])
    own = gail.PaidByDiscriminator(rows, theta)
    library = ImitationVectorEnv(2, theta=theta, stagger=True)
    rows.seed(0)
    seen = torch.as_tensor(own.reset())
    library.reset(seed=0)
    place = library.state_dict()
    place["task"]["state"] = torch.stack([torch.tensor(e.unwrapped.state) for e in rows.envs])
    library.load_state_dict(place)
    for step in range(500):
        live = slice(2 if step < 250 else 1)  # the second row begins anew, each its own way
        torch.testing.assert_close(seen[live], library.observations[live], rtol=1e-4, atol=1e-5)
        # balanced for a while, then pushed over
        actions = (seen[:, 2] + seen[:, 3] > 0).long() if step < 100 else torch.ones(2).long()
        seen, reward, done, infos = own.step(actions.numpy())
        seen = torch.as_tensor(seen)
        _, paid, terminated, truncated, _ = library.step(actions)
        assert not terminated.any()
        assert torch.equal(torch.as_tensor(done)[live], truncated[live])
        reward = torch.as_tensor(reward) / (1 - gail.GAMMA)
        torch.testing.assert_close(reward[live], paid[live], rtol=1e-4, atol=1e-5)
        if step == 249:
            assert done[1]
            assert infos[1]["TimeLimit.truncated"], "no end: its value is bootstrapped"
            assert infos[1]["terminal_observation"][4] == 1, "it had fallen"
    assert done[0]


@pytest.mark.slow
def test_its_number():
    assert gail.main() > 450

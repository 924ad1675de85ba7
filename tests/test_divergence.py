"""Training whose numbers are no longer finite says so, whoever of the players it is."""

from dataclasses import replace

import pytest
import torch
from conftest import seeded
from equal_runs import SMALL
from gymnasium import spaces
from train_las_at import Config, job

from advgame.errors import InputError
from agents.policies import FeaturePolicy, StrategyPolicy, sample
from agents.reinforce import Reinforce
from agents.sb3 import PPOPlayer


def small(folder, **changes):
    return replace(Config(), **{**SMALL, "runs_dir": str(folder), "name": "one", **changes})


@pytest.mark.parametrize("agent", ["reinforce", "ppo", "random"])
def test_a_rate_out_of_all_measure_is_told_and_not_a_traceback(agent, tmp_path):
    """The policy is the first to fail: its rewards are NaN."""
    with pytest.raises(InputError, match="training diverged") as told:
        job.run(small(tmp_path, agent=agent, lr=1e30, schedule="constant"))
    assert "lower" in str(told.value)
    if agent != "random":  # which nothing stops before the end of an epoch
        assert "diverged at step" in str(told.value)
        assert "defender." in str(told.value), "who it was"


def test_a_policy_that_diverges_alone_is_named_and_what_was_saved_stays(tmp_path, monkeypatch):
    played, real = iter(range(1, 1000)), Reinforce.act

    def act(self, images, *, learn):
        if next(played) == 8:  # of 6 steps an epoch
            with torch.no_grad():
                self.policy.heads[0].bias.fill_(torch.inf)
        return real(self, images, learn=learn)

    monkeypatch.setattr(Reinforce, "act", act)
    with pytest.raises(InputError, match=r"diverged at step 8: player\.policy\.heads\.0\.bias"):
        job.run(small(tmp_path, agent="reinforce"))
    kept = sorted(one.name for one in (tmp_path / "one" / "checkpoints").iterdir())
    assert kept == ["best.safetensors", "step_00000000", "step_00000006"]


def test_policies_without_probabilities(digits):
    images = digits.train.floats(slice(4))
    policy = StrategyPolicy((1, 8, 8), (3, 2))
    features = FeaturePolicy(5, (3, 2))
    for module in (policy, features):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
    for logits in (policy(images), features(torch.zeros(4, 5))):
        with pytest.raises(InputError, match="the policy has diverged"):
            sample(logits, seeded())
    player = PPOPlayer((1, 8, 8), (3, 2), 4, seed=0)
    assert isinstance(player.algorithm.action_space, spaces.MultiDiscrete)
    with torch.no_grad():
        player.policy.action_net.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="the policy has diverged"):
        player.act(images, learn=True)

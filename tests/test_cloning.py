"""Behaviour cloning: planted policies, the split, the snapshot, chance."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from stable_baselines3.common.policies import ActorCriticPolicy

from advgame.errors import InputError
from advgame.seeding import seeded_init
from agents.cloning import clone


def policy(inputs=4, actions=2, arch=(64, 32), seed=0):
    box = spaces.Box(-np.inf, np.inf, (inputs,), np.float32)
    space = spaces.Discrete(actions) if isinstance(actions, int) else actions
    with seeded_init(seed):
        return ActorCriticPolicy(box, space, lambda _: 1e-3, net_arch=list(arch))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(count, seed=0):
    """Observations and the actions of a policy that looks at the sign of one projection."""
    x = torch.randn(count, 4, generator=rng(seed))
    return x, (x @ torch.tensor([1.0, -0.5, 0.25, 2.0]) > 0).long()


def spied(student, monkeypatch):
    """Every batch that the student is asked about: (learning, observations, loss)."""
    asked, evaluate = [], student.evaluate_actions

    def spy(observations, actions):
        answer = evaluate(observations, actions)
        loss = -answer[1].mean().item()
        asked.append((torch.is_grad_enabled(), observations, actions, loss))
        return answer

    monkeypatch.setattr(student, "evaluate_actions", spy)
    return asked


@pytest.mark.slow
def test_it_learns_a_linear_policy():
    student = policy()
    stats = clone(student, *linear(2000), rng())
    x, wanted = linear(5000, seed=1)
    chosen = student._predict(x, deterministic=True)
    assert (chosen == wanted).float().mean() > 0.95
    assert stats["bc/train_loss"] < 0.1


def test_it_finds_the_maximum_of_the_likelihood():
    """A policy without hidden layers is logistic regression."""
    x = torch.randn(20000, 4, generator=rng())
    chance = torch.sigmoid(x @ torch.tensor([1.0, -0.5, 0.25, 2.0]) - 0.5)
    taken = (torch.rand(20000, generator=rng(1)) < chance).long()
    student = policy(arch=())
    clone(student, x, taken, rng(), batch_size=1000, lr=2e-2)
    reference = LogisticRegression(C=1e6).fit(x.numpy(), taken.numpy())
    best = log_loss(taken.numpy(), reference.predict_proba(x.numpy()))
    with torch.no_grad():
        found = -student.evaluate_actions(x, taken)[1].mean().item()
    assert best <= found + 1e-5
    assert found < best + 2e-3


def test_it_learns_continuous_actions():
    x = torch.randn(1500, 4, generator=rng())
    weight = torch.tensor([[0.5, -0.3], [0.2, 0.1], [0.0, 0.4], [-0.6, 0.2]])
    student = policy(actions=spaces.Box(-1, 1, (2,), np.float32))
    clone(student, x, x @ weight, rng(), lr=3e-3)
    fresh = torch.randn(500, 4, generator=rng(1))
    error = student._predict(fresh, deterministic=True) - fresh @ weight
    assert error.abs().mean() < 0.1


def test_it_ends_with_the_best_snapshot_and_says_which(monkeypatch):
    """A third of the actions are noise: the validation loss falls, then rises again."""
    x, wanted = linear(60)
    noisy = torch.where(torch.rand(60, generator=rng(1)) < 1 / 3, 1 - wanted, wanted)
    student = policy()
    asked = spied(student, monkeypatch)
    stats = clone(student, x, noisy, rng(), iterations=300, lr=1e-2)
    *checks, last = [one for one in asked if not one[0]]
    _, held_out, actions, _ = checks[0]
    assert len(held_out) == 18
    losses = [loss for *_, loss in checks]
    best = losses.index(min(losses))
    assert len(losses) == 301
    assert 0 < best < 300, "the best snapshot is an end: the test says nothing"
    assert losses[-1] > 1.5 * min(losses), "it did not overfit: the test says nothing"
    assert stats["bc/validation_loss"] == pytest.approx(min(losses))
    assert stats["bc/best_iteration"] == best
    with torch.no_grad():
        now = -student.evaluate_actions(held_out, actions)[1].mean().item()
    assert now == pytest.approx(min(losses))
    assert len(last[1]) == 42
    assert stats["bc/train_loss"] == pytest.approx(last[3])


@pytest.mark.parametrize(
    ("lengths", "whole"), [(None, False), ([200], False), ([20] * 10, True), ([150, 50], True)]
)
def test_trajectories_are_held_out_whole_where_there_are_two(lengths, whole, monkeypatch):
    sizes = torch.tensor(lengths or [20] * 10)
    x, taken = linear(200)
    x[:, 0] = torch.arange(len(sizes)).repeat_interleave(sizes)  # the trajectory, where it shows
    x[:, 1] = torch.arange(200)  # the transition
    student = policy()
    asked = spied(student, monkeypatch)
    given = None if lengths is None else sizes
    clone(student, x, taken, rng(), lengths=given, iterations=40)
    held_out = next(seen for learns, seen, _, _ in asked if not learns)
    learnt = torch.cat([seen for learns, seen, _, _ in asked if learns])
    assert not set(held_out[:, 1].tolist()) & set(learnt[:, 1].tolist())
    everything = set(held_out[:, 1].tolist()) | set(learnt[:, 1].tolist())
    assert everything == set(range(200))
    apart = not set(held_out[:, 0].tolist()) & set(learnt[:, 0].tolist())
    assert apart == whole
    expected = {50, 150} if lengths == [150, 50] else {60}
    assert len(held_out) in expected


def test_equal_seeds_learn_equal_bits_and_leave_the_rest_alone():
    x, taken = linear(200)
    students = [policy() for _ in range(3)]
    values = {k: v.clone() for k, v in students[0].state_dict().items() if "value" in k}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stats = [
        clone(student, x, taken, rng(seed), iterations=50)
        for student, seed in zip(students, (0, 0, 1), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert stats[0] == stats[1] != stats[2]
    one, same, other = (student.state_dict() for student in students)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert values
    assert all(torch.equal(one[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"observations": torch.zeros(1, 4), "actions": torch.zeros(1).long()}, "2 or more"),
        ({"actions": torch.zeros(7).long()}, "as many actions"),
        ({"observations": torch.full((8, 4), torch.nan)}, "NaN"),
        ({"lengths": torch.tensor([4, 5])}, "lengths"),
        ({"lengths": torch.tensor([0, 8])}, "lengths"),
        ({"iterations": 0}, "iterations"),
        ({"batch_size": 0}, "batch_size"),
        ({"held_out": 0}, "held_out"),
        ({"held_out": 1}, "held_out"),
        ({"lr": 0}, "lr"),
    ],
)
def test_what_cannot_be_cloned_is_refused(change, answer):
    student = policy()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    data = dict(zip(("observations", "actions"), linear(8), strict=True))
    with pytest.raises(InputError, match=answer):
        clone(student, **{**data, "rng": rng(), **change})
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())

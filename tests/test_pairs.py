"""State-action pairs: shifts and scales, absorbing states, horizons, subsampling."""

from dataclasses import replace

import pytest
import torch

from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations
from advgame.imitation.pairs import PairCode


def code(absorbing=False, choices=3):
    return PairCode(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5]), choices, 3, absorbing)


@pytest.fixture
def demonstrations():
    """Two trajectories: 4 steps to the end of the task, 6 up to the time limit."""
    observations = torch.arange(20.0).view(10, 2)
    return Demonstrations(
        observations,
        torch.arange(10) % 3,
        torch.tensor([4, 6]),
        torch.tensor([4.0, 6.0], dtype=torch.float64),
        torch.tensor([True, False]),
        "Toy-v0",
    )


def test_observations_are_shifted_and_scaled():
    assert torch.equal(code().observe(torch.tensor([[3.0, 1.0]])), torch.tensor([[1.0, 2.0]]))
    over = torch.tensor([False, True])
    seen = code(absorbing=True).observe(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), over)
    assert seen.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]


def test_an_absorbing_pair_tells_nothing_but_that_it_is_one():
    one = code(absorbing=True)
    seen = one.observe(torch.randn(2, 2), torch.tensor([True, True]))
    pairs = one.pairs(seen, torch.tensor([0, 2]))
    assert pairs.tolist() == [[0, 0, 1, 0, 0, 0]] * 2


def test_actions_of_a_box_are_kept():
    one = code(choices=0)
    pairs = one.pairs(torch.zeros(1, 2), torch.tensor([[0.1, -0.2, 0.3]]))
    assert torch.allclose(pairs, torch.tensor([[0, 0, 0.1, -0.2, 0.3]]))


def test_expert_pairs_as_long_as_the_horizon(demonstrations, rng):
    plain = code().expert_pairs(demonstrations, 6, 1, rng)
    assert plain.shape == (10, 5)
    padded = code(absorbing=True).expert_pairs(demonstrations, 6, 1, rng)
    assert padded.shape == (12, 6)
    # the trajectory that the task ended rests in the absorbing state, the other one does not
    assert padded[:, 2].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_subsampling_keeps_every_kth_from_a_random_start(demonstrations):
    whole = code().expert_pairs(demonstrations, 6, 1, torch.Generator())
    starts = set()
    for seed in range(20):
        kept = code().expert_pairs(demonstrations, 6, 2, torch.Generator().manual_seed(seed))
        assert len(kept) == 5
        first = int((whole == kept[0]).all(1).nonzero()[0])
        starts.add(first)
        assert torch.equal(kept[:2], whole[first:4:2])
    assert starts == {0, 1}


def test_demonstrations_of_another_task_are_refused(demonstrations, rng):
    with pytest.raises(InputError, match="another task"):
        PairCode(torch.zeros(3), torch.ones(3), 3, 3, False).expert_pairs(demonstrations, 6, 1, rng)
    with pytest.raises(InputError, match="trajectory 0 has 4"):
        code().expert_pairs(demonstrations, 6, 5, rng)


@pytest.mark.parametrize("absorbing", [False, True])
def test_a_shorter_horizon_cuts_trajectories_off(absorbing, demonstrations, rng):
    whole = code(absorbing).expert_pairs(demonstrations, 6, 1, rng)
    cut = code(absorbing).expert_pairs(demonstrations, 3, 1, rng)
    second = 6 if absorbing else 4
    assert torch.equal(cut, torch.cat([whole[:3], whole[second : second + 3]]))


def test_choices_that_the_task_has_not_are_named(demonstrations, rng):
    others = replace(demonstrations, actions=demonstrations.actions + 1)
    with pytest.raises(InputError, match="actions from 1 to 3: this task has choices from 0 to 2"):
        code().expert_pairs(others, 6, 1, rng)


def test_cloning_sees_the_same_part_without_the_absorbing_state(demonstrations):
    one = code(absorbing=True)
    seen, actions, lengths = one.expert_steps(demonstrations, 1, torch.Generator())
    assert lengths.tolist() == [4, 6]
    assert torch.equal(actions, demonstrations.actions)
    assert not seen[:, -1].any()
    seen, actions, lengths = one.expert_steps(demonstrations, 2, torch.Generator().manual_seed(1))
    assert lengths.tolist() == [2, 3]
    assert len(seen) == len(actions) == 5

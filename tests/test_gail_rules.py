"""GAIL's discriminator step with every updater: it learns, equal bits, its terms by hand."""

import pytest
import torch

from advgame.errors import InputError
from advgame.games import gail
from advgame.games.gail import Gail
from advgame.imitation.discriminator import CHANCE_LOSS, Discriminator, gradient_penalty
from agents.updaters import AdamUpdater, make_updater


@pytest.fixture
def sides(rng):
    """Two clouds of pairs that a line tells apart."""
    return torch.randn(400, 3, generator=rng) - 1.5, torch.randn(300, 3, generator=rng) + 1.5


def played(game, policy, updater, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    theta = game.discriminator.init(torch.Generator().manual_seed(1))
    updater.init(theta)
    stats = []
    for _ in range(steps):
        theta, one = game.step(theta, policy, updater, rng)
        stats.append(one)
    return theta, stats


@pytest.mark.parametrize("name", ["adam", "coordinatewise", "mlp-narrow"])
def test_the_discriminator_learns_to_tell_them_apart(sides, name):
    policy, expert = sides
    game = Gail(Discriminator(3, (16, 8)), expert)
    options = {"lr": 1e-4} if name == "mlp-narrow" else {"lr": None}
    updater = make_updater(name, seed=0, blocks=game.discriminator.blocks, **options)
    _, stats = played(game, policy, updater, 150)
    assert stats[0]["discriminator/loss"] == pytest.approx(CHANCE_LOSS, abs=0.3)
    assert stats[-1]["discriminator/loss"] < 0.3
    assert stats[-1]["discriminator/accuracy_policy"] > 0.95
    assert stats[-1]["discriminator/accuracy_expert"] > 0.95
    # the expert's side is the high one
    assert (
        stats[-1]["discriminator/logit_expert"] > 1 > -1 > stats[-1]["discriminator/logit_policy"]
    )


def test_nothing_can_tell_equals_apart(sides):
    same = sides[0]
    _, stats = played(Gail(Discriminator(3, (16,)), same), same, AdamUpdater(0.01), 200)
    assert stats[-1]["discriminator/loss"] == pytest.approx(CHANCE_LOSS, abs=0.02)


def test_equal_seeds_equal_bits(sides):
    policy, expert = sides
    game = Gail(Discriminator(3, (8,)), expert, penalty=1.0, steps=2)
    ends = [played(game, policy, AdamUpdater(0.01), 5, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])  # other expert pairs were drawn


def test_the_objective_is_the_sum_of_its_terms(sides, rng):
    policy, expert = sides
    one = Discriminator(3, (8,))
    theta, mix = one.init(rng), torch.rand(300, 1, generator=rng)
    plain = Gail(one, expert, entropy=0.0)
    with_terms = Gail(one, expert, entropy=0.5, penalty=2.0, penalty_target=0.0)
    base = plain.objective(policy, expert, mix)(theta)
    full = with_terms.objective(policy, expert, mix)(theta)
    both = torch.cat([policy, expert])
    p = one.logits(theta, both).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    between = (mix * policy[:300] + (1 - mix) * expert).requires_grad_()
    (slope,) = torch.autograd.grad(one.logits(theta, between).sum(), between)
    expected = base - 0.5 * entropy + 2.0 * slope.square().sum(1).mean()
    assert float(full) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("all_expert", [False, True])
def test_every_expert_pair_is_penalised_in_time(all_expert, monkeypatch):
    expert, policy = torch.arange(1, 41.0)[:, None], torch.zeros(8, 1)
    seen = []

    def watched(discriminator, theta, between, target):
        seen.append(between)
        return gradient_penalty(discriminator, theta, between, target)

    monkeypatch.setattr(gail, "gradient_penalty", watched)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))  # at the expert's pair
    game = Gail(Discriminator(1, (2,)), expert, penalty=1.0, steps=40, all_expert=all_expert)
    played(game, policy, AdamUpdater(0.01), 1)
    assert len(seen) == 40
    assert {*torch.cat(seen).flatten().tolist()} == {*expert.flatten().tolist()}


def test_the_penalty_flattens_the_discriminator(sides):
    policy, expert = sides
    gaps = []
    for penalty in (0.0, 5.0):
        game = Gail(Discriminator(3, (16,)), expert, penalty=penalty, penalty_target=0.0)
        _, stats = played(game, policy, AdamUpdater(0.01), 200)
        gaps.append(
            stats[-1]["discriminator/logit_expert"] - stats[-1]["discriminator/logit_policy"]
        )
    assert gaps[1] < 0.5 * gaps[0]


def test_the_controller_is_half_the_square_of_d_less_a_half(sides, rng):
    policy, expert = sides
    one = Discriminator(3, (8,))
    theta, mix = one.init(rng), torch.rand(300, 1, generator=rng)
    plain = Gail(one, expert).objective(policy, expert, mix)(theta)
    controlled = Gail(one, expert, controller=3.0).objective(policy, expert, mix)(theta)
    terms = [(one.logits(theta, side).sigmoid() - 0.5).square().mean() / 2 for side in sides]
    assert float(controlled - plain) == pytest.approx(3 * float(sum(terms)), rel=1e-4)


def test_the_controller_draws_the_discriminator_to_a_half(sides):
    policy, expert = sides
    gaps = []
    for weight in (0.0, 10.0, 100.0):
        game = Gail(Discriminator(3, (16,)), expert, controller=weight)
        theta, _ = played(game, policy, AdamUpdater(0.01), 200)
        gaps.append(float((game.discriminator.logits(theta, expert).sigmoid() - 0.5).mean()))
    assert gaps[0] > 0.4
    # stationary where 1 - D = k (D - 1/2) D (1 - D) on the expert's side
    assert gaps[1] == pytest.approx(0.1708, abs=0.03)
    assert abs(gaps[2]) < 0.03


def test_divergence_is_said(sides):
    policy, expert = sides
    game = Gail(Discriminator(3, (8,)), expert)

    class Exploding(AdamUpdater):
        def update(self, params, objective):
            found = super().update(params, objective)
            return type(found)(found.params * float("inf"), found.loss, found.grad, found.stats)

    with pytest.raises(FloatingPointError, match="diverged"):
        played(game, policy, Exploding(0.01), 1)


def test_what_an_updater_says_replaces_nothing_of_the_games(sides):
    class Talking(AdamUpdater):
        def step(self, params, grad, objective):
            said = {"discriminator/loss": -1, "health/updater/step": -1, "updater/mine": -1}
            return super().step(params, grad, objective)[0], said

    policy, expert = sides
    game = Gail(Discriminator(3, (8,)), expert)
    updaters = Talking(0.01), AdamUpdater(0.01)
    (stats,), (silent,) = (played(game, policy, one, 1)[1] for one in updaters)
    assert stats == {**silent, "updater/mine": -1}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"penalty": -1.0}])
def test_refusals(sides, wrong):
    with pytest.raises(InputError, match=r"steps must be 1 .* penalty.* 0 or above"):
        Gail(Discriminator(3), sides[1], **wrong)

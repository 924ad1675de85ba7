"""A training by counted passes: it ends where they are spent, and its schedules follow them."""

from dataclasses import replace

import pytest
import torch
from equal_runs import assert_equal_metrics, weights
from test_callbacks import STEPS, Told, trainer
from torch.optim.lr_scheduler import OneCycleLR

from advgame import Defender, InputError, Linf, TrainingPlan
from advgame.attacks import pgd
from advgame.classifiers import SmallCNN
from advgame.defender import TICKS
from advgame.games import AdversarialTraining, AWPDefender, DefenderTraining
from advgame.run.folder import Metrics
from advgame.run.loop import COSTS

PRICE = 5 / STEPS  # FGSM-AT costs 5 forwards per image and epoch


class Costly:
    """Makes each step of a training's game cost something else, and notes what the game is told."""

    def __init__(self, one, monkeypatch, costs):
        self.shares, self.rates, real, left = [], [], one.game.step, iter(costs)

        def step():
            self.shares.append(one.game.defender.spent)
            self.rates.append(one.game.defender.optimizer.param_groups[0]["lr"])
            made = dict(zip(COSTS, (next(left), 0, 0), strict=True))
            return {**real(), **{kind: torch.tensor(float(n)) for kind, n in made.items()}}

        monkeypatch.setattr(one.game, "step", step)


def test_a_budget_of_whole_epochs_is_that_many_epochs(tmp_path, digits):
    one = trainer(tmp_path / "one", digits, plan=TrainingPlan(1, budget=15))
    one.fit()
    assert (one.step, one.epoch, one.spent) == (3 * STEPS, 3, pytest.approx(15))
    rows = Metrics.read(one.run.path / "metrics.csv")
    assert [row["cost/spent"] for row in rows] == pytest.approx([5, 10, 15])
    whole = trainer(tmp_path / "two", digits, plan=TrainingPlan(3))
    whole.fit()
    rates = [
        [row["defender/lr"] for row in Metrics.read(run.run.path / "metrics.csv")]
        for run in (one, whole)
    ]
    # one shape, but for where a step's length puts its peak
    assert rates[0] == pytest.approx(rates[1], rel=0.2, abs=1e-3)


def test_passes_cost_what_they_are_said_to(tmp_path, digits):
    """FGSM-AT: two forwards, an input-backward, a backward with weights."""
    plan = TrainingPlan(1, budget=2 + 1.5 + 4, prices=(1.5, 4))
    one = trainer(tmp_path / "run", digits, plan=plan)
    one.fit()
    assert (one.step, one.spent) == (STEPS, pytest.approx(7.5))


@pytest.mark.parametrize(("budget", "steps"), [(PRICE, 1), (1.4 * PRICE, 1), (5.6 * PRICE, 6)])
def test_it_ends_at_the_step_that_comes_nearest(tmp_path, digits, budget, steps):
    one = trainer(tmp_path / "run", digits, plan=TrainingPlan(1, budget=budget, validate_every=9))
    one.fit()
    assert one.step == steps
    rows = Metrics.read(one.run.path / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, 1 + -(-steps // STEPS)))
    assert "eval/robust" in rows[-1], "the last epoch is validated, though it is not whole"


def test_the_learning_rate_follows_the_share_that_is_spent(tmp_path, digits, monkeypatch):
    plan = TrainingPlan(1, budget=20)
    one, costs = trainer(tmp_path / "run", digits, plan=plan), [4, 4, 12, 20, 4, 16, 20]
    peer = OneCycleLR(torch.optim.SGD(SmallCNN((1, 8, 8), 2).parameters(), 0.1), 0.1, TICKS + 1)
    curve = [peer.get_last_lr()[0]]
    peer.optimizer.step()
    for _ in range(TICKS):
        peer.step()
        curve.append(peer.get_last_lr()[0])
    seen = Costly(one, monkeypatch, costs)
    one.fit()
    assert one.step == len(costs)
    assert one.spent == 20
    shares = [sum(costs[:k]) / 80 for k in range(len(costs))]
    assert seen.shares == pytest.approx(shares)
    assert seen.rates == pytest.approx([curve[round(share * TICKS)] for share in shares])
    assert one.scheduler.get_last_lr()[0] == pytest.approx(curve[-1])


def test_resumed_within_an_epoch_it_spends_the_same(tmp_path, digits, monkeypatch):
    plan, costs = TrainingPlan(1, budget=20), [4, 4, 12, 20, 4, 16, 20]
    whole = trainer(tmp_path / "whole", digits, plan=plan)
    Costly(whole, monkeypatch, costs)
    whole.fit()
    enough = Told(step3=lambda: False)
    first = trainer(tmp_path / "cut", digits, enough, plan=plan)
    Costly(first, monkeypatch, costs)
    first.fit()
    assert first.step == 3
    second = trainer(tmp_path / "cut", digits, Told(), plan=plan)
    seen = Costly(second, monkeypatch, costs[3:])
    second.fit(resume=True)
    assert seen.shares[0] == 0.25
    one, two = weights(whole.run.path), weights(second.run.path)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert second.spent == whole.spent
    assert_equal_metrics(whole.run.path, second.run.path)


def test_eps_and_weight_perturbation_follow_it_too(digits):
    scales = []

    class Scales(AdversarialTraining):
        def step(self, defender, x, y, rng, *, scale=1.0):
            scales.append(scale)
            return super().step(defender, x, y, rng, scale=scale)

    defender = AWPDefender(SmallCNN((1, 8, 8), 10), 0.01, TICKS // 2)
    rules = Scales(Linf(0.1), lambda ball: pgd(ball, 2))
    game = DefenderTraining(rules, defender, digits.train, 16, 0, ramp_steps=TICKS // 4)
    descents = []
    for defender.spent in (0.0, 0.1, 0.2, 0.3, 0.45, 0.55):
        game.step()
        descents.append(defender.descents)
    assert scales == pytest.approx([0, 0.4, 0.8, 1, 1, 1], abs=1e-3)
    assert descents == [1, 1, 1, 1, 1, 2]
    assert Defender(SmallCNN((1, 8, 8), 10)).clock(7) == 7


def test_a_game_that_counts_nothing_is_told_so(tmp_path, digits, monkeypatch):
    one = trainer(tmp_path / "run", digits, plan=TrainingPlan(1, budget=20))
    monkeypatch.setattr(one.game, "step", lambda: {})
    with pytest.raises(InputError, match="does not count"):
        one.fit()
    for budget in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="budget"):
            replace(TrainingPlan(1), budget=budget)
        with pytest.raises(InputError, match="prices"):
            replace(TrainingPlan(1), prices=(1.0, budget))

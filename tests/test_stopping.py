"""Rules that end an attack, image by image: what they do, what they cost, what is learned."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import train_las_at
from conftest import Linear

from advgame.attacks import GradientAttack, Seen, StoppingRule, pgd
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.las_at import LasAt, LasTrades
from advgame.games.stopping import (
    FEATURES,
    DealtSteps,
    LearnedStop,
    Ridge,
    StopAtError,
    adapted,
    features,
    step_stats,
)
from advgame.games.strategy import StrategySpace
from advgame.health import deaths
from advgame.losses import cross_entropy, margin
from advgame.run import RunFolder
from advgame.run.defender_job import DefenderJob
from advgame.run.folder import Metrics
from advgame.seeding import stream
from advgame.threat import L2, Linf
from agents.las_at import StoppingStrategy, StrategyGame
from agents.stopper_file import read_stopper, write_stopper
from agents.stopper_picture import replay
from envs.strategy_selection import StrategySelectionVectorEnv


class Counted(StoppingRule):
    """Ends row i of a batch after ``counts[i]`` steps."""

    def __init__(self, counts, last_step):
        self.counts, self.last_step, self.told = torch.tensor(counts), last_step, None

    def stop(self, seen):
        self.limit = seen.limit
        return seen.done + self.last_step >= self.counts[seen.rows]

    def end(self, steps):
        self.told = steps


def start(seed=3):
    return torch.Generator().manual_seed(seed)


def test_an_attack_that_a_rule_ends_is_pgd_with_those_steps(double_cnn):
    model, x, y = double_cnn
    counts = [1, 5, 2, 4, 3, 1, 5, 2, 4, 3, 1, 2]
    plain = replace(pgd(Linf(0.1), 5, 0.03), steps=torch.tensor(counts))
    want = plain.run(model, x, y, rng=start())
    for last_step in (True, False):
        rule = Counted(counts, last_step)
        made = replace(plain, steps=5, rule=rule).run(model, x, y, rng=start())
        assert torch.equal(made.x_adv, want.x_adv)
        assert made.steps.tolist() == rule.told.tolist() == counts
        assert rule.limit == 5
        # a rule that keeps the image as it is has paid for a gradient that is not used
        wasted = 0 if last_step else sum(one < 5 for one in counts)
        assert made.forwards == made.backwards == sum(counts) + wasted


def test_a_rule_shortens_steps_that_are_chosen_per_image(double_cnn):
    """Images stand sorted by their steps within; counts and images come back in order."""
    model, x, y = double_cnn
    most, rule = torch.tensor([3, 1, 4, 2] * 3), Counted([2] * 12, True)
    attack = replace(pgd(Linf(0.1), 5, 0.03), steps=most)
    made = replace(attack, rule=rule).run(model, x, y, rng=start())
    assert made.steps.tolist() == most.clamp_max(2).tolist()
    assert rule.limit == 4
    want = replace(attack, steps=most.clamp_max(2)).run(model, x, y, rng=start())
    assert torch.equal(made.x_adv, want.x_adv)


def test_fat_ends_at_the_first_error_as_its_algorithm_is_written(victim, digits):
    some = digits.test.first(60)
    model, x, y = copy.deepcopy(victim).double(), some.floats().double(), some.labels
    attack = GradientAttack(Linf(0.3), 6, 0.05)
    made = replace(attack, rule=StopAtError()).run(model, x, y)
    counts = []
    for one, label, found in zip(x, y, made.x_adv, strict=True):
        point, steps = one[None].clone(), 0
        while steps < 6 and model(point).argmax() == label:  # algorithm 1, τ = 0
            point.requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(model(point), label[None]).sum(), point)
            moved = point.detach() + 0.05 * grad.sign()
            point = torch.minimum(torch.maximum(moved, one - 0.3), one + 0.3).clamp(0, 1)
            steps += 1
        assert torch.equal(point[0], found)
        counts.append(steps)
    assert made.steps.tolist() == counts
    assert len(set(counts)) > 3, "some images must resist"
    assert (model(made.x_adv).argmax(1) != y)[made.steps < 6].all()


def seen(n=5, ball=None, done=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 4, generator=rng)
    delta, y = 0.2 * (torch.rand(n, 1, 2, 2, generator=rng) - 0.5), torch.arange(n) % 4
    loss = cross_entropy(logits, y)
    return Seen(torch.arange(n), delta, ball or Linf(0.1), logits, loss, y, done, 8)


@pytest.mark.parametrize(
    "ball", [Linf(0.1), L2(torch.full((5,), 0.2)), Linf(torch.full((5,), 0.1))]
)
def test_features_are_what_their_words_say(ball):
    one, before = seen(ball=ball), torch.rand(5, generator=start())
    p = one.logits.softmax(1)[torch.arange(5), one.y]
    m = margin(one.logits, one.y)
    m = m / (1 + m.abs())
    eps = torch.as_tensor(ball.eps).expand(5)
    unit = eps if ball.norm == "Linf" else eps / 2  # √4 pixels
    room = 1 - one.delta.abs().flatten(1).mean(1) / unit
    columns = [torch.ones(5), p, p * (1 - p), m, m**2, p - before]
    want = torch.stack([*columns, torch.full((5,), 0.25), room, eps / 0.05], 1)
    torch.testing.assert_close(features(one, p, before, 0.05), want)
    assert want.shape[1] == len(FEATURES)


def test_the_regression_is_the_discounted_ridge_estimate():
    rng, fit = start(), Ridge(3, memory=0.5, penalty=0.1)
    batches = [(torch.randn(7, 3, generator=rng), torch.randn(7, generator=rng)) for _ in range(3)]
    for rows, goal in batches:
        fit.fit(rows, goal)
    # the same minimum by least squares on weighted rows, the penalty as rows of their own
    roots = [(0.5**age) ** 0.5 for age in (2, 1, 0)]
    rows = torch.cat([root * one for root, (one, _) in zip(roots, batches, strict=True)])
    goal = torch.cat([root * one for root, (_, one) in zip(roots, batches, strict=True)])
    rows, goal = torch.cat([rows, 0.1**0.5 * torch.eye(3)]), torch.cat([goal, torch.zeros(3)])
    want = torch.linalg.lstsq(rows.double(), goal.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(fit.weights, want)
    torch.testing.assert_close(fit.predict(batches[0][0]), (batches[0][0].double() @ want).float())


def test_the_threshold_rises_where_images_have_too_many_steps():
    assert adapted(0.2, 5.0, 3.0, 0.5) == pytest.approx(0.2 + 0.05)
    assert adapted(0.2, 3.0, 3.0, 0.5) == 0.2
    assert adapted(0.2, 1.0, 3.0, 0.5) < 0.2


def test_the_learned_rule_predicts_the_gains_that_come():
    """Its errors are those of the predictions it made before it saw the gain."""
    rule = LearnedStop(0.1, mean_steps=2.0)
    rule.regression.weights += 0.1 * torch.arange(1.0, 10.0)
    rule.threshold = -10.0
    rule.begin(5)
    first, later = seen(done=0), seen(done=1, seed=1)
    kept = torch.tensor([0, 2, 3])
    later = Seen(kept, *(one[kept] if torch.is_tensor(one) else one for one in later[1:]))
    assert not rule.stop(first).any()
    rule.stop(later)
    p = first.logits.softmax(1)[torch.arange(5), first.y]
    predicted = features(first, p, p, 0.1) @ (0.1 * torch.arange(1.0, 10.0))
    gain = later.loss - first.loss[kept]
    rule.end(torch.tensor([2, 1, 2, 2, 1]))
    error = (predicted[kept] - gain).square().mean()
    torch.testing.assert_close(rule.stats()["strategy/prediction_error"], error.sqrt())
    unexplained = error / gain.var(correction=0)
    torch.testing.assert_close(rule.stats()["health/strategy/unexplained"], unexplained)
    assert rule.threshold == pytest.approx(-10 + 0.05 * float(gain.std(correction=0)) * -0.4)


def test_halves_of_a_batch_are_told_by_the_probability_at_the_start():
    rule, first = LearnedStop(0.1), seen(4, done=0)
    rule.begin(4)
    rule.stop(first)
    p = first.logits.softmax(1)[torch.arange(4), first.y]
    steps = 10 * p.argsort().argsort()  # 0, 10, 20, 30 in the order of p
    rule.end(steps)
    told = {name: float(value) for name, value in rule.stats().items()}
    assert told["strategy/steps_unsure"] == 5
    assert told["strategy/steps_sure"] == 25
    assert told["strategy/steps_spread"] == pytest.approx(125**0.5)


def test_dealt_steps_are_the_rules_of_other_images(double_cnn):
    model, x, y = double_cnn
    counts = [1, 5, 2, 4, 3, 1, 5, 2, 4, 3, 1, 2]
    attack = replace(pgd(Linf(0.1), 5, 0.03), rule=Counted(counts, True))
    made = DealtSteps(attack).run(model, x, y, rng=start())
    assert sorted(made.steps.tolist()) == sorted(counts) != made.steps.tolist()
    assert made.steps.tolist() != counts
    assert made.forwards == made.backwards == sum(counts), "the rule's own attack is not counted"
    again = DealtSteps(attack).run(model, x, y, rng=start())
    assert torch.equal(made.x_adv, again.x_adv)
    with pytest.raises(InputError, match="its rule"):
        DealtSteps(replace(attack, rule=None)).run(model, x, y, rng=start())


def test_entropy_and_share_of_steps():
    stats = step_stats(torch.tensor([1, 1, 4, 4]), 4)
    assert float(stats["strategy/stopped"]) == 0.5
    assert float(stats["health/strategy/entropy"]) == pytest.approx(0.5)  # log 2 / log 4
    assert "health/strategy/entropy" not in step_stats(torch.tensor([1, 1]), 1)
    # FAT's images may take no step: of 0, 1 and 2 as often each, nothing is more even
    even = step_stats(torch.tensor([0, 1, 2]), 2, least=0)
    assert float(even["health/strategy/entropy"]) == pytest.approx(1)
    rule = StopAtError()
    rule._limit = 2
    rule.end(torch.tensor([0, 1, 2]))
    assert float(rule.stats()["health/strategy/entropy"]) == pytest.approx(1)


def test_a_rule_that_is_dead_is_flagged():
    rows = [{"epoch": e, "health/strategy/unexplained": 1.7} for e in (1, 2)]
    rows[1]["health/strategy/entropy"] = 0.0
    assert {death.sign for death in deaths(rows)} == {"unexplained", "entropy"}
    rule = LearnedStop(0.1)
    rule.threshold = 1e9  # all stop at once
    rule.begin(5)
    assert rule.stop(seen(done=0)).all()
    rule.end(torch.ones(5, dtype=torch.int64))
    assert float(rule.stats()["health/strategy/entropy"]) == 0


def planted_images(gap=0.2):
    """Two classes that the middle pixel tells apart, by so much to either side of grey."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (512,), generator=rng)
    x = 0.5 + 0.02 * (torch.rand(512, 1, 3, 3, generator=rng) - 0.5)
    x[:, 0, 1, 1] += gap * (2 * y - 1)
    return ImageSet.from_floats(x, y, 2)


def planted_defender(lr):
    """A linear classifier that looks at that pixel.

    The loss rises with every step until the ball is exhausted, and never after: of a ball of one
    step's size that is so after the first or second step, of one of eight after up to sixteen.
    """
    weight = torch.zeros(2, 9)
    weight[1, 4], weight[1, :4] = 4.0, 1.0
    return Defender(Linear(weight, torch.tensor([2.0, -2.0])), lr=lr)


def play(steps, deal=False, seed=0, game=None, rows=None):
    """Steps of the game on the planted images; (ε, numbers of steps) of the last 20."""
    if game is None:
        rule = LearnedStop(0.08, mean_steps=6.0)
        env = StrategySelectionVectorEnv(
            64,
            data=planted_images(),
            defender=planted_defender(0.01),
            rules=LasAt(Linf(0.08), rule=rule, deal=deal),
            space=StrategySpace(0.08, (1, 8), (12,), (1,)),
            reward_interval=0,
        )
        player = StoppingStrategy(env.space.sizes, stream(seed, "policy"), env.rules.rule)
        game = StrategyGame(env, player, seed=seed)
    found = []
    for _ in range(steps):
        stats = game.step()
        found.append((game.env.result.strategies.eps, game.env.result.strategies.steps))
        if rows is not None:
            rows.append({name: float(value) for name, value in stats.items()})
    eps, counts = (torch.cat(part[-20:]) for part in zip(*found, strict=True))
    return game, eps, counts


def test_on_planted_data_the_right_stopping_rule_is_learned():
    rows = []
    game, eps, counts = play(150, rows=rows)
    narrow, wide = counts[eps < 0.05].float(), counts[eps > 0.05].float()
    assert counts.float().mean() == pytest.approx(6.0, abs=0.5), "the mean that was asked for"
    assert narrow.mean() < 3.5, "a small ball is exhausted after a step or two"
    assert wide.mean() > 8.0
    assert rows[-1]["health/strategy/unexplained"] < 1 < rows[0]["health/strategy/unexplained"]
    images = planted_images()
    before = copy.deepcopy((game.state_dict(), game.defender.module.state_dict()))
    given = replay(game, images, 0)
    after = (game.state_dict(), game.defender.module.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # nobody has learned
    assert len(given.steps) == len(images)
    assert torch.equal(given.label, images.labels)
    with torch.no_grad():
        logits = game.defender.module(images.floats())
    torch.testing.assert_close(given.margin, -margin(logits, images.labels))
    assert given.steps[given.eps < 0.05].float().mean() < 3.5
    assert given.steps[given.eps > 0.05].float().mean() > 8.0
    assert torch.equal(given.steps, replay(game, images, 0).steps)
    assert not torch.equal(given.eps, replay(game, images, 1).eps)
    _, eps, counts = play(60, deal=True)
    narrow, wide = counts[eps < 0.05].float(), counts[eps > 0.05].float()
    assert abs(narrow.mean() - wide.mean()) < 0.6, "dealt at random, ε has no say"


@pytest.mark.parametrize("deal", [False, True])
def test_same_seed_same_bits_and_resumable(deal):
    whole, _, counts = play(8, deal)
    assert torch.equal(counts, play(8, deal)[2])
    assert not torch.equal(counts, play(8, deal, seed=1)[2])
    first, second = play(5, deal)[0], play(2, deal, seed=1)[0]
    weights = first.defender.module.state_dict()
    second.defender.module.load_state_dict(weights)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _, _, late = play(3, game=second)
    assert torch.equal(late, counts[-3 * 64 :])
    assert torch.equal(second.defender.module.weight, whole.defender.module.weight)
    assert second.end_epoch(None, 8).keys() == whole.end_epoch(None, 8).keys()


def stopped(rule):
    """A small environment whose attacks a rule ends, and what it plays in so many steps."""
    env = StrategySelectionVectorEnv(
        8,
        data=planted_images(),
        defender=planted_defender(0.01),
        rules=LasAt(Linf(0.08), rule=rule),
        space=StrategySpace(0.08, (1, 8), (12,), (1,)),
        reward_interval=0,
    )

    def steps(number, seed):
        rng, counts = np.random.default_rng(seed), []
        for _ in range(number):
            env.step(rng.integers(0, [2, 1, 1], (8, 3)))
            counts += env.result.strategies.steps.tolist()
        return counts

    return env, steps


def test_a_seeded_reset_restores_the_environments_own_rule():
    rule = LearnedStop(0.08, mean_steps=4.0)
    env, steps = stopped(rule)
    runs = []
    for _ in range(2):
        env.reset(seed=0)
        runs.append(steps(6, seed=1))
    assert runs[0] == runs[1]
    assert env.rules.rule.regression.weights.any()
    assert not rule.regression.weights.any(), "the caller's rule has not learned"


def test_a_saved_place_has_the_rule():
    env, steps = stopped(LearnedStop(0.08, mean_steps=4.0))
    twin, twins = stopped(LearnedStop(0.08, mean_steps=4.0))
    env.reset(seed=0)
    twin.reset(seed=3)
    steps(6, seed=1)
    place, weights = env.state_dict(), copy.deepcopy(env.defender.module.state_dict())
    twin.defender.module.load_state_dict(weights)
    twin.load_state_dict(place)
    assert steps(4, seed=2) == twins(4, seed=2)
    learned = copy.deepcopy(twin.rules.rule.state_dict())
    del place["rule"]  # as of an earlier version
    twin.load_state_dict(place)
    torch.testing.assert_close(twin.rules.rule.state_dict(), learned, rtol=0, atol=0)


def test_curves_have_the_steps_that_were_made():
    game, _, counts = play(4)
    assert float(game.env.result.stats["strategy/steps"]) == counts[-64:].float().mean()
    passes = game.env.result.stats
    assert passes["cost/input_backwards"] == counts[-64:].float().mean()
    assert game.end_epoch(None, 4)["strategy/steps_ratio"] == pytest.approx(
        float(counts.float().mean()) / 10
    )


def test_misuse_is_refused():
    rule = StopAtError()
    for change in ({"restarts": 2}, {"keep": "best"}, {"stop_when_fooled": True}):
        with pytest.raises(InputError, match="a rule ends one run"):
            replace(pgd(Linf(0.1), 3), rule=rule, **change)
    with pytest.raises(InputError, match="needs labels"):
        LasTrades(Linf(0.1), rule=rule)
    with pytest.raises(InputError, match="as a rule finds them"):
        LasAt(Linf(0.1), deal=True)
    with pytest.raises(InputError, match="must be above 1"):
        LearnedStop(0.1, mean_steps=1)
    with pytest.raises(InputError, match="memory"):
        Ridge(3, memory=0)


def test_a_fixed_threshold_above_the_first_gains_still_sees_what_later_ones_are():
    """Without probes each attack would end after its first step, and nothing would be learned."""
    rule = LearnedStop(0.1, threshold=0.5)
    steps = []
    for number in range(12):
        rule.begin(40)
        done = torch.ones(40, dtype=torch.int64)
        for step in range(4):
            now = seen(40, done=step, seed=number)
            gain = 0.01 if number < 4 else 1.0  # of every step
            rows = (done > step).nonzero()[:, 0]
            own = [one[rows] if torch.is_tensor(one) else one for one in now[1:]]
            now = Seen(rows, *own)._replace(loss=torch.full((len(rows),), step * gain))
            stops = rule.stop(now)
            assert not stops[rows % 20 == 0].any(), "a probe goes on"
            done[rows[~stops]] += 1
        rule.end(done)
        steps.append(float(done.float().mean()))
    assert steps[3] < 1.5 < 4 < steps[-1]
    free, frozen = LearnedStop(0.1), LearnedStop(0.1, threshold=0.5, frozen=True)
    free.threshold = 0.5
    for one in (free, frozen):  # an adapted threshold falls; what does not learn need not see
        one.begin(40)
        assert one.stop(seen(40, done=0)).all()


def test_a_fixed_threshold_stays_and_a_frozen_regression_does_not_learn():
    weights = 0.1 * torch.arange(1.0, 10.0).double()

    def played(**settings):
        rule = LearnedStop(0.1, 2.0, Ridge(len(FEATURES)), **settings)
        rule.regression.weights += weights
        for number in range(3):
            rule.begin(5)
            rule.stop(seen(done=0, seed=number))
            rule.stop(seen(done=1, seed=number + 9))
            rule.end(torch.tensor([3, 3, 3, 3, 3]))
        return rule

    free = played()
    assert free.threshold > 0
    assert not torch.equal(free.regression.weights, weights)
    assert played(threshold=-0.3).threshold == -0.3
    frozen = played(frozen=True)
    assert torch.equal(frozen.regression.weights, weights)
    assert frozen.threshold > 0, "it still follows the mean"
    assert "health/strategy/step" not in frozen.stats(), "a frozen regression is not a dead one"
    assert "health/strategy/step" in free.stats()
    told = [free.stats()[f"strategy/weight_{name}"] for name in FEATURES]
    torch.testing.assert_close(
        torch.stack(told).double(), free.regression.weights, atol=1e-6, rtol=0
    )


def test_features_can_be_left_out():
    rule = LearnedStop(0.1, 2.0, without=("margin", "room"))
    rule.regression.weights += 1.0
    rule.begin(5)
    one, later = seen(done=0), seen(done=1, seed=4)
    rule.stop(one)
    rule.stop(later)
    rule.end(torch.full((5,), 2))
    left = [name for name, w in zip(FEATURES, rule.regression.weights, strict=True) if w == 0]
    assert {"margin", "room"} <= set(left)
    assert len(left) < len(FEATURES) - 2
    with pytest.raises(InputError, match="unknown feature of the stopper 'size'"):
        LearnedStop(0.1, without=("size",))


def test_what_was_learned_on_one_data_set_is_played_on_another(tmp_path, monkeypatch):
    small = {"train_n": 100, "batch_size": 50, "agent": "stopper"}

    def built(**more):
        config = train_las_at.Config(**small, **more)
        return config, *train_las_at.job.build(config, train_las_at.job.fabric(config))

    config, game, data = built()
    for _ in range(3):
        game.step()
    monkeypatch.setattr(DefenderJob, "report", lambda *args: None)  # that of the classifier
    run = RunFolder.create(tmp_path / "first", {}, "cpu")
    stats = {name: float(value) for name, value in game.step().items()}
    Metrics(run.path / "metrics.csv").add({"epoch": 1.0, **stats})
    train_las_at.job.report(config, run, game, data, Linf(0.15))
    lines = (run.path / "strategy.csv").read_text().splitlines()
    assert lines[0] == "image,label,margin,eps,steps"
    assert len(lines) == 101
    assert {path.suffix for path in run.path.glob("strategy.*")} == {".png", ".pdf", ".csv"}
    held = json.loads((run.path / "stopper.json").read_text())
    assert held["weights"].keys() == FEATURES.keys()
    assert list(held["weights"].values()) == game.env.rules.rule.regression.weights.tolist()
    _, again, _ = built(seed=1, stopper=str(run.path))
    again.step()
    file = tmp_path / "again.json"
    write_stopper(file, again.env.rules.rule)
    assert json.loads(file.read_text())["weights"] == held["weights"]
    for text, said in (
        ('{"weights": {"one": 1}}', "does not hold the weights"),
        (json.dumps({"weights": dict.fromkeys(FEATURES, "a")}), "no finite numbers"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_stopper(file)
    with pytest.raises(InputError, match=r"no .*nowhere"):
        train_las_at.job.check(train_las_at.Config(agent="stopper", stopper="/nowhere"))

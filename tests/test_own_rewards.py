"""LAS-AT with a reward and with lists of one's own: as documented, and refused where they fail."""

import json

import gymnasium as gym
import pytest
import torch
import train_las_at
from conftest import undefended
from equal_runs import SMALL

import envs  # noqa: F401  # registers the ids
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games import LasAt, StrategySpace
from advgame.games.strategy import strategy_space
from advgame.threat import Linf
from envs.strategy_selection import StrategySelectionVectorEnv

BATCH = 16


def played(digits, steps=3, **rules):
    env = StrategySelectionVectorEnv(
        BATCH,
        data=digits.train,
        defender=Defender(undefended(digits), lr=0.05),
        rules=LasAt(Linf(0.15), **rules),
    )
    env.reset(seed=0)
    told = [env.step(torch.full((BATCH, 3), 2)) for _ in range(steps)]
    weights = torch.cat([p.detach().flatten() for p in env.defender.module.parameters()])
    return [one[1] for one in told], told[-1][4], weights


def test_a_reward_that_pays_the_published_one_changes_no_bit(digits):
    usual, info, weights = played(digits)
    own, own_info, own_weights = played(digits, reward=lambda outcome: outcome.payoffs.reward)
    assert torch.equal(torch.stack(usual), torch.stack(own))
    assert torch.equal(weights, own_weights)
    assert all(torch.equal(info[name], own_info[name]) for name in ("r1", "r2", "r3", "loss"))


def test_a_reward_sees_what_the_step_measured(digits):
    seen = []

    def reward(outcome):
        seen.append(outcome)
        assert not outcome.model.training
        assert not outcome.ahead.training
        right = outcome.ahead(outcome.x).argmax(1) == outcome.y
        assert torch.equal(outcome.clean, right.float())
        losses = torch.nn.functional.cross_entropy(
            outcome.model(outcome.x_adv), outcome.y, reduction="none"
        )
        torch.testing.assert_close(outcome.loss, losses)
        return outcome.loss - 0.5 * outcome.strategies.steps - outcome.robust

    rewards, info, weights = played(digits, steps=1, reward=reward)
    _, _, plain = played(digits, steps=1)
    assert torch.equal(weights, plain), "asking the networks changes nothing"
    trial, step = seen
    assert (len(trial.y), len(step.y)) == (2, BATCH)
    assert step.strategies.steps.tolist() == [5] * BATCH
    torch.testing.assert_close(rewards[0], info["r1"] - 2.5 - info["r2"] / 4)


@pytest.mark.parametrize(
    ("reward", "answer"),
    [
        (lambda outcome: outcome.loss.mean(), r"not torch.float32 of shape \(\)"),
        (lambda outcome: outcome.loss[:, None], r"of shape \(2, 1\)"),
        (lambda outcome: outcome.loss > 1, "torch.bool"),
        (lambda outcome: outcome.loss.tolist(), "a list"),
        (lambda outcome: None, "a NoneType"),
        (lambda outcome: outcome.loss / 0, "NaN or infinity"),
    ],
)
def test_a_reward_that_is_no_number_per_image_is_refused_at_once(reward, answer):
    rules = LasAt(Linf(0.15), reward=reward)
    with pytest.raises(InputError, match=answer):
        gym.make_vec("advgame/StrategySelection-v0", num_envs=4, rules=rules)


def test_the_command_line_takes_reward_and_lists(tmp_path, monkeypatch, refused):
    (tmp_path / "own_reward.py").write_text(
        "def priced(outcome, price=0.0):\n"
        "    return outcome.loss - price * outcome.strategies.steps\n"
        "def broken(outcome):\n    return outcome.los\n"
    )
    monkeypatch.chdir(tmp_path)
    for words, answer in (
        (["--reward", "own_reward:broken"], "own_reward:broken failed: AttributeError"),
        (["--reward", "own_rewrd:priced"], "there is no module 'own_rewrd'"),
        (["--reward", "priced"], "expected package.module:factory"),
        (["--reward", "own_reward:priced", "--credit", "sample"], "makes no use of --credit"),
        (["--reward", "own_reward:priced", "--agent", "random"], "makes no use of --reward"),
    ):
        refused(train_las_at, words, answer)
    lists = "eps=4,6,8 steps=3 step_size=1,2"
    words = ["--space", *lists.split(), "--reward", "own_reward:priced(price=100)"]
    small = [
        word
        for name, value in {**SMALL, "epochs": 1, "name": "run", "runs-dir": tmp_path}.items()
        for word in (f"--{name.replace('_', '-')}", *([value] if name != "attacks" else value))
    ]
    run = train_las_at.job.run(train_las_at.job.parse([*words, *map(str, small)]))
    assert json.loads((run.path / "config.json").read_text())["config"]["space"] == lists
    rows = (run.path / "metrics.csv").read_text().splitlines()
    row = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert float(row["game/attacker_reward"]) == pytest.approx(float(row["game/r1_loss"]) - 300)
    assert 4 / 8 < float(row["strategy/eps_ratio"]) < 1
    (run.path / "report.json").rename(run.path / "kept.json")
    again = train_las_at.Config(resume=str(run.path))
    with pytest.raises(InputError, match=r"type --reward 'own_reward:priced\(price=100\)' again"):
        train_las_at.job.run(again, {"resume"})


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("las-awp-cifar1", "las-awp-cifar10"),
        ("eps=4,6", "needs a list of steps and of step_size"),
        ("eps= steps=3 step_size=1", "eps must be a list of numbers above 0, not an empty one"),
        ("eps=4,4 steps=3 step_size=1", "eps must go up, each number once, not 4,4"),
        ("eps=8,4 steps=3 step_size=1", "eps must go up"),
        ("eps=0,4 steps=3 step_size=1", "above 0, not 0,4"),
        ("eps=4 steps=3 step_size=-1", "step_size must be a list of numbers above 0"),
        ("eps=4 steps=2.5 step_size=1", "steps must be whole numbers, not 2.5"),
        ("eps=4 steps=few step_size=1", "steps must be a number"),
        ("eps=4 steps=3 step=1", "step_size"),
        ("eps=4 eps=5 steps=3 step_size=1", "--space has eps twice"),
        ("eps=4, 6 steps=3 step_size=1", "no spaces in a list"),
        ("eps=4/255,8/255 steps=3 step_size=1", "in eighths of ε₀"),
        ("las-awp-cifar10 eps=4", "'las-awp-cifar10' among its lists"),
        ("eps=4 steps=3 step_size=1 beta=3", "--objective trades alone has"),
        ("eps=4,30 steps=3 step_size=1", "an eps of 30 is 0.562 in pixels"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(words, answer, refused):
    refused(train_las_at, ["--agent", "random", "--space", words], answer)


def test_the_range_of_radii_is_in_the_unit_that_was_typed():
    assert train_las_at.radii("8/255", (3, 15)) == "from 3/255 to 15/255"
    assert train_las_at.radii("0.16", (4, 8)) == "from 0.08 to 0.16"


def test_lists_are_in_eighths_of_the_radius():
    space = strategy_space("eps=4,8 steps=3,10 step_size=1.5,2 beta=1,6", 0.16, (5,))
    assert space == StrategySpace(0.16, (4, 8), (3, 10), (1.5, 2), (1, 6))
    made = space.decode(torch.tensor([[0, 1, 0, 1]]))
    found = [float(one) for one in (made.eps, made.steps, made.step_size, made.beta)]
    assert found == pytest.approx([0.08, 10, 0.03, 6])
    with pytest.raises(InputError, match="go up"):
        StrategySpace(0.16, (8, 4))
    with pytest.raises(InputError, match="give the space its eps_cap"):
        StrategySpace(4.0)

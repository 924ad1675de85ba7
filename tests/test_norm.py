"""``--norm L2``: the whole run is in that ball, and games of L∞ alone refuse it."""

import math
from dataclasses import replace
from pathlib import Path

import evaluate
import pytest
import torch
import train
import train_adt
import train_cat_and_mouse
import train_l2l
import train_las_at
import train_minimax
from conftest import seeded
from equal_runs import SMALL
from judging.subjects import Config, threat

from advgame.classifiers import SmallCNN, make_classifier
from advgame.data import load_data
from advgame.defender import Defender
from advgame.evaluation import judge_run
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.costs import perturbation_stats
from advgame.games.free import Free
from advgame.games.las_at import LasAt
from advgame.games.training import DefenderTraining
from advgame.run.defender_job import check_run
from advgame.run.folder import RunFolder
from advgame.run.loop import Trainer
from advgame.run.plan import TrainingPlan
from advgame.run.table import radius
from advgame.targets import from_run
from advgame.threat import L2, Linf
from envs.strategy_selection import StrategySelectionVectorEnv

BATCH = 32


def digits():
    data = load_data("digits").train.first(BATCH)
    return data.floats(), data.labels


@pytest.mark.parametrize("word", ["l2", "L2", "L_2"])
@pytest.mark.parametrize(
    ("script", "dataset", "eps"),
    [(train, "digits", "0.5"), (train_las_at, "mnist", "2.0"), (train, "cifar100", "128/255")],
)
def test_the_recipes_radius_is_a_length(script, dataset, eps, word):
    config = script.job.parse(["--norm", word, "--dataset", dataset])
    assert (config.norm, config.eps) == ("L2", eps)
    assert script.job.parse(["--norm", word, "--eps", "1"]).eps == "1"
    assert script.job.parse(["--norm", "linf", "--dataset", dataset]) == script.job.defaults(
        dataset=dataset
    )


@pytest.mark.parametrize(
    ("eps", "usual"), [("0.3", "2.0, which is usual in L2 on mnist"), ("1", "")]
)
def test_a_length_that_is_small_on_like_data_is_warned_of(eps, usual, capsys):
    check_run(replace(train.job.defaults(dataset="kmnist", norm="L2"), eps=eps))
    said = capsys.readouterr().err
    assert usual in said
    assert bool(said) == bool(usual)


@pytest.mark.parametrize(
    ("script", "words", "answer"),
    [
        (train, ["--norm", "l1"], "choose Linf or L2, not 'l1'"),
        (evaluate, ["--norm", "l1"], "choose Linf or L2, not 'l1'"),
        (train, ["--norm", "l2", "--eps", "0"], "eps must be above 0"),
        (train, ["--norm", "l2", "--eps", "8"], "did you mean 8/255?"),
        (train, ["--norm", "l2", "--attacks", "cw-adam"], "Linf norm only"),
        (train, ["--norm", "l2", "--preset", "repo", "--dataset", "cifar10"], "repo is of L∞"),
        (train_las_at, ["--norm", "l2", "--preset", "repo"], "repo is of L∞"),
        (train_l2l, ["--norm", "l2"], "not for this game"),
        (train_adt, ["--norm", "l2"], "not for this game"),
        (train_minimax, ["--norm", "l2"], "not for this game"),
        (train_cat_and_mouse, ["--norm", "l2", "--eps", "64"], "did you mean 64/255?"),
    ],
)
def test_what_l2_cannot_be(script, words, answer, refused):
    refused(script, words, answer)


def test_an_own_data_set_has_no_usual_length():
    with pytest.raises(Exception, match="how far an attack may go in L2"):
        train.job.check(replace(train.job.defaults(dataset="digits", norm="L2"), eps=""))


@pytest.mark.parametrize(("eps", "warned"), [("0.15", True), ("0.5", False), ("3", False)])
def test_an_linf_radius_in_l2_is_warned_of(eps, warned, capsys):
    train.job.check(train.job.parse(["--norm", "l2", "--eps", eps]))
    assert ("usual in L2 on digits" in capsys.readouterr().err) == warned


def test_a_run_in_l2_is_judged_there_and_says_so(tmp_path):
    words = ["--norm", "l2", "--name", "run", "--runs-dir", str(tmp_path)]
    run = train.job.run(replace(train.job.parse(words), **{**SMALL, "epochs": 1}))
    assert run.about()["config"]["norm"] == "L2"
    assert run.report()["threat"] == {"norm": "L2", "eps": 0.5}
    settled = evaluate.job.check(Config(what=str(run.path)))
    assert threat(settled) == L2(0.5)
    other = Config(what=str(run.path), norm="Linf", eps="0.1")
    assert threat(evaluate.job.check(other)) == Linf(0.1)
    with pytest.raises(Exception, match="how far an attack may go in Linf"):
        evaluate.job.check(replace(other, eps=""))
    assert from_run(Path(run.path)).threat == L2(0.5)


def test_a_run_made_from_python_is_judged_in_the_ball_of_its_report(tmp_path):
    made = make_classifier("small_cnn", (1, 8, 8), 10)
    data = load_data("digits")
    game = DefenderTraining(
        AdversarialTraining(L2(0.5)), Defender(made), data.train.first(64), 64, 0
    )
    settings = {"eps": "0.5", "dataset": "digits", "model": "small_cnn"}
    run = RunFolder.create(tmp_path / "run", settings, "cpu")
    Trainer(game, run, TrainingPlan(epochs=1), lambda _: {"eval/robust": 1.0}).fit()
    judge_run(run, made, data.test.first(10), L2(0.5), dataset="digits", attacks=("fgsm",))
    settled = evaluate.job.check(Config(what=str(run.path)))
    assert threat(settled) == from_run(run.path).threat == L2(0.5)


def test_free_in_l2_steps_along_the_gradient_and_stays_in_the_ball():
    x, y = digits()
    model, ball = SmallCNN((1, 8, 8), 10, width=4), L2(0.5)
    defender = Defender(model, lr=0.1)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(defender.loss(model.train()(leaf), y).mean(), leaf)[0]
    game = Free(ball, replays=1)
    game.step(defender, x, y, seeded())
    want = 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(game.delta, want, rtol=1e-4, atol=1e-6)
    for _ in range(3):
        game.step(defender, x, y, seeded())
        assert float(ball.size(game.delta).max()) <= 0.5 + 1e-6


def test_tables_name_the_norm_where_it_is_not_linf():
    assert radius({"eps": 0.15}) == radius({"eps": 0.15, "norm": "Linf"}) == "ε = 0.15"
    assert radius({"eps0": 0.5, "norm": "L2"}, "eps0", "ε₀") == "L2 ε₀ = 0.5"


@pytest.mark.parametrize("ball", [Linf(0.2), L2(0.5)])
def test_an_even_change_that_reaches_the_face_has_size_one(ball):
    delta = torch.full((2, 3, 4, 5), float(ball.eps) / ball.whole(60))
    torch.testing.assert_close(ball.size(delta), torch.full((2,), float(ball.eps)))
    stats = perturbation_stats(delta, ball)
    assert float(stats["attacker/size"]) == pytest.approx(1, abs=1e-6)
    noise = ball.steepest(torch.randn(8, 3, 16, 16, generator=seeded())) * ball.eps
    assert float(perturbation_stats(noise, ball)["attacker/size"]) <= 1 + 1e-6


def test_las_at_in_l2_leaves_out_what_makes_every_image_grey():
    env = StrategySelectionVectorEnv(BATCH, rules=LasAt(L2(2.0)))
    assert env.space.eps_units == tuple(range(3, 16)), "up to 3.75, and grey begins at 4"
    assert env.space.eps_cap == math.sqrt(64) / 2
    images, _ = env.reset(seed=0)
    env.step(torch.full((BATCH, 3), 2))  # the third choice of each: ε of 5 eighths
    size = L2(1).size(env.result.x_adv - images)
    assert 0.9 * 5 * 2.0 / 8 < float(size.max()) <= 5 * 2.0 / 8 + 1e-5

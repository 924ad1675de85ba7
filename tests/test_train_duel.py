"""Players of the duel: they learn, take turns, are saved, and meet each other on equal matches."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_duel
import train_las_at
from conftest import seeded

from advgame.errors import InputError
from advgame.games.duel import Lesson, LessonSpace, Standing
from advgame.games.strategy import StrategySpace, strategy_space
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder
from advgame.threat import Linf
from agents import duel
from agents.policies import FeaturePolicy, StrategyPolicy

TINY = {"steps": 2, "batch_size": 8, "held_out": 8, "duels": 2, "matches": 2}


class Planted:
    """A game whose equilibrium is known: a large ε and a large rate are good, each for its side."""

    max_cycles, reward = 4, "robust"
    space, lessons = StrategySpace(0.15), LessonSpace()

    def reset(self, seed):
        self.standing, self.seeds = Standing(0.5, 0.5, 1.0), [*getattr(self, "seeds", []), seed]
        return dict.fromkeys(duel.AGENTS, np.zeros(len(duel.FEATURES), np.float32)), {}

    def step(self, moves):
        rise = (float(moves["defender"][0]) / 3 - float(moves["attacker"][0]) / 12) / 8
        self.standing = Standing(self.standing.robust + rise, 0.5, 1.0)
        seen = dict.fromkeys(duel.AGENTS, np.zeros(len(duel.FEATURES), np.float32))
        return seen, {"attacker": -rise, "defender": rise}, {}, {}, {}


def learner(sizes, seed=0):
    return duel.Learner(sizes, 8, 4, seed, lr=1e-2, entropy_coef=0.0, hidden=16)


def probability(player, column, option):
    """Of an option under the policy as it is."""
    logits = player.frozen()(torch.zeros(1, len(duel.FEATURES)))[column]
    return logits.softmax(1)[0, option].item()


def planted(order="simultaneous", turn=1, **players):
    envs = [Planted() for _ in range(8)]
    fabric = make_fabric("cpu", 1, "32-true")
    return duel.DuelGame(envs, players, 0, fabric, 5, order, turn)


def test_both_sides_find_what_pays_them():
    both = {"attacker": learner((13, 12, 5)), "defender": learner((4, 3, 4, 2), 1)}
    game = planted(**both)
    for _ in range(30):
        stats = game.step()
    assert probability(both["attacker"], 0, 12) > 0.6 > 4 / 13
    assert probability(both["defender"], 0, 3) > 0.8
    assert abs(float(stats["game/return"])) < 0.15, "zero at the equilibrium"
    assert float(stats["strategy/place_eps"]) == 0.0, "read off the observations, which are 0 here"
    assert stats["health/attacker/entropy"] < 0.95
    seeds = [seed for env in game.envs for seed in env.seeds]
    assert len(set(seeds)) == len(seeds), "every match is another"


@pytest.mark.parametrize("rows", [1, 4])
def test_matches_of_equal_returns_have_no_variance_to_explain(rows):
    """As with one step and a standing that it does not change: no sign of a divergence."""
    player = duel.Learner((4, 3), rows, 1, 0, lr=1e-2, entropy_coef=0.0, hidden=8)
    player.act([np.zeros(len(duel.FEATURES), np.float32)] * rows)
    player.take(np.full(rows, 0.5, np.float32), True)
    stats = player.learn("defender")
    assert "defender/explained_variance" not in stats
    assert "defender/kl" in stats


def test_in_turns_one_side_stands_still():
    both = {"attacker": learner((13, 12, 5)), "defender": learner((4, 3, 4, 2), 1)}
    game = planted("alternating", 2, **both)

    def weights():
        return {side: one.policy.action_net.weight.clone() for side, one in both.items()}

    for update in range(8):
        before = weights()
        stats = game.step()
        moved = {side for side, one in weights().items() if not torch.equal(one, before[side])}
        assert moved == {("attacker", "defender")[update // 2 % 2]}
        assert {f"{side}/kl" in stats for side in moved} == {True}


def test_pay_is_the_return_of_a_policy_on_the_same_matches():
    env = Planted()
    named = duel.controls(env, "attacker"), duel.controls(env, "defender")
    cells = duel.against_all([env, Planted()], *named, 3, 0)
    assert [(c.attacker, c.defender) for c in cells] == [
        (a, d) for a in ("fixed", "random") for d in ("fixed", "random")
    ]
    fixed = cells[0]  # ε₀ is the sixth of 13, a factor of 1 the third of 4
    assert np.allclose(fixed.paid, 4 * (2 / 3 - 5 / 12) / 8)
    assert np.allclose(fixed.robust, 0.5 + np.array(fixed.paid))
    one_by_one = duel.against_all([Planted()], *named, 3, 0)
    assert len(set(cells[3].robust)) > 1
    assert one_by_one[0] == fixed
    assert env.seeds[0] == env.seeds[2], "every pair plays the same matches"


def test_controls_are_the_nearest_options_to_pgd_and_plain_training():
    env = SimpleNamespace(
        space=StrategySpace(0.15, (3, 7, 12), (3, 9), (1, 5)),
        lessons=LessonSpace(rates=(0.5, 0.9), clean=(0.5, 1.0)),
    )
    assert duel.controls(env, "attacker")["fixed"](seeded()).action.tolist() == [1, 1, 0]
    assert duel.controls(env, "defender")["fixed"](seeded()).action.tolist() == [1, 0, 0, 0]
    draws = duel.controls(env, "attacker")["random"](seeded()).act([np.zeros(14)] * 3000)
    for column, size in enumerate(env.space.sizes):
        counts = np.bincount(draws[:, column], minlength=size)
        assert (abs(counts / 3000 - 1 / size) < 0.05).all()
    assert LessonSpace().decode(torch.tensor(LessonSpace().index(Lesson()))) == Lesson()


def test_a_policy_is_read_back_by_its_own_side_only(tmp_path):
    path, sizes = tmp_path / "policy.safetensors", (4, 3, 4, 2)
    policy = FeaturePolicy(len(duel.FEATURES), sizes, 8)
    torch.nn.init.normal_(policy.heads.weight)
    duel.write_policy(path, policy, "defender")
    read = duel.read_policy(path, "defender", sizes)
    seen = torch.rand(2, len(duel.FEATURES))
    assert all(torch.equal(a, b) for a, b in zip(policy(seen), read(seen), strict=True))
    with pytest.raises(InputError, match=r"plays the defender with \(4, 3, 4, 2\) options; here"):
        duel.read_policy(path, "attacker", (13, 12, 5))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a safetensors file"):
        duel.read_policy(path, "defender", sizes)


def test_a_saved_side_plays_on_against_another(tmp_path):
    config = {**TINY, "runs_dir": str(tmp_path)}
    learned = train_duel.Config(**config, name="one", attacker="fixed", epochs=1, updates=1)
    run = train_duel.job.run(learned)
    later = train_duel.Config(**config, name="two", attacker="random", defender=str(run.path))
    cells = train_duel.job.run(later).report()["cells"]
    before = {(c["attacker"], c["defender"]): c for c in run.report()["cells"]}
    for cell in cells:
        name = "ppo" if cell["defender"] == str(run.path) else cell["defender"]
        assert cell["robust"] == before[cell["attacker"], name]["robust"]
    assert len(cells) == 6
    assert "nobody" not in (tmp_path / "two" / "report.md").read_text()
    assert not (tmp_path / "two" / "metrics.csv").exists()
    with pytest.raises(InputError, match="no attacker file"):  # its attacker has not learned
        train_duel.job.run(train_duel.Config(**config, attacker=str(run.path)))


@pytest.fixture
def las(tmp_path, digits):
    """A run of train_las_at.py that has been trained for no time."""
    asked = train_las_at.Config(
        space="eps=4,8 steps=3 step_size=1,2",
        policy_network="minimax_cnn",
        runs_dir=str(tmp_path),
    )
    run = RunFolder.create(tmp_path / "las", asdict(asked), "cpu")
    policy = StrategyPolicy((1, 8, 8), (2, 1, 2), network="minimax_cnn").eval()
    with torch.no_grad():  # always the second ε, and by the image the step size
        policy.heads[0].bias.copy_(torch.tensor([-99.0, 99.0]))
        policy.heads[2].weight.normal_(generator=seeded()).mul_(50)
        policy.heads[2].bias.copy_(-policy(digits.train.floats(slice(32)))[2].median(0).values)
    state = {"game": {"player": {"policy": policy.state_dict()}}}
    run.checkpoints.save(3, {}, state)
    return run, policy


def test_the_policy_of_a_las_run_attacks_image_by_image(las, tmp_path, digits):
    run, policy = las
    ball = Linf(0.15)
    read, space = duel.read_las(run.path, (1, 8, 8), ball)
    assert space == strategy_space("eps=4,8 steps=3 step_size=1,2", 0.15)
    assert torch.equal(read.heads[2].weight, policy.heads[2].weight)
    images = digits.train.floats(slice(32))
    seen = [{"features": np.zeros(14, np.float32), "images": images.numpy()}]
    chosen = duel.LasAttacker(read, seeded()).act(seen)
    assert chosen.shape == (1, 32, 3)
    assert (chosen[0, :, 0] == 1).all()
    with torch.no_grad():
        likely = policy(images)[2].argmax(1).numpy()
    assert 8 < likely.sum() < 24
    assert (chosen[0, :, 2] == likely).mean() > 0.9
    config = train_duel.Config(
        **TINY, runs_dir=str(tmp_path), name="run", attacker=str(run.path), defender="fixed"
    )
    report = train_duel.job.run(config).report()
    assert len(report["cells"]) == 3 * 2
    run.write_json("config.json", {**run.about(), "config": {**run.about()["config"], "agent": ""}})
    with pytest.raises(InputError, match="no policy that could attack here"):
        duel.read_las(run.path, (1, 8, 8), ball)


def test_the_batch_gives_way_to_few_images_where_it_was_not_typed(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (36, 6, 5), dtype=np.uint8), np.arange(36) % 3
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    few = {"dataset": str(tmp_path / "few.npz"), "attacker": "fixed", "defender": "random"}
    few |= {"steps": 1, "duels": 1, "matches": 2, "runs_dir": str(tmp_path / "runs")}
    run = train_duel.job.run(train_duel.Config(**few))
    assert run.about()["config"]["batch_size"] == 6
    assert "on 6 validation images of" in (run.path / "report.md").read_text(), "not on 64"
    assert "do not fill the usual batch of 64: --batch-size 6" in capsys.readouterr().err
    with pytest.raises(InputError, match="batch size must lie in"):
        train_duel.job.run(train_duel.Config(**few), {"batch_size"})


def test_another_images_las_policy_is_refused(las):
    with pytest.raises(InputError, match="trained on other images"):
        duel.read_las(las[0].path, (3, 32, 32), Linf(8 / 255))


def test_a_las_run_without_a_checkpoint_says_so(tmp_path):
    asked = train_las_at.Config(runs_dir=str(tmp_path))
    run = RunFolder.create(tmp_path / "las", asdict(asked), "cpu")
    for _ in range(2):
        with pytest.raises(InputError, match="no checkpoint of its policy yet"):
            duel.read_las(run.path, (1, 8, 8), Linf(0.15))
        run.checkpoints.save(0, {}, {})  # where a run begins


def test_a_duel_goes_on_against_the_policy_that_it_began_against(las, tmp_path, monkeypatch):
    run, policy = las
    config = train_duel.Config(
        **TINY, runs_dir=str(tmp_path), name="on", attacker=str(run.path), epochs=1, updates=1
    )
    with monkeypatch.context() as stopped:
        stopped.setattr(train_duel, "measured", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_duel.job.run(config)
    begun = RunFolder(tmp_path / "on")
    assert set(begun.about()["frozen"]) == {"attacker"}
    again = train_duel.Config(resume=str(begun.path))
    was = policy.heads[0].bias.detach().clone()
    for bias, words in ((was.flip(0), "other contents of its attacker"), (was, None)):
        with torch.no_grad():
            policy.heads[0].bias.copy_(bias)
        state = {"game": {"player": {"policy": policy.state_dict()}}}
        run.checkpoints.save(4, {}, state)
        if words:
            with pytest.raises(InputError, match=words):
                train_duel.job.run(again)
    assert train_duel.job.run(again).report()["cells"]


def test_a_report_compares_match_by_match(tmp_path):
    robust = {"ppo": (0.5, 0.7), "fixed": (0.25, 0.25), "random": (0.5, 0.5)}
    cells = [
        duel.Cell(attacker, defender, robust[attacker], (1.0, 1.0), (0.0, 0.0))
        for attacker in robust
        for defender in ("fixed", "random")
    ]
    config = train_duel.Config(defender="random")
    lines = train_duel.compared(config, cells)
    assert lines[0] == (
        "- attacker ppo for fixed, against defender fixed: +35.0 ± 10.0 points of robust accuracy"
    )
    assert len(lines) == 4, "a control is compared with nobody"
    told = train_duel.as_markdown(config, cells, 64, "python x")
    assert "| fixed | 25.0 ± 0.0 | 25.0 ± 0.0 |" in told
    mean, error = duel.level([1.0, 3.0])
    assert (mean, error) == (2.0, 1.0)
    assert math.isnan(duel.level([1.0])[1])
    assert json.loads(json.dumps([asdict(one) for one in cells]))[0]["attacker"] == "ppo"

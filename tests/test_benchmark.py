"""The benchmark script: its JSON, and that what it compares does equal work. No timing asserts."""

import json
import subprocess
import sys

import benchmark
import pytest
import torch
import tyro
from benchmarks import attacks, autoattack, engine, environments, games
from benchmarks.attacks import PEERS
from conftest import ROOT
from lightning_fabric import Fabric
from torch import nn

from advgame.attacks import GradientAttack
from advgame.classifiers import make_classifier
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import Passes
from advgame.games.strategy import Strategies
from advgame.seeding import seeded_init
from advgame.threat import Linf

OURS = ("advgame", "advgame unchecked", "advgame in training")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/benchmark.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path):
    out = tmp_path / "benchmark.json"
    done = run("--quick", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "floor_share" in done.stdout
    content = json.loads(out.read_text())
    assert set(content) == {
        *("command", "versions", "commit", "device", "cpu", "threads", "precision", "repeats"),
        "groups",
    }
    assert content["threads"] == 1
    assert content["repeats"] == 2
    assert {"torch", *PEERS} <= set(content["versions"])
    turns = {
        **{"pgd": 2, "strategies": 2, "env": 20, "adaptive": 4},
        **{"duel": 20, "attack": 20, "imitation": 2},
    }
    assert set(content["groups"]) == set(turns)
    for group, cases in content["groups"].items():
        for case in cases:
            for row in case["contestants"].values():
                assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
                assert row["n"] == turns[group]
    (pgd,), (strategies,), (env,), (adaptive,), (duel,), (attack,), (gail,) = (
        content["groups"][n] for n in turns
    )
    assert {*pgd["contestants"], *pgd["not_installed"]} == {"floor", *OURS, *PEERS}
    assert all(content["versions"][name] == "not installed" for name in pgd["not_installed"])
    assert pgd["contestants"]["floor"]["floor_share"] == 1
    assert pgd["contestants"]["advgame"]["times_ours"] == 1
    assert strategies["speed_up"] > 0
    assert strategies["max_steps"] == 14
    assert "overhead_percent" in env
    assert "overhead_percent" in adaptive
    assert set(attack["contestants"]) == {"floor", "advgame", "advgame, SB3 adapter"}
    assert attack["image_steps_per_second"] > 0
    assert gail["environment_steps_per_second"] > 0
    assert {"advgame", "environment alone", "discriminator", "TRPO"} < set(gail["contestants"])
    loops = [name for name in gail["contestants"] if name.startswith("sb3-contrib's loop")]
    assert [name.split(", ")[1] for name in loops] == ["equal settings", "its defaults"]
    assert 0.05 < attack["share_of_rows_ending_per_step"] < 0.5, "nearly all episodes in full"
    if content["device"].startswith("cpu"):  # elsewhere equal seeds may differ in the last bits
        assert env["same_work"]
        assert adaptive["same_work"]
        assert duel["same_work"]


def test_the_bare_stopping_loop_does_the_environments_work():
    fabric = Fabric(accelerator="cpu", devices=1)
    case = environments.measure_adaptive(fabric, 1, environments.adaptive_cases()[0])
    assert case["same_work"]
    assert 2 < case["mean_steps"] < 5


def test_masked_loop_gives_the_adversarial_examples_of_the_attack():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(16, 1, 12, 12, generator=rng, dtype=torch.float64)
    y = torch.randint(10, (16,), generator=rng)
    with seeded_init(0):
        model = make_classifier("small_cnn", (1, 12, 12), 10).double()
    strategies = Strategies(
        torch.empty(16, dtype=torch.float64).uniform_(0.05, 0.3, generator=rng),
        torch.randint(3, 15, (16,), generator=rng),
        torch.empty(16, dtype=torch.float64).uniform_(0.01, 0.1, generator=rng),
    )
    ball = Linf(strategies.eps)
    attack = GradientAttack(ball, strategies.steps, strategies.step_size, start=ball)
    ours = attack.perturb(model, x, y, rng=torch.Generator().manual_seed(1))
    masked = attacks.masked_loop(model, x, y, strategies, torch.Generator().manual_seed(1))
    assert len(strategies.steps.unique()) > 3
    assert torch.equal(ours, masked)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_makes_ten_gradient_steps_in_the_ball(name):
    followed = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 10)

        def forward(self, x):
            followed.append(torch.is_grad_enabled() and x.requires_grad)
            return self.linear(x.flatten(1))

    x, y = torch.rand(8, 1, 4, 4), torch.randint(10, (8,))
    try:
        play = attacks.peer(name, Counting().eval(), x, y, 0.1, 10)
    except ImportError:
        pytest.skip(f"{name} is not installed")
    followed.clear()
    x_adv = torch.as_tensor(play())
    assert sum(followed) == 10
    size = (x_adv - x).abs().max()
    assert 0 < size <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"only": "pgd,speed"}, "--only knows pgd,strategies,.*, not speed"),
        ({"repeats": 0}, "must be 1 or above"),
        ({"threads": -1}, "must be 1 or above"),
        ({"only": "games", "batch": 1}, "batch must be 2"),
        ({"only": "autoattack", "runs": ("/nowhere",)}, "/nowhere"),
    ],
)
def test_what_measures_nothing_is_refused(settings, answer, tmp_path):
    with pytest.raises(InputError, match=answer):
        benchmark.main(benchmark.Config(out=str(tmp_path / "benchmark.json"), **settings))
    assert not list(tmp_path.iterdir())


def test_pages_of_several_groups_stand_in_one_file_each_with_its_own_turns(tmp_path, monkeypatch):
    """The last one replaced the others, and told the turns of the first group."""
    rows = {what: {"times_ours": 0.5, "median_s": 2.0} for what in engine.PARTS}
    case = {"network": "a", "shape": (1, 8, 8), "batch": 8, "contestants": rows}
    monkeypatch.setattr(engine, "measure_engine", lambda fabric, repeats, one: case)
    monkeypatch.setattr(games, "measure_games", lambda fabric, repeats, one: case)
    monkeypatch.setattr(games, "as_markdown", lambda case, about: "# A step of each game\n")
    out = tmp_path / "both.json"
    benchmark.main(benchmark.Config(only="games,engine", out=str(out)))
    page = out.with_suffix(".md").read_text()
    assert page.startswith("# A step of each game\n\n# What each part of the engine brings")
    assert "medians over 15 turns" in page
    assert json.loads(out.read_text())["repeats"] == {"engine": 15, "games": 5}


SMALL = ["--only", "games", "--network", "small_cnn", "--width", "small", "--shape", "1", "8", "8"]


def timed(tmp_path, *words):
    """Contestants of the smallest games."""
    out = tmp_path / "games.json"
    words = [*SMALL, *words, "--repeats", "1", "--out", str(out)]
    benchmark.main(tyro.cli(benchmark.Config, args=words))
    (case,) = json.loads(out.read_text())["groups"]["games"]
    return case["contestants"], out.with_suffix(".md").read_text()


def test_games_are_timed_against_their_own_passes(tmp_path):
    rows, text = timed(tmp_path)
    for name in ("naive", "grad", "two-step", "grad, shared", "two-step, shared", "PGD-10"):
        row = rows[name]
        assert row["measured_over_predicted"] == row["median_s"] / row["predicted_s"]
    passes = rows["two-step, shared"]["passes"]
    assert passes["forwards"] == 3
    assert passes["attacker_backwards"] == 2
    assert rows["published PGD-10"]["times_ours"] == 1
    assert "| grad | 4 | 3 | 1 | 2, 1 |" in text


def test_the_baselines_are_timed_too(tmp_path):
    rows, _ = timed(tmp_path, "--family", "baselines")
    assert (rows["TRADES"]["passes"]["forwards"], rows["TRADES"]["passes"]["backwards"]) == (13, 2)
    assert not {"grad", "naive attacker F"} & set(rows)
    counts = {name: row["passes"] for name, row in rows.items() if "passes" in row}
    assert [counts[name]["forwards"] for name in ("PGD-10", "PGD-10, AWP")] == [11, 12]
    assert counts["ADT-EXP"]["forwards"] == 36  # the paper's 7 steps of 5 samples, and the defender
    assert (counts["ADT-EXP-AM"]["forwards"], counts["ADT-EXP-AM"]["attacker_forwards"]) == (3, 1)


@pytest.mark.parametrize("folder", ["l2l", "compare"])
def test_committed_costs_are_rendered_as_they_were(folder):
    path = ROOT / "results" / folder / "cost.json"
    made = json.loads(path.read_text())
    assert games.as_markdown(made, made) == path.with_suffix(".md").read_text()


def test_a_prediction_by_hand():
    times = {"F": 1, "F + B_x": 10, "F + B": 100, "SGD step": 1000, "Adam step": 2000}
    times |= {"attacker F": 1e4, "attacker F + B": 1e5}
    passes = Passes(4, 1, 2, attacker_forwards=3, attacker_backwards=1)
    assert games.predict(passes, times, naive=False) == 1 + 20 + 100 + 3000 + 1.2e5


def test_the_published_loop_makes_the_step_of_our_pgd():
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    defenders = []
    for _ in range(2):
        with seeded_init(0):
            defenders.append(Defender(make_classifier("small_cnn", (1, 8, 8), 10), lr=0.1))
    start = torch.Generator().manual_seed(1)
    games.published_pgd(defenders[0], x, y, 0.1, start)
    rules = games.games(games.Games(shape=(1, 8, 8), width="small"), Linf(0.1))
    rules["PGD-10"].step(defenders[1], x, y, torch.Generator().manual_seed(1))
    for one, other in zip(*(d.module.parameters() for d in defenders), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_autoattack_is_timed_beside_pyautoattack_with_equal_verdicts(tmp_path):
    out = tmp_path / "autoattack.json"
    words = ["--only", "autoattack", "--images", "9", "--repeats", "2", "--out", str(out)]
    benchmark.main(tyro.cli(benchmark.Config, args=words))
    (case,) = json.loads(out.read_text())["groups"]["autoattack"]
    assert case["differing"] == []
    assert all(0 < count < 10 for count in case["robust"])
    assert all(row["cpu_s"] > 0 for row in case["contestants"].values())
    assert "| 0 of 18 |" in out.with_suffix(".md").read_text()


def test_a_verdict_that_differs_is_listed_with_both_margins(monkeypatch):
    """One image falls by one only; the numbers are those of its classifier."""
    fallen = iter(((2, 5), (2,)))

    def judge(target, x, y, seed):
        found = x.clone()
        for image in next(fallen):
            found[image] = 1 - x[image]
        return found

    for name in ("ours", "theirs"):
        monkeypatch.setattr(autoattack, name, judge)
    (one,) = autoattack.targets(autoattack.Judges(images=8))
    case = autoattack.measure_autoattack(Fabric(accelerator="cpu"), 1, one)
    ((seed, image, margins),) = (tuple(each.values()) for each in case["differing"])
    assert (seed, image) == (0, 5)
    assert margins[0] > 0 > margins[1]
    about = {"threads": 1, "device": "a CPU", "cpu": "of some kind", "commit": "0", "command": "c"}
    text = autoattack.as_markdown([case], about)
    assert "| 1 of 8 |" in text
    assert f"seed 0, image 5: {margins[0]:.2g} after ours, {margins[1]:.2g} after" in text


@pytest.mark.parametrize("network", ["small_cnn", "lean_resnet"])
def test_all_parts_of_the_engine_make_the_same_attack(network):
    """But for rounding, which turns the sign of a few gradients."""
    query = (network, (3, 16, 16), 0.03, 4)
    made = {
        what: engine.played(query, parts, torch.device("cpu"))()
        for what, parts in engine.PARTS.items()
    }
    for what, x_adv in made.items():
        away = (x_adv - made[engine.KEPT]).abs() > 0.03 / 8
        assert float(away.float().mean()) < (0.2 if "bf16" in engine.PARTS[what] else 0.02), what
    with engine.elsewhere(query) as play:
        play()  # it ends


def test_the_page_of_the_engine_has_a_column_per_network():
    rows = {what: {"times_ours": 0.5, "median_s": 2.0} for what in (engine.NOTHING, *engine.PARTS)}
    cases = [{"network": name, "batch": 8, "contestants": rows} for name in ("a", "b")]
    about = dict.fromkeys(("device", "cpu", "commit", "command", "repeats"), "x")
    page = engine.as_markdown(cases, about)
    assert "|  | a, batch 8 | b, batch 8 |" in page
    assert "| nothing | 0.50 | 0.50 |" in page

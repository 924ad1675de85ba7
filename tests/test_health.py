"""Signs of life: a dead player of every kind is planted, and flagged; living ones are not."""

import math
from functools import partial

import attacker_parts as parts
import pytest
import torch
import train_gail
from conftest import ROOT, seeded
from equal_runs import weights
from torch import nn
from torch.distributions import Categorical

from advgame import health
from advgame.classifiers import SmallCNN
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.judge import judge_run
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.mixture import Mixture
from advgame.games.training import DefenderTraining
from advgame.run.folder import RunFolder
from advgame.run.loop import Trainer
from advgame.run.plan import TrainingPlan
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker_network import AttackerPlayer
from agents.reinforce import Reinforce
from agents.settings import ReinforceConfig

EPS = Linf(0.1)


def drown(layer):
    """Bias so large that neither image nor weights matter."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(50)


def last_linear(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def attnet(dead):
    if not dead:
        return parts.network("attnet")
    network = parts.network("attnet", scale=0.0)  # its scale would undo what is planted
    drown(last_linear(network))
    return network


def game(kind, dead):
    """The game of a kind of attacker network, which lives or is saturated."""
    if kind == "attnet":
        return parts.game(kind, AttackerPlayer(attnet(dead), lr=1e-9))
    own = parts.player(kind)
    if dead:
        drown(last_linear(own.module))
    return parts.game(kind, own)


def played(rules, digits, dead_defender=False):
    """One step on digits, and what the end of the epoch says."""
    with seeded_init(0):
        module = SmallCNN((1, 8, 8), 10, width=8)
    if dead_defender:
        drown(last_linear(module))
        with torch.no_grad():
            last_linear(module).bias[1:] = -50.0
    game = DefenderTraining(rules, Defender(module, lr=1e-9), digits.train, 64, 0)
    game.step()
    return {"epoch": 1, **game.end_epoch(None, 1)}


GAMES = {
    "minimax": partial(game, "attnet"),
    "mixture": lambda dead: Mixture(EPS, ["fgsm"], {"attnet": attnet(dead)}, lr=1e-9),
    "l2l": partial(game, 1),
    **{kind: partial(game, kind) for kind in parts.ADTS},
}


@pytest.mark.parametrize("name", GAMES)
def test_a_saturated_attacker_is_flagged_and_a_living_one_is_not(name, digits):
    torch.manual_seed(0)
    attacker = "attnet" if name == "mixture" else "attacker"
    for dead in (False, True):
        row = played(GAMES[name](dead), digits)  # of a defender that has learned nothing yet
        found = {death.sign for death in health.deaths([row]) if death.player == attacker}
        assert found >= {"saturated", "spread"} if dead else found == set()


def test_a_constant_defender_is_flagged(digits):
    row = played(AdversarialTraining(EPS), digits, dead_defender=True)
    assert [death.name for death in health.deaths([row])] == ["dead_defender_constant"]
    assert row["health/defender/constant"] == 1


def test_a_policy_that_always_does_the_same_is_flagged():
    class Policy(nn.Module):
        def __init__(self, certainty):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([[certainty, 0.0, 0.0]]))

        def forward(self, images):
            return [self.logits.expand(len(images), -1)]

    shares = []
    for certainty in (1.0, 30.0):
        player = Reinforce(Policy(certainty), ReinforceConfig(baseline="loo", lr=1e-9), seeded())
        player.act(torch.zeros(8, 1, 2, 2), learn=True)
        stats = player.learn(torch.rand(8, generator=seeded()))
        row = {"epoch": 3, "health/strategy/entropy": float(stats["health/strategy/entropy"])}
        shares.append(row["health/strategy/entropy"])
        dead = [death.name for death in health.deaths([row])]
        assert dead == (["dead_strategy_entropy"] if certainty == 30 else [])
    expected = Categorical(logits=torch.tensor([1.0, 0, 0])).entropy() / math.log(3)
    assert shares[0] == pytest.approx(float(expected))


def test_a_choice_among_one_is_none():
    assert health.entropy_sign(torch.zeros(1), [1]) == {}
    stats = health.entropy_sign(torch.tensor([math.log(4), 0.0, math.log(2) / 2]), [4, 1, 2])
    assert float(stats["health/strategy/entropy"]) == pytest.approx(0.75)


def tiny_gail(tmp_path, **settings):
    return train_gail.Config(
        iterations=2, evaluate_every=1, episodes=4, envs=4, n_steps=16, runs_dir=str(tmp_path),
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["discriminator", "updater", "batch", "policy"])
def test_dead_players_of_gail_are_flagged(kind, tmp_path, monkeypatch):
    settings = {"updater_lr": 1e-12} if kind == "updater" else {}
    game, *_ = train_gail.make_parts(tiny_gail(tmp_path, **settings))
    alive = {"epoch": 1, **{tag: float(value) for tag, value in game.step().items()}}
    assert {d.player for d in health.deaths([alive])} == (
        {"updater"} if kind == "updater" else set()
    )
    if kind == "discriminator":  # where both sides are as many, zeros have no gradient
        game.env.theta = torch.zeros_like(game.env.theta)
    if kind == "policy":
        drown(game.player.policy.action_net)
        with torch.no_grad():
            game.player.policy.action_net.bias[1] = -50
    if kind == "batch":  # every episode is over, and none begins anew
        game.env._over = torch.ones_like(game.env._over)
        game.env.observations = game.env.code.observe(game.env.task.observe(), game.env._over)
    stats = {"epoch": 2, **{tag: float(value) for tag, value in game.step().items()}}
    assert kind in {death.player for death in health.deaths([alive, stats])}


def test_since_when():
    tag = "health/attacker/saturated"
    rows = [{"epoch": n, tag: value} for n, value in enumerate([1.0, 0.5, 1.0, 1.0], 1)]
    (death,) = health.deaths([*rows, {"epoch": 5, "other": 1.0}, {"epoch": 6, tag: 0.999}])
    assert (death.since, death.value) == (3, 0.999)
    assert "saturated" in death.sentence
    assert "since epoch 3" in death.sentence
    assert health.deaths([*rows, {"epoch": 5, tag: 0.5}]) == [], "it lives again"
    assert health.deaths([{"epoch": 1, "health/attacker/unknown": 9.0}]) == []
    assert health.deaths([]) == []


def test_blind_batches_count_over_the_whole_run():
    """A policy that has learned the task falls no more: at the end all batches are live."""
    tag = "health/batch/blind"
    values = [0.0, 0.0, 0.6, 0.5, *[0.0] * 16]
    (death,) = health.deaths([{"epoch": n, tag: value} for n, value in enumerate(values, 1)])
    assert (death.since, death.value) == (3, pytest.approx(1.1 / 20))
    assert health.deaths([{"epoch": n, tag: 0.01} for n in range(20)]) == []


def test_spread_by_hand():
    outputs = torch.tensor([[0.0, 1.0], [0.5, 1.0], [-1.0, -1.0]])
    found = health.output_signs(outputs, torch.tensor([3, 3, 5]))
    assert found["spread"] == pytest.approx((math.sqrt(2) / 4 + 0) / 2)  # class 5 has one image
    assert found["saturated"] == pytest.approx(4 / 6)
    assert "spread" not in health.output_signs(outputs, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("adam", [True, False])
def test_the_gradient_is_the_moving_mean_over_the_weights(adam):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind([weight], 0.0, **({} if adam else {"momentum": 0.9}))
    assert health.gradient_sign(optimizer) == {}
    weight.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    first = 0.1 * 2 if adam else 2  # of Adam's mean, which begins at 0
    assert health.gradient_sign(optimizer)["gradient"] == pytest.approx(first / 5)


@pytest.mark.parametrize("kind", ["l2l", "policy", "defender"])
def test_weight_decay_does_not_hide_that_there_is_no_gradient(kind):
    torch.manual_seed(0)

    def made():
        if kind == "l2l":
            own = AttackerPlayer(parts.network(1))  # 2e-4, the paper's
            return own, own.module, own.optimizer
        net = nn.Linear(3, 2)
        if kind == "defender":  # its default, 5e-4, and momentum
            own = Defender(net, lr=0.1)
            return own, net, own.optimizer
        decaying = ReinforceConfig("sgd", baseline="loo", momentum=0.9, weight_decay=5e-4)
        own = Reinforce(net, decaying, seeded())
        return own, net, own.optimizer

    def step(own, net, size):
        if kind == "policy":
            own.climb(size * net(torch.ones(1, 3)).sum())
            return
        for weight in net.parameters():
            weight.grad = torch.full_like(weight, size)
        own.step()

    own, net, optimizer = made()
    assert optimizer.param_groups[0]["weight_decay"] > 0
    for size, dead in ((0.0, True), (1.0, False)):
        step(own, net, size)
        row = {"epoch": 1, **health.tagged("attacker", health.gradient_sign(optimizer))}
        assert [one.sign for one in health.deaths([row])] == (["gradient"] if dead else [])
    again, other, its = made()
    again.load_state_dict(own.state_dict())
    other.load_state_dict(net.state_dict())
    for one, two in ((own, net), (again, other)):
        step(one, two, 0.5)
    assert health.gradient_sign(its) == health.gradient_sign(optimizer)


def test_looking_changes_nothing(digits):
    network, (x, y) = (
        attnet(False).train(),
        (digits.train.floats(slice(32)), digits.train.labels[:32]),
    )
    state, before = torch.get_rng_state(), [p.clone() for p in network.parameters()]
    one, two = (health.network_signs(network, x, y) for _ in range(2))
    assert one == two
    assert network.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_report_flags_a_dead_player(tmp_path, digits):
    """From the step to report.md, by the shared loop."""
    rules = GAMES["minimax"](True)
    with seeded_init(0):
        defender = Defender(SmallCNN((1, 8, 8), 10, width=8), lr=1e-3)
    game = DefenderTraining(rules, defender, digits.train.first(128), 64, 0)
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    plan = TrainingPlan(2, "constant")
    Trainer(game, run, plan, lambda module: {"eval/robust": 0.0}).fit(resume=False)
    content = judge_run(
        run, defender.module, digits.test.first(20), EPS, dataset="digits", attacks=("fgsm",),
        seed=0, title="",
    )  # fmt: skip
    kept = weights(run.path)  # of equal scores the earliest
    left = defender.module.state_dict()
    assert all(torch.equal(value, kept[f"best/{name}"]) for name, value in left.items())
    assert not all(torch.equal(value, kept[f"last/{name}"]) for name, value in left.items())
    flags = {flag["name"]: flag["meaning"] for flag in content["flags"]}
    assert "since epoch 1" in flags["dead_attacker_saturated"]
    assert "`dead_attacker_spread`" in (run.path / "report.md").read_text()


def test_a_run_without_weights_is_not_judged(tmp_path, digits):
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    with pytest.raises(InputError, match=r"has no weights.*judge_classifier"):
        judge_run(run, nn.Linear(1, 1), digits.test.first(20), EPS, dataset="digits")


def test_the_docs_have_every_sign_with_its_threshold():
    lines = (ROOT / "docs" / "evaluation.md").read_text().splitlines()
    for name, sign in health.SIGNS.items():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        wanted = "never"
        if sign.above < math.inf:
            wanted = f"above {sign.above:g}"
        elif sign.below > -math.inf:
            wanted = f"below {sign.below:g}".replace("1e-0", "1e-")
        assert line.endswith(f"{'mean over the run | ' if sign.whole else '| '}{wanted} |"), line

"""L2L: both players' gradients, modes, counts, controls."""

import copy
from functools import partial

import pytest
import torch
from conftest import normed
from l2l_parts import DIGIT, EPS, network, player
from torch import nn

from advgame.attacks import InputGradient, attacked, fgsm, pgd
from advgame.classifiers import SmallCNN
from advgame.data import Batches
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import AWPDefender
from advgame.games.costs import perturbation_stats
from advgame.games.l2l import L2L, Modes
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.threat import L2, Linf
from agents.l2l import L2LAttack, L2LAttacker, L2LNetwork, L2LPlayer


def start(gradients, keep=None, lr=0.1, **rules):
    """A defender, the game, and the same two networks once more."""
    defender = Defender(normed(), lr=lr, weight_decay=0.0)
    own = player(gradients, keep, weight_decay=0.0)
    game = L2L(Linf(EPS), own, **rules)
    return defender, game, copy.deepcopy(defender.module), copy.deepcopy(own.module)


@pytest.mark.parametrize("gradients", [0, 1, 2])
def test_shared_gradients_equal_separate_ones(gradients, batch, rng):
    x, y = batch
    keep = []
    defender, game, model, net = start(gradients, keep, form="shared")
    result = game.step(defender, x, y, rng)
    model.train(), net.train()
    before = copy.deepcopy(model)
    x_adv = net.perturb(x, Linf(EPS), InputGradient(model, x, y))
    assert torch.equal(result.x_adv, x_adv)
    theta = torch.autograd.grad(
        cross_entropy(model(x_adv.detach()), y).mean(), list(model.parameters())
    )
    for parameter in before.parameters():
        parameter.requires_grad_(False)
    phi = torch.autograd.grad(cross_entropy(before(x_adv), y).mean(), list(net.parameters()))
    for own, want, old in zip(defender.module.parameters(), theta, model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, want)
        torch.testing.assert_close(own, old - 0.1 * want)  # down
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    moved = [
        (a - b) * g.sign()
        for a, b, g in zip(game.attacker.module.parameters(), net.parameters(), phi, strict=True)
    ]
    largest = max(range(len(phi)), key=lambda i: phi[i].abs().max())
    clear = phi[largest].abs() > 1e-4
    torch.testing.assert_close(  # up: Adam's first step is the learning rate along the sign
        moved[largest][clear], torch.full_like(moved[largest][clear], 1e-3), rtol=1e-2, atol=1e-6
    )
    assert float(result.stats["game/attacker_loss"]) == float(result.losses.mean())


def test_a_shared_step_under_awp_follows_the_gradient_at_the_perturbed_weights(batch, rng):
    found = {}
    for name, kind in (("plain", Defender), ("awp", partial(AWPDefender, gamma=1e-6))):
        found[name] = []
        game = L2L(Linf(EPS), player(1, found[name]), "shared")
        result = game.step(kind(normed(), lr=0.1), *batch, rng)
        assert float(result.stats["cost/backwards"]) == 1 + (name == "awp")
    for got, want in zip(found["awp"][0], found["plain"][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("learning", ["eval", "train"])
def test_the_alternating_attacker_meets_the_updated_defender(learning, batch, rng):
    x, y = batch
    keep = []
    defender, game, model, net = start(1, keep, modes=Modes(learning=learning))
    result = game.step(defender, x, y, rng)
    with torch.no_grad():
        first = net.eval().perturb(x, Linf(EPS), InputGradient(model, x, y))
    assert torch.equal(result.x_adv, first), "g in evaluation mode, the gradient before the step"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    cross_entropy(model.train()(first), y).mean().backward()
    optimizer.step()
    slope = InputGradient(model, x, y, mode=learning)
    x_adv = net.train().perturb(x, Linf(EPS), slope)
    with attacked(model, learning):
        reached = cross_entropy(model(x_adv), y).mean()
        phi = torch.autograd.grad(reached, list(net.parameters()))
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.stats["game/attacker_loss"], reached.detach())


@pytest.mark.parametrize(
    ("gradients", "rules", "defender_forwards", "attacker_forwards"),
    [
        (1, {}, 1, 1),
        (1, {"modes": Modes(gradient="train", learning="train")}, 1, 1),
        (1, {"modes": Modes(gradient="train", keep_buffers=False)}, 2, 1),  # the published quirk
        (2, {"modes": Modes(gradient="train", keep_buffers=False)}, 3, 2),
        (1, {"modes": Modes(attacker="train")}, 1, 2),
        (0, {"modes": Modes(attacker="train")}, 1, 1),
        (2, {"form": "shared"}, 1, 2),
    ],
)
def test_only_the_forwards_that_should_move_running_statistics(
    gradients, rules, defender_forwards, attacker_forwards, batch, rng
):
    defender, game, *_ = start(gradients, **rules)
    game.step(defender, *batch, rng)
    assert defender.module.net[1].num_batches_tracked == defender_forwards
    counters = {
        int(m.num_batches_tracked)
        for m in game.attacker.module.modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    assert counters == {attacker_forwards}


def test_the_mode_of_the_gradient_matters(batch, rng):
    made = []
    for mode in ("eval", "train"):
        defender, game, *_ = start(1, modes=Modes(gradient=mode))
        defender.module.net[1].running_var.fill_(0.01)
        made.append(game.step(defender, *batch, rng).x_adv)
    assert not torch.equal(*made)


COSTS = [  # gradients, rules, (F, B, B_x, forwards and backwards of the attacker)
    (0, {}, (2, 1, 1, 2, 1)),
    (1, {}, (4, 1, 3, 2, 1)),
    (2, {}, (6, 1, 5, 4, 2)),
    (0, {"modes": Modes(attacker="train")}, (2, 1, 1, 1, 1)),
    (0, {"form": "shared"}, (1, 1, 0, 1, 1)),
    (1, {"form": "shared"}, (2, 1, 1, 1, 1)),
    (2, {"form": "shared"}, (3, 1, 2, 2, 2)),
    (1, {"attacker_steps": 2}, (5, 1, 4, 3, 2)),  # the clean gradient serves both
    (2, {"attacker_steps": 2}, (8, 1, 7, 6, 4)),
]


@pytest.mark.parametrize(("gradients", "rules", "cost"), COSTS)
def test_costs_are_what_hooks_count(gradients, rules, cost, batch, rng):
    """On a classifier of one layer, so that a backward shows in its weight, its input, or both."""
    seen = dict.fromkeys(("F", "B", "Bx", "f", "b"), 0)

    def bump(name):
        seen[name] += 1

    class Counted(torch.autograd.Function):
        """Identity: its backward runs where an input gradient is formed."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            bump("Bx")
            return grad

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            bump("F")
            return self.head(Counted.apply(x).flatten(1))

    def watched(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda grad: bump("b"))

    with seeded_init(0):
        model = Probe()
    model.head.weight.register_hook(lambda grad: bump("B"))
    own = player(gradients)
    own.module.body.register_forward_hook(lambda *_: bump("f"))
    own.module.body.register_forward_hook(watched)
    game = L2L(Linf(EPS), own, **rules)
    stats = game.step(Defender(model), *batch, rng).stats
    names = ("forwards", "backwards", "input_backwards", "attacker_forwards", "attacker_backwards")
    assert tuple(int(stats[f"cost/{name}"]) for name in names) == cost
    # shared: the one backward with weight gradients also forms the input gradient, on its way to φ
    together = int(rules.get("form") == "shared")
    assert (seen["F"], seen["B"], seen["Bx"] - together, seen["f"], seen["b"]) == cost
    worth = cost[0] + 2 * cost[1] + cost[2]
    assert int(stats["attacker/forwards_per_image"]) == worth


@pytest.mark.parametrize("form", ["alternating", "shared"])
def test_the_same_seeds_give_the_same_bits(form, digits):
    ends = []
    for seed in (0, 0, 1):
        own = L2LPlayer(network(2, seed=seed))
        with seeded_init(0):
            defender = Defender(SmallCNN(DIGIT, 10, width=8))
        game, batches = L2L(Linf(EPS), own, form), Batches(digits.train, 16, 0)
        for _ in range(3):
            game.step(defender, *batches.next(), torch.Generator())
        state = [*own.module.state_dict().values(), *defender.module.state_dict().values()]
        ends.append(torch.cat([one.flatten().double() for one in state]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_part_of_epsilon_is_a_smaller_ball(batch, rng):
    for scale in (0.25, 1.0):
        defender, game, *_ = start(1)
        result = game.step(defender, *batch, rng, scale=scale)
        largest = float((result.x_adv - batch[0]).abs().max())
        assert 0.5 * scale * EPS < largest <= scale * EPS + 1e-7
        assert 0 < float(result.stats["attacker/size"]) <= 1


def test_misuse_is_refused(batch):
    x, y = batch
    with pytest.raises(InputError, match="not in L2"):
        L2LAttacker(network(), {})(L2(1.0), 10)
    with pytest.raises(InputError, match="2 queries"):
        L2LAttacker(network(2), {})(Linf(0.1), 1)
    attack = L2LAttack(network(), Linf(0.1))
    with pytest.raises(InputError, match=r"images of \(1, 8, 8\)"):
        attack.run(normed(), x.expand(-1, 3, -1, -1), y)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attack.run(normed(), x * 255, y)
    with pytest.raises(InputError, match="softmax"):
        attack.run(nn.Sequential(normed(), nn.Softmax(1)), x, y)
    for bad in ({"gradients": -1}, {"width": "huge"}, {"scaling": "none"}, {"shape": (1, 7, 8)}):
        with pytest.raises(InputError):
            L2LNetwork(**{"shape": DIGIT, **bad})
    for bad in (
        {"threat": L2(0.1)},
        {"threat": Linf(torch.tensor([0.1, 0.2]))},
        {"form": "both"},
        {"attacker_steps": 0},
        {"form": "shared", "attacker_steps": 2},
    ):
        with pytest.raises(InputError):
            L2L(**{"threat": Linf(0.1), "attacker": player(), **bad})


def test_smoothness_and_size_of_perturbations(rng):
    board = (torch.arange(64).view(8, 8) + torch.arange(8).view(8, 1)) % 2 * 2.0 - 1
    noise = torch.randn(50, 1, 8, 8, generator=rng).sign()
    for delta, size, variation, on_face in (
        (torch.full((3, 1, 8, 8), 0.05), 0.5, 0, 0),
        (board.expand(3, 1, 8, 8) * 0.1, 1, 2, 1),
        (noise * 0.1, 1, 1, 1),
    ):
        stats = perturbation_stats(delta, Linf(0.1))
        assert float(stats["attacker/size"]) == pytest.approx(size)
        assert float(stats["attacker/variation"]) == pytest.approx(variation, abs=0.05)
        assert float(stats["attacker/on_face"]) == pytest.approx(on_face)


def test_controls_are_plain_and_adversarial_training(batch, rng):
    x, y = batch
    for make, cost in ((None, (1, 1, 0)), (fgsm, (2, 1, 1)), (lambda t: pgd(t, 10), (11, 1, 10))):
        defender, model = Defender(normed(), lr=0.1, weight_decay=0.0), normed()
        result = AdversarialTraining(Linf(EPS), make).step(defender, x, y, rng, scale=0.5)
        if make is None:
            assert torch.equal(result.x_adv, x)
        if make is fgsm:
            torch.testing.assert_close(result.x_adv, fgsm(Linf(EPS / 2)).perturb(model, x, y))
        names = ("forwards", "backwards", "input_backwards")
        assert tuple(int(result.stats[f"cost/{name}"]) for name in names) == cost
        cross_entropy(model.train()(result.x_adv), y).mean().backward()
        for own, old in zip(defender.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(own, old - 0.1 * old.grad)

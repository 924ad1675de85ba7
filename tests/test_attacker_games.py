"""Games with an attacker network, L2L and ADT: both players' gradients, modes, counts, bits."""

import copy
import math

import pytest
import torch
from attacker_parts import ADTS, BALL, DIGIT, EPS, L2LS, game, joint, player
from conftest import normed, seeded
from torch import nn

from advgame.attacks import InputGradient, attacked, fgsm, pgd
from advgame.attacks.distributional import DistributionalAttack
from advgame.classifiers import SmallCNN
from advgame.data import Batches
from advgame.defender import Defender
from advgame.distributions import LOG_2
from advgame.errors import InputError
from advgame.games.adt import AdtAmortised, AdtExp
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import AWPDefender
from advgame.games.costs import perturbation_stats
from advgame.games.l2l import L2L, Modes
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.solvers import Optimistic
from advgame.threat import L2, Linf

# name -> the attacker's kind, settings of its player
JOINT = {
    **{f"l2l {k}": (k, {"weight_decay": 0.0}) for k in L2LS},
    "exp-am": ("exp-am", {"lam": 0.7}),
    "imp-am, pushed": ("imp-am", {"lam": 0.7, "threshold": -math.inf}),
    "imp-am, at rest": ("imp-am", {"lam": 0.7, "threshold": 9.0}),
    "imp-am, lazy": ("imp-am", {"lam": 0.7, "threshold": 9.0, "lazy": True}),
}


@pytest.mark.parametrize("case", JOINT)
def test_one_backward_holds_both_players_gradients(case, batch):
    """θ: the loss at fixed samples. φ: the loss through frozen f, plus λ entropy."""
    (x, y), keep, (kind, settings) = batch, [], JOINT[case]
    defender = Defender(normed(), lr=0.1, weight_decay=0.0)
    own = player(kind, keep, **settings)
    model, twin = copy.deepcopy(defender.module), copy.deepcopy(own.module).train()
    encoder = copy.deepcopy(own.encoder) if kind == "imp-am" else None
    result = joint(kind, own).step(defender, x, y, seeded())
    slope, rng, entropy = InputGradient(model, x, y), seeded(), 0
    if kind == "exp-am":
        found = twin.distribution(twin.information(slope, BALL))
        draw = found.sample(rng)
        value, entropy = draw.value, -found.log_density(draw).flatten(1).mean(1).mean()
    elif encoder is not None:
        information = twin.information(slope, BALL)
        z = twin.noise(information, rng)
        value = twin.perturbation(information, z)
        entropy = -encoder.train().nll(value, z)
    else:
        value = twin.sampler(slope, BALL)(rng)
    x_adv = (x + EPS * value).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, x_adv.detach())
    theta = torch.autograd.grad(
        cross_entropy(model.train()(x_adv.detach()), y).mean(), list(model.parameters())
    )
    for got, want, old in zip(defender.module.parameters(), theta, model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want)
        torch.testing.assert_close(got, old - 0.1 * want)  # down
    pushed = case not in ("imp-am, at rest", "imp-am, lazy")
    with attacked(model, "train"):
        payoff = cross_entropy(model(x_adv), y).mean() + 0.7 * entropy * pushed
        phi = torch.autograd.grad(payoff, list(twin.parameters()), retain_graph=True)
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3 if kind in ADTS else 1e-4, atol=1e-6)
    if encoder is not None:
        psi = torch.autograd.grad(entropy, list(encoder.parameters()))  # without λ: it is G's
        for got, want in zip(keep[1], psi, strict=True):
            want = want * (case != "imp-am, lazy")
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        bound = LOG_2 + float(entropy.detach())
        assert float(result.stats["game/entropy"]) == pytest.approx(bound, 1e-4)
        assert float(result.stats["attacker/pushed"]) == pushed
    moved = torch.cat([
        ((new - old) * g.sign())[g.abs() > 1e-3].detach()
        for new, old, g in zip(own.module.parameters(), twin.parameters(), phi, strict=True)
    ])  # fmt: skip
    assert len(moved) > 20
    rate = torch.full_like(moved, 1e-3 if kind in L2LS else 2e-4)
    torch.testing.assert_close(moved, rate, rtol=1e-2, atol=1e-6)  # up: Adam's first step
    assert float(result.stats["game/attacker_loss"]) == float(result.losses.mean())


@pytest.mark.parametrize("kind", [1, "exp-am"])
def test_under_awp_the_attacker_follows_the_gradient_at_the_perturbed_weights(kind, batch):
    (x, y), kept, defender = batch, [], AWPDefender(normed(), gamma=0.05, lr=0.1)
    model, own = copy.deepcopy(defender.module), player(kind, kept)
    twin = copy.deepcopy(own)
    result = joint(kind, own).step(defender, x, y, seeded())
    assert float(result.stats["cost/forwards"]) == own.gradients + 2
    assert float(result.stats["cost/backwards"]) == 2
    twin.module.train()
    sampled = twin.sample(InputGradient(model, x, y), BALL, seeded())
    leaf = sampled.x_adv.detach().requires_grad_()
    weights, slopes = [p for p in model.parameters() if p.dim() > 1], []
    for _ in range(2):  # at θ, and at θ + v
        loss = cross_entropy(model.train()(leaf), y).mean()
        at_leaf, *at_weights = torch.autograd.grad(loss, [leaf, *weights])
        slopes.append(at_leaf)
        with torch.no_grad():
            for weight, g in zip(weights, at_weights, strict=True):
                weight += 0.05 * weight.norm() * g / g.norm()
    bonus, phi = sampled.bonus or 0, list(twin.module.parameters())
    by_hand = [
        torch.autograd.grad((sampled.x_adv * slope).sum() + bonus, phi, retain_graph=True)
        for slope in slopes
    ]
    for got, want in zip(kept[0], by_hand[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*by_hand, strict=True)]
    assert max(apart) > 0.05, "the weights' perturbation is to be seen"


@pytest.mark.parametrize("learning", ["eval", "train"])
def test_the_alternating_attacker_meets_the_updated_defender(learning, batch):
    (x, y), keep = batch, []
    defender, own = Defender(normed(), lr=0.1, weight_decay=0.0), player(1, keep)
    model, net = copy.deepcopy(defender.module), copy.deepcopy(own.module)
    result = game(1, own, modes=Modes(learning=learning)).step(defender, x, y, seeded())
    with torch.no_grad():
        first = net.eval().examples(InputGradient(model, x, y), BALL, seeded())
    assert torch.equal(result.x_adv, first), "g in evaluation mode, the gradient before the step"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    cross_entropy(model.train()(first), y).mean().backward()
    optimizer.step()
    slope = InputGradient(model, x, y, mode=learning)
    x_adv = net.train().examples(slope, BALL, seeded())
    with attacked(model, learning):
        reached = cross_entropy(model(x_adv), y).mean()
        phi = torch.autograd.grad(reached, list(net.parameters()))
    for got, want in zip(keep[0], phi, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.stats["game/attacker_loss"], reached.detach())


def test_a_step_of_exp_trains_on_a_fresh_sample(batch):
    x, y = batch
    attack = DistributionalAttack(BALL, steps=3, samples=2)
    defender = Defender(normed(), lr=0.1, weight_decay=0.0)
    model = copy.deepcopy(defender.module)
    result = AdtExp(attack).step(defender, x, y, rng := seeded(), scale=0.5)
    again = seeded()
    half = DistributionalAttack(Linf(EPS / 2), steps=3, samples=2)
    found = half.fit(model, x, y, again).distribution
    draw = found.sample(again)
    x_adv = (x + EPS / 2 * draw.value).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, x_adv)
    assert torch.equal(rng.get_state(), again.get_state())
    losses = cross_entropy(model.train()(x_adv), y)
    torch.testing.assert_close(result.losses, losses.detach())
    for got, old in zip(defender.module.parameters(), model.parameters(), strict=True):
        (grad,) = torch.autograd.grad(losses.mean(), old, retain_graph=True)
        torch.testing.assert_close(got, old - 0.1 * grad)
    entropy = -found.log_density(draw).mean()
    assert float(result.stats["game/entropy"]) == pytest.approx(float(entropy), abs=0.1)
    assert result.stats["attacker/size"] <= 1


@pytest.mark.parametrize(
    ("kind", "rules", "defender_forwards", "attacker_forwards"),
    [
        (1, {}, 1, 1),
        (1, {"modes": Modes(gradient="train", learning="train")}, 1, 1),
        (1, {"modes": Modes(gradient="train", keep_buffers=False)}, 2, 1),  # the published quirk
        (2, {"modes": Modes(gradient="train", keep_buffers=False)}, 3, 2),
        (1, {"modes": Modes(attacker="train")}, 1, 2),
        (0, {"modes": Modes(attacker="train")}, 1, 1),
        (2, {"form": "shared"}, 1, 2),
        ("exp-am", {}, 1, 1),
        ("imp-am", {}, 1, 1),
    ],
)
def test_only_the_forwards_that_should_move_running_statistics(
    kind, rules, defender_forwards, attacker_forwards, batch, rng
):
    defender, own = Defender(normed()), player(kind)
    game(kind, own, **rules).step(defender, *batch, rng)
    assert defender.module.net[1].num_batches_tracked == defender_forwards
    norms = [m for m in own.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {attacker_forwards}


def test_the_mode_of_the_gradient_matters(batch, rng):
    made = []
    for mode in ("eval", "train"):
        defender = Defender(normed())
        defender.module.net[1].running_var.fill_(0.01)
        made.append(game(1, modes=Modes(gradient=mode)).step(defender, *batch, rng).x_adv)
    assert not torch.equal(*made)


COSTS = [  # attacker, rules, (F, B, B_x, forwards and backwards of the attacker)
    (0, {}, (2, 1, 1, 2, 1)),
    (1, {}, (4, 1, 3, 2, 1)),
    (2, {}, (6, 1, 5, 4, 2)),
    (0, {"modes": Modes(attacker="train")}, (2, 1, 1, 1, 1)),
    (0, {"form": "shared"}, (1, 1, 0, 1, 1)),
    (1, {"form": "shared"}, (2, 1, 1, 1, 1)),
    (2, {"form": "shared"}, (3, 1, 2, 2, 2)),
    (1, {"attacker_steps": 2}, (5, 1, 4, 3, 2)),  # the clean gradient serves both
    (2, {"attacker_steps": 2}, (8, 1, 7, 6, 4)),
    ("exp", {}, (36, 1, 35, 0, 0)),  # published: 36 F and B, all with weight gradients
    ("exp-am", {}, (3, 1, 2, 1, 1)),  # published: 3 F and B
    ("imp-am", {}, (3, 1, 2, 1, 1)),
]


@pytest.mark.parametrize(("kind", "rules", "cost"), COSTS)
def test_costs_are_what_hooks_count(kind, rules, cost, batch, rng):
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
        bump("f")
        if output.requires_grad:
            output.register_hook(lambda grad: bump("b"))

    with seeded_init(0):
        model = Probe()
    model.head.weight.register_hook(lambda grad: bump("B"))
    if kind == "exp":
        played = AdtExp(DistributionalAttack(BALL))
    else:
        played = game(kind, **rules)
        played.attacker.module.body.register_forward_hook(watched)
    stats = played.step(Defender(model), *batch, rng).stats
    names = ("forwards", "backwards", "input_backwards", "attacker_forwards", "attacker_backwards")
    assert tuple(int(stats[f"cost/{name}"]) for name in names) == cost
    # one backward with weight gradients also forms the input gradient, on its way to φ
    together = int(kind in ADTS or rules.get("form") == "shared")
    assert (seen["F"], seen["B"], seen["Bx"] - together, seen["f"], seen["b"]) == cost
    assert int(stats["attacker/forwards_per_image"]) == cost[0] + 2 * cost[1] + cost[2]
    assert ("cost/encoder_passes" in stats) == (kind == "imp-am")


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        (2, dict),
        (2, lambda: {"form": "shared"}),
        *((one, dict) for one in ADTS),
        ("attnet", lambda: {"direction": Optimistic()}),
    ],
)
def test_the_same_seeds_give_the_same_bits_and_a_saved_game_goes_on(kind, rules, digits):
    def fresh(seed=0):
        with seeded_init(0):
            defender = Defender(SmallCNN(DIGIT, 10, width=8))
        own = player(kind, seed=0 if kind in ADTS else seed)  # ADT's samples differ anyway
        return defender, game(kind, own, **rules()), seeded(seed)

    def play(defender, played, rng, parts):
        batches = Batches(digits.train, 16, 0)
        for part in [batches.next() for _ in range(max(parts) + 1)][min(parts) :]:
            with seeded_init(0):  # AttNet's dropout
                played.step(defender, *part, rng)
        modules = [module for module, _ in played.attacker.learners] + [defender.module]
        values = [value for one in modules for value in one.state_dict().values()]
        return torch.cat([one.flatten().double() for one in values])

    whole, again, other = (play(*fresh(seed), range(4)) for seed in (0, 0, 1))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, other)
    (defender, played, rng), (second, resumed, _) = fresh(), fresh()
    play(defender, played, rng, range(2))
    second.module.load_state_dict(defender.module.state_dict())
    second.load_state_dict(copy.deepcopy(defender.state_dict()))
    resumed.load_state_dict(copy.deepcopy(played.state_dict()))
    assert torch.equal(play(second, resumed, rng, range(2, 4)), whole)


def test_a_part_of_epsilon_is_a_smaller_ball(batch, rng):
    for scale in (0.25, 1.0):
        result = game(1).step(Defender(normed()), *batch, rng, scale=scale)
        largest = float((result.x_adv - batch[0]).abs().max())
        assert 0.5 * scale * EPS < largest <= scale * EPS + 1e-7
        assert 0 < float(result.stats["attacker/size"]) <= 1


RADII = Linf(torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: L2L(L2(0.1), player()), "L∞ ball with one eps"),
        (lambda: L2L(RADII, player()), "L∞ ball with one eps"),
        (lambda: AdtAmortised(RADII, player("exp-am")), "L∞ ball with one eps"),
        (lambda: AdtExp(DistributionalAttack(RADII)), "L∞ ball with one eps"),
        (lambda: L2L(BALL, player(), form="both"), "unknown form"),
        (lambda: L2L(BALL, player(), attacker_steps=0), "attacker_steps"),
        (lambda: L2L(BALL, player(), form="shared", attacker_steps=2), "alternating for more"),
        (lambda: player("exp-am", lam=-1.0), "lam"),
        (lambda: player("imp-am", lam=math.nan), "lam"),
        (lambda: player("imp-am", threshold=math.nan), "threshold"),
    ],
)
def test_games_that_cannot_be_played_are_refused(make, answer):
    with pytest.raises(InputError, match=answer):
        make()


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

"""The baselines' losses and games: slow formulas, autograd, equal bits, known answers."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import train
from conftest import BatchNormNet, Linear, seeded
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import cross_entropy

from advgame.attacks import GradientAttack, attacked, fast, feature_scatter, kl_pgd, near_pgd, pgd
from advgame.attacks.label_free import sinkhorn, transport_from
from advgame.classifiers import SmallCNN
from advgame.cli import make_fabric
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.awp import AWPDefender
from advgame.games.free import Free
from advgame.games.pairing import LogitPairing, Mart, Trades
from advgame.games.training import DefenderTraining
from advgame.losses import boosted_cross_entropy, divergence
from advgame.seeding import seeded_init
from advgame.threat import L2, GaussianStart, Linf

SHAPE = (1, 2, 2)
BALL = Linf(0.1)


def smooth(seed=0):
    """A small network without kinks, in fp64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n=8, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=rng)


def flat(tensors):
    return torch.cat([one.detach().flatten() for one in tensors])


def plain(kind=Defender, model=None, **settings):
    """A defender whose step is lr times the gradient."""
    return kind(model or smooth(), lr=0.1, momentum=0.0, weight_decay=0.0, **settings)


def probabilities(logits):
    return [[float(v) for v in row.exp() / row.exp().sum()] for row in logits.detach()]


# --- losses


def test_divergence_by_hand_and_by_finite_differences():
    p, q = torch.randn(2, 5, 3, dtype=torch.float64, generator=seeded())
    slow = [
        sum(a * (torch.tensor(a).log() - torch.tensor(b).log()) for a, b in zip(r, s, strict=True))
        for r, s in zip(probabilities(p), probabilities(q), strict=True)
    ]
    torch.testing.assert_close(divergence(p, q), torch.stack(slow).double())
    p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(divergence, (p, q))


def test_divergence_of_underflowed_outputs_has_finite_gradients():
    p = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 1.0, -300.0]], requires_grad=True)
    divergence(p, q).sum().backward()
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


def test_boosted_cross_entropy_by_hand():
    logits, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 4
    slow = []
    for row, label in zip(probabilities(logits), y.tolist(), strict=True):
        other = max(p for k, p in enumerate(row) if k != label)
        slow.append(-torch.tensor(row[label]).log() - torch.tensor(1.0001 - other + 1e-12).log())
    torch.testing.assert_close(boosted_cross_entropy(logits, y), torch.stack(slow).double())


def trades_loss(clean, adversarial, y, beta):
    p, q = clean.softmax(1), adversarial.softmax(1)
    return cross_entropy(clean, y, reduction="none") + beta * (p * (p / q).log()).sum(1)


def mart_loss(clean, adversarial, y, beta):
    p, q, own = clean.softmax(1), adversarial.softmax(1), torch.eye(3, dtype=torch.bool)[y]
    kl = (p * (p / q).log()).sum(1)
    boosted = -q[own].log() - (1.0001 - q.masked_fill(own, 0).amax(1) + 1e-12).log()
    return boosted + beta * kl * (1.0000001 - p[own])


def alp_loss(clean, adversarial, y, beta):
    both = torch.cat([clean, adversarial])
    ce = cross_entropy(both, torch.cat([y, y]), reduction="none").view(2, -1)
    return ce.mean(0) + beta * ((clean - adversarial) ** 2).mean(1)


PAIRED = {
    "trades": (Trades, trades_loss),
    "mart": (Mart, mart_loss),
    "alp": (LogitPairing, alp_loss),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize(
    "beta", [2.5, torch.linspace(0, 3, 8, dtype=torch.float64)], ids=["one", "B"]
)
def test_a_step_of_the_games_of_pairs(name, beta):
    """Weights, losses and examples are those of the formula, written down another way."""
    kind, formula = PAIRED[name]
    (x, y), model, game = batch(), smooth(), kind(BALL, beta)
    defender = plain(model=copy.deepcopy(model))
    result = game.step(defender, x, y, seeded())
    x_adv = game.attack(BALL).run(model, x, y, rng=seeded()).x_adv
    assert torch.equal(result.x_adv, x_adv)
    losses = formula(model(x), model(x_adv), y, beta)
    torch.testing.assert_close(result.losses, losses.detach())
    weights = list(model.parameters())
    slopes = torch.autograd.grad(losses.mean(), weights)
    wanted = flat(w - 0.1 * s for w, s in zip(weights, slopes, strict=True))
    torch.testing.assert_close(flat(defender.module.parameters()), wanted)
    held = formula(model(x).detach(), model(x_adv), y, beta)  # what a one-sided game would do
    one_sided = torch.autograd.grad(held.mean(), weights)
    assert not torch.allclose(flat(one_sided), flat(slopes), atol=1e-3)
    assert float(result.stats["game/clean_loss"]) == pytest.approx(
        float(cross_entropy(model(x), y).detach()), rel=1e-6
    )
    with pytest.raises(InputError, match="beta"):
        kind(BALL, -1.0)


# --- attacks


def test_kl_pgd_is_trades_attack_with_clean_outputs_computed_once():
    (x, y), model = batch(), smooth()
    start = GaussianStart().random_start(x, seeded())
    assert float((start - x).abs().max()) < 0.01
    assert not torch.equal(start, x)
    x_adv = start
    for _ in range(10):
        leaf = x_adv.clone().requires_grad_()
        p, q = model(x).softmax(1), model(leaf).softmax(1)
        (slope,) = torch.autograd.grad((p * (p / q).log()).sum(), leaf)
        x_adv = torch.min(torch.max(x_adv + 0.025 * slope.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    made = kl_pgd(BALL).run(model, x, y, rng=seeded())
    torch.testing.assert_close(made.x_adv, x_adv)
    assert (made.forwards, made.backwards) == (11 * 8, 10 * 8)
    other = kl_pgd(BALL).run(model, x, (y + 1) % 3, rng=seeded())
    assert torch.equal(other.x_adv, made.x_adv), "labels do not matter"
    with pytest.raises(InputError, match="NaN"):
        kl_pgd(BALL).run(model, x * torch.nan, y, rng=seeded())


def test_kl_pgd_with_sizes_per_image():
    """Images that leave early keep their own clean output: each is as it is alone."""
    (x, y), model = batch(), smooth()
    steps, eps = torch.tensor([3, 0, 5, 1, 2, 4, 5, 1]), torch.linspace(0.02, 0.2, 8).double()
    together = replace(
        kl_pgd(BALL), attack=GradientAttack(Linf(eps), steps, eps / 3, start=GaussianStart())
    ).run(model, x, y, rng=seeded())
    start = GaussianStart().random_start(x, seeded())
    for i in range(8):
        one = slice(i, i + 1)
        clean, x_adv = model(x[one]).detach(), start[one]
        for _ in range(int(steps[i])):
            leaf = x_adv.clone().requires_grad_()
            (slope,) = torch.autograd.grad(divergence(clean, model(leaf)).sum(), leaf)
            x_adv = Linf(float(eps[i])).project(leaf.detach() + eps[i] / 3 * slope.sign(), x[one])
        torch.testing.assert_close(together.x_adv[one], x_adv)
    assert together.backwards == int(steps.sum())


def test_fast_in_closed_form():
    w = torch.tensor([[0.5, -1.0, 2.0, -0.1], [0.0, 0.0, 0.0, 0.0]])
    x, y = batch()[0].float(), torch.zeros(8, dtype=torch.int64)
    made = fast(BALL).run(Linear(w), x, y, rng=seeded()).x_adv
    moved = BALL.random_start(x, seeded()) - 0.125 * w[0].sign().view(1, *SHAPE)
    torch.testing.assert_close(made, BALL.project(moved, x))


def test_sinkhorn_nears_the_linear_programme():
    cost = torch.rand(12, 12, generator=seeded(), dtype=torch.float64) * 2
    plan = sinkhorn(cost, 0.002, 3000)
    torch.testing.assert_close(plan.sum(0), torch.full((12,), 1 / 12).double())
    torch.testing.assert_close(
        plan.sum(1), torch.full((12,), 1 / 12).double(), rtol=1e-3, atol=1e-6
    )
    exact = float(cost[linear_sum_assignment(cost.numpy())].mean())
    assert exact <= float((plan * cost).sum()) < exact + 0.005
    rectangle = sinkhorn(cost[:, :5], 0.1, 200)
    torch.testing.assert_close(rectangle.sum(1), torch.full((12,), 1 / 12).double())


def test_the_fixed_plan_is_the_gradient_of_the_entropic_distance():
    def distance(cost):
        plan = sinkhorn(cost, 0.1, 400)
        return float((plan * cost).sum() + 0.1 * (plan * plan.log()).sum())

    cost, h = torch.rand(4, 4, generator=seeded(), dtype=torch.float64), 1e-5
    plan = sinkhorn(cost, 0.1, 400)
    for i, j in ((0, 0), (1, 3), (2, 1)):
        bump = torch.zeros_like(cost)
        bump[i, j] = h
        slope = (distance(cost + bump) - distance(cost - bump)) / (2 * h)
        assert slope == pytest.approx(float(plan[i, j]), rel=1e-3)


def test_feature_scatter_moves_the_outputs_away_and_sees_no_label():
    (x, y), model = batch(32), smooth()
    made = feature_scatter(BALL).run(model, x, y, rng=seeded())
    other = feature_scatter(BALL).run(model, x, (y + 1) % 3, rng=seeded())
    assert torch.equal(made.x_adv, other.x_adv)
    assert (made.forwards, made.backwards) == (64, 32)
    far = transport_from(model(x).detach())
    start = BALL.random_start(x, seeded())
    with torch.no_grad():
        assert far(model(made.x_adv), y).sum() > 1.5 * far(model(start), y).sum()
    assert float((made.x_adv - x).abs().max()) <= 0.1 + 1e-9


# --- AWP


def test_awp_descends_at_the_worst_weights_nearby_and_puts_them_back():
    (x, y), model, gamma = batch(), smooth(), 0.05
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=gamma)
    losses = defender.backward(x, y)
    assert torch.equal(flat(defender.module.parameters()), flat(model.parameters()))
    here = cross_entropy(model(x), y)
    slopes = torch.autograd.grad(here, list(model.parameters()))
    with torch.no_grad():
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            if weight.dim() > 1:
                weight += gamma * weight.norm() * slope / slope.norm()
    there = cross_entropy(model(x), y)
    assert float(there.detach()) > float(here.detach())
    torch.testing.assert_close(losses.mean(), there.detach())
    wanted = torch.autograd.grad(there, list(model.parameters()))
    torch.testing.assert_close(flat(p.grad for p in defender.module.parameters()), flat(wanted))
    before = flat(defender.module.parameters())
    defender.step()
    torch.testing.assert_close(flat(defender.module.parameters()), before - 0.1 * flat(wanted))


def test_awp_perturbs_by_the_loss_that_the_game_descends():
    (x, y), model = batch(), smooth()
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=0.05)
    result = Trades(BALL, 3.0).step(defender, x, y, seeded())
    x_adv = kl_pgd(BALL).run(model, x, y, rng=seeded()).x_adv
    assert torch.equal(result.x_adv, x_adv), "the attack meets the weights as they are"
    weights = list(model.parameters())
    slopes = torch.autograd.grad(trades_loss(model(x), model(x_adv), y, 3.0).mean(), weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight += 0.05 * weight.norm() * slope / slope.norm() * (weight.dim() > 1)
    torch.testing.assert_close(result.losses, trades_loss(model(x), model(x_adv), y, 3.0).detach())


def test_awp_counts_one_pass_in_batch_norms_statistics():
    torch.manual_seed(0)
    model, x, y = BatchNormNet(), torch.rand(8, 1, 8, 8), torch.arange(8)
    defender = plain(AWPDefender, copy.deepcopy(model), gamma=1e-9)
    defender.backward(x, y)
    model.train()(x)
    for (name, ours), theirs in zip(defender.module.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with pytest.raises(InputError, match="gamma"):
        AWPDefender(BatchNormNet(), gamma=0.0)


def test_awp_begins_after_its_warm_up_also_when_it_is_resumed():
    x, y = batch()
    plainly, late = plain(), plain(AWPDefender, gamma=0.05, warm_up=1)
    assert torch.equal(plainly.backward(x, y), late.backward(x, y))
    assert late.descents == 1
    resumed = plain(AWPDefender, gamma=0.05, warm_up=1)
    resumed.load_state_dict(late.state_dict())
    for one in (late, resumed):
        assert float(one.backward(x, y).mean()) > float(plainly.backward(x, y).mean())
        assert one.descents == 2
    with pytest.raises(InputError, match="warm_up"):
        AWPDefender(smooth(), 0.1, -1)


def test_awp_leaves_a_layer_alone_that_has_no_gradient():
    model = smooth()
    with torch.no_grad():
        model[3].weight.zero_()  # nothing reaches the first layer
    (x, y), before = batch(), copy.deepcopy(model)
    defender = plain(AWPDefender, model, gamma=0.1)
    assert torch.isfinite(defender.backward(x, y)).all()
    assert torch.equal(flat(model.parameters()), flat(before.parameters()))


# --- Free


def test_free_is_its_loop_written_down():
    model, game = smooth(), Free(BALL, replays=3)
    defender, delta = plain(model=copy.deepcopy(model)), torch.zeros(8, *SHAPE).double()
    outside = 0
    for seed in (1, 2):
        x, y = batch(seed=seed)
        result = game.step(defender, x, y, seeded())
        for _ in range(3):
            leaf = (x + delta).clamp(0, 1).requires_grad_()
            weights = list(model.parameters())
            loss = cross_entropy(model(leaf), y)
            slope, *slopes = torch.autograd.grad(loss, [leaf, *weights])
            with torch.no_grad():
                for weight, one in zip(weights, slopes, strict=True):
                    weight -= 0.1 * one
            delta = (delta + 0.1 * slope.sign()).clamp(-0.1, 0.1)
            outside += int(((x + delta).clamp(0, 1) != x + delta).sum())
        torch.testing.assert_close(result.x_adv, leaf.detach())
        torch.testing.assert_close(flat(defender.module.parameters()), flat(model.parameters()))
    assert torch.equal(game.state_dict()["delta"], delta)
    assert outside > 0, "some x + δ are no pixels, and their δ moves all the same"


def test_free_with_one_replay_begins_as_plain_training_and_goes_on_from_its_state():
    x, y = batch()
    one, two = plain(), plain()
    game = Free(BALL, replays=1)
    game.step(one, x, y, seeded())
    two.backward(x, y)
    two.step()
    assert torch.equal(flat(one.module.parameters()), flat(two.module.parameters()))
    again = Free(BALL, replays=1)
    again.load_state_dict(copy.deepcopy(game.state_dict()))
    assert torch.equal(game.step(one, x, y, seeded()).x_adv, again.step(two, x, y, seeded()).x_adv)
    with pytest.raises(InputError, match="L∞"):
        Free(L2(1.0))
    with pytest.raises(InputError, match="replays"):
        Free(BALL, replays=0)


# --- every game of scripts/train.py


def made(name, **changes):
    config = train.check(replace(train.defaults("digits", name), **changes))
    return train.GAMES[name].make(config, Linf(0.1), None, None)


def network(seed=0):
    with seeded_init(seed):
        return SmallCNN((1, 8, 8), 10, width=8, hidden=32)


class Counter:
    """Images through a classifier: forwards, backwards with weights, backwards to inputs."""

    def __init__(self, module):
        self.forwards = self.backwards = self.input_backwards = 0
        module.register_forward_hook(self.see)

    def see(self, module, given, logits):
        self.forwards += len(logits)
        kind = "backwards" if next(module.parameters()).requires_grad else "input_backwards"
        if logits.requires_grad:
            logits.register_hook(
                lambda slope: setattr(self, kind, getattr(self, kind) + len(slope))
            )


# forwards, backwards and input backwards of the published code per step, in forwards (F = B_x = 1,
# B = 2): those that attack with weight gradients pay for them
REFERENCE = {
    "standard": 3,
    "fgsm-at": 6,
    "fast": 6,
    "n-fgsm": 6,
    "free": 24,
    "pgd-at": 33,
    "alp": 36,
    "feature-scatter": 7,
    "trades": 39,
    "mart": 26,
}


@pytest.mark.parametrize("awp", [None, 0.01])
@pytest.mark.parametrize("name", train.GAMES)
def test_reported_passes_are_those_made_and_no_more_than_published(name, awp, digits):
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    defender = Defender(network()) if awp is None else AWPDefender(network(), gamma=awp)
    counter = Counter(defender.module)
    stats = made(name).step(defender, x, y, seeded()).stats
    for kind in ("forwards", "backwards", "input_backwards"):
        assert float(stats[f"cost/{kind}"]) == getattr(counter, kind) / 16, kind
    worth = counter.forwards + counter.input_backwards + 2 * counter.backwards
    assert float(stats["attacker/forwards_per_image"]) == worth / 16
    extra = 0 if awp is None else 3 * counter.backwards / 16 / 2  # one more descent
    assert worth / 16 - extra <= REFERENCE.get(name, worth)


@pytest.mark.parametrize("name", train.GAMES)
def test_equal_bits_inside_the_ball_and_ready_to_go_on(name, digits):
    def play():
        game = DefenderTraining(made(name), Defender(network()), digits.train, 32, seed=3)
        return game, [game.step() for _ in range(3)]

    (one, first), (two, second) = play(), play()
    assert torch.equal(
        flat(one.defender.module.parameters()), flat(two.defender.module.parameters())
    )
    assert first == second
    x, y = digits.train.floats(slice(32)), digits.train.labels[:32]
    third = DefenderTraining(made(name), Defender(network()), digits.train, 32, seed=3)
    third.defender.module.load_state_dict(one.defender.module.state_dict())
    third.load_state_dict(copy.deepcopy(one.state_dict()))
    one.step(), third.step()
    assert torch.equal(
        flat(one.defender.module.parameters()), flat(third.defender.module.parameters())
    )
    result = made(name).step(two.defender, x, y, seeded())
    reach = 0.3 if name == "n-fgsm" else 0.1
    assert float((result.x_adv - x).abs().max()) <= reach + 1e-6
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1
    half = made(name).step(two.defender, x, y, seeded(), scale=0.5)
    assert float((half.x_adv - x).abs().max()) <= reach / 2 + 1e-6


def two_signs(n, seed):
    """One pixel says the class in 85 % of the images, beyond ε; fifteen always do, within ε."""
    rng = seeded(seed)
    y = torch.randint(2, (n,), generator=rng)
    side = 2 * y.float() - 1
    x = 0.5 + 0.08 * side[:, None] + 0.02 * torch.randn(n, 16, generator=rng)
    wrong = torch.rand(n, generator=rng) < 0.15
    x[:, 0] = 0.5 + 0.45 * torch.where(wrong, -side, side)
    return x.clamp(0, 1).view(n, 1, 4, 4), y


@pytest.mark.parametrize("name", [*train.GAMES, "pgd-at with awp"])
def test_it_learns_the_sign_that_lasts(name):
    """Known answers: 1 clean and little robust, or 0.87 both; Feature Scatter lies between."""
    name, *awp = name.split(" with ")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    kind = partial(AWPDefender, gamma=0.01) if awp else Defender
    defender, game, rng = kind(model, lr=0.1), made(name), seeded()
    for seed in range(12 if name == "free" else 80):
        game.step(defender, *two_signs(64, 100 + seed), rng)
    x, y = two_signs(1000, 1)
    x_adv = pgd(BALL, 10).perturb(model, x, y, rng=seeded())
    clean, robust = (float((model(z).argmax(1) == y).float().mean()) for z in (x, x_adv))
    if name == "standard":
        assert clean > 0.98
        assert robust < 0.6
    elif name == "feature-scatter":
        assert clean > 0.85
        assert 0.4 < robust < 0.8
    else:
        assert clean > 0.85
        assert robust > 0.85


@pytest.mark.parametrize("name", ["trades", "free", "feature-scatter"])
def test_half_precision_is_near_full(name, digits):
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    ends = []
    for precision in ("32-true", "bf16-mixed"):
        defender = AWPDefender(network(), gamma=0.01, fabric=make_fabric("cpu", 1, precision))
        made(name).step(defender, x, y, seeded())
        ends.append(flat(defender.module.parameters()) - flat(network().parameters()))
    assert torch.nn.functional.cosine_similarity(*ends, dim=0) > 0.9


def test_attacking_for_a_game_leaves_the_classifier_alone(digits):
    model, x = BatchNormNet().train(), digits.train.floats(slice(8))
    state = copy.deepcopy(model.state_dict())
    for attack in (kl_pgd(BALL), near_pgd(BALL), feature_scatter(BALL)):
        attack.run(model, x, digits.train.labels[:8], rng=seeded())
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with attacked(model, "train"), torch.no_grad():
        clean = model(x)
    assert clean.shape == (8, 10)

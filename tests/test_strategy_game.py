"""LAS-AT's rules: decoding, pay-offs by hand, the look-ahead, the real defender untouched."""

import copy
from typing import get_args

import pytest
import torch
from conftest import BatchNormNet, Linear

from advgame.attacks import GradientAttack
from advgame.choices import Credit
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.las_at import LasAt
from advgame.games.strategy import SPACES, Strategies, StrategySpace, strategy_space
from advgame.losses import cross_entropy
from advgame.threat import L2, Linf


def test_cifar10_space_is_the_published_table():
    """ε 3..15, steps 3..14, step size 1..5, all in units of 1/255 at ε₀ = 8/255."""
    space = strategy_space("las-pgd-at-cifar10", 8 / 255)
    assert space.sizes == (13, 12, 5)
    got = space.decode(torch.tensor([[0, 0, 0], [12, 11, 4]]))
    torch.testing.assert_close(got.eps * 255, torch.tensor([3.0, 15.0]))
    assert got.steps.tolist() == [3, 14]
    torch.testing.assert_close(got.step_size * 255, torch.tensor([1.0, 5.0]))
    assert space.index(8, 10, 2) == (5, 7, 1)
    with pytest.raises(InputError, match="no steps of 20"):
        space.index(8, 20, 2)


def test_large_radii_are_capped_below_one_half():
    space = StrategySpace(0.3)
    eps = space.decode(torch.tensor([[space.sizes[0] - 1, 0, 0]])).eps
    assert float(eps) < 0.5
    assert space.sizes[0] == 11  # 3..13 twenty-sevenths: 13 · 0.0375 = 0.4875


@pytest.mark.parametrize("name", SPACES)
def test_every_preset_decodes(name):
    space = strategy_space(name, 8 / 255)
    assert min(space.sizes) >= 3


@pytest.mark.parametrize(
    "actions",
    [
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.tensor([[13, 0, 0]]),
        torch.tensor([[0, -1, 0]]),
    ],
)
def test_wrong_actions_are_refused(actions):
    with pytest.raises(InputError):
        StrategySpace(0.1).decode(actions)


@pytest.mark.parametrize("bad", [{"eps0": 0}, {"eps0": 0.1, "steps": ()}, {"eps0": 4.0}])
def test_spaces_that_no_attack_can_use_are_refused(bad):
    with pytest.raises(InputError):
        StrategySpace(**bad)


def strategies(n, eps=0.1, steps=5, size=0.05):
    return Strategies(torch.full((n,), eps), torch.full((n,), steps), torch.full((n,), size))


def test_payoffs_equal_a_computation_by_hand():
    """Two images on a linear model: ascent, look-ahead and verdicts written out."""
    weight = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 2.0]])
    x = torch.tensor([[0.9, 0.5, 0.5, 0.2], [0.5, 0.5, 0.5, 0.55]]).view(2, 1, 2, 2)
    y, lr, decay = torch.tensor([0, 1]), 0.1, 0.01
    defender = Defender(Linear(weight.clone()), lr=lr, weight_decay=decay)
    game = LasAt(Linf(0.1), a=0.5, b=2.0, c=3.0)
    rng = torch.Generator().manual_seed(0)
    result = game.step(defender, x, y, strategies(2), rng)

    # the margin w_true·x - w_other·x falls fastest along sign(w_other - w_true)
    away = (weight[1 - y] - weight[y]).view(2, 1, 2, 2).sign()
    x_adv = x + 0.1 * away
    moved = away.abs().bool()
    torch.testing.assert_close(result.x_adv[moved], x_adv[moved])
    logits = result.x_adv.flatten(1) @ weight.T
    torch.testing.assert_close(result.payoffs.r1, 0.5 * cross_entropy(logits, y))
    ahead = weight.clone().requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    cross_entropy(result.x_adv.flatten(1) @ ahead.T + bias, y).mean().backward()
    with torch.no_grad():
        ahead -= lr * (ahead.grad + decay * ahead)
        bias -= lr * bias.grad
        away = (ahead[1 - y] - ahead[y]).view(2, 1, 2, 2).sign()
        worst = (x + 0.1 * away).clamp(0, 1).flatten(1) @ ahead.T + bias
        clean = x.flatten(1) @ ahead.T + bias
    robust = (worst.argmax(1) == y).float()
    assert robust.tolist() == [1, 0], "the two images must differ to test anything"
    torch.testing.assert_close(result.payoffs.r2, 2.0 * 4 * robust)
    torch.testing.assert_close(result.payoffs.r3, 3.0 * 2 * (clean.argmax(1) == y).float())


def test_look_ahead_is_one_fresh_sgd_step_of_a_copy(rng):
    """Against torch.optim.SGD on a deep copy, after the real optimiser has gathered momentum."""
    model = BatchNormNet()
    model.net[3].p = 0.0  # dropout would draw other masks in the copy
    defender = Defender(model, lr=0.1, weight_decay=0.05, true_probability=0.7)
    x, y = torch.rand(8, 1, 8, 8, generator=rng), torch.arange(8)
    for _ in range(3):
        defender.backward(x, y)
        defender.step()
    copied = copy.deepcopy(defender.module).train()
    before = copy.deepcopy(defender.module.state_dict())
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    defender.loss(copied(x), y).mean().backward()
    optimizer.step()
    defender.backward(x, y)
    ahead = defender.look_ahead()
    for name, value in copied.state_dict().items():
        torch.testing.assert_close(ahead.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    for name, value in defender.module.named_parameters():
        assert torch.equal(value, before[name]), "the real defender has not moved yet"
        assert not torch.equal(ahead.state_dict()[name], before[name])


def test_paying_leaves_the_defender_as_if_it_had_not_been_paid(rng, digits):
    """The look-ahead, its attack and R1 touch neither weights, buffers nor optimiser."""
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    ends = []
    for credit in ("mixed", None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BatchNormNet()
        model.net[3].p = 0.0
        defender = Defender(model, lr=0.05)
        for step in range(3):
            rng = torch.Generator().manual_seed(step)
            LasAt(Linf(0.1)).step(defender, x, y, strategies(16), rng, credit=credit)
        ends.append(defender)
    for one, two in zip(*(d.module.state_dict().values() for d in ends), strict=True):
        assert torch.equal(one, two)


def test_a_step_pays_for_the_next_defender_and_then_moves_the_real_one(rng, digits, monkeypatch):
    """R2 and R3 judge θ after one step; the real defender, too, has made exactly one."""
    x, y = digits.train.floats(slice(16)), digits.train.labels[:16]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    twin = copy.deepcopy(model)
    defender = Defender(model, lr=0.1, momentum=0.9, weight_decay=0.01)
    judged = []
    ahead = Defender.look_ahead

    def spy(self):
        module = ahead(self)
        judged.append(copy.deepcopy(module))
        return module

    monkeypatch.setattr(Defender, "look_ahead", spy)
    result = LasAt(Linf(0.1)).step(defender, x, y, strategies(16), rng)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    torch.testing.assert_close(result.payoffs.r1, cross_entropy(twin(result.x_adv), y).detach())
    cross_entropy(twin(result.x_adv), y).mean().backward()
    optimizer.step()
    for one in (judged[0], defender.module):
        for got, want in zip(one.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_credits_share_out_the_same_total():
    told = torch.tensor([1.0, 3]), torch.tensor([1.0, 0]), torch.tensor([1.0, 1])
    paid = {credit: LasAt(Linf(0.1)).pay(*told, credit) for credit in get_args(Credit)}
    assert {name: one.reward.tolist() for name, one in paid.items()} == {
        "sample": [7, 5], "mixed": [5, 7], "batch": [6, 6],
    }  # fmt: skip


def test_of_one_scalar_the_batchs_mean_is_clamped_not_each_image():
    """As published; each image's own R1 is clamped by itself."""
    told = torch.tensor([30.0, 2.0]), torch.tensor([1.0, 0]), torch.zeros(2)
    rules = LasAt(Linf(0.1), a=0.5, r2_weight=30)
    one, own = rules.pay(*told, "batch"), rules.pay(*told, "sample")
    assert (one.r1.tolist(), one.r2.tolist()) == ([5, 5], [10, 10])
    assert (own.r1.tolist(), own.r2.tolist()) == ([5, 1], [10, 0])
    assert one.reward.tolist() == [15, 15], "means 16 and 15, clamped; of the clamped: 3 and 5"


def test_terms_are_clamped_as_published():
    model = Linear(torch.tensor([[100.0] * 4, [-100.0] * 4]))
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([1, 0])
    rng = torch.Generator().manual_seed(0)
    result = LasAt(Linf(0.1), r2_weight=40).step(Defender(model, lr=1e-9), x, y, strategies(2), rng)
    assert result.payoffs.r1.tolist()[0] == 10
    assert result.payoffs.r2.tolist() == [0, 10]


@pytest.mark.parametrize("kind", [Linf, L2])
def test_examples_stay_in_each_images_own_ball(kind, rng, digits):
    x, y = digits.train.floats(slice(32)), digits.train.labels[:32]
    space = StrategySpace(0.15)
    actions = torch.stack([torch.randint(0, n, (32,), generator=rng) for n in space.sizes], 1)
    chosen = space.decode(actions)
    for start in ("own", "eps0"):
        defender = Defender(BatchNormNet())
        result = LasAt(kind(0.15), start=start).step(defender, x, y, chosen, rng, credit=None)
        assert (kind(1).size(result.x_adv - x) <= chosen.eps + 1e-6).all()
        assert result.x_adv.min() >= 0
        assert result.x_adv.max() <= 1
        assert result.payoffs is None


def test_published_quirks_are_flags():
    game = LasAt(Linf(0.1), start="eps0", look_ahead_mode="train")
    attack = game.attack(strategies(2, eps=0.02))
    assert isinstance(attack, GradientAttack)
    assert attack.start.eps == 0.1
    assert game.look_ahead_attack().mode == "train"
    assert LasAt(Linf(0.1)).attack(strategies(2, eps=0.02)).start.eps.tolist() == pytest.approx(
        [0.02] * 2
    )


def test_the_game_is_judged_at_one_eps():
    with pytest.raises(InputError):
        LasAt(Linf(torch.tensor([0.1, 0.2])))


def test_cost_counts_forwards_and_backwards(rng, digits):
    """Steps s of one forward and one input-backward each, and a training step of 1 + 2."""
    x, y = digits.train.floats(slice(8)), digits.train.labels[:8]
    chosen = strategies(8)
    chosen.steps[:4] = 3
    result = LasAt(Linf(0.1)).step(Defender(BatchNormNet()), x, y, chosen, rng, credit=None)
    assert float(result.stats["attacker/forwards_per_image"]) == 2 * 4 + 3

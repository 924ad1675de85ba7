"""LAS as a plug-in: with a game's own strategy it is that game to the bit, and β is a choice."""

import copy
from functools import partial

import pytest
import torch
from conftest import BatchNormNet
from torch import nn

from advgame.attacks import kl_pgd, pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.awp import AWPDefender
from advgame.games.las_at import LasAt, LasTrades
from advgame.games.pairing import Trades
from advgame.games.strategy import BETAS, Strategies, StrategySpace, strategy_space
from advgame.losses import cross_entropy, divergence
from advgame.threat import Linf
from agents.las_at import FixedStrategy, StrategyGame, make_player
from agents.settings import PRESETS
from envs.strategy_selection import StrategySelectionVectorEnv

THREAT, SETTINGS = Linf(0.1), {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def batch(n=10):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 4, 4, generator=rng), torch.randint(3, (n,), generator=rng)


def always(n, eps=0.1, steps=10, size=0.025, beta=None):
    beta = None if beta is None else torch.full((n,), float(beta))
    return Strategies(
        torch.full((n,), eps), torch.full((n,), steps), torch.full((n,), size), beta
    )  # fmt: skip


def weights(defender):
    return torch.cat([p.detach().flatten() for p in defender.module.parameters()])


GAMES = {
    "trades": (LasTrades, Trades(THREAT, 6.0, kl_pgd), 6.0),
    "pgd": (LasAt, AdversarialTraining(THREAT, lambda ball: pgd(ball, 10)), None),
}


@pytest.mark.parametrize("awp", [None, 0.05])
@pytest.mark.parametrize("name", GAMES)
def test_with_the_games_own_strategy_it_is_that_game(name, awp):
    rules, game, beta = GAMES[name]
    kind = Defender if awp is None else partial(AWPDefender, gamma=awp)
    one, two = kind(net(), **SETTINGS), kind(net(), **SETTINGS)
    x, y = batch()
    first, second = (torch.Generator().manual_seed(2) for _ in range(2))
    for step in range(3):
        credit = (
            "mixed" if step == 1 else None
        )  # being paid changes nothing in the defender's game but where chance is
        made = rules(THREAT).step(one, x, y, always(10, beta=beta), first, credit=credit)
        wanted = game.step(two, x, y, second)
        second.set_state(first.get_state())  # the look-ahead draws, too
        assert torch.equal(made.x_adv, wanted.x_adv)
        torch.testing.assert_close(made.losses, wanted.losses)
        torch.testing.assert_close(weights(one), weights(two))


def test_las_trades_step_and_pay_by_hand():
    x, y = batch(4)
    played = Strategies(
        torch.tensor([0.05, 0.1, 0.1, 0.15]),
        torch.tensor([3, 7, 10, 5]),
        torch.tensor([0.02, 0.03, 0.02, 0.05]),
        torch.tensor([5.0, 6.0, 7.0, 9.0]),
    )
    defender = Defender(net(), lr=0.1, momentum=0.0, weight_decay=0.0)
    model = copy.deepcopy(defender.module)
    result = LasTrades(THREAT, a=0.5).step(defender, x, y, played, torch.Generator())
    size = (result.x_adv - x).flatten(1).abs().amax(1)
    assert bool((size <= played.eps + 1e-6).all())
    clean, moved = model(x), model(result.x_adv)
    losses = cross_entropy(clean, y) + played.beta * divergence(clean, moved)
    torch.testing.assert_close(result.losses, losses.detach())
    torch.testing.assert_close(result.payoffs.r1, 0.5 * losses.detach().clamp(0, 20))
    grads = torch.autograd.grad(losses.mean(), list(model.parameters()))
    wanted = torch.cat(
        [(p - 0.1 * g).flatten() for p, g in zip(model.parameters(), grads, strict=True)]
    )
    torch.testing.assert_close(weights(defender), wanted.detach())
    assert float(result.stats["strategy/beta"]) == 6.75
    with pytest.raises(InputError, match="have a beta"):
        LasTrades(THREAT).step(defender, x, y, always(4), torch.Generator())


class Watched(Defender):
    """Keeps the weights of its look-ahead."""

    def look_ahead(self):
        found = super().look_ahead()
        self.ahead = torch.cat([p.detach().flatten() for p in found.parameters()])
        return found


def test_clamped_the_defender_learns_within_eps0_and_r1_is_paid_for_all_of_eps():
    x, y = batch()
    defenders = [Watched(net(), **SETTINGS) for _ in range(2)]
    loose, tight = (
        LasAt(THREAT, clamp=clamp).step(defender, x, y, always(10, eps=0.18), torch.Generator())
        for clamp, defender in zip((False, True), defenders, strict=True)
    )
    assert float((loose.x_adv - x).abs().max()) > 0.15
    assert float((tight.x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(tight.x_adv, THREAT.project(loose.x_adv, x))
    assert torch.equal(tight.payoffs.r1, loose.payoffs.r1)
    for result, defender in zip((loose, tight), defenders, strict=True):
        alone = Defender(net(), **SETTINGS)  # the look-ahead has learnt from the same examples
        alone.backward(result.x_adv, y)
        alone.step()
        torch.testing.assert_close(defender.ahead, weights(alone))
    assert not torch.equal(defenders[0].ahead, defenders[1].ahead)


def test_paying_leaves_batch_norm_alone():
    """The published LAS-TRADES forms R1 in training mode and moves the running statistics."""
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    torch.manual_seed(0)
    start = BatchNormNet()
    buffers = []
    for credit in (None, "mixed"):
        defender = Defender(copy.deepcopy(start), **SETTINGS)
        rng = torch.Generator().manual_seed(4)
        LasTrades(THREAT).step(defender, x, y, always(8, beta=6), rng, credit=credit)
        buffers.append([buffer.clone() for buffer in defender.module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_the_cost_is_counted():
    x, y = batch()
    costs = {}
    for kind in (Defender, partial(AWPDefender, gamma=0.01)):
        for rules, beta in ((LasAt, None), (LasTrades, 6)):
            result = rules(THREAT).step(
                kind(net(), **SETTINGS), x, y, always(10, beta=beta), torch.Generator(), credit=None
            )
            costs[rules, kind is Defender] = float(result.stats["attacker/forwards_per_image"])
    assert costs == {
        (LasAt, True): 23,  # 10 (F + B_x), F + B
        (LasTrades, True): 27,  # the same, a clean F, two F + B
        (LasAt, False): 26,
        (LasTrades, False): 33,
    }


def test_the_space_has_a_fourth_choice():
    space = strategy_space("las-trades-cifar10", 8 / 255, BETAS)
    assert space.sizes == (5, 8, 3, 5)
    got = space.decode(torch.tensor([[0, 0, 0, 0], [4, 7, 2, 4]]))
    assert got.beta.tolist() == [5.0, 9.0]
    assert space.index(8, 10, 2, 6) == (3, 3, 0, 1)
    assert got.scaled(0.5).beta is got.beta
    for wrong in ((8, 10, 2), (8, 10, 2, 4)):
        with pytest.raises(InputError):
            space.index(*wrong)
    for actions in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 0, 0, 5]])):
        with pytest.raises(InputError):
            space.decode(actions)
    with pytest.raises(InputError, match="betas"):
        StrategySpace(0.1, betas=(0.0,))


def test_the_environment_plays_it(digits):
    env = StrategySelectionVectorEnv(
        16,
        data=digits.train,
        rules=LasTrades(Linf(0.15)),
        space=strategy_space("las-trades-cifar10", 0.15, BETAS),
    )
    env.reset(seed=0)
    assert env.single_action_space.nvec.tolist() == [5, 8, 3, 5]
    _, reward, *_ = env.step(env.action_space.sample())
    assert reward.shape == (16,)
    game = StrategyGame(env, FixedStrategy(env.space.index(8, 10, 2, 9)), 0)
    game.step()
    assert game.end_epoch(None, 1)["strategy/beta_ratio"] == 1.5


@pytest.mark.slow
def test_a_policy_paid_by_r1_alone_raises_beta(digits):
    """Reward hacking, as reference notes say: R1 = CE + β KL grows with β whatever the attack."""
    env = StrategySelectionVectorEnv(
        64,
        data=digits.train,
        rules=LasTrades(Linf(0.15), b=0, c=0),
        space=strategy_space("las-trades-cifar10", 0.15, BETAS),
        credit="sample",
    )
    player = make_player(
        "reinforce", env.space, (1, 8, 8), 64, PRESETS["default"], seed=0,
        fabric=env.defender.fabric,
    )  # fmt: skip
    game = StrategyGame(env, player, 0)
    for _ in range(150):
        game.step()
    game._chosen = game._chosen[-20:]
    assert game.end_epoch(None, 150)["strategy/beta_ratio"] * 6 > 7.5  # uniform: 7

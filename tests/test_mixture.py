"""A mixture of attacks: one step by hand, the leader's share, what the worst case gains."""

import copy

import pytest
import torch
from conftest import Linear
from smooth_parts import BALL, SHAPE, flat, inner, plain, smooth
from torch import nn
from torch.nn.functional import cross_entropy

from advgame.attacks import fgsm, pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.mixture import FIXED, Mixture, check_mixture
from advgame.threat import L2
from agents.attnet import AttNet


def network(seed):
    torch.manual_seed(seed)
    return AttNet(SHAPE, 3, hidden=5, dropout=0.0).double()


def weights(module):
    return flat(module.parameters())


def play(per="sample", fixed=("fgsm", "pgd"), learned=("attnet", "attnet2"), steps=1, **settings):
    defender = plain()
    networks = {name: network(number) for number, name in enumerate(learned, 5)}
    game = Mixture(BALL, fixed, networks, lr=1e-2, per=per, **settings)
    rng, (x, y) = torch.Generator().manual_seed(3), inner(12)
    results = [game.step(defender, x, y, rng) for _ in range(steps)]
    return defender, game, results[-1]


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_step_descends_at_the_worst_and_lets_every_network_ascend_after_it(per):
    (x, y), model = inner(12), smooth()
    rng, nets = torch.Generator().manual_seed(3), [network(5), network(6)]
    images = [fgsm(BALL).perturb(model, x, y), pgd(BALL, 10).perturb(model, x, y, rng=rng)]
    images += [(x + 0.1 * g(x, y)).clamp(0, 1).detach() for g in nets]
    losses = torch.stack([cross_entropy(model(z), y, reduction="none") for z in images])
    if per == "sample":
        worst, leader = losses.max(0)
    else:
        leader = losses.mean(1).argmax().expand(len(x))
        worst = losses[leader[0]]
    grads = torch.autograd.grad(worst.mean(), list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p -= 0.1 * g
    for g in nets:  # at the new u
        optimizer = torch.optim.Adam(g.parameters(), 1e-2)
        (-cross_entropy(model((x + 0.1 * g(x, y)).clamp(0, 1)), y)).backward()
        optimizer.step()
    defender, game, result = play(per)
    for ours, wanted in zip(defender.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)
    for g, mine in zip(nets, game.learned.values(), strict=True):
        for ours, wanted in zip(mine.parameters(), g.parameters(), strict=True):
            torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(result.losses, worst.detach())
    wanted = torch.stack(images)[leader, torch.arange(len(x))]
    torch.testing.assert_close(result.x_adv, wanted.detach())
    shares = [float(result.stats[f"game/lead_{name}"]) for name in game.names]
    assert shares == pytest.approx([float((leader == k).double().mean()) for k in range(4)])


def test_the_samples_worst_is_never_below_the_batchs():
    sample, whole = (play(per)[2].losses.mean() for per in ("sample", "batch"))
    assert float(sample) >= float(whole)


def test_equal_bits_inside_the_ball_and_resuming_too():
    one, _, result = play(steps=4)
    two, _, _ = play(steps=4)
    assert torch.equal(weights(one.module), weights(two.module))
    assert float((result.x_adv - inner(12)[0]).abs().max()) <= 0.1 + 1e-12
    half, game, _ = play(steps=2)
    third, again, _ = play(steps=1)
    third.module.load_state_dict(half.module.state_dict())
    again.load_state_dict(copy.deepcopy(game.state_dict()))
    (x, y) = inner(12)
    for player, rules in ((half, game), (third, again)):
        rng = torch.Generator().manual_seed(9)
        for _ in range(2):
            rules.step(player, x, y, rng)
    assert torch.equal(weights(half.module), weights(third.module))
    for one, two in zip(game.learned.values(), again.learned.values(), strict=True):
        assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("learned", [(), ("attnet",)])
def test_one_kind_of_attack_will_do(learned):
    fixed = ("fgsm",) if not learned else ()
    _, game, result = play(fixed=fixed, learned=learned, ascent_steps=2)
    assert game.names == [*fixed, *learned]
    assert float(result.stats[f"game/lead_{game.names[0]}"]) == 1.0


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_it_learns_from_the_attack_that_does_most(per):
    """Three weak pixels, ±0.05, and one that ε = 0.1 cannot turn, ±0.12.

    Who learns from clean images weighs them by their size and falls to FGSM; so does who learns
    from an attacker that does nothing, the milder of the two. FGSM teaches to trust the last.
    """
    labels = torch.arange(40) % 2
    size = torch.tensor([0.05, 0.05, 0.05, 0.12]).double().view(1, *SHAPE)
    x = 0.5 + size * (2 * labels - 1).view(-1, 1, 1, 1)

    def robust(fixed):
        module = Linear(torch.zeros(2, 4), torch.zeros(2)).double().requires_grad_(True)
        defender = Defender(module, lr=0.5, momentum=0.0, weight_decay=0.0)
        nothing = AttNet(SHAPE, 2, hidden=8, dropout=0.0, scale=0).double()
        nn.init.zeros_(nothing.layers[-1].weight)
        nn.init.zeros_(nothing.layers[-1].bias)
        game, rng = Mixture(BALL, fixed, {"attnet": nothing}, lr=1e-9, per=per), torch.Generator()
        for _ in range(300):
            game.step(defender, x, labels, rng)
        assert bool((module(x).argmax(1) == labels).all())
        x_adv = pgd(BALL, 10).perturb(module, x, labels, rng=rng)
        return float((module(x_adv).argmax(1) == labels).double().mean())

    assert robust(["fgsm"]) == 1
    assert robust([]) <= 0.5


def test_names_and_balls_that_cannot_be_played_are_refused():
    for names in (["fgsm", "fgsm"], ["strong"], []):
        with pytest.raises(InputError):
            check_mixture(names)
    check_mixture([*FIXED, "attnet", "attnet7"])
    with pytest.raises(InputError, match="L∞"):
        Mixture(L2(1.0), ["fgsm"], {})
    with pytest.raises(InputError, match="sample or batch"):
        Mixture(BALL, ["fgsm"], {}, per="image")

"""ADT's generators and encoders: sizes, the entropy bound, strength, files."""

import copy
import math

import pytest
import torch
from adt_parts import DIGIT, EPS, KINDS, known, network, player
from conftest import multiplications, seeded, undefended
from safetensors.torch import load_file, save_file
from torch import nn

from advgame.attacks import DistributionalAttack, InputGradient, pgd
from advgame.classifiers import SmallCNN, make_classifier
from advgame.data import Batches
from advgame.defender import Defender
from advgame.distributions import LOG_2
from advgame.errors import InputError
from advgame.games.adt import Amortised, Explicit
from advgame.losses import margin
from advgame.seeding import seeded_init
from advgame.targets import shipped
from advgame.threat import L2, Linf
from agents.adt import ADTAttack, ADTAttacker, ADTNetwork, load_adt
from agents.adt_networks import PRIOR_NLL, Encoder, LatentMap, make_generator
from agents.adt_players import ImplicitPlayer
from agents.attacker import load_attacker
from agents.attackers import learned_name, load_any_attacker


@pytest.fixture(scope="module")
def victim():
    return shipped().model


def test_the_published_sizes():
    """Reference: 10.3 M weights and 10.57 billion multiplications, twice WRN-28-10's 5.24."""
    with torch.device("meta"):
        body = make_generator("resnet-3blocks", 9, 6, (3, 32, 32))
        encoder = Encoder((3, 32, 32), 64, "resnet-3blocks")
        wide = make_classifier("wrn-28-10", (3, 32, 32), 10)
    x = torch.empty(1, 3, 32, 32)
    assert round(sum(p.numel() for p in body.parameters()) / 1e6, 1) == 10.3
    assert round(multiplications(body, torch.empty(1, 9, 32, 32)) / 1e9, 2) == 10.57
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 0.72
    assert multiplications(encoder, x) < 0.01 * multiplications(wide, x)
    with seeded_init(0):
        small = make_generator("resnet-3blocks", 9, 6, (3, 32, 32), ngf=16)
        latent, encoder = (
            LatentMap(64, (3, 32, 32), "resnet-3blocks"),
            Encoder((3, 32, 32), 64, "resnet-3blocks"),
        )
    assert float(small[3].conv1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    norms = [m.weight.detach() for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat(norms)
    assert float(scales.mean()) == pytest.approx(1, abs=0.01)
    assert float(scales.std()) == pytest.approx(0.02, rel=0.2)
    for number in (0, 2):
        assert float(latent[number].weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not latent[number].bias.any()
    assert encoder.features[3].bias is None
    wanted = (2 / (16 * 64)) ** 0.5  # 4x4 to 64 channels
    assert float(encoder.features[3].weight.detach().std()) == pytest.approx(wanted, rel=0.05)
    assert not encoder.head.bias.any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_small_generator_costs_less_than_the_small_classifier(kind, shape):
    with torch.device("meta"):
        net = ADTNetwork(shape, kind, latent=16)
        encoder, classifier = Encoder(shape, 16), SmallCNN(shape, 10)
    inputs = 3 + (kind == "imp-am")
    own = multiplications(net.body, torch.empty(1, inputs, *shape[1:]))
    if kind == "imp-am":
        own += multiplications(net.latent_map, torch.empty(1, 16))
        own += multiplications(encoder, torch.empty(1, *shape))
    else:
        x = torch.randn(4, 3, *shape[1:], generator=seeded())
        begun = network(kind, shape).distribution(x)
        assert float(begun.mean.abs().mean()) < 0.5, "EXP begins at 0"
        assert float((begun.spread - LOG_2).abs().mean()) < 0.3
    assert own < 0.8 * multiplications(classifier, torch.empty(1, *shape))


def test_the_published_hinge_pushes_nothing():
    """An encoder that ignores δ and answers N(0, 1/3) has NLL 0.8696 < 0.9; no constant less."""
    encoder = Encoder(DIGIT, 4)
    z = 2 * torch.rand(20_000, 4, generator=seeded()) - 1
    a = torch.zeros(len(z), *DIGIT)

    def said(variance):
        with torch.no_grad():
            encoder.head.weight.zero_()
            encoder.head.bias[:4] = 0
            encoder.head.bias[4:] = math.log(math.expm1(variance))
            return float(encoder.nll(a, z))

    assert round(PRIOR_NLL, 4) == 0.8696
    assert said(1 / 3) == pytest.approx(PRIOR_NLL, abs=6e-3)
    assert min(said(0.25), said(0.45)) > PRIOR_NLL + 0.006
    said(1 / 3)
    for threshold, pushed in ((0.9, 0.0), (0.5, 1.0)):
        own = ImplicitPlayer(network("imp-am"), copy.deepcopy(encoder), threshold=threshold)
        x, y = torch.rand(256, *DIGIT, generator=seeded()), torch.zeros(256, dtype=torch.int64)
        sampled = own.sample(x, Linf(EPS), InputGradient(shipped().model, x, y), seeded())
        assert float(sampled.stats["attacker/pushed"]) == pushed


def test_the_bound_rises_where_the_perturbation_tells_z_and_only_there():
    ends = []
    for tells in (True, False):
        with seeded_init(0):
            encoder = Encoder(DIGIT, 4)
        adam, rng = torch.optim.Adam(encoder.parameters(), 1e-2), seeded()
        for _ in range(100):
            z = 2 * torch.rand(128, 4, generator=rng) - 1
            a = torch.rand(128, 64, generator=rng) * 0.1
            if tells:
                a[:, :4] += z
            nll = encoder.nll(a.view(128, *DIGIT), z)
            adam.zero_grad()
            nll.backward()
            adam.step()
        ends.append(LOG_2 - float(nll.detach()))
    assert ends[0] > 0.5
    assert ends[1] < LOG_2 - PRIOR_NLL + 0.03


@pytest.fixture(scope="module")
def frozen(digits):
    return undefended(digits, width=12)


def taught(kind, model, data, steps=50, **settings):
    """A generator after ``steps`` against a classifier that does not learn."""
    own, batches, rng = player(kind, lr=5e-3, **settings), Batches(data, 64, 0), seeded()
    defender = Defender(copy.deepcopy(model), lr=0.0, momentum=0.0, weight_decay=0.0)
    game, entropies = Amortised(Linf(EPS), own), []
    for _ in range(steps):
        stats = game.step(defender, *batches.next(), rng).stats
        entropies.append(float(stats["game/entropy"]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), defender.module.parameters(), strict=True)
    )
    return own.module, sum(entropies[-10:]) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_generator_is_an_attack(kind, frozen, digits):
    x, y = digits.test.floats(), digits.test.labels
    net = taught(kind, frozen, digits.train, lam=0.01)[0]

    def left(attack):
        x_adv = attack.run(frozen, x, y, rng=seeded()).x_adv
        return float((frozen(x_adv).argmax(1) == y).float().mean())

    clean = float((frozen(x).argmax(1) == y).float().mean())
    one, ten = (left(ADTAttack(net, Linf(EPS), draws)) for draws in (1, 10))
    assert clean > 0.94
    assert one < clean - 0.25
    assert ten <= one
    assert ten < left(ADTAttack(network(kind), Linf(EPS), 10)) - 0.2
    assert ten < left(pgd(Linf(EPS), 20)) + 0.2
    assert left(DistributionalAttack(Linf(EPS), samples=2)) < clean - 0.25


def test_a_larger_lambda_leaves_a_generator_more_entropy(frozen, digits):
    ends = [taught("exp-am", frozen, digits.train, lam=lam)[1] for lam in (0.01, 3.0)]
    assert ends[1] > ends[0] + 0.2
    implicit = [
        taught("imp-am", frozen, digits.train, lam=lam, encoder_lr=1e-2, steps=40)[1]
        for lam in (0.001, 3.0)
    ]
    assert implicit[1] > implicit[0] + 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", ["small", "resnet-3blocks"])
def test_a_saved_generator_attacks_to_the_same_bits(kind, body, tmp_path, victim, digits):
    x, y = digits.test.floats(slice(8)), digits.test.labels[:8]
    net = network(kind, body=body, ngf=4, scaling="raw")
    ADTAttacker(net, {"seed": 3}).save(tmp_path / "attacker.safetensors")
    loaded = load_adt(tmp_path)
    assert loaded.about == {"seed": 3}
    assert (loaded.network.kind, loaded.network.scaling) == (kind, "raw")
    one = ADTAttack(net, Linf(EPS), 8).run(victim, x, y, rng=seeded())
    two = load_any_attacker(tmp_path)(Linf(EPS), 10).run(victim, x, y, rng=seeded())
    assert torch.equal(one.x_adv, two.x_adv)
    assert two.forwards == 8 * 10, "the budget"
    torch.testing.assert_close(two.loss, margin(victim(two.x_adv), y))
    attack = loaded(Linf(EPS), 5)
    assert learned_name(tmp_path / "good.safetensors", attack) == "learned:good-worst-of-3"
    assert learned_name(tmp_path / "good", loaded(Linf(EPS), 3)) == "learned:good"


def test_files_that_hold_no_generator_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    ADTAttacker(network(), {}).save(good)
    with pytest.raises(InputError, match="no attacker"):
        load_attacker(good)
    wrong = {"format": "advgame adt generator 1", "about": "{}"}
    raw = '[[1, 8, 8], "exp-am", "small", 256, 4, "raw"]'
    for about, said in (
        ({}, "no ADT generator"),
        ({"format": "advgame adt generator 1"}, "damaged or of another"),
        ({**wrong, "network": "[[1, 8, 8], \"imp-am\", \"small\", 256, 4, \"image\"]"}, "damaged"),
        ({**wrong, "network": raw}, "raw gradients"),
    ):  # fmt: skip
        save_file(load_file(good), tmp_path / "odd.safetensors", about)
        with pytest.raises(InputError, match=said):
            load_adt(tmp_path / "odd.safetensors")


def test_misuse_is_refused(victim, digits):
    x, y = digits.test.floats(slice(4)), digits.test.labels[:4]
    for make in (
        DistributionalAttack,
        lambda t: ADTAttack(network(), t),
        ADTAttacker(network(), {}),
    ):
        with pytest.raises(InputError, match="L2"):
            make(L2(1.0)) if not isinstance(make, ADTAttacker) else make(L2(1.0), 10)
    with pytest.raises(InputError, match="2 queries"):
        ADTAttacker(network(), {})(Linf(0.1), 1)
    for attack in (known("exp"), known("exp-am")):
        with pytest.raises(InputError, match="needs rng"):
            attack.run(victim, x, y)
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            attack.run(victim, x * 255, y, rng=seeded())
        with pytest.raises(InputError, match="softmax"):
            attack.run(nn.Sequential(victim, nn.Softmax(1)), x, y, rng=seeded())
    with pytest.raises(InputError, match=r"images of \(1, 8, 8\)"):
        known("imp-am").run(victim, x.expand(-1, 3, -1, -1), y, rng=seeded())
    for bad in (
        {"steps": 0}, {"samples": 0}, {"draws": 0}, {"lr": 0.0}, {"betas": (1.0, 0.0)},
        {"lam": -1.0}, {"lam": math.nan},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(bad))):
            DistributionalAttack(Linf(0.1), **bad)
    for bad in (
        {"kind": "exp"}, {"body": "huge"}, {"ngf": 0}, {"latent": 0}, {"scaling": "sign"},
        {"shape": (1, 7, 8)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            ADTNetwork(**{"shape": DIGIT, **bad})
    with pytest.raises(InputError, match="20 pixels"):
        Encoder(DIGIT, 4, "resnet-3blocks")
    with pytest.raises(InputError, match="lam"):
        player("exp-am", lam=-1.0)
    with pytest.raises(InputError, match="threshold"):
        player("imp-am", threshold=math.nan)
    with pytest.raises(InputError, match="draws"):
        ADTAttack(network(), Linf(0.1), 0)
    many = Linf(torch.tensor([0.1, 0.2]))
    for make in (
        lambda t: Explicit(DistributionalAttack(t)),
        lambda t: Amortised(t, player("exp-am")),
    ):
        with pytest.raises(InputError, match="one eps"):
            make(many)

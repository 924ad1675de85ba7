"""ADT's generators and encoders: what they are told, sizes, the entropy bound."""

import copy
import math

import pytest
import torch
from attacker_parts import ADTS, BALL, DIGIT, EPS, network
from conftest import multiplications, seeded
from torch import nn

from advgame.attacks import InputGradient
from advgame.classifiers import SmallCNN, make_classifier
from advgame.distributions import LOG_2
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.targets import shipped
from agents.adt import ADTNetwork, ImplicitPlayer
from agents.adt_networks import PRIOR_NLL, Encoder, LatentMap, make_generator


def test_a_generator_is_told_two_gradients(digits):
    x, y, victim = digits.test.floats(slice(8)), digits.test.labels[:8], shipped().model
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cross_entropy(victim(leaf), y).sum(), leaf)
    leaf = (x + EPS * first.sign()).clamp(0, 1).requires_grad_()
    (second,) = torch.autograd.grad(cross_entropy(victim(leaf), y).sum(), leaf)
    largest = [g.abs().flatten(1).amax(1).view(-1, 1, 1, 1) for g in (first, second)]
    for scaling, by in (("image", largest), ("raw", [32, 32])):  # as in training, not 8
        told = network("exp-am", scaling=scaling, batch=32)
        wanted = torch.cat([x, first / by[0], second / by[1]], 1)
        got = told.information(InputGradient(victim, x, y), BALL)
        torch.testing.assert_close(got, wanted)
        alone = told.information(InputGradient(victim, x[:1], y[:1]), BALL)
        torch.testing.assert_close(alone, got[:1], rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("kind", ADTS)
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
        sampled = own.sample(InputGradient(shipped().model, x, y), BALL, seeded())
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

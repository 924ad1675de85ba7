"""What strangers hand to attacks and games: other precisions, label types, outputs, shapes."""

from dataclasses import replace

import pytest
import torch
from conftest import seeded, undefended
from torch import nn

from advgame.attacks import (
    SPSA,
    CarliniWagnerLinf,
    DistributionalAttack,
    FeatureAttack,
    kl_pgd,
    mim,
    pgd,
)
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.games.costs import perturbation_stats
from advgame.seeding import seeded_init
from advgame.threat import L2, Linf
from agents.adt import ADTNetwork
from agents.attnet import AttNet
from agents.l2l import L2LNetwork

BALL, SHAPE = Linf(0.1), (1, 8, 8)


@pytest.fixture(scope="module")
def model(digits):
    return undefended(digits, width=8)


def attack(name, data):
    """Every kind of attack, at its smallest."""
    with seeded_init(0):
        return {
            "pgd": lambda: pgd(BALL, 2),
            "mim": lambda: mim(BALL, 2),
            "kl-pgd": lambda: kl_pgd(BALL, 2),
            "cw": lambda: CarliniWagnerLinf(BALL, iterations=2, largest_c=1e-3),
            "spsa": lambda: SPSA(BALL, iterations=1, samples=4),
            "fea": lambda: FeatureAttack(BALL, data.floats(), data.labels, targets=2, steps=2),
            "apgd": lambda: AutoAttackPart(BALL, "apgd-ce"),
            "exp": lambda: DistributionalAttack(BALL, steps=2, samples=1),
            "adt": lambda: ADTNetwork(SHAPE, "exp-am").attack(BALL, 12),
            "l2l": lambda: L2LNetwork(SHAPE).attack(BALL),
            "attnet": lambda: AttNet(SHAPE, 10).attack(BALL),
        }[name]()


NAMES = ("pgd", "mim", "kl-pgd", "cw", "spsa", "fea", "apgd", "exp", "adt", "l2l", "attnet")
READ_LOGITS = [name for name in NAMES if name != "attnet"]  # which asks the classifier nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_are_the_same_labels(name, labels, model, digits):
    data = digits.test.subset(slice(20))
    x, y, made = data.floats(slice(6)), data.labels[:6], attack(name, data)
    found = [made.run(model, x, y.to(kind), rng=seeded()).x_adv for kind in (torch.int64, labels)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "apgd"])  # which works in fp32
def test_double_precision_stays_double(name, model, digits):
    data = digits.test.subset(slice(20))
    x, twin = data.floats(slice(6)).double(), undefended(digits, width=8).double()
    found = attack(name, data)
    if name == "fea":
        found = replace(found, pool=found.pool.double())
    x_adv = found.run(twin, x, data.labels[:6], rng=seeded()).x_adv
    assert x_adv.dtype == torch.float64
    assert float(BALL.size(x_adv - x).max()) <= 0.1 + 1e-12


@pytest.mark.parametrize("name", READ_LOGITS)
def test_probabilities_are_refused_by_every_attack_that_reads_logits(name, model, digits):
    data = digits.test.subset(slice(20))
    x, y = data.floats(slice(6)), data.labels[:6]
    with pytest.raises(InputError, match="remove the final softmax"):
        attack(name, data).run(nn.Sequential(model, nn.Softmax(1)), x, y, rng=seeded())


class Masked(nn.Module):
    """A classifier that rules some of its classes out."""

    def __init__(self, net, number):
        super().__init__()
        self.net, self.number = net, number

    def forward(self, x):
        logits = self.net(x).clone()
        logits[:, 7:] = self.number
        return logits


@pytest.mark.parametrize("name", READ_LOGITS)
def test_classes_masked_by_infinity_are_refused_in_words(name, model, digits):
    data = digits.test.subset(digits.test.labels < 7).subset(slice(20))
    x, y, made = data.floats(slice(6)), data.labels[:6], attack(name, data)
    with pytest.raises(InputError, match=r"class 7 a logit of -inf, as a mask does: .*-1e4"):
        made.run(Masked(model, -torch.inf), x, y, rng=seeded())
    with pytest.raises(InputError, match="weights are broken"):
        made.run(Masked(model, torch.nan), x, y, rng=seeded())
    found = made.run(Masked(model, -1e4), x, y, rng=seeded())
    assert bool(torch.isfinite(found.x_adv).all()), "the advice works"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "kl-pgd"])  # which uses no label
def test_labels_that_the_classifier_does_not_know_are_refused(name, model, digits):
    data = digits.test.subset(slice(20))
    x, y = data.floats(slice(6)), data.labels[:6].clone()
    y[3] = 10
    with pytest.raises(InputError, match=r"0..9|10 classes only"):
        attack(name, data).run(model, x, y, rng=seeded())


def test_an_image_set_keeps_labels_as_losses_need_them(digits):
    data = digits.test.subset(slice(6))
    assert ImageSet(data.images, data.labels.int(), 10).labels.dtype == torch.int64


def test_feature_attack_takes_a_radius_per_image(model, digits):
    """Each image stays in its own ball, also after others have left."""
    data, pool = digits.test.subset(slice(60)), digits.train.subset(slice(80))
    radii = torch.linspace(0.02, 0.4, 60)
    made = FeatureAttack(Linf(radii), pool.floats(), pool.labels, targets=3, steps=6)
    result = made.run(model, data.floats(), data.labels, rng=seeded())
    assert 10 < int(result.fooled.sum()) < 60
    assert bool((Linf(1.0).size(result.x_adv - data.floats()) <= radii + 1e-6).all())


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (3, 1, 1)])
def test_a_side_of_one_pixel_has_no_neighbours(shape):
    delta = 0.1 * (torch.rand(2, *shape, generator=seeded()) * 2 - 1)
    found = perturbation_stats(delta, BALL)["attacker/variation"]
    both = [one.mean() for dim in (2, 3) if (one := delta.diff(dim=dim).abs() / 0.1).numel()]
    torch.testing.assert_close(found, torch.stack(both).mean() if both else torch.zeros(()))


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
def test_gradients_that_are_no_numbers_point_nowhere(threat, model, digits):
    """√x has an infinite slope at the digits' black pixels: 0 · ∞ in the chain rule."""

    class Rooted(nn.Module):
        def forward(self, x):
            return model(x.sqrt() ** 2)

    verdicts = evaluate(Rooted(), digits.test.subset(slice(8)), threat, ("pgd20",))
    assert verdicts.correct["pgd20"].shape == (8,)

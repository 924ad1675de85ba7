"""The same verdicts as foolbox, torchattacks and ART, where they are installed (extra "bench").

I-FGSM has no chance in it, so that equal attacks must break equal images.
"""

import numpy as np
import pytest
import torch
from conftest import Linear

from advgame.attacks import ifgsm, mim, pgd
from advgame.evaluation import predict
from advgame.threat import L2, Linf

EPS, STEPS = 0.2, 10
SIZE = EPS / 4


def by_foolbox(model, x, y):
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.LinfBasicIterativeAttack(
        abs_stepsize=SIZE, steps=STEPS, random_start=False
    )
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack(wrapped, x, y, epsilons=EPS)[1]


def by_torchattacks(model, x, y):
    torchattacks = pytest.importorskip("torchattacks")
    return torchattacks.PGD(model, eps=EPS, alpha=SIZE, steps=STEPS, random_start=False)(x, y)


def by_art(model, x, y):
    attacks = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = attacks.ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=SIZE, max_iter=STEPS, num_random_init=0, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), y=np.eye(10)[y.numpy()]))


PEERS = [by_foolbox, by_torchattacks, by_art]


@pytest.mark.parametrize("peer", PEERS)
def test_the_same_images_of_a_linear_classifier_are_broken(peer, rng):
    model = Linear(torch.randn(10, 64, generator=rng)).eval()
    x = 0.3 + 0.4 * torch.rand(100, 1, 8, 8, generator=rng)
    y = model(x).argmax(1)
    ours = ifgsm(Linf(EPS), STEPS, SIZE).perturb(model, x, y)
    torch.testing.assert_close(peer(model, x, y).float(), ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("peer", PEERS)
def test_success_on_a_trained_classifier_is_the_same_within_a_point(peer, honest, digits):
    x, y = digits.test.floats(), digits.test.labels
    ours = ifgsm(Linf(EPS), STEPS, SIZE).perturb(honest, x, y)
    theirs = peer(honest, x, y).float()
    shares = [float((predict(honest, made) == y).float().mean()) for made in (ours, theirs)]
    assert 0.05 < shares[0] < 0.95
    assert abs(shares[0] - shares[1]) <= 0.01
    honest.eval().requires_grad_(True)


def test_mim_is_torchattacks_mifgsm(honest, digits):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = digits.test.floats(slice(50)), digits.test.labels[:50]
    theirs = torchattacks.MIFGSM(honest, eps=EPS, alpha=SIZE, steps=STEPS, decay=0.9)(x, y)
    ours = mim(Linf(EPS), STEPS, SIZE, momentum=0.9).perturb(honest, x, y)
    assert float((ours - theirs).abs().max(1).values.gt(1e-6).float().mean()) < 0.01


def test_l2_pgd_is_foolboxs(honest, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = digits.test.floats(slice(50)), digits.test.labels[:50]
    attack = foolbox.attacks.L2BasicIterativeAttack(
        abs_stepsize=0.2, steps=STEPS, random_start=False
    )
    wrapped = foolbox.PyTorchModel(honest, bounds=(0, 1), device="cpu")
    theirs = attack(wrapped, x, y, epsilons=0.8)[1]
    ours = ifgsm(L2(0.8), STEPS, 0.2).perturb(honest, x, y)
    shares = [float((predict(honest, made) == y).float().mean()) for made in (ours, theirs)]
    assert abs(shares[0] - shares[1]) <= 0.02
    assert pgd(L2(0.8), STEPS).step_size == pytest.approx(0.2)

"""Half precision where it is meant, and nowhere else: images, differences, angles, bounds."""

import pytest
import torch
from conftest import seeded
from gradient_steps_parts import all_step, begun

from advgame.attacks import SPSA
from advgame.attacks.label_free import transport_from
from advgame.classifiers import SmallCNN
from advgame.defender import Defender
from advgame.run.devices import make_fabric
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker_bodies import PatchBody, SlimBody, bounded


@pytest.fixture
def cnn():
    with seeded_init(0):
        return SmallCNN((1, 8, 8), 10, width=8, hidden=32)


@pytest.fixture
def bf16():
    return make_fabric("cpu", 1, "bf16-mixed")


def test_the_classifier_learns_from_the_very_images_that_were_attacked(cnn, batch, bf16):
    seen, (x, y) = [], batch
    x = x + 0.001 * torch.rand(x.shape, generator=seeded())  # no number of bf16
    defender = Defender(cnn, fabric=bf16)
    cnn.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    losses = defender.backward(x, y)
    assert torch.equal(seen[0], x)
    assert losses.dtype == torch.float32
    with bf16.autocast():
        assert cnn(x).dtype == torch.bfloat16, "the rest is in half precision"


def test_what_is_not_bf16_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make_fabric("cpu", 1, "32-true")
    assert not torch.backends.cudnn.allow_tf32


def test_spsa_sees_its_small_differences(cnn, batch, bf16):
    (x, y), attack = batch, SPSA(Linf(0.1), iterations=3, samples=64)
    model = cnn.eval()
    full = attack.run(model, x[:3], y[:3], rng=seeded()).x_adv
    with bf16.autocast():
        assert torch.equal(attack.run(model, x[:3], y[:3], rng=seeded()).x_adv, full)


def test_feature_scatters_costs_are_not_rounded(bf16):
    clean, logits = torch.randn(2, 12, 10, generator=seeded())
    loss = transport_from(clean)
    with bf16.autocast():
        half = loss(logits, torch.arange(12))
    assert torch.equal(half, loss(logits, torch.arange(12)))


def test_a_schedules_angles_are_not_rounded(cnn, batch, bf16):
    """On CUDA `index_copy` refuses to put images in among lengths of another type, too."""
    model = cnn.eval().requires_grad_(False)
    with bf16.autocast():
        state = begun(model, Linf(0.1), *batch)
        all_step(state, 1 / 4, "ce")
        seen = state.features()
    tensors = {k: v for k, v in vars(state).items() if isinstance(v, torch.Tensor)}
    assert seen.dtype == torch.float32
    assert {k for k, v in tensors.items() if v.dtype == torch.bfloat16} == {"logits"}


@pytest.mark.parametrize("make", [lambda: PatchBody(2, 1, (1, 8, 8)), lambda: SlimBody(2, 1)])
def test_a_learned_attackers_bound_is_in_full_precision(make, bf16):
    with seeded_init(0):
        body = make()
    with bf16.autocast():
        assert body(torch.rand(2, 2, 8, 8, generator=seeded())).dtype == torch.float32


def test_the_bound_keeps_its_slope():
    """tanh'(4) is 0.0013; of numbers in bf16 it is 0."""
    raised = torch.full((3,), 4.0, dtype=torch.bfloat16, requires_grad=True)
    bounded(raised).sum().backward()
    assert raised.grad.min() > 0.001

"""Half precision where it is meant, and nowhere else: images, differences, angles, bounds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from gradient_steps_parts import all_step, begun
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from advgame.attacks import SPSA, attacked, pgd
from advgame.attacks.input_gradients import InputGradient
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


class Casts(TorchDispatchMode):
    """How often each of some tensors is cast to bf16, and what came of it."""

    def __init__(self, tensors):
        super().__init__()
        self.made = {tensor.untyped_storage().data_ptr(): 0 for tensor in tensors}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            place = args[0].untyped_storage().data_ptr()
            if place in self.made:
                self.made[place] += 1
                self.found.append(torch._C._WeakTensorRef(result))
        return result


class Tied(nn.Module):
    """A stranger's classifier: weights without a layer, in two places, in full precision."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.own = nn.Parameter(torch.randn(6, 6, 3, 3, generator=seeded(1)) / 6)
        self.scale = nn.Parameter(torch.ones(10))
        self.first, self.second = nn.Linear(96, 96), nn.Linear(96, 96)
        self.second.weight = self.first.weight
        self.head = nn.Linear(96, 10)
        self.bare = [nn.Parameter(torch.ones(1, 1, 8, 8))]  # no part of the module

    def forward(self, x):
        out = self.stem(x * self.bare[0])
        out = F.conv2d(out, self.own, stride=2, padding=1).flatten(1)
        return self.head(self.second(self.first(out).relu())) * self.scale


@pytest.fixture
def tied():
    with seeded_init(0):
        return Tied()


ONCE = {"stem.0.weight", "stem.0.bias", "own", "head.weight", "head.bias"}
ONCE |= {"first.weight", "first.bias", "second.bias"}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_casts_each_weight_once_and_finds_the_same(tied, batch, mode):
    x, y = batch
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    weights = dict(tied.named_parameters())
    attack = replace(pgd(Linf(0.1), 5), mode=mode)
    found = []
    for kept in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            with Casts(weights.values()) as casts:
                found.append(attack.perturb(tied, x, y, rng=seeded()))
            assert all(cast.expired() for cast in casts.found), "many attacks may share a region"
        made = dict(zip(weights, casts.made.values(), strict=True))
        assert made == {name: (1 if kept else 5) * (name in ONCE) for name in weights} | (
            {} if kept else {"first.weight": 10}
        )
        assert all(one is weights[name] for name, one in tied.named_parameters())
        assert all(one.requires_grad and one.grad is None for one in weights.values())
        after = tied.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(*found)
    assert not torch.equal(found[0], attack.perturb(tied, x, y, rng=seeded())), "in fp32 others"


def test_casts_are_of_the_weights_as_they_are(tied, batch):
    """A step of the defender within one region of autocast is seen by the next attack."""
    x, y = batch
    found = []
    for kept in (True, False):
        tied.own.data.fill_(0.1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            for _ in range(2):
                found.append(pgd(Linf(0.1), 2).perturb(tied, x, y, rng=seeded()))
                with torch.no_grad():
                    tied.own.neg_()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_weights_gradients_that_somebody_forms_in_an_attack_are_dropped(tied, batch):
    x, y = batch
    with torch.autocast("cpu", torch.bfloat16), attacked(tied):
        leaf = x.clone().requires_grad_()
        F.cross_entropy(tied(leaf), y).backward()
    assert leaf.grad.abs().sum() > 0
    assert all(one.grad is None for one in tied.parameters())


def test_a_single_gradient_leaves_the_casts_of_others(tied, cnn, batch):
    """L2L's attacker asks for one between the layers of its own network, which learns."""
    x, y = batch
    with torch.autocast("cpu", torch.bfloat16), Casts(cnn.parameters()) as casts:
        cnn(x)
        InputGradient(tied, x, y)(x)
        cnn(x)
    assert set(casts.made.values()) == {1}


def test_a_compiled_classifiers_weights_are_frozen(cnn):
    """Its graph would form the gradients of all that are not."""
    with torch.autocast("cpu", torch.bfloat16):
        for model, frozen in ((torch.compile(cnn, backend="eager"), True), (cnn, False)):
            with attacked(model):
                assert all(one.requires_grad != frozen for one in model.parameters())

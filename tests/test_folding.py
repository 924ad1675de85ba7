"""Batch norm folded into convolutions: the same but for rounding, in trainings' attacks only."""

import pytest
import torch
from conftest import seeded
from torch import nn

from advgame.attacks import attacked, pgd
from advgame.attacks.folding import folding
from advgame.classifiers.resnet import (
    BasicBlock,
    Bottleneck,
    PreActBlock,
    RawShortcutBlock,
    ResidualNet,
    SwishBlock,
)
from advgame.defender import Defender
from advgame.evaluation import validator
from advgame.games import AdversarialTraining
from advgame.seeding import seeded_init
from advgame.threat import Linf

BALL = Linf(0.1)
# block -> how many batch norms a pass has, and how many are folded, with a shortcut's
KINDS = {
    BasicBlock: (6, 6),
    Bottleneck: (9, 9),
    PreActBlock: (5, 2),
    RawShortcutBlock: (5, 2),
    SwishBlock: (5, 2),
}


def network(block):
    """Of two blocks, with statistics and weights of batch norm that say something."""
    with seeded_init(0):
        made = ResidualNet(block, 4, ((4, 1), (6, 1)), 10, channels=1)
        for norm in (one for one in made.modules() if isinstance(one, nn.BatchNorm2d)):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    made(torch.rand(16, 1, 8, 8, generator=seeded()))
    return made


class Norms:
    """Counts calls of batch norm in a network."""

    def __init__(self, model):
        self.calls = 0
        for one in model.modules():
            if isinstance(one, nn.BatchNorm2d):
                one.register_forward_hook(self._count)

    def _count(self, *_):
        self.calls += 1


@pytest.mark.parametrize("block", KINDS, ids=lambda one: one.__name__)
def test_logits_and_gradients_are_the_same_but_for_rounding(block, batch):
    x, model = batch[0].double(), network(block).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parts, norms = list(model.modules()), Norms(model)
    weights, (every, folds) = dict(model.named_parameters()), KINDS[block]
    found = []
    for fold in (False, True):
        leaf, norms.calls = x.clone().requires_grad_(), 0
        with folding() if fold else attacked(model), attacked(model):
            logits = model(leaf)
            found += [logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]]
        assert norms.calls == every - folds * fold
    for one, other in zip(found[:2], found[2:], strict=True):
        assert 0 < (one - other).abs().max() < 1e-11 * one.abs().max()
    assert list(model.modules()) == parts
    assert all(one is weights[name] for name, one in model.named_parameters())
    assert all(one.requires_grad for one in weights.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "another forward"])
def test_what_is_no_scale_and_shift_is_left(mode, batch):
    class Doubled(PreActBlock):
        def forward(self, x):
            return super().forward(x) + self.conv1(x)

    norms = Norms(model := network(Doubled if mode == "another forward" else PreActBlock))
    with folding(), attacked(model, "train" if mode == "train" else "eval"):
        model(batch[0])
    assert norms.calls == 5


def test_trainings_fold_and_evaluations_do_not(batch, digits):
    model, few = network(PreActBlock), digits.test.subset(slice(10))
    norms, defender = Norms(model), Defender(model)
    rules = AdversarialTraining(BALL, lambda ball: pgd(ball, 3))
    rules.step(defender, *batch, seeded())
    assert norms.calls == 3 * 3 + 5, "the attack's passes, and one that teaches"
    norms.calls = 0
    validator(few, BALL, 0)(model)
    assert norms.calls == 5 * (1 + 10 + 1 + 1 + 1), "clean, PGD-10 and FGSM with their verdicts"

"""The attacks beside the PGD family, and every attack that an evaluation knows by name."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BatchNormNet, Linear, slowly
from torch import nn

from advgame import attacks
from advgame.attacks import (
    SPSA,
    CarliniWagnerLinf,
    DistributionalAttack,
    EoT,
    FeatureAttack,
    GradientAttack,
    Transfer,
    fgsm,
    mim,
    n_fgsm,
    pgd,
)
from advgame.attacks.feature import penultimate
from advgame.attacks.gradient_steps import Menu
from advgame.classifiers import SmallCNN
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.attacks import ATTACKS, Context, make_suite
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.losses import clipped_margin, cross_entropy, margin
from advgame.seeding import seeded_init, stream
from advgame.threat import L2, Linf
from agents.attacker import Attacker
from agents.policies import FeaturePolicy


@pytest.fixture
def pair(rng):
    """A linear classifier of two classes and images that it gets right, away from 0 and 1."""
    model = Linear(torch.stack([torch.ones(16), -torch.ones(16)]) * 0.3)
    x = 0.35 + 0.3 * torch.rand(10, 1, 4, 4, generator=rng)
    model.bias.data[0] = -2 * 0.3 * float(x.sum((1, 2, 3)).median())
    model.requires_grad_(False)
    return model, x, model(x).argmax(1)


@pytest.fixture(scope="module")
def trained(digits):
    """A digits classifier after a few epochs of plain training, and images it gets right."""
    with seeded_init(0):
        model = SmallCNN((1, 8, 8), 10, width=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = digits.train.floats(), digits.train.labels
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    right = (model(x).argmax(1) == y).nonzero()[:8, 0]
    return model, digits.train.subset(right)


def test_mim_is_the_papers_loop(trained):
    model, data = trained
    x, y = data.floats(), data.labels
    got = mim(Linf(0.1), 5, 0.03, momentum=0.7).perturb(model, x, y)
    want, g = x.clone(), torch.zeros_like(x)
    for _ in range(5):
        leaf = want.clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)
        g = 0.7 * g + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        want = (x + (want + 0.03 * g.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(got, want)
    plain = GradientAttack(Linf(0.1), 5, 0.03).perturb(model, x, y)
    assert not torch.equal(got, plain)


def test_mim_remembers_per_image_when_images_leave_the_batch(trained):
    model, data = trained
    x, y = data.floats(), data.labels
    steps = torch.arange(8) % 4
    batch = GradientAttack(Linf(0.1), steps, 0.03, momentum=1.0).perturb(model, x, y)
    for i in range(8):
        alone = GradientAttack(Linf(0.1), int(steps[i]), 0.03, momentum=1.0)
        one = alone.perturb(model, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], one, rtol=0, atol=1e-6)


def test_mim_forgets_between_restarts(trained):
    """From the clean image every restart is the same run."""
    model, data = trained
    attack = mim(Linf(0.1), 4, 0.03)
    once = attack.run(model, data.floats(), data.labels)
    twice = replace(attack, restarts=3).run(model, data.floats(), data.labels)
    assert torch.equal(once.x_adv, twice.x_adv)
    assert twice.backwards == 3 * once.backwards


def test_n_fgsm_steps_from_wide_noise_and_is_not_pulled_back(pair, rng):
    model, x, y = pair
    x_adv = n_fgsm(Linf(0.02)).perturb(model, x, y, rng=rng)
    worse = (model.weight[1 - y] - model.weight[y]).sign().view_as(x)
    noise = x_adv - x - 0.02 * worse
    assert 0.035 < float(noise.abs().max()) <= 0.04 + 1e-6


def test_clipped_margin_gains_nothing_beyond_kappa(rng):
    logits, y = 10 * torch.randn(20, 5, generator=rng), torch.arange(20) % 5
    torch.testing.assert_close(clipped_margin(logits, y, 3.0), margin(logits, y).clamp(max=3.0))


def test_carlini_wagner_finds_what_the_ball_allows_and_returns_clean_elsewhere(pair):
    model, x, y = pair
    need = margin(model(x), y).abs() / (0.6 * 16)  # the ε at which each image can be fooled
    eps = float(need.median()) * 1.05
    result = CarliniWagnerLinf(Linf(eps)).run(model, x, y)
    reachable = need < 0.9 * eps  # Adam stops a little before the optimum
    assert 2 <= int(reachable.sum()) <= 8
    assert result.fooled[reachable].all()
    assert not result.fooled[need > eps].any()
    assert torch.equal(result.x_adv[~result.fooled], x[~result.fooled])
    assert torch.equal(model(result.x_adv).argmax(1) != y, result.fooled)
    assert float((result.x_adv - x).abs().max()) <= eps + 1e-6
    blind = Linear(torch.zeros(2, 16), torch.tensor([2.0, 0.0]))
    hopeless = CarliniWagnerLinf(Linf(eps)).run(blind, x, torch.zeros_like(y))
    assert hopeless.backwards == 10 * 8 * 50, "eight constants from 1e-5 to 100"
    with pytest.raises(InputError, match="Linf"):
        CarliniWagnerLinf(L2(0.5))


def test_penultimate_features_are_the_last_linear_layers_input(rng):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(2, 1, 2, 2, generator=rng)
    with penultimate(model) as seen:
        model(x)
    torch.testing.assert_close(seen[0], model[:3](x))
    assert not model[3]._forward_pre_hooks
    with pytest.raises(InputError, match="linear layer"), penultimate(nn.Flatten()):
        pass


def test_feature_attack_goes_where_the_features_of_another_class_are():
    """Features are the pixels: the target's are reached exactly when the ball allows it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    model[1].weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()
    pool = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]]).double().view(2, 1, 2, 2)
    labels = torch.tensor([0, 1])
    x, y = pool[:1] * 0.9 + 0.05, torch.tensor([0])
    attack = FeatureAttack(Linf(0.5), pool, labels, targets=1, steps=40)
    result = attack.run(model, x, y, rng=torch.Generator().manual_seed(0))
    assert result.fooled.all()
    assert int(model(result.x_adv).argmax(1)) == 1
    held = FeatureAttack(Linf(0.05), pool, labels, targets=2, steps=5)
    held = held.run(model, x, y, rng=torch.Generator().manual_seed(0))
    assert not held.fooled.any()
    assert held.backwards == 10, "two targets of five steps"
    alone = FeatureAttack(Linf(0.5), pool[:1], labels[:1])
    with pytest.raises(InputError, match="other classes"):
        alone.run(model, x, y, rng=torch.Generator().manual_seed(0))


def test_spsa_estimates_the_gradient_without_bias(pair):
    model, x, y = pair
    attack = SPSA(Linf(0.1), samples=20_000, delta=1e-2)
    got = attack._estimate(model.double(), x[:1].double(), y[:1], torch.Generator().manual_seed(0))
    want = (model.weight[1 - y[0]] - model.weight[y[0]]).view(1, 1, 4, 4)
    torch.testing.assert_close(got, want.double(), atol=0.1, rtol=0)


def test_spsa_fools_without_gradients_and_stops_there(pair, rng):
    model, x, y = pair
    need = margin(model(x), y).abs() / (0.6 * 16)
    eps = float(need.max()) * 1.2
    result = SPSA(Linf(eps), iterations=60, samples=64).run(model, x, y, rng=rng)
    assert result.fooled.all()
    assert result.backwards == 0
    assert torch.equal(model(result.x_adv).argmax(1) != y, result.fooled)
    assert result.forwards < 10 * 60 * 64
    held = SPSA(Linf(0.02), iterations=8, samples=16).run(model, x[:2], y[:2], rng=rng)
    assert 0.019 < float((held.x_adv - x[:2]).abs().max()) <= 0.02 + 1e-6


def test_transfer_asks_the_target_nothing(pair, rng):
    model, x, y = pair
    other = copy.deepcopy(model)
    model.forward = None  # would raise
    x_adv = Transfer(fgsm(Linf(0.05)), other).run(model, x, y, rng=rng).x_adv
    assert torch.equal(x_adv, fgsm(Linf(0.05)).perturb(other, x, y))


def test_eot_sees_through_noise_and_counts_every_pass(pair):
    model, x, y = pair

    class Noisy(nn.Module):
        def forward(self, images):
            return model(images) * (1 + 4 * torch.randn(len(images), 1))

    attack = pgd(Linf(0.02), 10, 0.004)
    noisy, steps = Noisy(), {}
    for name, one in {"plain": attack, "eot": EoT(attack, 30)}.items():
        torch.manual_seed(0)
        result = one.run(noisy, x, y, rng=torch.Generator().manual_seed(0))
        steps[name] = float(cross_entropy(model(result.x_adv), y).mean().detach())
        assert result.backwards == 100 * (30 if name == "eot" else 1)
    assert steps["eot"] > steps["plain"] + 1e-3


LARGER = {"adt:spsa", "spsa", "adt:fea", "autoattack-rand"}  # the same code with larger numbers
COSTLY = {"aa:square", "aa:apgd-t", "fea"}
QUICK = [name for name in ATTACKS if not name.startswith(("aa:fab", "autoattack"))]


@pytest.mark.parametrize("norm", [Linf(0.1), L2(0.7)])
@pytest.mark.parametrize(
    "name",
    slowly([name for name in QUICK if name not in LARGER], COSTLY),
)
def test_every_attack_stays_in_the_ball_and_leaves_the_model_alone(name, norm, trained):
    if norm.norm == "L2" and name in ("cw-adam", "l2l:cw-adam", "adt:exp-worst-of-10"):
        pytest.skip("for L∞ only")
    model, data = trained
    with seeded_init(1):
        surrogate = SmallCNN((1, 8, 8), 10, width=8)
    before = copy.deepcopy(model.state_dict())
    x, y = data.floats(), data.labels
    for _, attack in make_suite(name, Context(norm, data, 0, surrogate)):
        made = [attack.run(model, x, y, rng=stream(0, "draws")).x_adv for _ in range(2)]
        assert torch.equal(*made), "the same stream must give the same bits"
        assert float(norm.size(made[0] - x).max()) <= norm.eps + 1e-5
        assert 0 <= float(made[0].min()) <= float(made[0].max()) <= 1
        if "transfer" not in name:
            gain = (cross_entropy(model(made[0]), y) - cross_entropy(model(x), y)).detach()
            assert float(gain.mean()) >= 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_presets_have_the_papers_steps_at_the_papers_radius():
    data = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), 2)

    def only(name, eps):
        return make_suite(name, Context(Linf(eps), data, 0))[0][1]

    adt = only("adt:pgd100", 8 / 255)
    assert (adt.steps, adt.step_size, adt.start) == (100, pytest.approx(2 / 255), Linf(8 / 255))
    adt = only("adt:mim20", 8 / 255)
    assert (adt.steps, adt.momentum, adt.start) == (20, 1.0, Linf(8 / 255))
    assert adt.step_size == pytest.approx(2 / 255)
    adt = only("adt:cw30", 8 / 255)
    assert (adt.steps, adt.loss.keywords) == (30, {"kappa": 50.0})
    fea = only("adt:fea", 8 / 255)
    assert (fea.targets, fea.steps, fea.step_size) == (200, 50, None), "None is ε/8: 1/255"
    l2l = only("l2l:pgd20", 0.031)
    assert (l2l.steps, l2l.step_size) == (20, pytest.approx(0.003))
    cw = only("l2l:cw-adam", 0.031)
    assert (cw.iterations, cw.lr, cw.first_c, cw.largest_c, cw.decay) == (50, 5e-3, 1e-5, 100, 0.9)
    mvm = only("mvm:ifgsm", 0.15)
    assert mvm.step_size == 0.15, "η = 0.3 in [-1, 1] pixels is 0.15 in [0, 1]"
    madry = only("madry:pgd40", 0.3)
    assert (madry.steps, madry.step_size) == (40, pytest.approx(0.01))


@pytest.mark.parametrize("name", ["train", "steps", "pgd10", "fea", "cw-adam", "eot-pgd20"])
def test_attacking_never_changes_the_model(name, digits):
    model, data = BatchNormNet(), digits.train.subset(slice(8))
    model.net[1].eval()  # a mixed state must come back as it was
    model.net[5].bias.requires_grad_(False)
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before = copy.deepcopy(model)
    if name == "train":
        attack = replace(pgd(Linf(0.1), 3), mode="train")
    elif name == "steps":
        policy = FeaturePolicy(len(Menu().feature_names), Menu().sizes)
        attack = Attacker(policy, Menu(), "clean", {}).attack(Linf(0.1), 4)
    else:
        attack = make_suite(name, Context(Linf(0.1), data, 0))[0][1]
    attack.run(model, data.floats(), data.labels, rng=stream(0, "draws"))
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert old.training == new.training
    for (key, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
        assert old.requires_grad == new.requires_grad, key
        assert (new.grad is None) == (key != "net.0.weight")
    assert all(torch.equal(*both) for both in zip(before.buffers(), model.buffers(), strict=True))
    assert torch.equal(model.net[0].weight.grad, torch.ones_like(model.net[0].weight))


PIXELS = {"pool": torch.rand(2, 1, 2, 2), "pool_labels": torch.arange(2)}
PGD = {"steps": 3, "step_size": 0.1}
# an attack's other arguments -> what must not be among them
REFUSED = [
    (SPSA, {}, "iterations samples batch", 0),
    (SPSA, {}, "delta lr", -1.0),
    (SPSA, {}, "lr", math.inf),
    (FeatureAttack, PIXELS, "targets steps", 0),
    (FeatureAttack, PIXELS, "step_size", -0.01),
    (GradientAttack, PGD, "steps", -1),
    (GradientAttack, PGD, "steps", torch.ones(4)),
    (GradientAttack, PGD, "step_size restarts", 0),
    (GradientAttack, PGD, "step_size", torch.ones(4, dtype=torch.int64)),
    (GradientAttack, PGD, "keep", "first"),
    (GradientAttack, PGD | {"stop_when_fooled": True}, "keep", "best"),
    (GradientAttack, PGD, "momentum", -0.1),
    (GradientAttack, PGD, "momentum", math.nan),
    (GradientAttack, PGD, "momentum", "x"),
]


@pytest.mark.parametrize(
    ("kind", "good", "name", "bad"),
    [(*case[:2], name, case[3]) for case in REFUSED for name in case[2].split()],
)
def test_settings_that_do_nothing_or_never_end_are_refused(kind, good, name, bad):
    kind(Linf(0.1), **good)
    with pytest.raises(InputError, match=f"SPSA.*{name}" if kind is SPSA else "step|" + name):
        kind(Linf(0.1), **good | {name: bad})


BY_NAME = {
    "pgd20": GradientAttack,
    "adt:pgd20": GradientAttack,
    "spsa": SPSA,
    "aa:fab": AutoAttackPart,
}


@pytest.mark.parametrize("name", BY_NAME)
def test_attacks_that_need_nothing_but_a_ball_are_made_by_name(name):
    attack = attacks.by_name(name, Linf(0.1))
    assert isinstance(attack, BY_NAME[name])
    assert attack.threat == Linf(0.1)


def test_autoattacks_parts_by_name_have_the_seed_that_is_given():
    assert attacks.by_name("aa:apgd-ce", Linf(0.1)).seed == 0
    assert type(attacks.by_name("aa:apgd-ce", Linf(0.1), np.int64(3)).seed) is int


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fea", "images to aim at"),
        ("transfer", "surrogate"),
        ("autoattack", "take one, aa:apgd-ce"),
        # spellings of earlier versions
        *((f"l2l:pgm{steps}", f"did you mean l2l:pgd{steps} ") for steps in (10, 20, 40, 100)),
        ("l2l:transfer-pgm10", "did you mean l2l:transfer-pgd10 "),
        ("l2l:cw", r"did you mean l2l:cw-adam\?"),
        ("nfgsm", "did you mean n-fgsm "),
    ],
)
def test_what_a_name_alone_does_not_make_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        attacks.by_name(name, Linf(0.1))


@pytest.mark.parametrize("ball", [Linf, L2])
def test_radii_from_numpy_leave_images_in_their_own_precision(ball, pair):
    model, x, y = pair[0], pair[1], pair[2]
    eps = torch.linspace(0.05, 0.15, len(x), dtype=torch.float64)
    made = [
        pgd(ball(radii), 3).perturb(model, x, y, rng=torch.Generator().manual_seed(0))
        for radii in (eps, eps.float())
    ]
    assert made[0].dtype == x.dtype
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("ball", [Linf, L2])
def test_attacks_that_draw_take_radii_from_numpy(ball, trained):
    model, x, y = trained[0], trained[1].floats(), trained[1].labels
    eps = torch.linspace(0.05, 0.15, len(x), dtype=torch.float64)
    for radii in (eps, eps.float()):
        kinds = [FeatureAttack(ball(radii), x, y, 1, 2)]
        if ball is Linf:
            kinds.append(DistributionalAttack(ball(radii), steps=1, samples=1, draws=2))
        for made in kinds:
            found = made.run(model, x, y, rng=torch.Generator().manual_seed(0)).x_adv
            assert found.dtype == x.dtype
            assert bool((ball(eps.float()).size(found - x) <= eps + 1e-6).all())


def test_what_no_attack_can_use_is_refused_in_a_line(pair):
    model, x, y = pair[0], pair[1], pair[2]
    with pytest.raises(InputError, match=r"steps must be a whole number, 0 or above, not 3\.5"):
        GradientAttack(Linf(0.1), 3.5, 0.1)
    short = GradientAttack(Linf(0.1), 3, 0.1, start=Linf(torch.tensor([0.1])))
    with pytest.raises(InputError, match=f"eps has 1 entries for {len(x)} images"):
        short.perturb(model, x, y, rng=torch.Generator())
    with pytest.raises(InputError, match=r"a classifier is a torch\.nn\.Module, not a function"):
        fgsm(Linf(0.1)).perturb(lambda images: model(images), x, y)

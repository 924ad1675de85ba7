"""PGD's family: closed forms, per-image settings equal to one at a time, the model untouched."""

from dataclasses import replace

import pytest
import torch
from conftest import BatchNormNet, Linear
from torch import nn

from advgame.attacks import GradientAttack, attacked, fgsm, ifgsm, pgd
from advgame.classifiers import SmallCNN
from advgame.errors import InputError
from advgame.losses import cross_entropy, margin
from advgame.threat import L2, Linf


@pytest.fixture
def two_classes(rng):
    """A binary linear classifier, and grey images that no attack below pushes out of [0, 1]."""
    model = Linear(torch.randn(2, 16, generator=rng))
    x = 0.4 + 0.2 * torch.rand(8, 1, 4, 4, generator=rng)
    return model, x, torch.arange(8) % 2


def weight_against(model, y):
    """d(loss)/dx of the binary problem points along w_other - w_true."""
    return (model.weight[1 - y] - model.weight[y]).detach().view(-1, 1, 4, 4)


@pytest.mark.parametrize("eps", [0.1, torch.linspace(0.02, 0.2, 8)])
def test_linear_closed_forms(two_classes, eps, rng):
    """On a linear model every method ends at the ball's farthest point along w."""
    model, x, y = two_classes
    away = weight_against(model, y)
    radius = torch.as_tensor(eps).expand(8).view(-1, 1, 1, 1)
    linf = x + radius * away.sign()
    l2 = x + radius * away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for attack, want in [
        (fgsm(Linf(eps)), linf),
        (fgsm(L2(eps)), l2),
        (ifgsm(Linf(eps), 5, eps), linf),
        (pgd(Linf(eps), 20, restarts=2), linf),
        (replace(pgd(Linf(eps), 20), loss=margin, keep="best"), linf),
        (pgd(L2(eps), 100), l2),
    ]:
        x_adv = attack.perturb(model, x, y, rng=rng)
        # PGD-L2 approaches its farthest point geometrically, the others reach it
        torch.testing.assert_close(x_adv, want, rtol=0, atol=1e-4 if want is l2 else 1e-6)


def test_targeted_descends_to_the_target(two_classes, rng):
    model, x, y = two_classes
    attack = replace(pgd(Linf(0.1), 10, restarts=2), targeted=True)
    result = attack.run(model, x, 1 - y, rng=rng)
    torch.testing.assert_close(result.x_adv, x + 0.1 * weight_against(model, y).sign())
    want = cross_entropy(model(result.x_adv), 1 - y)
    torch.testing.assert_close(result.loss, want.detach())


@pytest.mark.parametrize("kind", [Linf, L2])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_settings_per_image_equal_one_image_at_a_time(double_cnn, kind, keep):
    """The shrinking batch changes nothing: exactly for L∞ in fp64. L2 steps follow the gradient's
    size, whose last bit depends on the batch that a matrix product is part of."""
    model, x, y = double_cnn
    rng = torch.Generator().manual_seed(1)
    eps = torch.rand(12, generator=rng, dtype=torch.float64) * 0.3 + 0.05
    steps = torch.randint(0, 9, (12,), generator=rng)
    size = torch.rand(12, generator=rng, dtype=torch.float64) * 0.1 + 0.01
    assert len(steps.unique()) > 3
    attack = GradientAttack(kind(eps), steps, size, keep=keep)
    result = attack.run(model, x, y)
    for i in range(12):
        alone = GradientAttack(kind(float(eps[i])), int(steps[i]), float(size[i]), keep=keep)
        one = alone.perturb(model, x[i : i + 1], y[i : i + 1])
        atol = 0 if kind is Linf else 1e-12
        torch.testing.assert_close(result.x_adv[i : i + 1], one, rtol=0, atol=atol)
    assert result.backwards == int(steps.sum()), "finished images must not be computed"
    assert torch.equal(result.x_adv[steps == 0], x[steps == 0])


def test_random_starts_do_not_depend_on_the_other_images_strategies(double_cnn):
    model, x, y = double_cnn
    steps = torch.arange(12) % 5
    noise = []
    for order in (steps, steps.flip(0)):
        attack = GradientAttack(Linf(0.1), order, 1e-9, start=Linf(0.1))
        x_adv = attack.perturb(model, x, y, rng=torch.Generator().manual_seed(3))
        noise.append(x_adv - x)
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-7)
    assert noise[0].abs().max() > 0.05
    other = attack.perturb(model, x, y, rng=torch.Generator().manual_seed(4)) - x
    assert not torch.equal(noise[1], other), "another seed, another draw"


def test_model_is_restored_when_the_attack_fails():
    model = BatchNormNet()
    with pytest.raises(RuntimeError), attacked(model):
        raise RuntimeError
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_restarts_and_best_never_reach_less(double_cnn):
    model, x, y = double_cnn

    def loss_of(attack):
        x_adv = attack.perturb(model, x, y, rng=torch.Generator().manual_seed(5))
        assert (Linf(0.2).size(x_adv - x) <= 0.2 + 1e-9).all()
        return cross_entropy(model(x_adv), y).detach()

    once = loss_of(pgd(Linf(0.2), 4, 0.15))
    best = loss_of(replace(pgd(Linf(0.2), 4, 0.15), keep="best"))
    more = loss_of(pgd(Linf(0.2), 4, 0.15, restarts=4))
    assert (best >= once).all()
    assert (more >= once).all()
    assert (more > once).any()


def test_stopping_when_fooled_gives_the_same_verdicts_for_less(double_cnn):
    model, x, _ = double_cnn
    y = model(x).argmax(1)
    full = pgd(Linf(0.02), 10, restarts=2)
    result = replace(full, stop_when_fooled=True).run(
        model, x, y, rng=torch.Generator().manual_seed(0)
    )
    assert torch.equal(result.fooled, model(result.x_adv).argmax(1) != y)
    assert 0 < int(result.fooled.sum()) < 12, "some must be fooled and some not"
    assert (Linf(0.02).size(result.x_adv - x) <= 0.02 + 1e-9).all()
    assert result.backwards < 240
    # an image that is never fooled sees the same steps as in the full attack
    whole = full.run(model, x, y, rng=torch.Generator().manual_seed(0))
    assert torch.equal(result.x_adv[~result.fooled], whole.x_adv[~result.fooled])


def test_arithmetic_is_fp32_for_low_precision_models(rng):
    model = SmallCNN((1, 8, 8), 10).bfloat16()
    x = torch.rand(4, 1, 8, 8, generator=rng).bfloat16()
    x_adv = pgd(Linf(0.001), 5).perturb(model, x, torch.arange(4), rng=rng)
    assert x_adv.dtype == torch.float32
    # bf16 near 1 has a grain of 0.004, four times this ball
    assert (Linf(0.001).size(x_adv - x.float()) <= 0.001 + 1e-6).all()


def test_a_start_outside_a_small_ball_is_pulled_in_by_the_first_step(double_cnn):
    model, x, y = double_cnn
    rng = torch.Generator().manual_seed(0)
    attack = GradientAttack(Linf(0.01), 1, 0.001, start=Linf(0.2))
    x_adv = attack.perturb(model, x, y, rng=rng)
    assert (Linf(1).size(x_adv - x) <= 0.01 + 1e-9).all()


GOOD = {"threat": Linf(0.1), "steps": 3, "step_size": 0.1}


IMAGES, LABELS = torch.rand(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (IMAGES.clone().fill_(torch.nan), LABELS, "NaN"),
        (IMAGES * 255, LABELS, r"\[0, 1\]"),
        (IMAGES - 0.5, LABELS, r"\[0, 1\]"),
        (IMAGES[0], LABELS, "shape|float tensor"),
        ((IMAGES * 255).byte(), LABELS, "float"),
        (IMAGES, LABELS + 8, r"0\.\.9"),
        (IMAGES, LABELS - 1, "labels"),
        (IMAGES, LABELS[:2], "one per image"),
        (IMAGES, LABELS.float(), "integer"),
        (IMAGES[:0], LABELS[:0], "non-empty"),
    ],
)
def test_bad_images_and_labels_are_refused(x, y, words):
    with pytest.raises(InputError, match=words):
        GradientAttack(**GOOD).perturb(SmallCNN((1, 8, 8), 10), x, y)


def test_other_dtypes_and_graphs_are_taken(rng):
    """NumPy's float64 radii, int32 labels, images that require grad, a graph that is cut."""
    model = SmallCNN((1, 8, 8), 10)
    eps = torch.full((4,), 0.1, dtype=torch.float64)
    x = IMAGES.clone().requires_grad_()
    x_adv = GradientAttack(Linf(eps), 3, eps / 4).perturb(model, x, LABELS.int())
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    want = GradientAttack(Linf(0.1), 3, 0.025).perturb(model, IMAGES, LABELS)
    torch.testing.assert_close(x_adv, want, rtol=0, atol=1e-6)

    class Cut(nn.Module):
        def forward(self, x):
            return model(x).detach()

    assert torch.equal(GradientAttack(**GOOD).perturb(Cut(), IMAGES, LABELS), IMAGES)


@pytest.mark.parametrize("name", ["steps", "step_size"])
def test_negative_settings_per_image_are_refused(name):
    good = {"steps": torch.ones(4, dtype=torch.int64), "step_size": torch.ones(4)}
    good[name][2] = -1
    with pytest.raises(InputError, match=f"{name} must not be negative"):
        GradientAttack(Linf(0.1), **good).perturb(SmallCNN((1, 8, 8), 10), IMAGES, LABELS)


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


@pytest.mark.parametrize(
    ("model", "attack", "word"),
    [
        (Pair(), GradientAttack(**GOOD), "tuple"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1)), GradientAttack(**GOOD), "softmax"),
        (nn.Flatten(), pgd(Linf(0.1), 3), "rng"),
        (nn.Flatten(), GradientAttack(Linf(torch.full((3,), 0.1)), 3, 0.1), "3 entries for 4"),
    ],
)
def test_classifiers_and_calls_that_no_attack_can_use_are_refused(model, attack, word):
    with pytest.raises(InputError, match=word):
        attack.perturb(model, IMAGES, LABELS)

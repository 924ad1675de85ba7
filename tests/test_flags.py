"""Flags: classifiers built to be wrong are caught, honest ones are not."""

import copy

import pytest
import torch
from conftest import Around, Linear, slowly, undefended
from torch import nn

from advgame.classifiers import Normalise, make_classifier
from advgame.data import STATISTICS, Batches, ImageSet, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import Verdicts, evaluate, find_flags
from advgame.evaluation.flags import _below_chance
from advgame.games.las_at import LasAt
from advgame.games.strategy import Strategies
from advgame.seeding import seeded_init, stream
from advgame.statistics import beats
from advgame.targets import shipped
from advgame.threat import L2, Linf

BALL = Linf(0.1)
WIDE = Linf(0.25)  # where many of these 60 images can be fooled
# further names of one check: each is a slow test
PGDS, STRONGER = ("adt:pgd20", "las:pgd50", "madry:pgd40"), ("autoattack-plus", "cw", "mim")
TRANSFERS = ("l2l:transfer-fgsm", "l2l:transfer-pgd10")


def names(model, data, ball=BALL, attacks=("pgd20",)):
    verdicts = evaluate(model, data, ball, attacks)
    return {flag.name for flag in find_flags(model, data, ball, verdicts)}


def test_honest_classifiers_are_not_flagged(honest, test_images, digits):
    assert names(honest, test_images) == set()
    plain = undefended(digits, width=16)
    assert names(plain, test_images) == set()
    assert names(plain, test_images, L2(0.8)) == set()
    linear = Linear(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    assert names(linear, test_images) == set()


class Viewed(nn.Module):
    """Its view cannot tell the shape of no image."""

    def __init__(self):
        super().__init__()
        with seeded_init(0):
            self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.view(x.size(0), -1))


def test_one_image_is_enough_for_the_flags(test_images):
    assert "batch_dependent" not in names(Viewed(), test_images.subset(slice(1)), attacks=("fgsm",))


class _Noise(torch.autograd.Function):
    """The identity, whose backward keeps a third of the pixels and makes the rest noise."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        keep = torch.rand_like(gradient) < 0.3
        return torch.where(keep, gradient, torch.randn_like(gradient) * gradient.std())


def purified(net, x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).logsumexp(1).sum(), leaf)
    return net(x + 0.01 * grad.sign())


def levels(x):
    return (x * 3).round() / 3


BROKEN = {
    "quantised": lambda net, x: net(levels(x)),  # shatters the gradient
    # the cross-entropy of a right answer is exactly 0 in fp32
    "saturated": lambda net, x: 1e4 * net(x),
    "faint": lambda net, x: 1e-6 * net(x),  # the cross-entropy's gradient drowns in rounding
    # the logits move with the image, the class does not
    "one class": lambda net, x: net(x) + 100 * torch.eye(10)[4],
    "noisy": lambda net, x: net(x + 0.05 * torch.randn_like(x)),
    "blind": lambda net, x: 5 * torch.eye(10)[3].expand(len(x), 10) + 0 * x.mean(),
    "rounded": lambda net, x: net(x).round(),
    "detached": lambda net, x: net(x.detach()),
    # a fast, small wave on the pixels turns the gradient's sign at random
    "shattered": lambda net, x: net(x + 0.01 * torch.sin(1500 * x)),
    "half true": lambda net, x: net(_Noise.apply(x)),
    # four levels, with a gradient as if there were none
    "straight-through": lambda net, x: net(x + (levels(x) - x).detach()),
    "NaN gradients": lambda net, x: net(x) + 0 * (x - x.detach()).sqrt().sum((1, 2, 3))[:, None],
    "batch statistics": lambda net, x: net(
        nn.functional.batch_norm(x, None, None, training=True) * 0.3 + 0.5
    ),
    "purifier": purified,
}


def broken(name, net):
    return Around(net, BROKEN[name]).eval()


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("quantised", "zero_gradients"),
        ("quantised", "unbounded_attack_fails"),
        ("quantised", "black_box_beats_white_box"),
        ("saturated", "zero_gradients"),
        ("saturated", "saturated_loss"),
        ("rounded", "zero_gradients"),
        ("detached", "zero_gradients"),
        ("shattered", "gradient_does_not_predict"),
        ("half true", "gradient_does_not_predict"),
        ("half true", "randomised_gradient"),
        ("straight-through", "gradient_does_not_predict"),
        ("NaN gradients", "non_finite"),
        ("noisy", "randomised_output"),
        ("blind", "zero_gradients"),
        ("blind", "constant_output"),
        ("blind", "constant_class"),
        ("one class", "constant_class"),
        ("batch statistics", "batch_dependent"),
        ("purifier", "gradient_inside"),
    ],
)
def test_broken_classifiers_are_flagged(name, flag, honest, test_images):
    ball = BALL if name == "one class" else WIDE
    assert flag in names(broken(name, honest), test_images, ball)


def test_classes_that_are_numbered_otherwise_are_flagged(honest, digits):
    data = digits.test.subset(slice(100))
    turned = Around(honest, lambda net, x: net(x).roll(1, 1)).eval()
    assert "below_chance" in names(turned, data, attacks=("fgsm",))


@pytest.mark.parametrize(
    ("right", "n", "classes", "found"),
    [(1, 100, 10, True), (2, 100, 10, False), (10, 100, 10, False), (0, 60, 10, False)],
)
def test_below_chance_is_what_luck_alone_hardly_gives(right, n, classes, found):
    clean = {"clean": torch.arange(n) < right}  # p = 0.0003, 0.0019, 0.58, 0.0018
    assert bool(_below_chance(Verdicts(clean, {}, {}), classes)) == found


def test_what_gives_no_gradient_still_gets_its_report(honest, test_images):
    few, model = test_images.subset(slice(6)), broken("detached", honest)
    verdicts = evaluate(model, few, WIDE, ("aa:apgd-ce", "aa:apgd-t", "aa:fab-t"))
    assert verdicts.worst_case() == verdicts.accuracy()["clean"]
    assert "zero_gradients" in {f.name for f in find_flags(model, few, WIDE, verdicts)}


def test_autoattack_takes_classifiers_of_other_precision(honest, test_images):
    few = test_images.subset(slice(6))
    model = Around(copy.deepcopy(honest).double(), lambda net, x: net(x.double())).eval()
    theirs = evaluate(model, few, BALL, ("aa:apgd-ce",))
    ours = evaluate(honest, few, BALL, ("aa:apgd-ce",))
    assert torch.equal(theirs.correct["aa:apgd-ce"], ours.correct["aa:apgd-ce"])


def test_flags_need_no_more_memory_than_the_evaluation(honest, test_images):
    def small(net, x):
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x)

    model = Around(honest, small).eval()
    verdicts = evaluate(model, test_images, BALL, ("fgsm",))
    assert verdicts.notes
    assert find_flags(model, test_images, BALL, verdicts) == []


def test_a_trained_linear_classifier_is_honest(digits, test_images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = digits.train.floats(), digits.train.labels
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for ball in (BALL, L2(0.8)):
        assert names(model, digits.test.subset(slice(200)), ball) == set()


def test_the_mode_that_a_classifier_comes_in_changes_nothing(test_images):
    with seeded_init(0):
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    assert names(model.train(), test_images) == names(model.eval(), test_images)


@pytest.mark.parametrize("attack", slowly(["transfer", *TRANSFERS], TRANSFERS))
def test_a_transfer_attack_that_beats_the_gradients_is_flagged(attack, honest, test_images):
    """The quantised classifier's gradients are gone; its honest twin's are as good as its own."""
    masked = broken("quantised", honest)
    verdicts = evaluate(masked, test_images, WIDE, ("pgd20", attack), surrogate=honest)
    found = {flag.name for flag in find_flags(masked, test_images, WIDE, verdicts)}
    assert "transfer_beats_white_box" in found
    verdicts = evaluate(honest, test_images, WIDE, ("pgd20", attack), surrogate=masked)
    assert not find_flags(honest, test_images, WIDE, verdicts)


def test_beating_is_judged_by_the_images_that_one_attack_alone_breaks():
    alive = torch.ones(100, dtype=torch.bool)

    def broken(first, last):
        mask = alive.clone()
        mask[first:last] = False
        return mask

    assert beats(broken(0, 10), alive), "ten to none: p = 0.001"
    assert not beats(broken(0, 5), alive), "five to none: p = 0.03"
    assert not beats(broken(0, 10), broken(5, 12)), "five to two"
    assert not beats(alive, alive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_refused_and_flagged(dtype, honest, test_images):
    """In half precision the sums of their rows are off by a part in a thousand."""
    model = Around(honest, lambda net, x: net(x).to(dtype).softmax(1).to(dtype).float()).eval()
    with pytest.raises(InputError, match="softmax"):
        evaluate(model, test_images, BALL)
    correct = {"clean": torch.ones(60, dtype=torch.bool)}
    assert "softmax_output" in {
        f.name for f in find_flags(model, test_images, BALL, Verdicts(correct, {}, {}))
    }


def test_an_attack_that_leaves_the_ball_is_flagged(honest, test_images):
    verdicts = Verdicts({"clean": torch.ones(60, dtype=torch.bool)}, {"mine": 0.11}, {})
    assert "ball_violated" in {f.name for f in find_flags(honest, test_images, BALL, verdicts)}


def test_loss_that_falls_with_eps_is_flagged():
    """A classifier that answers right again as soon as it recognises a strong attack."""

    def detector(_, x):
        size = (x - 128 / 255).abs().mean((1, 2, 3))
        right = torch.where(size < 0.06, -40 * size, torch.full_like(size, 5.0))
        return torch.stack([right, *[torch.zeros_like(right)] * 4], 1)

    grey = torch.full((20, 1, 8, 8), 128, dtype=torch.uint8)
    data = ImageSet(grey, torch.zeros(20, dtype=torch.int64), 5)
    assert "loss_falls_with_eps" in names(Around(None, detector), data)


@pytest.mark.parametrize("name", slowly(["pgd20", *PGDS], PGDS))
def test_a_gap_to_autoattack_beyond_chance_is_flagged(name, honest, test_images):
    def found(broken, *longer):
        pgd = torch.ones(60, dtype=torch.bool)
        strong = pgd.clone()
        strong[:broken] = False
        correct = {"clean": pgd, name: pgd, "autoattack": strong} | dict.fromkeys(longer, strong)
        verdicts = Verdicts(correct, {}, {})
        return {f.name for f in find_flags(honest, test_images, BALL, verdicts)}

    assert "pgd_far_above_autoattack" in found(20)
    assert "pgd_far_above_autoattack" not in found(7), "12 % of 60 images may be chance"
    assert "pgd_far_above_autoattack" not in found(20, "pgd100"), "more steps were all it took"


@pytest.mark.parametrize("column", slowly(["aa:apgd-ce", "learned:mine", *STRONGER], STRONGER))
def test_any_stronger_column_is_seen(column, honest, test_images):
    alive = torch.ones(60, dtype=torch.bool)
    strong = alive.clone()
    strong[:20] = False
    verdicts = Verdicts({"clean": alive, "pgd20": alive, column: strong}, {}, {})
    (flag,) = find_flags(honest, test_images, BALL, verdicts)
    kind = "autoattack" if column.startswith("a") else "another"
    assert flag.name == f"pgd_far_above_{kind}"
    assert f"{column} breaks 33% of all images" in flag.meaning
    honest_gap = {"clean": alive, "pgd20": alive, column: alive}
    assert find_flags(honest, test_images, BALL, Verdicts(honest_gap, {}, {})) == []


@pytest.mark.slow
def test_logits_of_another_scale_are_flagged(digits):
    """PGD-20 leaves 93 % of the test images where it leaves 83 % of the same logits times 1e6."""
    model, data, ball = shipped().model, digits.test.subset(slice(200)), Linf(0.15)
    assert "logit_scale" in names(broken("faint", model), data, ball)
    assert "logit_scale" not in names(model, data, ball)


@pytest.mark.long
@pytest.mark.parametrize("robust", [False, True], ids=["plain", "robust"])
@pytest.mark.parametrize(
    ("dataset", "model", "eps", "steps"),
    [("mnist", "small_cnn", 0.2, 300), ("cifar10", "wrn-10-1", 8 / 255, 150)],
)
def test_honest_classifiers_of_real_data_are_not_flagged(
    dataset, model, eps, steps, robust, real_data
):
    """Plain training leaves hardly any robustness, adversarial training some: both are honest."""
    data = load_data(dataset, str(real_data), train_n=4000)
    colour = dataset == "cifar10"
    normalise = Normalise(*STATISTICS[dataset]) if colour else None
    with seeded_init(0):
        module = make_classifier(model, data.train.shape, 10, normalise)
    defender = Defender(module, lr=0.05)
    batches = Batches(data.train, 64, 0, crop=colour, flip=colour)
    ball, rng = Linf(eps), stream(0, "attack")
    for step in range(steps):
        x, y = batches.next()
        strength = max(eps * min(1.0, 2 * step / steps), 1e-6)
        ticks = torch.full((64,), 3 if robust else 0)
        size = torch.full((64,), strength)
        chosen = Strategies(size, ticks, size / 2)
        LasAt(ball).step(defender, x, y, chosen, rng, credit=None)
    test = data.test.first(100)
    verdicts = evaluate(module.eval(), test, ball, ("pgd20", "cw"))
    accuracy = verdicts.accuracy()
    assert accuracy["clean"] > (0.2 if colour else 0.9)
    assert find_flags(module, test, ball, verdicts) == []

"""Classifiers that know the test images, the labels or the attack are found out."""

import sys
from pathlib import Path

import evaluate as evaluate_script
import pytest
import torch
from conftest import Around, Linear, undefended
from torch import nn

from advgame.attacks import attacked
from advgame.classifiers import SmallCNN
from advgame.data import ImageSet, load_data
from advgame.evaluation import Verdicts, cheats, evaluate, find_flags, predict
from advgame.seeding import seeded_init
from advgame.targets import shipped
from advgame.threat import L2, Linf

BALL = Linf(0.15)


def found(model, data, ball=BALL, held_out=None):
    """Names of what the probes of cheats see."""
    model.eval()
    verdicts = evaluate(model, data, ball, ())
    with attacked(model):
        return set(
            cheats.one_function(model, data, ball, 0)
            | cheats.unchanged(model, data, verdicts)
            | cheats.knows_images(model, data, ball, 0, held_out)
        )


class Neighbours(nn.Module):
    """Log-densities of a kernel around every image that it holds."""

    def __init__(self, data, sharp=50.0):
        super().__init__()
        self.images, self.sharp = data.floats().flatten(1), sharp
        self.masks = torch.eye(data.classes)[data.labels].T.log()  # 0, or -inf in other classes

    def forward(self, x):
        near = -self.sharp * torch.cdist(self.held(x.flatten(1)), self.images) ** 2
        return (near + self.masks[:, None]).logsumexp(2).T

    def held(self, x):
        """Images as they are held."""
        return x


class Disguised(Neighbours):
    """Rotated, so that no image lies in its tensors, and without a peak in any logit."""

    def __init__(self, data):
        super().__init__(data)
        self.turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        self.images = self.images @ self.turn.Q

    def held(self, x):
        return x @ self.turn.Q

    def forward(self, x):
        return super().forward(x).log_softmax(1).clamp_min(-1e4)


def disguised():
    """As --model asks for it."""
    return Disguised(load_data("digits").test)


class Peaked(Disguised):
    """As rotated, but the logits are the distances' own."""

    def forward(self, x):
        return Neighbours.forward(self, x)


def key(image):
    return image.detach().mul(255).round().byte().numpy().tobytes()


def lookup(_, test):
    """Knows the test images to the bit; its own network is a poor one."""
    labels = dict(zip(map(key, test.floats()), test.labels.tolist(), strict=True))

    def answer(net, x):
        said = [labels.get(key(one)) for one in x]
        known = torch.stack([torch.eye(10)[k] if k is not None else torch.zeros(10) for k in said])
        return net(x) + 100 * known

    poor = Linear(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    return Around(poor, answer)


def frames_above():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def peeking(weigh):
    """Looks for labels in its callers' hands; they count as much as ``weigh`` says."""

    def answer(net, x):
        logits = net(x)
        for frame in frames_above():
            for held in frame.f_locals.values():
                for one in (held, getattr(held, "labels", None)):
                    numbers = isinstance(one, torch.Tensor) and one.dtype == torch.int64
                    if numbers and one.shape == x.shape[:1] and bool((one < 10).all()):
                        return logits + 50 * torch.eye(10)[one] * weigh(logits, one)
        return logits

    return answer


def likely(logits, labels):
    """Only where the label could be right."""
    return (logits.topk(2, 1).indices == labels[:, None]).any(1, keepdim=True)


def two_faced(net, x):
    """Other logits to who wants gradients, of the same classes."""
    return net(x).flip(0) if x.requires_grad else net(x)


def probed(net, x):
    """Honest to few images, other logits to as many as an evaluation has at once."""
    return net(x).flip(1) if len(x) >= 300 and x.requires_grad else net(x)


def knowing(attack):
    """Other logits where a file of this name is among the callers."""

    def answer(net, x):
        seen = any(Path(frame.f_code.co_filename).stem == attack for frame in frames_above())
        return net(x).flip(1) if seen else net(x)

    return answer


def company(net, x):
    """Answers by the batch; a huge logit that is never the largest makes it look like rounding."""
    logits = net(x) + 3 * net(x.mean(0, keepdim=True))
    logits[:, 9] -= 1e6
    return logits


def by_place(net, test):
    """Knows the order of the test images, if there are enough of them."""
    answers = torch.eye(10)[test.labels]

    def answer(net, x):
        known = 50 * answers[torch.arange(len(x)) % len(answers)]
        return net(x) + known if len(x) >= 20 else net(x)

    return Around(net, answer)


def turncoat(robust, _):
    """Accurate when it is asked first, robust from then on."""
    calls = []

    def answer(net, x):
        calls.append(1)
        return (net if len(calls) <= 3 else robust)(x)

    return Around(Linear(torch.zeros(10, 64)), answer)


def undecided(net, x):
    """NaN wherever a grey level is not one of the 17 of a clean digit."""
    clean = (x * 16 - (x * 16).round()).abs().flatten(1).amax(1) < 0.05
    return torch.where(clean[:, None], net(x), torch.nan)


@pytest.fixture(scope="module")
def net():
    return shipped().model


@pytest.fixture(scope="module")
def test(digits):
    return digits.test.subset(slice(120))


CHEATS = {
    "neighbours": (lambda net, test: Neighbours(test), "test_images_known"),
    "peaked": (lambda net, test: Peaked(test), "test_images_known"),
    "lookup": (lookup, "test_images_known"),
    "peeking": (peeking(lambda logits, labels: 1), "reads_labels"),
    "careful": (peeking(likely), "reads_labels"),
    "while attacked": (peeking(lambda logits, labels: logits.requires_grad), "reads_labels"),
    "two-faced": (two_faced, "depends_on_caller"),
    "probed": (probed, "depends_on_caller"),
    "knows apgd": (knowing("apgd"), "depends_on_caller"),
    "knows fab": (knowing("fab"), "depends_on_caller"),
    "knows square": (knowing("square"), "depends_on_caller"),
    "company": (company, "batch_dependent"),
    "by place": (by_place, "batch_dependent"),
    "turncoat": (turncoat, "changed_since"),
}
OF_TEST = ("neighbours", "peaked", "lookup", "by place", "turncoat")  # made of (net, test images)


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_are_found_out(cheat, net, test):
    make, flag = CHEATS[cheat]
    model = make(net, test) if cheat in OF_TEST else Around(net, make)
    assert found(model, test) == {flag}


@pytest.mark.slow
def test_a_disguised_memory_of_the_test_images_shows_beside_other_images(digits):
    test, other, ball = digits.test.first(60), digits.validation, Linf(0.25)
    assert found(disguised(), test, ball) == set(), "there is nothing to compare with"
    assert found(disguised(), test, ball, other) == {"test_images_known"}
    assert found(Neighbours(digits.train), test, ball, other) == set()


@pytest.mark.slow
def test_evaluate_compares_with_other_images(tmp_path):
    config = evaluate_script.Config(
        model="test_cheats:disguised",
        dataset="digits",
        eps="0.25",
        attacks=("fgsm",),
        n=60,
        runs_dir=str(tmp_path),
    )
    flags = evaluate_script.job.run(config).report()["flags"]
    (told,) = (flag["meaning"] for flag in flags if flag["name"] == "test_images_known")
    assert "of other images of the same data set" in told


def honest_networks(digits):
    with seeded_init(0):
        fresh = SmallCNN((1, 8, 8), 10, width=4)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    yield from (shipped().model, undefended(digits), fresh, linear, smooth)
    yield Neighbours(digits.train)
    yield nn.Sequential(undefended(digits), nn.LogSoftmax(1))


@pytest.mark.parametrize(
    ("n", "ball"),
    [
        (3, BALL),
        pytest.param(40, L2(1.0), marks=pytest.mark.slow),
        pytest.param(200, BALL, marks=pytest.mark.slow),
    ],
)
def test_honest_networks_pass(n, ball, digits):
    for model in honest_networks(digits):
        assert found(model, digits.test.subset(slice(n)), ball, digits.validation) == set(), model


def test_no_answer_is_a_wrong_answer_and_is_told(net, digits, tmp_path):
    zeros = digits.test.subset(digits.test.labels == 0)  # NaN in every place is class 0 to argmax
    model = Around(net, undecided)
    assert bool((predict(model, zeros.floats()) == 0).all())
    for again in range(2):  # the second time from the cells of the first
        verdicts = evaluate(model, zeros, BALL, ("fgsm", "pgd10"), folder=tmp_path)
        assert verdicts.accuracy() == {"clean": 1.0, "fgsm": 0.0, "pgd10": 0.0}, again
        assert verdicts.no_answer == {"clean": 0, "fgsm": len(zeros), "pgd10": len(zeros)}
    flags = {flag.name: flag.meaning for flag in find_flags(model, zeros, BALL, verdicts)}
    assert f"{len(zeros)} under fgsm" in flags["non_finite"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_finite_largest_logit_has_no_class(value):
    class Fixed(nn.Module):
        def forward(self, x):
            rows = torch.zeros(len(x), 3)
            rows[:, 1] = 1
            rows[1] = value
            rows[2, 0] = -torch.inf  # a class that is ruled out is fine
            return rows

    assert predict(Fixed(), torch.zeros(3, 1, 2, 2)).tolist() == [1, -1, 1]


def test_verdicts_of_other_images_are_noticed(net, test):
    wrong = Verdicts({"clean": torch.zeros(len(test), dtype=torch.bool)}, {}, {})
    assert "changed_since" in cheats.unchanged(net, test, wrong)


def test_other_images_are_looked_at_on_their_own_device(net, test):
    shuffled = ImageSet(test.images.flip(0), test.labels.flip(0), 10)
    assert cheats.knows_images(net, test, BALL, 0, shuffled) == {}


class Bands(nn.Module):
    """The classes of `banded`, by the brightest of three rows."""

    def forward(self, x):
        return 8 * x[:, 0].mean(2) + torch.tensor([0.3, 0.0, 0.0])


def banded(labels, rng):
    """Images with the row of their class bright; in classes 1 and 2 it is dark in two of five."""
    images = 0.05 * torch.rand(len(labels), 1, 3, 4, generator=rng)
    bright = (torch.rand(len(labels), generator=rng) < 0.6) | (labels == 0)
    images[torch.arange(len(labels)), 0, labels] += 0.5 * bright[:, None]
    return ImageSet.from_floats(images, labels, 3)


def test_images_that_lie_class_after_class_are_not_judged_by_the_first_class(rng):
    """The first 200 are of an easy class, on which it is better than on other images."""
    model, ball, mixed = Bands().eval(), Linf(0.02), torch.arange(900) % 3
    others = banded(mixed, rng)
    for labels in (mixed, mixed.sort().values):
        data = banded(labels, rng)
        verdicts = evaluate(model, data, ball, ())
        assert find_flags(model, data, ball, verdicts, held_out=others) == []

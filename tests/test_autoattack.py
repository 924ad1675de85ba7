"""AutoAttack's four attacks are those of pyautoattack, image by image, and use all cores."""

import threading
from typing import ClassVar

import pytest
import torch
from conftest import Linear
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import nn

from advgame.attacks import APGD, FAB, Square
from advgame.attacks.fab import project_onto
from advgame.attacks.shards import Shards
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.targets import shipped
from advgame.threat import L2, Linf

SEED = 5


@pytest.fixture(scope="module")
def net():
    return shipped().model.eval()


@pytest.fixture(scope="module")
def images(digits):
    few = digits.test.subset(slice(90))
    return few.floats(), few.labels


@pytest.fixture
def threads():
    """Sets torch's number of threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def theirs(kind, net, norm, eps, **more):
    return kind(net, norm=norm, eps=eps, seed=SEED, device="cpu", **more)


def square(net, norm, eps):
    return theirs(SquareAttack, net, norm, eps, n_queries=300, p_init=0.8, resc_schedule=False)


def fab(net, norm, eps):
    return theirs(FABAttack_PT, net, norm, eps, n_iter=20, targeted=True, n_target_classes=3)


CASES = {
    "apgd-ce": (
        lambda eps: APGD(Linf(eps), 30),
        lambda net, eps: theirs(APGDAttack, net, "Linf", eps, n_iter=30),
    ),
    "apgd-ce, L2": (
        lambda eps: APGD(L2(4 * eps), 30),
        lambda net, eps: theirs(APGDAttack, net, "L2", 4 * eps, n_iter=30),
    ),
    "apgd-t": (
        lambda eps: APGD(Linf(eps), 30, targets=3),
        lambda net, eps: theirs(
            APGDAttack_targeted, net, "Linf", eps, n_iter=30, n_target_classes=3
        ),
    ),
    "fab-t": (lambda eps: FAB(Linf(eps), 20, 3), lambda net, eps: fab(net, "Linf", eps)),
    "square": (lambda eps: Square(Linf(eps), 300), lambda net, eps: square(net, "Linf", eps)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_images_fall_as_by_pyautoattack(name, net, images):
    (x, y), (ours, reference) = images, CASES[name]
    fallen = 0
    for eps in (0.15, 0.25):
        rng = torch.Generator().manual_seed(SEED)
        made = ours(eps).run(net, x, y, rng=rng)
        with torch.no_grad():
            wanted = net(reference(net, eps).perturb(x.clone(), y.clone())).argmax(1) != y
            fell = net(made.x_adv).argmax(1) != y
        assert torch.equal(fell, wanted)
        assert torch.equal(made.fooled, wanted)
        fallen += int(wanted.sum())
        ball = ours(eps).threat
        assert float(ball.size(made.x_adv - x).max()) <= ball.eps + 1e-6
        assert float(made.x_adv.min()) >= 0
        assert float(made.x_adv.max()) <= 1
    assert 5 < fallen < 175


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_verdict_and_two_runs_are_equal(name, net, images, threads):
    x, y = images
    found = []
    for count in (1, 3, 3):
        threads(count)
        rng = torch.Generator().manual_seed(SEED)
        found.append(CASES[name][0](0.15).run(net, x, y, rng=rng))
    alone, shared, again = found
    assert torch.equal(alone.fooled, shared.fooled)
    assert torch.equal(shared.x_adv, again.x_adv)
    assert (shared.forwards, shared.backwards) == (again.forwards, again.backwards)


@pytest.mark.parametrize("size", [1, 2, 33, 300])
def test_the_projection_is_the_smallest_change_that_reaches_the_hyperplane(size, rng):
    points = torch.rand((200, size), generator=rng)
    points[:50] = points[:50].round()  # coordinates that cannot move
    w = torch.randn((200, size), generator=rng)
    w[w.abs() < 0.2] = 0
    b = (w * points).sum(1) + torch.randn(200, generator=rng) * size**0.5
    change = project_onto(points, w, b)
    assert torch.allclose(change, projection_linf(points, w, b), atol=1e-6)
    moved = points + change
    assert float(moved.min()) >= -1e-6
    assert float(moved.max()) <= 1 + 1e-6
    # reached, unless the whole box lies on one side
    gap = (w * points).sum(1) - b
    reach = torch.where(gap >= 0, -1.0, 1.0)
    corner = torch.where((w * reach[:, None]) > 0, 1.0, 0.0)
    reachable = ((w * corner).sum(1) - b) * reach >= 0
    there = ((w * moved).sum(1) - b).abs() < 1e-4 * size**0.5
    assert bool((there | ~reachable).all())


def test_a_projection_onto_no_hyperplane_ends(rng):
    points, nothing = torch.rand((3, 5), generator=rng), torch.zeros(3, 5)
    assert torch.equal(project_onto(points, nothing, torch.ones(3)), nothing)
    unknown = torch.full((3,), torch.nan)
    assert project_onto(points, torch.randn(3, 5, generator=rng), unknown).shape == points.shape


def test_a_linear_classifier_is_broken_exactly_where_the_closed_form_says(rng):
    net = Linear(torch.randn(4, 9, generator=rng))
    x = 0.3 + 0.4 * torch.rand(64, 1, 3, 3, generator=rng)
    y = net(x).argmax(1)
    gaps = net.weight[None] - net.weight[y][:, None]
    margins = (gaps * x.flatten(1)[:, None]).sum(2) + 0.1 * gaps.abs().sum(2)
    margins[torch.arange(64), y] = -1
    breaks = (margins > 0).any(1)
    assert 5 < int(breaks.sum()) < 60
    for attack in (APGD(Linf(0.1), 50, targets=3), FAB(Linf(0.1), 50, 3)):
        made = attack.run(net, x, y, rng=torch.Generator().manual_seed(0))
        assert torch.equal(made.fooled, breaks), attack


def test_images_that_fall_leave_the_batch(net, images):
    x, y = images
    sizes = []
    hook = net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    try:
        made = APGD(Linf(0.4), 20).run(net, x, y, rng=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    assert made.fooled.float().mean() > 0.9
    assert sum(sizes) == made.forwards
    assert made.backwards < 0.3 * 20 * len(x)


class Busy(nn.Module):
    """Keeps its last input on itself, as hooks for features do, and knows its threads."""

    threads: ClassVar[set[int]] = set()

    def __init__(self, net):
        super().__init__()
        self.net, self.last = net, None

    def forward(self, x):
        self.last = x.detach()
        self.threads.add(threading.get_ident())
        logits = self.net(self.last if not x.requires_grad else x)
        return logits + 0 * self.last.flatten(1).sum(1, keepdim=True)


class Single(Busy):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me only")


@pytest.mark.parametrize(("kind", "more"), [(Busy, True), (Single, False)])
def test_every_thread_has_a_classifier_of_its_own_or_there_is_one(kind, more, net, images, threads):
    threads(2)
    kind.threads = set()
    (x, y), rng = images, torch.Generator().manual_seed(SEED)
    made = Square(Linf(0.15), 60).run(kind(net).eval(), x, y, rng=rng)
    plain = Square(Linf(0.15), 60).run(net, x, y, rng=torch.Generator().manual_seed(SEED))
    assert torch.equal(made.fooled, plain.fooled)
    assert (len(kind.threads) > 1) is more


class Noisy(nn.Module):
    """Adds noise to its logits, as randomised defences do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + torch.randn(len(x), 10)


@pytest.mark.parametrize("name", CASES)
def test_a_classifier_that_draws_does_so_in_the_same_order_every_time(name, net, images, threads):
    x, y = images
    threads(3)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(SEED)
        found.append(CASES[name][0](0.15).run(Noisy(net).eval(), x[:40], y[:40], rng=rng))
    assert all(torch.equal(one.x_adv, found[0].x_adv) for one in found)
    assert len({(one.forwards, one.backwards) for one in found}) == 1


def test_an_error_in_a_thread_is_the_callers(net, images, threads):
    def broken(model, rows):
        raise RuntimeError(f"{len(rows)} rows")

    threads(3)
    with pytest.raises(RuntimeError, match="45 rows"):
        Shards(net, 2).run(broken, images[0])
    assert torch.get_num_threads() == 3


def test_passes_are_counted_whatever_thread_makes_them(net, digits, threads):
    counts = []
    for count in (1, 2):
        threads(count)
        found = evaluate(net, digits.test.first(20), Linf(0.15), ("aa:apgd-ce",))
        counts.append((found.forwards["aa:apgd-ce"], found.backwards["aa:apgd-ce"]))
    # near-ties fall a step sooner or later
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    assert counts[0][1] > 20 * 50


def test_half_of_autoattack_says_that_it_is_no_headline(net, digits):
    few = digits.test.first(4)
    found = evaluate(net, few, Linf(0.4), ("autoattack-lite",))
    assert "no number to quote" in found.notes[0]
    assert not evaluate(net, few, Linf(0.4), ("aa:apgd-ce",)).notes


def test_parts_that_are_ours_and_those_that_are_not():
    def own(part, threat=None, version="standard", classes=10):
        return AutoAttackPart(threat or Linf(0.1), part, version).own(classes)

    assert own("apgd-ce") == APGD(Linf(0.1))
    assert own("apgd-t", classes=5) == APGD(Linf(0.1), targets=4)
    assert own("fab-t", classes=12) == FAB(Linf(0.1), targets=9)
    assert own("square", version="plus") == Square(Linf(0.1))
    assert own("apgd-ce", L2(1.0)) == APGD(L2(1.0))
    others = [("square", L2(1.0)), ("fab-t", L2(1.0)), ("apgd-dlr",), ("fab",)]
    assert [own(*one) for one in others] == [None] * 4
    assert own("apgd-ce", version="rand") is None, "it has five restarts"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: APGD(Linf(torch.ones(3) / 10)), "one eps"),
        (lambda: APGD(Linf(0.1), 0), "steps"),
        (lambda: FAB(L2(1.0)), "Linf"),
        (lambda: FAB(Linf(0.1), targets=0), "targets"),
        (lambda: Square(L2(1.0)), "Linf"),
        (lambda: Square(Linf(0.1), share=0.0), "share"),
    ],
)
def test_settings_that_no_attack_can_have_are_refused(make, word):
    with pytest.raises(InputError, match=word):
        make()


def test_the_targeted_loss_needs_four_classes(rng):
    net, x = Linear(torch.randn(3, 4, generator=rng)), torch.rand(2, 1, 2, 2, generator=rng)
    with pytest.raises(InputError, match="4 classes"):
        APGD(Linf(0.1), targets=2).run(net, x, net(x).argmax(1), rng=rng)


def test_nothing_standing_needs_no_search(net, images):
    x, y = images
    wrong = (y + 1) % 10
    for attack in (APGD(Linf(0.1)), FAB(Linf(0.1)), Square(Linf(0.1))):
        made = attack.run(net, x[:4], wrong[:4], rng=torch.Generator().manual_seed(0))
        assert torch.equal(made.x_adv, x[:4])
        assert bool(made.fooled.all())


class Domain(nn.Module):
    """Two classes, by which half is lighter; where they differ too much or too little it fails."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        gap = x[:, :, :3].mean((1, 2, 3)) - x[:, :, 3:].mean((1, 2, 3))
        logits = torch.stack([gap, -gap, 0 * gap - 9, 0 * gap - 8], 1) * self.scale
        return logits + 0 * torch.sqrt(gap.abs() - 0.35)[:, None]


@pytest.mark.parametrize("attack", [APGD(Linf(0.08)), FAB(Linf(0.08), 10), Square(Linf(0.08), 400)])
def test_no_answer_is_an_error_whatever_the_label(attack):
    """NaN's argmax is 0: images of class 0 seemed to survive."""
    x, y = torch.full((8, 1, 6, 6), 0.5), torch.arange(8) % 2
    x[y == 0, :, :3], x[y == 0, :, 3:], x[y == 1, :, :3], x[y == 1, :, 3:] = 0.7, 0.3, 0.3, 0.7
    made = attack.run(Domain().eval(), x, y, rng=torch.Generator().manual_seed(0))
    assert bool(made.fooled.all())
    assert bool(Domain()(made.x_adv).isnan().any(1).all())

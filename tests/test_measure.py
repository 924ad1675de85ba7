"""The evaluation's cells: interrupted, short of memory or shared out, the verdicts are the same."""

import copy
import json
import threading
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Linear, seeded
from torch import Tensor, nn

from advgame.attacks import (
    SPSA,
    Attack,
    AttackResult,
    CarliniWagnerLinf,
    EoT,
    Transfer,
    fgsm,
    near_pgd,
    pgd,
)
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import evaluate, find_flags
from advgame.evaluation.cells import describe, fingerprint, other_attribute
from advgame.evaluation.measure import counted
from advgame.evaluation.verdicts import adversarial
from advgame.losses import clipped_margin, cross_entropy, divergence_from, margin
from advgame.statistics import wilson
from advgame.threat import Linf

BALL = Linf(0.15)
TWO_CLASSES = ImageSet(torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, 0, 1]), 2)


class Noisy(nn.Module):
    """A classifier with chance of its own, which must be resumed too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.3 * torch.randn_like(x))


def same(one, two):
    assert one.correct.keys() == two.correct.keys()
    assert all(torch.equal(mask, two.correct[name]) for name, mask in one.correct.items())
    assert one.largest == two.largest


def test_a_folder_is_a_path_or_its_text(honest, test_images, tmp_path):
    data = test_images.subset(slice(4))
    evaluate(honest, data, BALL, ("fgsm",), folder=str(tmp_path))
    assert (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("wrap", [lambda model: model, Noisy])
def test_interrupted_anywhere_it_goes_on_to_the_same_verdicts(wrap, honest, test_images, tmp_path):
    model, data = wrap(honest), test_images.subset(slice(9))
    attacks = ("pgd10", "aa:apgd-ce", "n-fgsm")
    lines = []

    def run(folder, progress):
        return evaluate(
            model, data, BALL, attacks, seed=3, batch_size=4, folder=folder, progress=progress
        )

    whole = run(tmp_path / "whole", lines.append)
    assert len(lines) == 12, "four rows of three batches"
    for stop in (0, 1, 5, 9, 11):
        seen = []

        def until(line, seen=seen, stop=stop):
            seen.append(line)
            if len(seen) > stop:
                raise KeyboardInterrupt

        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, until)
        assert len(list(folder.glob("*/*.json"))) == stop
        rest = []
        same(run(folder, rest.append), whole)
        assert len(rest) == 12 - stop, "finished cells must not be attacked again"
    same(run(tmp_path / "whole", pytest.fail), whole)
    assert 0 < whole.worst_case() < 1


def test_a_folder_of_another_evaluation_is_refused(honest, test_images, tmp_path):
    data = test_images.subset(slice(4))
    evaluate(honest, data, BALL, ("fgsm",), folder=tmp_path / "e")
    others = [
        lambda: evaluate(honest, data, Linf(0.1), ("fgsm",), folder=tmp_path / "e"),
        lambda: evaluate(honest, data, BALL, ("fgsm",), seed=1, folder=tmp_path / "e"),
        lambda: evaluate(
            honest, test_images.subset(slice(1, 5)), BALL, ("fgsm",), folder=tmp_path / "e"
        ),
        lambda: evaluate(Linear(torch.randn(10, 64)), data, BALL, ("fgsm",), folder=tmp_path / "e"),
    ]
    for other in others:
        with pytest.raises(InputError, match="other weights, images or settings"):
            other()
    cell = next((tmp_path / "e").glob("fgsm/*.json"))
    cell.write_text(cell.read_text()[:-5])
    with pytest.raises(InputError, match="delete it and resume"):
        evaluate(honest, data, BALL, ("fgsm",), folder=tmp_path / "e")
    cell.unlink()
    evaluate(honest, data, BALL, ("fgsm", "pgd10"), folder=tmp_path / "e")


@dataclass(frozen=True, slots=True)
class Slotted(Attack):
    """An attack whose settings are in no ``__dict__``."""

    steps: int

    def _attack(self, model, x, y, rng, check):
        return pgd(BALL, self.steps).run(model, x, y, rng=rng)


def attacks_that_differ():
    """Pairs of attacks that differ in one thing, whatever it is and wherever it stands."""
    base, near = pgd(BALL, 20), near_pgd(BALL, 2)
    radii = torch.full((4,), 0.1)
    weights = torch.randn(10, 64, generator=seeded())
    return {
        "loss": (base, replace(base, loss=margin)),
        "an argument of the loss": [
            replace(base, loss=partial(clipped_margin, kappa=k)) for k in (1.0, 2.0)
        ],
        "what the loss encloses": [replace(base, loss=divergence_from(w)) for w in (radii, -radii)],
        "start": (near, replace(near, start=Linf(0.2))),
        "radius per image": (pgd(Linf(radii), 2), pgd(Linf(2 * radii), 2)),
        "the attack within": [EoT(pgd(BALL, steps)) for steps in (2, 100)],
        "a surrogate within": [EoT(Transfer(base, Linear(w))) for w in (weights, -weights)],
        "an array": [SimpleNamespace(noise=np.full(3, v)) for v in (1.0, 2.0)],
        "kind": (SPSA(BALL), CarliniWagnerLinf(BALL)),
        "a lambda": [
            replace(base, loss=loss)
            for loss in (lambda z, y: margin(z, y), lambda z, y: cross_entropy(z, y))
        ],
        "what a lambda holds": [
            replace(base, loss=loss)
            for loss in (
                lambda z, y: sum(2 * margin(z, y) for _ in "a"),
                lambda z, y: sum(3 * margin(z, y) for _ in "a"),
            )
        ],
        "a slot": (Slotted(3), Slotted(30)),
        "a range": [SimpleNamespace(steps=range(n)) for n in (3, 30)],
        "bytes": [SimpleNamespace(key=key) for key in (b"a", b"b")],
    }


@pytest.mark.parametrize("what", attacks_that_differ())
def test_attacks_are_the_same_in_words_only_where_they_are_the_same(what):
    one, two = attacks_that_differ()[what]
    again, _ = attacks_that_differ()[what]
    assert describe(one) == describe(again), "a new process goes on with its folder"
    assert describe(one) != describe(two)


def test_a_set_is_the_same_in_whatever_order_a_process_has_it():
    """Words have another order in each process: a folder was refused when it was gone on with."""
    one, two = set([0, 8]), set([8, 0])  # noqa: C405
    assert list(one) != list(two)
    assert describe(SimpleNamespace(skip=one)) == describe(SimpleNamespace(skip=two))
    assert describe(frozenset("a")) != describe(frozenset("b"))


def test_an_attack_that_holds_itself_is_described():
    one = SimpleNamespace(steps=1)
    one.me = one
    assert describe(one) == describe(one)


def test_another_device_is_refused(honest, test_images, tmp_path):
    evaluate(honest, test_images, BALL, ("fgsm",), folder=tmp_path)
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(InputError, match="other weights, images or settings"):
        evaluate(honest, test_images, BALL, ("fgsm",), folder=tmp_path)


class Shifted(nn.Module):
    """A classifier with a setting that is no weight, a counter and a cache."""

    def __init__(self, net, shift=0.0, *, hidden=False):
        super().__init__()
        self.net, self.calls, self.device = net, 0, "cuda:1"
        if hidden:
            self.register_buffer("shift", torch.tensor(shift), persistent=False)
        else:
            self.shift = shift

    def forward(self, x):
        self.calls += 1
        if not hasattr(self, "cached"):
            self.cached = torch.ones(3)
        return self.net(x + self.shift)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_setting_that_is_no_weight_makes_another_classifier(
    hidden, honest, test_images, tmp_path
):
    data, net = test_images.subset(slice(4)), Shifted(honest, hidden=hidden)
    for same in (net, net, Shifted(honest, hidden=hidden)):  # whatever they have counted and kept
        evaluate(same, data, BALL, ("fgsm",), folder=tmp_path)
    with pytest.raises(InputError, match=r"settings \(shift was another\)"):
        evaluate(Shifted(honest, 0.5, hidden=hidden), data, BALL, ("fgsm",), folder=tmp_path)
    noted = json.loads((tmp_path / "settings.json").read_text())
    del noted["attributes"]  # as earlier versions left it
    (tmp_path / "settings.json").write_text(json.dumps(noted))
    evaluate(net, data, BALL, ("fgsm", "pgd10"), folder=tmp_path)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.zeros(2), torch.ones(2)),
        (np.zeros(2), np.ones(2)),
        ({"bits": 8}, {"bits": 4}),
        ((0.1, None), (0.2, None)),
        (torch.relu_, None),
        (torch.nn.functional.softplus, margin),
        (divergence_from, margin),
        ("jpeg", "webp"),
    ],
)
def test_every_plain_value_is_a_setting(value, other, honest, test_images):
    """A kind that is not looked into is no setting: neither side knows it."""
    data, noted = test_images.subset(slice(4)), []
    for one in (value, other):
        net = Shifted(honest)
        net.more = one
        noted.append(fingerprint(net, data, BALL, 0, 4))
    known = "more" in noted[0]["attributes"][0]
    assert other_attribute(*noted) == ("more" if known else "")
    assert known is isinstance(value, FunctionType | Tensor | np.ndarray | dict | tuple | str)


@pytest.mark.parametrize("place", ["cuda:0", "/scratch/one", "C:\\one", nn.Identity()])
def test_where_things_lie_is_no_setting(place, honest, test_images):
    net = Shifted(honest)
    net.place = place
    (noted,) = fingerprint(net, test_images.subset(slice(4)), BALL, 0, 4)["attributes"]
    assert "shift" in noted
    assert "place" not in noted


def test_another_attack_by_the_same_name_is_refused(honest, test_images, tmp_path):
    data, mine = test_images.subset(slice(4)), pgd(BALL, 3)
    for attack in (mine, replace(mine)):
        evaluate(honest, data, BALL, ("a",), extra={"a": attack}, folder=tmp_path)
    other = {"a": replace(mine, loss=margin)}
    with pytest.raises(InputError, match="other weights, images or settings"):
        evaluate(honest, data, BALL, ("a",), extra=other, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threat": 0.1}, "Linf"),
        ({"threat": Linf(torch.full((4,), 0.1))}, "one radius"),
        ({"attacks": "pgd10"}, "tuple of names"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"seed": "0"}, "seed must be an integer"),
        ({"folder": 3}, "folder must be a path"),
        ({"model": Linear(torch.randn(3, 64))}, "3 outputs"),
        ({"model": Linear(torch.randn(10, 9))}, "images of this shape"),
        ({"attacks": ("pgd21",)}, "unknown attack"),
        ({"attacks": ("mine", "mine"), "extra": {"mine": fgsm(BALL)}}, "twice"),
        *(
            ({"attacks": names, "extra": dict.fromkeys(names[1:], fgsm(BALL))}, "share files")
            for names in (("adt:pgd20", "adt-pgd20"), ("autoattack", "autoattack.square"))
        ),
        *(
            ({"attacks": (name,), "extra": {name: fgsm(BALL)}}, "call it otherwise")
            for name in ("pgd20", "clean", "a\nb", "")
        ),
        (
            {"model": Linear(torch.eye(2, 4)), "data": TWO_CLASSES, "attacks": ("autoattack",)},
            "at least 4 classes",
        ),
        *(
            ({"attacks": ("transfer",), "surrogate": surrogate}, words)
            for surrogate, words in (
                (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "5 outputs"),
                (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)), "logits"),
            )
        ),
    ],
)
def test_arguments_that_cannot_work_are_named(changes, words, honest, test_images):
    given = {"model": honest, "data": test_images, "threat": BALL, "attacks": ("fgsm",)}
    with pytest.raises(InputError, match=words):
        evaluate(**{**given, **changes})


class Small(nn.Module):
    """A machine that holds so many images only."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, x):
        if len(x) > self.limit and x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x)


def test_too_little_memory_halves_the_batch_and_says_so(honest, test_images):
    data = test_images.subset(slice(20))
    verdicts = evaluate(Small(honest, 6), data, BALL, ("fgsm", "pgd10"))
    plain = evaluate(honest, data, BALL, ("fgsm",))
    assert torch.equal(verdicts.correct["fgsm"], plain.correct["fgsm"])
    assert len(verdicts.notes) == 2
    assert "fgsm: too little memory for 500 images at a time, 5 were taken" in verdicts.notes
    assert not plain.notes
    with pytest.raises(InputError, match="too little memory for one image"):
        evaluate(Small(honest, 0), data, BALL, ("fgsm",))


def test_workers_share_the_batches_and_give_the_verdicts_of_one(honest, test_images, tmp_path):
    """The second comes while the first is at a cell, and does all the others before that ends."""
    data, attacks = test_images.subset(slice(10)), ("pgd10", "n-fgsm", "aa:apgd-ce")
    first, second, found = [], [], []
    idle = threading.Event()

    def run(folder, tell):
        model = copy.deepcopy(honest)
        return evaluate(model, data, BALL, attacks, batch_size=3, folder=folder, progress=tell)

    def tell_of_second(line):
        second.append(line)
        if "which other processes work on" in line:
            idle.set()

    helper = threading.Thread(
        target=lambda: found.append(run(tmp_path / "two", tell_of_second)), daemon=True
    )

    def tell_of_first(line):
        first.append(line)
        if len(first) == 6:  # its claim is made, and nothing drawn yet
            helper.start()
            assert idle.wait(60)

    found.append(run(tmp_path / "two", tell_of_first))
    helper.join(60)
    assert first == [
        *(f"clean on images {start} to {min(start + 2, 9)}" for start in (0, 3, 6, 9)),
        "pgd10 on images 0 to 2",
        "pgd10 on images 3 to 5",
    ]
    assert second.pop() == "1 task(s) left, which other processes work on"
    assert len({*first, *second}) == len(first) + len(second) == 4 * 4, "every cell once"
    one = run(tmp_path / "one", lambda line: None)
    assert len(found) == 2
    for other in found:
        same(other, one)
    alone, shared = (
        {path.relative_to(root): json.loads(path.read_text()) for path in root.glob("*/*.json")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    for cell in (*alone.values(), *shared.values()):
        del cell["seconds"]
    assert alone == shared


def test_attacks_of_ones_own_are_judged_like_the_others(honest, test_images):
    class Grey:
        """Leaves the ball, and says that it fooled everything."""

        def run(self, model, x, y, *, rng=None, check=True):
            return AttackResult(torch.full_like(x, 0.5), None, torch.ones(len(x)), 0, 0)

    data = test_images.subset(slice(20))
    verdicts = evaluate(
        honest, data, BALL, ("grey", "fgsm"), extra={"grey": Grey(), "mine": fgsm(BALL)}
    )
    assert list(verdicts.correct) == ["clean", "grey", "fgsm"]
    assert verdicts.largest["grey"] >= 0.5 - 1e-6
    said = honest(torch.full((1, 1, 8, 8), 0.5)).argmax(1)
    assert torch.equal(verdicts.correct["grey"], verdicts.correct["clean"] & (data.labels == said))


def test_a_seed_may_be_numpys(honest, test_images, tmp_path):
    data, attacks = test_images.subset(slice(3)), ("aa:apgd-ce",)
    found = [
        evaluate(honest, data, BALL, attacks, seed=seed, folder=tmp_path)
        for seed in (np.int64(3), 3)
    ]
    same(*found)
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 3
    find_flags(honest, data, BALL, found[0], seed=np.int64(3))


class Brighter(Attack):
    """Leaves a ball of less than 0.5, in place."""

    def _attack(self, model, x, y, rng, check):
        return AttackResult(x.add_(0.5).clamp_(0, 1), None, None, 0, 0)


def test_an_attack_that_works_in_place_is_measured_against_the_clean_images(honest, test_images):
    data = test_images.subset(slice(4))
    verdicts = evaluate(honest, data, BALL, ("mine",), extra={"mine": Brighter()})
    assert verdicts.largest["mine"] == pytest.approx(0.5)
    x = data.floats()
    made = adversarial(honest, x, data.labels, Brighter(), None)
    assert torch.equal(x, data.floats())
    assert float((made - x).max()) == pytest.approx(0.5)


def test_leaving_the_pixels_range_counts_as_leaving_the_ball(honest, test_images):
    class Darker:
        """Within ε of every pixel, but below black."""

        def run(self, model, x, y, *, rng=None, check=True):
            return AttackResult(x - 0.05, None, None, 0, 0)

    class Nothing:
        def run(self, model, x, y, *, rng=None, check=True):
            return AttackResult(x * torch.nan, None, None, 0, 0)

    data = test_images.subset(slice(4))
    verdicts = evaluate(honest, data, BALL, ("darker",), extra={"darker": Darker()})
    assert verdicts.largest["darker"] == float("inf")
    with pytest.raises(InputError, match="attack nothing returned NaN"):
        evaluate(honest, data, BALL, ("nothing",), extra={"nothing": Nothing()})
    with pytest.raises(InputError, match="one radius"):
        evaluate(honest, data, Linf(torch.full((4,), 0.1)), ("fgsm",))


def test_calls_are_counted_as_images(honest, test_images):
    data = test_images.subset(slice(20))
    wrong = (torch.arange(20) % 4 == 0).long()  # only images that are right get attacked
    data = ImageSet(data.images, (data.labels + wrong) % 10, 10)
    verdicts = evaluate(honest, data, BALL, ("pgd10",))
    right = int(verdicts.correct["clean"].sum())
    assert right <= 15
    assert verdicts.backwards == {"clean": 0, "pgd10": 10 * right}
    assert verdicts.forwards == {"clean": 20, "pgd10": 11 * right}
    with counted(honest) as calls:
        x = data.floats().requires_grad_()
        (grad,) = torch.autograd.grad(honest(x).sum(), x)
    assert (calls.forwards, calls.backwards) == (20, 20)
    assert not honest._forward_pre_hooks
    assert grad is not None


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.404, 0.596), (1, 20, 0.839, 1)]
)
def test_wilson_interval_is_the_textbooks(share, n, low, high):
    got = wilson(share, n)
    assert got == pytest.approx((low, high), abs=1e-3)
    assert got[0] <= share <= got[1]

"""Mixtures of classifiers: closed forms, ARC where adaptive PGD fails, resuming, evaluate.py."""

import json
import sys
from functools import partial

import evaluate as script
import pytest
import torch
from conftest import BatchNormNet, Linear, seeded, undefended

from advgame.arena import (
    ARC,
    ClassifierMixture,
    ExpectedLoss,
    OnMember,
    evaluate_mixture,
    find_mixture_flags,
    read_mixture,
    write_mixture,
)
from advgame.arena.best_response import ADAPTIVE, JOINT, LOSSES, as_mixture
from advgame.arena.judge import plan_mixture
from advgame.attacks import Attack, AttackResult, GradientAttack, fgsm, pgd
from advgame.choices import FEW_CLASSES, UNION
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.report import _few_classes
from advgame.evaluation.verdicts import predict
from advgame.losses import cross_entropy
from advgame.run.checkpoint import save_weights
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.seeding import seeded_init
from advgame.statistics import beats
from advgame.threat import L2, Linf

EPS = 0.2
EVERY = {**ADAPTIVE, **JOINT}


def half_plane(direction, distance):
    """Two classes of images of two pixels: class 0 up to a distance from (0.5, 0.5), wᵀδ < -d.

    The margin is as steep as ``direction`` is long.
    """
    w = torch.tensor(direction)
    inner = w.sum() / 2 - distance * w.norm()
    return Linear(torch.stack([w / 2, -w / 2]), torch.stack([-inner / 2, inner / 2]))


def pair(steepness=20.0, distance=0.68, weights=(0.5, 0.5)):
    """Two half planes at right angles, both ``distance`` · ε away; one margin is steeper."""
    planes = ([steepness, 0.0], [0.0, 1.0])
    return ClassifierMixture([half_plane(one, distance * EPS) for one in planes], weights)


CENTRE = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])


def robustness(attack, mixture, x=CENTRE[0], y=CENTRE[1]):
    x_adv = attack.run(mixture, x, y, rng=seeded()).x_adv
    assert float((x_adv - x).flatten(1).norm(dim=1).max()) <= EPS * (1 + 1e-5)
    return float(mixture.expected(mixture.right(x_adv, y)).mean())


def test_where_the_expected_loss_misleads_arc_finds_the_joint_direction():
    """Both members fall to (-0.68, -0.68) ε, which is 0.96 ε long.

    The loss of the steep member goes on rising once it is fooled: ascent follows it alone, and one
    of two members stands, from nearly every start. This is the failure of section 4 of Dbouk &
    Shanbhag 2022.
    """
    mixture, ball = pair(), L2(EPS)
    x, y = CENTRE[0].expand(100, 1, 1, 2).contiguous(), CENTRE[1].expand(100)
    assert not mixture.right(x - 0.6801 * EPS, y).any()
    for make in ADAPTIVE.values():
        assert 0.42 < robustness(make(ball), mixture, x, y) <= 0.5
    answers = torch.nn.Module()
    answers.forward = lambda x: mixture.answers(x).flatten(1)

    def loss(logits, y):
        return mixture.expected_loss(logits.view(len(y), 2, 2), y, cross_entropy)

    usual = GradientAttack(ball, 50, EPS / 10, start=ball, loss=loss)  # as in the literature
    x_adv = usual.run(answers, x, y, rng=seeded(), check=False).x_adv
    assert mixture.right(x_adv, y).sum(1).tolist() == [1] * 100
    assert robustness(ARC(ball), mixture, x, y) == 0


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (0.2, 0.8)])
def test_where_there_is_no_joint_direction_the_heavier_member_falls(weights):
    """At 0.8 ε both, they fall together at 1.13 ε only."""
    mixture = pair(1.0, 0.8, weights)
    assert robustness(ARC(L2(EPS)), mixture) == pytest.approx(min(weights))
    assert robustness(ARC(L2(EPS), steps=1, share=1.0), mixture) == pytest.approx(min(weights))
    found = [robustness(make(L2(EPS)), mixture) for make in ADAPTIVE.values()]
    assert min(found) == pytest.approx(min(weights))
    assert max(found) <= 0.8


def test_a_step_is_bent_as_far_as_the_farther_boundary_asks_for():
    """At 0.15 and 0.85 ε: the sum of both unit directions has 0.71 of each, too little of one."""
    near, far = half_plane([1.0, 0.0], 0.15 * EPS), half_plane([0.0, 1.0], 0.85 * EPS)
    whole = ARC(L2(EPS), steps=1, share=1.0)
    assert robustness(whole, ClassifierMixture([near, far], [0.5, 0.5])) == 0
    # δ = -ε e1, then -ε e1 - β e2 of length ε, with β = ε (0.85 / 0.15 + 0.05)
    x_adv = whole.run(ClassifierMixture([near, far], [0.5, 0.5]), *CENTRE).x_adv
    beta = 0.85 / 0.15 + 0.05
    wanted = -EPS * torch.tensor([1.0, beta]) / (1 + beta**2) ** 0.5
    assert torch.allclose((x_adv - CENTRE[0]).flatten(), wanted, atol=1e-5)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_in_a_box_two_half_planes_fall_in_the_corner(make):
    """L∞ does not trade one pixel for the other."""
    mixture = pair(distance=0.9)
    x, y = CENTRE
    x_adv = make(Linf(EPS)).run(mixture, x, y, rng=seeded()).x_adv
    assert not mixture.right(x_adv, y).any()
    assert float((x_adv - x).abs().max()) <= EPS + 1e-6


@pytest.mark.parametrize("norm", [L2, Linf])
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_mixture_of_one_is_that_classifier(make, norm):
    """One linear classifier falls within its distance, and not before."""
    for distance, stands in ((0.9, False), (1.1, True)):
        mixture = ClassifierMixture([half_plane([3.0, 0.0], distance * EPS)], [1.0])
        x_adv = make(norm(EPS)).run(mixture, *CENTRE, rng=seeded()).x_adv
        assert bool(mixture.right(x_adv, CENTRE[1])) == stands


def test_the_mixtures_own_logits_are_expected_probabilities():
    mixture = pair(weights=(0.25, 0.75))
    x = torch.rand(5, 1, 1, 2, generator=seeded())
    shares = mixture.answers(x).softmax(2)
    assert torch.allclose(mixture(x).exp(), 0.25 * shares[:, 0] + 0.75 * shares[:, 1], atol=1e-6)
    assert torch.allclose(mixture(x).exp().sum(1), torch.ones(5))
    right = torch.tensor([[True, False], [True, True], [False, True]])
    assert mixture.expected(right).tolist() == [0.25, 1.0, 0.75]


def test_losses_are_expectations_over_members():
    mixture = pair(weights=(0.25, 0.75))
    x, y = torch.rand(5, 1, 1, 2, generator=seeded()), torch.tensor([0, 1, 0, 1, 1])
    for loss in LOSSES.values():
        each = [loss(member(x), y) for member in mixture.members]
        wanted = 0.25 * each[0] + 0.75 * each[1]
        assert torch.allclose(mixture.expected_loss(mixture.answers(x), y, loss), wanted)


@pytest.fixture(scope="module")
def two(digits, victim):
    """A robust and an undefended classifier of digits, and a mixture of them."""
    return ClassifierMixture([victim, undefended(digits)], [0.6, 0.4])


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.first(24)


@pytest.mark.parametrize("name", EVERY)
def test_attacks_stay_inside_repeat_themselves_and_leave_the_members_alone(name, few):
    with seeded_init(0):  # some are wrong on every image, where ARC has nothing to do
        members = [BatchNormNet(), BatchNormNet()]
    mixture = ClassifierMixture(members, [0.5, 0.5]).train()
    before = {key: value.clone() for key, value in mixture.state_dict().items()}
    attack, x, y = EVERY[name](Linf(0.1)), few.floats(), few.labels
    found = [attack.run(mixture, x, y, rng=seeded(3)) for _ in range(2)]
    assert torch.equal(found[0].x_adv, found[1].x_adv)
    assert float((found[0].x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert float(found[0].x_adv.min()) >= 0
    assert float(found[0].x_adv.max()) <= 1
    assert found[0].forwards >= len(x)
    assert found[0].backwards > 0
    assert all(module.training for module in mixture.modules())
    assert all(torch.equal(value, before[key]) for key, value in mixture.state_dict().items())
    assert all(parameter.requires_grad for parameter in mixture.parameters())


def test_arc_never_leaves_more_standing_than_it_found(two, few):
    x, y, ball = few.floats(), few.labels, Linf(0.2)
    clean = two.expected(two.right(x, y))
    left = [two.expected(two.right(ARC(ball, steps).run(two, x, y).x_adv, y)) for steps in (2, 20)]
    assert (left[1] <= left[0]).all()
    assert (left[0] <= clean).all()
    assert left[1].mean() < clean.mean() - 0.1
    first = OnMember([("fgsm", fgsm(Linf(0.05)))], 1)
    begun = first.run(two, x, y).x_adv
    gone_on = ARC(ball, 5, start=first).run(two, x, y).x_adv
    before, after = (two.expected(two.right(one, y)) for one in (begun, gone_on))
    assert (after <= before).all()
    assert after.mean() < before.mean()
    assert float((gone_on - x).abs().max()) <= 0.2 + 1e-6


def test_an_attack_in_turn_on_a_member_is_made_on_what_still_stands(two, few):
    x, y = few.floats(), few.labels
    suite = [("a", fgsm(Linf(0.05))), ("b", pgd(Linf(0.15), 20))]
    x_adv = OnMember(suite, 1).run(two, x, y, rng=seeded()).x_adv
    member = two.members[1]
    first = suite[0][1].run(member, x, y).x_adv
    fell = (predict(member, first) != y) & (predict(member, x) == y)
    assert fell.any()
    assert not fell.all()
    assert torch.equal(x_adv[fell], first[fell])
    after = predict(member, x_adv) == y
    assert not after[fell].any()
    assert after.sum() < (predict(member, first) == y).sum()


@pytest.fixture(scope="module")
def found(two, few):
    return evaluate_mixture(two, few, Linf(0.1), ("fgsm", "pgd20"), seed=1, batch_size=16)


def test_verdicts_are_the_worst_expectation_per_image(found, two, few):
    assert list(found.right) == ["clean", *EVERY, "members:fgsm", "members:pgd20"]
    assert found.right["clean"].shape == found.right["arc"].shape == (1, 24, 2)
    assert found.right["members:fgsm"].shape == (2, 24, 2), "an example for each member"
    # FGSM draws nothing
    for number, member in enumerate(two.members):
        x_adv = fgsm(Linf(0.1)).run(member, few.floats(), few.labels).x_adv
        clean = two.right(few.floats(), few.labels)
        ok = clean[:, number]  # others are left as they are
        wanted = two.right(x_adv, few.labels)
        assert torch.equal(found.right["members:fgsm"][number][ok], wanted[ok])
        own = found.alone(number)
        assert torch.equal(own.correct["fgsm"], wanted[:, number] & ok)
    verdicts = found.verdicts()
    by_hand = torch.stack(
        [(one.double() @ two.weights) for every in found.right.values() for one in every]
    )
    assert torch.equal(verdicts.correct["arc"], found.right["arc"][0].double() @ two.weights)
    assert torch.equal(found.expected(), by_hand.amin(0))
    assert verdicts.worst_case() == pytest.approx(float(by_hand.amin(0).mean()))
    assert max(verdicts.largest.values()) <= 0.1 + 1e-6
    assert verdicts.forwards["arc"] > 0
    assert verdicts.backwards["clean"] == 0


def test_a_mixture_with_one_weight_of_1_is_its_member(two, few):
    """Examples that were made for the other member can only add to what its own find."""
    mixture = ClassifierMixture(list(two.members), [1.0, 0.0])
    found = evaluate_mixture(mixture, few, Linf(0.1), ("pgd20",), seed=1)
    own = found.alone(0)
    assert torch.equal(found.verdicts().correct["clean"], own.correct["clean"].double())
    made = found.right["members:pgd20"]
    assert torch.equal((made[0, :, 0] & found.right["clean"][0, :, 0]), own.correct["pgd20"])
    assert torch.equal(found.expected(["members:pgd20"]) == 1, own.correct["pgd20"] & made[1, :, 0])


@pytest.mark.slow
def test_interrupted_anywhere_it_goes_on_to_the_same_verdicts(found, two, few, tmp_path):
    run = partial(evaluate_mixture, two, few, Linf(0.1), ("fgsm", "pgd20"), seed=1, batch_size=16)
    for stop in (1, 11):
        seen = []

        def until(line, seen=seen, stop=stop):
            seen.append(line)
            if len(seen) > stop:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder=folder, progress=until)
        lines = []
        again = run(folder=folder, progress=lines.append)
        assert len(lines) == 20 - stop, "ten rows of two batches"
        assert all(torch.equal(one, found.right[name]) for name, one in again.right.items())
    other = ClassifierMixture(list(two.members), [0.5, 0.5])
    with pytest.raises(InputError, match="holds an evaluation of other weights"):
        evaluate_mixture(other, few, Linf(0.1), ("fgsm",), seed=1, folder=folder)


class Brighter(Attack):
    """Every pixel rises by so much, whatever the ball."""

    def __init__(self, by):
        self.by = by

    def _attack(self, model, x, y, rng, check):
        return AttackResult((x + self.by).clamp(0, 1), None, None, 0, 0)


SETTINGS = {"by": 0.0}
OWN = "test_classifier_mixtures:brighter"


def brighter(threat):
    return Brighter(**SETTINGS)


def test_an_own_attack_that_has_changed_does_not_go_on(tmp_path, monkeypatch):
    mixture, data = pair(), many(2)
    for _ in range(2):
        found = evaluate_mixture(mixture, data, L2(EPS), (OWN,), folder=tmp_path)
    assert found.largest[UNION + OWN] == 0
    monkeypatch.setitem(SETTINGS, "by", 0.5)
    with pytest.raises(InputError, match="holds an evaluation of other weights"):
        evaluate_mixture(mixture, data, L2(EPS), (OWN,), folder=tmp_path)


@pytest.mark.slow
def test_too_little_memory_halves_the_batch(two, few, monkeypatch):
    run = ARC.run

    def small(self, model, x, y, **more):
        if len(x) > 8:
            raise RuntimeError("cannot allocate memory")
        return run(self, model, x, y, **more)

    whole = evaluate_mixture(two, few, Linf(0.1), ("fgsm",))
    monkeypatch.setattr(ARC, "run", small)
    halved = evaluate_mixture(two, few, Linf(0.1), ("fgsm",))
    assert halved.notes == [
        f"{name}: too little memory for 500 images at a time, 6 were taken" for name in JOINT
    ]
    assert torch.equal(halved.right["arc"], whole.right["arc"]), "it draws nothing"


def many(count=40):
    """Images at the centre, or a hair off on the grid of 256 levels: enough for a sign test."""
    x, y = CENTRE
    return ImageSet.from_floats(x.repeat(count, 1, 1, 1), y.repeat(count), 2)


def test_the_flag_fires_where_adaptive_pgd_alone_is_beaten():
    data, ball = many(), L2(EPS)
    fooled = evaluate_mixture(pair(), data, ball, ("pgd20",))
    assert fooled.verdicts().worst_case() == 0
    assert 0.35 < float(fooled.expected(ADAPTIVE).mean()) <= 0.5
    told = [
        flag.meaning
        for flag in find_mixture_flags(fooled, data, ball, ("a", "b"))
        if flag.name == "adaptive_pgd_beaten"
    ]
    assert told[0].startswith("arc takes")
    assert "% of expected accuracy beyond what gradient ascent" in told[0]
    honest = evaluate_mixture(pair(1.0, 0.8), data, ball, ("pgd20",))
    names = {flag.name for flag in find_mixture_flags(honest, data, ball, ("a", "b"))}
    assert "adaptive_pgd_beaten" not in names


class SilentOnWhite(torch.nn.Module):
    """NaN where a pixel is white."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.masked_fill(x == 1, torch.nan))


def test_a_mixture_is_flagged_where_an_attack_leaves_the_ball_or_a_member_is_silent():
    one, other = pair().members
    mixture, data, ball = (
        ClassifierMixture([one, SilentOnWhite(other)], [0.5, 0.5]),
        many(2),
        L2(0.2),
    )
    found = evaluate_mixture(mixture, data, ball, ("mine",), extra={"mine": Brighter(0.5)})
    told = {
        flag.name: flag.meaning
        for flag in find_mixture_flags(found, data, ball, ("a", "b"))
        if not flag.meaning.startswith("member ")
    }
    assert told["ball_violated"].startswith("members:mine left the ball")
    assert "in answers of members: 4 under members:mine;" in told["non_finite"]


def test_notes_of_a_mixture_are_those_of_a_classifier(two, few):
    found = evaluate_mixture(two, few.subset(slice(1)), Linf(0.1), ("autoattack-lite",))
    assert found.verdicts().notes == ["autoattack-lite is half of AutoAttack: no number to quote"]
    names = [UNION + name for name in FEW_CLASSES]
    assert _few_classes(names, many(1)) == _few_classes(FEW_CLASSES, many(1)) != []


def test_flags_of_a_member_name_it(two, few):
    broken = ClassifierMixture([two.members[0], Linear(torch.zeros(10, 64))], [0.5, 0.5])
    found = evaluate_mixture(broken, few, Linf(0.1), ("fgsm",))
    told = find_mixture_flags(found, few, Linf(0.1), ("sound", "constant"))
    assert "constant_output" in {flag.name for flag in told}
    assert {flag.meaning.split(":")[0] for flag in told} == {"member constant"}


def test_a_sign_test_takes_probabilities_as_well_as_verdicts():
    stronger, weaker = torch.zeros(20), torch.full((20,), 0.5)
    assert beats(stronger, weaker)
    assert not beats(weaker, stronger)
    assert beats(stronger.bool(), weaker.bool())
    assert not beats(weaker.bool(), weaker.bool())
    # equal weights in another order: 0.1 + 0.2 is not 0.3 to the last bit
    third = torch.full((100,), 0.3, dtype=torch.float64)
    assert not beats(third, torch.full((100,), 0.1, dtype=torch.float64) + 0.2)
    few_images = torch.cat([stronger[:5], weaker[:15]])
    assert not beats(few_images, weaker)


def test_what_is_no_mixture_is_refused(two, few, victim):
    x, y = few.floats(), few.labels
    for attack in (ARC(Linf(0.1)), ExpectedLoss(Linf(0.1)), OnMember([], 0)):
        with pytest.raises(InputError, match="this attack is on a ClassifierMixture"):
            attack.run(victim, x, y, rng=seeded())
    with pytest.raises(InputError, match="on a ClassifierMixture"):
        as_mixture(victim)
    for weights, said in {
        (0.5, 0.6): "must have a sum of 1, not 1.1",
        (1.5, -0.5): "numbers of 0 or above",
        (1.0,): "has 2 weights, not 1",
        (float("nan"), 1.0): "numbers of 0 or above",
    }.items():
        with pytest.raises(InputError, match=said):
            ClassifierMixture(list(two.members), weights)
    with pytest.raises(InputError, match="a mixture needs a member"):
        ClassifierMixture([], [])
    other = ClassifierMixture([victim, Linear(torch.rand(12, 64))], [0.5, 0.5])
    with pytest.raises(InputError, match="has 12 outputs"):
        plan_mixture(other, few, Linf(0.1), ("fgsm",))
    fewer = ClassifierMixture([Linear(torch.rand(count, 64)) for count in (2, 3)], [0.5, 0.5])
    zeros = ImageSet(few.images, torch.zeros_like(few.labels), 10)  # either may judge these
    with pytest.raises(InputError, match="same classes, not 2, 3"):
        plan_mixture(fewer, zeros, Linf(0.1), ("fgsm",))
    with pytest.raises(InputError, match="same classes, not 10, 12"):
        other.answers(x)
    with pytest.raises(InputError, match="name attacks"):
        plan_mixture(two, few, Linf(0.1), ())
    for wrong in ({"steps": 0}, {"share": 0.0}, {"share": 1.5}, {"classes": 0}):
        with pytest.raises(InputError, match="ARC takes"):
            ARC(Linf(0.1), **wrong)
    with pytest.raises(InputError, match="steps must be 1 or above"):
        ExpectedLoss(Linf(0.1), steps=0)
    for kind in (ARC, ExpectedLoss):
        with pytest.raises(InputError, match="at one eps"):
            kind(Linf(torch.full((2,), 0.1)))


@pytest.fixture(scope="module")
def root(two, tmp_path_factory):
    """Run folders of both classifiers, and mixtures of them."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name, member in zip(("robust", "plain"), two.members, strict=True):
        about = {"dataset": "digits", "model": "small_cnn", "eps": "0.1", "epochs": 1}
        run = RunFolder.create(folder / "runs" / name, about, "cpu")
        save_weights(member, run.path / "checkpoints" / "best.safetensors")
    save_weights(two.members[1], folder / "plain.safetensors")
    write_mixture(
        folder / "mixture.json",
        [folder / "runs" / "robust", folder / "plain.safetensors"],
        [0.6, 0.4],
    )
    return folder


def test_a_file_is_written_and_read(root):
    found = read_mixture(root / "mixture.json")
    assert found.members == (root / "runs" / "robust", root / "plain.safetensors")
    assert found.weights == (0.6, 0.4)
    said = json.loads((root / "mixture.json").read_text())
    assert said == {"members": ["runs/robust", "plain.safetensors"], "weights": [0.6, 0.4]}
    (root / "pure.json").write_text(json.dumps({**said, "weights": [1, 0]}))
    assert read_mixture(root / "pure.json").members == (root / "runs" / "robust",)


@pytest.mark.slow
def test_evaluate_takes_a_mixture(root, two, digits, tmp_path, monkeypatch):
    few = digits.test.first(10)
    words = [
        str(root / "mixture.json"),
        "--model",
        "small_cnn",
        "--n",
        "10",
        "--runs-dir",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--attacks", "pgd20", "--name", "a"])
    run_script(script.job.from_command_line)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["accuracy"]) == ["clean", *EVERY, UNION + "pgd20"]
    found = evaluate_mixture(two, few, Linf(0.1), ("pgd20",))
    assert report["worst_case"] == pytest.approx(found.verdicts().worst_case())
    mixture = report["mixture"]
    assert [one["weight"] for one in mixture["members"]] == [0.6, 0.4]
    assert [one["name"] for one in mixture["members"]] == [
        str(root / "runs" / "robust"),
        str(root / "plain.safetensors"),
    ]
    assert mixture["members"][1]["worst_case"] == pytest.approx(found.alone(1).worst_case())
    assert mixture["adaptive_alone"] == pytest.approx(float(found.expected(ADAPTIVE).mean()))
    rows = (tmp_path / "a" / "verdicts.csv").read_text().splitlines()
    assert rows[0] == ",".join(["image,label,clean", *EVERY, "members:pgd20"])
    assert {value for row in rows[1:] for value in row.split(",")[2:]} <= {"0", "0.4", "0.6", "1"}
    page = (tmp_path / "a" / "report.md").read_text()
    assert "Under gradient ascent on the expected loss alone" in page
    (tmp_path / "a" / "report.json").unlink()
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(tmp_path / "a")])
    run_script(script.job.from_command_line)
    again = json.loads((tmp_path / "a" / "report.json").read_text())
    assert again["accuracy"] == report["accuracy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mixture.json", "--attacks", "clean"], "name an attack beside clean"),
        (
            ["runs/robust", "--attacks", "transfer", "--surrogate", "mixture.json"],
            "a surrogate is one classifier",
        ),
        ([".", "--attacks", "fgsm"], "holds no classifier but a mixture: evaluate mixture.json"),
    ],
)
def test_what_is_no_judgement_of_a_mixture_is_refused_and_nothing_written(
    words, said, root, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(root)
    argv = [*words, "--model", "small_cnn", "--runs-dir", str(tmp_path), "--name", "x"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_script(script.job.from_command_line)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


MIXTURES = {
    "[1]": "cannot be read",
    '{"members": "a", "weights": [1]}': "must hold",
    '{"members": [1], "weights": [1]}': "members are paths",
    '{"members": [], "weights": []}': "needs a member",
    '{"members": ["runs/robust"], "weights": [0.5]}': "sum of 1, not 0.5",
    '{"members": ["runs/robust", "runs/plain"], "weights": [1.5, -0.5]}': "0 or above",
    '{"members": ["runs/robust"], "weights": ["1"]}': "0 or above",
    '{"members": ["runs/robust"], "weights": [0.5, 0.5]}': "has 1 weights, not 2",
    '{"members": ["nowhere"], "weights": [1]}': "nowhere does not exist",
    '{"members": ["mixture.json"], "weights": [1]}': "is a mixture, too",
    '{"members": ["plain.safetensors"], "weights": [1]}': "needs --model",
    '{"members": ["runs/robust", "other"], "weights": [0.5, 0.5]}': "different data sets",
    '{"members": ["runs/robust", "large"], "weights": [0.5, 0.5]}': "does not hold this network's",
}


@pytest.mark.parametrize("text", MIXTURES)
def test_bad_mixtures_are_refused_in_a_line(text, root, refused):
    if not (root / "other").exists():
        for name, eps in (("other", "0.2"), ("large", "0.1")):
            about = {"dataset": "digits", "model": "small_cnn", "eps": eps, "epochs": 1}
            run = RunFolder.create(root / name, about, "cpu")
            save_weights(Linear(torch.rand(10, 3)), run.path / "checkpoints" / "best.safetensors")
    (root / "bad.json").write_text(text)
    refused(script, [str(root / "bad.json")], MIXTURES[text])


def test_options_that_a_mixture_makes_no_use_of_are_refused(root, refused):
    pure = root / "two.json"
    write_mixture(pure, [root / "runs" / "robust", root / "runs" / "plain"], [0.5, 0.5])
    refused(script, [str(pure), "--devices", "2"], "start the same command once per device")
    refused(script, [str(pure), "--normalise", "cifar10"], "knows its own normalisation")
    refused(script, [str(pure), "--model", "small_cnn"], "make no use of --model")
    refused(script, [str(root / "nowhere.json")], "cannot be read")
    refused(script, [str(pure), "--attacks"], "--attacks names none")
    refused(script, [str(pure), "--attacks", "pgd21"], "unknown attack")

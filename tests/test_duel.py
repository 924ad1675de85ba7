"""The duel's rules: a step against the formula, exact pay, standings, lessons."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from conftest import Around, seeded, undefended
from smooth_parts import BALL, batch, flat, plain, smooth
from torch.nn.functional import cross_entropy

from advgame.attacks import GradientAttack
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.verdicts import validator
from advgame.games.awp import AWPDefender
from advgame.games.duel import (
    LARGEST_LOSS,
    Duel,
    Lesson,
    LessonSpace,
    Standing,
    payoffs,
    places,
)
from advgame.games.strategy import Strategies
from advgame.losses import smoothed_cross_entropy
from advgame.seeding import stream
from advgame.threat import Linf

CHOSEN = Strategies(
    torch.linspace(0.05, 0.2, 8).double(),
    torch.tensor([1, 2, 3, 1, 2, 3, 1, 2]),
    torch.full((8,), 0.05).double(),
)


@pytest.mark.parametrize(
    "lesson",
    [Lesson(), Lesson(2.0, 0.25, 0.8), Lesson(0.5, 0.5, 1.0, awp=True), Lesson(1.0, 1.0)],
    ids=str,
)
def test_a_step_is_the_formula_written_out(lesson):
    (x, y), model, gamma = batch(), smooth(), 0.05
    defender = plain(model=copy.deepcopy(model))
    made = Duel(BALL, gamma).step(defender, x, y, CHOSEN, lesson, seeded())

    ball = Linf(CHOSEN.eps)
    attack = GradientAttack(ball, CHOSEN.steps, CHOSEN.step_size, start=ball)
    x_adv = attack.run(model, x, y, rng=seeded()).x_adv
    assert torch.equal(made.x_adv, x_adv)
    before = cross_entropy(model(x_adv), y)
    assert math.isclose(made.loss, float(before.detach()), rel_tol=1e-9)
    assert made.accuracy == float((model(x_adv).argmax(1) == y).float().mean())

    def loss():
        pair = [
            smoothed_cross_entropy(model(one), y, lesson.true_probability) for one in (x_adv, x)
        ]
        return ((1 - lesson.clean) * pair[0] + lesson.clean * pair[1]).mean()

    weights, moved = list(model.parameters()), list(map(torch.clone, model.parameters()))
    if lesson.awp:
        slopes = torch.autograd.grad(loss(), weights)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                if weight.dim() > 1:
                    weight += gamma * weight.norm() * slope / slope.norm()
    slopes = torch.autograd.grad(loss(), weights)
    wanted = flat(moved) - lesson.rate * 0.1 * flat(slopes)
    torch.testing.assert_close(flat(defender.module.parameters()), wanted)
    assert defender.optimizer.param_groups[0]["lr"] == 0.1, "the multiplier is of one step"
    passes = (1 + lesson.awp) * (1 + bool(lesson.clean))
    assert float(made.stats["cost/backwards"]) == passes


def test_weight_perturbation_is_that_of_an_awp_defender_to_the_bit():
    (x, y), lesson = batch(), Lesson(awp=True)
    ours, theirs = plain(), plain(AWPDefender, gamma=0.05)
    made = Duel(BALL, 0.05).step(ours, x, y, CHOSEN, lesson, seeded())
    theirs.backward(made.x_adv, y)
    theirs.step()
    assert torch.equal(flat(ours.module.parameters()), flat(theirs.module.parameters()))
    with pytest.raises(InputError, match="step by step"):
        Duel(BALL).check(theirs)


def test_a_standing_is_what_trainings_validate_by(digits):
    model, images, ball = undefended(digits), digits.validation.first(100), Linf(0.08)
    scores = validator(images, ball, 3)(model)
    x, y, rng = images.floats(), images.labels, stream(3, "validate")
    before = copy.deepcopy(model.state_dict())
    standing = Duel(ball).judge(model, x, y, rng)
    assert 0 < standing.robust < standing.clean
    assert abs(standing.robust - scores["eval/robust"]) < 1e-6
    assert abs(standing.clean - scores["eval/clean"]) < 1e-6
    assert standing.loss > float(cross_entropy(model(x), y).detach())
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_an_image_counts_that_is_right_clean_and_attacked():
    """Here the clean image alone is taken for the next class."""
    x, y = batch()
    known = torch.nn.functional.one_hot(y, 3).double()

    def answer(net, seen):
        same = (seen == x).flatten(1).all(1)[:, None]
        return torch.where(same, known.roll(1, 1), known) + 0 * seen.sum()

    standing = Duel(BALL).judge(Around(smooth(), answer), x, y, seeded())
    assert (standing.robust, standing.clean) == (0.0, 0.0)
    assert standing.loss < 1


def test_a_classifier_that_has_diverged_stands_at_the_bottom():
    (x, y), model = batch(), smooth()
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    assert Duel(BALL).judge(model, x, y, seeded()) == Standing(0.0, 0.0, LARGEST_LOSS)
    made = Duel(BALL).step(plain(model=model), x, y, CHOSEN, Lesson(), seeded())
    assert (made.loss, made.accuracy, made.entropy) == (LARGEST_LOSS, 0.0, 0.0)


@pytest.mark.parametrize("stake", ["robust", "loss"])
def test_pay_is_zero_sum_and_adds_up_to_the_bit(stake):
    rng = seeded()
    losses = torch.rand(200, generator=rng).mul(15).tolist()
    right = torch.randint(98, (200,), generator=rng).tolist()
    x, y = batch()
    model = smooth()
    grid = [Duel(BALL).judge(model, x[:k], y[:k], seeded()) for k in range(1, 8)]
    made = [Standing(a / 97, a / 97, b) for a, b in zip(right, losses, strict=True)]
    exact = [Standing(*[round(v * 2**20) / 2**20 for v in vars(one).values()]) for one in made]
    walk = [*grid, *exact]
    pays = [payoffs(a, b, stake) for a, b in pairwise(walk)]
    assert all(attacker + defender == 0 for attacker, defender in pays)
    total = sum(defender for _, defender in pays)
    assert total == walk[-1].value(stake) - walk[0].value(stake)
    in_fp32 = torch.tensor([one for one, _ in pays]).cumsum(0)[-1]
    assert float(in_fp32) == walk[0].value(stake) - walk[-1].value(stake)
    assert math.copysign(1, payoffs(walk[0], walk[0], stake)[0]) == 1, "no pay is 0.0"


def test_lessons_are_indices_of_their_lists():
    space = LessonSpace()
    assert space.sizes == (4, 3, 4, 2)
    assert space.decode(torch.tensor([3, 1, 2, 1])) == Lesson(2.0, 0.25, 0.8, True)
    assert space.index(Lesson()) == (2, 0, 0, 0)
    assert space.index(Lesson(1.9, 0.3, 0.95, True))[:2] == (3, 1)
    assert places(torch.tensor([[0, 0, 3, 1], [3, 2, 3, 1]]), space.sizes) == [0.5, 0.5, 1.0, 1.0]
    for wrong in ([0, 0, 0, 2], [0, 0, 0], [-1, 0, 0, 0]):
        with pytest.raises(InputError, match="actions must"):
            space.decode(torch.tensor(wrong))


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"rates": (0.0,)}, "rates must be above 0"),
        ({"rates": ()}, "one value or more"),
        ({"clean": (1.5,)}, "clean must lie in"),
        ({"true_probabilities": (math.nan,)}, "true_probabilities must"),
        ({"awp": (1,)}, "awp must be True or False"),
    ],
    ids=str,
)
def test_lists_that_nobody_learns_with_are_refused(settings, answer):
    with pytest.raises(InputError, match=answer):
        LessonSpace(**settings)
    with pytest.raises(InputError, match="gamma must lie"):
        Duel(BALL, 1.0)
    with pytest.raises(InputError, match="label smoothing"):
        LessonSpace(true_probabilities=(0.05,)).check(10)


def test_the_held_out_images_teach_nothing(digits):
    """A standing leaves the classifier's gradients and the images alone."""
    images = ImageSet(digits.validation.images[:8].clone(), digits.validation.labels[:8], 10)
    defender = plain(model=undefended(digits))
    defender.optimizer.zero_grad()
    Duel(BALL).judge(defender.module, images.floats(), images.labels, seeded())
    assert all(one.grad is None for one in defender.module.parameters())
    assert torch.equal(images.images, digits.validation.images[:8])

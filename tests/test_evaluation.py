"""Evaluation: verdicts equal references, reports add up, flags catch broken classifiers."""

import json
import logging

import pytest
import torch
from conftest import Linear
from pyautoattack import AutoAttack
from torch import nn

from advgame.data import ImageSet
from advgame.evaluation import evaluate, find_flags, write_report
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.report import as_markdown
from advgame.run.folder import RunFolder
from advgame.threat import L2, Linf

BALL = Linf(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version"), [("autoattack", "standard"), ("autoattack-rand", "rand")]
)
def test_autoattack_verdicts_are_those_of_pyautoattack_by_hand(name, version, honest, test_images):
    test_images = test_images.subset(slice(12))
    x, y = test_images.floats(), test_images.labels
    mine = evaluate(honest, test_images, BALL, (name,), seed=7, batch_size=8)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    want = []
    for rows in (slice(8), slice(8, 12)):
        judge = AutoAttack(honest, norm="Linf", eps=0.1, seed=7, version=version, device="cpu")
        judge.verbose = False
        _, said = judge.run_standard_evaluation(x[rows], y[rows], batch_size=8)
        want.append(said == y[rows])
    assert torch.equal(mine.correct[name], torch.cat(want))
    assert 0 < int(mine.correct[name].sum()) < 12


@pytest.mark.parametrize(("classes", "targets"), [(10, 9), (12, 9), (5, 4)])
def test_autoattack_targets_nine_classes_or_all_wrong_ones(classes, targets, monkeypatch):
    """Easy images are broken by the first attack: their verdicts cannot show this."""
    seen = []

    def spy(self, x, y, /, *, batch_size):
        mine = (self.apgd_targeted.n_target_classes, self.fab.n_target_classes)
        seen.append((self.version, self.attacks_to_run, *mine))
        return x, y

    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", spy)
    x = torch.rand(2, 1, 2, 2)
    part = AutoAttackPart(BALL, "apgd-t", "plus")
    part.run(Linear(torch.eye(classes, 4)), x, torch.zeros(2, dtype=torch.int64))
    assert seen.pop() == ("plus", ["apgd-t"], targets, targets)
    assert AutoAttackPart(BALL, "apgd-t").own(classes).targets == targets


class Chancy(nn.Module):
    """Whether it errs is a matter of chance, the more so the lighter the image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        gap = self.weight * (1.1 - (x - 0.5).mean((1, 2, 3)) / 0.1) + torch.randn(len(x)) * 0.3
        return torch.stack([gap, -gap, -gap - 5, -gap - 6], 1)


def test_a_classifier_that_draws_errs_once_per_attack_as_in_pyautoattack():
    """Judged by two draws in a row it would err by chance squared, and seem too robust."""
    count, ball, net = 150, Linf(0.1), Chancy().eval()
    data = ImageSet.from_floats(torch.full((count, 1, 4, 4), 0.5), torch.zeros(count).long(), 4)
    mine = evaluate(net, data, ball, ("autoattack-rand",), seed=0).accuracy()["autoattack-rand"]
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = AutoAttack(net, norm="Linf", eps=0.1, seed=0, version="rand", device="cpu")
        judge.verbose = False
        _, said = judge.run_standard_evaluation(data.floats(), data.labels, batch_size=count)
    theirs = float((said == 0).float().mean())
    assert 0.1 < theirs < 0.6
    assert abs(mine - theirs) < 0.15  # 2.7 sd of a difference of two shares of 150 images


def test_verdicts_on_a_linear_model_are_the_closed_form(rng):
    model = Linear(torch.randn(5, 16, generator=rng))
    images = ImageSet.from_floats(
        0.3 + 0.4 * torch.rand(80, 1, 4, 4, generator=rng), torch.arange(80) % 5, 5
    )
    x = images.floats()
    images = ImageSet(images.images, model(x).argmax(1), 5)
    y = images.labels
    verdicts = evaluate(model, images, Linf(0.05), ("pgd100", "autoattack"))
    # class k beats y inside the ball iff (w_k - w_y)·x + b + ε|w_k - w_y|₁ > 0
    gaps = model.weight[None] - model.weight[y][:, None]
    worst = (gaps * x.flatten(1)[:, None]).sum(2) + 0.05 * gaps.abs().sum(2)
    worst[torch.arange(80), y] = -1
    want = (worst < 0).all(1)
    assert 5 < int(want.sum()) < 75
    assert torch.equal(verdicts.correct["autoattack"], want)
    # the margin of PGD on cross-entropy may follow another class: never stronger than exact
    assert (verdicts.correct["pgd100"] | ~want).all()
    assert int((verdicts.correct["pgd100"] ^ want).sum()) <= 8


def test_same_seed_same_verdicts_and_the_model_is_left_alone(honest, test_images):
    honest.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    few = test_images.subset(slice(8))
    one = evaluate(honest, few, BALL, ("fgsm", "pgd20", "aa:apgd-ce"), seed=1)
    assert honest.training
    assert torch.equal(torch.get_rng_state(), before)
    two = evaluate(honest, few, BALL, ("fgsm", "pgd20", "aa:apgd-ce"), seed=1)
    for name in one.correct:
        assert torch.equal(one.correct[name], two.correct[name])
    honest.eval()
    accuracy = one.accuracy()
    assert one.worst_case() <= min(accuracy.values())
    assert max(one.largest.values()) <= 0.1 + 1e-5


def test_report_says_the_same_in_both_files(honest, test_images, tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    verdicts = evaluate(honest, test_images, L2(0.5), ("fgsm", "pgd20"))
    flags = find_flags(honest, test_images, L2(0.5), verdicts)
    about = {"dataset": "digits", "seed": 0, "weights": "best", "also": {}}
    write_report(run, verdicts, test_images, L2(0.5), flags, **about)
    content = json.loads((run.path / "report.json").read_text())
    assert content["threat"] == {"norm": "L2", "eps": 0.5}
    assert content["n"] == 60
    assert content["worst_case"] == verdicts.worst_case()
    assert set(content["accuracy"]) == {"clean", "fgsm", "pgd20"}
    assert {"dataset", "seed", "flags", "command", "versions", "device", "seconds"} <= set(content)
    text = (run.path / "report.md").read_text()
    for value in content["accuracy"].values():
        assert f"{100 * value:.1f}" in text
    content["flags"] = [{"name": "a_flag", "meaning": "why"}]
    assert "`a_flag`: why" in as_markdown(content)

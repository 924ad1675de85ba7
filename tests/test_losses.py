"""Losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from advgame.errors import InputError
from advgame.losses import cross_entropy, dlr, margin, misclassified, smoothed_cross_entropy


@pytest.mark.parametrize("f", [0.1, 0.6, 0.7, 1.0])
def test_smoothing_is_lasats_explicit_target(f, rng):
    """True class f, each other (1 - f)/(K - 1), as the published code writes it."""
    logits, y = torch.randn(6, 10, generator=rng), torch.arange(6)
    target = torch.full((6, 10), (1 - f) / 9)
    target[torch.arange(6), y] = f
    want = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, y, f), want)


def test_margin_is_positive_exactly_where_misclassified(rng):
    logits, y = torch.randn(50, 4, generator=rng), torch.arange(50) % 4
    wrong = logits.argmax(1) != y
    assert 0 < int(wrong.sum()) < 50
    assert torch.equal(margin(logits, y) > 0, wrong)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_answer_is_misclassified_as_class_0_too(value, rng):
    logits, y = torch.randn(50, 4, generator=rng), torch.arange(50) % 4
    assert torch.equal(misclassified(logits, y), logits.argmax(1) != y)
    logits[:, 0] = value
    assert bool(misclassified(logits, y).all())
    members = torch.stack([logits, logits.nan_to_num(posinf=0.0)], 1)  # (B, M, K)
    assert bool(misclassified(members, y[:, None])[:, 0].all())
    assert not bool(misclassified(members, y[:, None])[:, 1].all())


def test_half_precision_logits_are_raised():
    logits = torch.tensor([[30000.0, -30000.0]]).half()
    loss = cross_entropy(logits, torch.tensor([1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), torch.tensor([1]))[None])


@pytest.mark.parametrize("f", [0.05, 1.2, -1])
def test_impossible_smoothing_is_refused(f):
    with pytest.raises(InputError, match="probability"):
        smoothed_cross_entropy(torch.zeros(1, 10), torch.tensor([0]), f)


def test_dlr_is_autoattacks_and_falls_back_for_two_classes(rng):
    logits = torch.randn(20, 10, generator=rng)
    y = torch.randint(10, (20,), generator=rng)
    ordered, place = logits.sort(1)
    right = (place[:, -1] == y).float()
    # pyautoattack's formula, written out
    rows = torch.arange(20)
    other = ordered[:, -2] * right + ordered[:, -1] * (1 - right)
    want = -(logits[rows, y] - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
    torch.testing.assert_close(dlr(logits, y), want)
    torch.testing.assert_close(dlr(3 * logits + 7, y), want)
    two = logits[:, :2]
    assert torch.equal(dlr(two, y % 2), margin(two, y % 2))

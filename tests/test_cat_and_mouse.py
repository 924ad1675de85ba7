"""The cat-and-mouse game: its batches, its attacks, its retraining."""

from dataclasses import replace

import pytest
import torch
from conftest import BatchNormNet

from advgame.attacks import fgsm, pgd
from advgame.classifiers import SmallCNN
from advgame.data import Splits
from advgame.defender import Defender
from advgame.games.cat_and_mouse import CatAndMouse, attack_images, classifier_file, error
from advgame.run.checkpoint import load_weights
from advgame.seeding import seeded_init
from advgame.threat import Linf

EPS, STEPS = 0.15, 3


def network(number=0):
    with seeded_init(number):
        return SmallCNN((1, 8, 8), 10, width=8, hidden=32)


def game(folder, data, attack=None, seed=0, *, lr=1e-3, **changes):
    sizes = {"batch_size": 32, "round_steps": STEPS, "clean_rounds": 1, **changes}
    defender = Defender(network(), lr=lr, weight_decay=0.0, algorithm="adam")
    return CatAndMouse(attack or fgsm(Linf(EPS)), defender, data, folder, seed=seed, **sizes)


@pytest.fixture(scope="module")
def few(digits):
    return Splits("digits", digits.train.first(200), digits.validation, digits.test.first(50))


def play(one, rounds):
    """Whole rounds; the row of each."""
    rows = []
    for _ in range(rounds):
        for _ in range(one.steps_per_epoch):
            one.step()
        rows.append(one.end_epoch(None, one.steps))
    return rows


class Watched:
    """An attack that remembers what it was asked and what it gave."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def run(self, model, x, y, *, rng=None, check=True):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        result = self.inner.run(model, x, y, rng=rng, check=check)
        self.calls.append((weights, x, y, result.x_adv))
        return result


def batches(one, monkeypatch):
    """What the defender learns from."""
    seen, real = [], Defender.backward
    monkeypatch.setattr(
        Defender,
        "backward",
        lambda self, x, y: (seen.append((x.clone(), y.clone())), real(self, x, y))[1],
    )
    for _ in range(STEPS):
        one.step()
    return seen


def rows_of(x, images):
    """Which image each of x is."""
    same = (x[:, None] == images[None]).flatten(2).all(2)
    assert same.any(1).all()
    return same.int().argmax(1)


def test_a_batch_is_half_clean_and_half_the_attacks_with_the_true_labels(
    few, tmp_path, monkeypatch
):
    attack = Watched(fgsm(Linf(EPS)))
    one = game(tmp_path, few, attack)
    play(one, 1)
    assert not attack.calls, "the first classifier meets no attack"
    images, labels = few.train.floats(), few.train.labels
    for (x, y), (_, given, told, made) in zip(batches(one, monkeypatch), attack.calls, strict=True):
        assert len(x) == len(y) == 32
        assert torch.equal(y[:16], labels[rows_of(x[:16], images)])
        assert torch.equal(x[16:], made)
        assert not torch.equal(made, given)
        assert torch.equal(y[16:], told)
        assert torch.equal(y[16:], labels[rows_of(given, images)])


def test_both_halves_pass_through_all_images(few, tmp_path, monkeypatch):
    """An epoch of each half is a permutation: 200 images are 12 halves of 16, 8 are left."""
    one = game(tmp_path, few, round_steps=12)
    images, seen = few.train.floats(), []
    monkeypatch.setattr(
        Defender, "backward", lambda self, x, y: (seen.append(x), torch.zeros(32))[1]
    )
    monkeypatch.setattr(Defender, "step", lambda self: None)
    for _ in range(12):
        one.step()
    for half in (slice(0, 16), slice(16, 32)):
        assert len(set(rows_of(torch.cat([x[half] for x in seen]), images).tolist())) == 192


def test_a_rounds_attack_is_the_attack_on_all_images_at_its_beginning(few, tmp_path):
    """Made batch by batch while the defender moves, it is the same as made at once."""
    attack = Watched(pgd(Linf(EPS), 3, 0.1))
    attack.inner = replace(attack.inner, start=None)
    one = game(tmp_path, few, attack)
    play(one, 2)
    attack.calls.clear()
    for _ in range(STEPS):
        one.step()
    whole, module = attack.calls.copy(), network()
    load_weights(module, classifier_file(tmp_path, 1))
    at_once = attack_images(2, module, attack.inner, few.train, 0)
    for weights, given, _, made in whole:
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
        torch.testing.assert_close(made, at_once[rows_of(given, few.train.floats())])
        assert (made - given).abs().max() <= EPS + 1e-6
        assert made.min() >= 0
        assert made.max() <= 1
    moved = one.defender.module.state_dict()
    assert not all(torch.equal(value, moved[name]) for name, value in module.state_dict().items())


def test_from_scratch_or_from_where_the_round_before_ended(few, tmp_path):
    asked = []

    def fresh(number):
        asked.append(number)
        return network(number)

    begun, real = [], Defender.backward
    with pytest.MonkeyPatch.context() as patch:

        def noted(self, x, y):
            place = {name: value.clone() for name, value in self.module.state_dict().items()}
            begun.append((place, len(self.optimizer.state)))
            return real(self, x, y)

        patch.setattr(Defender, "backward", noted)
        play(game(tmp_path / "fresh", few, fresh=fresh), 3)
        play(game(tmp_path / "on", few), 3)
    assert asked == [1, 2], "once a round, and classifier 0 has its own"
    for number in (1, 2):
        weights, memories = begun[number * STEPS]
        expected = network(number).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        assert not memories
        weights, memories = begun[(3 + number) * STEPS]
        before = network()
        load_weights(before, classifier_file(tmp_path / "on", number - 1))
        assert all(torch.equal(v, before.state_dict()[name]) for name, v in weights.items())
        assert memories


def test_an_error_counts_every_image_and_leaves_the_model_alone(digits, rng):
    torch.manual_seed(0)
    model, images = BatchNormNet().train(), digits.test.floats()
    found = error(model, images, digits.test.labels)
    assert model.training
    model.eval()
    wrong = sum(int(model(x[None]).argmax()) != y for x, y in zip(images, digits.test.labels))  # noqa: B905
    assert found == pytest.approx(wrong / len(images))


def test_the_same_seed_is_the_same_game(few, tmp_path):
    attack = pgd(Linf(EPS), 2, 0.1)
    found = [
        play(game(tmp_path / str(n), few, attack, seed), 2) for n, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]
    weights = [classifier_file(tmp_path / str(n), 1).read_bytes() for n in range(3)]
    assert weights[0] == weights[1] != weights[2]


def test_retraining_averts_the_attack_and_not_the_next(digits, tmp_path):
    """The paper's table 2 and the heart of table 3, on digits."""
    one = game(tmp_path, digits, batch_size=64, round_steps=100, lr=3e-3)
    first, *later = play(one, 3)
    assert first["game/clean_error"] < 0.1
    assert "game/attack_error" not in first
    for row in later:
        for name in ("", "validation_"):
            assert row[f"game/{name}attack_error"] > 0.5
            assert row[f"game/{name}defence_error"] < row[f"game/{name}attack_error"] / 2

"""The influence of an attack's steps on other images: finite differences, and the tables."""

import copy

import pytest
import torch
from studies.influence import Config, Influence, credits, explained, measure, slope
from test_stopping import play
from torch import nn

from advgame.data import ImageSet
from advgame.losses import cross_entropy
from advgame.threat import Linf


def smooth():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 4))
        return nn.Sequential(*layers).double()


def test_credit_is_the_fall_of_the_held_out_loss_and_its_slope_by_the_radius():
    rng = torch.Generator().manual_seed(0)
    x, held = (torch.rand(5, 1, 6, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    delta = 0.1 * torch.randn(5, 1, 6, 6, generator=rng, dtype=torch.float64)
    y, y_held = torch.arange(5) % 4, (torch.arange(5) + 1) % 4
    model = smooth()
    here = {name: value.detach() for name, value in model.named_parameters()}
    along = slope(model, here, held, y_held)

    def fall(image, scale, rate=1e-5):
        """Of the mean held-out loss, by a step on one image, per unit of the learning rate."""
        one = slice(image, image + 1)
        step = slope(model, here, x[one] + scale * delta[one], y[one])
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, value in moved.named_parameters():
                    value -= sign * rate * step[name]
                losses.append(float(cross_entropy(moved(held), y_held).mean()))
        return (losses[1] - losses[0]) / (2 * rate)

    ((credit, by_scale),) = credits(model, x, delta, y, [along])
    for image in range(5):
        assert float(credit[image]) == pytest.approx(fall(image, 1.0), rel=1e-5)
        by_hand = (fall(image, 1.001) - fall(image, 0.999)) / 0.002
        assert float(by_scale[image]) == pytest.approx(by_hand, rel=1e-3)


def test_what_features_tell_is_measured_on_other_images():
    rng = torch.Generator().manual_seed(0)
    phi = torch.randn(400, 3, 5, generator=rng)
    told = phi @ torch.arange(1.0, 6.0)
    r2, rank = explained(phi, told)
    assert r2 > 0.999
    assert rank > 0.999
    noise = 5 * torch.randn(400, 3, generator=rng) * told.std() / 5
    assert explained(phi, told + noise)[0] == pytest.approx(0.5, abs=0.05)
    assert explained(phi, noise)[0] < 0.01, "nothing is learned of noise"


def test_a_measurement_leaves_the_training_as_it_was_and_makes_tables(tmp_path):
    game = play(3)[0]
    before = copy.deepcopy((game.state_dict(), game.defender.module.state_dict()))
    data = game.env.data
    held = ImageSet(data.images[:40], data.labels[:40], data.classes)
    found = measure(game, data.first(128), held, Linf(0.08), 3)
    after = (game.state_dict(), game.defender.module.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert found["images"] == 128
    assert len(found["credit"]) == 4
    cell = {"method": "epoch 1", "epoch": 1, "device": "cpu", "commit": "0" * 12}
    runs = [{**cell, **found, "seed": seed} for seed in range(2)]
    said = "\n".join(Influence(Config()).document(runs, {}))
    assert said.count("| epoch 1 |") == 2

"""Classifiers: parameter counts of the papers, shapes, normalisation inside."""

import pytest
import torch

from advgame.classifiers import Normalise, make_classifier
from advgame.errors import InputError


@pytest.mark.parametrize(
    ("name", "shape", "millions"),
    [
        ("resnet18", (3, 32, 32), 11.17),
        ("resnet34", (3, 32, 32), 21.28),
        ("resnet50", (3, 32, 32), 23.52),
        ("preact_resnet18", (3, 32, 32), 11.17),
        ("wrn-28-10", (3, 32, 32), 36.48),
        ("wrn-34-10", (3, 32, 32), 46.16),
        ("minimax_cnn", (1, 28, 28), 1.66),
        ("lean_resnet", (3, 32, 32), 1.23),
        ("lean_resnet-half", (3, 32, 32), 0.31),
    ],
)
def test_parameter_counts_are_those_that_pages_and_papers_name(name, shape, millions):
    with torch.device("meta"):
        model = make_classifier(name, shape, 10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 2) == millions


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small_cnn", (1, 8, 8)),
        ("small_cnn", (1, 28, 28)),
        ("small_cnn", (3, 9, 17)),
        ("minimax_cnn", (1, 28, 28)),
        ("resnet18", (3, 32, 32)),
        ("preact_resnet18", (1, 32, 32)),
        ("wrn-10-1", (3, 32, 32)),
    ],
)
def test_logits_and_features_have_their_shapes(name, shape, rng):
    model = make_classifier(name, shape, 7).eval()
    x = torch.rand(2, *shape, generator=rng)
    assert model(x).shape == (2, 7)
    assert model.embed(x).shape == (2, model.width)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wrn-10-2"])
def test_stages_halve_the_image(name, rng):
    """A stride in the wrong place changes the cost fourfold and no shape test would see it."""
    model = make_classifier(name, (3, 32, 32), 10)
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    model(torch.rand(2, 3, 32, 32, generator=rng))
    want = {"wrn-10-2": [32, 16, 8]}.get(name, [32, 32, 16, 16, 8, 8, 4, 4])
    assert sizes == want


def test_normalisation_is_inside(rng):
    layer = Normalise((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    x = torch.rand(4, 3, 32, 32, generator=rng)
    torch.testing.assert_close(layer(x)[:, 1], (x[:, 1] - 0.4) / 0.25)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make_classifier("resnet18", (3, 32, 32), 10).eval()
        torch.manual_seed(0)
        inside = make_classifier("resnet18", (3, 32, 32), 10, layer).eval()
    torch.testing.assert_close(inside(x), plain(layer(x)))
    assert {"normalise.mean", "normalise.std"} <= set(inside.state_dict())


def test_minimax_cnn_drops_out_in_training_only(rng):
    model = make_classifier("minimax_cnn", (1, 28, 28), 10)
    x = torch.rand(2, 1, 28, 28, generator=rng)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["resnet", "wrn-33-10", "wrn-28-0", "wrn-28", "wrn-4-1", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError):
        make_classifier(name, (3, 32, 32), 10)


def test_the_lean_network_multiplies_a_tenth_of_preact_resnet18():
    def multiplications(name):
        model, found = make_classifier(name, (3, 32, 32), 10), []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                size = module.weight[0].numel()
                module.register_forward_hook(
                    lambda _, x, out, size=size: found.append(size * out.numel())
                )
        with torch.no_grad():
            model.eval()(torch.rand(1, 3, 32, 32))
        return sum(found) / 1e6

    assert round(multiplications("lean_resnet")) == 49
    assert round(multiplications("lean_resnet-half"), 1) == 12.3
    assert round(multiplications("preact_resnet18")) == 555

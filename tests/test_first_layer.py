"""The first convolution's own way to the image's gradient, held to the library's."""

import pytest
import torch
from torch import nn

from advgame.classifiers import make_classifier
from advgame.classifiers.first_layer import FirstConv2d

SIZES = [(1, 5, 2, 2, 28), (1, 5, 1, 2, 28), (3, 3, 2, 1, 9), (3, 4, 3, 0, 11)]


def layers(channels, kernel, stride, padding, dtype=torch.float64):
    torch.manual_seed(0)
    ours = FirstConv2d(channels, 6, kernel, stride=stride, padding=padding).to(dtype)
    theirs = nn.Conv2d(channels, 6, kernel, stride=stride, padding=padding).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours.requires_grad_(False), theirs.requires_grad_(False)


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding", "side"), SIZES)
def test_forward_to_the_bit_and_gradient_to_rounding_are_the_librarys(
    channels, kernel, stride, padding, side, rng
):
    ours, theirs = layers(channels, kernel, stride, padding)
    x = torch.rand(5, channels, side, side + 2, generator=rng, dtype=torch.float64)
    gradients = []
    for layer in (ours, theirs):
        out = layer(x.requires_grad_())
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), x)[0])
    assert torch.equal(ours(x), theirs(x))
    assert "_Convolution" in type(ours(x).grad_fn).__name__
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_second_derivatives_are_right(rng):
    """A penalty on the gradient's norm (Machine-vs-Machine, GradAlign) goes through it twice."""
    ours, _ = layers(1, 3, 2, 1)
    x = torch.rand(2, 1, 5, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_weights_that_are_trained_get_their_gradients_to_the_bit(learns, rng):
    found = []
    for layer in layers(1, 5, 2, 2, torch.float32):
        getattr(layer, learns).requires_grad_()
        x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1), requires_grad=True)
        layer(x).square().sum().backward()
        found.append((x.grad, getattr(layer, learns).grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_librarys(dtype, rng):
    """By casting and by autocast: sums over windows would round in half precision."""
    ours, _ = layers(1, 3, 1, 1, dtype)
    x = torch.rand(2, 1, 6, 6, generator=rng).to(dtype).requires_grad_()
    assert "_Convolution" not in type(ours(x).grad_fn).__name__
    ours, x = ours.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert "_Convolution" not in type(ours(x).grad_fn).__name__


def test_the_networks_for_mnist_have_it_under_the_same_names():
    for name, key in (("small_cnn", "features.0"), ("minimax_cnn", "features.0")):
        model = make_classifier(name, (1, 28, 28), 10)
        (found,) = (n for n, one in model.named_modules() if isinstance(one, FirstConv2d))
        assert found.endswith(key)
        assert any(k.endswith(f"{key}.weight") for k in model.state_dict())

"""L2L's networks: sizes, blocks, strength, files."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import multiplications, normed, undefended
from l2l_parts import EPS, network
from safetensors.torch import load_file, save_file

from advgame.attacks import InputGradient, attacked, pgd
from advgame.classifiers import SmallCNN
from advgame.data import Batches
from advgame.errors import InputError
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.attacker import load_attacker
from agents.attacker_networks import WIDTHS, GeneratorBlock, make_body
from agents.attackers import load_any_attacker
from agents.l2l import L2LAttack, L2LAttacker, L2LPlayer, load_l2l


def conv(size, channels_in, channels_out, bias=True):
    return size * size * channels_in * channels_out + bias * channels_out


def block(channels_in, channels_out):
    """Two 3x3 convolutions, two slopes of PReLU, a shortcut; its batch norms have no weights."""
    shortcut = conv(1, channels_in, channels_out) if channels_in != channels_out else 0
    return conv(3, channels_in, channels_out) + conv(3, channels_out, channels_out) + 2 + shortcut


STEM = conv(3, 6, 64, bias=False) + 2 * 64
COUNTS = {  # and as the reference has them, in millions
    "wide": (STEM + block(64, 128) + block(128, 256) + block(256, 128) + conv(3, 128, 3), 1.63),
    "wide-repo": (
        STEM + block(64, 128) + block(128, 256) + block(256, 128) + block(128, 64) + conv(3, 64, 3),
        1.75,
    ),
    "slim": (
        conv(3, 6, 128, False) + 2 * 128 + block(128, 256) + block(256, 128)
        + conv(4, 128, 16, False) + 2 * 16 + conv(3, 16 + 6, 3, False) + 1,
        1.43,
    ),
    "two-block": (STEM + block(64, 128) + block(128, 64) + conv(3, 64, 3), 0.354),
}  # fmt: skip


@pytest.mark.parametrize("width", COUNTS)
def test_parameters_number_what_the_architecture_says(width):
    count = sum(p.numel() for p in make_body(width, 6, (3, 32, 32)).parameters())
    assert count == COUNTS[width][0]
    assert round(count / 1e6, 3 if width == "two-block" else 2) == COUNTS[width][1]
    assert f"{count:,}" in make_body.__globals__["__doc__"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
@pytest.mark.parametrize("gradients", [0, 1])
def test_the_small_width_costs_less_than_the_small_classifier(shape, gradients, rng):
    x = torch.rand(1, *shape, generator=rng)
    own = multiplications(
        make_body("small", 1 + gradients, shape), x.repeat(1, 1 + gradients, 1, 1)
    )
    assert own < 0.5 * multiplications(SmallCNN(shape, 10), x)


def test_slim_works_at_half_the_resolution_and_wide_at_full(rng):
    seen = {}
    for width in ("slim", "wide"):
        body = make_body(width, 6, (3, 32, 32)).eval()
        body.trunk.register_forward_hook(lambda m, i, out, w=width: seen.update({w: out.shape[2:]}))
        body(torch.rand(1, 6, 32, 32, generator=rng))
    assert seen == {"slim": (16, 16), "wide": (32, 32)}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_body_keeps_the_shape_and_stays_in_the_unit_ball(width, rng):
    shape = (3, 12, 16) if width == "small" else (3, 7, 9)
    out = make_body(width, 6, shape)(torch.randn(2, 6, *shape[1:], generator=rng) * 50)
    assert out.shape == (2, *shape)
    assert out.abs().max() <= 1


@pytest.mark.parametrize("out", [4, 6])
def test_a_block_is_two_convolutions_after_norm_and_slope_plus_a_shortcut(out, rng):
    with seeded_init(0):
        one = GeneratorBlock(4, out)
    x = torch.randn(3, 4, 5, 5, generator=rng)
    for norm in (one.bn1, one.bn2):
        norm.running_mean.uniform_(-1, 1, generator=rng)
        norm.running_var.uniform_(0.5, 2, generator=rng)
    bent = x
    for norm, conv_ in ((one.bn1, one.conv1), (one.bn2, one.conv2)):
        mean, var = (s.view(1, -1, 1, 1) for s in (norm.running_mean, norm.running_var))
        bent = (bent - mean) / (var + 1e-5).sqrt()
        bent = F.conv2d(torch.where(bent > 0, bent, bent / 4), conv_.weight, conv_.bias, padding=1)
    kept = x if out == 4 else F.conv2d(x, one.shortcut.weight, one.shortcut.bias)
    torch.testing.assert_close(one.eval()(x), bent + kept, rtol=1e-4, atol=1e-5)
    limit = math.sqrt(2) * math.sqrt(6 / (9 * (4 + out)))  # Xavier-uniform, gain √2
    assert 0.9 * limit < float(one.conv1.weight.detach().abs().max()) <= limit


@pytest.fixture(scope="module")
def frozen(digits):
    return undefended(digits)


def taught(gradients, model, data, steps=60):
    """A network after ``steps`` against a frozen classifier."""
    own, batches, threat = L2LPlayer(network(gradients), lr=5e-3), Batches(data, 64, 0), Linf(EPS)
    own.module.train()
    for _ in range(steps):
        x, y = batches.next()
        with attacked(model):
            x_adv = own.perturb(x, threat, InputGradient(model, x, y))
            cross_entropy(model(x_adv), y).mean().backward()
        own.step()
    return own.module


def test_a_taught_network_is_an_attack(frozen, digits, rng):
    """Measured: clean 97, Naive 82, Grad 56, FGSM 55, PGD-20 51 %."""
    x, y = digits.test.floats(), digits.test.labels

    def left(attack):
        return float(
            (frozen(attack.run(frozen, x, y, rng=rng).x_adv).argmax(1) == y).float().mean()
        )

    clean = float((frozen(x).argmax(1) == y).float().mean())
    naive, grad = (left(L2LAttack(taught(k, frozen, digits.train), Linf(EPS))) for k in (0, 1))
    assert clean > 0.94
    assert naive < clean - 0.05
    assert grad < naive - 0.1
    assert grad < left(pgd(Linf(EPS), 20)) + 0.12
    untaught = left(L2LAttack(network(1), Linf(EPS)))
    assert grad < untaught - 0.1


@pytest.mark.parametrize("width", ["small", "slim"])
def test_a_saved_attacker_attacks_to_the_same_bits(width, tmp_path, batch):
    net = network(2, scaling="paper", width=width)
    if width == "small":
        with torch.no_grad():
            net.body.mix.copy_(torch.tensor([[-0.3, 0.7]]))  # it begins at 0
    L2LAttacker(net, {"seed": 3}).save(tmp_path / "attacker.safetensors")
    loaded = load_l2l(tmp_path)
    assert loaded.about == {"seed": 3}
    assert (loaded.network.gradients, loaded.network.scaling) == (2, "paper")
    assert loaded.network.width == width
    one, two = (
        attacker(Linf(EPS), 10).run(normed(), *batch).x_adv
        for attacker in (L2LAttacker(net, {}), load_any_attacker(tmp_path))
    )
    assert torch.equal(one, two)


def test_files_that_hold_no_l2l_attacker_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    L2LAttacker(network(), {}).save(good)
    with pytest.raises(InputError, match="no attacker"):
        load_attacker(good)
    for about, said in (
        ({}, "no L2L attacker"),
        ({"format": "advgame l2l attacker 1", "shape": "[1, 8, 8]"}, "damaged or of another"),
        (
            {"format": "advgame l2l attacker 1", "shape": "[1, 8, 8]", "gradients": "0",
             "width": "small", "scaling": "image", "about": "{}"},
            "damaged or of another",  # weights of Grad
        ),
    ):  # fmt: skip
        save_file(load_file(good), tmp_path / "odd.safetensors", about)
        with pytest.raises(InputError, match=said):
            load_l2l(tmp_path / "odd.safetensors")
        if not about:
            with pytest.raises(InputError, match="is no attacker"):
                load_any_attacker(tmp_path / "odd.safetensors")

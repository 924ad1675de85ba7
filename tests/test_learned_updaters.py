"""The papers' learned updater U: by hand, its options, its memory."""

from pathlib import Path

import pytest
import torch
from quadratic_parts import START, quadratic
from torch import nn

from advgame.errors import InputError
from agents import learned_updaters, outer_adam
from agents.learned_updaters import MLPUpdater, needed_memory, parameter_count
from agents.updaters import CoordinatewiseUpdater, make_updater


class PlainU(nn.Module):
    """U written down as the paper has it, for autograd and torch's Adam."""

    def __init__(self, m, state):
        super().__init__()
        sizes = [(2 * m, 8 * m), (8 * m, 4 * m), (4 * m, m)]
        self.linears = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.prelus = nn.ModuleList(nn.PReLU() for _ in range(2))
        with torch.no_grad():
            for k, linear in enumerate(self.linears, 1):
                linear.weight.copy_(state[f"weight{k}"][0])
                linear.bias.copy_(state[f"bias{k}"][0][:, 0])
            for k, prelu in enumerate(self.prelus, 1):
                prelu.weight.copy_(state[f"slope{k}"][0][0])

    def forward(self, theta, g):
        h = self.prelus[0](self.linears[0](torch.cat([theta, g])))
        return theta + self.linears[2](self.prelus[1](self.linears[1](h)))


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_the_papers_u_is_algorithm_3_with_torchs_adam(block, monkeypatch):
    """Parameters, and every weight of U, through ten updates; gradients whole or in blocks."""
    monkeypatch.setattr(outer_adam, "_BLOCK", block)
    updater = MLPUpdater(1e-3, seed=5)
    updater.init(START)
    layers = updater.saved()["layers"]
    for k, limit in ((1, 12**-0.5), (2, 48**-0.5), (3, 24**-0.5)):
        assert 0.95 * limit < layers[f"weight{k}"][0].abs().max() <= limit
        assert 0.5 * limit < layers[f"bias{k}"][0].abs().max() <= limit
    assert layers["slope1"][0] == layers["slope2"][0] == 0.25
    plain = PlainU(6, layers)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    theta = START
    for step in range(10):
        leaf = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(quadratic(leaf), leaf)
        new = plain(theta, g)
        adam.zero_grad()
        quadratic(new).backward()
        norm = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm()
        update = updater.update(theta, quadratic)
        # float32 sums in another order, which Adam's first steps (±lr whatever the size) amplify
        torch.testing.assert_close(update.params, new.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(update.stats["updater/gradient_norm"], norm)
        torch.testing.assert_close(update.stats["updater/loss"], quadratic(new).detach())
        torch.testing.assert_close(update.stats["updater/step"], (new.detach() - theta).norm())
        adam.step()
        theta = update.params
        assert step or not torch.equal(theta, START)
    for k, linear in enumerate(plain.linears, 1):
        torch.testing.assert_close(layers[f"weight{k}"][0], linear.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layers[f"bias{k}"][0][:, 0], linear.bias, rtol=1e-3, atol=1e-5)
    for k, prelu in enumerate(plain.prelus, 1):
        assert float(layers[f"slope{k}"][0]) != 0.25, "the slope learns"
        torch.testing.assert_close(layers[f"slope{k}"][0][0], prelu.weight, rtol=1e-3, atol=1e-5)


def test_the_count_of_weights_is_the_papers():
    """Counted by torch, without memory, at the size of the paper's discriminator for CartPole."""
    m = 6 * 64 + 64 + 64 * 32 + 32 + 32 + 1
    assert m == 2561
    with torch.device("meta"):
        sizes = [(2 * m, 8 * m), (8 * m, 4 * m), (4 * m, m)]
        modules = [*(nn.Linear(*size) for size in sizes), nn.PReLU(), nn.PReLU()]
    counted = sum(weight.numel() for module in modules for weight in module.parameters())
    assert parameter_count(m) == counted == 52 * m**2 + 13 * m + 2 == 341_086_787
    assert 4.0e9 < needed_memory(m) < 4.2e9
    updater = MLPUpdater(seed=0, hidden=(7, 3))
    updater.init(START)
    held = sum(part.numel() * 4 for parts in updater.saved()["layers"].values() for part in parts)
    assert needed_memory(6, (7, 3)) == held


def test_only_the_papers_u_is_called_the_papers():
    assert MLPUpdater(seed=0).description == "the paper's MLP 2m-8m-4m-m"
    stable = make_updater("mlp-stable", lr=None, seed=0)
    assert stable.description.startswith(
        "full MLP 2m-8m-4m-m, last layer from zero, inputs by their rms"
    )
    assert "not the paper's" in repr(make_updater("mlp-narrow", lr=None, seed=0))
    assert "512-256" in repr(make_updater("mlp-narrow", lr=None, seed=0))


def test_the_papers_rate_diverges_where_the_stabilisers_descend():
    """What docs/updaters.md says of it, and why mlp-stable exists."""
    curvatures, m = torch.logspace(-1, 0, 64), 64
    start = torch.randn(m, generator=torch.Generator().manual_seed(0))
    losses = {}
    for name, lr in (("mlp", None), ("mlp-stable", 1e-4)):
        updater = make_updater(name, lr=lr, seed=0)
        updater.init(start)
        params = start
        for _ in range(150):
            update = updater.update(params, lambda p: (curvatures * p.square()).sum() / 2)
            params = update.params
        losses[name] = update.loss
    assert not torch.isfinite(losses["mlp"])
    assert losses["mlp-stable"] < 0.1


def test_a_zero_last_layer_leaves_the_first_update_out():
    updater = MLPUpdater(1e-3, seed=0, zero_last=True)
    updater.init(START)
    first = updater.update(START, quadratic)
    assert torch.equal(first.params, START)
    second = updater.update(START, quadratic)
    assert second.stats["updater/loss"] < first.loss


def test_the_bound_holds_and_does_not_stop_the_learning():
    far = 100 * START
    updater = MLPUpdater(1.0, seed=0, bound=0.01)  # a rate that drives tanh into its ends
    updater.init(far)
    largest = max(
        float((updater.update(far, quadratic).params - far).abs().max()) for _ in range(20)
    )
    assert 0.009 < largest <= 0.01 * (1 + 1e-3)  # float32 of far itself
    updater = MLPUpdater(1e-3, seed=0, bound=0.01)
    updater.init(START)
    params = START
    for _ in range(300):
        params = updater.update(params, quadratic).params
    assert quadratic(params) < 0.1 * quadratic(START)


def test_rms_inputs_do_not_depend_on_the_scale_of_a_block():
    updater = MLPUpdater(1e-3, seed=0, scaling="rms", blocks=(2, 4))
    updater.init(START)
    grad = torch.randn(6, generator=torch.Generator().manual_seed(1))
    scaled = torch.cat([1e6 * grad[:2], 1e-6 * grad[2:]])
    inputs = updater._inputs(START, grad)
    torch.testing.assert_close(updater._inputs(3 * START, scaled), inputs)
    for part in (inputs[:6], inputs[6:8], inputs[8:]):
        torch.testing.assert_close(part.square().mean(), torch.tensor(1.0))
    assert torch.isfinite(updater._inputs(START, torch.zeros(6))).all()
    whole = MLPUpdater(1e-3, seed=0, scaling="rms")
    assert not torch.allclose(whole._inputs(START, scaled), inputs)
    with pytest.raises(InputError, match="blocks add up to 6, there are 5"):
        updater.init(START[:5])


def test_the_leak_takes_its_share_of_the_last_layer():
    ends = []
    for leak in (0.0, 0.25):
        updater = MLPUpdater(1e-3, seed=0, leak=leak)
        updater.init(START)
        updater.update(START, quadratic)
        ends.append({k: parts[0] for k, parts in updater.saved()["layers"].items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value * (0.75 if name[-1] == "3" else 1))


def test_too_little_memory_or_disk_is_refused_before_anything_is_allocated(monkeypatch, tmp_path):
    updater = MLPUpdater(seed=0)
    need = needed_memory(6)
    monkeypatch.setattr(learned_updaters, "available_memory", lambda device: need - 1)
    monkeypatch.setattr(learned_updaters.Moments, "zeros", lambda *_: pytest.fail("allocated"))
    with pytest.raises(
        InputError, match=r"needs 0\.0 GB and 0\.0 GB are free: take a narrower one"
    ):
        updater.init(START)
    path = tmp_path / "runs" / "later"
    with pytest.raises(InputError, match=r"2561 parameters needs 4\.1 GB and 0\.0 GB"):
        updater.check_room(2561, path)
    monkeypatch.setattr(learned_updaters, "available_memory", lambda device: 2**40)
    updater.check_room(2561, path)
    monkeypatch.setattr(learned_updaters, "available_disk", lambda path: 12_278_000_000)
    with pytest.raises(InputError, match=r"3 checkpoints of the updater need 12\.3 GB"):
        updater.check_room(2561, path)
    for fits in (MLPUpdater(seed=0, hidden=(512, 256)), CoordinatewiseUpdater(seed=0)):
        fits.check_room(2561, path)
    assert not path.exists()


def test_the_memory_of_this_machine(monkeypatch):
    free = learned_updaters.available_memory(torch.device("cpu"))
    assert 1e8 < free < 1e14
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert learned_updaters.available_memory(torch.device("cpu")) > 1e8


def test_states_of_other_networks_are_refused():
    narrow, other = (MLPUpdater(seed=0, hidden=(size, 3)) for size in (4, 5))
    narrow.init(START)
    with pytest.raises(InputError, match="updater of other widths"):
        other.load_state_dict(narrow.state_dict())
    with pytest.raises(InputError, match="float32"):
        narrow.init(START.double())
    small, large = (CoordinatewiseUpdater(seed=0, width=width) for width in (4, 8))
    with pytest.raises(InputError, match="not this updater's weights"):
        large.load_network(small.network.state_dict())

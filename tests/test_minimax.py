"""Machine vs Machine's games, AttNet and best responses: autograd, equal bits, known answers."""

import copy
from functools import partial

import pytest
import torch
from conftest import Linear, undefended
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from advgame.attacks import fgsm
from advgame.classifiers import SmallCNN
from advgame.data import Batches, ImageSet, Splits, load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import score
from advgame.games.minimax import Minimax, SensitivityTraining
from advgame.health import network_signs
from advgame.run.devices import make_fabric
from advgame.solvers import Optimistic, maximin, sensitivity, simultaneous
from advgame.threat import L2, Linf
from agents.attacker_network import AttackerPlayer
from agents.attackers import load_network
from agents.attnet import AttNet
from agents.best_response import Ascent, Effort, best_response, errors, kept_responses

SHAPE = (1, 2, 2)


def smooth(seed=0, classes=3):
    """A small network without kinks, in fp64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def batch(n=8, classes=3, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=rng, dtype=torch.float64) * 0.4 + 0.3
    return x, torch.randint(classes, (n,), generator=rng)


def flat(tensors):
    return torch.cat([one.detach().flatten() for one in tensors])


def test_the_penalty_is_the_total_derivative_of_eq_6_to_first_order():
    """For z = x + η ∇ₓl the gradient of eq. 7 with γ = ηN differs from eq. 6 by O(η²)."""
    model, (x, y) = smooth(), batch()
    errors = []
    for eta in (0.2, 0.1, 0.05):
        leaf = x.clone().requires_grad_()
        losses = cross_entropy(model(leaf), y, reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        z = leaf + eta * slope
        total = torch.autograd.grad(cross_entropy(model(z), y), list(model.parameters()))
        defender = Defender(copy.deepcopy(model))
        defender.backward(z, y, sensitivity=eta)
        ours = [p.grad for p in defender.module.parameters()]
        errors.append(float((flat(ours) - flat(total)).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_the_penalty_of_a_linear_classifier_by_hand():
    """Two classes, weights ±w: l = log(1 + e^{-m}), ∂l/∂x = -2w σ(-m) for label 1."""
    w = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    model = Linear(torch.stack([-w, w]), torch.zeros(2, dtype=torch.float64)).double()
    x, y = batch(5)[0], torch.ones(5, dtype=torch.int64)
    values = []
    for s in (0.0, 0.7):
        defender = Defender(copy.deepcopy(model), lr=1.0, momentum=0.0, weight_decay=0.0)
        defender.backward(x, y, s)
        values.append(flat(p.grad for p in defender.module.parameters()))
    leaf = w.clone().requires_grad_()
    margin = 2 * x.flatten(1) @ leaf
    slope = 2 * torch.sigmoid(-margin)[:, None] * leaf
    (wanted,) = torch.autograd.grad(0.35 * slope.square().sum(1).mean(), leaf)
    added = (values[1] - values[0])[:8].view(2, 4)
    torch.testing.assert_close(added[1] - added[0], wanted)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_step_of_sens_and_lwa(penalty):
    model, (x, y) = smooth(), batch()
    game, threat = SensitivityTraining(Linf(0.1), penalty), Linf(0.1)
    defender = Defender(copy.deepcopy(model), lr=0.1, momentum=0.0, weight_decay=0.0)
    twin = Defender(copy.deepcopy(model), lr=0.1, momentum=0.0, weight_decay=0.0)
    result = game.step(defender, x, y, torch.Generator())
    z = fgsm(threat).perturb(model, x, y)
    assert torch.equal(result.x_adv, z)
    twin.backward(z, y, penalty * 0.1)
    twin.step()
    assert torch.equal(flat(defender.module.parameters()), flat(twin.module.parameters()))
    with pytest.raises(InputError, match="penalty"):
        SensitivityTraining(threat, -0.1)


def game_of(direction, seed=0, dropout=0.0, **settings):
    torch.manual_seed(seed)
    player = AttackerPlayer(AttNet(SHAPE, 3, hidden=5, dropout=dropout).double())
    player.optimizer = SGD(player.module.parameters(), 0.2)
    return Minimax(Linf(0.1), player, direction, **settings)


@pytest.mark.parametrize("threat", [L2(0.5), Linf(torch.full((8,), 0.1))])
def test_sens_is_for_one_radius_in_the_maximum_norm(threat):
    with pytest.raises(InputError, match="L∞ ball with one eps"):
        SensitivityTraining(threat)


def test_a_partly_frozen_classifier_is_fine_tuned():
    (x, y), model = batch(), smooth()
    model[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    defender = Defender(model, lr=0.1, momentum=0.0, weight_decay=0.0)
    network = AttNet(SHAPE, 3, hidden=8).double()
    Minimax(Linf(0.1), AttackerPlayer(network)).step(defender, x, y, torch.Generator())
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"3.weight", "3.bias"}


@pytest.mark.parametrize("name", ["minimax", "alt", "maximin"])
def test_a_step_is_algorithm_1(name):
    """From the same old point: v up along ∂f/∂v, u down along ∂(f + γ/2 ‖∂f/∂v‖²)/∂u."""
    direction = {
        "minimax": sensitivity(0.8),
        "alt": simultaneous,
        "maximin": maximin(sensitivity(0.8)),
    }[name]
    (x, y), game = batch(), game_of(direction)
    defender = Defender(smooth(), lr=0.1, momentum=0.0, weight_decay=0.0)
    f, g = copy.deepcopy(defender.module), copy.deepcopy(game.attacker.module)
    u, v = list(f.parameters()), list(g.parameters())
    risk = cross_entropy(f((x + 0.1 * g(x, y)).clamp(0, 1)), y)
    du = torch.autograd.grad(risk, u, create_graph=True)
    dv = torch.autograd.grad(risk, v, create_graph=True)
    if name == "minimax":
        du = torch.autograd.grad(risk + 0.4 * sum(d.square().sum() for d in dv), u)
    if name == "maximin":
        dv = torch.autograd.grad(risk - 0.4 * sum(d.square().sum() for d in du), v)
    result = game.step(defender, x, y, torch.Generator())
    wanted = flat(p - 0.1 * d for p, d in zip(u, du, strict=True))
    torch.testing.assert_close(flat(defender.module.parameters()), wanted)
    wanted = flat(p + 0.2 * d for p, d in zip(v, dv, strict=True))
    torch.testing.assert_close(flat(game.attacker.module.parameters()), wanted)
    torch.testing.assert_close(result.losses.mean(), risk.detach())
    assert float((result.x_adv - x).abs().max()) <= 0.1 + 1e-12


def test_equal_bits_and_resuming_too():
    x, y = batch()

    def fresh():
        return Defender(smooth(), algorithm="adam", lr=0.01), game_of(Optimistic())

    def play(defender, game, steps):
        for _ in range(steps):
            game.step(defender, x, y, torch.Generator())

    (one, first), (two, second) = fresh(), fresh()
    play(one, first, 4)
    play(two, second, 2)
    third, game = fresh()
    third.module.load_state_dict(two.module.state_dict())
    third.load_state_dict(copy.deepcopy(two.state_dict()))
    game.load_state_dict(copy.deepcopy(second.state_dict()))
    play(third, game, 2)
    assert torch.equal(flat(one.module.parameters()), flat(third.module.parameters()))


def test_sens_learns_in_half_precision_too():
    """Fabric's wrapper forbids a second backward pass there."""
    fabric = make_fabric("cpu", 1, "bf16-mixed")
    x, y = batch()
    for s in (0.0, 0.5):
        defender = Defender(smooth().float(), fabric=fabric)
        defender.backward(x.float(), y, s)
        grads = flat(p.grad for p in defender.module.parameters())
        assert torch.isfinite(grads).all()
        full = Defender(smooth().float())
        full.backward(x.float(), y, s)
        wanted = flat(p.grad for p in full.module.parameters())
        torch.testing.assert_close(grads, wanted, rtol=0.05, atol=0.01)


def test_what_is_logged_is_where_the_common_step_begins():
    (x, y), game = batch(), game_of(simultaneous, ascent_steps=3)
    defender = Defender(smooth(), lr=0.0, momentum=0.0, weight_decay=0.0)
    network = copy.deepcopy(game.attacker.module)
    optimizer = SGD(network.parameters(), 0.2)
    for _ in range(2):
        optimizer.zero_grad()
        z = (x + 0.1 * network(x, y)).clamp(0, 1)
        (-cross_entropy(defender.module(z), y)).backward()
        optimizer.step()
    result = game.step(defender, x, y, torch.Generator())
    torch.testing.assert_close(result.x_adv, (x + 0.1 * network(x, y)).clamp(0, 1).detach())


def test_an_adam_defender_has_no_look_ahead():
    with pytest.raises(InputError, match="SGD"):
        Defender(smooth(), algorithm="adam").look_ahead()
    with pytest.raises(InputError, match="unknown algorithm"):
        Defender(smooth(), algorithm="lion")


@pytest.mark.parametrize("bound", ["tanh", "clip"])
def test_attnet_stays_in_the_ball_and_sees_the_label_without_asking(bound):
    torch.manual_seed(0)
    network = AttNet(SHAPE, 3, hidden=20, bound=bound, scale=0.5, centre=False)
    with torch.no_grad():
        network.layers[-1].weight *= 100  # far beyond the bound, were there no scale
    x, y = batch(50)
    x, attack = x.float(), network.attack(Linf(0.1))
    made = attack.run(smooth(), x, y)
    assert (made.forwards, made.backwards) == (0, 0)
    assert float((made.x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(made.x_adv, attack.run(smooth(), x, (y + 1) % 3).x_adv)
    assert torch.equal(made.x_adv, attack.run(smooth(), x, y).x_adv), "no dropout"


def test_attnets_scale_is_the_size_of_each_images_outputs_before_the_bound():
    torch.manual_seed(0)
    network, (x, y) = AttNet(SHAPE, 3, hidden=20, dropout=0.0, scale=1.5).double(), batch(50)
    size = network.unbounded(x, y).flatten(1).square().mean(1).sqrt()
    # up to the tiny mean square that guards against an output of 0
    torch.testing.assert_close(size, torch.full_like(size, 1.5), rtol=0.05, atol=0)
    torch.testing.assert_close(network(x, y), network.unbounded(x, y).tanh())
    network.scale = 0
    label = torch.eye(3).double()[y]
    pixels = 2 * x.flatten(1) - 1
    for network.centre in (True, False):
        mean = pixels.mean(1, keepdim=True) * network.centre
        raw = network.layers(torch.cat([pixels - mean, label], 1)).view_as(x)
        assert torch.equal(network.unbounded(x, y), raw)
    with torch.no_grad():
        for p in network.layers[-1].parameters():
            p.zero_()
    network.scale = 1.5
    network(x, y).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert not network(x, y).any(), "an output of 0 stays 0"


def test_a_fresh_attnet_on_digits_still_attacks_each_image_for_itself(digits):
    """With this seed the network to the letter has spread 0.000, saturated 1.00 and error .23."""
    model, data, threat = undefended(digits), digits.validation, Linf(0.15)
    fresh = partial(AttNet, digits.train.shape, 10)
    network = Ascent(model, digits.train, threat, fresh, Effort(), seed=1).run(600)
    found = network_signs(network, data.floats(), data.labels)
    assert found["spread"] > 0.05
    assert found["saturated"] < 0.5
    assert float(errors(model, network.attack(threat), data).mean()) > 0.5


@pytest.mark.slow
def test_a_fresh_attnet_defeats_a_plain_mnist_classifier(real_data):
    """Error .50 at the least after 6,000 steps; the network to the letter is at .30 and dead."""
    data = load_data("mnist", real_data, train_n=20000)
    model = undefended(data)
    fresh = partial(AttNet, data.train.shape, 10)
    network = Ascent(model, data.train, Linf(0.15), fresh, Effort()).run(6000)
    attack = network.attack(Linf(0.15))
    assert float(errors(model, attack, data.validation).mean()) >= 0.5


@pytest.mark.slow
def test_an_attnet_stays_alive_in_a_game_on_mnist(real_data):
    """With pixels in [-1, 1] the spread is 0.01 after these steps, between classes too."""
    data = load_data("mnist", real_data, train_n=20000)
    torch.manual_seed(0)
    network = AttNet(data.train.shape, 10)
    game = Minimax(Linf(0.15), AttackerPlayer(network), simultaneous)
    defender = Defender(SmallCNN(data.train.shape, 10), algorithm="adam", lr=1e-3, weight_decay=0)
    batches = Batches(data.train, 128, 0)
    for _ in range(400):
        game.step(defender, *batches.next(), torch.Generator())
    found = network_signs(network, data.validation.floats(), data.validation.labels)
    assert found["spread"] > 0.1
    assert found["saturated"] < 0.5


def line(n=64):
    """A boundary at pixel sum 2, images 0.024 to 0.204 per pixel from it on either side."""
    model = Linear(torch.tensor([[-1.0] * 4, [1.0] * 4]), torch.tensor([2.0, -2.0]))
    labels = torch.arange(n) % 2
    distance = torch.linspace(0.024, 0.204, n) * (2 * labels - 1)
    x = (0.5 + distance).view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()
    return model, ImageSet.from_floats(x, labels, 2)


def test_a_best_response_finds_the_best_attack_on_a_line():
    """It must push every pixel by ε against the label: accuracy is the share further than ε."""
    model, data = line()
    threat = Linf(0.1)
    found = best_response(model, data, data, threat, Effort(150, lr=1e-2), seed=3)
    wanted = score(model, data, fgsm(threat), torch.Generator())[1]
    accuracy = score(model, data, found.network.attack(threat), torch.Generator())[1]
    assert accuracy == pytest.approx(wanted, abs=0.02)
    assert accuracy == min(found.restarts)
    again = best_response(model, data, data, threat, Effort(150, lr=1e-2), seed=3)
    assert torch.equal(flat(again.network.parameters()), flat(found.network.parameters()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_best_response_keeps_the_strongest_restart():
    """The first network here cannot learn, the second can."""
    model, data = line()
    networks = iter([AttNet(SHAPE, 2), AttNet(SHAPE, 2)])

    def make():
        network = next(networks)
        made.append(network)
        if len(made) == 1:
            network.layers[-1].weight.register_hook(torch.zeros_like)
            network.layers[-1].bias.register_hook(torch.zeros_like)
            with torch.no_grad():
                network.layers[-1].weight.zero_()
                network.layers[-1].bias.zero_()
        return network

    made, effort = [], Effort(60, lr=1e-2)
    found = best_response(model, data, data, Linf(0.1), effort, attackers=make)
    assert found.network is made[1]
    assert found.restarts[0] == 1.0 > found.restarts[1]
    with pytest.raises(InputError, match="restarts"):
        Effort(1, restarts=0)


def test_restarts_are_kept_as_files_and_only_what_is_missing_is_trained(tmp_path):
    model, data = line()
    splits, effort, networks = Splits("line", data, data, data), Effort(30, lr=1e-2), []

    def make():
        """The first is stunted: its steps lead nowhere."""
        networks.append(AttNet(SHAPE, 2, hidden=8))
        if len(networks) == 1:
            for p in networks[0].parameters():
                p.register_hook(torch.zeros_like)
        return networks[-1]

    def kept():
        return kept_responses(
            tmp_path, "a", {"why": "test"}, model, splits, Linf(0.1), effort,
            seed=3, attackers=make,
        )  # fmt: skip

    paths = kept()
    assert [path.name for path in paths] == ["a-0.safetensors", "a-1.safetensors"]
    strongest, second = load_network(tmp_path / "a.safetensors"), load_network(paths[1])
    assert torch.equal(flat(strongest.parameters()), flat(second.parameters()))
    first_found, found = strongest.about["validation_accuracies"]
    assert found < first_found
    before = {path.name: load_file(path) for path in tmp_path.iterdir()}
    paths[1].unlink()
    (tmp_path / "a.safetensors").unlink()
    kept()
    assert len(networks) == 3, "the first restart was there"
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    for name, weights in before.items():
        again = load_file(tmp_path / name)
        assert all(torch.equal(again[key], value) for key, value in weights.items())

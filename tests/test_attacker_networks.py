"""Attacker networks of every kind: as attacks, as best they can be taught, in files, misused."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from attacker_parts import ADTS, BALL, DIGIT, EPS, L2LS, NETWORKS, joint, known, network, player
from conftest import BatchNormNet, normed, seeded, undefended
from safetensors.torch import load_file, save_file
from torch import nn

from advgame.attacks import InputGradient, attacked, pgd
from advgame.attacks.distributional import DistributionalAttack, worst_of
from advgame.data import Batches
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation.measure import counted
from advgame.evaluation.sweeps import differences
from advgame.losses import cross_entropy, margin
from advgame.seeding import seeded_init, stream
from advgame.targets import shipped
from advgame.threat import L2, Linf
from agents import attacker
from agents.adt_networks import Encoder
from agents.attacker_file import write_file
from agents.attacker_network import AttackerPlayer, NetworkAttack
from agents.attackers import learned_name, load_attacker, load_network


@pytest.fixture(scope="module")
def victim():
    return shipped().model


@pytest.fixture(scope="module")
def frozen(digits):
    return undefended(digits, width=12)


@pytest.fixture
def few(digits):
    return digits.test.floats(slice(8)), digits.test.labels[:8]


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", ["exp", *ADTS])
def test_attacks_that_draw_count_their_passes_and_repeat_their_bits(kind, draws, victim, few):
    (x, y), attack = few, known(kind, draws=draws)
    with counted(victim) as calls, attacked(victim):
        result = attack.run(victim, x, y, rng=seeded())
    gradients = 4 if kind == "exp" else 2
    assert result.backwards == calls.backwards == 8 * gradients
    assert result.forwards == calls.forwards == 8 * (gradients + (draws if draws > 1 else 0))
    again, other = (attack.run(victim, x, y, rng=seeded(s)).x_adv for s in (0, 1))
    assert torch.equal(result.x_adv, again)
    assert not torch.equal(result.x_adv, other)
    many = list(attack.draw(victim, x, y, 3, seeded()))
    wanted = many[0] if draws == 1 else worst_of(victim, many, y)[0]
    assert torch.equal(result.x_adv, wanted)
    spread = differences(victim, x, y, many, BALL)
    assert 0 < spread["distance"] < 1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", ["exp", *NETWORKS])
def test_examples_are_in_each_images_own_ball_and_nothing_is_changed(kind, mode, few):
    (x, y), eps = few, torch.linspace(0.02, 0.3, 8)
    with seeded_init(0):
        model = BatchNormNet().train()
    model.net[1].eval()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    attack = replace(known(kind), threat=Linf(eps), mode=mode)
    if kind in ("exp", *ADTS):
        attack = replace(attack, draws=2)
    nets = [model] if kind == "exp" else [model, attack.network.train()]
    if kind in L2LS:
        with torch.no_grad():
            attack.network.body.factor.fill_(500.0)  # at the face
    before = copy.deepcopy([net.state_dict() for net in nets])
    x_adv = attack.run(model, x, y, rng=seeded()).x_adv
    size = (x_adv - x).abs().flatten(1).amax(1)
    assert (size <= eps + 1e-7).all()
    assert (size > (0.9 if kind in L2LS else 0.2) * eps).all()
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    for net, old in zip(nets, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
        assert all(p.requires_grad for p in net.parameters())
        assert net.training
    assert not model.net[1].training
    grads = [p.grad for net in nets for p in net.parameters()]
    assert torch.equal(grads[0], torch.ones_like(grads[0]))
    assert all(grad is None for grad in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_other_precisions_are_attacked_in_fp32_at_least(kind, dtype, few):
    (x, y), attack = few, known(kind)
    x = x.to(dtype)
    if kind in L2LS:
        with torch.no_grad():
            attack.network.body.factor.fill_(500.0)  # at the face
    result = attack.run(normed().to(dtype), x, y, rng=seeded())
    assert result.x_adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = (result.x_adv - x).abs()
    assert (size <= EPS + 1e-6).all()
    if kind in L2LS:  # and the ball is not that of half-precision arithmetic
        inside = (x > EPS) & (x < 1 - EPS)
        assert (size[inside] > EPS - 1e-6).double().mean() > 0.9


def taught(kind, model, data, steps=60, **settings):
    """A network after ``steps`` against a classifier that does not learn; its last entropy."""
    own, batches, rng = player(kind, lr=5e-3, **settings), Batches(data, 64, 0), seeded()
    defender = Defender(copy.deepcopy(model), lr=0.0, momentum=0.0, weight_decay=0.0)
    played = [joint(kind, own).step(defender, *batches.next(), rng).stats for _ in range(steps)]
    pairs = zip(model.parameters(), defender.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    ends = [float(stats["game/entropy"]) for stats in played[-10:] if "game/entropy" in stats]
    return own.module, sum(ends) / max(len(ends), 1)


def left(attack, model, data):
    """Accuracy under an attack, or without one."""
    x, y = data.floats(), data.labels
    x_adv = x if attack is None else attack.run(model, x, y, rng=seeded()).x_adv
    return float((model(x_adv).argmax(1) == y).float().mean())


def test_a_taught_l2l_network_is_an_attack(frozen, digits):
    """The more it is told, the stronger."""
    clean = left(None, frozen, digits.test)
    naive, grad = (
        left(taught(kind, frozen, digits.train)[0].attack(BALL), frozen, digits.test)
        for kind in (0, 1)
    )
    assert clean > 0.94
    assert naive < clean - 0.05
    assert grad < naive - 0.1
    assert grad < left(pgd(BALL, 20), frozen, digits.test) + 0.12
    assert grad < left(known(1), frozen, digits.test) - 0.1


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", ADTS)
def test_radii_from_numpy_draw_the_same_examples(kind, draws, frozen, digits):
    x, y = digits.test.floats()[:4], digits.test.labels[:4]
    made = []
    for eps in (torch.full((4,), EPS), torch.full((4,), EPS, dtype=torch.float64)):
        attack = NetworkAttack(network(kind), Linf(eps), draws)
        made.append(attack.run(frozen, x, y, rng=stream(0, "draws")).x_adv)
    assert torch.equal(*made)


@pytest.mark.parametrize("kind", ADTS)
def test_a_taught_generator_is_an_attack(kind, frozen, digits):
    net = taught(kind, frozen, digits.train, 50, lam=0.01)[0]
    clean = left(None, frozen, digits.test)
    one, ten = (left(NetworkAttack(net, BALL, k), frozen, digits.test) for k in (1, 10))
    assert clean > 0.94
    assert one < clean - 0.25
    assert ten <= one
    assert ten < left(known(kind, draws=10), frozen, digits.test) - 0.2
    assert ten < left(pgd(BALL, 20), frozen, digits.test) + 0.2
    assert left(DistributionalAttack(BALL, samples=2), frozen, digits.test) < clean - 0.25


def test_a_larger_lambda_leaves_a_generator_more_entropy(frozen, digits):
    ends = [taught("exp-am", frozen, digits.train, 50, lam=lam)[1] for lam in (0.01, 3.0)]
    assert ends[1] > ends[0] + 0.2
    implicit = [
        taught("imp-am", frozen, digits.train, 40, lam=lam, encoder_lr=1e-2)[1]
        for lam in (0.001, 3.0)
    ]
    assert implicit[1] > implicit[0] + 0.05


SAVED = [
    (2, {"scaling": "paper"}),
    (2, {"scaling": "paper", "width": "slim"}),
    *((kind, {"body": body, "ngf": 4, "scaling": "raw"})
      for kind in ADTS for body in ("small", "resnet-3blocks")),
    *(("attnet", {"bound": bound, "scale": 0.5, "centre": False}) for bound in ("tanh", "clip")),
]  # fmt: skip


def results(networks, model, x, y):
    """What each does with 10 queries per image, from the same seed."""
    return [one.attack(BALL, 10).run(model, x, y, rng=seeded()) for one in networks]


@pytest.mark.parametrize(("kind", "settings"), SAVED)
def test_a_saved_network_attacks_to_the_same_bits(kind, settings, tmp_path, victim, few):
    net = network(kind, **settings)
    if kind == 2 and "width" not in settings:
        with torch.no_grad():
            net.body.mix.copy_(torch.tensor([[-0.3, 0.7]]))  # it begins at 0
    net.save(tmp_path / "attacker.safetensors", {"seed": 3})
    loaded = load_attacker(tmp_path)
    assert loaded.about == {"seed": 3}
    assert loaded.settings == net.settings
    assert settings.items() <= loaded.settings.items()
    one, two = results([net, loaded], victim, *few)
    assert torch.equal(one.x_adv, two.x_adv)
    if kind in ADTS:
        assert two.forwards == 8 * 10, "the budget"
        torch.testing.assert_close(two.loss, margin(victim(two.x_adv), few[1]))
        assert learned_name(tmp_path / "g.safetensors", loaded.attack(BALL, 5)) == (
            "learned:g-worst-of-3"
        )
    assert learned_name(tmp_path / "good", loaded.attack(BALL, 3)) == "learned:good"
    (tmp_path / "lr0.01").mkdir()
    assert learned_name(tmp_path / "lr0.01", loaded.attack(BALL, 3)) == "learned:lr0.01"


def former(net):
    """What earlier versions wrote of a network."""
    at = net.settings
    if net.file_kind == "l2l":
        words = {"width": at["width"], "scaling": at["scaling"]}
        sizes = {"shape": json.dumps(at["shape"]), "gradients": str(at["gradients"])}
        return {"format": "advgame l2l attacker 1", **sizes, **words}
    formats = {"adt": "advgame adt generator 1", "attnet": "advgame attnet 2"}
    return {"format": formats[net.file_kind], "network": json.dumps(list(at.values()))}


@pytest.mark.parametrize(("kind", "settings"), SAVED)
def test_files_of_earlier_versions_are_read(kind, settings, tmp_path, victim, few):
    net = network(kind, **settings)
    write_file(tmp_path / "a.safetensors", net, former(net) | {"about": '{"seed": 3}'})
    loaded = load_attacker(tmp_path / "a.safetensors")
    assert loaded.about == {"seed": 3}
    one, two = results([net, loaded], victim, *few)
    assert torch.equal(one.x_adv, two.x_adv)


NEW, FIRST = "advgame attacker network 1", "advgame adt generator 1"
NAIVE = '{"shape": [1, 8, 8], "gradients": 0}'
RAW = '[[1, 8, 8], "exp-am", "small", 256, 4, "raw"]'


@pytest.mark.parametrize(
    ("metadata", "answer"),
    [
        ({}, "is no attacker"),
        ({"format": NEW}, "damaged or of another"),
        ({"format": NEW, "kind": "l2l", "network": "[1, 8, 8]"}, "damaged or of another"),
        ({"format": NEW, "kind": "gan", "network": NAIVE}, "damaged or of another"),
        ({"format": NEW, "kind": "l2l", "network": NAIVE}, "damaged or of another"),  # Grad's
        ({"format": "advgame l2l attacker 1", "shape": "[1, 8, 8]"}, "damaged or of another"),
        ({"format": FIRST}, "damaged or of another"),
        ({"format": FIRST, "network": RAW}, "raw gradients"),  # of how many images?
    ],
)
def test_files_that_hold_no_attacker_are_refused(metadata, answer, tmp_path):
    network().save(tmp_path / "good.safetensors")
    weights = load_file(tmp_path / "good.safetensors")
    about = {"about": "{}"} if metadata else {}
    save_file(weights, tmp_path / "odd.safetensors", metadata | about)
    for load in (load_attacker, load_network):
        with pytest.raises(InputError, match=answer):
            load(tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="no attacker"):  # of gradient steps
        attacker.load_attacker(tmp_path / "good.safetensors")


def test_a_text_file_is_no_attacker(tmp_path):
    (tmp_path / "a.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_attacker(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["exp", *NETWORKS])
def test_what_cannot_be_attacked_is_refused(kind, victim, few):
    (x, y), attack = few, known(kind)
    with pytest.raises(InputError, match="L2"):
        replace(attack, threat=L2(1.0))
    with pytest.raises(InputError, match="draws"):
        replace(attack, draws=0)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attack.run(victim, x * 255, y, rng=seeded())
    if kind not in (0, "attnet"):  # which ask the classifier nothing
        with pytest.raises(InputError, match="softmax"):
            attack.run(nn.Sequential(victim, nn.Softmax(1)), x, y, rng=seeded())
    if kind in ("exp", *ADTS):
        with pytest.raises(InputError, match="needs rng"):
            attack.run(victim, x, y)
    if kind != "exp":
        with pytest.raises(InputError, match=r"images of \(1, 8, 8\)"):
            attack.run(victim, x.expand(-1, 3, -1, -1), y, rng=seeded())
        gradients = attack.network.gradients
        if gradients > 0:
            with pytest.raises(InputError, match=f"{gradients} queries"):
                attack.network.attack(BALL, gradients - 1)


WRONG = [
    (1, {"gradients": -1}), (1, {"width": "huge"}), (1, {"scaling": "none"}),
    (1, {"shape": (1, 7, 8)}), ("exp-am", {"shape": (1, 7, 8)}), ("exp-am", {"body": "huge"}),
    ("exp-am", {"body": "resnet-3blocks", "ngf": 0}), ("exp-am", {"kind": "exp"}),
    ("exp-am", {"latent": 0}), ("exp-am", {"scaling": "sign"}), ("attnet", {"bound": "sigmoid"}),
    ("attnet", {"hidden": 0}), ("attnet", {"dropout": 1.0}), ("attnet", {"scale": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), WRONG)
def test_networks_that_there_are_not_are_refused(kind, settings):
    made = network(kind)
    with pytest.raises(InputError):
        type(made)(**{**made.settings, **settings})


def test_an_attnet_knows_its_classes_only(victim, few):
    with pytest.raises(InputError, match="10 classes"):
        known("attnet").run(victim, few[0], few[1] + 10)


def test_the_published_encoder_needs_larger_images():
    with pytest.raises(InputError, match="20 pixels"):
        Encoder(DIGIT, 4, "resnet-3blocks")


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"samples": 0}, {"draws": 0}, {"lr": 0.0}, {"betas": (1.0, 0.0)},
        {"lam": -1.0}, {"lam": math.nan},
    ],
)  # fmt: skip
def test_fits_that_cannot_be_made_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DistributionalAttack(BALL, **bad)


def test_a_network_from_a_file_is_told_to_learn_before_it_plays(tmp_path):
    path = tmp_path / "one.safetensors"
    network("attnet").save(path)
    known = load_network(path)
    with pytest.raises(InputError, match=r"frozen.*requires_grad_\(True\)"):
        AttackerPlayer(known)
    assert AttackerPlayer(known.requires_grad_(True)).module is known


def test_a_player_outside_of_a_game_climbs_too(frozen, digits):
    own, (x, y) = player(1, lr=5e-3), (digits.train.floats(slice(64)), digits.train.labels[:64])
    ends = []
    for _ in range(20):
        with attacked(frozen):
            x_adv = own.sample(InputGradient(frozen, x, y), BALL, seeded()).x_adv
            loss = cross_entropy(frozen(x_adv), y).mean()
            loss.backward()
        own.step()
        ends.append(float(loss.detach()))
    assert ends[-1] > ends[0] + 0.3

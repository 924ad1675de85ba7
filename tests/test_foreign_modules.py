"""Modules that are no plain ones: quantised, exported, scripted, not to be copied or saved."""

import copy
import threading
import warnings

import gymnasium as gym
import pytest
import torch
from torch import nn

import envs  # noqa: F401
from advgame.attacks import attacked, fgsm
from advgame.classifiers.foreign import check_savable, set_mode
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.training import DefenderTraining
from advgame.run.checkpoint import load_weights, save_weights
from advgame.run.folder import RunFolder
from advgame.run.loop import Trainer
from advgame.run.plan import TrainingPlan
from advgame.threat import Linf
from envs.strategy_selection import StrategySelectionVectorEnv

BALL = Linf(0.15)


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.subset(slice(12))


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def made(kind, model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of these ways old
        if kind == "quantised":
            return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        if kind == "exported":
            free = ({0: torch.export.Dim.AUTO},)
            return torch.export.export(model, (x[:4],), dynamic_shapes=free).module()
        if kind == "exported for 8":
            return torch.export.export(model, (x[:8],)).module()
        script = torch.jit.script(copy.deepcopy(model))
        return script if kind == "scripted" else Around(script)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exported", "scripted, wrapped"])
def test_exported_and_scripted_modules_are_the_module_that_they_came_from(kind, victim, few):
    model = made(kind, victim, few.floats())
    for name in ("pgd10", "aa:square"):
        want, got = (evaluate(one, few, BALL, (name,)).accuracy() for one in (victim, model))
        assert got == want
        assert want["clean"] == 1.0
    seen = []
    for one in (victim, model):
        env = gym.make_vec("advgame/Attack-v0", 4, classifier=one, data=few)
        env.reset(seed=0)
        seen.append(env.step(torch.zeros(4, 5, dtype=torch.int64))[1])
    torch.testing.assert_close(*seen)


class NoMode(nn.Module):
    """Its train() has another signature than torch's."""

    def forward(self, x):
        return x.flatten(1)

    def train(self):
        raise RuntimeError("never")


def test_a_module_whose_train_fails_is_told_so():
    with pytest.raises(InputError, match="cannot be put into evaluation mode"):
        set_mode(NoMode(), training=False)


def test_what_they_cannot_do_is_refused_for_its_true_reason(victim, few):
    x = few.floats()
    with pytest.raises(InputError, match=r"takes no hooks.*wrap it"):
        evaluate(made("scripted", victim, x), few, BALL, ("fgsm",))
    with pytest.raises(InputError, match="cannot take images of this shape"):
        evaluate(made("exported for 8", victim, x), few, BALL, ("fgsm",))
    exported = made("exported", copy.deepcopy(victim).requires_grad_(True), x)
    with pytest.raises(InputError, match="cannot be put into training mode"):
        Defender(exported)
    with (
        pytest.raises(InputError, match="cannot be put into training mode"),
        attacked(exported, "train"),
    ):
        pass


@pytest.mark.slow
def test_quantised_modules_are_attacked_without_gradients(victim, few):
    model = made("quantised", victim, few.floats())
    found = evaluate(model, few, BALL, ("pgd10", "aa:square")).accuracy()
    assert found["aa:square"] < found["clean"] == 1.0
    gym.make_vec("advgame/BlackBoxAttack-v0", 2, classifier=model, data=few).reset(seed=0)
    with pytest.raises(InputError, match=r"no gradient comes back.*BlackBoxAttack"):
        gym.make_vec("advgame/Attack-v0", 2, classifier=model, data=few)
    with pytest.raises(InputError, match="no weights that learn"):
        Defender(model)
    env = StrategySelectionVectorEnv(4, defender=Defender(model.requires_grad_(True)))
    env.reset(seed=0)
    with pytest.raises(InputError, match="no gradient reaches the weights"):
        env.step(env.action_space.sample())


def holding(kind, net):
    module = Around(net)
    if kind == "a lock":
        module.net.lock = threading.Lock()
    else:
        module.net.lock = torch.ones(1, requires_grad=True) * 2
    return module


def learner(digits, module, **plan):
    """A trainer about to begin."""
    rules = AdversarialTraining(BALL, lambda ball: None)
    game = DefenderTraining(rules, Defender(module), digits.train, 64, 0)
    return lambda run: Trainer(game, run, TrainingPlan(1, **plan), lambda one: {})


@pytest.mark.parametrize("kind", ["a lock", "no leaf"])
def test_a_module_that_cannot_be_copied_is_refused_before_work(kind, victim, few, digits, tmp_path):
    module = holding(kind, copy.deepcopy(victim).requires_grad_(True))
    assert evaluate(module, few, BALL, ("fgsm",)).accuracy()["clean"] == 1.0, "needs no copy"
    told = r"this Around cannot be copied \(its net\.lock\)"
    for name in ("Attack", "BlackBoxAttack"):
        with pytest.raises(InputError, match=f"frozen copy.*{told}"):
            gym.make_vec(f"advgame/{name}-v0", 2, classifier=module, data=few)
    with pytest.raises(InputError, match=f"look-ahead.*{told}"):
        StrategySelectionVectorEnv(4, defender=Defender(module))
    StrategySelectionVectorEnv(4, defender=Defender(module), reward_interval=0)
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    with pytest.raises(InputError, match=f"ema.*{told}"):
        learner(digits, module, ema=0.9)(run)
    learner(digits, module)(run)


class Tied(Around):
    """Two names for one weight, and a weight whose memory is not contiguous."""

    def __init__(self, net):
        super().__init__(net)
        self.again = net.head.weight
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)


class Extra(Around):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def with_buffer(net, value):
    module = Around(net)
    module.register_buffer("odd", value)
    return module


def test_shared_and_turned_weights_are_saved(victim, tmp_path):
    one, two = (Tied(copy.deepcopy(victim)) for _ in range(2))
    with torch.no_grad():
        one.again += 1
        one.turned += 1
    save_weights(one, tmp_path / "w.safetensors")
    load_weights(two, tmp_path / "w.safetensors")
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    check_savable(one)


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (Extra, "_extra_state"),
        (lambda net: with_buffer(net, torch.eye(3).to_sparse()), "odd"),
        (lambda net: with_buffer(net, torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)),
         "odd"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_before_training(odd, named, victim, digits, tmp_path):
    module = odd(copy.deepcopy(victim).requires_grad_(True))
    with pytest.raises(InputError, match=f"cannot be saved as safetensors: {named} "):
        check_savable(module)
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    with pytest.raises(InputError, match="cannot be saved as safetensors"):
        learner(digits, module)(run)
    with pytest.raises(InputError, match="cannot be saved"):
        run.checkpoints.save(1, {"defender": module}, {})
    folder = run.path / "checkpoints"
    assert not folder.exists() or not list(folder.iterdir()), "nothing half-written is left"


class Narrow(nn.Module):
    """Batch norm over one pixel, as at the end of a deep network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_are_refused_before_a_training(digits, dtype):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Narrow().to(dtype)

        def forward(self, x):
            return self.net(x.to(dtype))

    def training(network):
        rules = AdversarialTraining(BALL, lambda ball: fgsm(ball))
        return DefenderTraining(rules, Defender(network), digits.train, 8, 0)

    kind = str(dtype).replace(".", r"\.")
    with pytest.raises(InputError, match=rf"weights of {kind}.*call \.float\(\) on it"):
        training(Narrow().to(dtype))
    with pytest.raises(InputError, match=r"call \.float"):
        StrategySelectionVectorEnv(2, defender=Defender(Narrow().to(dtype)))
    kept = copy.deepcopy((network := Casting()).state_dict())
    game = training(network)
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
    game.step()


def test_a_batch_of_one_that_batch_norm_cannot_take(digits):
    for make in (
        lambda: gym.make("advgame/StrategySelection-v0", defender=Defender(Narrow())),
        lambda: gym.make_vec("advgame/StrategySelection-v0", 1, defender=Defender(Narrow())),
        lambda: DefenderTraining(
            AdversarialTraining(BALL, lambda ball: None), Defender(Narrow()), digits.train, 1, 0
        ),
    ):
        with pytest.raises(InputError, match=r"batches of one image \(Expected more than 1 value"):
            make()
    StrategySelectionVectorEnv(2, defender=Defender(Narrow()))

"""Bad input is refused where it comes in: names, actions, tasks, files."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Linear, seeded
from gymnasium import spaces
from torch import nn

import envs  # noqa: F401
from advgame.attacks import CarliniWagnerLinf, DistributionalAttack, FeatureAttack, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import as_line, check_classifier, evaluate
from advgame.evaluation.probes import outputs, stronger_attacks
from advgame.run.files import read_json
from advgame.run.folder import Metrics
from advgame.run.options import typed_options
from advgame.targets import shipped
from advgame.threat import Linf
from agents.attacker_file import write_file
from agents.attackers import load_attacker
from agents.attnet import AttNet
from envs.tasks import GymnasiumTask, make_task

BALL = Linf(0.15)


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.subset(slice(12))


def test_a_generator_of_names_is_read_once(few):
    found = evaluate(shipped().model, few, BALL, (name for name in ("fgsm",)))
    assert list(found.correct) == ["clean", "fgsm"]


def test_options_of_several_values_are_given_once(monkeypatch):
    import evaluate as script

    monkeypatch.setattr("sys.argv", ["x", "--attackers", "a", "--attackers=b"])
    with pytest.raises(InputError, match="--attackers is given twice"):
        typed_options(script.Config)


class Cooled(nn.Module):
    """A classifier with a temperature."""

    def __init__(self, temperature):
        super().__init__()
        self.net, self.temperature = shipped().model, temperature

    def forward(self, x):
        return self.net(x) / self.temperature


@pytest.mark.parametrize("temperature", [1, 10, 100, 1e4])
def test_a_temperature_that_blinds_cross_entropy_is_seen(temperature, digits):
    data = digits.test.subset(slice(200))
    found = stronger_attacks(Cooled(temperature), data, BALL, 0)
    assert ("logit_scale" in found) == (temperature > 1)


def test_copies_of_one_image_do_not_make_a_model_constant(few):
    same = few.subset(torch.zeros(5, dtype=torch.long))
    assert "constant_output" not in outputs(shipped().model, same)


@pytest.mark.parametrize("labels", [torch.tensor([0.9, 1.0]), torch.tensor([True, False])])
def test_labels_are_whole_numbers(labels):
    with pytest.raises(InputError, match="integer tensor"):
        ImageSet.from_floats(torch.rand(2, 1, 2, 2), labels, 2)


@pytest.mark.parametrize(
    ("logits", "answer"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), "floating-point"),
        (torch.zeros(2, 3, dtype=torch.long), "floating-point"),
        (torch.zeros(2, 3).to_sparse(), "dense"),
        (torch.zeros(2, 1), "one class only"),
    ],
    ids=["complex", "integer", "sparse", "one class"],
)
def test_outputs_of_other_kinds_are_refused_in_words(logits, answer):
    class Odd(nn.Module):
        def forward(self, x):
            dense = logits if logits.layout == torch.strided else logits.to_dense()
            return dense[: len(x)].to_sparse() if dense is not logits else dense[: len(x)]

    data = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2).long(), 2)
    with pytest.raises(InputError, match=answer):
        check_classifier(Odd(), data)


def test_the_callers_graph_is_left_alone(few):
    x, y = few.floats().requires_grad_(), few.labels
    model = Linear(torch.randn(10, 64, generator=seeded()))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    pool = few.floats(), few.labels
    for attack, victim in (
        (pgd(BALL, 2), model),
        (CarliniWagnerLinf(BALL, iterations=2, smallest_tau=0.1), model),
        (DistributionalAttack(BALL, steps=2), model),
        (FeatureAttack(BALL, *pool, targets=1, steps=1), net),
    ):
        made = attack.run(victim, x, y, rng=seeded()).x_adv
        assert not made.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("name", ["GAILCartPole", "GAILMountainCar"])
def test_integers_of_any_size_are_the_same_actions(name, dtype):
    found = []
    for kind in (np.int64, dtype):
        env = gym.make_vec(f"advgame/{name}-v0", 3)
        env.reset(seed=0)
        for _ in range(4):
            seen = env.step(np.zeros(3, kind))[0]
        found.append(torch.as_tensor(seen))
    assert torch.equal(*found)


def test_a_truth_value_is_no_action():
    env = gym.make_vec("advgame/GAILCartPole-v0", 2)
    env.reset(seed=0)
    with pytest.raises(InputError, match="must be integers"):
        env.step(np.zeros(2, bool))


@pytest.mark.parametrize(
    "settings",
    [{"gain": float("nan")}, {"price": float("inf")}, {"queries": 2.5}, {"start": "middle"},
     {"threat": 0.1}],
    ids=str,
)  # fmt: skip
def test_an_attack_environment_is_checked_when_it_is_made(settings):
    with pytest.raises(InputError):
        gym.make_vec("advgame/Attack-v0", 2, **settings)


class Odd(gym.Env):
    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Discrete(2)
    seen = np.zeros(3, np.float32)
    reward = 0.0

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return self.seen, self.reward, False, False, {}


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ({"seen": np.full(3, np.nan)}, "3,\\) finite numbers"),
        ({"seen": np.full(3, 1e300)}, "finite numbers"),
        ({"seen": np.zeros(1)}, "finite numbers"),
        ({"seen": np.zeros(4)}, "finite numbers"),
        ({"reward": float("nan")}, "no finite number"),
        ({"reward": 1e39}, "no finite number"),
        ({"reward": None}, "no finite number"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_strangers_task_returns_is_looked_at(what, answer, monkeypatch):
    monkeypatch.setitem(
        gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", Odd, max_episode_steps=9)
    )
    for name, value in what.items():
        monkeypatch.setattr(Odd, name, value)
    task = make_task("Odd-v0", 1)
    assert isinstance(task, GymnasiumTask)
    live = torch.ones(1, dtype=torch.bool)
    task.reset(live, seeded())
    with pytest.raises(InputError, match=f"Odd-v0 returned .*{answer}"):
        task.step(torch.zeros(1, dtype=torch.long), live)


def test_a_small_file_makes_no_large_network(tmp_path, monkeypatch):
    AttNet((1, 2, 2), 2, hidden=3).save(tmp_path / "a.safetensors")
    made = []
    build = AttNet.__init__

    def watched(self, *args, **more):
        build(self, *args, **more)
        made.append(next(self.parameters()).device.type)

    monkeypatch.setattr(AttNet, "__init__", watched)
    load_attacker(tmp_path / "a.safetensors")
    assert made == ["meta", "cpu"]
    sizes = '[[1, 2, 2], 2, 100000, 0.5, "tanh", 2.0, true]'
    about = {"format": "advgame attnet 2", "network": sizes, "about": "{}"}
    write_file(tmp_path / "b.safetensors", nn.Linear(1, 1), about)
    with pytest.raises(InputError, match="damaged or of another version"):
        load_attacker(tmp_path / "b.safetensors")
    assert made == ["meta", "cpu", "meta"], "its sizes were compared first"


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(InputError, match="no file"):
        read_json(tmp_path / "report.json")
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(InputError, match="no file"):
        Metrics.read(tmp_path / "metrics.csv")


@pytest.mark.parametrize("content", [{"accuracy": 3}, {"accuracy": {"clean": "x"}, "flags": []}])
def test_a_report_of_something_else_is_told_in_words(content):
    with pytest.raises(InputError, match="damaged, or no classifier's"):
        as_line(content)

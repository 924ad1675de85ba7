"""Agents of Stable-Baselines3 as attacks: `agents.SB3Attack`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import seeded
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC

from advgame import attacks
from advgame.attacks.gradient_steps import Menu
from advgame.attacks.patches import Patches
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.targets import shipped
from advgame.threat import L2, Linf
from agents import SB3Attack, load_attacker
from agents.attacker import Attacker
from agents.sb3 import as_feature_policy
from envs import make_sb3
from envs.actions import StepBox

ATTACK, PATCHES = "advgame/Attack-v0", "advgame/BlackBoxAttack-v0"
FEATURES = spaces.Box(-1, 1, (len(Menu().feature_names),), np.float32)


def fresh(kind, name, policy="MlpPolicy", **settings):
    """An algorithm that has learned nothing: its networks choose by what they see all the same."""
    small = {} if kind in (PPO, RecurrentPPO) else {"buffer_size": 64}
    return kind(policy, make_sb3(name, 2, **settings), seed=0, **small)


def constant(action, space, sees=FEATURES):
    """An agent that always does the same."""

    def predict(seen, *, deterministic):
        rows = len(seen["features"] if isinstance(seen, dict) else seen)
        return np.stack([action] * rows), None

    return SimpleNamespace(predict=predict, observation_space=sees, action_space=space)


@pytest.fixture
def images(digits):
    return digits.validation.floats()[:40], digits.validation.labels[:40]


def test_it_attacks_as_the_same_policy_of_ours_does(images):
    ppo = fresh(PPO, ATTACK)
    menu = Menu()
    with torch.no_grad():  # a fresh head likes one option throughout
        ppo.policy.action_net.weight.mul_(100)
    ours = Attacker(as_feature_policy(ppo.policy, menu.sizes), menu, "clean", {})
    for ball in (Linf(0.2), L2(1.0)):
        want = ours.attack(ball, 6).run(shipped().model, *images, rng=seeded())
        found = SB3Attack(ball, ppo, 6).run(shipped().model, *images, rng=seeded())
        assert torch.equal(found.x_adv, want.x_adv)
        assert torch.equal(found.fooled, want.fooled)
        assert (found.forwards, found.backwards) == (want.forwards, want.backwards)
    assert 0 < int(found.fooled.sum()) < len(found.fooled)


def test_every_form_of_an_action_is_the_step_that_it_means(images):
    """Steps of ε/4 along the gradient of the cross-entropy: PGD's own loop gives the same."""
    menu = Menu()
    index = np.array(menu.index(1 / 4, 0, "ce", "steepest", "on"))
    box = StepBox(menu)
    chosen = ("loss_ce", "direction_steepest", "move_on")
    point = [-0.2, -1, *(name in chosen for name in box.names[2:])]  # ε/4 of 2ε to ε/16
    forms = [
        constant(index, spaces.MultiDiscrete(list(menu.sizes))),
        constant(np.ravel_multi_index(index, menu.sizes), spaces.Discrete(432)),
        constant(np.array(point, dtype=np.float32), box.space),
    ]
    want = attacks.GradientAttack(Linf(0.2), 5, 0.2 / 4, stop_when_fooled=True)
    wanted = want.run(shipped().model, *images)
    assert wanted.fooled.any()
    for agent in forms:
        found = SB3Attack(Linf(0.2), agent, 6).run(shipped().model, *images, rng=seeded())
        assert torch.equal(found.fooled, wanted.fooled)
        torch.testing.assert_close(found.x_adv[found.fooled], wanted.x_adv[found.fooled])
        assert (found.forwards, found.backwards) == (wanted.forwards, wanted.backwards)


@pytest.mark.parametrize(
    ("kind", "name", "policy", "settings"),
    [
        (PPO, ATTACK, "MlpPolicy", {}),
        (DQN, ATTACK, "MlpPolicy", {"flatten_actions": True}),
        (SAC, ATTACK, "MlpPolicy", {"continuous": True}),
        (PPO, ATTACK, "MultiInputPolicy", {"images": True}),
        (PPO, PATCHES, "MlpPolicy", {}),
        (DQN, PATCHES, "MultiInputPolicy", {"images": True, "flatten_actions": True}),
    ],
)
def test_a_saved_agent_attacks_as_the_one_that_was_saved(
    kind, name, policy, settings, images, tmp_path
):
    agent = fresh(kind, name, policy, **settings)
    agent.save(tmp_path / "agent.zip")
    x, y = images
    of_it, of_file = (
        SB3Attack(Linf(0.3), one, 5).run(shipped().model, x, y, rng=seeded())
        for one in (agent, str(tmp_path / "agent"))
    )
    assert torch.equal(of_it.x_adv, of_file.x_adv)
    assert not torch.equal(of_file.x_adv, x)
    assert (of_file.x_adv - x).abs().max() <= 0.3 + 1e-6
    assert torch.equal(of_file.fooled, shipped().model(of_file.x_adv).argmax(1) != y)
    assert of_file.forwards <= 5 * len(x)
    assert (of_file.backwards == 0) == (name == PATCHES)


def test_an_evaluation_takes_it_by_name(digits, tmp_path):
    path = tmp_path / "ppo.zip"
    fresh(PPO, ATTACK).save(path)
    data, ball = digits.test.first(20), Linf(0.3)
    named = f"agents:SB3Attack('{path}', queries=4)"
    given = {"mine": SB3Attack(ball, path, 4)}
    found = evaluate(shipped().model, data, ball, (named, "mine"), extra=given)
    assert found.forwards[named] == found.forwards["mine"] > 20
    with pytest.raises(InputError, match=r'--attacks "agents:SB3Attack\(.*ppo.zip'):
        load_attacker(path)


def test_agents_that_are_no_attack_are_refused(images, tmp_path):
    model, ball = shipped().model, Linf(0.1)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(InputError, match=r"text\.zip holds no agent"):
        SB3Attack(ball, tmp_path / "text.zip")
    with pytest.raises(InputError, match=r"nowhere\.zip holds no agent.*No such file"):
        SB3Attack(ball, tmp_path / "nowhere.zip")
    with pytest.raises(InputError, match="queries must be 1 or above"):
        SB3Attack(ball, tmp_path, 0)

    def refused(agent, words, on=images, **settings):
        with pytest.raises(InputError, match=words):
            SB3Attack(ball, agent, 4, **settings).run(model, *on, rng=seeded())

    refused(PPO("MlpPolicy", "CartPole-v1"), "are not advgame/Attack-v0's")
    short = Menu(losses=("ce",))
    agent = fresh(PPO, ATTACK, menu=short)
    refused(agent, r"needs the same as choices=")
    assert SB3Attack(ball, agent, 4, choices=short).run(model, *images, rng=seeded())
    refused(agent, "not those of its choices", choices=Patches((1, 8, 8)))
    seeing = fresh(PPO, ATTACK, "MultiInputPolicy", images=True)
    wide = torch.zeros(2, 1, 8, 9), torch.zeros(2, dtype=torch.int64)
    refused(seeing, r"sees images of \(1, 8, 8\); these are of \(1, 8, 9\)", on=wide)
    refused(RecurrentPPO("MlpLstmPolicy", make_sb3(ATTACK, 2)), "a memory")
    refused(constant(np.zeros(5), spaces.MultiDiscrete(list(Menu().sizes))), "integer indices")

"""Actions for agents that know no MultiDiscrete: a number for DQN, a box for SAC; CnnPolicy."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from test_environments import CASES, FORMS, same

import envs
from advgame.attacks.gradient_steps import LOSSES, Menu
from advgame.attacks.patches import Patches
from advgame.classifiers import make_classifier
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.strategy import StrategySpace
from agents.sb3 import policy_kwargs
from envs.actions import StepBox
from envs.attack import AttackVectorEnv
from envs.strategy_selection import StrategySelectionVectorEnv

ATTACK, STRATEGY = "advgame/Attack-v0", "advgame/StrategySelection-v0"
FLAT = [name for name, form in FORMS if "flatten_actions" in form]
OFF_POLICY = {"learning_starts": 8, "buffer_size": 100, "batch_size": 8, "seed": 0}


def sizes(name):
    return tuple(int(one) for one in gym.make(name).action_space.nvec)


@pytest.mark.parametrize("name", FLAT)
def test_one_number_means_what_the_indices_mean(name):
    lists, flat = gym.make_vec(name, 4), gym.make_vec(name, 4, flatten_actions=True)
    count = int(np.prod(sizes(name)))
    assert flat.single_action_space == gym.spaces.Discrete(count)
    lists.reset(seed=0)
    flat.reset(seed=0)
    lists.action_space.seed(1)
    for integer in (np.int64, np.int32, np.uint16):
        actions = lists.action_space.sample()
        numbers = np.ravel_multi_index(actions.T, sizes(name)).astype(integer)
        same(lists.step(actions), flat.step(numbers))


@pytest.mark.parametrize("name", FLAT)
def test_misuse_of_one_number_is_refused_and_changes_nothing(name):
    env, twin = (gym.make_vec(name, 3, flatten_actions=True) for _ in range(2))
    env.reset(seed=0)
    twin.reset(seed=0)
    right = np.zeros(3, int)
    largest = int(np.prod(sizes(name))) - 1
    for wrong in (right[:2], right[:, None], right - 1, right + largest + 1, right / 1, right > 0):
        with pytest.raises(InputError, match=r"actions must (be integers|have shape \(3,\))"):
            env.step(wrong)
    same(env.step(right + largest), twin.step(right + largest))


def test_too_many_combinations_are_refused():
    many = tuple(range(1, 60))
    with pytest.raises(InputError, match=r"1180 x 3 x 4 x 2 x 3 .* shorten the lists"):
        AttackVectorEnv(2, menu=Menu(step_sizes=many * 20), flatten_actions=True)
    space = StrategySpace(0.15, steps=many, step_size_units=tuple(range(1, 100)))
    with pytest.raises(InputError, match="more than 65536"):
        StrategySelectionVectorEnv(2, space=space, flatten_actions=True)
    with pytest.raises(InputError, match="leave out flatten_actions"):
        AttackVectorEnv(2, continuous=True, flatten_actions=True)
    with pytest.raises(InputError, match="flatten_actions"):  # its actions are one choice already
        gym.make("advgame/GAILCartPole-v0", flatten_actions=True)
    assert np.prod(Patches((3, 32, 32)).sizes) < 65536, "colours fit"


def point(menu, index):
    """The point of the box that means an action of the menu."""
    low, high = np.log2(min(menu.step_sizes)), np.log2(max(menu.step_sizes))
    size = 2 * (np.log2(menu.step_sizes[index[0]]) - low) / (high - low) - 1
    momentum = 2 * menu.momenta[index[1]] / max(menu.momenta) - 1
    scores = [np.eye(len(of))[i] for of, i in zip(menu.lists[2:], index[2:], strict=True)]
    return np.concatenate([[size, momentum], *scores]).astype(np.float32)


def test_points_of_the_box_are_the_steps_of_the_menu():
    lists, box = AttackVectorEnv(8), AttackVectorEnv(8, continuous=True)
    assert box.single_action_space == gym.spaces.Box(-1, 1, (11,), np.float32)
    assert box.steps.names[:3] == ("step_size", "momentum", f"loss_{LOSSES[0]}")
    seen, _ = lists.reset(seed=0)
    torch.testing.assert_close(seen, box.reset(seed=0)[0])
    lists.action_space.seed(2)
    for _ in range(12):
        actions = lists.action_space.sample()
        points = np.stack([point(lists.menu, index) for index in actions])
        one, two = lists.step(actions), box.step(points)
        torch.testing.assert_close(one[:4], two[:4], rtol=1e-3, atol=1e-3)


def test_the_box_reaches_what_lies_between():
    box = StepBox(Menu())
    middle = torch.zeros(1, 11)
    step, nearest = box.decode(middle)
    assert step.size.item() == pytest.approx(2**-1.5)  # of 2**1 and 2**-4
    assert step.momentum.item() == 0.25
    assert nearest.tolist() in ([[2, 1, 0, 0, 0]], [[3, 1, 0, 0, 0]])  # ties: the first
    ends, _ = box.decode(torch.tensor([[-1.0] * 11, [1.0] * 11]))
    assert ends.size.tolist() == [1 / 16, 2]
    assert ends.momentum.tolist() == [0, 0.5]
    short = StepBox(Menu(momenta=(0.25,), losses=("ce",), moves=("on", "best")))
    assert short.names == (
        "step_size", "direction_steepest", "direction_accumulated", "move_on", "move_best",
    )  # fmt: skip
    step, _ = short.decode(torch.tensor([[0.0, 0, 1, 0, 1]]))
    assert (step.momentum.item(), step.accumulated.item(), step.best.item()) == (0.25, True, True)
    only = Menu((1.0,), (0.0,), ("ce",), ("steepest",), ("on",))
    with pytest.raises(InputError, match="one step only"):
        AttackVectorEnv(2, menu=only, continuous=True)


def test_what_is_no_point_of_the_box_is_refused():
    env, twin = AttackVectorEnv(2, continuous=True), AttackVectorEnv(2, continuous=True)
    env.reset(seed=0)
    twin.reset(seed=0)
    right = np.zeros((2, 11), np.float32)
    bad = np.where(np.arange(11) == 3, np.nan, right)
    for wrong in (right[:, :5], right + 1.01, right - 1.01, bad, right.astype(int)):
        with pytest.raises(InputError, match=r"actions must (lie in \[-1, 1\]|be floats|have sh)"):
            env.step(wrong)
    same(env.step(right), twin.step(right.astype(float)))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_takes_them(name, form):
    settings = {**CASES[name], **form}
    single, many = gym.make(name, **settings), gym.make_vec(name, 2, **settings)
    arrays = envs.to_numpy(gym.make_vec(name, 2, **settings))
    adapter = envs.make_sb3(name, 2, **settings)
    assert single.action_space == many.single_action_space == adapter.action_space
    for env in (single, many, arrays):
        env.reset(seed=0)
    adapter.seed(0)
    adapter.reset()
    single.action_space.seed(0)
    action = single.action_space.sample()
    single.step(action)
    both = np.stack([action, action])
    _, reward, *_ = many.step(both)
    same(reward, arrays.step(both)[1])
    same(reward, adapter.step(both)[1])


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        (DQN, ATTACK, {"flatten_actions": True}),
        (DQN, "advgame/BlackBoxAttack-v0", {"flatten_actions": True}),
        (DQN, "advgame/GAILCartPole-v0", {}),
        (DQN, "advgame/GAILMountainCar-v0", {}),
        (SAC, ATTACK, {"continuous": True}),
        (SAC, "advgame/GAILCartPole-v0", {"env_id": "Pendulum-v1"}),
    ],
)
def test_dqn_and_sac_learn(kind, name, settings):
    model = kind("MlpPolicy", envs.make_sb3(name, 4, **settings), train_freq=1, **OFF_POLICY)
    before = [one.clone() for one in model.policy.parameters()]
    model.learn(32)
    moved = [not torch.equal(*pair) for pair in zip(before, model.policy.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.parametrize("side", [8, 32, 40])
def test_cnn_policies_see_images_of_any_size(side):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, side, side), generator=rng, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(16) % 10, 10)

    def env(**more):
        defender = Defender(make_classifier("small_cnn", data.shape, 10), lr=0.05)
        return envs.make_sb3(STRATEGY, 4, data=data, defender=defender, **more)

    kwargs = policy_kwargs("nature")
    ppo = PPO("CnnPolicy", env(), n_steps=2, batch_size=8, n_epochs=1, policy_kwargs=kwargs)
    ppo.learn(8)
    seen = torch.rand(2, 3, side, side, generator=rng)
    features = ppo.policy.extract_features(seen)
    assert features.shape == (2, 512)
    assert not torch.equal(features, ppo.policy.extract_features(1 - seen))
    if side == 32:
        dqn = DQN("CnnPolicy", env(flatten_actions=True), policy_kwargs=kwargs, **OFF_POLICY)
        dqn.learn(12)
        assert dqn.predict(seen.numpy())[0].shape == (2,)


def test_an_unknown_network_of_policies_is_refused():
    with pytest.raises(InputError, match="trunk or nature"):
        policy_kwargs("resnet")

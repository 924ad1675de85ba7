"""Attack and BlackBoxAttack: ends, rewards, costs, autoreset, adapters, the shipped classifier."""

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Counting
from gymnasium.vector import AutoresetMode
from torch import nn

from advgame.attacks.gradient_steps import Menu
from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.losses import margin
from advgame.targets import shipped
from advgame.threat import L2, Linf
from envs import make_sb3
from envs.attack import AttackVectorEnv
from envs.patches import BlackBoxAttackVectorEnv

IDS = ("advgame/Attack-v0", "advgame/BlackBoxAttack-v0")
VECTORS = (AttackVectorEnv, BlackBoxAttackVectorEnv)
EASY = Linf(0.3)  # about half of the images fall within a few random moves
# each environment with settings in which random play both succeeds and runs out of queries
BOTH_ENDS = {
    AttackVectorEnv: {"queries": 4, "threat": EASY},
    BlackBoxAttackVectorEnv: {"queries": 6, "threat": Linf(0.8)},
}


@pytest.mark.parametrize("name", IDS)
def test_vector_form_declares_next_step_and_keeps_to_it(name):
    settings = BOTH_ENDS[AttackVectorEnv if name == IDS[0] else BlackBoxAttackVectorEnv]
    env = gym.make_vec(name, num_envs=16, vectorization_mode="vector_entry_point", **settings)
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation.numpy())
    ended, ends = torch.zeros(16, dtype=torch.bool), [0, 0]
    env.action_space.seed(1)
    for _ in range(15):
        clean = env.unwrapped.state.x.clone()
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation.numpy())
        assert (info["queries"][ended] == 1).all()
        assert (reward[ended] == 0).all()
        assert not (terminated | truncated)[ended].any()
        changed = (env.unwrapped.state.x != clean).flatten(1).any(1)
        assert torch.equal(changed, ended), "a row gets a new image exactly after its end"
        ended = terminated | truncated
        spent = info["queries"] == settings["queries"]
        assert torch.equal(terminated, info["fooled"] | spent)
        assert not truncated.any(), "the budget is seen: its end is no time limit"
        ends[0] += int((terminated & info["fooled"]).sum())
        ends[1] += int((terminated & ~info["fooled"]).sum())
    assert min(ends) > 3, "both ends must occur"
    env.close()
    env.close()


@pytest.mark.parametrize("kind", VECTORS)
def test_a_batch_step_costs_one_forward_and_at_most_one_backward_per_row(kind):
    env = kind(16, classifier=Counting(shipped().model), queries=4, threat=EASY)
    model = env.model
    model.forwards = model.backwards = 0  # the pool has looked at every image
    env.reset(seed=0)
    assert (model.forwards, model.backwards) == (16, 0)
    for step in range(1, 12):
        env.step(env.action_space.sample())
        assert model.forwards == 16 * (step + 1), "resets within the step's own forward"
        assert model.backwards == (16 * step if kind is AttackVectorEnv else 0)


@pytest.mark.parametrize("kind", VECTORS)
def test_reward_is_gain_bonus_and_price(kind):
    env = kind(32, queries=5, threat=EASY, gain=2.0, bonus=3.0, price=0.25)
    assert env.pool.scale == pytest.approx(
        float(-margin(env.model(env.pool.data.floats()), env.pool.data.labels).mean()), rel=1e-5
    )
    _, info = env.reset(seed=0)
    best = info["best_margin"]
    done = torch.zeros(32, dtype=torch.bool)
    rises = 0
    for _ in range(8):
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        gained = (info["best_margin"] - best) / env.pool.scale
        want = 2 * gained + 3 * info["fooled"].float() - 0.25
        torch.testing.assert_close(reward, torch.where(done, 0.0, want))
        assert (gained[~done] >= 0).all()
        rises += int((gained[~done] > 0).sum())
        best, done = info["best_margin"], terminated | truncated
    assert rises > 10


@pytest.mark.parametrize("kind", VECTORS)
def test_reset_without_a_seed_goes_on(kind):
    env = kind(8)
    env.reset(seed=0)
    shown = env.state.x.clone()
    env.reset()
    assert not torch.equal(env.state.x, shown)
    env.reset(seed=0)
    assert torch.equal(env.state.x, shown)


def test_only_images_that_the_classifier_gets_right_are_attacked(digits):
    model = shipped().model
    wrong_labels = digits.train.labels.clone()
    wrong_labels[::2] = (wrong_labels[::2] + 1) % 10
    mixed = ImageSet(digits.train.images, wrong_labels, 10)
    env = AttackVectorEnv(4, data=mixed)
    right = model(mixed.floats()).argmax(1) == mixed.labels
    assert len(env.pool.data) == int(right.sum()) < 0.6 * len(mixed)
    _, info = env.reset(seed=0)
    assert (info["margin"] < 0).all()
    all_wrong = ImageSet(mixed.images[::2], mixed.labels[::2], 10)
    with pytest.raises(InputError, match="none of these images right"):
        AttackVectorEnv(
            4, data=all_wrong.subset(model(all_wrong.floats()).argmax(1) != all_wrong.labels)
        )


def test_every_image_is_attacked_once_before_one_comes_again(digits):
    env = AttackVectorEnv(5, data=digits.train.first(20), queries=2)
    count = len(env.pool.data)
    assert count == 20
    shown = []
    for _ in range(4):
        env.reset(seed=1 if not shown else None)
        shown.append(env.state.x.flatten(1))
    assert len(torch.cat(shown).unique(dim=0)) == 20


def test_the_classifier_given_is_not_touched_and_later_changes_do_not_matter():
    given = shipped().model.train().requires_grad_(True)
    before = copy.deepcopy(given.state_dict())
    env = AttackVectorEnv(8, classifier=given)

    def played():
        env.action_space.seed(5)
        seen = [env.reset(seed=0)[0]]
        for _ in range(5):
            *found, info = env.step(env.action_space.sample())
            seen += [*found, info["margin"]]
        return seen

    first = played()
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    assert given.training
    assert all(p.requires_grad and p.grad is None for p in given.parameters())
    with torch.no_grad():
        given.head.weight.zero_()
    assert all(torch.equal(*pair) for pair in zip(first, played(), strict=True))


def test_a_random_start_that_fools_ends_at_the_next_step():
    """A reset cannot end an episode: that it has succeeded is said by the first step."""
    env = AttackVectorEnv(64, start="random", threat=Linf(0.7), queries=3)
    env.reset(seed=0)
    at_once = env.state.fooled.clone()
    assert 0 < int(at_once.sum()) < 64
    env.action_space.seed(0)
    for _ in range(6):
        ended = env.done.clone()
        _, _, terminated, _, info = env.step(env.action_space.sample())
        assert terminated[at_once].all()
        at_once = ended & info["fooled"]
        assert not terminated[ended].any()
    assert at_once.any(), "resets within the run must have fooled too"


def test_each_episode_draws_its_budget():
    env = AttackVectorEnv(64, queries=(2, 5), price=0.0)
    env.reset(seed=0)
    lengths = set()
    for _ in range(10):
        *_, ended, _, info = env.step(env.action_space.sample())
        lengths |= set(info["queries"][ended & ~info["fooled"]].tolist())
    assert lengths == {2, 5}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.5)])
def test_points_stay_in_the_ball_whatever_is_played(kind, threat):
    env = kind(16, threat=threat, queries=12)
    env.reset(seed=0)
    for _ in range(15):
        env.step(env.action_space.sample())
        for point in (env.state.x_adv, env.state.best_x):
            assert (threat.size(point - env.state.x) <= threat.eps + 1e-6).all()
            assert point.min() >= 0
            assert point.max() <= 1


def test_black_box_keeps_what_raises_the_margin_and_sees_no_gradient():
    env = BlackBoxAttackVectorEnv(16, queries=40)
    env.reset(seed=0)
    accepted, highest = torch.zeros(16), env.state.margin
    for _ in range(60):
        before = env.state.best_x.clone()
        env.step(env.action_space.sample())
        state = env.state
        kept = state.kept.view(-1, 1, 1, 1)
        assert torch.equal(state.best_x, torch.where(kept, state.x_adv, before))
        begun = state.used == 1  # another image came: the one before was fooled or out of queries
        accepted = torch.where(begun, 0.0, accepted + state.kept)
        highest = torch.where(begun, state.margin, torch.maximum(highest, state.margin))
        assert torch.equal(state.accepted, accepted)
        assert torch.equal(state.best_margin, highest)
        assert not state.x_adv.requires_grad
    assert 0 < int(state.kept.sum()) < 16


def test_black_box_patches_lie_where_they_were_put():
    env = BlackBoxAttackVectorEnv(3, threat=Linf(0.1))
    env.reset(seed=0)
    patches = env.patches
    side = patches.sides.index(0.25)  # 2 of 8 pixels
    env.state.x.fill_(0.5)  # where a change of either sign shows
    env.state.best_x.fill_(0.5)
    env.step(np.array([[0, 0, side, 0, 0], [7, 7, side, 1, 0], [7, 0, 4, 0, 0]]))
    moved = env.state.x_adv - env.state.x
    wanted = torch.zeros(3, 1, 8, 8)
    wanted[0, :, :2, :2], wanted[1, :, 6:, 6:], wanted[2, :, 7, 0] = 0.1, -0.1, 0.1
    torch.testing.assert_close(moved, wanted)
    assert patches.draw(torch.tensor([[0, 0, side, 0, 0]])).sum() == 4


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", VECTORS)
def test_what_is_observed_and_told_is_no_reused_buffer(kind, images):
    env = kind(4, images=images, threat=EASY, queries=3)
    env.action_space.seed(0)
    first, info = env.reset(seed=0)
    seen = first if images else {"features": first}
    told, kept = seen | info, copy.deepcopy(seen | info)
    for _ in range(5):
        later, *_ = env.step(env.action_space.sample())
        arrays = {name: value.numpy() for name, value in later.items()} if images else later.numpy()
        assert env.observation_space.contains(arrays)
    assert all(torch.equal(told[name], kept[name]) for name in told)
    if images:
        assert set(later) == {"features", "clean", "adversarial"}
        assert (later["clean"] != later["adversarial"]).any()


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("num_envs", 0, "num_envs must be a whole number"),
        *(("queries", bad, "queries") for bad in (1, (), "5")),
        ("data", (torch.zeros(2, 1, 8, 8), torch.zeros(2)), r"advgame.ImageSet.*not a tuple"),
        ("classifier", "small_cnn", "nn.Module that returns logits.*not 'small_cnn'"),
        ("classifier", Defender(nn.Linear(1, 1)), "a Defender's `module`"),
        ("threat", Linf(torch.full((64,), 0.1)), "one radius"),
        ("classifier", nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)), "softmax"),
        ("classifier", nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "5 "),
    ],
)
def test_arguments_that_make_no_environment_are_refused(name, bad, words):
    with pytest.raises(InputError, match=words):
        AttackVectorEnv(**{name: bad})


@pytest.mark.parametrize("images", [False, True])
def test_sb3_adapter_joins_several_classifiers(images):
    settings = {"queries": 3, "images": images}
    cores = [AttackVectorEnv(4, **settings), AttackVectorEnv(6, threat=EASY, **settings)]
    adapter = make_sb3(cores)
    adapter.seed(0)
    seen = adapter.reset()
    for _ in range(4):
        assert all(len(one) == 10 for one in (seen.values() if images else [seen]))
        actions = np.stack([adapter.action_space.sample() for _ in range(10)])
        seen, rewards, dones, infos = adapter.step(actions)
        assert len(rewards) == len(dones) == len(infos) == 10
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            assert (last["clean"] if images else last).shape == (
                (1, 8, 8) if images else seen[0].shape
            )
    assert [t.eps for t in adapter.get_attr("threat")] == [0.15] * 4 + [0.3] * 6
    adapter.set_attr("price", 0.5, indices=[9])
    assert [core.price for core in cores] == [0.01, 0.5]
    with pytest.raises(InputError, match="equal spaces"):
        make_sb3([cores[0], AttackVectorEnv(4, menu=Menu(losses=("ce",)))])


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("integer", [np.uint8, np.int16, np.int32])
def test_actions_are_integers_of_any_type(kind, integer):
    core, adapter = kind(4, queries=np.int64(5)), make_sb3([kind(4, queries=5)])
    core.reset(seed=0)
    adapter.seed(0)
    adapter.reset()
    actions = np.zeros((4, len(core.sizes)), integer)
    for _ in range(3):
        _, reward, *_ = core.step(actions)
        assert np.array_equal(adapter.step(actions)[1], reward.numpy())
        core.restart()


def test_the_shipped_classifier_is_what_its_story_says(digits):
    target = shipped()
    right = target.model(digits.test.floats()).argmax(1) == digits.test.labels
    assert float(right.float().mean()) == pytest.approx(0.992, abs=0.003)
    assert replace(target.threat, eps=0.15) == target.threat


@pytest.mark.parametrize("name", IDS)
def test_the_registered_threshold_is_what_a_fixed_attack_brings(name):
    env = gym.make_vec(name, 400)
    env.reset(seed=0)
    env.action_space.seed(0)
    total, over = torch.zeros(400), torch.zeros(400, dtype=torch.bool)
    while not over.all():
        if name == IDS[0]:
            actions = np.tile(env.menu.index(1, 0.25, "ce", "steepest", "on"), (400, 1))
        else:
            actions = env.action_space.sample()
            actions[:, 2], actions[:, 4] = env.patches.sides.index(0.35), 0
        _, reward, ended, *_ = env.step(actions)
        total += torch.where(over, 0.0, reward)
        over |= ended
    assert float(total.mean()) == pytest.approx(gym.spec(name).reward_threshold, abs=0.03)

"""What every registered environment keeps to, in each of its forms; and LAS-AT's environment."""

import copy
import pickle
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.monitor import Monitor

import envs
from advgame.attacks.patches import Patches
from advgame.data import load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.adaptive import AdaptiveAttack
from advgame.games.strategy import StrategySpace
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.sb3 import policy_kwargs
from envs.adapters import as_arrays
from envs.patches import BlackBoxAttackVectorEnv
from envs.strategy_selection import StrategySelectionEnv, StrategySelectionVectorEnv

STRATEGY = "advgame/StrategySelection-v0"
# each id, with settings in which rows of a few random steps end, and not all at once
CASES = {
    STRATEGY: {},
    "advgame/Attack-v0": {"queries": 4, "threat": Linf(0.3)},
    "advgame/BlackBoxAttack-v0": {"queries": 6, "threat": Linf(0.8)},
    "advgame/AdaptiveAttack-v0": {"rules": AdaptiveAttack(Linf(0.3), queries=4)},
    "advgame/GAILCartPole-v0": {"horizon": "task"},
    "advgame/GAILMountainCar-v0": {"stagger": True},
}
# actions for agents that know no MultiDiscrete
FORMS = [
    *((name, {"flatten_actions": True}) for name in list(CASES)[:4]),
    ("advgame/Attack-v0", {"continuous": True}),
]
every_id = pytest.mark.parametrize("name", CASES)
STEPS = {name: 30 if "GAIL" in name else 10 for name in CASES}


def vector(name, rows=8):
    return gym.make_vec(name, rows, **CASES[name])


def same(one, two):
    np.testing.assert_equal(as_arrays(one), as_arrays(two))


def sampled(env, steps):
    env.action_space.seed(5)
    return [env.action_space.sample() for _ in range(steps)]


def trajectory(env, seed, steps):
    """Everything that a seeded run returns; single forms begin anew where they have to."""
    seen = [env.reset(seed=seed)]
    for action in sampled(env, steps):
        seen.append(copy.deepcopy(env.step(action)))
        if not isinstance(env, gym.vector.VectorEnv) and (seen[-1][2] or seen[-1][3]):
            seen.append(env.reset())
    return tuple(seen)


def test_every_registered_id_is_tested():
    assert {name for name in gym.registry if name.startswith("advgame/")} == set(CASES)
    assert envs.__doc__
    gym.make(f"envs:{STRATEGY}").close()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in CASES),
        *((f"advgame/GAIL{task}-v0", {"horizon": "task"}) for task in ("CartPole", "MountainCar")),
        *FORMS,
        *(("advgame/GAILCartPole-v0", {"env_id": task}) for task in ("Acrobot-v1", "Pendulum-v1")),
    ],
)
def test_checker_finds_nothing(name, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # CartPole's velocities have no bound and Pendulum's torque another, in Gymnasium too
        warnings.filterwarnings("ignore", message=".*space m(in|ax)imum value is -?infinity.*")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")
        # the checker makes another one to look at its pictures
        warnings.filterwarnings("ignore", message="several single StrategySelection.*")
        own = settings.get("env_id", "").startswith(("Acrobot", "Pendulum"))  # draw with pygame
        check_env(gym.make(name, **settings).unwrapped, skip_render_check=own)


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in CASES), *FORMS])
def test_sb3_checker_finds_nothing(name, settings):
    with warnings.catch_warnings():
        # it would like uint8 images or a flat action; both are as the environment documents
        words = "image|CnnPolicy|normaliz|minimal resolution|MultiDiscrete"
        warnings.filterwarnings("ignore", message=f".*({words}).*")
        check_env_sb3(gym.make(name, **settings).unwrapped)


@every_id
def test_vector_form_keeps_to_its_spaces_and_its_autoreset(name):
    env = vector(name)
    mode = env.metadata["autoreset_mode"]
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation.numpy())
    ended = torch.zeros(8, dtype=torch.bool)
    for action in sampled(env, STEPS[name]):
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation.numpy())
        assert reward.shape == (8,)
        assert not (terminated & truncated).any()
        if mode == AutoresetMode.NEXT_STEP:
            assert not reward[ended].any(), "the step after an end is its reset"
        ended = terminated | truncated
        if mode == AutoresetMode.SAME_STEP and ended.any():
            assert torch.equal(info["_final_obs"], ended)
            assert torch.equal(info["_final_info"], ended)
        assert ended.all() or name != STRATEGY
    env.close()
    env.close()


@pytest.mark.parametrize("form", ["single", "vector"])
@every_id
def test_same_seed_same_bits_in_the_same_and_in_another_environment(name, form):
    def make():
        return gym.make(name, **CASES[name]).unwrapped if form == "single" else vector(name)

    env = make()
    first = trajectory(env, 3, STEPS[name])
    same(first, trajectory(env, 3, STEPS[name]))  # what was learned or played is undone
    same(first, trajectory(make(), 3, STEPS[name]))
    assert not np.array_equal(first[0][0], trajectory(env, 4, 1)[0][0])


@every_id
def test_single_environment_equals_a_vector_of_one(name):
    single, many = gym.make(name, **CASES[name]).unwrapped, vector(name, 1)
    same(single.reset(seed=7)[0], many.reset(seed=7)[0][0])
    for action in sampled(single, 2 * STEPS[name]):
        seen, reward, *ended, info = single.step(action)
        following, *found, terms = many.step(np.array([action]))
        same((reward, *ended), tuple(one[0] for one in found))
        last = terms.pop("final_obs", following)
        terms |= terms.pop("final_info", {})
        same(seen, last[0])
        same(info, {k: v[0].item() for k, v in terms.items() if not k.startswith("_")})
        if any(ended):
            with pytest.raises(gym.error.ResetNeeded, match="has ended"):
                single.step(action)
            same(single.reset()[0], many.reset()[0][0])


@every_id
def test_sb3_adapter_equals_the_core(name):
    core, inner = vector(name), vector(name)
    adapter = envs.make_sb3(inner)
    adapter.seed(2)
    same(adapter.reset(), core.reset(seed=2)[0])
    ends, sums = [], np.zeros((2, core.num_envs))
    for action in sampled(core, 2 * STEPS[name]):
        following, reward, terminated, truncated, info = as_arrays(core.step(action))
        done = terminated | truncated
        sums += reward, np.ones(core.num_envs)
        last, final = info.pop("final_obs", following), info.pop("final_info", {})
        if core.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
            following = core.restart()  # the core's own way to the adapter's
        seen, rewards, dones, infos = adapter.step(action)
        same((seen, rewards, dones), (following, reward, done))
        for i, row in enumerate(infos):
            assert row["TimeLimit.truncated"] == truncated[i]
            for terms in (info, final if done[i] else {}):
                same({k: row[k] for k in terms if k[0] != "_"}, {
                    k: v[i] for k, v in terms.items() if k[0] != "_"
                })  # fmt: skip
            assert ("terminal_observation" in row) == done[i]
            if done[i]:
                same(row["terminal_observation"], last[i])
                assert not np.array_equal(as_arrays(seen[i]), last[i])
            assert ("episode" in row) == done[i]
            if done[i] and "true_return" in final:
                same(row["episode"], {"r": final["true_return"][i], "l": final["length"][i]})
            elif done[i]:
                assert (row["episode"]["r"], row["episode"]["l"]) == tuple(sums[:, i])
        sums[:, done] = 0
        ends += info.get("fooled", done)[done].tolist()
    assert len(ends) > 1
    assert "Attack" not in name or set(ends) == {True, False}, "budgets end episodes too"


@pytest.mark.parametrize(
    ("name", "settings", "n_steps", "lengths"),
    [
        (STRATEGY, {}, 2, {1}),
        ("advgame/Attack-v0", {"queries": 3}, 4, {1, 2}),
        ("advgame/GAILCartPole-v0", {"horizon": "task", "reward": "survival"}, 32, range(8, 501)),
    ],
)
def test_sb3_learns_on_the_adapter(name, settings, n_steps, lengths):
    env = envs.make_sb3(name, 16, **settings)
    kwargs = policy_kwargs() if name == STRATEGY else {}
    common = {"n_steps": n_steps, "batch_size": 32, "n_epochs": 1, "seed": 0}
    ppo = PPO("MlpPolicy", env, policy_kwargs=kwargs, **common)
    ppo.learn(2 * 16 * n_steps)
    assert ppo.ep_info_buffer, "or SB3 logs no rollout/ep_rew_mean"
    assert all(one["l"] in lengths for one in ppo.ep_info_buffer)
    if "GAIL" in name:  # the true returns, not the discriminator's
        assert all(one["r"] == one["l"] for one in ppo.ep_info_buffer)
    assert env.env_is_wrapped(Monitor) == [True] * 16, "or evaluate_policy sums what wrappers pay"
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, [3]) == [False]


@every_id
def test_gymnasiums_statistics_work_on_the_numpy_form(name):
    env = RecordEpisodeStatistics(envs.to_numpy(vector(name)))
    env.reset(seed=0)
    total = np.zeros(8)
    for action in sampled(env, STEPS[name]):
        observation, reward, *_, info = env.step(action)
        assert isinstance(observation, np.ndarray)
        assert env.observation_space.contains(observation)
        total += reward
    assert len(env.length_queue) > 0
    if name == STRATEGY:
        assert (info["episode"]["l"] == 1).all()
        assert info["_r1"].all()
        assert sum(env.return_queue) == pytest.approx(total.sum(), rel=1e-5)
    if "Attack" in name:
        settings = CASES[name]
        assert max(env.length_queue) == (settings.get("queries") or settings["rules"].queries) - 1


@every_id
def test_nothing_returned_is_a_reused_buffer_or_written_into_the_environment(name):
    env, twin = vector(name), vector(name)
    returned = [env.reset(seed=0)]
    kept = copy.deepcopy(returned)
    twin.reset(seed=0)
    for action in sampled(env, STEPS[name]):
        returned.append(env.step(action))
        kept.append(copy.deepcopy(returned[-1]))
        same(kept[-1], twin.step(action))
        twin_seen = returned[-1][0].clone()
        returned[-1][0].mul_(2)  # whoever writes into an observation does not write into the game
        kept[-1] = (2 * twin_seen, *kept[-1][1:])
    for one, two in zip(returned, kept, strict=True):
        same(one, two)


@every_id
def test_pickled_environment_goes_on_to_the_same_bits(name):
    env = vector(name)
    env.reset(seed=0)
    first, *rest = sampled(env, STEPS[name])
    env.step(first)
    twin = pickle.loads(pickle.dumps(env))
    for action in rest:
        same(env.step(action), twin.step(action))


@every_id
def test_saved_place_goes_on_to_the_same_bits(name):
    """Attack environments go on with the next images, at their reset; weights are saved apart."""
    env, twin = vector(name), vector(name)
    env.reset(seed=0)
    actions = sampled(env, STEPS[name])
    for action in actions[:5]:
        env.step(action)
    state = pickle.loads(pickle.dumps(env.state_dict()))
    twin.reset(seed=9)
    if hasattr(env, "defender"):
        twin.defender.module.load_state_dict(env.defender.module.state_dict())
    twin.load_state_dict(state)
    if env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
        same(env.reset(), twin.reset())
    for action in actions[5:]:
        same(env.step(action), twin.step(action))


@every_id
def test_a_saved_place_is_not_moved_by_what_is_played_on(name):
    """It can be gone on from several times: torch's optimisers share the tensors of a state."""
    env = vector(name)
    env.reset(seed=0)
    actions = sampled(env, STEPS[name])
    for action in actions[:5]:
        env.step(action)
    place, weights = env.state_dict(), {}
    if hasattr(env, "defender"):
        weights = copy.deepcopy(env.defender.module.state_dict())
    kept, runs = copy.deepcopy(place), []
    for _ in range(3):
        if weights:
            env.defender.module.load_state_dict(weights)
        env.load_state_dict(place)
        if env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
            env.reset()
        runs.append(copy.deepcopy([env.step(action) for action in actions[5:]]))
    same(tuple(runs[0]), tuple(runs[1]))
    same(tuple(runs[0]), tuple(runs[2]))
    torch.testing.assert_close(place, kept, rtol=0, atol=0)


@every_id
def test_reversed_actions_are_taken(name):
    env, twin = vector(name), vector(name)
    env.reset(seed=0)
    twin.reset(seed=0)
    (action,) = sampled(env, 1)
    same(env.step(action[::-1]), twin.step(action[::-1].copy()))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8)])
def test_patches_for_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=rf"of {re.escape(str(shape))}, the data's .*\(1, 8, 8\)"):
        BlackBoxAttackVectorEnv(2, patches=Patches(shape))


@pytest.mark.parametrize("name", [STRATEGY, "advgame/AdaptiveAttack-v0"])
def test_more_rows_than_there_are_images_are_refused_by_the_name_that_was_typed(name):
    few = load_data("digits").train.first(10)
    words = r"num_envs must lie in 1\.\.10 for 10 training images .*not 32"
    for make in (gym.make_vec, envs.make_sb3):
        with pytest.raises(InputError, match=words):
            make(name, 32, data=few)
    if name != STRATEGY:
        with pytest.raises(InputError, match=r"batch_size must lie in 1\.\.10 .*not 11"):
            gym.make_vec(name, 1, data=few, batch_size=11)
    gym.make(name, data=few).reset(seed=0)  # without a size there are as many as there are images


@every_id
def test_misuse_is_refused_and_changes_nothing(name):
    env, twin = vector(name), vector(name)
    right = sampled(env, 2)
    for call in (lambda: env.step(right[0]), env.state_dict, lambda: env.load_state_dict({})):
        with pytest.raises(gym.error.ResetNeeded, match="call reset"):
            call()
    with pytest.raises(InputError, match="one integer seed"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    twin.reset(seed=0)
    a = right[0]
    for wrong in (a[:-1], np.stack([a, a], -1), a + 99, -1 - a, a.astype(float), a > 0):
        with pytest.raises(InputError, match="actions"):
            env.step(wrong)
    for wrong in ("left", None, [None, "left"]):
        with pytest.raises(InputError, match="actions must be numbers of shape"):
            env.step(wrong)
    same(env.step(right[1]), twin.step(right[1]))
    single = gym.make(name, **CASES[name]).unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="before step"):
        single.step(a[0])
    single.reset(seed=0)
    with pytest.raises(InputError, match="actions"):
        single.step(a[0] + 77)
    shape = re.escape(str(single.action_space.shape))  # of one action, not of a batch of one
    with pytest.raises(InputError, match=rf"must have shape {shape}, not"):
        single.step(a)


def test_reset_without_a_seed_goes_on():
    env = StrategySelectionVectorEnv(8)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    weights = copy.deepcopy(env.defender.module.state_dict())
    shown = env.images.clone()
    assert torch.equal(env.reset()[0], shown), "no image is skipped"
    same(weights, dict(env.defender.module.state_dict()))
    env.reset(seed=0)
    first = next(iter(weights))
    assert not torch.equal(weights[first], env.defender.module.state_dict()[first])


def test_a_classifier_that_does_not_fit_the_data_is_refused_at_reset(digits):
    for module, words in (
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)), r"0\.\.4"),
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Softmax(1)),
            "softmax",
        ),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, 10)), r"\(1, 8, 8\)"),
    ):
        env = StrategySelectionVectorEnv(4, data=digits.train, defender=Defender(module))
        with pytest.raises(InputError, match=words):
            env.reset(seed=0)


def test_dropout_is_reproducible_and_leaves_the_global_stream_alone(digits):
    def losses():
        with seeded_init(0):
            module = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)
            )
        env = StrategySelectionVectorEnv(4, data=digits.train, defender=Defender(module))
        return trajectory(env, 0, 4)

    torch.manual_seed(1)
    first, after = losses(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    same(first, losses())


def test_the_single_environment_shows_every_image_once():
    env = StrategySelectionEnv()
    twin = StrategySelectionVectorEnv(1)
    shown = [env.reset(seed=0)[0]]
    twin.reset(seed=0)
    for _ in range(5):
        env.step(np.zeros(3, dtype=int))
        shown.append(env.reset()[0])
    for image in shown:
        same(image, twin.images[0])
        twin.step(np.zeros((1, 3), dtype=int))


def test_reward_interval_pays_every_kth_step():
    env = StrategySelectionVectorEnv(4, reward_interval=3)
    env.reset(seed=0)
    paid = []
    for _ in range(7):
        due = env.reward_due
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert due == bool(info["reward_valid"].all()) == bool(info["reward_valid"].any())
        assert due == ("r1" in info) == bool(reward.any())
        paid.append(due)
    assert paid == [False, False, True, False, False, True, False]


def test_terms_add_up_to_the_reward():
    env = StrategySelectionVectorEnv(8, credit="sample")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(env.action_space.sample())
    torch.testing.assert_close(reward, info["r1"] + info["r2"] + info["r3"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"defender": torch.nn.Linear(1, 1)}, r"Defender\(module, lr=0.1\), not a Linear"),
        ({"num_envs": 0}, "num_envs must be a whole number of 1 or above, not 0"),
        ({"num_envs": 2.0}, "num_envs"),
        ({"data": "digits"}, r"advgame.ImageSet.*not a str"),
        ({"data": load_data("digits")}, "not a Splits"),
        ({"space": StrategySpace(8 / 255)}, "space's ε₀ is 0.03137, that of the rules 0.15"),
        ({"space": StrategySpace(0.15, betas=(5, 6))}, "LasAt has no β"),
        ({"reward_interval": -1}, "reward_interval"),
        ({"credit": "mine"}, "credit"),
        ({"rules": 0.15}, r"rules must be a LasAt.*not the float 0.15"),
        ({"space": 0.15}, r"space must be a StrategySpace"),
    ],
)
def test_other_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        StrategySelectionVectorEnv(**settings)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("advgame/Attack-v0", "menu"),
        ("advgame/BlackBoxAttack-v0", "patches"),
        ("advgame/BlackBoxAttack-v0", "data"),
        ("advgame/GAILCartPole-v0", "discriminator"),
        ("advgame/GAILCartPole-v0", "theta"),
    ],
)
def test_settings_of_another_type_are_named(name, setting):
    with pytest.raises(InputError, match=setting):
        gym.make(name, **{setting: 0.15})


@every_id
@pytest.mark.parametrize("count", ["num_envs", "n_envs"])
def test_who_wants_several_rows_of_gymnasium_make_is_sent_to_make_vec(name, count):
    with pytest.raises(InputError, match=rf'make_vec\("{name}", num_envs=4\)'):
        gym.make(name, **{count: 4})


@every_id
def test_a_mistyped_setting_is_told_by_the_id_and_the_near_name(name):
    for make in (gym.make, gym.make_vec, envs.make_sb3):
        with pytest.raises(InputError, match=f"{name} 'render_mod': did you mean render_mode"):
            make(name, render_mod=None)
    with pytest.raises(InputError, match=f"{name}.*num_envs"):
        gym.make_vec(name, num_envs=2, n_envs=4)
    if name != "advgame/Attack-v0":
        with pytest.raises(InputError, match=f"{name} has no continuous.*Attack-v0"):
            gym.make(name, continuous=True)


def test_shared_settings_are_known_by_the_ids_that_share_them():
    with pytest.raises(InputError, match="advgame/Attack-v0 'query': did you mean queries"):
        gym.make("advgame/Attack-v0", query=5)
    assert gym.make("advgame/Attack-v0", queries=5).unwrapped.core.num_envs == 1


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        (lambda: gym.make(STRATEGY), {}, "id of advgame or its vector environments.*not <Order"),
        (lambda: "CartPole-v1", {}, "id of advgame"),
        (list, {}, "id of advgame.*not None"),
        (lambda: envs.to_numpy(vector(STRATEGY)), {}, "without wrappers.*VecNormalize"),
        (lambda: vector(STRATEGY), {"num_envs": 5}, "give them to gymnasium.make_vec"),
        (lambda: vector(STRATEGY), {"credit": "batch"}, "give them to gymnasium.make_vec"),
    ],
)
def test_sb3_is_given_an_environment_that_it_can_reset(env, settings, words):
    with pytest.raises(InputError, match=words):
        envs.make_sb3(env(), **settings)


def test_sb3_needs_a_reward_at_every_step():
    with pytest.raises(InputError, match="SB3"):
        envs.make_sb3(StrategySelectionVectorEnv(4, reward_interval=5))

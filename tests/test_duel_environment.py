"""`duel_v0`: PettingZoo's own tests, pay to the bit, matches that go on, SuperSuit and SB3."""

import copy
import importlib
import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest
import supersuit
import torch
from conftest import BatchNormNet
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
)
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from advgame.data import ImageSet
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.awp import AWPDefender
from advgame.games.strategy import StrategySpace
from advgame.threat import Linf
from envs import duel
from envs.canvas import BLUE, RED
from envs.pictures import HEIGHT, WIDTH

SMALL = {"batch_size": 8, "max_cycles": 4}


@pytest.fixture
def small(digits):
    """Settings of short matches on few images."""
    return {**SMALL, "data": digits.train.first(64), "held_out": digits.validation.first(24)}


def actions(env, seed):
    """A match's random actions of both sides."""
    rng = np.random.default_rng(seed)
    return [
        {agent: rng.integers(env.action_space(agent).nvec) for agent in env.possible_agents}
        for _ in range(env.max_cycles)
    ]


def same(one, two):
    """Nested dictionaries of arrays and numbers, equal to the bit."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, tuple | list):
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize(
    "settings",
    [{}, {"per_image": True, "images": True}, {"reward": "loss", "pay": "end"}],
    ids=str,
)
def test_pettingzoos_own_tests_pass(settings, small):
    def make(**more):
        return duel.parallel_env(**{**small, **settings, **more})

    parallel_api_test(make(), num_cycles=6)
    parallel_seed_test(make, num_cycles=4)
    if not settings:
        api_test(duel.env(**small), num_cycles=8)


def test_pettingzoos_test_of_the_cycles_passes(monkeypatch):
    """As it stands, on the module; the images are the default ones."""
    monkeypatch.setattr(duel, "HELD_OUT", 8)
    max_cycles_test(duel)


def test_pettingzoos_test_of_pictures_passes(small):
    """It makes a window first, to read the render modes only: there is none here."""

    def make(render_mode):
        return duel.env(**small, render_mode=None if render_mode == "human" else render_mode)

    render_test(make)
    with pytest.raises(InputError, match="render_mode must be"):
        duel.env(**small, render_mode="human")


@pytest.mark.parametrize("reward", ["robust", "loss"])
def test_pay_is_zero_sum_and_a_match_pays_its_last_standing_less_its_first(reward, small):
    returns = {}
    for pay in ("step", "end"):
        env, total = duel.parallel_env(**small, reward=reward, pay=pay), 0.0
        env.reset(seed=5)
        for move in actions(env, 1):
            seen, paid, ended, _, info = env.step(move)
            assert paid["attacker"] + paid["defender"] == 0
            told = info["defender"]
            value = {"robust": told["robust"], "loss": -told["loss"]}[reward]
            before = {"robust": told["robust_before"], "loss": -told["loss_before"]}[reward]
            if told["judged"]:
                assert paid["defender"] == value - before
            for agent in env.possible_agents:
                assert env.observation_space(agent).contains(seen[agent])
            assert seen["defender"][1] == np.float32(value)
            total += paid["defender"]
        assert ended == {"attacker": True, "defender": True}
        assert env.agents == []
        assert total == env.standing.value(reward) - env.first.value(reward)
        returns[pay] = total
    assert returns["step"] == returns["end"] != 0, "when it is paid changes nothing that is played"


@pytest.mark.slow
def test_a_match_can_be_won_by_either_side(digits):
    """The classifier learns from attacks of ε₀; from none, with small steps, it does not."""
    env, ends = duel.parallel_env(held_out=digits.validation, data=digits.train), []
    for strategy, lesson in (((5, 7, 1), (3, 0, 0, 0)), ((0, 0, 0), (0, 2, 0, 0))):
        env.reset(seed=0)
        while env.agents:
            env.step({"attacker": strategy, "defender": lesson})
        ends.append(env.standing.robust)
    assert ends[0] > ends[1] + 0.1


def played(env, moves, *, reset=None):
    told = [env.reset(seed=reset)] if reset is not None else []
    return [*told, *[env.step(move) for move in moves]]


def test_a_seed_repeats_a_match_and_the_next_one_is_another(small):
    one, two = duel.parallel_env(**small), duel.parallel_env(**small)
    moves = actions(one, 0)
    first = played(one, moves, reset=3)
    same(first, played(two, moves, reset=3))
    following = [one.reset(), *played(one, moves)]
    same(following, [two.reset(), *played(two, moves)])
    assert any(a[1] != b[1] for a, b in zip(first[1:], following[1:], strict=True))
    same(first, played(one, moves, reset=3))
    unseeded = duel.parallel_env(**small)
    unseeded.reset()
    assert unseeded._seed != duel.parallel_env(**small)._seed


@pytest.mark.parametrize("way", ["saved", "copy", "pickle"])
def test_a_match_goes_on_to_the_same_bits(way, small, tmp_path):
    settings = {**small, "images": True, "render_mode": "rgb_array"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = duel.parallel_env(**settings, defender=Defender(BatchNormNet(), lr=0.1))
    twin = copy.deepcopy(whole)  # the same initial weights
    moves = actions(whole, 2)
    played(whole, moves[:2], reset=7)
    if way == "saved":
        torch.save(whole.state_dict(), tmp_path / "place.pt")
        twin.load_state_dict(torch.load(tmp_path / "place.pt", weights_only=True))
    else:
        twin = copy.deepcopy(whole) if way == "copy" else pickle.loads(pickle.dumps(whole))
    assert np.array_equal(whole.render(), twin.render())
    same(played(whole, moves[2:]), played(twin, moves[2:]))
    assert np.array_equal(whole.render(), twin.render())
    same([whole.reset(), *played(whole, moves)], [twin.reset(), *played(twin, moves)])
    weights = [list(env.defender.module.state_dict().values()) for env in (whole, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_place_is_not_moved_by_what_is_played_on(small):
    env = duel.parallel_env(**small)
    moves = actions(env, 0)
    played(env, moves[:1], reset=1)
    place = env.state_dict()
    after = played(env, moves[1:])
    env.load_state_dict(place)
    same(after, played(env, moves[1:]))


def test_a_strategy_for_each_image_is_one_for_all_where_they_are_equal(small):
    whole, each = duel.parallel_env(**small), duel.parallel_env(**small, per_image=True)
    assert each.action_space("attacker").shape == (8, 3)
    moves = actions(whole, 4)
    rows = [{**move, "attacker": np.tile(move["attacker"], (8, 1))} for move in moves]
    same(played(whole, moves, reset=0), played(each, rows, reset=0))
    played(each, [], reset=0)
    _, _, _, _, info = each.step({**rows[0], "attacker": np.eye(8, 3, dtype=int)})
    assert info["attacker"]["steps"] == 3 + 1 / 8, "the mean over the images"


def test_the_attacker_sees_the_images_that_are_next_on_request(small):
    env = duel.parallel_env(**small, images=True)
    seen, _ = env.reset(seed=0)
    assert torch.equal(torch.from_numpy(seen["attacker"]["images"]), env.batch)
    assert not isinstance(seen["defender"], dict)
    seen["attacker"]["images"][:] = 0
    assert env.batch.any(), "what it is shown is a copy"


def test_observations_say_what_was_played(small):
    env = duel.parallel_env(**small)
    seen, _ = env.reset(seed=0)
    names = list(duel.FEATURES)
    assert not seen["defender"][names.index("loss") :].any()
    last = [size - 1 for size in env.space.sizes]
    seen, paid, _, _, info = env.step({"attacker": last, "defender": [3, 1, 0, 1]})
    vector = dict(zip(names, seen["attacker"].tolist(), strict=True))
    assert (vector["progress"], vector["eps"], vector["steps"], vector["awp"]) == (0.25, 1, 1, 1)
    assert (vector["rate"], vector["clean_weight"], vector["true_probability"]) == (1, 0.5, 0)
    assert vector["rise"] == np.float32(paid["defender"])
    told = info["attacker"]
    assert (told["rate"], told["clean_weight"], told["true_probability"]) == (2.0, 0.25, 1.0)
    assert told["eps"] == pytest.approx(15 * 0.15 / 8)
    # 14 steps of two passes; adversarial and clean images twice, each pass with its backward
    assert told["passes"] == 2 * 14 + 3 * 4


def test_one_side_learns_through_supersuit(small):
    """SB3's PPO, in two copies of the duel, against a fixed attacker."""
    env = duel.against(lambda seen: [5, 7, 1], agent="defender", **small)
    vec = supersuit.pettingzoo_env_to_vec_env_v1(env)
    vec = supersuit.concat_vec_envs_v1(vec, 2, base_class="stable_baselines3")
    vec.venv.reset(seed=0)
    seeds = [one.par_env.core._seed for one in vec.venv.vec_envs]
    assert seeds == [0, 1], "each copy plays matches of its own"
    ppo = PPO("MlpPolicy", VecMonitor(vec), n_steps=4, batch_size=8, n_epochs=1).learn(16)
    assert [one["l"] for one in ppo.ep_info_buffer] == [4] * 4
    saved = duel.against(lambda seen: ppo.predict(seen)[0], agent="attacker", **small)
    seen, _ = saved.reset(seed=0)
    assert seen.keys() == {"attacker"}
    seen, paid, ended, cut, info = saved.step({"attacker": [0, 0, 0]})
    assert paid.keys() == ended.keys() == cut.keys() == info.keys() == {"attacker"}


def test_one_side_plays_what_both_sides_play(small):
    whole = duel.parallel_env(**small)
    half = duel.against(lambda seen: [2, 0, 0, 0], agent="attacker", **small)
    parallel_api_test(half, num_cycles=5)
    half.core.max_cycles = whole.max_cycles  # PettingZoo's test has set it
    whole.reset(seed=0)
    half.reset(seed=0)
    for move in actions(whole, 1):
        both = whole.step({**move, "defender": [2, 0, 0, 0]})
        alone = half.step({"attacker": move["attacker"]})
        same([{"attacker": one["attacker"]} for one in both], list(alone))
    assert half.agents == []
    with pytest.raises(gym.error.ResetNeeded):
        half.step({"attacker": [0, 0, 0]})


@pytest.mark.parametrize("move", [{"attacker": [0, 0, 0], "defender": [2, 0, 0, 0]}, [0, 0, 0], {}])
def test_one_side_moves_for_itself_only(move, small):
    half = duel.against(lambda seen: [2, 0, 0, 0], agent="attacker", **small)
    half.reset(seed=0)
    with pytest.raises(InputError, match=r"a dict of attacker$"):
        half.step(move)


def test_pictures_show_the_match_and_change_nothing(small):
    plain, drawn = duel.parallel_env(**small), duel.parallel_env(**small, render_mode="rgb_array")
    moves = actions(plain, 3)
    with pytest.raises(gym.error.ResetNeeded):
        drawn.render()
    one, two = played(plain, [], reset=0), played(drawn, [], reset=0)
    frames = [drawn.render()]
    for move in moves:
        one.append(plain.step(move))
        two.append(drawn.step(move))
        frames.append(drawn.render())
    same(one, two)
    assert {frame.shape for frame in frames} == {(HEIGHT, WIDTH, 3)}
    assert all((frame[:, -8:] == frame[0, 0]).all() for frame in frames), "nothing is cut off"
    low = np.array(frames[-1][:225, 50:330].astype(int))
    assert (np.abs(low - BLUE).max(-1) < 30).sum() > 100, "a curve"

    def bars(frame):
        part = frame[250:, :].astype(int)
        return [(np.abs(part - colour).max(-1) < 30).sum() for colour in (BLUE, RED)]

    assert bars(frames[0]) == [0, 0]
    assert bars(frames[1])[0] == 0 < bars(frames[1])[1], "the last choices are red"
    assert bars(frames[-1])[0] > 0
    with pytest.warns(UserWarning, match="draws nothing without render_mode"):
        assert plain.render() is None


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"reward": "fame"}, "reward must be robust or loss"),
        ({"pay": "later"}, "pay must be step or end"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": 10**6}, "batch size must lie in"),
        ({"max_cycles": 0}, "max_cycles must be a whole number"),
        ({"data": 3}, "data is an advgame.ImageSet"),
        ({"held_out": None}, "data and held_out come together"),
        ({"defender": BatchNormNet()}, "with its optimiser"),
        ({"defender": AWPDefender(BatchNormNet(), 0.1)}, "step by step"),
        ({"space": StrategySpace(0.3)}, "the threat's ε₀, 0.15, and no β"),
        ({"space": StrategySpace(0.15, betas=(5,))}, "and no β"),
        ({"threat": Linf(torch.tensor([0.1]))}, "judged at one eps"),
        ({"gamma": 0}, "gamma must lie"),
        ({"render_mode": "ansi"}, "render_mode must be"),
    ],
)
def test_settings_that_cannot_be_played_are_refused(settings, answer, small):
    with pytest.raises(InputError, match=answer):
        duel.parallel_env(**{**small, **settings})


def test_images_that_do_not_fit_are_refused(small):
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    other = ImageSet(images, torch.arange(8), 10)
    with pytest.raises(InputError, match="cannot take the data's images"):
        duel.parallel_env(**{**small, "held_out": other})


@pytest.mark.parametrize(
    ("move", "answer"),
    [
        ({"attacker": [0, 0, 0]}, "a dict of attacker and defender"),
        ([0, 0, 0], "a dict of attacker and defender"),
        ({"attacker": [0, 0], "defender": [0, 0, 0, 0]}, "must have shape"),
        ({"attacker": [13, 0, 0], "defender": [0, 0, 0, 0]}, "must lie in 0"),
        ({"attacker": [0, 0, 0], "defender": [0, 0, 0, 2]}, "must lie in 0"),
        ({"attacker": [0.5, 0, 0], "defender": [0, 0, 0, 0]}, "integer indices"),
        ({"attacker": [0, 0, 0], "defender": "all"}, "must be numbers"),
    ],
    ids=str,
)
def test_a_wrong_move_is_refused_and_nothing_is_played(move, answer, small):
    env = duel.parallel_env(**small)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(move)
    with pytest.raises(gym.error.ResetNeeded):
        env.state_dict()
    env.reset(seed=0)
    with pytest.raises(InputError, match=answer):
        env.step(move)
    moves = actions(env, 0)
    same(played(env, moves), played(duel.parallel_env(**small), moves, reset=0)[1:])


def test_without_pettingzoo_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    monkeypatch.delitem(sys.modules, "envs.duel")
    with pytest.raises(InputError, match=r"pip install 'advgame\[duel\]'"):
        importlib.import_module("envs.duel")


def test_an_agent_that_there_is_not_is_refused(small):
    with pytest.raises(InputError, match="agent must be attacker or defender"):
        duel.against(lambda seen: 0, agent="referee", **small)
    with pytest.raises(InputError, match="maps its observation to its action, unlike None"):
        duel.against(None, **small)
    with pytest.raises(InputError, match="seed must lie in"):
        duel.parallel_env(**small).reset(seed=-1)

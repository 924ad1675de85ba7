"""Pictures of the environments: what they show, in every form, and that they change nothing."""

import importlib.util
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Counting
from gymnasium.wrappers import AddRenderObservation, RecordVideo, RenderCollection
from gymnasium.wrappers.vector import RecordVideo as RecordVectorVideo
from stable_baselines3.common.vec_env import VecVideoRecorder
from test_environments import CASES, every_id, same, sampled, trajectory

import envs
from advgame.errors import InputError
from advgame.targets import shipped
from advgame.threat import Linf
from envs.attack import AttackVectorEnv
from envs.canvas import BLUE, RED
from envs.imitation import ImitationVectorEnv
from envs.pictures import (
    HEIGHT,
    WIDTH,
    attack_picture,
    cart_pole_picture,
    mountain_car_picture,
    strategy_picture,
)

ATTACK, STRATEGY = "advgame/Attack-v0", "advgame/StrategySelection-v0"


def make(name, rows=None, **more):
    settings = {**CASES[name], "render_mode": "rgb_array", **more}
    return gym.make_vec(name, rows, **settings) if rows else gym.make(name, **settings)


def near(pixels, colour):
    """Where a picture has a colour, bool (H, W)."""
    return np.abs(pixels.astype(int) - colour).max(-1) < 30


def centre(mask):
    return np.argwhere(mask).mean(0)


@every_id
def test_pictures_change_nothing_that_is_played(name):
    class Drawn(gym.vector.VectorWrapper):
        def step(self, actions):
            self.env.render()
            return self.env.step(actions)

    steps = 2 if name == STRATEGY else 5
    for rows in (None, 2):
        plain = gym.make_vec(name, 2, **CASES[name]) if rows else gym.make(name, **CASES[name])
        drawn = make(name, rows)
        drawn = Drawn(drawn) if rows else RenderCollection(drawn)
        same(trajectory(plain, 3, steps), trajectory(drawn, 3, steps))


def test_pictures_cost_no_query():
    counts = []
    for mode in (None, "rgb_array"):
        model = Counting(shipped().model)
        env = AttackVectorEnv(3, classifier=model, queries=3, render_mode=mode)
        env.reset(seed=0)
        for action in sampled(env, 4):
            env.step(action)
            if mode:
                env.render()
        counts.append((env.model.forwards, env.model.backwards))
    assert counts[0] == counts[1]


@every_id
def test_each_form_draws_the_same_rows(name):
    single, many = make(name), make(name, 1)
    arrays, adapter = envs.to_numpy(make(name, 2)), envs.make_sb3([make(name, 1), make(name, 1)])
    with pytest.raises(gym.error.ResetNeeded):
        many.render()
    single.reset(seed=0)
    many.reset(seed=0)
    over = False
    for action in [None, *sampled(single.unwrapped, 2)]:
        if over:
            single.reset()
            many.reset()
        if action is not None:
            *_, terminated, truncated, _ = single.step(action)
            over = terminated or truncated
            many.step(np.array([action]))
        frame = single.render()
        assert frame.shape == (HEIGHT, WIDTH, 3)
        assert frame.dtype == np.uint8
        same((frame,), many.render())
    arrays.reset(seed=0)
    assert [frame.shape for frame in arrays.render()] == [(HEIGHT, WIDTH, 3)] * 2
    adapter.seed(0)
    adapter.reset()
    assert len(adapter.get_images()) == 2
    assert adapter.render("rgb_array").shape[2] == 3
    assert adapter.metadata["render_fps"] == single.metadata["render_fps"] > 0


@every_id
def test_without_a_render_mode_there_are_no_pictures(name):
    env = gym.make_vec(name, 2)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="draws nothing without render_mode"):
        assert env.render() is None
    adapter = envs.make_sb3(env)
    assert adapter.render_mode is None
    assert list(adapter.get_images()) == [None, None]


def test_the_end_of_an_episode_is_drawn_in_every_form():
    """Also where the next episode has begun within the step."""
    single, many = make("advgame/GAILCartPole-v0"), make("advgame/GAILCartPole-v0", 1)
    single.reset(seed=0)
    many.reset(seed=0)
    over = False
    while not over:
        before = many.render()[0]
        over = single.step(0)[2]
        many.step(np.zeros(1, int))
    (last,) = many.render()
    same(last, single.render())
    assert abs(centre(near(last[:220], BLUE))[1] - centre(near(before[:220], BLUE))[1]) < 20
    single.reset()
    assert centre(near(single.render()[:220], BLUE))[1] > centre(near(last[:220], BLUE))[1] + 10
    core, inner = make(ATTACK, 2, queries=2), make(ATTACK, 2, queries=2)
    adapter = envs.make_sb3(inner)
    adapter.seed(0)
    adapter.reset()
    core.reset(seed=0)
    (action,) = sampled(core, 1)
    assert core.step(action)[2].all()
    adapter.step(action)
    same(core.render(), tuple(adapter.get_images()))


def test_a_postponed_autoreset_draws_the_next_image():
    later = gym.vector.AutoresetMode.NEXT_STEP
    env = envs.to_numpy(make(STRATEGY, 2), autoreset_mode=later)
    env.reset(seed=0)
    first = env.render()[0]
    env.step(env.action_space.sample())
    played = env.render()[0]
    assert np.array_equal(first[60:220, 20:180], played[60:220, 20:180]), "the image played"
    env.step(env.action_space.sample())
    assert not np.array_equal(env.render()[0][60:220, 20:180], played[60:220, 20:180])


def test_the_perturbation_is_drawn_in_its_scale():
    clean, delta = np.full((1, 2, 2), 0.5), np.array([[[0.1, -0.1], [0.0, 0.05]]])
    common = {"name": "", "classes": (1, 1), "confidence": 0.5, "action": "", "scale": 0.1}
    frame = attack_picture(
        images=(clean, clean + delta), margins=[-1.0, 0.5], budget=3, fooled=True, **common
    )
    panel = frame[58:226, 216:384]
    assert np.abs(panel[40, 40].astype(int) - RED).max() <= 1
    assert np.abs(panel[40, 120].astype(int) - BLUE).max() <= 1
    assert panel[120, 40].tolist() == [255] * 3
    assert np.abs(panel[120, 120] - (np.array(RED) + 255) / 2).max() <= 1
    assert frame[100, 100].tolist() == [128] * 3
    assert abs(int(frame[100, 460, 0]) - 0.6 * 255) <= 1
    below = near(frame[270:372, 50:590], RED)
    assert below.any(), "a margin above 0 is red"
    colours = np.zeros((3, 2, 2))
    colours[0] = 0.1
    frame = attack_picture(
        images=(colours, 2 * colours), margins=[-1.0], budget=3, fooled=False, **common
    )
    assert frame[100, 300].tolist() == [255, 128, 128]


def test_a_margin_stands_at_its_query():
    env = make(ATTACK, 1, queries=6, threat=Linf(0.01))
    env.reset(seed=0)
    for query in (*range(2, 7), 1, 2):  # the next image begins anew
        env.step(sampled(env, 1)[0])
        dots = np.argwhere(near(env.render()[0][270:372, 50:590], BLUE))[:, 1] + 50
        assert abs(dots.max() - (56 + 528 * (query - 1) / 5)) < 6


def test_the_chosen_strategy_is_marked():
    image = np.zeros((1, 4, 4))
    for chosen in range(3):
        frame = strategy_picture(
            images=(image, image),
            scale=0.1,
            choices=[("steps", ["1", "2", "3"], chosen)],
            terms={"loss": 1.0, "r1": 1.0},
            rewards=[1.0],
            step=1,
        )
        mark = near(frame[260:290, 80:268], RED)
        assert abs(centre(mark)[1] + 80 - (90 + 85 * chosen)) < 3


def test_tasks_are_drawn_where_they_are():
    def pole(angle):
        wood = near(cart_pole_picture(0.0, angle, reach=2.4, length=0.5), (186, 120, 60))
        return centre(wood)[1]

    assert pole(-0.3) < pole(0.0) - 10 < pole(0.3) - 20, "positive angles lean to the right"
    carts = [
        centre(near(cart_pole_picture(x, 0.0, reach=2.4, length=0.5), BLUE))[1] for x in (-1, 0, 1)
    ]
    assert np.allclose(np.diff(carts), 110, atol=2)

    def car(position):
        return centre(near(mountain_car_picture(position, ends=(-1.2, 0.6), goal=0.5), BLUE))

    low = car(-np.pi / 6)  # the bottom of sin(3x)
    assert low[0] > max(car(-1.0)[0], car(0.3)[0])
    assert car(-1.0)[1] < low[1] < car(0.3)[1]


def test_the_absorbing_state_is_pale():
    env = make("advgame/GAILCartPole-v0", horizon="fixed")
    env.reset(seed=0)
    for _ in range(20):
        env.step(0)
    assert not near(env.render()[:220], BLUE).any()


def test_other_tasks_draw_themselves():
    class Framed(gym.Env):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self, render_mode=None, drawn=True):
            self.render_mode, self.drawn = render_mode, drawn

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 0.0, False, False, {}

        def render(self):
            return np.full((30, 40, 3), (200, 0, 0), np.uint8) if self.drawn else None

    for drawn, name in ((True, "theirs/Framed-v0"), (False, "theirs/Blind-v0")):
        gym.register(name, Framed, max_episode_steps=5, kwargs={"drawn": drawn})
    try:
        env = ImitationVectorEnv(1, env_id="theirs/Framed-v0", render_mode="rgb_array")
        assert env.metadata["render_fps"] == 7
        env.reset(seed=0)
        assert centre(near(env.render()[0], (200, 0, 0)))[1] == pytest.approx(300, abs=2)
        with pytest.raises(InputError, match="has no pictures: leave out render_mode"):
            ImitationVectorEnv(1, env_id="theirs/Blind-v0", render_mode="rgb_array")
    finally:
        gym.registry.pop("theirs/Framed-v0")
        gym.registry.pop("theirs/Blind-v0")
    if importlib.util.find_spec("pygame") is None:
        with pytest.raises(InputError, match="Acrobot-v1 draws itself, and cannot: pygame is not"):
            ImitationVectorEnv(1, env_id="Acrobot-v1", render_mode="rgb_array")


@pytest.mark.filterwarnings("ignore:.*(several single|natively support)")
@every_id
def test_gymnasiums_wrappers_that_draw(name):
    collected = gym.make(name, render_mode="rgb_array_list")
    collected.reset(seed=0)
    collected.step(collected.action_space.sample())
    assert [frame.shape for frame in collected.render()] == [(HEIGHT, WIDTH, 3)] * 2
    seen = AddRenderObservation(make(name))
    assert seen.observation_space.contains(seen.reset(seed=0)[0])
    if importlib.util.find_spec("pygame") is None:  # Gymnasium makes a window of the pictures
        with pytest.raises(gym.error.DependencyNotInstalled, match="pygame"):
            gym.make(name, render_mode="human").reset()


@every_id
def test_videos(name, tmp_path):
    pytest.importorskip("moviepy")
    env = RecordVideo(make(name), str(tmp_path / "one"), video_length=3)
    env.reset(seed=0)
    for _ in range(4):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()
    env.close()
    many = RecordVectorVideo(
        envs.to_numpy(make(name, 2)), str(tmp_path / "many"), video_length=2, step_trigger=bool
    )
    many.reset(seed=0)
    for _ in range(4):
        many.step(many.action_space.sample())
    many.close()
    adapter = VecVideoRecorder(
        envs.make_sb3(make(name, 2)), str(tmp_path / "sb3"), lambda step: step == 0, video_length=2
    )
    adapter.reset()
    for _ in range(4):
        adapter.step(np.stack([adapter.action_space.sample() for _ in range(2)]))
    adapter.close()
    for kind in ("one", "many", "sb3"):
        assert list((tmp_path / kind).glob("*.mp4")), kind


def test_a_pickled_environment_goes_on_drawing():
    env = make(ATTACK, 2)
    env.reset(seed=0)
    (action,) = sampled(env, 1)
    env.step(action)
    twin = pickle.loads(pickle.dumps(env))
    same(env.render(), twin.render())
    assert torch.equal(env.step(action)[1], twin.step(action)[1])
    same(env.render(), twin.render())

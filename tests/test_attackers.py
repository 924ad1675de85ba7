"""Learning to attack: returns, planted choices, files, resuming, the learned attack itself."""

import json
from dataclasses import replace

import pytest
import torch
import train_attacker
from conftest import Counting, Linear
from gymnasium.vector import VectorEnv
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from advgame import data
from advgame.attacks import pgd
from advgame.attacks.gradient_steps import CHOICES, Menu
from advgame.classifiers import make_classifier
from advgame.data import ImageSet, load_data
from advgame.errors import InputError
from advgame.run.checkpoint import save_weights
from advgame.run.folder import RunFolder
from advgame.seeding import seeded_init, stream
from advgame.targets import shipped
from advgame.threat import L2, Linf
from agents.attacker import Attacker, load_attacker
from agents.policies import FeaturePolicy, FeatureValue
from agents.reinforce import EpisodicReinforce, Rollout, collect, returns_to_go
from agents.sb3 import PPOAttacker, as_feature_policy
from agents.settings import EpisodeConfig
from envs import make_sb3
from envs.attack import AttackVectorEnv

# two menus of which one option is known to be right, and the choice that it belongs to
PLANTED = {
    # the classifier below saturates cross-entropy: its gradient is exactly zero
    "loss": Menu((1 / 4,), (0,), ("ce", "margin"), ("steepest",), ("on",)),
    # three steps of ε/16 do not reach what one of ε does
    "step_size": Menu((1 / 16, 1), (0,), ("margin",), ("steepest",), ("on",)),
}


def planted(menu, num_envs=64):
    """Images for a linear classifier with huge logits."""
    rng = torch.Generator().manual_seed(0)
    model = Linear(1e4 * torch.randn(4, 64, generator=rng))
    x = torch.rand(200, 1, 8, 8, generator=rng)
    images = ImageSet.from_floats(x, torch.zeros(200, dtype=torch.int64), 4)
    with torch.no_grad():
        images = replace(images, labels=model(images.floats()).argmax(1))
    return AttackVectorEnv(
        num_envs, classifier=model, data=images, threat=Linf(0.05), menu=menu, queries=4
    )


def fabric():
    return Fabric(accelerator="cpu", devices=1)


def reinforce(env, menu, seed=0):
    with seeded_init(seed):
        policy = FeaturePolicy(len(menu.feature_names), menu.sizes, 16)
        value = FeatureValue(len(menu.feature_names), 16)
    config = EpisodeConfig(steps=3, lr=1e-2, entropy_coef=0.001)
    return EpisodicReinforce(
        [env], policy, value, config, stream(seed, "policy"), fabric(), CHOICES
    )


def probability(policy, env, column, option):
    """Mean probability of an option over what is decided upon on the way."""
    rollout = collect(env, policy, 3, stream(9, "look"))
    with torch.no_grad():
        logits = policy(rollout.seen[rollout.decided])[column]
    return float(logits.softmax(1)[:, option].mean())


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_a_planted_choice_is_learned(name, kind):
    menu = PLANTED[name]
    env = planted(menu)
    env.reset(seed=0)
    if kind == "reinforce":
        learner, updates = reinforce(env, menu), 40
    else:
        learner, updates = (
            PPOAttacker(make_sb3(env), menu.sizes, 0, fabric(), steps=3, lr=5e-3, hidden=16),
            25,
        )
    column = CHOICES.index(name)

    def chosen():
        policy = learner.policy
        policy = policy if kind == "reinforce" else as_feature_policy(policy, menu.sizes)
        return probability(policy, env, column, 1)

    assert chosen() == pytest.approx(0.5, abs=0.05)
    for _ in range(updates):
        stats = learner.update()
        assert all(torch.isfinite(value) for value in stats.values())
    assert chosen() > 0.8


def test_equal_returns_leave_nothing_to_explain():
    """The share of their variance that V explains had 1e-12 for the variance, and was -1e12."""
    menu = PLANTED["step_size"]
    env = planted(menu)
    env.reset(seed=0)
    learner = reinforce(env, menu)
    rollout = collect(env, learner.policy, 3, stream(0, "look"))
    equal = replace(
        rollout, rewards=torch.zeros_like(rollout.rewards), ended=torch.ones_like(rollout.ended)
    )
    assert "attacker/explained_variance" not in learner.learn(equal)
    assert "attacker/explained_variance" in learner.learn(rollout)


def test_returns_end_with_their_episode_and_pass_over_resets():
    """Row 0: two steps, a reset, one step of an episode that goes on. Row 1: one long episode."""
    rewards = torch.tensor([[1.0, 1], [2, 1], [0, 1], [4, 1]])
    ended = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 1]]).bool()
    decided = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 1]]).bool()
    empty = torch.empty(0)
    rollout = Rollout(empty, empty, rewards, ended, decided, empty)
    found = returns_to_go(rollout, torch.tensor([10.0, 10]), discount=0.5)
    want = torch.tensor([[1 + 0.5 * 2, 1.875], [2, 1.75], [9, 1.5], [4 + 0.5 * 10, 1]])
    assert torch.equal(found[decided], want[decided])


def test_the_return_that_is_logged_is_of_episodes_that_ended():
    """It counted what the cut ones had been paid, and not the cut ones."""
    menu = PLANTED["step_size"]
    env = planted(menu, 2)
    env.reset(seed=0)
    learner = reinforce(env, menu)
    rollout = collect(env, learner.policy, 3, stream(0, "look"))
    rewards = torch.tensor([[5.0, 1], [0, 1], [7, 1]])  # row 0 ends, is reset and goes on
    ended = torch.tensor([[1, 0], [0, 0], [0, 1]]).bool()
    decided = torch.tensor([[1, 1], [0, 1], [1, 1]]).bool()
    stats = learner.learn(replace(rollout, rewards=rewards, ended=ended, decided=decided))
    assert stats["game/return"] == (5 + 3) / 2


def test_a_rollout_knows_which_steps_were_resets():
    class Endings(VectorEnv):
        """Row r ends every r + 2 steps, the reset's included."""

        num_envs = 3

        def reset(self, *, seed=None, options=None):
            self.age = torch.zeros(3, dtype=torch.int64)
            return torch.zeros(3, 4), {}

        def step(self, actions):
            self.age = (self.age + 1) % (torch.arange(3) + 2)
            ended = self.age == torch.arange(3) + 1
            return torch.zeros(3, 4), torch.ones(3), ended, ~ended & False, {}

    rollout = collect(Endings(), FeaturePolicy(4, (2,)), 6, stream(0, "draws"))
    resets = [[not one for one in row] for row in rollout.decided.T.tolist()]
    assert resets[0] == [False, True, False, True, False, True]
    assert resets[1] == [False, False, True, False, False, True]
    assert resets[2] == [False, False, False, True, False, False]
    assert rollout.actions.shape == (6, 3, 1)


def test_same_seed_same_bits_of_learning():
    menu = PLANTED["loss"]

    def learned():
        env = planted(menu, 16)
        env.reset(seed=3)
        learner = reinforce(env, menu)
        for _ in range(3):
            learner.update()
        return list(learner.module.state_dict().values())

    torch.manual_seed(1)
    first = learned()
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, learned(), strict=True))


def test_ppo_leaves_the_global_streams_alone_and_is_sb3s_policy():
    env = planted(PLANTED["loss"], 8)
    env.reset(seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learner = PPOAttacker(make_sb3(env), env.sizes, 0, fabric(), steps=2, hidden=8)
    learner.update()
    assert torch.equal(before, torch.get_rng_state())
    seen = torch.rand(5, env.single_observation_space.shape[0])
    heads = learner.module.get_distribution(seen).distribution
    ours = as_feature_policy(learner.module, env.sizes)(seen)
    for head, logits in zip(heads, ours, strict=True):
        torch.testing.assert_close(head.probs, logits.softmax(1))


@pytest.fixture(scope="module")
def attacker():
    """A policy that is not trained, but that chooses by what it sees."""
    menu = Menu()
    with seeded_init(3):
        policy = FeaturePolicy(len(menu.feature_names), menu.sizes, 16)
        torch.nn.init.normal_(policy.heads.weight)
    return Attacker(policy.requires_grad_(False), menu, "clean", {"seed": 3})


@pytest.fixture(scope="module")
def images(digits):
    return digits.validation.floats()[:60], digits.validation.labels[:60]


def test_a_policy_that_draws_takes_other_steps_by_chance(attacker, images):
    x, y = images
    model, likeliest = shipped().model, attacker.attack(Linf(0.05), 6)
    drawing = replace(likeliest, stochastic=True)

    def made(attack, seed):
        return attack.run(model, x, y, rng=stream(seed, "draws")).x_adv

    first = made(drawing, 0)
    assert torch.equal(first, made(drawing, 0))
    assert not torch.equal(first, made(drawing, 1))
    assert not torch.equal(first, made(likeliest, 0))
    assert (first - x).abs().max() <= 0.05 + 1e-6
    with pytest.raises(InputError, match="drawing the choices"):
        drawing.run(model, x, y)


@pytest.mark.parametrize("ball", [Linf(0.3), L2(1.2)])
def test_learned_attack_is_an_attack(attacker, images, ball):
    model = Counting(shipped().model)
    x, y = images
    result = attacker.attack(ball, 8).run(model, x, y, rng=stream(0, "jumps"))
    assert (result.forwards, result.backwards) == (model.forwards, model.backwards)
    assert result.forwards <= 8 * 60
    assert result.backwards <= 7 * 60
    assert (ball.size(result.x_adv - x) <= ball.eps + 1e-6).all()
    assert 0 <= float(result.x_adv.min()) <= float(result.x_adv.max()) <= 1
    assert torch.equal(result.fooled, model(result.x_adv).argmax(1) != y)
    assert 5 < int(result.fooled.sum()) < 60, "some must be fooled and some not"
    assert result.forwards < 8 * 60, "those that are fooled leave"
    again = attacker.attack(ball, 8).run(model, x, y, rng=stream(0, "jumps"))
    assert torch.equal(again.x_adv, result.x_adv)


def test_one_query_only_looks(attacker, images):
    model = shipped().model
    result = attacker.attack(Linf(0.3), 1).run(model, *images, rng=stream(0, "jumps"))
    assert torch.equal(result.x_adv, images[0])
    assert (result.forwards, result.backwards) == (60, 0)
    assert torch.equal(result.fooled, model(images[0]).argmax(1) != images[1])


def test_more_queries_never_fool_fewer_when_nothing_depends_on_the_budget(images):
    """Constant choices: I-FGSM, whose verdicts PGD's own loop gives too."""
    menu = Menu((1 / 4,), (0,), ("ce",), ("steepest",), ("on",))
    policy = FeaturePolicy(len(menu.feature_names), menu.sizes)
    constant = Attacker(policy, menu, "clean", {})
    model = shipped().model
    for queries in (2, 6, 12):
        found = constant.attack(Linf(0.2), queries).run(model, *images)
        want = replace(pgd(Linf(0.2), queries - 1), start=None, stop_when_fooled=True)
        wanted = want.run(model, *images)
        assert torch.equal(found.fooled, wanted.fooled)
        assert (found.forwards, found.backwards) == (wanted.forwards, wanted.backwards)
    assert found.fooled.any()


def test_what_is_not_fooled_ends_at_its_best_point(attacker, images):
    model = shipped().model
    seen = []
    attack = replace(attacker.attack(Linf(0.1), 9), watch=lambda state: seen.append(state))
    result = attack.run(model, *images, rng=stream(0, "jumps"))
    state = seen[-1]
    last = state.x_adv[~state.fooled]
    best = result.x_adv[~result.fooled]
    assert torch.equal(best, state.best_x[~state.fooled])
    assert not torch.equal(best, last)


def test_a_saved_attacker_attacks_to_the_same_bits_and_other_classifiers(
    attacker, images, tmp_path, rng
):
    path = tmp_path / "attacker.safetensors"
    attacker.save(path)
    loaded = load_attacker(tmp_path)
    assert loaded.about == {"seed": 3}
    assert loaded.menu == attacker.menu
    one, two = (
        a.attack(Linf(0.15), 6).run(shipped().model, *images, rng=stream(0, "jumps")).x_adv
        for a in (attacker, loaded)
    )
    assert torch.equal(one, two)
    with seeded_init(0):
        other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 35, 3))
    x = torch.rand(9, 3, 7, 5, generator=rng)
    result = loaded.attack(L2(0.5), 6).run(other, x, other(x).argmax(1), rng=stream(0, "jumps"))
    assert result.fooled.shape == (9,)


def test_files_that_hold_no_attacker_are_refused(attacker, tmp_path):
    with pytest.raises(InputError, match="no attacker file"):
        load_attacker(tmp_path / "nothing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_attacker(damaged)
    weights = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, weights)
    with pytest.raises(InputError, match="no attacker"):
        load_attacker(weights)
    good = tmp_path / "good.safetensors"
    attacker.save(good)
    about = {"format": "advgame attacker 1", "menu": "{}", "features": "[]"}
    save_file(load_file(good), tmp_path / "odd.safetensors", about)
    with pytest.raises(InputError, match="damaged or of another version"):
        load_attacker(tmp_path / "odd.safetensors")


def test_misuse_is_refused(attacker, images):
    with pytest.raises(InputError, match="queries"):
        attacker.attack(Linf(0.1), 0)
    with pytest.raises(InputError, match="rng"):
        attacker.attack(Linf(0.1), 5).run(shipped().model, *images)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attacker.attack(Linf(0.1), 5).run(shipped().model, images[0] * 255, images[1])
    for bad in ({"steps": 0}, {"steps": 3, "lr": 0}, {"steps": 3, "discount": 1.5}):
        with pytest.raises(InputError, match="REINFORCE"):
            EpisodeConfig(**bad)


TINY = {"envs": 16, "epochs": 3, "updates": 2, "queries": (3, 4), "hidden": 8, "validation_n": 30}


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    config = train_attacker.Config(runs_dir=str(tmp_path), name="run", moves=("on",), **TINY)
    run = train_attacker.job.run(config)
    assert "attacker.safetensors" in capsys.readouterr().out
    for name in ("curves.png", "schedule.png", "report.json", "metrics.csv", "config.json"):
        assert (run.path / name).stat().st_size
    report = json.loads((run.path / "report.json").read_text())
    assert report["classifiers"] == ["zoo:digits/pgd-at-small_cnn-seed0"]
    assert set(report["validation"]) >= {"eval/success", "eval/gain", "eval/return", "eval/pgd"}
    assert load_attacker(run.path).menu == Menu(moves=("on",))
    shown = train_attacker.job.run(replace(config, resume=str(run.path)))
    assert shown.path == run.path, "a finished run is only shown again"


def test_a_run_goes_on_against_the_classifiers_that_it_began_with(tmp_path, monkeypatch):
    config = train_attacker.Config(runs_dir=str(tmp_path), name="run", moves=("on",), **TINY)
    with monkeypatch.context() as stopped:
        stopped.setattr(train_attacker, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_attacker.job.run(config)
    run = RunFolder(tmp_path / "run")
    again = replace(config, resume=str(run.path))
    about = run.about()
    (name,) = about["frozen"]
    run.write_json("config.json", {**about, "frozen": {name: "0" * 64}})
    with pytest.raises(InputError, match=r"other contents of its classifier 1 \(zoo:digits"):
        train_attacker.job.run(again)
    del about["frozen"]  # as folders of before have it
    run.write_json("config.json", about)
    assert train_attacker.job.run(again).report()["validation"]


def test_a_run_goes_on_with_the_images_that_it_began_with(tmp_path, monkeypatch):
    config = train_attacker.Config(runs_dir=str(tmp_path), name="run", moves=("on",), **TINY)
    with monkeypatch.context() as stopped:
        stopped.setattr(train_attacker, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_attacker.job.run(config)
    load = data.load_data

    def with_one_less(*args, **settings):
        found = load(*args, **settings)
        return replace(found, validation=found.validation.first(len(found.validation) - 1))

    again = replace(config, resume=str(tmp_path / "run"))
    with monkeypatch.context() as other:
        other.setattr(data, "load_data", with_one_less)
        with pytest.raises(InputError, match=r"other images \(validation was"):
            train_attacker.job.run(again)
    assert train_attacker.job.run(again).report()["validation"]


def test_classifiers_of_other_images_are_refused(tmp_path):
    """Weights that fit any size, of runs that note their images."""
    digits = load_data("digits")
    about = {"dataset": "digits", "model": "lean_resnet-half", "eps": "0.1", "train_n": 200}
    few = replace(digits, train=digits.train.first(200)).about()

    def trained(name, **noted):
        run = RunFolder.create(tmp_path / name, about, "cpu", {**few, **noted})
        with seeded_init(0):
            network = make_classifier("lean_resnet-half", digits.train.shape, 10)
        save_weights(network, run.path / "checkpoints" / "best.safetensors")
        return str(run.path)

    def attack(*runs, **more):
        config = train_attacker.Config(runs, queries=(2,), validation_n=60, envs=2, **more)
        return train_attacker.job.build(config, train_attacker.job.fabric(config))

    own, small = trained("own"), trained("small", shape=[1, 6, 6])
    with pytest.raises(InputError, match=r"small is for 1x6x6 images .*; these are 1x8x8 images"):
        attack(own, small)
    with pytest.raises(InputError, match=r"is for 1x8x8 images .*; these are 1x6x6 images"):
        attack(own, image_size=6)
    other = trained("other", sha256="0")
    says = r"digits has changed since .*other was trained on it \(their pixels.*--dataset digits"
    with pytest.raises(InputError, match=says):
        attack(other)
    assert [one.name for one, *_ in attack(own).validate.cases] == ["own"]
    assert attack(other, dataset="digits").validate.cases


@pytest.mark.parametrize("classifier", [(), ("zoo:digits/pgd-at-small_cnn-seed0",)])
def test_a_network_that_no_classifier_needs_is_refused(classifier, tmp_path):
    config = train_attacker.Config(classifier, model="my_code:Net", runs_dir=str(tmp_path), **TINY)
    with pytest.raises(InputError, match="leave --model away"):
        train_attacker.job.run(config)
    assert not list(tmp_path.iterdir())


def test_moves_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(InputError, match="moves"):
        train_attacker.job.run(train_attacker.Config(runs_dir=str(tmp_path), moves=("back",)))
    assert not list(tmp_path.iterdir())

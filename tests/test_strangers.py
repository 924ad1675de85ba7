"""What strangers hand in: contexts, layouts, precisions, labels, impure forwards, odd gradients.

Every attack of the registry and every learned attacker is tried, so that a new one is, too.
"""

import copy
from dataclasses import replace

import gymnasium as gym
import pytest
import torch
from attacker_parts import ADTS, network
from conftest import seeded, slowly, undefended
from torch import nn

import envs  # noqa: F401
from advgame.arena import ARC, ClassifierMixture, ExpectedLoss
from advgame.attacks import (
    APGD,
    FAB,
    SPSA,
    Attack,
    AttackResult,
    CarliniWagnerLinf,
    FeatureAttack,
    Square,
    attacked,
    kl_pgd,
)
from advgame.classifiers import SmallCNN
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import ATTACKS, evaluate, find_flags, score
from advgame.evaluation.attacks import Context, make_suite
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.games.costs import perturbation_stats
from advgame.imitation.recording import record
from advgame.seeding import seeded_init
from advgame.threat import L2, Linf
from envs.imitation import ImitationVectorEnv
from envs.tasks import make_task, play

BALL = Linf(0.15)
COUNT = 6
LEARNED = {"attnet": "attnet", "l2l": 1} | {kind: kind for kind in ADTS}
# AutoAttack's versions are its parts in a row, which have names of their own
NAMES = (*(name for name in ATTACKS if not name.startswith("autoattack")), *LEARNED)
# one of each kind
PLAIN = ("pgd10", "mim", "kl-pgd", "cw-adam", "spsa", "fea", "aa:apgd-ce", "adt:exp-worst-of-10")
KINDS = (*PLAIN, *LEARNED)
COSTLY = {"aa:apgd-t", "aa:fab", "aa:fab-t"}  # whose steps are AutoAttack's, a target each
READ_LOGITS = [name for name in KINDS if name != "attnet"]  # which asks the classifier nothing


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.subset(slice(COUNT))


def attacks(name, data, surrogate):
    """The attacks of a name, the costly ones shortened."""
    if name in LEARNED:
        return [network(LEARNED[name]).attack(BALL, 12)]
    if name == "kl-pgd":
        return [kl_pgd(BALL, 2)]
    made = [attack for _, attack in make_suite(name, Context(BALL, data, 0, surrogate))]
    for number, one in enumerate(made):
        if isinstance(one, SPSA):
            made[number] = replace(one, iterations=2, samples=8)
        if isinstance(one, AutoAttackPart):
            made[number] = replace(one, square_queries=20)
        if isinstance(one, CarliniWagnerLinf):
            made[number] = replace(one, iterations=10)
        if isinstance(one, FeatureAttack):
            made[number] = replace(one, targets=2, steps=10)
    return made


def run(name, model, data, x, y, surrogate=None):
    """Adversarial examples of each attack of a name."""
    with attacked(model):
        return [
            attack.run(model, x, y, rng=seeded()).x_adv
            for attack in attacks(name, data, model if surrogate is None else surrogate)
        ]


@pytest.mark.parametrize("name", slowly(NAMES, COSTLY))
def test_an_attack_does_the_same_in_inference_mode(name, victim, few):
    x, y = few.floats(), few.labels
    expected = run(name, victim, few, x, y)
    with torch.inference_mode():
        got = run(name, victim, few, few.floats(), few.labels.clone())
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert not any(one.is_inference() for one in got)


class NHWC(nn.Module):
    """A classifier of somebody whose images have their channels last."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        last = x.permute(0, 2, 3, 1).contiguous(memory_format=torch.contiguous_format)
        return self.net(last.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_takes_any_memory_layout(name, few):
    with seeded_init(0):
        net = SmallCNN((3, 8, 8), 10, width=8).eval()
    x = few.floats().expand(-1, 3, -1, -1).contiguous()
    if name in LEARNED:
        pytest.skip("their small networks here are of one channel; they use the same boundary")
    data = ImageSet.from_floats(x, few.labels, 10)
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not last.is_contiguous()
    expected = run(name, net, data, x, few.labels)
    for model in (net, NHWC(net)):
        got = run(name, model, data, last, few.labels, net)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, got, strict=True))


class InPlace(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x -= 0.5
        x += 0.5
        return self.net(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_that_changes_its_input_is_refused(name, victim, few):
    if name == "attnet":
        pytest.skip("asks the classifier nothing")
    x, before = few.floats(), few.floats()
    with pytest.raises(InputError, match="changes the images that it is given in place"):
        run(name, InPlace(victim), few, x, few.labels)
    assert torch.equal(x, before), "seen before any harm"


@pytest.mark.parametrize("where", ["evaluate", "Attack", "BlackBoxAttack"])
def test_it_is_refused_before_work(where, victim, few):
    def work():
        if where == "evaluate":
            return evaluate(InPlace(victim), few, BALL, ("pgd10",))
        settings = {"num_envs": 2, "classifier": InPlace(victim), "data": few}
        return gym.make_vec(f"advgame/{where}-v0", **settings)

    with pytest.raises(InputError, match="changes the images"):
        work()


class Root(nn.Module):
    """The same function but for a millionth; black pixels have an infinite gradient."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 1e-6 * x.sqrt())


# what forms gradients of the classifier that it attacks; an MLP's start is no attack
GRADIENTS = [n for n in NAMES if "transfer" not in n and "spsa" not in n and n not in LEARNED]


@pytest.mark.parametrize("name", slowly(GRADIENTS, COSTLY))
def test_one_infinite_entry_does_not_spoil_an_image(name, victim, digits):
    data = digits.test.subset(slice(40))
    if name.startswith("aa:"):
        data = data.subset(slice(COUNT))
    x, y, right = data.floats(), data.labels, []
    for model in (victim, Root(victim)):
        found = run(name, model, data, x, y)
        assert all(bool(torch.isfinite(one).all()) for one in found)
        with torch.no_grad():
            right.append(torch.stack([model(one).argmax(1) == y for one in found]).all(0).sum())
    assert right[1] <= right[0] + 2, "as many fall as without"


class Returning(Attack):
    """Returns what a function makes of the images."""

    def __init__(self, make):
        self.make = make

    def _attack(self, model, x, y, rng, check):
        return AttackResult(self.make(x), None, None, 0, 0)


def test_an_own_attacks_images_from_numpy_are_judged_as_others(victim, few):
    mine = {
        kind: Returning(lambda x, kind=kind: torch.from_numpy(1 - x.numpy().astype(kind)))
        for kind in ("float64", "float32")
    }
    found = evaluate(victim, few, BALL, tuple(mine), extra=mine)
    assert torch.equal(found.correct["float64"], found.correct["float32"])
    assert mine["float64"].run(victim, few.floats(), few.labels).x_adv.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: x.numpy(), "floating-point tensor, not ndarray"),
        (lambda x: (255 * x).byte(), r"floating-point tensor, not torch\.uint8"),
        (lambda x: x.to("meta"), "on the device of those that it is given, cpu, not meta"),
        (lambda x: x[:1], "of the shape of those that it is given"),
    ],
)
def test_what_is_no_image_is_refused_in_words(make, said, victim, few):
    with pytest.raises(InputError, match=f"Returning._attack must return images .*{said}"):
        Returning(make).run(victim, few.floats(), few.labels)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("labels", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_are_the_same_labels(name, labels, victim, few):
    (made,) = attacks(name, few, None)
    same_labels(made, victim, few, labels)


@pytest.mark.parametrize("labels", [torch.int32, torch.uint8])
@pytest.mark.parametrize(
    "made",
    [APGD(BALL, 5, targets=2), FAB(BALL, 3, targets=2), Square(Linf(0.02), 300)],
    ids=lambda made: type(made).__name__,
)
def test_autoattacks_parts_take_labels_of_any_integer_type(made, labels, victim, few):
    same_labels(made, victim, few, labels)


@pytest.mark.parametrize("labels", [torch.int32, torch.uint8])
def test_attacks_on_mixtures_take_labels_of_any_integer_type(labels, victim, few):
    mixture = ClassifierMixture([victim, victim], [0.5, 0.5])
    for made in (ARC(BALL, 2), ExpectedLoss(BALL, steps=2)):
        same_labels(made, mixture, few, labels)


def same_labels(attack, model, data, kind):
    x, y = data.floats(), data.labels
    found = [attack.run(model, x, y.to(k), rng=seeded()) for k in (torch.int64, kind)]
    assert torch.equal(*(one.x_adv for one in found))
    assert found[0].forwards == found[1].forwards


@pytest.mark.parametrize("name", [n for n in KINDS if n != "aa:apgd-ce"])  # which works in fp32
def test_double_precision_stays_double(name, victim, few):
    (found,), x = attacks(name, few, None), few.floats().double()
    if name == "fea":
        found = replace(found, pool=found.pool.double())
    x_adv = found.run(copy.deepcopy(victim).double(), x, few.labels, rng=seeded()).x_adv
    assert x_adv.dtype == torch.float64
    assert float(BALL.size(x_adv - x).max()) <= BALL.eps + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_classifier_in_half_precision_is_attacked_in_fp32(name, dtype, victim, few):
    (made,), model = attacks(name, few, None), copy.deepcopy(victim).to(dtype)
    x, kinds = few.floats().to(dtype), (torch.float32, dtype)
    found = [made.run(model, x.to(kind), few.labels, rng=seeded()).x_adv for kind in kinds]
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32
    assert float(BALL.size(found[0] - x.float()).max()) <= BALL.eps + 1e-6
    assert not model._forward_pre_hooks


def test_a_classifier_in_half_precision_is_judged(victim, few):
    model = copy.deepcopy(victim).bfloat16()
    verdicts = evaluate(model, few, Linf(0.3), ("pgd10", "aa:apgd-ce"))
    assert verdicts.accuracy()["clean"] == 1 > verdicts.accuracy()["pgd10"]
    assert verdicts.largest["aa:apgd-ce"] <= 0.3 + 1e-6
    find_flags(model, few, Linf(0.3), verdicts)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["aa:fab", "aa:square", *KINDS])
def test_the_callers_default_dtype_changes_no_attack(name, victim, few, double_by_default):
    x, y = few.floats(), few.labels
    torch.set_default_dtype(torch.float32)
    made, model = attacks(name, few, None), copy.deepcopy(victim)
    expected = [one.run(model, x, y, rng=seeded()).x_adv for one in made]
    torch.set_default_dtype(torch.float64)
    got = [one.run(model, x, y, rng=seeded()).x_adv for one in made]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert torch.get_default_dtype() == torch.float64


def test_the_callers_default_dtype_changes_no_verdict(victim, few, double_by_default):
    verdicts = evaluate(victim, few, BALL, ("pgd10", "aa:apgd-ce"))
    assert not {"non_finite", "gradient_does_not_predict"} & {
        flag.name for flag in find_flags(victim, few, BALL, verdicts)
    }


class SwitchesOff(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        torch.set_grad_enabled(False)
        return self.net(x)


def test_a_forward_that_switches_autograd_off_is_refused(victim, few):
    model, (made,) = SwitchesOff(victim), attacks("pgd10", few, None)
    with pytest.raises(InputError, match="switches autograd off"):
        evaluate(model, few, BALL, ("pgd10",))
    with pytest.raises(InputError, match="switches autograd off"):
        made.run(model, few.floats(), few.labels, rng=seeded())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", READ_LOGITS)
def test_probabilities_are_refused_by_every_attack_that_reads_logits(name, victim, few):
    model, (made,) = nn.Sequential(victim, nn.Softmax(1)), attacks(name, few, None)
    with pytest.raises(InputError, match="remove the final softmax"):
        made.run(model, few.floats(), few.labels, rng=seeded())


class Masked(nn.Module):
    """A classifier that rules some of its classes out."""

    def __init__(self, net, number):
        super().__init__()
        self.net, self.number = net, number

    def forward(self, x):
        logits = self.net(x).clone()
        logits[:, 7:] = self.number
        return logits


@pytest.mark.parametrize("name", READ_LOGITS)
def test_classes_masked_by_infinity_are_refused_in_words(name, victim, digits):
    data = digits.test.subset(digits.test.labels < 7).subset(slice(COUNT))
    (made,), x, y = attacks(name, data, None), data.floats(), data.labels
    with pytest.raises(InputError, match=r"class 7 a logit of -inf, as a mask does: .*-1e4"):
        made.run(Masked(victim, -torch.inf), x, y, rng=seeded())
    with pytest.raises(InputError, match="weights are broken"):
        made.run(Masked(victim, torch.nan), x, y, rng=seeded())
    found = made.run(Masked(victim, -1e4), x, y, rng=seeded())
    assert bool(torch.isfinite(found.x_adv).all()), "the advice works"


@pytest.mark.parametrize("name", [n for n in KINDS if n != "kl-pgd"])  # which uses no label
def test_labels_that_the_classifier_does_not_know_are_refused(name, victim, few):
    (made,), y = attacks(name, few, None), few.labels.clone()
    y[3] = 10
    with pytest.raises(InputError, match=r"0..9|10 classes only"):
        made.run(victim, few.floats(), y, rng=seeded())


def test_an_image_set_keeps_labels_as_losses_need_them(digits):
    data = digits.test.subset(slice(6))
    assert ImageSet(data.images, data.labels.int(), 10).labels.dtype == torch.int64


def test_feature_attack_takes_a_radius_per_image(digits):
    """Each image stays in its own ball, also after others have left."""
    data, pool = digits.test.subset(slice(60)), digits.train.subset(slice(80))
    model = undefended(digits, width=8)
    radii = torch.linspace(0.02, 0.4, 60)
    made = FeatureAttack(Linf(radii), pool.floats(), pool.labels, targets=3, steps=6)
    result = made.run(model, data.floats(), data.labels, rng=seeded())
    assert 10 < int(result.fooled.sum()) < 60
    assert bool((Linf(1.0).size(result.x_adv - data.floats()) <= radii + 1e-6).all())


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (3, 1, 1)])
def test_a_side_of_one_pixel_has_no_neighbours(shape):
    delta = BALL.eps * (torch.rand(2, *shape, generator=seeded()) * 2 - 1)
    found = perturbation_stats(delta, BALL)["attacker/variation"]
    both = [one.mean() for dim in (2, 3) if (one := delta.diff(dim=dim).abs() / BALL.eps).numel()]
    torch.testing.assert_close(found, torch.stack(both).mean() if both else torch.zeros(()))


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
def test_gradients_that_are_no_numbers_point_nowhere(threat, victim, digits):
    """√x has an infinite slope at the digits' black pixels: 0 · ∞ in the chain rule."""

    class Rooted(nn.Module):
        def forward(self, x):
            return victim(x.sqrt() ** 2)

    verdicts = evaluate(Rooted(), digits.test.subset(slice(8)), threat, ("pgd20",))
    assert verdicts.correct["pgd20"].shape == (8,)


class Restless(nn.Module):
    """Replaces one buffer, writes into another, registers a third."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(2))

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.written += 1
        self.register_buffer("new", torch.ones(1))
        return self.net(x)


def test_buffers_are_as_before_however_a_forward_changes_them(victim, few):
    model = Restless(victim)
    held = dict(model.named_buffers())
    before = {name: value.clone() for name, value in held.items()}
    run("pgd10", model, few, few.floats(), few.labels)
    after = dict(model.named_buffers())
    assert list(after) == list(held)
    assert all(after[name] is held[name] for name in held)
    assert all(torch.equal(after[name], before[name]) for name in held)


def test_an_evaluation_in_inference_mode(victim, few):
    expected = evaluate(victim, few, BALL, ("fgsm", "pgd10")).accuracy()
    flags = [flag.name for flag in find_flags(victim, few, BALL, evaluate(victim, few, BALL, ()))]
    scored = score(victim, few, attacks("pgd10", few, None)[0], seeded())
    with torch.inference_mode():
        data = ImageSet(few.images.clone(), few.labels.clone(), 10)
        got = evaluate(victim, data, BALL, ("fgsm", "pgd10"))
        assert got.accuracy() == expected
        assert [flag.name for flag in find_flags(victim, data, BALL, got)] == flags
        assert score(victim, data, attacks("pgd10", data, None)[0], seeded()) == scored
    assert expected["pgd10"] < expected["clean"]


def test_weights_made_in_inference_mode_are_refused(few):
    with torch.inference_mode():
        model = SmallCNN((1, 8, 8), 10, width=8)
    with pytest.raises(InputError, match="weights were made under"):
        evaluate(model, few, BALL, ("fgsm",))


IDS = tuple(name[8:-3] for name in gym.registry if name.startswith("advgame/"))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", IDS)
def test_an_environment_does_the_same_in_any_context(name, context):
    def rollout(spoil):
        env = gym.make_vec(f"advgame/{name}-v0", num_envs=4)
        seen, _ = env.reset(seed=0)
        env.action_space.seed(0)
        found = []
        for _ in range(3):
            if spoil:
                seen.fill_(7.0)  # the caller's own by now
            actions = env.action_space.sample()
            seen, reward, *_ = env.step(actions)
            assert not seen.is_inference()
            found.append((seen.clone(), reward.clone()))
            if spoil:
                reward.fill_(7.0)
                actions.fill(0)
        return found

    plain = rollout(spoil=False)
    with context():
        got = rollout(spoil=True)
    for (a, b), (c, d) in zip(plain, got, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


class Greedy(gym.Env):
    """Writes into the action that it is given, and cuts itself off after 30 of 100 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        return self.observation_space.low * 0, {}

    def step(self, action):
        self.clock += 1
        action *= 100
        return self.observation_space.low * 0, 1.0, False, self.clock >= 30, {}


@pytest.fixture(scope="module")
def greedy():
    gym.register("Greedy-v0", Greedy, max_episode_steps=100)
    yield "Greedy-v0"
    del gym.registry["Greedy-v0"]


def test_a_tasks_writing_and_its_own_end_reach_nobody_else(greedy, rng):
    env = ImitationVectorEnv(2, env_id=greedy)
    env.reset(seed=0)
    actions = torch.full((2, 1), 0.5)
    ends = []
    for t in range(60):
        _, _, terminated, truncated, _ = env.step(actions)
        assert not terminated.any()
        ends += [t + 1] * bool(truncated.all())
    assert torch.equal(actions, torch.full((2, 1), 0.5))
    assert ends == [30, 60]
    assert (
        play(greedy, lambda raw: torch.full((len(raw), 1), 0.5), 3, rng)["lengths"].tolist()
        == [30] * 3
    )
    task = make_task(greedy, 1)
    task.reset(torch.ones(1, dtype=torch.bool), rng)
    task.step(actions[:1], torch.ones(1, dtype=torch.bool))
    assert float(actions[0, 0]) == 0.5


def test_a_recording_holds_what_was_done(greedy):
    import numpy as np

    own = np.zeros(1, dtype=np.float32)

    def act(observation):
        own[0] = 0.25  # a policy that hands out one and the same array
        return own

    found = record(act, greedy, 0, 1)
    own[0] = 9
    assert found.lengths.tolist() == [30]
    assert found.actions.unique().tolist() == [0.25]
    assert found.terminated.tolist() == [False]

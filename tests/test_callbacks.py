"""Callbacks: told in order, they change no bit, end a training where it can go on, keep a state."""

import signal

import numpy as np
import pytest
import torch
from equal_runs import assert_equal_metrics, weights
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from advgame import Callback, Defender, InputError, Linf, RunFolder, Trainer, TrainingPlan
from advgame.attacks import fgsm
from advgame.classifiers import SmallCNN
from advgame.games import AdversarialTraining, DefenderTraining
from advgame.seeding import seeded_init

EPOCHS, STEPS = 3, 4  # steps of an epoch
PLAN = TrainingPlan(EPOCHS, ema=0.9)


class Told(Callback):
    """Keeps what it is told; does something at a step or epoch."""

    def __init__(self, **at):
        self.told, self.at = [], at

    def on_training_start(self, trainer):
        self.told.append(("start", trainer.step))

    def on_step(self, trainer, stats):
        assert not any(value.requires_grad for value in stats.values())
        self.told.append(("step", trainer.step))
        return self.at.get(f"step{trainer.step}", lambda: None)()

    def on_epoch_end(self, trainer, metrics):
        assert metrics["eval/robust"] == 0.5
        self.told.append(("epoch", trainer.epoch))
        return self.at.get(f"epoch{trainer.epoch}", lambda: True)()

    def on_training_end(self, trainer):
        self.told.append(("end", trainer.step))

    def state_dict(self):
        return {"told": self.told}

    def load_state_dict(self, state):
        self.told = [tuple(one) for one in state["told"]]


class Other(Callback):
    """Has no hook of its own, and no state."""


def trainer(folder, digits, *callbacks, plan=PLAN, network=None):
    with seeded_init(0):
        module = network() if network else SmallCNN((1, 8, 8), 10, width=2)
    data = digits.train.first(16 * STEPS)
    rules = AdversarialTraining(Linf(0.1), fgsm)
    game = DefenderTraining(rules, Defender(module, lr=0.1), data, 16, 0)
    run = RunFolder(folder) if folder.exists() else RunFolder.create(folder, {}, "cpu")
    return Trainer(game, run, plan, lambda module: {"eval/robust": 0.5}, callbacks=callbacks)


@pytest.fixture
def whole(tmp_path, digits):
    trainer(tmp_path / "whole", digits).fit(resume=False)
    return tmp_path / "whole"


def assert_equal(one, two):
    assert_equal_metrics(one, two)
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name]), name


def order(first=1, last=EPOCHS * STEPS):
    for step in range(first, last + 1):
        yield "step", step
        if step % STEPS == 0:
            yield "epoch", step // STEPS


def test_they_are_told_in_order_and_change_no_bit(tmp_path, digits, whole):
    told = Told()
    made = trainer(tmp_path / "told", digits, told, Other())
    made.fit(resume=False)
    assert told.told == [("start", 0), *order(), ("end", EPOCHS * STEPS)]
    assert made.stopped_by is None
    assert_equal(tmp_path / "told", whole)


@pytest.mark.parametrize(
    ("place", "answer"),
    [
        ("step1", False),
        ("step8", False),
        ("epoch2", False),
        ("epoch3", False),
        ("step6", 0),
        ("step6", torch.tensor(False)),
    ],
)
def test_false_ends_it_where_it_can_go_on(place, answer, tmp_path, digits, whole, capsys):
    one, other = Told(**{place: lambda: answer}), Told()
    made = trainer(tmp_path / "cut", digits, one, other)
    made.fit(resume=False)
    number = int(place.strip("stepoch"))
    at = number * (STEPS if place.startswith("epoch") else 1)
    assert (made.step, made.stopped_by) == (at, "Told")
    assert one.told == other.told == [("start", 0), *order(1, at), ("end", at)], "all are told"
    said = f"Told ended the training at step {at} of {EPOCHS * STEPS}"
    assert (said in capsys.readouterr().err) == (at < EPOCHS * STEPS)
    again = Told()
    trainer(tmp_path / "cut", digits, again).fit(resume=True)
    assert again.told == [
        ("start", 0), *order(1, at), ("start", at), *order(at + 1), ("end", EPOCHS * STEPS)
    ]  # fmt: skip
    assert_equal(tmp_path / "cut", whole)


def fail():
    raise OSError("no such table")


def test_an_error_of_a_callback_says_where_and_the_run_goes_on(tmp_path, digits, whole):
    with pytest.raises(OSError, match="no such table") as caught:
        trainer(tmp_path / "cut", digits, Other(), Told(step6=fail)).fit(resume=False)
    assert "free some space" not in str(caught.value)
    assert "in Told.on_step after step 6 of 12" in caught.value.__notes__[0]
    trainer(tmp_path / "cut", digits, Told()).fit(resume=True)
    assert_equal(tmp_path / "cut", whole)


def test_before_the_first_checkpoint_a_game_that_was_played_is_not_taken_for_a_new_one(
    tmp_path, digits, whole
):
    """Its steps would count, the row of its epoch would be lost, and no resume find all rows."""
    made = trainer(tmp_path / "cut", digits, Told(epoch1=fail))
    with pytest.raises(OSError, match="no such table"):
        made.fit()
    for resume in (True, False):
        with pytest.raises(InputError, match=r"played up to step 4 of 12.*make game and trainer"):
            made.fit(resume=resume)
    trainer(tmp_path / "cut", digits).fit(resume=True)
    assert_equal(tmp_path / "cut", whole)


def test_after_an_error_the_same_trainer_goes_on_from_its_checkpoint(tmp_path, digits, whole):
    made = trainer(tmp_path / "cut", digits, told := Told(step6=fail))
    with pytest.raises(OSError, match="no such table"):
        made.fit()
    told.at = {}
    made.fit(resume=True)
    assert_equal(tmp_path / "cut", whole)
    shown = next(iter(tmp_path.glob("cut/events*")))
    assert events(shown) == events(next(iter(whole.glob("events*")))), "no step is shown twice"


def events(path):
    """How many summaries of single steps a file has."""
    read = EventFileLoader(str(path))
    return sum(v.tag.startswith("step/") for one in read.Load() for v in one.summary.value)


def test_ctrl_c_in_a_callback_stops_after_the_step(tmp_path, digits, whole):
    told = Told(step6=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path / "cut", digits, told).fit(resume=False)
    assert stop.value.code == 128 + signal.SIGINT
    assert told.told[-1] == ("step", 6), "no end: it goes on"
    again = trainer(tmp_path / "cut", digits)  # without callbacks, too
    again.fit(resume=True)
    assert_equal(tmp_path / "cut", whole)


@pytest.mark.parametrize(
    ("callbacks", "answer"),
    [
        ((Told,), "not the class Told"),
        ((print,), "instances of advgame.Callback, not <built-in"),
        ((None,), "not None"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, answer, tmp_path, digits):
    with pytest.raises(InputError, match=answer):
        trainer(tmp_path / "run", digits, *callbacks)


def test_a_state_that_could_not_be_read_again_is_refused(tmp_path, digits):
    class Odd(Callback):
        def state_dict(self):
            return {"best": [(1, torch.ones(1)), np.float64(0.5)]}

    with pytest.raises(InputError, match=r"Odd.state_dict\(\) holds a float64"):
        trainer(tmp_path / "run", digits, Odd()).fit(resume=False)


def test_one_callback_alone_is_no_list(tmp_path, digits):
    made = trainer(tmp_path / "run", digits)
    with pytest.raises(InputError, match=r"a list of advgame\.Callback"):
        Trainer(made.game, made.run, made.plan, made.validate, callbacks=Other())


def test_two_of_a_kind_keep_their_own_states(tmp_path, digits):
    one, two = Told(), Told(step6=lambda: False)
    trainer(tmp_path / "run", digits, one, two).fit(resume=False)
    one.told[:], two.told[:] = [], []
    again, other = Told(), Told()
    made = trainer(tmp_path / "run", digits, again, Other(), other)
    made.fit(resume=True)
    assert again.told == other.told
    assert made.stopped_by is None


def test_a_training_that_is_there_is_not_overwritten(tmp_path, digits, whole):
    """Without ``resume=True`` its table and best weights were deleted."""
    content = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    made = trainer(tmp_path / "twice", digits)
    made.fit()
    kept = (tmp_path / "twice" / "metrics.csv").read_bytes()
    for one in (made, trainer(whole, digits)):
        with pytest.raises(InputError, match=r"has a training.*fit\(resume=True\) goes on"):
            one.fit()
    assert (tmp_path / "twice" / "metrics.csv").read_bytes() == kept
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == content


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        ({}, {"epochs": 5}, "epochs=3, not 5"),
        ({"schedule": "multistep"}, {"epochs": 5, "schedule": "multistep"}, "epochs=3, not 5"),
        ({}, {"schedule": "constant"}, "schedule=onecycle, not constant"),
        ({"schedule": "constant"}, {"epochs": 1, "schedule": "constant"}, "2 epochs, and its plan"),
        ({"ema": 0.5}, {"ema": 0.9}, "ema=0.5, not 0.9"),
    ],
)
def test_a_training_goes_on_by_the_plan_that_it_began_with(before, after, answer, tmp_path, digits):
    """The schedule stayed that of the old plan, and fewer epochs never ended."""

    def enough(step):
        return Told(**{f"step{step}": lambda: False})

    plans = [TrainingPlan(**{"epochs": EPOCHS, **one}) for one in (before, after)]
    trainer(tmp_path / "cut", digits, enough(8), plan=plans[0]).fit()
    with pytest.raises(InputError, match=answer):
        trainer(tmp_path / "cut", digits, enough(9), plan=plans[1]).fit(resume=True)


def test_a_constant_rate_may_go_on_for_longer(tmp_path, digits):
    plans = [TrainingPlan(epochs, "constant") for epochs in (2, 3)]
    for resume, plan in enumerate(plans):
        trainer(tmp_path / "cut", digits, plan=plan).fit(resume=bool(resume))
    trainer(tmp_path / "once", digits, plan=plans[1]).fit()
    assert_equal(tmp_path / "cut", tmp_path / "once")

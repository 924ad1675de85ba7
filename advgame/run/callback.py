"""What a training tells code of your own: `Callback`, with the hooks of Stable-Baselines3's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from advgame.errors import InputError

if TYPE_CHECKING:
    from advgame.run.loop import Trainer


class Callback:
    """Base class of what `advgame.Trainer` calls; override the hooks that you need.

    A hook sees the trainer: ``trainer.game``, ``trainer.module`` (what learns, in training mode: a
    hook leaves it as it was), ``trainer.epoch`` and ``trainer.step`` (how many are done),
    ``trainer.total`` (steps), ``trainer.best``, ``trainer.run`` (the folder). A hook that returns
    False ends the training: a checkpoint is written, ``last.safetensors`` too, and ``fit`` returns.
    ``fit(resume=True)`` then goes on. With several processes every one calls its own callbacks, and
    all stop where one does.
    """

    def on_training_start(self, trainer: Trainer) -> None:
        """Called before the first step of every ``fit``, on resuming with the state restored."""

    def on_step(self, trainer: Trainer, stats: Mapping[str, Tensor]) -> bool | None:
        """Called after every step.

        Args:
            trainer: whose ``step`` counts this one.
            stats: what the game logs of the step, scalar tensors on its device.

        Returns:
            False ends the training; True or None goes on.
        """
        return None

    def on_epoch_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> bool | None:
        """Called after every epoch, before its checkpoint is written.

        Args:
            trainer: whose ``epoch`` counts this one.
            metrics: the row of metrics.csv: means over the epoch, and ``eval/...`` where it was
                validated.

        Returns:
            False ends the training; True or None goes on.
        """
        return None

    def on_training_end(self, trainer: Trainer) -> None:
        """Called where the training has ended, by itself or by a callback; not after a signal."""

    def state_dict(self) -> dict[str, Any]:
        """What the callback must know to go on: tensors, numbers, words, and containers of them.

        It is part of every checkpoint. A training that is resumed has it back, by the name of the
        class; steps since that checkpoint are played, and told, again.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, read back from a checkpoint."""


class Hooks:
    """All callbacks of a training.

    Args:
        callbacks: told in this order.

    Raises:
        InputError: something that is no callback.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        given: object = callbacks  # of a stranger, whatever the type says
        if not isinstance(given, Sequence):
            raise InputError("callbacks are a list of advgame.Callback: [MyCallback()]")
        self.named: dict[str, Callback] = {}
        for one in given:
            if not isinstance(one, Callback):
                words = f"the class {one.__name__}" if isinstance(one, type) else repr(one)
                raise InputError(f"callbacks are instances of advgame.Callback, not {words}")
            name, number = type(one).__name__, 1 + sum(type(o) is type(one) for o in self.all)
            self.named[name if number == 1 else f"{name} {number}"] = one
        self.stopped_by: str | None = None

    @property
    def all(self) -> list[Callback]:
        """All callbacks in the order in which they are told."""
        return list(self.named.values())

    @property
    def told_of_steps(self) -> bool:
        """Whether any callback looks at single steps, and may end the training after each."""
        return any(type(one).on_step is not Callback.on_step for one in self.all)

    def start(self, trainer: Trainer) -> None:
        """Tell every callback that the first step is next."""
        self.stopped_by = None
        for name, one in self.named.items():
            with _named(name, "on_training_start", trainer):
                one.on_training_start(trainer)

    def step(self, trainer: Trainer, stats: Mapping[str, Tensor]) -> None:
        """After a step; every callback is told, also where one has ended the training."""
        if self.named:
            stats = {tag: value.detach() for tag, value in stats.items()}
        for name, one in self.named.items():
            with _named(name, "on_step", trainer):
                self._heed(name, one.on_step(trainer, stats))

    def epoch(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Tell every callback of an epoch, as `step` does."""
        for name, one in self.named.items():
            with _named(name, "on_epoch_end", trainer):
                self._heed(name, one.on_epoch_end(trainer, dict(metrics)))

    def end(self, trainer: Trainer) -> None:
        """Tell every callback that the training has ended."""
        for name, one in self.named.items():
            with _named(name, "on_training_end", trainer):
                one.on_training_end(trainer)

    def _heed(self, name: str, answer: object) -> None:
        if answer is not None and not bool(answer) and self.stopped_by is None:
            self.stopped_by = name

    def state_dict(self) -> dict[str, Any]:
        """What all callbacks must know to go on, by their names.

        Raises:
            InputError: a state that a checkpoint could not give back.
        """
        states = {}
        for name, one in self.named.items():
            states[name] = one.state_dict()
            if (odd := _unreadable(states[name])) is not None:
                raise InputError(
                    f"{name}.state_dict() holds {odd}, which no checkpoint gives back: only "
                    "tensors, numbers, words, and lists, tuples and dicts of them"
                )
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give every callback back what its name has; one that was not there begins anew."""
        for name, one in self.named.items():
            if name in states:
                one.load_state_dict(states[name])


def _unreadable(state: object) -> str | None:
    """The first type in nested containers that is not read back without running code."""
    kind = type(state)
    if isinstance(state, Tensor) or kind in (int, float, bool, str, bytes, type(None)):
        return None
    parts: Iterable[object] = ()
    if kind is dict:
        parts = [one for pair in cast(dict[object, object], state).items() for one in pair]
    elif kind in (list, tuple):
        parts = cast(Iterable[object], state)
    else:
        return f"a {kind.__name__}"
    return next((odd for one in parts if (odd := _unreadable(one)) is not None), None)


@contextmanager
def _named(name: str, hook: str, trainer: Trainer) -> Iterator[None]:
    """An error of somebody's callback says where it was, and that the run can go on."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"in {name}.{hook} after {trainer.place}; the checkpoints in "
            f"{trainer.run.path} are whole: fit(resume=True) goes on"
        )
        raise

"""The training loop that all games share: schedule, averaging, validation, checkpoints, curves."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from advgame.classifiers.foreign import built_as, check_savable, copying, settle_spectral_norms
from advgame.defender import TICKS
from advgame.errors import InputError
from advgame.run.callback import Callback, Hooks
from advgame.run.checkpoint import Checkpoints, load_weights, save_weights, step_of
from advgame.run.curves import STEP, Curves, Panels, means
from advgame.run.devices import left_alone
from advgame.run.files import digest, write_atomically
from advgame.run.folder import Metrics, RunFolder
from advgame.run.interrupt import Interrupt
from advgame.run.options import typed_again
from advgame.run.plan import TrainingPlan
from advgame.run.program import going_on
from advgame.run.progress import TrainingProgress

Validate = Callable[[nn.Module], dict[str, float]]
COSTS = ("cost/forwards", "cost/input_backwards", "cost/backwards")
"""What a game logs of a step's passes, per image, of which a budget is spent."""
LOSSES = ("game/adversarial_loss", "game/clean_loss")
"""What the defender descends: the first of them that a game logs."""
FINAL = ("final/clean", "final/autoattack", "final/worst_case")
"""What a run's report adds to its curves, and by which TensorBoard's table compares runs."""
POINTS = 20  # of an epoch's steps that TensorBoard shows alone
AGREEING = 1.0
"""Seconds after which processes ask each other for signals again, within an epoch."""


class Learner(Protocol):
    """Whose training a run is about: the defender of most games, an attacker of some."""

    @property
    def fabric(self) -> Fabric:
        """Device, precision and processes of the training."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network that learns, which checkpoints hold."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose learning rate follows the schedule."""
        ...


class Game(Protocol):
    """What the loop needs to know of a game."""

    steps_per_epoch: int

    @property
    def learner(self) -> Learner:
        """The player whose network and optimiser the run saves."""
        ...

    def step(self) -> dict[str, Tensor]:
        """Play one step; returns scalar tensors to average over the epoch."""
        ...

    def end_epoch(self, curves: Curves | None, step: int) -> dict[str, float]:
        """Scalars of the epoch as a whole; may draw histograms into ``curves``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs but the learner's weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        ...


class Trainer:
    """Plays a game to its end, from the start or from the newest checkpoint.

    Args:
        game: the game; already reset.
        run: its folder.
        plan: length, schedule, averaging.
        validate: scores of the learner's module on the validation split.
        select: the score whose highest value chooses the best weights; of equal ones the earliest.
        role: the learner's name in tags and file names.
        resumable: whether the game's state is all of it; a run of another one ends where it stops.
        callbacks: code of your own that is told of every step and epoch, and can end the training.
        panels: of curves.png, which TensorBoard's tab CUSTOM SCALARS shows, too.
        part_of: the run that ``--resume`` takes, where this training is a part of another run.
    """

    def __init__(
        self,
        game: Game,
        run: RunFolder,
        plan: TrainingPlan,
        validate: Validate,
        *,
        select: str = "eval/robust",
        role: str = "defender",
        resumable: bool = True,
        callbacks: Sequence[Callback] = (),
        panels: Panels | None = None,
        part_of: RunFolder | None = None,
    ) -> None:
        self.panels, self.part_of = panels or {}, part_of
        self.game, self.run, self.plan, self.validate = game, run, plan, validate
        self.select, self.role, self.resumable = select, role, resumable
        self.hooks = Hooks(callbacks)
        self.fabric = game.learner.fabric
        self.module = game.learner.module
        if not game.steps_per_epoch:
            raise InputError("the training split is smaller than one batch")
        check_savable(self.module)
        self.total = plan.epochs * game.steps_per_epoch if plan.budget is None else None
        self.scheduler = plan.scheduler(game.learner.optimizer, self.total or TICKS)
        self.average: AveragedModel | None = None
        if plan.ema is not None:
            with copying(self.module, "ema averages a copy of the weights"):
                self.average = AveragedModel(self.module, use_buffers=True)
        self.step = 0
        self.spent = self._price = 0.0  # of a budget: so far, and by the last step
        self._tell_spent()
        self.best = float("-inf")
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.metrics: Metrics | None = None
        self.curves: Curves | None = None
        self.points: list[tuple[int, dict[str, Tensor]]] = []  # of single steps, not yet logged
        self._played = False  # whether the game has left its beginning, in this process
        self.seconds = 0.0
        self._asked, self._asked_at = (0, time.monotonic()), 0  # for signals: when, and when again

    @property
    def chief(self) -> bool:
        """Whether this process writes the run folder."""
        return bool(self.fabric.global_rank == 0)

    @property
    def epoch(self) -> int:
        """How many epochs of the training are done."""
        return self.step // self.game.steps_per_epoch

    @property
    def over(self) -> bool:
        """Whether the training has come to its end."""
        if self.plan.budget is None:
            return self.step == self.total
        return self.plan.budget - self.spent < self._price / 2

    @property
    def place(self) -> str:
        """How far the training is, in words."""
        if self.plan.budget is None:
            return f"step {self.step} of {self.total}"
        return f"step {self.step}, at {self.spent / self.plan.budget:.0%} of its budget"

    @property
    def stopped_by(self) -> str | None:
        """The callback that ended the training, by the name of its class; None where none did."""
        return self.hooks.stopped_by

    @property
    def judged(self) -> nn.Module:
        """What is validated and reported: the average where there is one."""
        return self.average.module if self.average is not None else self.module

    @property
    def best_weights(self) -> Path:
        """The file of the weights that validation has chosen so far."""
        return self.run.path / "checkpoints" / "best.safetensors"

    def fit(self, *, resume: bool = False) -> None:
        """Play to the end, or until a callback says that it is enough.

        Args:
            resume: go on from the newest checkpoint in the run's folder.

        Raises:
            SystemExit: interrupted, after a checkpoint was written (128 + the signal's number).
            InputError: nothing to resume, a training that is there already and is not to be
                resumed, or another process is writing the run.
            ConnectionError: another process of the training has ended.
        """
        with self.run.held() if self.chief else nullcontext():
            try:
                self._fit(resume)
            except RuntimeError as error:
                if self.fabric.world_size == 1 or not left_alone(error):
                    raise
                raise ConnectionError(
                    f"another process of this training has ended or is silent, at {self.place}: "
                    f"start all again: {self._going_on()}"
                ) from error

    def _fit(self, resume: bool) -> None:
        rows = self._restore() if resume else self._new()
        if self.chief:
            if self.best == float("-inf"):  # no score yet: such a file is of an epoch that is lost
                self.best_weights.unlink(missing_ok=True)
            if self.role == "defender":
                self.run.note_network(built_as(self.module))
            self.metrics = Metrics(self.run.path / "metrics.csv", rows)
            self.curves = Curves(self.run.path, purge_step=self.step + 1 if resume else None)
            if self.curves.events.new:
                self.curves.settings(self.run.about(), (self.select, *FINAL))
        try:
            if self.step == 0:  # rows of metrics.csv without any checkpoint: those were lost
                self.fabric.barrier()  # the chief has cleared away what a kill left half written
                self.run.checkpoints.save(0, {}, {}, self.fabric.global_rank)
            self.hooks.start(self)
            self._play()
        except OSError as error:
            if getattr(error, "__notes__", None):  # a callback's own
                raise
            advice = f"whole checkpoints are intact: free some space, then {self._going_on()}"
            raise OSError(f"{error}; {advice}") from error
        finally:
            if self.curves is not None:
                self.curves.close()
        self._end()

    def _end(self) -> None:
        if self.chief:
            save_weights(self.judged, self.run.path / "checkpoints" / "last.safetensors")
            if not self.over:
                by = self.stopped_by or "another process's callback"
                print(f"{by} ended the training at {self.place}", file=sys.stderr)
        self.fabric.barrier()  # the others read what the chief has written
        self.hooks.end(self)

    def _play(self) -> None:
        """Step by step until the end, a signal, or a callback that has had enough."""
        with Interrupt() as interrupt, self._progress() as progress:
            while not self.over:
                began = time.perf_counter()
                stats = self._one_step()
                self.seconds += time.perf_counter() - began
                self.hooks.step(self, stats)
                whole = self.step % self.game.steps_per_epoch == 0
                note = self._end_epoch() if whole or self.over else ""
                progress.step(self._progress_made(), note)
                due = bool(note) and self._save_due()
                if due:
                    self._save()
                number, enough = self._asked_to_stop(interrupt.signal, last=bool(note))
                if number:
                    self._stop(number, saved=due)
                if enough:
                    if not due:
                        self._save()
                    break

    def _save_due(self) -> bool:
        epoch = self.step // self.game.steps_per_epoch
        return epoch % self.plan.save_every == 0 or self.over

    def _one_step(self) -> dict[str, Tensor]:
        self._played = True
        with self._divergence_named():
            stats = self.game.step()
        if self.plan.budget is None:
            self.scheduler.step()
        else:
            self._spend(stats, self.plan.budget)
        if self.average is not None:
            self._follow(self.average)
        for tag, value in stats.items():
            self.sums[tag] = self.sums.get(tag, torch.zeros_like(value)) + value.detach()
            self.counts[tag] = self.counts.get(tag, 0) + 1
        self.step += 1
        if self.chief and self.step % max(1, self.game.steps_per_epoch // POINTS) == 0:
            kept = {tag: value.detach().clone() for tag, value in stats.items()}
            self.points.append((self.step, kept))
        return stats

    def _spend(self, stats: Mapping[str, Tensor], budget: float) -> None:
        """Take a step's cost off the budget; the learning rate's schedule follows its share."""
        if any(kind not in stats for kind in COSTS):
            raise InputError(f"this game does not count its passes, {COSTS[0]}: go by epochs")
        prices = (1.0, *self.plan.prices)
        cost = torch.stack([stats[kind] * price for kind, price in zip(COSTS, prices, strict=True)])
        cost = cost.sum()
        if self.fabric.world_size > 1:  # all must end at the same step
            cost = cast(Tensor, self.fabric.all_reduce(cost))
        self._price = float(cost) / self.game.steps_per_epoch
        self.spent += self._price
        self._tell_spent()
        for _ in range(round(min(self.spent / budget, 1) * TICKS) - self.scheduler.last_epoch):
            self.scheduler.step()

    def _tell_spent(self) -> None:
        """The learner has schedules of its own, and so has its game."""
        if self.plan.budget is not None:
            cast(Any, self.game.learner).spent = min(self.spent / self.plan.budget, 1)

    @torch.no_grad()
    def _follow(self, average: AveragedModel) -> None:
        """One step of the moving average; its decay rises to `TrainingPlan.ema`.

        `AveragedModel` itself would have the host wait for the device at each step.
        """
        assert self.plan.ema is not None
        averages, weights = [], []
        for there, here in self._averaged(average):
            if here.is_floating_point():
                averages.append(there)
                weights.append(here)
        decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        if int(average.n_averaged) == 0:  # it lies on the CPU
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        average.n_averaged += 1

    @torch.no_grad()
    def _count(self, average: AveragedModel) -> None:
        """Set batch norm's counters and spectral norm's vectors, no averages, once an epoch."""
        for there, here in self._averaged(average):
            if not here.is_floating_point():
                there.copy_(here)
        settle_spectral_norms(average.module)

    def _averaged(self, average: AveragedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of an average and what it is of: parameters, then buffers."""
        yield from zip(average.module.parameters(), self.module.parameters(), strict=True)
        yield from zip(average.module.buffers(), self.module.buffers(), strict=True)

    @contextmanager
    def _divergence_named(self) -> Iterator[None]:
        """An error that comes of numbers that are no longer finite says so.

        They are looked for after an error only: a policy without probabilities, say, fails at once,
        a classifier with weights of NaN goes on to the end of its epoch.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            players = {self.role: self.module.state_dict(), **self.game.state_dict()}
            broken = next(_not_finite(players), None)
            if broken is None:
                raise
            raise InputError(
                f"training diverged at step {self.step + 1}: {broken} is not finite; what was "
                f"saved before is in {self.run.path}; start a new run with a lower learning rate, "
                "--lr or that player's own"
            ) from error

    def _end_epoch(self) -> str:
        epoch = -(-self.step // self.game.steps_per_epoch)  # a budget may end within one
        row: dict[str, float] = {"epoch": epoch, "step": self.step}
        with self._divergence_named():
            found = means(self.sums, self.counts) | self.game.end_epoch(self.curves, self.step)
        row |= self._agreed(found)
        row[f"{self.role}/lr"] = float(self.scheduler.get_last_lr()[0])
        if self.plan.budget is not None:
            row["cost/spent"] = self.spent
        self.sums, self.counts = {}, {}
        if self.average is not None:
            self._count(self.average)
        if epoch % self.plan.validate_every == 0 or self.over:
            row |= self.validate(self.judged)
            if row[self.select] > self.best:
                self.best = row[self.select]
                if self.chief:
                    save_weights(self.judged, self.best_weights)
        row["time/seconds"] = self.seconds
        row["time/steps_per_second"] = self.step / max(self.seconds, 1e-9)
        if not all(math.isfinite(value) for value in row.values()):
            bad = [name for name, value in row.items() if not math.isfinite(value)]
            raise InputError(
                f"training diverged: {', '.join(bad[:3])} not finite in epoch {epoch}; "
                "start a new run with a lower --lr, or rate of the player whose numbers they are"
            )
        if self.metrics is not None and self.curves is not None:
            self.metrics.add(row)
            if epoch in (1, self.plan.validate_every) or self.over:  # as soon as tags are known
                tags = {*row, *(STEP + tag for _, stats in self.points for tag in stats)}
                self.curves.layout(self.panels, tags, self.step)
            self._log_points()
            self.curves.scalars({k: v for k, v in row.items() if "/" in k}, self.step)
        self.hooks.epoch(self, row)
        losses = [row[tag] for tag in LOSSES if tag in row]
        shown = {"loss": losses[0]} if losses else {}
        shown |= {tag[5:]: value for tag, value in row.items() if tag.startswith("eval/")}
        return f"epoch {epoch} " + " ".join(f"{name} {value:.3f}" for name, value in shown.items())

    def _agreed(self, mine: dict[str, float]) -> dict[str, float]:
        """The mean over processes of what each found on its share of the batches."""
        if self.fabric.world_size == 1:
            return mine
        every: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(every, mine)
        found = {name: [one[name] for one in every if name in one] for name in mine}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _log_points(self) -> None:
        """Write what single steps logged: once an epoch, and before each checkpoint."""
        if self.curves is not None:
            self.curves.steps(self.points)
        self.points = []

    def _modules(self) -> Mapping[str, nn.Module]:
        modules = {self.role: self.module}
        return modules if self.average is None else {**modules, "average": self.average}

    def _save(self) -> None:
        self._log_points()
        rows, left = divmod(self.step, self.game.steps_per_epoch)
        state = {
            "device": self.fabric.device.type,
            "plan": self.plan.fixed(),
            "step": self.step,
            "spent": self.spent,
            "price": self._price,
            "best": self.best,
            "rows": rows + bool(left and self.over),
            "sums": self.sums,
            "counts": self.counts,
            "seconds": self.seconds,
            "game": self.game.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.hooks.named:
            state["callbacks"] = self.hooks.state_dict()
        scored = self.chief and self.best > float("-inf") and self.best_weights.is_file()
        files = [self.best_weights] if scored else []
        self.run.checkpoints.save(self.step, self._modules(), state, self.fabric.global_rank, files)
        self.fabric.barrier()

    def _new(self) -> int:
        """Refuse a folder whose training a new one would overwrite; else as `_anew`."""
        table, reached = self.run.path / "metrics.csv", self.run.checkpoints.reached()
        if reached or (reached is None and table.exists() and table.stat().st_size):
            raise InputError(
                f"{self.run.path} has a training, which a new one would overwrite: "
                "fit(resume=True) goes on with it, or make a new folder"
            )
        return self._anew()

    def _anew(self) -> int:
        """No rows to keep; refuses a game that is not at its beginning any more."""
        if self._played:
            raise InputError(
                f"the game was played up to {self.place} without a checkpoint: make game and "
                "trainer anew, they begin again to the same bits"
            )
        return 0

    def _restore(self) -> int:
        rank = self.fabric.global_rank
        path, complaints = self.run.checkpoints.newest(rank)
        for line in complaints:
            print(f"warning: {line}", file=sys.stderr)
        if self.fabric.world_size > 1:  # a kill may have come between two processes' checkpoints
            mine = torch.tensor(float(step_of(path) if path else -1), device=self.fabric.device)
            common = int(cast(Tensor, self.fabric.all_reduce(mine, reduce_op="min")))
            path, _ = self.run.checkpoints.newest(rank, at_most=common)
        table = self.run.path / "metrics.csv"
        if path is None and table.exists() and table.stat().st_size:
            raise InputError(
                f"{table} has epochs, but {self.run.checkpoints.folder} has no checkpoint to go on "
                "from: restore one from a backup, or start a new run (this one is left as it is)"
            )
        if path is None or step_of(path) == 0:
            return self._anew()  # killed before there was more: begin again, to the same bits
        try:
            rows = self._take(Checkpoints.load(path, self._modules()))
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{path} is a checkpoint of another game or version ({error!r}): restore the "
                "run's own, or start a new run"
            ) from error
        if self.chief and self.best > float("-inf"):
            self._restore_best(path / self.best_weights.name)
        return rows

    def _restore_best(self, kept: Path) -> None:
        """Go back to the weights of `best`: a kill may have lost the epoch that wrote the file.

        Args:
            kept: the checkpoint's own; those of earlier versions have none.
        """
        best = self.best_weights
        if kept.is_file():
            if not best.is_file() or digest(best) != digest(kept):
                write_atomically(best, kept.read_bytes())
        elif not best.is_file():
            raise InputError(f"{best} is lost: restore it from a backup, or start a new run")

    def _take(self, state: Mapping[str, Any]) -> int:
        """Go on from a checkpoint; how many rows of metrics.csv it vouches for."""
        if state["device"] != self.fabric.device.type:
            raise InputError(
                f"{self.run.path} was trained on {state['device']}: resume it on such a device"
            )
        self._check_plan(state.get("plan", {}), state["step"])  # older checkpoints note none
        self.game.load_state_dict(state["game"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        self.spent, self._price = state["spent"], state["price"]
        self._tell_spent()
        self.hooks.load_state_dict(state.get("callbacks", {}))
        device = self.fabric.device
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts, self.points = state["counts"], []
        return int(state["rows"])

    def _check_plan(self, had: Mapping[str, Any], step: int) -> None:
        """Refuse another plan than the training began with: its schedule goes over all steps."""
        for name, now in self.plan.fixed().items():
            if had.get(name, now) != now:
                raise InputError(
                    f"{self.run.path} began with a plan of {name}={had[name]}, not {now}: give it "
                    "that one, or start a new run"
                )
        if self.total is not None and step > self.total:
            raise InputError(
                f"{self.run.path} has done {step / self.game.steps_per_epoch:g} epochs, and its "
                f"plan is of {self.plan.epochs}: ask for no fewer"
            )

    def _asked_to_stop(self, signal_here: int | None, *, last: bool) -> tuple[int, bool]:
        """The signal that any process got, or 0, and whether a callback of any has ended it.

        All must stop after the same step. To ask has the host wait for the device: several
        processes ask at the end of an epoch, where a callback is told of single steps at each,
        and else about every `AGREEING` seconds, at steps that they agree on, too.

        Args:
            signal_here: that this process got.
            last: whether an epoch or the training ends here.
        """
        here = (signal_here or 0, self.stopped_by is not None)
        if self.fabric.world_size == 1:
            return here
        if not (last or self.hooks.told_of_steps or self.step >= self._asked_at):
            return 0, False
        now = time.monotonic()
        pace = (now - self._asked[1]) / max(1, self.step - self._asked[0])
        mine = torch.tensor([*map(float, here), pace], device=self.fabric.device)
        found = cast(Tensor, self.fabric.all_reduce(mine, reduce_op="max")).tolist()
        self._asked = (self.step, now)
        self._asked_at = self.step + max(1, int(AGREEING / max(found[2], 1e-9)))
        return int(found[0]), bool(found[1])

    def _going_on(self) -> str:
        run = self.part_of or self.run
        return going_on(run.path, typed_again(run.about()["config"]))

    def _stop(self, number: int, *, saved: bool) -> None:
        if not saved:
            self._save()
        name = signal.Signals(number).name
        advice = (
            f"go on with {self._going_on()}"
            if self.resumable
            else "it cannot go on, since its environment cannot be saved: start a new run"
        )
        print(f"\nstopped by {name} at {self.place}; {advice}", file=sys.stderr)
        raise SystemExit(128 + number)

    def _progress(self) -> TrainingProgress:
        unit, total = "step", self.total
        if self.plan.budget is not None:
            unit, total = "forwards per image:", round(self.plan.budget)
        assert total is not None
        made = self._progress_made()
        return TrainingProgress(self.run.path, total, made, self.chief, unit)

    def _progress_made(self) -> int:
        return self.step if self.plan.budget is None else round(self.spent)


def _not_finite(state: Any, name: str = "") -> Iterator[str]:
    """Where NaN or infinity stands in nested containers."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(state.isfinite().all()):
            yield name
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _not_finite(value, f"{name}.{number}")


def load_best(run: RunFolder, module: nn.Module, which: Literal["best", "last"] = "best") -> None:
    """Fill ``module`` with the weights that validation chose, or with the last ones."""
    load_weights(module, run.path / "checkpoints" / f"{which}.safetensors")

"""`evaluate`: every attack on every test image; a killed evaluation goes on to the same verdicts.

The unit of work is a cell: one attack on one batch. Each cell draws from streams of its own,
named by attack and batch (AutoAttack's parts from the seed, anew on each batch), so that its
verdicts do not depend on what ran before, in which process, or how often the evaluation was
interrupted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, AttackResult, FeatureAttack, attacked, refusing_changes
from advgame.checks import check_images, check_labels, check_logits
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.attacks import (
    ATTACKS,
    Context,
    Suite,
    check_attacks,
    is_own_attack,
    make_suite,
)
from advgame.evaluation.autoattack import AutoAttackPart
from advgame.evaluation.cells import (
    Cell,
    Cells,
    as_bits,
    as_mask,
    cell_key,
    describe,
    fingerprint,
)
from advgame.evaluation.claims import Task, share
from advgame.evaluation.verdicts import Verdicts, out_of_memory, predict
from advgame.own_code import in_words
from advgame.seeding import PrivateRNG, as_seed, derive_seed, stream
from advgame.threat import Threat

Piece: TypeAlias = tuple[Tensor, Tensor, float]
"""Rows (n,), what their adversarial examples are taken for (n, ...), the largest perturbation."""


@torch.inference_mode(False)
def evaluate(
    model: nn.Module,
    data: ImageSet,
    threat: Threat,
    attacks: Iterable[str] = ("fgsm", "pgd20", "autoattack"),
    *,
    seed: int = 0,
    batch_size: int = 500,
    surrogate: nn.Module | None = None,
    extra: Mapping[str, Attack] | None = None,
    folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Verdicts:
    """Find out which images survive which attack, the model in evaluation mode.

    Args:
        model: maps images in [0, 1] to logits; left as it was found.
        data: test images, on the model's device.
        threat: the ball, with one radius for all.
        attacks: names from `advgame.evaluation.ATTACKS`, of ``extra``, or of your own code,
            ``package.module:factory(1, size=0.5)``, which is called with the ball before the rest.
        seed: of everything random.
        batch_size: images at a time; AutoAttack's verdicts can depend on it. Where the memory is
            too small a batch is halved, which the verdicts' ``notes`` say.
        surrogate: another classifier, for the transfer attacks.
        extra: further attacks by name, e.g. learned ones.
        folder: where finished cells are kept and found again; None keeps nothing. Processes that
            evaluate the same in one folder share the work, see `advgame.evaluation.claims`.
        progress: told a line before each cell.

    Raises:
        InputError: unknown attack; images, labels or logits that cannot be judged; or a folder
            of another evaluation.
    """
    asked = Evaluation(
        model,
        data,
        threat,
        attacks,
        seed=seed,
        batch_size=batch_size,
        surrogate=surrogate,
        extra=extra,
        folder=folder,
        progress=progress,
    )
    share(asked.tasks, asked.folder, progress)
    return asked.verdicts()


class Evaluation:
    """What `evaluate` has to do, in tasks for `advgame.evaluation.claims.share`.

    The arguments and errors are those of `evaluate`. Made outside inference mode.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        threat: Threat,
        attacks: Iterable[str],
        *,
        seed: int,
        batch_size: int,
        surrogate: nn.Module | None = None,
        extra: Mapping[str, Attack] | None = None,
        folder: str | Path | None,
        progress: Callable[[str], None],
    ) -> None:
        extra = dict(extra or {})
        if isinstance(attacks, str):
            raise InputError(f"attacks are a tuple of names: ({attacks!r},)")
        attacks = tuple(attacks)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer, 1 or above, not {batch_size!r}")
        seed = as_seed(seed)
        if not isinstance(folder, str | Path | None):
            raise InputError(f"folder must be a path, not {folder!r}")
        self.folder = None if folder is None else Path(folder)
        plan = check_evaluation(
            model, data, threat, attacks, seed=seed, surrogate=surrogate, extra=extra
        )
        self._plan: dict[str, Suite] = {"clean": [("clean", Nothing())], **plan}
        about: dict[str, Any] = {}
        if self.folder is not None:  # only what is kept must be told from another evaluation's
            more = [surrogate] if surrogate is not None else []
            about = fingerprint(model, data, threat, seed, batch_size, *more)
            own = extra | {name: plan[name][0][1] for name in attacks if is_own_attack(name)}
            about["extra"] = {name: describe(attack) for name, attack in own.items()}
        self._cells = Cells(self.folder, about)
        self._starts = range(0, len(data), batch_size)
        work = _ClassifierWork(model, data, threat, seed, batch_size, self._cells, progress)
        self.tasks: list[Task] = [
            work.task(name, suite, start)
            for name, suite in self._plan.items()
            for start in self._starts
        ]

    def verdicts(self) -> Verdicts:
        """What was found, once every task is done, by this or other processes."""
        return _gather(self._cells, self._plan, self._starts)


@torch.inference_mode(False)
def check_evaluation(
    model: nn.Module,
    data: ImageSet,
    threat: Threat,
    attacks: Sequence[str],
    *,
    seed: int = 0,
    surrogate: nn.Module | None = None,
    extra: Mapping[str, Attack] | None = None,
) -> dict[str, Suite]:
    """Refuse, before any work, what `evaluate` could not finish; it takes a few forwards.

    Args:
        model: maps images in [0, 1] to logits; left as it was found.
        data: test images, on the model's device.
        threat: the ball.
        attacks: names; these and the rest as in `evaluate`.
        seed: of everything random.
        surrogate: another classifier.
        extra: further attacks by name.

    Returns:
        the attacks of every name, in order.

    Raises:
        InputError: unknown attack, or one that this classifier or these images do not allow; two
            attacks of one file name; images, labels or logits that cannot be judged.
    """
    extra = extra or {}
    for name in extra:
        if name in ATTACKS or name == "clean" or not (name.strip() and name.isprintable()):
            raise InputError(f"{name!r} names an attack of ours, or nothing: call it otherwise")
    if not isinstance(threat, Threat) or isinstance(threat.eps, Tensor):
        found = "radii per image" if isinstance(threat, Threat) else repr(threat)
        raise InputError(f"threat is a ball with one radius, e.g. Linf(8 / 255), not {found}")
    if len(set(attacks)) < len(attacks):
        raise InputError(f"an attack is asked for twice: {', '.join(attacks)}")
    check_attacks(tuple(name for name in attacks if name not in extra))
    classes = check_classifier(model, data)
    if surrogate is not None:
        check_classifier(surrogate, data)
    context = Context(threat, data, as_seed(seed), surrogate)
    plan: dict[str, Suite] = {
        name: [(name, extra[name])] if name in extra else make_suite(name, context)
        for name in attacks
    }
    _check_files(plan)
    for suite in plan.values():
        for _, attack in suite:
            if isinstance(attack, AutoAttackPart):
                attack.check_task(classes, data.shape)
            if isinstance(attack, FeatureAttack):
                attack.check_task(model, data.floats(slice(1)), data.labels)
    for name in attacks:
        if name not in extra and is_own_attack(name):
            _try_out(name, plan[name][0][1], model, data.subset(slice(2)), seed)
    return plan


def _check_files(plan: dict[str, Suite]) -> None:
    """Refuse attacks whose cells would be the same files."""
    parts = [(name, part) for name, suite in plan.items() for part, _ in suite]
    keys = {cell_key(*one, 0) for one in (("clean", "clean"), *parts)}
    if len(keys) <= len(parts):
        raise InputError(
            f"two attacks would share files, whose names have a hyphen for a colon: "
            f"{', '.join(plan)}: call one otherwise"
        )


def _try_out(name: str, attack: Attack, model: nn.Module, few: ImageSet, seed: int) -> None:
    """Run somebody's own attack on a few images: what it raises or returns is told at once."""
    x, y = few.floats(), few.labels
    chance = PrivateRNG(derive_seed(seed, "trial"), x.device)
    try:
        with attacked(model), chance:
            x_adv = attack.run(model, x, y, rng=stream(seed, "trial", x.device)).x_adv
    except InputError as problem:
        raise InputError(f"{name}: {problem}") from problem
    except Exception as error:  # a stranger's code may raise anything
        raise InputError(f"{name} failed: {in_words(error)}") from error
    check_finite(name, x_adv)


def check_finite(name: str, x_adv: Tensor) -> None:
    """Refuse adversarial examples with NaN or infinite pixels.

    Raises:
        InputError: whose they are.
    """
    if not bool(torch.isfinite(x_adv).all()):
        raise InputError(f"the attack {name} returned NaN or infinite pixels")


def check_classifier(model: nn.Module, data: ImageSet) -> int:
    """Refuse a classifier and images that cannot be judged; returns the number of classes.

    Raises:
        InputError: the classifier cannot take these images, or does not return logits for them.
    """
    images = data.floats(slice(8))
    check_images(images)
    try:
        with attacked(model), torch.no_grad(), refusing_changes(model):
            logits = model(images)
            with torch.enable_grad():  # as attacks ask
                model(images[:1])  # they regroup images, so that any number must do
            if any(getattr(module, "training", False) for module in model.modules()):
                raise InputError(
                    "the classifier switches to training mode in its forward pass: attacks need "
                    "one function, leave the mode to the caller"
                )
    except InputError:
        raise
    except Exception as error:  # a stranger's module may raise anything
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise InputError(f"too little memory for 8 images: {error}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the classifier cannot take images of this shape, {data.shape}, on "
            f"{images.device}: {reason}"
        ) from error
    classes = check_logits(logits, data.labels[:8])
    check_labels(data.labels, len(data), classes)
    if classes > data.classes:
        raise InputError(
            f"the classifier has {classes} outputs, and the images have {data.classes} classes: it "
            "is made for others"
        )
    return classes


@dataclass
class Work:
    """What an evaluation works with, and how an attack is made and judged, in pieces."""

    model: nn.Module
    data: ImageSet
    threat: Threat
    seed: int
    batch_size: int
    cells: Cells
    progress: Callable[[str], None]

    def pieces(self, key: str, attack: Attack, rows: Tensor) -> tuple[list[Piece], int]:
        """Attack some images (n,), in halves of them where the memory is too small.

        Returns:
            the pieces, none where there are no images; how many images were taken at a time.
        """
        found = _in_halves(partial(self._judge, key, attack), rows)
        alone = len(found) < 2
        return found, self.batch_size if alone else max(len(piece[0]) for piece in found)

    def _judge(self, key: str, attack: Attack, rows: Tensor) -> Piece:
        x, y = self.data.floats(rows), self.data.labels[rows]
        rng = stream(self.seed, f"{key} {int(rows[0])}", x.device)
        # a copy: an own attack may work in place, and is measured against the clean images
        x_adv = attack.run(self.model, x.clone(), y, rng=rng, check=False).x_adv
        check_finite(key.split("/")[0], x_adv)
        return rows, self._said(x_adv), _largest(self.threat, x_adv, x)

    def _said(self, x_adv: Tensor) -> Tensor:
        """What the images (n, C, H, W) are taken for, (n,); -1 for no class."""
        return predict(self.model, x_adv, len(x_adv))


class _ClassifierWork(Work):
    """The filling of a classifier's cells, attack by attack."""

    def task(self, name: str, suite: Suite, start: int) -> Task:
        """One attack on one batch, which needs the batch's clean cell."""

        def have(keys: Sequence[str]) -> bool:
            return all(self._kept(key, start) is not None for key in keys)

        clean = [] if name == "clean" else [cell_key("clean", "clean", start)]
        return Task(
            cell_key(name, name, start).replace("/", "."),
            partial(have, [cell_key(name, part, start) for part, _ in suite]),
            partial(self.attack, name, suite, start),
            partial(have, clean),
        )

    def _size(self, start: int) -> int:
        """Images of a batch."""
        return min(self.batch_size, len(self.data) - start)

    def _kept(self, key: str, start: int) -> Cell | None:
        """A cell, if it is done."""
        cell, size = self.cells.get(key), self._size(start)
        if cell is not None and len(cell.survive) != size:
            raise InputError(
                f"{self.cells.folder}/{key}.json is of {len(cell.survive)} images instead of "
                f"{size}: delete it and resume"
            )
        return cell

    def attack(self, name: str, suite: Suite, start: int) -> None:
        """One attack on one batch: only images that are right when clean, and still stand."""
        standing = torch.ones(self._size(start), dtype=torch.bool)
        if name != "clean":
            standing = self._cell("clean", "clean", Nothing(), start, standing)
        for part, attack in suite:
            standing &= self._cell(name, part, attack, start, standing)

    def _cell(self, name: str, part: str, attack: Attack, start: int, standing: Tensor) -> Tensor:
        """Find or fill a cell; which images of the batch survive, bool (B,)."""
        key = cell_key(name, part, start)
        cell = self._kept(key, start)
        if cell is None:
            self.progress(f"{part} on images {start} to {start + len(standing) - 1}")
            cell = self._fill(key, attack, start, standing)
            self.cells.put(key, cell)
        return as_mask(cell.survive)

    def _fill(self, key: str, attack: Attack, start: int, standing: Tensor) -> Cell:
        device = self.data.images.device
        rows = start + standing.nonzero()[:, 0].to(device)
        survive, most, silent, began = standing.clone(), 0.0, 0, time.perf_counter()
        own = PrivateRNG(derive_seed(self.seed, key), device)
        with counted(self.model) as calls, attacked(self.model), own:
            pieces, batch = self.pieces(key, attack, rows)
        for piece, said, size in pieces:
            survive[(piece - start).cpu()] = (said == self.data.labels[piece]).cpu()
            silent += int((said < 0).sum())
            most = max(most, size)
        seconds = time.perf_counter() - began
        spent = (calls.forwards, calls.backwards, seconds, batch)
        return Cell(as_bits(survive), most, *spent, silent)


def _in_halves(work: Callable[[Tensor], Piece], rows: Tensor) -> list[Piece]:
    """What ``work`` makes of the rows, in halves of them where the memory is too small.

    Args:
        work: takes rows (n,).
        rows: all of them; where there are none nothing is called.

    Raises:
        InputError: one row alone is too much.
    """
    if not len(rows):
        return []
    try:
        return [work(rows)]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise InputError(f"too little memory for one image at a time: {error}") from error
    # outside the handler: what the traceback held is free by now
    return [piece for half in rows.tensor_split(2) for piece in _in_halves(work, half)]


def _largest(threat: Threat, x_adv: Tensor, x: Tensor) -> float:
    """The size of the largest perturbation; inf where a pixel lies outside [0, 1]."""
    if float(x_adv.min()) < 0 or float(x_adv.max()) > 1:
        return inf
    return float(threat.size(x_adv - x).max())


class Nothing(Attack):
    """The attack that leaves every image as it is."""

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator | None, check: bool
    ) -> AttackResult:
        return AttackResult(x, None, None, 0, 0)


@dataclass
class Calls:
    """Images that a classifier was asked about."""

    forwards: int = 0
    backwards: int = 0


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[Calls]:
    """Count the images that pass through ``model``, and those that a gradient comes back for."""
    calls, one_at_a_time = Calls(), threading.Lock()  # some attacks ask in several threads

    def back(gradient: Tensor | None) -> None:
        if gradient is not None:  # as where a quantised layer lets none pass
            with one_at_a_time:
                calls.backwards += len(gradient)

    def ask(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        with one_at_a_time:
            calls.forwards += len(given[0])
        if given[0].requires_grad:
            given[0].register_hook(back)

    hook = model.register_forward_pre_hook(ask)
    try:
        yield calls
    finally:
        hook.remove()


def notes_on(attacks: Collection[str]) -> list[str]:
    """What a reader should know of attacks, by name, that stand for others."""
    if "autoattack-lite" in attacks and "autoattack" not in attacks:
        return ["autoattack-lite is half of AutoAttack: no number to quote"]
    return []


def _gather(cells: Cells, plan: dict[str, Suite], starts: range) -> Verdicts:
    """The verdicts of the whole evaluation from its finished cells."""
    verdicts = Verdicts({}, {}, {}, notes=notes_on(plan))
    for name, suite in plan.items():
        found: list[list[Cell]] = []  # part x batch
        for part, _ in suite:
            row = [cells.get(cell_key(name, part, start)) for start in starts]
            found.append([cell for cell in row if cell is not None])
            assert len(found[-1]) == len(starts), "another process left a cell unfilled"
        every = [cell for row in found for cell in row]
        masks = [torch.cat([as_mask(cell.survive) for cell in row]) for row in found]
        verdicts.correct[name] = torch.stack(masks).all(0)
        verdicts.largest[name] = max(cell.largest for cell in every)
        verdicts.no_answer[name] = sum(cell.no_answer for cell in every)
        verdicts.seconds[name] = sum(cell.seconds for cell in every)
        verdicts.forwards[name] = sum(cell.forwards for cell in every)
        verdicts.backwards[name] = sum(cell.backwards for cell in every)
        if (least := min(cell.batch for cell in every)) < starts.step:
            verdicts.notes.append(
                f"{name}: too little memory for {starts.step} images at a time, {least} were taken"
            )
    return verdicts

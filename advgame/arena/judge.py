"""How robust a mixture of classifiers is: evaluated under best responses, flagged, reported.

On each image the attacker takes, of all adversarial examples found, the one that is misclassified
most often in expectation over members. What counts as found:

(a) gradient ascent on the expected cross-entropy, margin and 0-1 error (`ADAPTIVE`),
(b) ARC (`JOINT`),
(c) every member's own adversarial examples, under each attack that is named.

Mixtures are judged by all of these together, never by (a) alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advgame.arena.best_response import ADAPTIVE, JOINT, OnMember
from advgame.arena.mixture import ClassifierMixture
from advgame.attacks import Attack, attacked
from advgame.choices import UNION
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.attacks import Suite, is_own_attack
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
from advgame.evaluation.flags import Flag, find_flags, left_ball, no_answer
from advgame.evaluation.measure import (
    Nothing,
    Work,
    check_evaluation,
    counted,
    notes_on,
)
from advgame.evaluation.report import write_report
from advgame.evaluation.verdicts import Verdicts
from advgame.run.folder import RunFolder
from advgame.seeding import PrivateRNG, as_seed, derive_seed
from advgame.statistics import beats
from advgame.threat import Threat


@dataclass(frozen=True)
class MixtureVerdicts:
    """What an evaluation of a mixture found, image by image and member by member.

    Args:
        mixture: what was attacked.
        right: name -> bool (E, N, M): which members classify the image correctly under each of E
            examples that this attack made of it. ``"clean"`` comes first; those of a name that
            begins with `UNION` are one per member, the others one.
        largest: name -> the largest perturbation found, in the threat's norm.
        seconds: name -> wall-clock.
        forwards: name -> images passed through a member.
        backwards: name -> images whose input gradient through a member was formed.
        no_answer: name -> answers of a member whose largest logit was NaN or infinite.
        notes: what a reader should know besides, one sentence each.
    """

    mixture: ClassifierMixture
    right: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    backwards: dict[str, int] = field(default_factory=dict)
    no_answer: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def expected(self, names: Iterable[str] | None = None) -> Tensor:
        """With what probability each image is classified correctly under the worst, fp64 (N,).

        Args:
            names: of the attacks; all when not given. The clean image is always among them.
        """
        asked = {"clean", *(self.right if names is None else names)}
        found = [self.mixture.expected(one) for name in asked for one in self.right[name]]
        return torch.stack(found).amin(0)

    def verdicts(self) -> Verdicts:
        """As those of a classifier: probabilities in place of 0 and 1."""
        correct = {
            name: self.mixture.expected(examples.flatten(0, 1)).view(examples.shape[:2]).amin(0)
            for name, examples in self.right.items()
        }
        counts = (self.largest, self.seconds, self.forwards, self.backwards, self.no_answer)
        return Verdicts(correct, *counts, self.notes)

    def alone(self, member: int) -> Verdicts:
        """A member's own: clean, and under the examples that were made for it."""
        clean = self.right["clean"][0, :, member]
        own = {
            name.removeprefix(UNION): clean & examples[member, :, member]
            for name, examples in self.right.items()
            if name.startswith(UNION)
        }
        return Verdicts({"clean": clean, **own}, {}, {})


Plan = dict[str, Suite]
"""Name -> what makes one example of each image, by the name of its part."""


def plan_mixture(
    mixture: ClassifierMixture,
    data: ImageSet,
    threat: Threat,
    attacks: Sequence[str],
    *,
    seed: int = 0,
    surrogate: nn.Module | None = None,
    extra: Mapping[str, Attack] | None = None,
) -> Plan:
    """Refuse, before any work, what `evaluate_mixture` could not finish.

    The arguments are those of `evaluate_mixture`.

    Returns:
        everything that will be tried on the mixture.

    Raises:
        InputError: a member that cannot be judged on these images, members of different classes,
            or attacks that they do not allow.
    """
    if not attacks and not extra:
        raise InputError("a mixture is judged by its members' examples, too: name attacks")
    own = [
        check_evaluation(member, data, threat, attacks, seed=seed, surrogate=surrogate, extra=extra)
        for member in mixture.members
    ]
    with attacked(mixture), torch.no_grad():
        mixture.answers(data.floats(slice(2)))  # refuses members of different classes
    plan: Plan = {name: [("all", make(threat))] for name, make in (ADAPTIVE | JOINT).items()}
    for name in attacks:
        suites = enumerate(suite[name] for suite in own)
        plan[UNION + name] = [(f"of{one}", OnMember(suite, one)) for one, suite in suites]
    return plan


@torch.inference_mode(False)
def evaluate_mixture(
    mixture: ClassifierMixture,
    data: ImageSet,
    threat: Threat,
    attacks: Iterable[str] = ("autoattack",),
    *,
    seed: int = 0,
    batch_size: int = 500,
    surrogate: nn.Module | None = None,
    extra: Mapping[str, Attack] | None = None,
    folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> MixtureVerdicts:
    """Find out which members withstand which examples; a killed evaluation goes on.

    Args:
        mixture: left as it was found.
        data: test images, on the members' device.
        threat: the ball, with one radius for all.
        attacks: names, as `advgame.evaluation.evaluate` takes them: each is made on every member.
        seed: of everything random.
        batch_size: images at a time.
        surrogate: another classifier, for the transfer attacks.
        extra: further attacks by name, which are among ``attacks``.
        folder: where finished cells are kept and found again; None keeps nothing. Processes that
            evaluate the same in one folder share the work, see `advgame.evaluation.claims`.
        progress: told a line before each piece of work.

    Raises:
        InputError: what `plan_mixture` refuses, or a folder of another evaluation.
    """
    attacks, seed = tuple(attacks), as_seed(seed)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be an integer, 1 or above, not {batch_size!r}")
    plan = plan_mixture(mixture, data, threat, attacks, seed=seed, surrogate=surrogate, extra=extra)
    folder = None if folder is None else Path(folder)
    about: dict[str, Any] = {}
    if folder is not None:  # only what is kept must be told from another evaluation's
        more = [surrogate] if surrogate is not None else []
        about = fingerprint(mixture, data, threat, seed, batch_size, *more)
        told = {name: describe(one) for name, one in (extra or {}).items()}
        own = [name for name in attacks if name not in told and is_own_attack(name)]
        about["extra"] = told | {name: describe(plan[UNION + name]) for name in own}
    cells = Cells(folder, about)
    work = _MixtureWork(mixture, data, threat, seed, batch_size, cells, progress)
    found = MixtureVerdicts(mixture, notes=notes_on(attacks))
    plan = {"clean": [("all", Nothing())], **plan}
    parts_of_all = [(name, *part) for name, parts in plan.items() for part in parts]
    starts = range(0, len(data), batch_size)
    share([work.task(*part, start) for part in parts_of_all for start in starts], folder, progress)
    for name, parts in plan.items():
        work.gather(found, name, parts)
    return found


@dataclass
class _MixtureWork(Work):
    """The filling of a mixture's cells: a cell per member that answers, example and batch."""

    model: ClassifierMixture

    def task(self, name: str, part: str, attack: Attack, start: int) -> Task:
        """One example of each image of a batch, and what all members say of it."""
        keys = self._keys(name, part, start)
        return Task(
            cell_key(name, part, start).replace("/", "."),
            lambda: all(self.cells.get(key) is not None for key in keys),
            partial(self._batch, name, part, attack, start),
        )

    def _keys(self, name: str, part: str, start: int) -> list[str]:
        """The cells of one example, one per member."""
        members = range(len(self.model.members))
        return [cell_key(name, f"{part}-seen-by{one}", start) for one in members]

    def gather(self, found: MixtureVerdicts, name: str, parts: Suite) -> None:
        """Add an attack to what is found."""
        starts = range(0, len(self.data), self.batch_size)
        examples, every = [], []
        for part, attack in parts:
            rows = [self._batch(name, part, attack, start) for start in starts]
            examples.append(torch.cat([_together(row) for row in rows]))
            every += [cell for row in rows for cell in row]
        found.right[name] = torch.stack(examples)
        found.largest[name] = max(cell.largest for cell in every)
        found.seconds[name] = sum(cell.seconds for cell in every)
        found.forwards[name] = sum(cell.forwards for cell in every)
        found.backwards[name] = sum(cell.backwards for cell in every)
        found.no_answer[name] = sum(cell.no_answer for cell in every)
        if (least := min(cell.batch for cell in every)) < self.batch_size:
            found.notes.append(
                f"{name}: too little memory for {self.batch_size} images at a time, {least} were "
                "taken"
            )

    def _batch(self, name: str, part: str, attack: Attack, start: int) -> list[Cell]:
        """The cells of one example of each image of a batch, one per member."""
        size = min(self.batch_size, len(self.data) - start)
        keys = self._keys(name, part, start)
        cells = [self.cells.get(key) for key in keys]
        if None in cells:
            self.progress(f"{name} {part} on images {start} to {start + size - 1}")
            cells = list(self._fill(cell_key(name, part, start), attack, start, size))
            for key, cell in zip(keys, cells, strict=True):
                assert cell is not None
                self.cells.put(key, cell)
        done = [cell for cell in cells if cell is not None]
        if wrong := [cell for cell in done if len(cell.survive) != size]:
            raise InputError(
                f"{self.cells.folder} has cells of {len(wrong[0].survive)} images instead of "
                f"{size}: delete it, and it is evaluated again"
            )
        return done

    def _fill(self, key: str, attack: Attack, start: int, size: int) -> list[Cell]:
        """Make an example of each image that some member has right when clean; ask all members."""
        device = self.data.images.device
        every = torch.arange(start, start + size, device=device)
        most, began = 0.0, time.perf_counter()
        own = PrivateRNG(derive_seed(self.seed, key), device)
        with ExitStack() as held:
            calls = [held.enter_context(counted(one)) for one in self.model.members]
            held.enter_context(attacked(self.model))
            held.enter_context(own)
            right = self.model.right(self.data.floats(every), self.data.labels[every])
            pieces, batch = self.pieces(key, attack, every[right.any(1)])
        silent = torch.zeros(right.shape[1], dtype=torch.int64)
        for rows, said, reached in pieces:
            right[rows - start] = said == self.data.labels[rows][:, None]
            silent += (said < 0).sum(0).cpu()
            most = max(most, reached)
        seconds = time.perf_counter() - began
        return [
            Cell(
                as_bits(right[:, one]),
                most,
                calls[one].forwards,
                calls[one].backwards,
                0.0 if one else seconds,  # of all together
                batch,
                int(silent[one]),
            )
            for one in range(right.shape[1])
        ]

    @override
    def _said(self, x_adv: Tensor) -> Tensor:
        """What each member takes them for, (n, M)."""
        return self.model.classes(x_adv)


def _together(cells: Sequence[Cell]) -> Tensor:
    """The answers of all members on a batch, (B, M)."""
    return torch.stack([as_mask(cell.survive) for cell in cells], 1)


def find_mixture_flags(
    verdicts: MixtureVerdicts,
    data: ImageSet,
    threat: Threat,
    names: Sequence[str],
    *,
    seed: int = 0,
    held_out: ImageSet | None = None,
) -> list[Flag]:
    """Signs that the verdicts may not hold: of the mixture, and of each member alone.

    Args:
        verdicts: what the evaluation found.
        data: the images that it was made on.
        threat: the ball.
        names: of the members, for the sentences.
        seed: of the probes' own attacks.
        held_out: see `advgame.evaluation.find_flags`.
    """
    flags = []
    adaptive = verdicts.expected(ADAPTIVE)
    others = [name for name in verdicts.right if name not in ("clean", *ADAPTIVE)]
    for name in others:
        if beats(one := verdicts.expected([name]), adaptive):
            gap = float((adaptive - torch.minimum(one, adaptive)).mean())
            flags.append(
                Flag(
                    "adaptive_pgd_beaten",
                    f"{name} takes {gap:.1%} of expected accuracy beyond what gradient ascent on "
                    "the expected loss takes: under that alone the mixture looks too robust",
                )
            )
    whole = verdicts.verdicts()
    told = no_answer(whole, "in answers of members") | left_ball(whole, threat)
    flags += [Flag(name, meaning) for name, meaning in told.items()]
    members = zip(names, verdicts.mixture.members, strict=True)
    for number, (name, member) in enumerate(members):
        own = find_flags(member, data, threat, verdicts.alone(number), seed, held_out)
        flags += [Flag(flag.name, f"member {name}: {flag.meaning}") for flag in own]
    return flags


def judge_mixture(
    run: RunFolder,
    mixture: ClassifierMixture,
    test: ImageSet,
    threat: Threat,
    attacks: Sequence[str],
    *,
    names: Sequence[str],
    dataset: str,
    weights: str,
    tell: Callable[[str], None],
    extra: Mapping[str, Attack] | None = None,
    also: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 500,
    surrogate: nn.Module | None = None,
    held_out: ImageSet | None = None,
) -> dict[str, Any]:
    """Attack a mixture, look for signs of unreliable numbers, write the report.

    Killed, it goes on where it was: what is done lies in the run's folder ``evaluation``.

    Args:
        run: where the report goes.
        mixture: members and their weights.
        test: test images, on their device.
        threat: the ball.
        attacks: names from `advgame.evaluation.ATTACKS`, each made on every member; those of
            ``extra`` come after them.
        names: what the members are called.
        dataset: name for the report.
        weights: which weights these are, in words.
        tell: told a line before each piece of work.
        extra: further attacks by name.
        also: further numbers for the report, by name.
        seed: of the attacks.
        batch_size: images at a time.
        surrogate: another classifier, for the transfer attacks.
        held_out: other images of the data set, to compare with.

    Returns:
        The content of ``report.json``.
    """
    extra = dict(extra or {})
    found = evaluate_mixture(
        mixture,
        test,
        threat,
        (*attacks, *extra),
        seed=seed,
        batch_size=batch_size,
        surrogate=surrogate,
        extra=extra,
        folder=run.path / "evaluation",
        progress=tell,
    )
    tell("looking for signs of unreliable numbers")
    flags = find_mixture_flags(found, test, threat, names, seed=seed, held_out=held_out)
    shares = mixture.weights.tolist()
    members = [
        {"name": name, "weight": share, "accuracy": own.accuracy(), "worst_case": own.worst_case()}
        for number, (name, share) in enumerate(zip(names, shares, strict=True))
        for own in (found.alone(number),)
    ]
    told = {"members": members, "adaptive_alone": float(found.expected(ADAPTIVE).mean())}
    return write_report(
        run,
        found.verdicts(),
        test,
        threat,
        flags,
        dataset=dataset,
        seed=seed,
        weights=weights,
        also={"mixture": told, **(also or {})},
    )

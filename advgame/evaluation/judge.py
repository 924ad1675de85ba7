"""Evaluate a classifier, look for flags, write the report; `judge_run` ends a training so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from advgame.attacks import Attack, attacked, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.flags import find_flags
from advgame.evaluation.measure import evaluate
from advgame.evaluation.overfitting import catastrophic_overfitting
from advgame.evaluation.report import write_report
from advgame.evaluation.verdicts import predict, score
from advgame.games.training import PANELS
from advgame.health import Death, deaths
from advgame.run.curves import Curves, Panels, game_figure, image_strip, save_figure
from advgame.run.folder import Metrics, RunFolder
from advgame.run.loop import load_best
from advgame.run.progress import telling
from advgame.run.selection import SCORES, criterion
from advgame.seeding import stream
from advgame.threat import Threat


def judge_classifier(
    run: RunFolder,
    module: nn.Module,
    test: ImageSet,
    threat: Threat,
    attacks: Sequence[str],
    *,
    dataset: str,
    weights: str,
    tell: Callable[[str], None],
    extra: Mapping[str, Attack] | None = None,
    dead: Sequence[Death] = (),
    also: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 500,
    surrogate: nn.Module | None = None,
    held_out: ImageSet | None = None,
) -> dict[str, Any]:
    """Attack a classifier, look for signs of unreliable numbers, write the report.

    Killed, it goes on where it was: what is done lies in the run's folder ``evaluation``.

    Args:
        run: where the report goes.
        module: the classifier.
        test: test images, on its device.
        threat: the ball.
        attacks: names from `advgame.evaluation.ATTACKS`; those of ``extra`` come after them.
        dataset: name for the report.
        weights: which weights these are, in words.
        tell: told a line before each piece of work.
        extra: further attacks by name.
        dead: players of the training that ended dead, which are flagged too.
        also: further numbers for the report, by name.
        seed: of the attacks.
        batch_size: images at a time.
        surrogate: another classifier, for the transfer attacks.
        held_out: other images of the data set, to compare with.

    Returns:
        The content of ``report.json``.
    """
    extra = dict(extra or {})
    verdicts = evaluate(
        module,
        test,
        threat,
        (*attacks, *extra),
        seed=seed,
        batch_size=batch_size,
        surrogate=surrogate,
        extra=extra,
        folder=_cells(run),
        progress=tell,
    )
    tell("looking for signs of unreliable numbers")
    flags = find_flags(module, test, threat, verdicts, seed, held_out)
    return write_report(
        run,
        verdicts,
        test,
        threat,
        (*flags, *dead),
        dataset=dataset,
        seed=seed,
        weights=weights,
        also=also or {},
    )


def judge_run(
    run: RunFolder,
    module: nn.Module,
    test: ImageSet,
    threat: Threat,
    *,
    dataset: str,
    attacks: tuple[str, ...] = ("fgsm", "pgd20", "autoattack"),
    seed: int = 0,
    title: str = "",
    panels: Panels = PANELS,
    respond: Callable[[nn.Module], Mapping[str, Attack]] | None = None,
    which: Literal["best", "last"] = "best",
    measure: Callable[[nn.Module], Mapping[str, Any]] = lambda module: {},
) -> dict[str, Any]:
    """End a training run: `judge_classifier` on its weights, ``curves.png``, ``examples.png``.

    Args:
        run: a finished run.
        module: the classifier, on its device; left with the weights that are judged.
        test: test images, on the same device.
        threat: the ball.
        dataset: name for the report.
        attacks: names from `advgame.evaluation.ATTACKS`.
        seed: of the attacks.
        title: of the curves; the data set's name when empty.
        panels: of the curves: title -> unit, and tag -> label.
        respond: makes further attacks, by name, for the very classifier that is judged.
        which: weights are judged, the best by validation or the last; the others by PGD-20.
        measure: further numbers of the judged classifier, for the report; after ``respond``.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: the run has no weights yet, or those of another network.
    """
    if not (run.path / "checkpoints" / "last.safetensors").exists():
        raise InputError(
            f"{run.path} has no weights of a finished training, which Trainer leaves: to judge a "
            "classifier as it is, use advgame.evaluate or judge_classifier"
        )
    other: Literal["best", "last"] = "last" if which == "best" else "best"
    load_best(run, module, other)
    rng = stream(seed, "last", test.images.device)
    scores = dict(zip(("clean", "pgd20"), score(module, test, pgd(threat, 20), rng), strict=True))
    load_best(run, module, which)
    module.eval()  # as it is to be used; training has left it in the other mode
    rows = Metrics.read(run.path / "metrics.csv")
    sample = test.subset(slice(10))
    _pictures(run, rows, module, sample, threat, seed, title or dataset, panels)
    _, by = SCORES[criterion(run)]
    also: dict[str, Any] = {"selected_by": by, other: scores}
    with telling(f"{run.path}: {len(test)} test images") as tell:
        if respond:
            tell("training a fresh attacker")
        extra = respond(module) if respond else {}
        also |= measure(module)
        if found := catastrophic_overfitting(rows):
            also["catastrophic_overfitting"] = found
        content = judge_classifier(
            run,
            module,
            test,
            threat,
            attacks,
            dataset=dataset,
            weights={"best": f"best {by}", "last": "the last"}[which],
            tell=tell,
            extra=extra,
            dead=deaths(rows),
            also=also,
            seed=seed,
        )
    _show_scores(run, content, int(rows[-1]["step"]))
    return content


def help_judging(
    run: RunFolder,
    module: nn.Module,
    test: ImageSet,
    threat: Threat,
    attacks: Sequence[str],
    seed: int,
    extra: Mapping[str, Attack] | None = None,
) -> None:
    """Share the attacks of `judge_run`, from another process of the training, and write no report.

    Args:
        run: a finished run, whose best weights are judged.
        module: the classifier, on this process's device; filled with the weights.
        test: test images, on the same device.
        threat: the ball.
        attacks: names; `judge_run` is asked for these and no others.
        seed: of the attacks.
        extra: further attacks by name, which are all that `judge_run` is to ``respond``.

    Raises:
        SystemExit: the process that has started this one is gone.
    """
    parent = os.getppid()

    def look(line: str) -> None:
        if os.getppid() != parent:  # nobody waits for what it would find
            raise SystemExit(1)

    load_best(run, module, "best")
    asked = (*attacks, *(extra or {}))
    evaluate(module, test, threat, asked, seed=seed, extra=extra, folder=_cells(run), progress=look)


def _cells(run: RunFolder) -> Path:
    return run.path / "evaluation"


def _show_scores(run: RunFolder, content: Mapping[str, Any], step: int) -> None:
    """Add the report's accuracies to the run's curves."""
    scores = {**content["accuracy"], "worst_case": content["worst_case"]}
    curves = Curves(run.path, purge_step=step + 1)
    curves.scalars({f"final/{name}": float(value) for name, value in scores.items()}, step)
    curves.close()


def _pictures(
    run: RunFolder,
    rows: Sequence[dict[str, float]],
    module: nn.Module,
    sample: ImageSet,
    threat: Threat,
    seed: int,
    title: str,
    panels: Panels,
) -> None:
    step = int(rows[-1]["step"])
    images, labels = sample.floats(), sample.labels
    rng = stream(seed, "strip", images.device)
    x_adv = pgd(threat, 20).perturb(module, images, labels, rng=rng)
    with attacked(module):
        clean, fooled = (predict(module, x).tolist() for x in (images, x_adv))
    captions = tuple(
        [sample.caption(*pair) for pair in zip(labels.tolist(), row, strict=True)]
        for row in (clean, fooled)
    )
    figures = {
        "curves": game_figure(rows, title, panels),
        "examples": image_strip(images, x_adv, threat, captions),
    }
    curves = Curves(run.path, purge_step=step + 1)
    for name, figure in figures.items():
        curves.figure(name, figure, step)
        save_figure(figure, run.path / f"{name}.png")
    curves.close()

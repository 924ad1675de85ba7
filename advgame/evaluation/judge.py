"""The end of a run: judge the selected weights on test images, write the report, draw pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from advgame.attacks import Attack, attacked, pgd
from advgame.data import ImageSet
from advgame.evaluation.flags import Flag, find_flags
from advgame.evaluation.measure import evaluate
from advgame.evaluation.overfitting import catastrophic_overfitting
from advgame.evaluation.report import Report, write_report
from advgame.evaluation.verdicts import predict, score
from advgame.health import deaths
from advgame.run.curves import PANELS, Curves, Panels, game_figure, image_strip, save_figure
from advgame.run.folder import Metrics, RunFolder, device_name
from advgame.run.loop import load_best
from advgame.run.progress import telling
from advgame.run.selection import SCORES, criterion
from advgame.seeding import stream
from advgame.threat import Threat


def judge(
    run: RunFolder,
    module: nn.Module,
    test: ImageSet,
    threat: Threat,
    *,
    dataset: str,
    attacks: tuple[str, ...],
    seed: int,
    title: str,
    panels: Panels = PANELS,
    respond: Callable[[nn.Module], Mapping[str, Attack]] | None = None,
    which: Literal["best", "last"] = "best",
    measure: Callable[[nn.Module], Mapping[str, Any]] = lambda module: {},
) -> dict[str, Any]:
    """Write the report, ``curves.png`` and ``examples.png``; killed, it goes on where it was.

    Args:
        run: a finished run.
        module: the classifier, on its device; filled with the weights.
        test: test images, on the same device.
        threat: the ball.
        dataset: name for the report.
        attacks: names from `advgame.evaluation.ATTACKS`.
        seed: of the attacks.
        title: of the curves.
        panels: of the curves, LAS-AT's when not given.
        respond: makes further attacks, by name, for the very classifier that is judged.
        which: weights are judged, the best by validation or the last; the others by PGD-20.
        measure: further numbers of the judged classifier, for the report; after ``respond``.

    Returns:
        The content of ``report.json``.
    """
    other: Literal["best", "last"] = "last" if which == "best" else "best"
    load_best(run, module, other)
    rng = stream(seed, "last", test.images.device)
    scores = dict(zip(("clean", "pgd20"), score(module, test, pgd(threat, 20), rng), strict=True))
    load_best(run, module, which)
    module.eval()  # as it is to be used; training has left it in the other mode
    _pictures(run, module, test.subset(slice(10)), threat, seed, title, panels)
    with telling(f"{run.path}: {len(test)} test images") as tell:
        if respond:
            tell("training a fresh attacker")
        extra = dict(respond(module)) if respond else {}
        more = dict(measure(module))
        verdicts = evaluate(
            module,
            test,
            threat,
            (*attacks, *extra),
            seed=seed,
            extra=extra,
            folder=run.path / "evaluation",
            progress=tell,
        )
        tell("looking for signs of unreliable numbers")
        flags = find_flags(module, test, threat, verdicts, seed)
    rows = Metrics.read(run.path / "metrics.csv")
    flags += [Flag(one.name, one.sentence) for one in deaths(rows)]
    _, by = SCORES[criterion(run)]
    also: dict[str, Any] = {"selected_by": by, other: scores, **more}
    if found := catastrophic_overfitting(rows):
        also["catastrophic_overfitting"] = found
    content = Report(
        dataset,
        threat,
        verdicts,
        test.labels,
        flags,
        seed,
        device_name(test.images.device),
        {"best": f"best {by}", "last": "the last"}[which],
        run.about()["command"],
        also,
    )
    return write_report(run, content)


def _pictures(
    run: RunFolder,
    module: nn.Module,
    sample: ImageSet,
    threat: Threat,
    seed: int,
    title: str,
    panels: Panels,
) -> None:
    rows = Metrics.read(run.path / "metrics.csv")
    step = int(rows[-1]["step"])
    images, labels = sample.floats(), sample.labels
    rng = stream(seed, "strip", images.device)
    x_adv = pgd(threat, 20).perturb(module, images, labels, rng=rng)
    with attacked(module):
        clean, fooled = (predict(module, x).tolist() for x in (images, x_adv))
    captions = tuple(
        [f"{true}→{said}" for true, said in zip(labels.tolist(), row, strict=True)]
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

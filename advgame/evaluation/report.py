"""Writes an evaluation's report.json, report.md, verdicts.csv and accuracy.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from advgame.choices import FEW_CLASSES, LEAST_CLASSES, UNION
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.flags import Flag
from advgame.evaluation.verdicts import Verdicts
from advgame.health import Death
from advgame.run.curves import accuracy_figure, save_figure
from advgame.run.folder import RunFolder, device_name, versions
from advgame.statistics import wilson
from advgame.threat import Threat

_NAMED = 20  # classes whose names report.md lists


def write_report(
    run: RunFolder,
    verdicts: Verdicts,
    data: ImageSet,
    threat: Threat,
    flags: Iterable[Flag | Death],
    *,
    dataset: str,
    seed: int,
    weights: str,
    also: Mapping[str, Any],
) -> dict[str, Any]:
    """Write report.json, report.md, verdicts.csv and accuracy.png; returns what the first says.

    Args:
        run: the folder; its settings name the command.
        verdicts: per image and attack.
        data: the images that were attacked.
        threat: the ball.
        flags: signs of unreliable numbers, and players that ended dead.
        dataset: name of the data set; its test split was used.
        seed: of the attacks.
        weights: which weights were judged, e.g. "best on validation".
        also: further numbers by name, e.g. of the last weights.
    """
    n, accuracy = len(data), verdicts.accuracy()
    calls = {
        name: {"forwards": forwards, "backwards": verdicts.backwards[name]}
        for name, forwards in verdicts.forwards.items()
    }
    content = {
        "dataset": dataset,
        "split": "test",
        "threat": {"norm": threat.norm, "eps": float(threat.eps)},
        "n": n,
        "seed": seed,
        "weights": weights,
        "accuracy": accuracy,
        "worst_case": verdicts.worst_case(),
        **({"classes": list(data.names)} if data.names else {}),
        "calls": calls,
        "notes": [*verdicts.notes, *_few_classes(accuracy, data), *_data_notes(run)],
        "flags": [flag.as_dict() for flag in flags],
        **also,
        "command": run.about()["command"],
        "versions": versions(),
        "device": device_name(data.images.device),
        "seconds": sum(verdicts.seconds.values()),  # these two are wall-clock
        "timing": verdicts.seconds,
    }
    run.write_text("verdicts.csv", as_matrix(verdicts, data.labels))
    bars = {name: (share, *wilson(share, n)) for name, share in accuracy.items()}
    title = f"{dataset}, {threat.norm} ε = {float(threat.eps):.3g}, {n} test images"
    save_figure(accuracy_figure(bars, verdicts.worst_case(), title), run.path / "accuracy.png")
    run.write_text("report.md", as_markdown(content))
    run.write_json("report.json", content)  # last: a run that has it is finished
    return content


def _few_classes(attacks: Collection[str], data: ImageSet) -> list[str]:
    """Why there is no AutoAttack, where there cannot be."""
    plain = {name.removeprefix(UNION) for name in attacks}
    if data.classes >= LEAST_CLASSES or not set(FEW_CLASSES) <= plain:
        return []
    *most, last = FEW_CLASSES
    return [
        f"AutoAttack needs {LEAST_CLASSES} classes, and these images have {data.classes}: "
        f"{', '.join(most)} and {last} take its place"
    ]


def _data_notes(run: RunFolder) -> list[str]:
    """What the run notes of what was done to its images."""
    noted = (run.about().get("data") or {}).get("notes", [])
    return [f"data: {note}" for note in noted]


def as_line(content: dict[str, Any]) -> str:
    """The accuracies and the number of flags in one line.

    Raises:
        InputError: a report of something else.
    """
    try:
        accuracy = ", ".join(f"{k} {100 * v:.1f} %" for k, v in content["accuracy"].items())
        return f"{accuracy}; {len(content['flags'])} flag(s)"
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"report.json is damaged, or no classifier's: {error!r}") from error


def as_matrix(verdicts: Verdicts, labels: Tensor) -> str:
    """``verdicts.csv``: a row per image, 1 under each attack that it survives.

    Of a mixture of classifiers it is the probability that it does.
    """
    columns = {
        name: [f"{one:.6g}" for one in ok.double().tolist()]
        for name, ok in verdicts.correct.items()
    }
    head = io.StringIO()  # the name of an own attack may have commas
    csv.writer(head, lineterminator="").writerow(["image", "label", *columns])
    lines = [head.getvalue()]
    for image, row in enumerate(zip(labels.tolist(), *columns.values(), strict=True)):
        lines.append(",".join(str(value) for value in (image, *row)))
    return "\n".join(lines) + "\n"


def as_markdown(content: dict[str, Any]) -> str:
    """The report for people; accuracies come with their 95 % interval."""
    n, threat = content["n"], content["threat"]

    def row(name: str, title: str, share: float) -> str:
        low, high = wilson(share, n)
        calls = content["calls"].get(name, {})
        spent = [f"{calls[kind]:,}" if calls else "" for kind in ("forwards", "backwards")]
        seconds = f"{content['timing'][name]:.1f}" if name in content["timing"] else ""
        cells = (title, f"{100 * share:.1f}", f"{100 * low:.1f} – {100 * high:.1f}")
        return f"| {' | '.join((*cells, *spent, seconds))} |"

    attacks = len(content["accuracy"]) - 1
    lines = [
        f"# Robustness on {content['dataset']}, {threat['norm']} ε = {threat['eps']:.4g}",
        "",
        f"{n} test images, seed {content['seed']}, weights: {content['weights']}, "
        f"device: {content['device']}.",
        "",
        "| attack | accuracy, % | 95 % interval | images forward | images backward | seconds |",
        "|---|---|---|---|---|---|",
        *(row(name, name, share) for name, share in content["accuracy"].items()),
        row("", f"**worst case** over {attacks} attacks", content["worst_case"]),
        "",
        "An image that one attack has broken counts in the worst case. Only images that are right "
        "when clean are attacked.",
        "",
        *(f"Note: {note}.\n" for note in content["notes"]),
    ]
    if names := content.get("classes"):
        shown = ", ".join(f"{k} {name}" for k, name in enumerate(names[:_NAMED]))
        lines += [f"Classes: {shown}{', …' if len(names) > _NAMED else ''}.", ""]
    if mixture := content.get("mixture"):
        lines += _mixture_lines(mixture, n)
    for other, words in {"last": "The last weights", "best": "The best by validation"}.items():
        if other in content:
            scores = ", ".join(f"{k} {100 * v:.1f}" for k, v in content[other].items())
            lines += [f"{words} instead: {scores}.", ""]
    if found := content.get("catastrophic_overfitting"):
        lines += [
            f"**Catastrophic overfitting** in epoch {found['epoch']}: on the validation split "
            f"PGD-10 fell from {100 * found['best']:.1f} to {100 * found['pgd10']:.1f}, while FGSM "
            f"stands at {100 * found['fgsm']:.1f}.",
            "",
        ]
    if content["flags"]:
        lines += ["**Flags, signs that these numbers may not hold:**", ""]
        lines += [f"- `{flag['name']}`: {flag['meaning']}" for flag in content["flags"]]
    else:
        lines += ["No flag was raised."]
    if by := content.get("selected_by"):
        lines += ["", f"The best weights of a run are those of the best {by}."]
    lines += ["", f"Command: `{content['command']}`", ""]
    return "\n".join(lines)


def _mixture_lines(mixture: dict[str, Any], n: int) -> list[str]:
    """What is to be said of a mixture: its members alone, and what adaptive PGD alone would say."""

    def interval(share: float) -> str:
        low, high = wilson(share, n)
        return f"{100 * share:.1f} ({100 * low:.1f} – {100 * high:.1f})"

    return [
        "One member answers each query, drawn with its weight. Accuracies above are expectations "
        "over the draw, under an attacker that knows members and weights and not the draw; their "
        "intervals are wide rather than narrow.",
        "",
        "| member | weight | clean alone, % | worst case alone, % (95 % interval) |",
        "|---|---|---|---|",
        *(
            f"| {one['name']} | {one['weight']:.4g} | {100 * one['accuracy']['clean']:.1f} "
            f"| {interval(one['worst_case'])} |"
            for one in mixture["members"]
        ),
        "",
        f"Under gradient ascent on the expected loss alone: {interval(mixture['adaptive_alone'])}.",
        "",
    ]

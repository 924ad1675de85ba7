"""The report of an evaluation: what was measured, with what, and what to be wary of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advgame.errors import InputError
from advgame.evaluation.flags import Flag
from advgame.evaluation.verdicts import Verdicts
from advgame.run.curves import accuracy_figure, save_figure
from advgame.run.folder import RunFolder, versions
from advgame.statistics import wilson
from advgame.threat import Threat


@dataclass(frozen=True)
class Report:
    """An evaluation with everything that its numbers depend on.

    Args:
        dataset: name of the data set; its test split was used.
        threat: the ball.
        verdicts: per image and attack.
        labels: (N,) of the images.
        flags: signs of unreliable numbers.
        seed: of the attacks.
        device: in words.
        weights: which weights were judged, e.g. "best on validation".
        command: how the run was started.
        also: further numbers by name, e.g. of the last weights.
    """

    dataset: str
    threat: Threat
    verdicts: Verdicts
    labels: Tensor
    flags: list[Flag]
    seed: int
    device: str
    weights: str
    command: str
    also: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The content of ``report.json``; ``seconds`` and ``timing`` are wall-clock."""
        return {
            "dataset": self.dataset,
            "split": "test",
            "threat": {"norm": self.threat.norm, "eps": float(self.threat.eps)},
            "n": len(self.verdicts.correct["clean"]),
            "seed": self.seed,
            "weights": self.weights,
            "accuracy": self.verdicts.accuracy(),
            "worst_case": self.verdicts.worst_case(),
            "calls": {
                name: {
                    "forwards": self.verdicts.forwards[name],
                    "backwards": self.verdicts.backwards[name],
                }
                for name in self.verdicts.forwards
            },
            "notes": self.verdicts.notes,
            "flags": [flag.as_dict() for flag in self.flags],
            **self.also,
            "command": self.command,
            "versions": versions(),
            "device": self.device,
            "seconds": sum(self.verdicts.seconds.values()),
            "timing": self.verdicts.seconds,
        }


def write_report(run: RunFolder, report: Report) -> dict[str, Any]:
    """Write report.json, report.md, verdicts.csv and accuracy.png; returns what the first says."""
    content = report.as_dict()
    run.write_text("verdicts.csv", as_matrix(report.verdicts, report.labels))
    threat, n = content["threat"], content["n"]
    bars = {name: (share, *wilson(share, n)) for name, share in content["accuracy"].items()}
    title = f"{report.dataset}, {threat['norm']} ε = {threat['eps']:.3g}, {n} test images"
    save_figure(accuracy_figure(bars, content["worst_case"], title), run.path / "accuracy.png")
    run.write_text("report.md", as_markdown(content))
    run.write_json("report.json", content)  # last: a run that has it is finished
    return content


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
    """``verdicts.csv``: a row per image, 1 under each attack that it survives."""
    columns = {name: ok.int().tolist() for name, ok in verdicts.correct.items()}
    lines = [",".join(["image", "label", *columns])]
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

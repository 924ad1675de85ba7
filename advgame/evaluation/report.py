"""``report.json`` and ``report.md``: what was measured, with what, and what to be wary of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from advgame.evaluation.flags import Flag
from advgame.evaluation.verdicts import Verdicts
from advgame.runs import RunFolder, versions
from advgame.threat import Threat


@dataclass(frozen=True)
class Report:
    """An evaluation with everything that its numbers depend on.

    Args:
        dataset: name of the data set; its test split was used.
        threat: the ball.
        verdicts: per image and attack.
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
            "flags": [flag.as_dict() for flag in self.flags],
            **self.also,
            "command": self.command,
            "versions": versions(),
            "device": self.device,
            "seconds": sum(self.verdicts.seconds.values()),
            "timing": self.verdicts.seconds,
        }


def write_report(run: RunFolder, report: Report) -> dict[str, Any]:
    """Write both files and return the content of the JSON one."""
    content = report.as_dict()
    run.write_text("report.md", as_markdown(content))
    run.write_json("report.json", content)  # last: a run that has it is finished
    return content


def as_line(content: dict[str, Any]) -> str:
    """The accuracies and the number of flags in one line."""
    accuracy = ", ".join(f"{k} {100 * v:.1f} %" for k, v in content["accuracy"].items())
    return f"{accuracy}; {len(content['flags'])} flag(s)"


def as_markdown(content: dict[str, Any]) -> str:
    """The report for people; accuracies come with their binomial standard error."""
    n = content["n"]

    def row(name: str, share: float) -> str:
        error = (share * (1 - share) / n) ** 0.5
        return f"| {name} | {100 * share:.1f} ± {100 * error:.1f} |"

    threat = content["threat"]
    lines = [
        f"# Robustness on {content['dataset']}, {threat['norm']} ε = {threat['eps']:.4g}",
        "",
        f"{n} test images, seed {content['seed']}, weights: {content['weights']}, "
        f"device: {content['device']}.",
        "",
        "| attack | accuracy, % ± standard error |",
        "|---|---|",
        *(row(name, share) for name, share in content["accuracy"].items()),
        row(f"**worst case** over {len(content['accuracy']) - 1} attacks", content["worst_case"]),
        "",
    ]
    if "last" in content:
        last = ", ".join(f"{k} {100 * v:.1f}" for k, v in content["last"].items())
        lines += [f"The last weights instead: {last}.", ""]
    if content["flags"]:
        lines += ["**Flags, signs that these numbers may not hold:**", ""]
        lines += [f"- `{flag['name']}`: {flag['meaning']}" for flag in content["flags"]]
    else:
        lines += ["No flag was raised."]
    lines += ["", f"Command: `{content['command']}`", ""]
    return "\n".join(lines)

"""The report of an imitation for people: ``report.md`` from what ``report.json`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advgame.errors import InputError
from advgame.imitation.discriminator import CHANCE_LOSS
from advgame.imitation.stability import DIP, DROP, IN_A_ROW, REACHED, score, stability
from advgame.run import table

Rows = Sequence[Mapping[str, float]]


def steadiness(rows: Rows, reached: float, random: float, expert: float | None) -> dict[str, Any]:
    """Score of the last weights and how steady the run was; nothing where there is no scale.

    Args:
        rows: of metrics.csv, with ``step`` and ``eval/return``.
        reached: mean return of the last weights.
        random: mean return of random actions, score 0.
        expert: of the demonstrations, score 1; None where they have no rewards.
    """
    if expert is None:
        return {}
    try:
        last, *scores = (
            score(one, random, expert) for one in (reached, *(row["eval/return"] for row in rows))
        )
    except InputError:  # an expert that is no better than chance
        return {}
    found = stability([int(row["step"]) for row in rows], scores)
    return {"score": last, "stability": found}


def as_markdown(report: Mapping[str, Any], command: str) -> str:
    """The report in words.

    Args:
        report: what ``report.json`` says.
        command: that made the run.
    """
    parts = [f"# {report['title']}"]
    if died := report["diverged"]:
        parts.append(f"**It diverged after {died['iteration']} iterations** ({died['reason']}).")
    parts += ["## True return", _returns(report), *_steady(report)]
    if "bc/validation_loss" in report:
        parts.append(
            f"Cloned by maximum likelihood: {report['bc/best_iteration']:.0f} steps, "
            f"{report['bc/validation_loss']:.3f} nats per held-out action, "
            f"{report['bc/train_loss']:.3f} per action learned from."
        )
    parts += ["## Does it resemble the expert?", *_resemblance(report)]
    parts += ["## Settings", "\n".join(f"- {line}" for line in report["settings"])]
    parts += ["## Signs of life", *_flags(report)]
    parts.append(
        "`agents.load_policy(FOLDER)` gives the policy of the last weights, which this report is "
        f"about.\n\nCommand: `{command}`"
    )
    return "\n\n".join(parts) + "\n"


def _returns(report: Mapping[str, Any]) -> str:
    chance, expert = report["random"], report["expert"]
    known = "unknown" if expert["mean"] is None else f"{expert['mean']:.1f}"
    lines = [
        ["random actions", _mean(chance["mean"], chance["standard_error"]), chance["episodes"], ""],
        ["the expert, as demonstrated", known, expert["episodes"], ""],
        [
            "**the policy, last weights**",
            f"**{_mean(report['eval/return'], report['eval/standard_error'])}**",
            report["episodes"],
            f"{report['eval/worst_episode']:.1f}",
        ],
    ]
    head = ["who", "mean ± standard error", "episodes", "worst episode"]
    words = "Fresh episodes of the task, the policy's likeliest action, no discount."
    return f"{table.markdown(head, [[str(cell) for cell in line] for line in lines])}\n\n{words}"


def _mean(value: float, error: float) -> str:
    return f"{value:.1f} ± {error:.1f}"


def _steady(report: Mapping[str, Any]) -> list[str]:
    """Score and falls, in sentences."""
    if "score" not in report:
        if report["expert"]["mean"] is None:
            return ["The demonstrations have no rewards: there is no score."]
        if report["expert"]["mean"] > report["random"]["mean"]:
            return []
        return ["The expert is no better than random actions: there is no score between the two."]
    lines = [f"Score (random actions 0, the expert 1): {report['score']:.2f}."]
    found = report["stability"]
    if found["first"] is None:
        lines.append(
            f"No evaluation reached {REACHED}; the best was {found['best']:.2f}, the mean of the "
            f"last 50 iterations {found['last']:.2f}."
        )
    else:
        lines.append(f"It first reached {REACHED} in iteration {found['first']}.")
        if found["after"]:
            lines.append(
                f"Of the {found['after']} evaluations after that {found['dips']:.0%} were below "
                f"{DIP:.2f}; the score fell below {DROP:.2f} {_times(found['drops'])}, the worst "
                f"was {found['worst']:.2f}."
            )
        settled = found["settled"]
        when = f"by iteration {settled}" if settled else "never"
        lines.append(f"{IN_A_ROW} evaluations of {REACHED} or more in a row: {when}.")
    return [" ".join(lines)]


def _times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")


def _resemblance(report: Mapping[str, Any]) -> list[str]:
    if "imitation" not in report:
        return ["Not measured: that takes four demonstrations or more, and a run that did not end."]
    lines = [
        [way, f"{one['loss']:.2f}", f"{one['accuracy']:.2f}", f"{one['divergence']:.2f}"]
        for way, one in report["imitation"].items()
    ]
    head = ["its actions", "loss", "accuracy", "divergence, bits"]
    return [
        table.markdown(head, lines),
        "A fresh discriminator learned to convergence to tell the finished policy from the expert, "
        f"and was judged on held-out episodes. Chance is a loss of {CHANCE_LOSS:.3f} and an "
        "accuracy of 0.50; the divergence is a lower bound of Jensen and Shannon's. A policy can "
        "solve the task and be nothing like the expert.",
    ]


def _flags(report: Mapping[str, Any]) -> list[str]:
    if not report.get("flags"):
        died = report["diverged"]
        return ["No flag but the divergence above." if died else "No flag was raised."]
    return ["\n".join(f"- `{flag['name']}`: {flag['meaning']}" for flag in report["flags"])]

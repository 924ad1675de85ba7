"""Measuring robustness: verdicts per image and attack, sanity flags, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.evaluation.attacks import ATTACKS, check_attacks
    from advgame.evaluation.flags import Flag, find_flags
    from advgame.evaluation.judge import judge_classifier, judge_run
    from advgame.evaluation.measure import check_classifier, check_evaluation, evaluate
    from advgame.evaluation.report import as_line, write_report
    from advgame.evaluation.sweep_report import write_sweeps
    from advgame.evaluation.verdicts import Verdicts, predict, score, validator

__all__ = [
    "ATTACKS",
    "Flag",
    "Verdicts",
    "as_line",
    "check_attacks",
    "check_classifier",
    "check_evaluation",
    "evaluate",
    "find_flags",
    "judge_classifier",
    "judge_run",
    "predict",
    "score",
    "validator",
    "write_report",
    "write_sweeps",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)

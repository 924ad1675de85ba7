"""Measuring robustness: verdicts per image and attack, sanity flags, reports."""

from advgame.evaluation.attacks import ATTACKS, check_attacks
from advgame.evaluation.flags import Flag, find_flags
from advgame.evaluation.measure import check_classifier, check_evaluation, evaluate
from advgame.evaluation.report import as_line, write_report
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
    "predict",
    "score",
    "validator",
    "write_report",
]

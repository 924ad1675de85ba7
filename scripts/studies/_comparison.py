"""The table of a comparison: a row per game, its numbers over seeds, its signs beside a control."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from advgame.evaluation.flags import wider_gap
from advgame.run.selection import selected_by

PGD, AUTOATTACK = "accuracy_adt:pgd20", "accuracy_autoattack"
Summary = Mapping[str, Mapping[str, Any]]


def with_gap(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """A cell with what AutoAttack takes from what PGD-20 leaves, where both were asked for."""
    return {**run, "gap": run[PGD] - run[AUTOATTACK]} if {PGD, AUTOATTACK} <= run.keys() else run


def flags_of(game: str, runs: Sequence[Mapping[str, Any]], summary: Summary, control: str) -> str:
    """The flags of a game's cells, and what shows beside the control only; "none" without.

    Args:
        game: a method of the runs.
        runs: cells with ``method``, ``n`` test images and ``flags``.
        summary: of `advgame.run.cells.summarise`, made of runs `with_gap`.
        control: a method too; where it is missing, nothing is compared with it.
    """
    raised = {flag for run in runs if run["method"] == game for flag in run["flags"]}
    n, row, honest = runs[0]["n"], summary[game], summary.get(control, {})
    measured = "gap" in row and "gap" in honest
    if measured and wider_gap(row["gap"]["mean"], honest["gap"]["mean"], n):
        raised.add(f"wider_gap_than_{control}")
    return ", ".join(sorted(raised)) or "none"


def selection(runs: Sequence[Mapping[str, Any]]) -> str:
    """What selected the weights of the cells, in a sentence that names the exceptions."""
    pairs = dict.fromkeys((run["method"], selected_by(run)) for run in runs)
    usual = Counter(words for _, words in pairs).most_common(1)[0][0]
    others = [f"{game}: by {words}" for game, words in pairs if words != usual]
    return f"Weights selected by {usual}" + (f" ({'; '.join(others)})" if others else "")


def table(summary: Summary, attacks: Sequence[str], control: str) -> list[list[str]]:
    """Header and rows: everything in % but cost; "–" where a number is missing.

    Args:
        summary: of `advgame.run.cells.summarise`, made with the control.
        attacks: a column each, after clean images.
        control: whose worst case is subtracted, seed by seed.
    """
    columns = {f"accuracy_{name}": name for name in ("clean", *attacks)}
    columns |= {"worst_case": "worst case", "gap": "PGD-20 − AutoAttack"}
    head = ["game", "seeds", "epochs", *columns.values(), f"worst − {control}, paired, 95 %"]
    lines = [[*head, "s per epoch", "F per image and step", f"passes, {control} = 1"]]
    full = _passes(summary[control]) if control in summary else None
    for game, row in summary.items():
        cells = [game, str(row["seeds"]), f"{row['epochs']['mean']:.0f}"]
        cells += [_cell(row.get(column), row["seeds"], "sd") for column in columns]
        pair = row.get("worst_minus_control") if row["seeds"] > 1 else None
        cells.append(_cell(pair, row["seeds"], "half_interval", "+"))
        cells.append(f"{row['seconds_per_epoch']['mean']:.2f}")
        cells.append(f"{row['forwards_per_image']['mean']:.1f}")
        cells.append(f"{_passes(row) / full:.2f}" if full else "–")
        lines.append(cells)
    return lines


def _passes(row: Mapping[str, Any]) -> float:
    """Forwards per training image in a whole training."""
    passes: float = row["epochs"]["mean"] * row["forwards_per_image"]["mean"]
    return passes


def _cell(found: Mapping[str, float] | None, seeds: int, width: str, sign: str = "") -> str:
    if found is None:
        return "–"
    spread = f" ± {100 * found[width]:.1f}" if seeds > 1 else ""
    return f"{100 * found['mean']:{sign}.1f}{spread}"


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """The same table for programs."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

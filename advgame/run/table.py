"""Tables of a study: a row per method, a column per number, mean ± spread over seeds.

A column is a title and a function from a row to the words of its cell. `Number` is the usual one:
the mean over a row's runs of a number, or of its difference to a control's runs of equal seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, Literal

from advgame.statistics import Spread, spread

Run = Mapping[str, Any]
Runs = Sequence[Run]


@dataclass(frozen=True)
class Row:
    """What a column is shown.

    Args:
        name: of the method, or of whatever the row is about.
        runs: those of the row.
        table: those of all rows.
    """

    name: str
    runs: Runs
    table: Runs

    def __getitem__(self, key: str) -> Any:
        """What the first run says, for what all runs of a row share."""
        return self.runs[0][key]


Column = Callable[[Row], str]
Columns = Mapping[str, Column]
"""Title -> column. Spaces around a title are left out, so that two may look alike."""
Value = str | Callable[[Run], Any]


def rows(runs: Runs, by: str = "method") -> list[Row]:
    """A row per value of a key, in the order of the runs."""
    names = dict.fromkeys(run[by] for run in runs)
    return [Row(name, [run for run in runs if run[by] == name], runs) for name in names]


def row_name(row: Row) -> str:
    """Column: what the row is about."""
    return row.name


def seeds(row: Row) -> str:
    """Column: how many runs a row has."""
    return str(len(row.runs))


def epochs(row: Row) -> str:
    """Column: mean passes over the training images; with decimals where it is not even one."""
    whole = mean(run["epochs"] for run in row.runs) >= 1
    return Mean("epochs", 0 if whole else 2)(row)


def paper(numbers: Mapping[str, str]) -> Column:
    """Column: the paper's own numbers, by name of the row."""
    return lambda row: numbers.get(row.name, "not in it")


def accuracies(attacks: Sequence[str]) -> dict[str, Column]:
    """Columns: accuracy on clean images, under each attack, and under all of them."""
    found = {name: Percent(f"accuracy_{name}") for name in ("clean", *attacks)}
    return {**found, "worst case": Percent("worst_case")}


@dataclass(frozen=True)
class Number:
    """Column: the mean over a row's runs, and their spread; "–" where a run lacks the number.

    Args:
        value: key of the number in a run, or how it is got from one (None where it is missing).
        digits: behind the point.
        scale: what the number is multiplied by.
        width: what stands behind ±: standard deviation, half of the 95 % t-interval of the mean, or
            nothing. One run has neither.
        minus: a method; the number of its run of the same seed is subtracted, where two seeds or
            more are paired: one says nothing of chance.
    """

    value: Value
    digits: int = 3
    scale: float = 1
    width: Literal["sd", "half_interval", ""] = "sd"
    minus: str = ""

    def __call__(self, row: Row) -> str:
        """The cell of a row in words: its mean over seeds, or its difference to another row."""
        if self.minus:
            pairs = differences(row.table, self.value, row.name, self.minus)
            return self.show(pairs if len(pairs) > 1 else [])
        values = [number(run, self.value) for run in row.runs]
        return self.show([] if None in values else values)

    def show(self, values: Sequence[float]) -> str:
        """Mean and spread of values over seeds in words."""
        return self.words(spread(values) if values else None)

    def words(self, found: Spread | None) -> str:
        """Mean and spread in words, from what `advgame.statistics.spread` found."""
        if found is None:
            return "–"
        sign = "+" if self.minus else ""
        shown = f"{self.scale * found['mean']:{sign}.{self.digits}f}"
        width = found[self.width] if self.width else None
        return shown if width is None else f"{shown} ± {self.scale * width:.{self.digits}f}"


Percent = partial(Number, digits=1, scale=100)
Paired = partial(Percent, width="half_interval")
Mean = partial(Number, width="")


def number(run: Run, value: Value) -> Any:
    """A run's number, None where it is missing."""
    return run.get(value) if isinstance(value, str) else value(run)


def differences(runs: Runs, value: Value, method: str, control: str) -> list[float]:
    """A method's numbers less a control's, seed by seed; nothing for the control itself."""
    theirs = {run["seed"]: number(run, value) for run in runs if run["method"] == control}
    pairs = [
        (number(run, value), theirs.get(run["seed"]))
        for run in runs
        if run["method"] == method != control
    ]
    return [own - other for own, other in pairs if own is not None and other is not None]


def summarise(runs: Runs, control: str = "", by: str = "method") -> dict[str, dict[str, Any]]:
    """Spread over seeds of every number (a float) that all runs of a method have.

    Args:
        runs: a ``method`` and ``seed`` each.
        control: a method; ``worst_minus_control`` is the difference of ``worst_case`` to its run of
            the same seed.
        by: what is a method.
    """
    summary: dict[str, dict[str, Any]] = {}
    for row in rows(runs, by):
        numbers = [
            key
            for key, value in row.runs[0].items()
            if isinstance(value, float) and all(key in run for run in row.runs)
        ]
        found = {key: spread([run[key] for run in row.runs]) for key in numbers}
        summary[row.name] = {"seeds": len(row.runs)} | found
        if control and (pairs := differences(runs, "worst_case", row.name, control)):
            summary[row.name]["worst_minus_control"] = spread(pairs)
    return summary


def cells(columns: Columns, lines: Sequence[Row]) -> list[list[str]]:
    """Titles, then the words of every row."""
    head = [title.strip() for title in columns]
    return [head, *([column(row) for column in columns.values()] for row in lines)]


def render(columns: Columns, lines: Sequence[Row]) -> str:
    """A Markdown table of results: a line per row, a column per entry of ``columns``."""
    head, *body = cells(columns, lines)
    return markdown(head, body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and a body of ready words."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *body))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def names(found: Any) -> str:
    """Different words, sorted, with commas between; "none" without."""
    return ", ".join(sorted(set(found))) or "none"


def radius(run: Run, key: str = "eps", sign: str = "ε") -> str:
    """The ball of a run in words, ``"ε = 0.15"``, or ``"L2 ε = 0.5"``; L∞ where it says nothing."""
    norm = run.get("norm", "Linf")
    return f"{'' if norm == 'Linf' else norm + ' '}{sign} = {run[key]:.3g}"

"""A tournament: every classifier against every attack, image by image, and the game that it is.

A cell is one attack on one classifier, with a folder of its own: a tournament that is held again
with another row or column computes only what is new. Processes that hold the same tournament in one
folder share its work, batch by batch over all cells (`advgame.evaluation.claims`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from advgame.arena.matrix_games import (
    Floats,
    exploitability_per_image,
    solve,
    solve_per_image,
)
from advgame.arena.pictures import tournament_figure
from advgame.attacks import Attack, Transfer, by_name
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.attacks import is_own_attack
from advgame.evaluation.cells import describe, file_name, fingerprint, other_attribute
from advgame.evaluation.claims import Task, share
from advgame.evaluation.flags import left_ball, no_answer
from advgame.evaluation.measure import Evaluation, check_evaluation
from advgame.evaluation.verdicts import Verdicts
from advgame.run.curves import save_figure
from advgame.run.files import read_json, write_atomically
from advgame.run.folder import RunFolder, device_name, made_by
from advgame.run.table import markdown
from advgame.seeding import as_seed
from advgame.statistics import wilson
from advgame.threat import Threat

TRANSFER = "transfer:"
_SETTINGS = "settings.json"
_SHOWN = 5e-4  # shares below are 0.0 % in the page


@torch.inference_mode(False)
def hold_tournament(
    out: str | Path,
    classifiers: Mapping[str, nn.Module],
    data: ImageSet,
    threat: Threat,
    attacks: Sequence[str] = (),
    *,
    transfer: Sequence[str] = (),
    extra: Mapping[str, Attack] | None = None,
    seed: int = 0,
    batch_size: int = 500,
    progress: Callable[[str], None] = lambda line: None,
    begun: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Attack every classifier by every attacker, solve the games, and write all of it.

    The files: tournament.json, tournament.md, tournament.png, errors.npz (err[i, d, a] and the
    names), and a folder per cell, in which an interrupted tournament goes on.

    Args:
        out: a new folder, or that of a tournament on the same images that goes on or grows.
            Processes that are at it at a time share the work.
        classifiers: the rows by name.
        data: test images, on the classifiers' device.
        threat: the ball, with one radius for all.
        attacks: columns by name, each made on whichever classifier it meets: such an attacker
            knows which one was drawn.
        transfer: names of attacks that are made on one classifier and meet all others: a column
            ``transfer:ROW:ATTACK`` for each row. Such an attacker does not know the draw.
        extra: further columns by name, made on whichever classifier they meet.
        seed: of everything random.
        batch_size: images at a time.
        progress: told a line before each piece of work.
        begun: called when the folder is there and nothing is attacked yet: it may have other
            processes work on it.

    Returns:
        The content of ``tournament.json``.

    Raises:
        InputError: no row or no column, classifiers or attacks that cannot be judged, or a folder
            that holds something else. Nothing is written then.
    """
    out, extra, seed = Path(out), dict(extra or {}), as_seed(seed)
    if not classifiers:
        raise InputError("a tournament needs a row: name classifiers")
    for row, model in classifiers.items():
        for name in transfer:
            extra[f"{TRANSFER}{row}:{name}"] = Transfer(by_name(name, threat, seed), model)
    columns = (*attacks, *extra)
    if not columns:
        raise InputError("a tournament needs a column: name attacks")
    for what, names in {"rows": tuple(classifiers), "columns": columns}.items():
        if len({file_name(one) for one in names}) < len(names):
            raise InputError(f"two {what} have the same name, as files: {', '.join(names)}")
    about = _about(classifiers, data, threat, columns, extra, seed, batch_size)
    for model in classifiers.values():
        check_evaluation(model, data, threat, columns, seed=seed, extra=extra)
    _merged(out, about)  # refuses before anything is written
    _settle(out, about)
    begun()
    cells = {
        (row, column): Evaluation(
            model,
            data,
            threat,
            (column,),
            seed=seed,
            batch_size=batch_size,
            extra={column: extra[column]} if column in extra else {},
            folder=out / "cells" / file_name(row) / file_name(column),
            progress=partial(_tell, progress, row),
        )
        for row, model in classifiers.items()
        for column in columns
    }
    share([task for key, cell in cells.items() for task in _tasks(key, cell)], out, progress)
    verdicts = {key: cell.verdicts() for key, cell in cells.items()}
    correct = [[verdicts[row, one].correct[one].numpy() for one in columns] for row in classifiers]
    errors = 1.0 - np.array(correct).transpose(2, 0, 1)
    clean = {row: verdicts[row, columns[0]].accuracy()["clean"] for row in classifiers}
    with _alone(out):
        content = {
            **made_by(),
            "device": device_name(data.images.device),
            "n": len(data),
            "norm": threat.norm,
            "eps": float(threat.eps),
            "seed": seed,
            "clean": clean,
            "notes": _notes(verdicts, threat, list(classifiers)),
            **standings(errors, list(classifiers), columns),
        }
        _write(out, content, errors)
    return content


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While no other process writes what all share; the cells are nobody's own."""
    RunFolder(out).check_links()
    with FileLock(out / ".lock"):
        yield


def _settle(out: Path, about: dict[str, Any]) -> None:
    """Make the folder, or add rows and columns to its settings."""
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        merged = _merged(out, about)
        write_atomically(out / _SETTINGS, json.dumps(merged, indent=1) + "\n")


def _tell(progress: Callable[[str], None], row: str, line: str) -> None:
    progress(f"{row}: {line}")


def _tasks(key: tuple[str, str], cell: Evaluation) -> Iterator[Task]:
    """The tasks of a cell, by names that those of no other have."""
    mark = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    yield from (replace(task, name=f"{mark}.{task.name}") for task in cell.tasks)


def _notes(
    verdicts: Mapping[tuple[str, str], Verdicts], threat: Threat, rows: Sequence[str]
) -> list[str]:
    """What a reader should know of the cells; of which rows, where it is not of all."""
    told: dict[str, set[str]] = {}
    for (row, _), cell in verdicts.items():
        signs = no_answer(cell) | left_ball(cell, threat)
        for line in (*cell.notes, *signs.values()):
            told.setdefault(line, set()).add(row)
    return [
        line if len(by) == len(rows) else f"{', '.join(row for row in rows if row in by)}: {line}"
        for line, by in told.items()
    ]


def standings(errors: Floats, rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """What a tournament's errors say: error rates with their intervals, and the games' solutions.

    Args:
        errors: (N, D, A), 1 where the classifier errs.
        rows: names of the D classifiers.
        columns: names of the A attacks.

    Returns:
        ``errors``: row -> column -> share, low and high of its 95 % interval; ``games``: name ->
        solution, of all columns, and of those that are made before the draw.
    """
    n, rates = len(errors), errors.mean(0)
    shares = {
        row: {
            column: dict(zip(("share", "low", "high"), (rate, *wilson(rate, n)), strict=True))
            for column, rate in zip(columns, rates[d].tolist(), strict=True)
        }
        for d, row in enumerate(rows)
    }
    blind = [a for a, column in enumerate(columns) if column.startswith(TRANSFER)]
    chosen = {"all": list(range(len(columns)))}
    if 0 < len(blind) < len(columns):
        chosen["transfer"] = blind
    games = {
        name: _solved(errors[:, :, index], rows, [columns[a] for a in index])
        for name, index in chosen.items()
    }
    return {"rows": list(rows), "columns": list(columns), "errors": shares, "games": games}


def _solved(errors: Floats, rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """Both games of some columns: values, mixtures, the best single row and the even mixture."""
    committed, seeing = solve(errors.mean(0)), solve_per_image(errors)
    even = np.full(len(rows), 1 / len(rows))
    alone = errors.max(2).mean(0)

    def named(names: Sequence[str], shares: Floats) -> dict[str, float]:
        return dict(zip(names, shares.tolist(), strict=True))

    return {
        "columns": list(columns),
        "committed": {
            "value": committed.value,
            "defender": named(rows, committed.defender),
            "attacker": named(columns, committed.attacker),
            "best_single": float(errors.mean(0).max(1).min()),
        },
        "per_image": {
            "value": seeing.value,
            "defender": named(rows, seeing.defender),
            "attacker": named(columns, seeing.attacker.mean(0)),
            "single": named(rows, alone),
            "best_single": float(alone.min()),
            "even_mixture": float(np.einsum("d,nda->na", even, errors).max(1).mean()),
            "even_mixture_exploitability": exploitability_per_image(errors, even, seeing.attacker),
        },
    }


def playable(shares: Mapping[str, float]) -> dict[str, float]:
    """A mixture without what is hardly ever played, of sum 1 again.

    Args:
        shares: name -> probability.
    """
    played = {name: share for name, share in shares.items() if share >= _SHOWN}
    whole = sum(played.values())
    return {name: share / whole for name, share in played.items()}


def _about(
    classifiers: Mapping[str, nn.Module],
    data: ImageSet,
    threat: Threat,
    columns: Sequence[str],
    extra: Mapping[str, Attack],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Everything that the cells depend on, as plain values."""
    prints = {
        row: fingerprint(model, data, threat, seed, batch_size)
        for row, model in classifiers.items()
    }
    common = {
        name: value
        for name, value in next(iter(prints.values())).items()
        if name not in ("networks", "attributes")
    }
    own = {
        name: describe(by_name(name, threat))
        for name in columns
        if name not in extra and is_own_attack(name)
    }
    return {
        **common,
        "rows": {row: one["networks"][0] for row, one in prints.items()},
        "attributes": {row: one["attributes"][0] for row, one in prints.items()},
        "columns": {**own, **{name: describe(attack) for name, attack in extra.items()}},
    }


def _merged(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The settings of a folder with the rows and columns of now.

    Raises:
        InputError: what the folder holds instead.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another folder")
    if not (out / _SETTINGS).exists():
        if out.is_dir() and any(one.name != ".lock" for one in out.iterdir()):
            raise InputError(f"{out} is no tournament's folder, and not empty: choose another")
        return about
    had = read_json(out / _SETTINGS, f"delete {out}, and the tournament is held again")
    merged = dict(about)
    for name, value in about.items():
        if name in ("rows", "columns"):
            known = had.get(name)
            if not isinstance(known, dict):
                raise InputError(f"{out}/{_SETTINGS} is of something else: choose another folder")
            if other := [one for one in value if one in known and known[one] != value[one]]:
                raise InputError(
                    f"{out} has a {name[:-1]} {other[0]} that is another: rename one, or choose "
                    "another folder"
                )
            merged[name] = {**known, **value}
        elif name == "attributes":
            known = had.get(name, {})
            for row in value.keys() & known.keys():
                pair = ({name: [one[row]]} for one in (known, value))
                if differing := other_attribute(*pair):
                    raise InputError(
                        f"{out} has a row {row} whose {differing} was another: rename it, or "
                        "choose another folder"
                    )
            merged[name] = {**value, **known}
        elif had.get(name) != value:
            words = {"threat": "another ball", "images": "other images"}
            raise InputError(
                f"{out} holds a tournament with {words.get(name, f'another {name}')}: choose "
                "another folder"
            )
    return merged


def _write(out: Path, content: dict[str, Any], errors: Floats) -> None:
    file = io.BytesIO()
    rows, columns = np.array(content["rows"]), np.array(content["columns"])
    np.savez_compressed(file, errors=errors.astype(bool), rows=rows, columns=columns)
    write_atomically(out / "errors.npz", file.getvalue())
    save_figure(tournament_figure(content), out / "tournament.png")
    write_atomically(out / "tournament.md", as_markdown(content))
    write_atomically(out / "tournament.json", json.dumps(content, indent=1) + "\n")


def as_markdown(content: Mapping[str, Any]) -> str:
    """The tournament for people.

    Args:
        content: of tournament.json.
    """
    rows, columns = content["rows"], content["columns"]

    def rate(cell: Mapping[str, float]) -> str:
        return f"{100 * cell['share']:.1f} ({100 * cell['low']:.1f} – {100 * cell['high']:.1f})"

    def mixture(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {100 * p:.1f} %" for name, p in playable(shares).items())

    table = markdown(
        ["classifier", "clean", *columns],
        [
            [
                row,
                f"{100 * (1 - content['clean'][row]):.1f}",
                *(rate(content["errors"][row][column]) for column in columns),
            ]
            for row in rows
        ],
    )
    lines = [
        f"# Tournament of {len(rows)} classifiers and {len(columns)} attackers, "
        f"{content['norm']} ε = {content['eps']:.4g}",
        "",
        f"Errors in % of {content['n']} test images with their 95 % intervals, seed "
        f"{content['seed']}, device: {content['device']}.",
        "",
        table,
        "",
        *(f"Note: {note}.\n" for note in content["notes"]),
    ]
    titles = {"all": "All columns", "transfer": "Columns that are made before the draw"}
    for name, game in content["games"].items():
        before, seeing = game["committed"], game["per_image"]
        lines += [
            f"## {titles[name]}",
            "",
            markdown(
                ["game", "value, %", "best single, %", "classifiers", "attackers"],
                [
                    [
                        words,
                        f"{100 * one['value']:.1f}",
                        f"{100 * one['best_single']:.1f}",
                        mixture(one["defender"]),
                        mixture(one["attacker"]),
                    ]
                    for words, one in (
                        ("the attacker mixes before it sees the image", before),
                        ("the attacker picks for each image", seeing),
                    )
                ],
            ),
            "",
            f"The even mixture errs on {100 * seeing['even_mixture']:.1f} % where the attacker "
            "picks for each image.",
            "",
        ]
    lines += [
        f"A column `{TRANSFER}ROW:ATTACK` is made on ROW and meets all classifiers. Any other is "
        "made anew on the classifier that it meets, as by an attacker that knows the draw. None "
        "is made for a mixture: how robust one is, evaluate.py says of its mixture.json.",
        "",
        f"Command: `{content['command']}`",
        "",
    ]
    return "\n".join(lines)

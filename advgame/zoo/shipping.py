"""Puts a judged run into the zoo; `scripts/ship.py` is its command."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from advgame.classifiers.names import knows
from advgame.data.names import NAMED
from advgame.errors import InputError
from advgame.run.files import digest, read_json, write_atomically
from advgame.run.folder import RunFolder
from advgame.run.options import parse_radius
from advgame.statistics import wilson
from advgame.zoo.entries import CARD, Card, card
from advgame.zoo.entries import list as names

LARGEST = 5_000_000
"""Bytes of a file of weights."""
_ROOT = Path(__file__).resolve().parents[2]
_SOURCE = ("advgame", "agents", "envs", "scripts")


def ship(run: Path, judged: Path, home: Path, *, game: str = "", commit: str = "") -> str:
    """Copy a run's best weights, settings and report to the zoo, and write the card.

    Absolute paths to data and runs become ``data`` and ``runs``.

    Args:
        run: the training's folder.
        judged: the folder of its evaluation by `evaluate.py`, with AutoAttack.
        home: the zoo's folder.
        game: what trained it; of a run folder called ``GAME-seedN`` the GAME when empty.
        commit: one with the same source as the run's own, where that is in no published history.

    Returns:
        The entry's name.

    Raises:
        InputError: the evaluation is not of these weights, by what its folder ``evaluation`` notes
            of the network, or without AutoAttack; the network is not built in, the file is too
            large, or the entry exists.
    """
    trained, evaluation = RunFolder.open(run), RunFolder.open(judged)
    about, report, weights = trained.about(), evaluation.report(), trained.weights()
    _check(trained, about, evaluation.about(), report, weights)
    _check_weights(trained, evaluation)
    config = about["config"]
    found = re.fullmatch(r"(.+)-seed\d+", trained.path.name)
    game = game or (found[1] if found else "")
    if not game:
        raise InputError(f"{run} does not say what trained it: name it, --game pgd-at")
    if commit:
        _check_commit(about["commit"], commit)
        about = {**about, "commit": commit}
    name = f"{config['dataset']}/{game}-{config['model']}-seed{config['seed']}"
    folder = home / name
    if folder.exists():
        raise InputError(f"{folder} exists: remove it, or give this one another --game")
    about = _without_places(about, config)
    report = _without_places(report, {**config, **evaluation.about()["config"]})
    flags = [flag["name"] for flag in report["flags"]] + _flags(trained)
    made = made_card(name, game, about, report, flags, digest(weights))
    write_atomically(folder / "checkpoints" / "best.safetensors", weights.read_bytes())
    for file, content in (("config.json", about), ("report.json", report), (CARD, asdict(made))):
        write_atomically(folder / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return name


def made_card(
    name: str,
    game: str,
    about: Mapping[str, Any],
    report: Mapping[str, Any],
    flags: Iterable[str],
    sha256: str,
) -> Card:
    """The card of a run and the report of its evaluation.

    Args:
        name: of the entry.
        game: what trained it.
        about: the run's ``config.json``.
        report: ``report.json`` of `evaluate.py`, with AutoAttack.
        flags: names of those of the training and of the evaluation.
        sha256: of the weights.
    """
    config, threat = about["config"], report["threat"]
    accuracy = {attack: float(share) for attack, share in report["accuracy"].items()}
    return Card(
        name=name,
        dataset=report["dataset"],
        game=game,
        network=config["model"],
        norm=threat["norm"],
        eps=parse_radius(config["eps"], threat["norm"]),
        command=about["command"],
        commit=about["commit"],
        selected_by=report["weights"],
        judged=report["command"],
        n=report["n"],
        accuracy=accuracy,
        autoattack_interval=wilson(accuracy["autoattack"], report["n"]),
        flags=tuple(flags),
        sha256=sha256,
    )


def _check(
    run: RunFolder,
    about: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    report: Mapping[str, Any],
    weights: Path,
) -> None:
    """Refuse what is no evaluation with AutoAttack of these weights, or nothing for the zoo."""
    config, asked = about["config"], evaluation["config"]
    if Path(str(asked.get("what"))).name != run.path.name or asked.get("weights") != "best":
        raise InputError(
            f"the evaluation is of {asked.get('weights')} of {asked.get('what')}, and not of the "
            f"best weights of {run.path}: evaluate that"
        )
    if "autoattack" not in report["accuracy"]:
        raise InputError("the evaluation is without AutoAttack: --attacks autoattack")
    ball = (run.norm(), parse_radius(config["eps"], run.norm()))
    if (config["dataset"], *ball) != (report["dataset"], *report["threat"].values()):
        raise InputError("the evaluation has another data set or ball than the training")
    if not knows(about) or config["dataset"] not in NAMED:
        raise InputError(f"{run.path} has a network or data of somebody's own, which do not ship")
    if weights.stat().st_size > LARGEST:
        raise InputError(f"{weights} has more than {LARGEST / 1e6:.0f} MB")
    with safe_open(weights, "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118, it is no dict
    if not kinds <= {"F32", "I64"}:  # I64: batch norm's counters
        raise InputError(f"{weights} is not in fp32 but {', '.join(sorted(kinds))}")


def _check_weights(run: RunFolder, evaluation: RunFolder) -> None:
    """Refuse an evaluation of other weights: another run may have had a folder of this name.

    Raises:
        InputError: the network that was attacked is not this one, or is no longer noted.
    """
    from advgame.evaluation.cells import describe
    from advgame.targets import from_run

    noted = evaluation.path / "evaluation" / "settings.json"
    judged = read_json(noted, f"it tells which weights were judged: evaluate {run.path} again")
    if judged["networks"][0] != describe(from_run(run.path).model):
        raise InputError(
            f"{evaluation.path} has judged other weights than the best of {run.path} are now: "
            "evaluate that again"
        )


def _flags(run: RunFolder) -> list[str]:
    """Of the training's own report, which saw few images, only signs of life count."""
    report = run.report()
    dead = [flag["name"] for flag in report["flags"] if flag["name"].startswith("dead_")]
    return dead + ["catastrophic_overfitting"] * ("catastrophic_overfitting" in report)


def _check_commit(own: str, other: str) -> None:
    """Refuse a commit whose source is not that of the run.

    Raises:
        InputError: it differs, or either is not there.
    """
    words = ["git", "-C", str(_ROOT), "diff", "--quiet", own, other, "--", *_SOURCE]
    if subprocess.run(words, capture_output=True).returncode:
        raise InputError(f"the source of {other} is not that of {own}, or one is not there")


def _without_places(content: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON without the absolute paths of the machine on which it was made."""
    text = json.dumps(content)
    for setting in ("data_dir", "runs_dir"):
        where = config.get(setting)
        if where and Path(where).is_absolute():
            text = text.replace(where, setting.removesuffix("_dir"))
    made: dict[str, Any] = json.loads(text)
    return made


def as_row(one: Card) -> str:
    """The row of a classifier in the zoo's table, in Markdown."""
    low, high = (100 * end for end in one.autoattack_interval)
    clean, robust = (100 * one.accuracy[attack] for attack in ("clean", "autoattack"))
    pixels = one.eps * 255
    eps = f"{pixels:.0f}/255" if abs(pixels - round(pixels)) < 1e-9 else f"{one.eps:.3g}"
    cells = (
        f"`{one.name}`",
        one.game,
        f"{one.norm} {eps}",
        f"{clean:.1f}",
        f"{robust:.1f} ({low:.1f} – {high:.1f})",
        str(one.n),
        ", ".join(one.flags) or "none",
    )
    return f"| {' | '.join(cells)} |"


def write_table(page: Path) -> None:
    """Replace the rows of the table on a page, which begin with a name, by those of all cards."""
    lines = page.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("|---")) + 1
    rest = [line for line in lines[at:] if not line.startswith("| `")]
    write_atomically(
        page, "\n".join([*lines[:at], *(as_row(card(name)) for name in names()), *rest, ""])
    )

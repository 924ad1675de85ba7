"""The rounds of PSRO in a run's folder: played, with curves as they end, then told and drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from advgame.arena.matrix_games import Equilibrium, Floats, best_replies
from advgame.arena.mixture_file import write_mixture
from advgame.arena.oracles import Round, psro, restricted, support
from advgame.arena.pictures import tournament_figure
from advgame.arena.population import FIRST, Population
from advgame.arena.tournament import playable, standings
from advgame.health import deaths
from advgame.run.curves import Curves, Panels, game_figure, save_figure
from advgame.run.files import write_atomically
from advgame.run.folder import Metrics, RunFolder
from advgame.run.table import markdown
from advgame.threat import Threat

PANELS: Panels = {
    "The restricted game": ("expected error, share", {"game/value": "value"}),
    "What the answers gain": (
        "expected error, share",
        {
            "game/gap": "both, a lower bound on exploitability",
            "game/attacker_gain": "the attacker's",
            "game/defender_gain": "the defender's",
        },
    ),
    "Support": (
        "strategies that are played",
        {"game/defender_support": "classifiers", "game/attacker_support": "attackers"},
    ),
    "Compute": ("forwards of a classifier", {"cost/round": "of the round"}),
}
# of metrics.csv and TensorBoard -> what of a round
TAGS = {
    "game/value": "value",
    "game/gap": "gap",
    "game/attacker_gain": "attacker_gain",
    "game/defender_gain": "defender_gain",
    "game/attacker_support": "attacker_support",
    "game/defender_support": "defender_support",
    "cost/round": "forwards",
    "time/seconds": "seconds",
}


def defender_folder(run: Path, number: int) -> Path:
    """The run folder of a classifier, within that of all rounds."""
    return run / "defenders" / f"{number:02d}"


def play(
    run: RunFolder, population: Population, rounds: int, *, per_image: bool = True
) -> dict[str, Any]:
    """Play, each round into metrics.csv and TensorBoard as it ends; those that are there are read.

    Args:
        run: the folder; classifiers lie where `defender_folder` says.
        population: both players.
        rounds: how many.
        per_image: whether the attacker picks its strategy after it has seen the image.

    Returns:
        what `write` takes: ``per_image``; ``begin``, what classifier 0 and attacker 1 took; the
        ``rounds``; ``last``, the game after them, with the attacker's answer; and its ``errors``
        (N, D, A).
    """
    table, found = run.path / "metrics.csv", list[dict[str, Any]]()
    done = len(Metrics.read(table)) if table.exists() else 0
    metrics = Metrics(table, done)
    curves = Curves(run.path, purge_step=done + 1 if done else None)
    if curves.events.new:
        curves.settings(run.about(), ("final/worst_case",))
    errors = np.empty(0)
    for one in islice(psro(population, 1, FIRST, per_image=per_image), rounds):
        errors = one.errors
        found.append(_told(run, population, one))
        if one.number > done:
            shown = {tag: float(found[-1][name]) for tag, name in TAGS.items()}
            metrics.add({"round": one.number, **shown})
            if one.number == 1:
                curves.layout(PANELS, shown, 1)
            curves.scalars(shown, one.number)
    curves.close()
    return {
        "per_image": per_image,
        "begin": _spent(run, population, 0, 1),
        "rounds": found,
        "last": _answered(population, errors, per_image=per_image),
        "errors": errors,
    }


def _told(run: RunFolder, population: Population, one: Round) -> dict[str, Any]:
    row, column = one.errors.shape[1] - 1, one.errors.shape[2] - 1
    return {
        "round": one.number,
        **_mixtures(one.equilibrium),
        "attacker_gain": one.attacker_gain,
        "defender_gain": one.defender_gain,
        "gap": one.gap,
        **_spent(run, population, row, column),
    }


def _mixtures(found: Equilibrium) -> dict[str, Any]:
    """Value, mixtures and supports of a restricted game; an attacker's mean over images."""
    return {
        "value": found.value,
        "defender": named(found.defender),
        "attacker": named(found.attacker.mean(0)),
        "defender_support": support(found.defender),
        "attacker_support": support(found.attacker),
    }


def named(shares: Floats) -> dict[str, float]:
    """A mixture (S,) by the numbers of its strategies, as JSON takes it."""
    return {str(number): share for number, share in enumerate(shares.tolist())}


def _spent(run: RunFolder, population: Population, row: int, column: int) -> dict[str, float]:
    """Forwards and seconds of a classifier's training and of an attacker."""
    folder, attack = defender_folder(run.path, row), population.spent(column)
    seconds = Metrics.read(folder / "metrics.csv")[-1]["time/seconds"]
    return {
        "forwards": round(trained_forwards(folder)) + attack["forwards"] + attack["backwards"],
        "seconds": seconds + attack["seconds"],
    }


def trained_forwards(folder: Path) -> float:
    """What a training took, in forwards of one image by one classifier.

    One back to the image counts as 1, one with weights as 2.

    Args:
        folder: of its run.
    """
    passes, before = 0.0, 0.0
    for row in Metrics.read(folder / "metrics.csv"):
        passes += row["attacker/forwards_per_image"] * (row["step"] - before)
        before = row["step"]
    return passes * float(RunFolder.open(folder).about()["config"]["batch_size"])


def _answered(population: Population, errors: Floats, *, per_image: bool) -> dict[str, Any]:
    """The game after the last round, and what an attacker that answers it comes to."""
    found, (rows, columns) = restricted(errors, per_image=per_image), errors.shape[1:]
    population.attack(columns, found.defender)
    answer = np.stack([population.errors(row, columns) for row in range(rows)], 1)
    whole = np.concatenate([errors, answer[:, :, None]], 2)
    worst, _ = best_replies(
        whole if per_image else whole.mean(0, keepdims=True),
        found.defender,
        np.pad(found.attacker, ((0, 0), (0, 1))),
    )
    gain = max(0.0, worst - found.value)
    return {**_mixtures(found), "attacker_gain": gain, "answered": found.value + gain}


def write(run: RunFolder, threat: Threat, title: str, found: dict[str, Any]) -> None:
    """Write the last mixture, rounds.json, rounds.md, errors.npz and the pictures.

    Args:
        run: the folder.
        threat: the ball.
        title: of page and pictures.
        found: of `play`; where it has ``sampling``, ``shares`` of the classifiers and the
            ``error`` on training images, these are mixture.json and the equilibrium is nash.json.
    """
    found = dict(found)
    errors: Floats = found.pop("errors")
    rows = [f"classifier {number}" for number in range(errors.shape[1])]
    columns = ["no attack", *(f"attacker {number}" for number in range(1, errors.shape[2]))]
    files = {"mixture.json": found["last"]["defender"]}
    if "sampling" in found:
        files = {"mixture.json": found["sampling"]["shares"], "nash.json": files["mixture.json"]}
    for name, shares in files.items():
        played = playable(shares)
        paths = [defender_folder(run.path, int(number)) for number in played]
        write_mixture(run.path / name, paths, list(played.values()))
    file = io.BytesIO()
    named_rows, named_columns = np.array(rows), np.array(columns)
    np.savez_compressed(file, errors=errors.astype(bool), rows=named_rows, columns=named_columns)
    write_atomically(run.path / "errors.npz", file.getvalue())
    ball = {"norm": threat.norm, "eps": float(threat.eps)}
    known = {"split": "validation", "n": len(errors), **ball, **standings(errors, rows, columns)}
    if found["per_image"]:  # of several equilibria the one that was played
        shares = found["last"]["attacker"].values()
        known["games"]["all"]["per_image"]["attacker"] = dict(zip(columns, shares, strict=True))
    save_figure(tournament_figure(known), run.path / "payoffs.png")
    table = Metrics.read(run.path / "metrics.csv")
    save_figure(game_figure(table, title, PANELS, x=("round", "round")), run.path / "curves.png")
    flags = [
        {"name": f"classifier_{number}_{one.name}", "meaning": one.sentence}
        for number in range(len(rows))
        for one in deaths(Metrics.read(defender_folder(run.path, number) / "metrics.csv"))
    ]
    content = {**known, **found, "flags": flags, "command": run.about()["command"]}
    run.write_text("rounds.md", as_markdown(title, content))
    run.write_json("rounds.json", content)


def as_markdown(title: str, content: Mapping[str, Any]) -> str:
    """The rounds for people.

    Args:
        title: of the page.
        content: of rounds.json.
    """
    lines: Sequence[Mapping[str, Any]] = [
        *content["rounds"],
        {"round": "end", **content["last"]},
    ]
    table = markdown(
        [
            *("round", "value, %", "gap, %", "attacker's gain, %", "defender's gain, %"),
            *("classifiers", "attackers", "forwards, million", "seconds"),
        ],
        [
            [
                str(one["round"]),
                *(_percent(one, name) for name in ("value", "gap", "attacker_gain")),
                _percent(one, "defender_gain"),
                f"{one['defender_support']} ({_mixture(one['defender'])})",
                f"{one['attacker_support']} ({_mixture(one['attacker'])})",
                f"{one['forwards'] / 1e6:.2f}" if "forwards" in one else "–",
                f"{one['seconds']:.0f}" if "seconds" in one else "–",
            ]
            for one in lines
        ],
    )
    sees = (
        "after it has seen the image; its mixture is a mean over images"
        if content["per_image"]
        else "before it sees the image"
    )
    begin, sampled = content["begin"], content.get("sampling")
    sampling = sampled and [
        f"BARRE's sampling probabilities (OSP), in mixture.json: {_mixture(sampled['shares'])}; "
        f"error on training images under ARC {_percent(sampled, 'error')} %. The equilibrium's "
        "are in nash.json.",
        "",
    ]
    return "\n".join(
        [
            f"# {title}, {content['norm']} ε = {content['eps']:.4g}",
            "",
            f"Expected errors on {content['n']} validation images. A round's value is that of the "
            "game of the classifiers and attackers before it; the attacker picks its strategy "
            f"{sees}.",
            "",
            table,
            "",
            "The gap is what both answers gain together. Better answers may exist: it is a lower "
            "bound on exploitability, and a small one proves nothing. Of the end the attacker's "
            "answer alone is known: under it the mixture errs on "
            f"{_percent(content['last'], 'answered')} %. Before the first round classifier 0 and "
            f"attacker 1 took {begin['forwards'] / 1e6:.2f} million forwards.",
            "",
            *(sampling or []),
            *(f"Flag `{one['name']}`: {one['meaning']}.\n" for one in content["flags"]),
            f"Command: `{content['command']}`",
            "",
        ]
    )


def _percent(one: Mapping[str, Any], name: str) -> str:
    return f"{100 * one[name]:.1f}" if name in one else "–"


def _mixture(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {100 * share:.0f} %" for name, share in playable(shares).items())

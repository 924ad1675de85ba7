"""A tournament: classifiers against attackers, the game that it is, and both sides' best mixtures.

    python scripts/tournament.py runs/A runs/B runs/C --attacks pgd20,autoattack-lite
    python scripts/tournament.py runs/A runs/B --transfer aa:apgd-ce      # made on each, meets all
    python scripts/tournament.py runs/A my_code:build --attackers runs/ATTACKER --eps 0.1
    python scripts/tournament.py runs/A runs/B runs/D --attacks pgd20 --out runs/cup   # and again
    python scripts/tournament.py runs/A runs/B --out runs/cup --jobs 8   # shared by 8 processes

Rows are run folders, zoo:NAME, files of weights (--model), and your own package.module:factory.
Writes `<out>/`: tournament.json, tournament.md and tournament.png (error rates, and both mixtures
of the game with and without a look at the image), errors.npz (every verdict), and mixture.json, the
defender's mixture, which evaluate.py judges. The same command goes on after a kill; with a row or a
column more it computes only what is new. Started several times, or with --jobs, it is one
tournament whose work is shared (docs/cluster.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import sweeps
import tyro
from torch import nn

from advgame.arena import hold_tournament, write_mixture
from advgame.arena.tournament import playable
from advgame.attacks import Attack
from advgame.choices import TRANSFER
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import check_attacks
from advgame.run.cli import run_script
from advgame.run.options import Count, Names, check_types
from advgame.run.program import prog
from advgame.run.progress import telling
from advgame.run.workers import WorkersConfig, check_workers, run_workers
from advgame.threat import Threat
from advgame.zoo.entries import place


@dataclass(frozen=True)
class Config(WorkersConfig, sweeps.Config):
    """Hold a tournament of classifiers and attackers."""

    attacks: Names = ("pgd20", "autoattack-lite")
    """columns that are made on whichever classifier they meet, as `evaluate` takes them"""
    transfer: Names = ()
    """attacks that are made on each classifier in turn and meet all: a column per classifier"""
    n: Count | None = 1000
    """test images; None takes all"""
    batch_size: Count = 500
    """images at a time; AutoAttack's verdicts can depend on it"""
    out: str = ""
    """folder of the tournament, also one that goes on or grows; runs/<current time> when empty"""


def main(config: Config) -> None:
    """Hold the tournament, or go on with it, and write what it found."""
    check_types(Config, vars(config), "settings")
    # there is always a column of the clean images, which needs no name
    config = replace(config, attacks=tuple(name for name in config.attacks if name != "clean"))
    check_attacks(config.transfer)
    if wants := [name for name in (*config.attacks, *config.transfer) if name in TRANSFER]:
        raise InputError(
            f"{wants[0]} is made on one other classifier, of which a tournament has many: "
            "--transfer pgd20 makes PGD-20 on each in turn"
        )
    if not (config.attacks or config.attackers or config.transfer):
        raise InputError("a tournament needs a column: --attacks, --attackers or --transfer")
    check_workers(config, "a tournament")
    asked = replace(config, attacks=config.attacks or config.transfer)  # of either, one is enough
    loaded = sweeps.load(asked, sweeps.settled(asked))
    with sweeps.results_in(config.out) as out:
        hold(config, out, *loaded)


def hold(
    config: Config,
    out: Path,
    models: Mapping[str, nn.Module],
    data: ImageSet,
    threat: Threat,
    learned: Mapping[str, Attack],
) -> None:
    """Hold the tournament of what `sweeps.load` gives, in the folder ``out``."""
    workers = Path(__file__), out, words_of(config, out), f"--out {out}"
    with telling(f"{out}: {len(models)} classifiers, {len(data)} images") as tell:
        content = hold_tournament(
            out,
            models,
            data,
            threat,
            config.attacks,
            transfer=config.transfer,
            extra=learned,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=tell,
            begun=partial(run_workers, config, *workers),
        )
    paths = dict(zip(sweeps.names_of(config.what), map(Path, config.what), strict=True))
    game = content["games"].get("transfer", content["games"]["all"])["per_image"]
    write_defender(out, paths, game["defender"])
    print(
        f"value {100 * game['value']:.1f} % errors, best single {100 * game['best_single']:.1f} %; "
        f"more in {out}/tournament.md"
    )


def words_of(config: Config, out: Path) -> list[str]:
    """The command line of a worker: what this process was asked for, less the engine."""
    usual, words = Config(), [*config.what, "--out", str(out)]
    for field in fields(Config):
        value = getattr(config, field.name)
        left_out = field.name in ("what", "out", *config.unkept)
        if not left_out and value != getattr(usual, field.name):
            many = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, many)]
    return words


def write_defender(out: Path, paths: Mapping[str, Path], shares: Mapping[str, float]) -> None:
    """Write the mixture as evaluate.py takes it, where all that it plays are files or folders."""
    played = playable(shares)
    (out / "mixture.json").unlink(missing_ok=True)  # of a smaller tournament
    if odd := [name for name in played if not place(paths[name]).exists()]:
        print(f"{odd[0]} is code, which no file of a mixture can name: there is no mixture.json")
        return
    write_mixture(out / "mixture.json", [paths[name] for name in played], list(played.values()))


if __name__ == "__main__":
    run_script(
        lambda: main(tyro.cli(Config, prog=prog())), stopped="the same command with --out goes on"
    )

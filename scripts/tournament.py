"""A tournament: classifiers against attackers, the game that it is, and both sides' best mixtures.

    python scripts/tournament.py runs/A runs/B runs/C --attacks pgd20,autoattack-lite
    python scripts/tournament.py runs/A runs/B --transfer aa:apgd-ce      # made on each, meets all
    python scripts/tournament.py runs/A my_code:build --attackers runs/ATTACKER --eps 0.1
    python scripts/tournament.py runs/A runs/B runs/D --attacks pgd20 --out runs/cup   # and again

Rows are run folders, zoo:NAME, files of weights (--model), and your own package.module:factory.
Writes `<out>/`: tournament.json, tournament.md and tournament.png (error rates, and both mixtures
of the game with and without a look at the image), errors.npz (every verdict), and mixture.json, the
defender's mixture, which evaluate.py judges. The same command goes on after a kill; with a row or a
column more it computes only what is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import sweeps
import tyro

from advgame.arena import hold_tournament, write_mixture
from advgame.arena.tournament import playable
from advgame.errors import InputError
from advgame.evaluation import check_attacks
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.run.options import Count, Names, check_types
from advgame.run.program import prog
from advgame.run.progress import telling
from advgame.zoo.entries import place


@dataclass(frozen=True)
class Config(sweeps.Config):
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
    check_attacks(config.transfer)
    if not (config.attacks or config.attackers or config.transfer):
        raise InputError("a tournament needs a column: --attacks, --attackers or --transfer")
    out = Path(config.out) if config.out else RunFolder.new_path(Path("runs"), "")
    asked = replace(config, attacks=config.attacks or config.transfer)  # of either, one is enough
    models, data, threat, learned = sweeps.load(asked)
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
        )
    paths = {sweeps.name_of(what): Path(what) for what in config.what}
    game = content["games"].get("transfer", content["games"]["all"])["per_image"]
    write_defender(out, paths, game["defender"])
    print(
        f"value {100 * game['value']:.1f} % errors, best single {100 * game['best_single']:.1f} %; "
        f"more in {out}/tournament.md"
    )


def write_defender(out: Path, paths: Mapping[str, Path], shares: Mapping[str, float]) -> None:
    """Write the mixture as evaluate.py takes it, where all that it plays are files or folders."""
    played = playable(shares)
    (out / "mixture.json").unlink(missing_ok=True)  # of a smaller tournament
    if all(place(paths[name]).exists() for name in played):
        write_mixture(out / "mixture.json", [paths[name] for name in played], list(played.values()))


if __name__ == "__main__":
    run_script(
        lambda: main(tyro.cli(Config, prog=prog())), stopped="the same command with --out goes on"
    )

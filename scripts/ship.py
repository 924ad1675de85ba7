"""Put a trained and judged classifier into the zoo, with its card.

    python scripts/evaluate.py runs/pgd-at-seed0 --attacks pgd20,autoattack --name judged
    python scripts/ship.py runs/pgd-at-seed0 runs/judged

Copies the best weights, settings and report to advgame/zoo/DATASET/GAME-NETWORK-seedN, and writes
the card from them, and its row of docs/zoo.md. Then `zoo:DATASET/GAME-NETWORK-seedN` is a name
wherever a run can be named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from advgame import zoo
from advgame.run.cli import run_script
from advgame.run.program import prog
from advgame.zoo.entries import HOME
from advgame.zoo.shipping import ship, write_table

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"


@dataclass(frozen=True)
class Config:
    """Which run goes into the zoo, and under which name."""

    run: Annotated[str, tyro.conf.Positional]
    """the training's run folder"""
    judged: Annotated[str, tyro.conf.Positional]
    """the folder of its evaluation, with AutoAttack"""
    game: str = ""
    """what trained it; of a run folder called GAME-seedN the GAME when empty"""
    commit: str = ""
    """a commit with the same source as the run's own, where that is in no published history"""


def main(config: Config) -> None:
    """Ship it and print its card."""
    name = ship(Path(config.run), Path(config.judged), HOME, game=config.game, commit=config.commit)
    if PAGE.exists():  # in a clone
        write_table(PAGE)
    print(zoo.card(name))


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config, prog=prog())))

"""What a borrowed GPU is used for in a few minutes: packed here, run there, rehearsed anywhere.

    python scripts/gpu_plan.py --pack gpu-plan --data-dir DIR --max-mb 60 --minutes 9
    python scripts/gpu_plan.py --pack rehearsal --miniature    # no images, tiny sizes, a CPU

Carry the folder, in several uploads if need be, and there: ``python start.py``. It needs Python
with torch and its usual company, and no network. Results are in gpu_plan.json after every step;
what was not done is taken up by the next ``python start.py``. docs/gpu.md says what each step
measures.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro
from plans.packing import LACKING, pack
from plans.running import Record, as_text, play
from plans.sizes import COLOUR, FULL, MINIATURE, Plan, steps

from advgame.errors import InputError, unknown
from advgame.run.cli import run_script
from advgame.run.files import read_json
from advgame.run.folder import made_by
from advgame.run.options import Count, Names, Positive, check_types, refuse_idle
from advgame.run.program import prog

PACKING = ("data_dir", "max_mb", "packages")


@dataclass(frozen=True)
class Config:
    """Pack what is carried to a GPU, or run the plan where it was unpacked."""

    pack: str | None = None
    """a new folder for what is carried: start.py, parts.json, and parts of at most --max-mb"""
    run: str | None = None
    """the folder that start.py unpacked; start.py itself says it"""
    data_dir: str | None = None
    """with --pack: the folder that CIFAR-10 lies in, in torchvision's layout"""
    max_mb: Positive = 60.0
    """with --pack: the largest file to carry, in 10^6 bytes"""
    packages: Names = LACKING
    """with --pack: installed packages of pure Python that are carried along"""
    minutes: Positive = 9.0
    """that the run may take in all, unpacking included; a step that would not fit is skipped"""
    limits: tuple[Positive, ...] | None = None
    """seconds that each robust speedrun may train; 60 and 290 where none are told"""
    images: Count | None = None
    """test images under AutoAttack; 1000 where it is not told"""
    steps: Names = ()
    """only these steps; all when empty"""
    miniature: bool = False
    """tiny sizes, for a CPU: a rehearsal, whose numbers mean nothing"""
    out: str | None = None
    """with --run: the file of results; gpu_plan.json in the run's folder where it is not told"""
    began: float | None = None
    """with --run: when the minutes began, in seconds since 1970; start.py says it"""


def main(config: Config) -> None:
    """Pack or run; SystemExit 1 where a step was not done.

    Raises:
        InputError: settings that cannot work.
    """
    check_types(Config, vars(config), "settings")
    every = [one.name for one in steps(sized(config))]
    for name in config.steps:
        if name not in every:
            raise unknown("step", name, every)
    if (config.pack is None) == (config.run is None):
        raise InputError("say --pack DIR here, or --run DIR there, which start.py does for you")
    idle = {"--pack": ("out", "began")} if config.run is None else {"--run": PACKING}
    refuse_idle(config, Config(), idle)
    if config.run is not None:
        run(config, Path(config.run))
        return
    assert config.pack is not None
    if config.data_dir is None and not config.miniature:
        raise InputError("say where CIFAR-10 lies: --data-dir; or pack a rehearsal: --miniature")
    data = None if config.data_dir is None else Path(config.data_dir).expanduser()
    folder = Path(config.pack)
    about = pack(folder, data, config.max_mb, config.packages, words_of(config))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {len(about['parts'])} part(s), {size:.1f} MB; there: python start.py")


def sized(config: Config) -> Plan:
    """The plan in the sizes that were asked for."""
    plan = MINIATURE if config.miniature else FULL
    return replace(plan, limits=config.limits or plan.limits, images=config.images or plan.images)


def words_of(config: Config) -> list[str]:
    """Options of the run that were given as it was packed."""
    words = ["--minutes", str(config.minutes)]
    for name in ("limits", "steps"):
        if values := getattr(config, name):
            words += [f"--{name}", *map(str, values)]
    if config.images is not None:
        words += ["--images", str(config.images)]
    return words + (["--miniature"] if config.miniature else [])


def check_sizes(record: Record) -> None:
    """Refuse to take results in other sizes for those of this plan, as of a rehearsal.

    Raises:
        InputError: which setting was another one.
    """
    *before, now = [json.loads(json.dumps(visit["plan"])) for visit in record.visits]
    for name, value in now.items():
        for plan in before:
            if name != "limits" and plan.get(name) != value:  # a limit is in its step's name
                raise InputError(
                    f"{record.path} has results of a plan whose {name} was {plan.get(name)}, not "
                    f"{value}: name another file, --out"
                )


def run(config: Config, folder: Path) -> None:
    """Take the steps that are not done yet.

    Raises:
        InputError: no such folder, or results in other sizes.
        SystemExit: 1, where not all are done.
    """
    if not (folder / "parts.json").is_file():
        raise InputError(f"{folder} is no plan that start.py unpacked")
    plan = sized(config)
    if config.miniature and (folder / "data").is_dir():
        plan = replace(plan, training=COLOUR)
    began = time.time() if config.began is None else config.began
    ends = began + 60 * config.minutes
    out = folder / "gpu_plan.json" if config.out is None else Path(config.out)
    packed = read_json(folder / "parts.json")["commit"]
    about = {**made_by(), "packed_commit": packed, "began": began, "plan": asdict(plan)}
    record = Record(out, about)
    check_sizes(record)
    chosen = [one for one in steps(plan) if not config.steps or one.name in config.steps]
    states = play(chosen, plan, folder, record, ends)
    print(as_text({name: record.steps[name] for name in states}))
    print(f"{time.time() - began:.0f} s in all; results are in {out}")
    if set(states.values()) != {"done"}:
        sys.exit(1)


if __name__ == "__main__":
    run_script(
        lambda: main(tyro.cli(Config, prog=prog())),
        stopped="python start.py goes on with what is not done",
    )

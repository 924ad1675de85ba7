"""The structure of the code: imports run down a chain, and take no more than they need."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

CHAIN = ("advgame", "envs", "agents", "scripts")
# what of advgame.run the mathematics may see; files of advgame that read or write runs see all
PLUMBING = {"advgame.run.files", "advgame.run.options"}
WITH_RUNS = {
    "__init__.py",
    "__main__.py",
    "arena/judge.py",
    "arena/population.py",
    "arena/rounds.py",
    "arena/tournament.py",
    "classifiers/saved.py",
    "evaluation/judge.py",
    "evaluation/report.py",
    "evaluation/sweep_report.py",
    "targets.py",
    "zoo/entries.py",
    "zoo/shipping.py",
    "games/cat_and_mouse.py",
}


def imported(file):
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("package", CHAIN)
def test_imports_run_down_only(package):
    above = set(CHAIN[CHAIN.index(package) + 1 :])
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & above, f"{file} imports {tops & above}"


def test_the_mathematics_does_without_the_plumbing():
    """Games and the loop share the panels that curves are drawn in, nothing else."""
    top = ROOT / "advgame"
    files = [one for one in top.rglob("*.py") if top / "run" not in one.parents]
    names = {str(file.relative_to(top)): set(imported(file)) for file in files}
    assert names.keys() >= WITH_RUNS
    for name, modules in names.items():
        allowed = PLUMBING | ({"advgame.run.curves"} if name.startswith("games/") else set())
        used = {one for one in modules if one.startswith("advgame.run")}
        assert name in WITH_RUNS or used <= allowed, f"{name} imports {used - allowed}"


def run(code, **settings):
    subprocess.run([sys.executable, "-c", code], check=True, **settings)


@pytest.mark.slow
def test_advgame_works_beside_somebody_elses_envs(tmp_path):
    """The mathematics must not need our `envs` and `agents`, whose names are common."""
    (tmp_path / "envs.py").write_text("raise SystemExit('the wrong envs')")
    (tmp_path / "agents.py").write_text("raise SystemExit('the wrong agents')")
    run(
        "import advgame, advgame.attacks, advgame.games.las_at, advgame.evaluation.judge",
        cwd=tmp_path,
    )


def test_importing_envs_registers_the_ids_and_imports_no_torch():
    run("""
import sys, envs, gymnasium
assert "torch" not in sys.modules and "stable_baselines3" not in sys.modules
assert sum(name.startswith("advgame/") for name in gymnasium.registry) >= 5
""")


def test_the_public_names_are_there_and_import_torch_only_when_used():
    run("""
import sys, advgame, agents
from importlib import import_module
names = "arena", "attacks", "classifiers", "data", "evaluation", "games", "privacy", "zoo"
packages = [advgame, agents, *(import_module(f"advgame.{name}") for name in names)]
assert "torch" not in sys.modules
assert advgame.__version__[0] == "0"
for package in packages:
    assert all(getattr(package, name) for name in package.__all__)
    assert set(package.__all__) == set(dir(package))
    assert not hasattr(package, "nothing")
from advgame import *
assert Linf(0.1).norm == "Linf" and games.Trades and attacks.SPSA
""")


def test_a_folder_that_is_not_installed_has_no_version():
    run("""
import importlib.metadata as metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
import advgame
assert advgame.__version__ == "unknown"
""")


def test_a_training_that_says_no_game_is_told_so():
    from advgame.run.defender_job import DefenderJob
    from advgame.run.settings import RunConfig

    class Empty(DefenderJob):
        config = RunConfig

        def title(self, config):
            return "empty"

    with pytest.raises(NotImplementedError, match="Empty says neither rules nor game"):
        Empty().rules(RunConfig(), None, None)


def test_the_names_of_colour_data_sets_are_those_of_the_data():
    from advgame.choices import COLOUR
    from advgame.data import STATISTICS

    assert tuple(STATISTICS) == COLOUR

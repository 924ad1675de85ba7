"""The structure of the code: imports run down, files and names stay as the design has them."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

BELOW = {"advgame": {"agents", "envs", "scripts"}, "envs": {"agents"}, "agents": {"envs"}}


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_down_only(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert not tops & (BELOW[package] | {"scripts"}), f"{file} imports {tops}"


def test_advgame_works_beside_somebody_elses_envs(tmp_path):
    """`envs` and `agents` are common names: the mathematics must not need ours."""
    (tmp_path / "envs.py").write_text("raise SystemExit('the wrong envs')")
    (tmp_path / "agents.py").write_text("raise SystemExit('the wrong agents')")
    code = "import advgame, advgame.attacks, advgame.games.las_at, advgame.evaluation.judge"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_public_names_are_there_and_import_torch_only_when_used():
    code = """
import sys, advgame
from importlib import import_module
names = "attacks", "classifiers", "evaluation", "games", "privacy"
packages = [advgame, *(import_module(f"advgame.{name}") for name in names)]
assert "torch" not in sys.modules
assert advgame.__version__[0] == "0"
for package in packages:
    assert all(getattr(package, name) for name in package.__all__)
    assert set(package.__all__) == set(dir(package))
    assert not hasattr(package, "nothing")
from advgame import *
assert Linf(0.1).norm == "Linf" and games.Trades and attacks.SPSA
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_not_installed_has_no_version():
    code = """
import importlib.metadata as metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
import advgame
assert advgame.__version__ == "unknown"
"""
    subprocess.run([sys.executable, "-c", code], check=True)

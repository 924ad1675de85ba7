"""CONTRIBUTING's recipes, followed to the letter in a copy of the repository.

The first line of a code block says where it goes: a new file, or a place in one that is there.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

COPIED = ("advgame", "envs", "agents", "scripts", "docs", "pyproject.toml")
SMALL = "--train-n 500 --epochs 3 --batch-size 32 --eval-n 40"


def recipes():
    """(file, where in it or "", text) of every code block that says where it goes."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = r"^```\w+\n(?:# |<!-- )([\w/]+\.\w+)(?:, (.*?))?(?: -->)?\n(.*?)^```"
    return re.findall(block, text, re.DOTALL | re.MULTILINE)


def follow(root, file, where, text):
    """Put a block where its first line says."""
    path = root / file
    if not where:
        assert not path.exists(), f"{file} is there already"
        path.write_text(text)
        return
    before = {
        "the imports": r"(?=^from advgame)",
        "the table": r"(?<=^\|---).*\n()",
    }.get(where.removeprefix("among ").removeprefix("in "))
    found = re.search(
        before or rf"^{where.removeprefix('in ')}\b.*\{{\n()", path.read_text(), re.MULTILINE
    )
    assert found, f"{file} has no place {where!r}"
    old = path.read_text()
    path.write_text(old[: found.end()] + text + old[found.end() :])


def run(root, *words):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, text=True, capture_output=True
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy in which the game, the attack and the study of the text are there, and have run."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for file, where, text in recipes():
        follow(root, file, where, text)
    words = ("--seeds", "1", "--methods", "gaussian", "pgd-at", "--attacks", "random10", "pgd20")
    run(root, "scripts/study.py", "noise", *words, f"--extra={SMALL}")
    return root


def test_the_recipes_are_a_game_an_attack_and_a_study():
    new = [file for file, where, _ in recipes() if not where]
    assert [file.split("/")[1] for file in new] == ["games", "attacks", "studies"]


@pytest.mark.slow
def test_the_new_game_trains_and_is_judged(followed):
    report = json.loads((followed / "runs/noise/digits/gaussian-seed0/report.json").read_text())
    assert report["n"] == 40
    assert 0 <= report["accuracy"]["pgd20"] <= report["accuracy"]["clean"] <= 1
    assert "| `gaussian` |" in (followed / "docs" / "games.md").read_text()


@pytest.mark.slow
def test_the_new_attack_has_a_name_everywhere(followed):
    report = json.loads((followed / "runs/noise/digits/pgd-at-seed0/report.json").read_text())
    assert (
        report["accuracy"]["pgd20"] <= report["accuracy"]["random10"] <= report["accuracy"]["clean"]
    )
    code = """
import torch
from advgame import Linf, attacks
x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
attack = attacks.by_name("random10", Linf(0.1))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
moved = attack.perturb(model, x, y, rng=torch.Generator().manual_seed(0))
assert 0 < (moved - x).abs().max() <= 0.1 + 1e-6
"""
    run(followed, "-c", code)


@pytest.mark.slow
def test_the_new_study_has_a_table(followed):
    found = json.loads((followed / "results/noise/digits.json").read_text())
    assert {one["method"] for one in found["runs"]} == {"gaussian", "pgd-at"}
    table = (followed / "results" / "noise" / "digits.md").read_text()
    assert "| gaussian |" in table
    assert "| pgd-at |" in table


@pytest.mark.slow
def test_what_was_added_is_in_the_style(followed):
    """After `make format`, which sorts imports."""
    changed = [file for file in {file for file, *_ in recipes()} if file.endswith(".py")]
    for words in (("check", "--fix", "-q"), ("format", "--check"), ("check",)):
        run(followed, "-m", "ruff", *words, *changed)


def test_each_recipe_is_a_screen():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert sum(section.startswith("Add a") for section in sections) == 3
    for section in sections:
        assert len(section.splitlines()) <= 75, section.splitlines()[0]

"""The pages of the environments: their code runs, their tables are the code's."""

import re

import gymnasium as gym
import pytest
from conftest import ROOT

import envs
from advgame.attacks import features, menu, squares
from envs.attack import AttackVectorEnv

PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number in range(len(blocks(page)))],
    ids=lambda value: getattr(value, "stem", value),
)
def test_code_on_the_pages_runs_as_it_stands(page, number, capsys):
    exec(compile(blocks(page)[number], page.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out, "each block ends by printing what came of it"


def test_the_ppo_of_the_page_is_short():
    ppo = next(code for code in blocks(ROOT / "docs" / "attack.md") if "PPO" in code)
    assert len([line for line in ppo.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("table", [features.FEATURES, squares.FEATURES])
def test_the_tables_of_features_are_the_codes(table):
    text = (ROOT / "docs" / "attack.md").read_text()
    for name, words in table.items():
        shown = re.sub(r"\|([a-z ]+)\|", r"abs(\1)", words)
        assert f"| `{name}` | {shown} |" in text


def test_every_environment_has_a_page_with_a_picture():
    text = "".join(page.read_text() for page in PAGES)
    for name in (name for name in gym.registry if name.startswith("advgame/")):
        assert name.split("/")[1] in text
    for page in PAGES:
        for link in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / link).exists()
    assert envs.__doc__


def test_the_pages_name_every_argument_and_choice():
    text = (ROOT / "docs" / "attack.md").read_text()
    for name in AttackVectorEnv.__init__.__kwdefaults__:
        assert f"`{name}`" in text
    for name in (*menu.LOSSES, *menu.DIRECTIONS, *menu.MOVES):
        assert name in text

"""README and docs: their code runs, their tables are the code's, their links lead somewhere."""

import ast
import inspect
import re
import runpy
import shlex
import tempfile
import tomllib
from importlib import import_module

import gymnasium as gym
import pytest
import tyro
from conftest import ROOT

from advgame.attacks import gradient_steps, patches
from advgame.games import Lesson, adaptive, stopping
from advgame.health import SIGNS
from envs import duel
from envs.queries import Shared

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENVS = {  # a page each
    "StrategySelection": "strategy_selection_v0",
    "AdaptiveAttack": "adaptive_attack_v0",
    "Attack": "attack_v0",
    "BlackBoxAttack": "black_box_attack_v0",
    "GAILCartPole": "gail_cart_pole_v0",
    "GAILMountainCar": "gail_mountain_car_v0",
}

DUEL = "duel_v0"  # of PettingZoo


NUMBER = r"(?<![\w.])-?\d+\.?\d*(?![\w])"
# what the words around a block say of what it prints: (numbers, text) -> whether it is so
CLAIMS = {
    ("adt", 0): lambda n, said: n[1] < n[5],  # λ spreads the distribution
    ("adaptive_attack_v0", 0): lambda n, said: 1 <= n[1] < 8,
    ("adaptive_attack_v0", 1): lambda n, said: n[0] != -0.05 and n[1] > 0 and n[2] == 4,
    ("adaptive_attack_v0", 2): lambda n, said: n[0] == 0 and n[2] < n[3] < 0,
    ("arena", 1): lambda n, said: n[1] == 2 and said.count("[0.333 0.333 0.333") == 2,
    ("attack_v0", 1): lambda n, said: n[1] > 0.2,
    ("black_box_attack_v0", 1): lambda n, said: n[0] > 0,  # episodes
    ("cat_and_mouse", 0): lambda n, said: n[1] > n[2] and n[7] > n[8],  # retraining answers
    ("games", 0): lambda n, said: n[0] == 33,  # TRADES' 27 of the table, and 6 for AWP
    ("games", 1): lambda n, said: said.count("100.0 %") == 3 and "0 flag" in said,
    ("duel_v0", 0): lambda n, said: n[0] == n[1],
    ("duel_v0", 1): lambda n, said: said.count("per match after") == 4 and n[-1] == 40,
    ("environments", 0): lambda n, said: n[:2] == [600, 400] and 2 <= n[2] <= 10,
    ("environments", 3): lambda n, said: said.split()[-2:] == ["False", "False"],
    ("gail_cart_pole_v0", 1): lambda n, said: n[0] >= 8,  # a true return
    ("gail_mountain_car_v0", 1): lambda n, said: n[0] == -200,  # nobody leads it up the hill
    ("imitation", 1): lambda n, said: -150 < n[0] < 0,
    ("imitation", 2): lambda n, said: -10 < n[0] < 0,  # doing nothing gets far less
    ("imitation", 3): lambda n, said: said.count("25") == 4,
    ("strategies", 0): lambda n, said: 1 <= n[1] < n[0] < n[2] <= 10,
    ("las_at", 0): lambda n, said: n[0] < n[1],  # a price has been taken off R1
    ("environments", 4): lambda n, said: said.strip() == "True",
    ("las_at", 2): lambda n, said: n[0] > n[1] > 10,  # more than a guess
    ("las_at", 1): lambda n, said: "[3 2 2]" in said and 0.075 < n[-1] < 0.15,
    ("runs", 0): lambda n, said: "EarlyStopping after epoch" in said and n[-1] < 30,
    ("l2l", 0): lambda n, said: n[1] < n[0],  # the attacker learns
    ("minimax", 0): lambda n, said: n[1] < n[0],
    ("solvers", 0): lambda n, said: n[0] > 1 > n[2] and n[1] < 0.1,
    ("solvers", 1): lambda n, said: n[0] < n[1] == 2.30,
    ("strategy_selection_v0", 1): lambda n, said: n[1] == 8,  # 256 decisions, 32 a step
    ("updaters", 1): lambda n, said: n[0] < 0.01,  # Signum's own
    ("updaters", 2): lambda n, said: n[1] < n[0],  # it has learned more than Adam
}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


# trainings of 10 seconds and more
TRAININGS = {("duel_v0", 1), ("las_at", 2), ("minimax", 0), ("l2l", 0), ("privacy", 0)}


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(
            page, number, marks=[pytest.mark.slow] if (page.stem, number) in TRAININGS else []
        )
        for page in PAGES
        for number in range(len(blocks(page)))
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_code_on_the_pages_runs_as_it_stands(page, number, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    exec(compile(blocks(page)[number], page.name, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert said, "each block ends by printing what came of it"
    if claim := CLAIMS.get((page.stem, number)):
        assert claim([float(one) for one in re.findall(NUMBER, said)], said)


@pytest.mark.parametrize("page", [*ENVS.values(), DUEL])
def test_each_environments_page_has_a_short_ppo(page):
    """README promises 15 lines, the duel's page as many of self-play."""
    ppo = next(code for code in blocks(ROOT / "docs" / "envs" / f"{page}.md") if "PPO" in code)
    assert len([line for line in ppo.splitlines() if line.strip()]) <= 15


def test_every_claim_is_of_a_block_that_there_is():
    assert CLAIMS.keys() <= {(page.stem, i) for page in PAGES for i in range(len(blocks(page)))}


@pytest.mark.parametrize(
    ("page", "module"), [("attack", gradient_steps), ("black_box_attack", patches)]
)
def test_the_tables_of_features_are_the_codes(page, module):
    text = (ROOT / "docs" / "envs" / f"{page}_v0.md").read_text()
    for name, words in module.FEATURES.items():
        shown = re.sub(r"\|([a-z ]+)\|", r"abs(\1)", words)
        assert f"| `{name}` | {shown} |" in text


def test_the_stoppers_features_are_the_codes():
    pages = {"strategies.md": stopping, "envs/adaptive_attack_v0.md": adaptive}
    for page, module in pages.items():
        text = (ROOT / "docs" / page).read_text()
        for name, words in module.FEATURES.items():
            shown = re.sub(r"\|(δ)\|", r"abs(\1)", words)
            assert f"| `{name}` | {shown} |" in text


# what Gymnasium's own pages are made of
HEADS = (
    "Description", "Action space", "Observation space", "Rewards", "Starting state", "Episode end",
    "Arguments", "Your own PPO on it", "Version history",
)  # fmt: skip


@pytest.mark.parametrize(("name", "page"), ENVS.items())
def test_every_environment_has_a_page_of_its_own(name, page):
    text = (ROOT / "docs" / "envs" / f"{page}.md").read_text()
    assert text.startswith(f"# {name}-v0\n\n![")
    assert f"({page}.gif)\n" in text
    assert (ROOT / "docs" / "envs" / f"{page}.gif").stat().st_size < 300_000
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADS
    env = gym.make(f"advgame/{name}-v0").unwrapped
    assert f"| action space | `{' '.join(str(env.action_space).split())}` |" in text
    assert f"{env.observation_space.shape}, float32)`" in text
    arguments = set(inspect.signature(env.vector).parameters)
    if name in ("Attack", "BlackBoxAttack"):
        arguments = (arguments - {"shared"}) | set(Shared.__annotations__)
    table = text.split("## Arguments")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {one for row in rows for one in re.findall(r"`(\w+)`", row)} == arguments


def test_the_duels_page_is_the_codes():
    text = (ROOT / "docs" / "envs" / f"{DUEL}.md").read_text()
    assert (ROOT / "docs" / "envs" / f"{DUEL}.gif").stat().st_size < 300_000
    heads = (*HEADS[:-2], "Self-play", HEADS[-1])
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == heads
    env = duel.parallel_env()
    assert text.startswith(f"# {env.metadata['name']}\n\n![")
    for agent in env.possible_agents:
        space = " ".join(str(env.action_space(agent)).split())
        assert f"| {agent}'s action space | `{space}` |" in text
    assert f"a `Box` of {env.observation_space('attacker').shape[0]} numbers" in text
    for name, words in duel.FEATURES.items():
        assert f"| `{name}` | {words} |" in text
    table = text.split("## Arguments")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {one for row in rows for one in re.findall(r"`(\w+)`", row)}
    assert named == set(inspect.signature(duel.DuelEnv).parameters)
    assert f"{env.max_cycles} on digits" in table
    assert f"{len(env.held_out)} validation images" in table
    lists = text.split("## Observation space")[0]
    for values in env.lessons.lists[:3]:
        assert f"| {', '.join(f'{value:g}' for value in values)} |" in lists
    fixed = {"[5, 7, 1]": env.space.index(8, 10, 2), "[2, 0, 0, 0]": env.lessons.index(Lesson())}
    assert all(f"`{shown}`" in lists and list(it) == eval(shown) for shown, it in fixed.items())


def test_no_environment_is_without_a_page():
    assert {f"advgame/{name}-v0" for name in ENVS} == {
        name for name in gym.registry if name.startswith("advgame/")
    }
    for page in PAGES:
        for link in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / link).exists()
    text = (ROOT / "docs" / "envs" / "attack_v0.md").read_text()
    for name in (*gradient_steps.LOSSES, *gradient_steps.DIRECTIONS, *gradient_steps.MOVES):
        assert name in text
    text = (ROOT / "docs" / "environments.md").read_text()
    for name in ENVS:
        spec = gym.spec(f"advgame/{name}-v0")
        said = next(row for row in text.splitlines() if row.startswith(f"| `{name}-v0` |"))
        for column, value in ((2, spec.max_episode_steps), (3, spec.reward_threshold)):
            cell = said.split("|")[column].strip()
            assert cell.startswith("none" if value is None else str(value))


def test_the_films_of_the_pages_are_drawn_by_their_command(tmp_path):
    """Their beginnings; what is drawn, tests/test_pictures.py says."""
    draw = runpy.run_path(str(ROOT / "docs" / "envs" / "draw.py"))
    draw["main"](tmp_path, 0.02)
    assert {path.stem for path in tmp_path.glob("*.gif")} == {*ENVS.values(), DUEL}


def anchors(page):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


MARKDOWN = [
    *ROOT.glob("*.md"),
    *(page for name in ("docs", "results") for page in (ROOT / name).rglob("*.md")),
]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


GROUPS = "game|strategy|attacker|defender|eval|cost|time|policy|discriminator|updater"


def test_every_tensorboard_tag_is_in_words():
    """The tags that the packages write in full; those made of parts are named by pattern."""
    page = (ROOT / "docs" / "runs.md").read_text()
    found = set()
    for package in ("advgame", "envs", "agents"):
        for path in (ROOT / package).rglob("*.py"):
            tree = list(ast.walk(ast.parse(path.read_text())))
            parts = {id(n) for one in tree if isinstance(one, ast.JoinedStr) for n in one.values}
            words = [n.value for n in tree if isinstance(n, ast.Constant) and id(n) not in parts]
            found |= {one for one in words if re.fullmatch(rf"({GROUPS})/\w+", str(one))}
    assert len(found) > 50
    assert not [tag for tag in sorted(found) if f"`{tag}`" not in page]
    assert not [
        sign for sign in SIGNS if f"| `{sign}` |" not in (ROOT / "docs/evaluation.md").read_text()
    ]


def test_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert "unrelated to facebookresearch/advgame" in text[:1500]
    for name in (name for name in gym.registry if name.startswith("advgame/")):
        assert f"`{name}`" in text
    text += (ROOT / "CONTRIBUTING.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"({page.relative_to(ROOT)}" in text, page.name


def public_packages():
    """Packages whose `__all__` says what is theirs."""
    inits = [ROOT / "envs" / "__init__.py", ROOT / "agents" / "__init__.py"]
    for init in [*inits, *(ROOT / "advgame").rglob("__init__.py")]:
        name = ".".join(init.parent.relative_to(ROOT).parts)
        if hasattr(import_module(name), "__all__"):
            yield name


def test_the_api_page_lists_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    sections = re.split(r"^## `(.*)`$", text, flags=re.MULTILINE)[1:]
    listed = {
        package: [
            name
            for row in re.findall(r"^\| (`.*?) \|", body, re.MULTILINE)
            for name in re.findall(r"`(\w+)`", row)
        ]
        for package, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert listed.keys() == set(public_packages())
    for package, names in listed.items():
        assert sorted(names) == sorted(import_module(package).__all__), package
        for name in names:
            assert getattr(import_module(package), name) is not None


def test_what_strangers_run_is_what_we_run():
    """CI's steps are those of `.ci/run`, and pre-commit's are those of `make lint`."""
    targets = re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"- run: make ([\w-]+)", workflow) == " ".join(targets).split()
    recipe = (ROOT / "Makefile").read_text().split("lint: ")[1].split("\n\n")[0]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"\$\(BIN\)/(.*)", recipe) == re.findall(r"entry: .venv/bin/(.*)", hooks)


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in cited
    assert f"\nlicense: {project['license']}\n" in cited


def resolved(dotted):
    """What a dotted name is: a module, or what one holds."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_files_and_names_on_the_pages_are_there(page):
    text = page.read_text()
    for path in re.findall(r"(?:`|python )((?:scripts|examples|tests)/\w+\.py)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:advgame|envs|agents|docs|results)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:advgame|envs|agents)(?:\.\w+)+)", text):
        resolved(name)


SHIMS = {"compare": ["study", "compare"], "gail_stability": ["study", "gail"]}


def parse(words):
    """The settings that a command line of a script means, by what the script itself would do."""
    name, *rest = words
    name, *rest = [*SHIMS.get(name, [name]), *rest]
    if name == "study":
        if not rest:
            return None
        name, *rest = [f"studies.{rest[0]}", *rest[1:]]
    script = import_module(name)
    known = getattr(script, "job", script)
    return known.parse(rest) if hasattr(known, "parse") else tyro.cli(script.Config, args=rest)


SAID = [
    *(ROOT / "scripts").rglob("*.py"),
    *(*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "results").rglob("README.md")),
]


@pytest.mark.parametrize("page", SAID, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_the_pages_are_understood(page, capsys):
    """Options that are renamed or gone are found here, on pages and in the scripts' own words."""
    command = r"(?:^ *|`)python scripts/(\w+)\.py(.*?)(?:#|`|$)"
    text = page.read_text().replace("\\\n", " ")
    for name, line in re.findall(command, text, re.MULTILINE):
        words = shlex.split(line.replace("$agent", "random"))
        # not whole, ended by what they print, or of a study that CONTRIBUTING adds
        if "..." in line or {"--list", "--help", "NAME", "noise"} & {*words[:1], *words[-1:]}:
            continue
        try:
            parse([name, *words])
        except SystemExit:
            pytest.fail(f"{name}.py {line}: {capsys.readouterr().err}")


def test_the_changelog_names_every_script():
    """Its table is of all scripts that there were, and what they became is there."""
    table = (ROOT / "CHANGELOG.md").read_text().split("### Scripts, old and new")[1].split("###")[0]
    shown = [line for line in table.splitlines() if line.startswith(("| `", "| new |"))]
    rows = [line.split("|")[1:3] for line in shown]
    before = [name for old, _ in rows for name in re.findall(r"`(\w+\.py)`", old)]
    now = {
        name
        for old, new in rows
        for name in re.findall(r"`(\w+\.py)", old if "same" in new else new)
    }
    assert len(before) == len(set(before)) == 24 + 2  # two studies are younger than the rest
    scripts = [path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()]
    assert now == {path.name for path in scripts}

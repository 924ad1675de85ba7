"""The documentation site: its menu is whole, its pages of the API are linked; slow: it builds."""

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text()
PACKAGES = re.findall(r"^## `(.*)`$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_the_menu_names_every_page_once():
    menu = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", CONFIG.split("\nnav:\n")[1], re.MULTILINE)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    pages += [ROOT / "results" / "README.md", *(ROOT / "results").glob("*/README.md")]
    expected = {str(page.relative_to(ROOT)) for page in pages}
    assert sorted(menu) == sorted(expected | {f"reference/{name}.md" for name in PACKAGES})


def test_names_of_the_api_page_are_links():
    pytest.importorskip("mkdocs")
    linked = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["linked"]
    shown = linked("`untouched`\n## `a.b`\n| `C`, `d` | `e.f` |\n## `g`\nh\n")
    assert shown.startswith("`untouched`\n## [`a.b`](../reference/a.b.md)\n| <autoref")
    assert re.findall(r'"([\w.]+)" optional><code>(\w+)<', shown) == [
        ("a.b.C", "C"),
        ("a.b.d", "d"),
    ]
    assert "`e.f`" in shown
    assert shown.endswith("## [`g`](../reference/g.md)\nh\n")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for page in ("", "overview", "las_at", "envs/attack_v0", "results/las_at", "contributing"):
        assert (tmp_path / page / "index.html").exists()
    attacks = (tmp_path / "reference" / "advgame.attacks" / "index.html").read_text()
    assert "advgame.attacks.GradientAttack" in attacks
    assert (
        'href="../reference/advgame.attacks/#advgame.attacks.GradientAttack"'
        in (tmp_path / "api" / "index.html").read_text()
    )

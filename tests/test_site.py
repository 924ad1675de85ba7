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


def test_no_line_ends_within_an_option():
    pytest.importorskip("mkdocs")
    content = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    shown = content("<p>1 ± 2 <code>a.py --no-b c</code> <code>d_e</code></p>", None, None, None)
    assert '<code>a.py <span class="word">--no-b</span> c</code> <code>d_e</code>' in shown
    assert "1\u00a0±\u00a02" in shown
    for untouched in (f"<code>--{'x' * 40}</code>", "<pre><span></span><code>a --b</code></pre>"):
        assert content(untouched, None, None, None) == untouched


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*/README.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_fits_its_column(page):
    """At 1280 pixels 100 characters do; the rest would have to be scrolled to."""
    for block in re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        assert max(map(len, block.splitlines())) <= 100, block


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

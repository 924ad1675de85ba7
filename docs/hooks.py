"""What mkdocs.yml cannot say: which files the site has, and its pages of the API.

On the site every file keeps its path in the repository, so that a link between docs/, results/ and
the pages beside them is right on a code host and on the site alike.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ADDRESSES = {  # of pages that lie at the root of the repository, where the site has its home
    "README.md": "overview/index.html",
    "CONTRIBUTING.md": "contributing/index.html",
    "CHANGELOG.md": "changelog/index.html",
    "CITATION.cff": "CITATION.cff",
}
FULL = re.compile(r"`((?:advgame|envs|agents)(?:\.\w+)*\.[A-Z]\w*(?:\.\w+)?)`")  # of classes
PACKAGE = re.compile(r"^## `(.*)`$", re.MULTILINE)
TABLES = re.compile(r"results/[^/]+/(?!README\.md$).*")  # what a study's page leads to
CODE = re.compile(r"(?<!</span>)<code>([^<]+)</code>")  # within a line
HYPHENED = re.compile(r"(?<!\S)(?=\S*-)\S{2,30}(?!\S)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All files of the site, by their paths in the repository, and a page per public package."""
    settings = (config.site_dir, config.use_directory_urls)
    site = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    for file in files:
        if file.src_dir == config.docs_dir and not file.src_uri.endswith(".py"):
            path = f"docs/{file.src_uri}"
            site.append(File(path, str(ROOT), *settings, dest_uri=file.dest_uri))
    results = [path.relative_to(ROOT) for path in sorted((ROOT / "results").rglob("*.*"))]
    site += [File(path.as_posix(), str(ROOT), *settings) for path in results]
    site += [File(name, str(ROOT), *settings, dest_uri=to) for name, to in ADDRESSES.items()]
    for package in PACKAGE.findall((ROOT / "docs" / "api.md").read_text()):
        name = f"reference/{package}.md"
        site.append(File.generated(config, name, content=f"::: {package}\n"))
    return Files(site)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names lead to their documentation: all of the page of the API, full ones elsewhere.

    Tables of a study are in no menu: they have the whole width, and a link to the study's page.
    """
    if page.file.src_uri == "docs/api.md":
        return linked(markdown)
    if TABLES.fullmatch(page.file.src_uri):
        page.meta["hide"] = ["navigation", "toc"]
        up = "../" * (page.file.src_uri.count("/") - 2)
        markdown = f"[The study of these tables]({up}README.md)\n\n{markdown}"
    return FULL.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', markdown)


def linked(markdown: str) -> str:
    """Names in the section of a package, `` `name` ``, as links to it; constants have no target."""
    link = r'<autoref identifier="PACKAGE.\1" optional><code>\1</code></autoref>'
    head, *sections = PACKAGE.split(markdown)
    for package, body in zip(sections[::2], sections[1::2], strict=True):
        rows = re.sub(r"`(\w+)`", link.replace("PACKAGE", package), body)
        head += f"## [`{package}`](../reference/{package}.md){rows}"
    return head


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A mean and its spread stay on one line, also in a narrow column, and so does an option."""
    return CODE.sub(whole, html.replace(" ± ", "\u00a0±\u00a0"))


def whole(code: re.Match[str]) -> str:
    """Code in which no line ends at a hyphen of a word, unless the word is long."""
    words = HYPHENED.sub(r'<span class="word">\g<0></span>', code[1])
    return f"<code>{words}</code>"

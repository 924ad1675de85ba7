"""No ten equal lines in a row in two scripts, or in two agents."""

import ast
import io
import tokenize
from collections import defaultdict

import pytest
from conftest import ROOT

LINES = 10
PLACES = {"scripts": "**/*.py", "agents": "*.py"}


def lines_of(path):
    """The lines without comments, docstrings, imports and white space."""
    source = path.read_text(encoding="utf-8")
    left_out = set()
    for node in ast.walk(ast.parse(source)):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or words:
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    kept = defaultdict(str)
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.start[0] not in left_out:
            kept[token.start[0]] += token.string
    return [text for _, text in sorted(kept.items()) if text]


def repeated(files):
    """Pairs of names -> the first line of what both have in a row of `LINES`."""
    seen, found = {}, {}
    for name, lines in files.items():
        for start in range(len(lines) - LINES + 1):
            first = seen.setdefault(tuple(lines[start : start + LINES]), name)
            if first != name:
                found.setdefault(frozenset((first, name)), lines[start])
    return found


@pytest.mark.parametrize("folder", PLACES)
def test_nothing_is_said_twice(folder):
    paths = sorted((ROOT / folder).glob(PLACES[folder]))
    found = repeated({str(path.relative_to(ROOT)): lines_of(path) for path in paths})
    assert {tuple(sorted(pair)): line for pair, line in found.items()} == {}


def test_a_repetition_is_found_through_white_space_and_comments(tmp_path):
    body = [f"    value_{k} = compute({k})" for k in range(LINES)]
    one, two, other = (tmp_path / f"{name}.py" for name in ("one", "two", "other"))
    one.write_text("\n".join(["def one():", *body]))
    two.write_text(
        "\n".join(["import os", "if os:", "  def two():", *("  " + b + "  # why" for b in body)])
    )
    other.write_text("\n".join(["def other():", *body[1:]]))
    found = repeated({path.stem: lines_of(path) for path in (one, two, other)})
    assert set(found) == {frozenset(("one", "two"))}
